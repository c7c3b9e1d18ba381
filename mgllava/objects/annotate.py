"""Detect the objects of a whole data set, in any number of processes, with interruptions."""

import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..image_processing_mgllava import load_picture
from .annotation_files import Found, PartFile, Parts, errors_file, parts_folder
from .boxes import check_detections
from .detector import Detections, Detector
from .draw import explain_selection
from .pictures import Picture
from .processes import Processes, join_processes
from .tags import Tagger

__all__ = ["Annotated", "annotate"]

# A detector that refuses this many pictures before it takes one is the wrong one, or wrongly set.
MOST_REFUSED_AT_FIRST = 20
MOST_WORKERS = 8


class Annotated(NamedTuple):
    """What a finished annotation consists of.

    Attributes:
        output: the box file.
        num_pictures: how many it holds.
        num_boxes: of all of them.
        num_failed: how many pictures could not be used; `errors` says why.
        errors: the file that lists them; there is none if all could.
    """

    output: Path
    num_pictures: int
    num_boxes: int
    num_failed: int
    errors: Path


def annotate(
    pictures: Sequence[Picture],
    load: Callable[[], tuple[Detector, Tagger | None]],
    output: str | Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 8,
    draw: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> Annotated | None:
    """Detect the objects of pictures and write them as one box file, `[{"id", "boxes", "scores", "labels"}, ...]`.

    Started by `accelerate launch` or torchrun, every process takes its share. What is found is kept line by line in a
    folder beside the output, so that after an interruption the same call, in any number of processes, does what is left
    to do; pictures that could not be used are tried again. The main process makes the box file at the end, whole, and
    beside it a list of the pictures that could not be used. The folder stays: with it, a later call with more pictures
    looks only at the new ones.

    Args:
        pictures: as `find_pictures` lists them, the same in every process.
        load: makes the detector and, if it needs tags, their source; not called in a process with nothing left to do.
        output: the box file. Coordinates are in pixels of the upright picture, rounded to 0.01; scores to 1e-6.
        settings: what the detections depend on, as JSON; a call that goes on must have the same.
        batch_size: pictures to a call of the detector.
        draw: folder for a drawing of each picture this call looks at, named by its id; see `explain_selection`.
        num_workers: processes that read pictures ahead; 0 reads them between the batches. None: one for each core that
            is to be had, at most 8.
        progress: show a bar on standard error, for the main process's share.

    Returns:
        What was written; None in every process but the main one.

    Raises:
        ValueError: other settings than the call before, an output that is not of an earlier call, a detector without
            the tags it needs or that refuses every picture, or no picture that could be used.
        OSError: the disk is full or not writable, or another process ended early. What is found is not lost.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    output = Path(os.path.abspath(output))
    processes = join_processes()
    parts = Parts(output)
    parts.check_settings(settings)
    if output.exists() and not parts:
        raise ValueError(
            f"{output} exists, but not {parts_folder(output)}, where its pictures would be; remove it or name another "
            "output"
        )
    share = _share(pictures, processes.index, processes.count)
    todo = [picture for picture in share if picture.path not in parts]
    if todo:
        detector, tagger = load()
        if detector.needs_tags and tagger is None:
            raise ValueError(f"{detector.name} looks for the names it is given; give it a source of tags")
        run = _Run(detector, tagger, None if draw is None else Path(draw))
        parts.keep_settings(settings)
        if num_workers is None:
            num_workers = _idle_cores(processes)
        with (
            PartFile(parts_folder(output), processes.index) as file,
            _bar(len(share), len(share) - len(todo), processes, progress) as bar,
        ):
            for batch in _batches(todo, batch_size, num_workers):
                file.append(run.find(batch))
                bar.update(len(batch))
    processes.wait()
    if not processes.is_main:
        return None
    num_pictures, num_boxes = Parts(output).merge(pictures, output)
    return Annotated(output, num_pictures, num_boxes, len(pictures) - num_pictures, errors_file(output))


class _Run:
    """A detector at work on one process's share."""

    def __init__(self, detector: Detector, tagger: Tagger | None, draw: Path | None) -> None:
        self._detector = detector
        self._tagger = tagger if detector.needs_tags else None
        self._draw = draw
        self._num_found = 0
        self._num_refused = 0
        if draw is not None:
            draw.mkdir(parents=True, exist_ok=True)

    def find(self, batch: Sequence[tuple[Picture, Image.Image | str]]) -> list[Found]:
        """What is on the pictures of a batch, each read or the reason why it was not."""
        images = [image for _, image in batch if isinstance(image, Image.Image)]
        results = iter(self._detect(images) if images else ())
        found = []
        for picture, image in batch:
            result = image if isinstance(image, str) else next(results)
            if isinstance(result, str):
                found.append(Found(picture.path, error=result))
                continue
            if self._draw is not None and isinstance(image, Image.Image):
                explain_selection(image, **result.as_dict()).save(self._draw / _drawing_name(picture.id))
            found.append(Found(picture.path, result))
        return found

    def _detect(self, images: list[Image.Image]) -> list[Detections | str]:
        """The detections of each picture, or why the detector refuses it."""
        try:
            tags = None if self._tagger is None else self._tagger(images)
            found = self._detector(images, tags)
            for one in found:
                check_detections(**one.as_dict())
        except ValueError as error:
            if len(images) > 1:
                return [result for image in images for result in self._detect([image])]
            self._num_refused += 1
            if not self._num_found and self._num_refused >= MOST_REFUSED_AT_FIRST:
                raise ValueError(
                    f"{self._detector.name} refuses every picture so far ({self._num_refused}): {error}"
                ) from error
            return [f"{self._detector.name} refuses it: {error}"]
        if len(found) != len(images):
            raise RuntimeError(f"{self._detector.name} found {len(found)} results in {len(images)} pictures")
        self._num_found += len(found)
        return list(found)


class _Read(Dataset):
    """Pictures, decoded."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Picture, Image.Image | str]:
        picture = self._pictures[index]
        try:
            image = load_picture(Path(picture.path))
        except Exception as error:  # whatever a decoder makes of a damaged file, it is this file's fault
            return picture, str(error.__cause__ or error) or type(error).__name__
        image.info = {}
        return picture, image


def _batches(
    pictures: Sequence[Picture], batch_size: int, num_workers: int
) -> Iterator[list[tuple[Picture, Image.Image | str]]]:
    # Workers read single pictures, two batches ahead in all; whole batches for each of them would fill gigabytes with
    # photographs. They come pickled through a pipe: shared memory, where tensors go, is 64 MB in many containers.
    ahead = {"prefetch_factor": max(1, math.ceil(2 * batch_size / num_workers))} if num_workers else {}
    loader = iter(
        DataLoader(_Read(pictures), batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, **ahead)
    )
    while batch := list(islice(loader, batch_size)):
        yield batch


def _as_it_is(item: tuple[Picture, Image.Image | str]) -> tuple[Picture, Image.Image | str]:
    return item


def _share(pictures: Sequence[Picture], process: int, num_processes: int) -> list[Picture]:
    """The pictures of one process, each path once.

    By the name, not by the place in the list: should two processes list a folder while files come and go, they still
    agree on whose a picture is.
    """
    first: dict[str, Picture] = {}
    for picture in pictures:
        first.setdefault(picture.path, picture)
    return [
        picture for path, picture in first.items() if zlib.crc32(os.fsencode(path)) % num_processes == process
    ]


def _idle_cores(processes: Processes) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, available // processes.local_count))


def _bar(total: int, done: int, processes: Processes, progress: bool) -> tqdm:
    """Rate and time left; a line every half minute where standard error is a file."""
    others = f", process 1 of {processes.count}" if processes.count > 1 else ""
    return tqdm(
        total=total,
        initial=done,
        desc=f"detect{others}",
        unit=" pictures",
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not (progress and processes.is_main),
    )


def _drawing_name(id: str | int) -> str:
    return f"{str(id).replace('%', '%25').replace('/', '%2F')}.jpg"
