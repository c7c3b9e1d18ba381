"""Detect the objects of a whole data set, in any number of processes, with interruptions."""

import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..image_processing_mgllava import load_picture
from .annotation_files import Found, PartFile, Parts, errors_file, parts_folder, run_lock, stamp_of
from .boxes import check_detections
from .detector import Detections, Detector
from .draw import explain_selection
from .drawings import drawing_name, save_drawing
from .locks import hold_lock
from .pictures import Picture
from .processes import Processes, join_processes
from .tags import Tagger

__all__ = ["Annotated", "annotate"]

# A detector that fails on so many pictures in a row is broken, or the device is; one that has never found anything
# and fails otherwise than by refusing its input (ValueError) needs no more than a few to show it.
MOST_FAILED_IN_A_ROW = 20
MOST_BROKEN_AT_FIRST = 3
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
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
    to do; pictures that could not be used are tried again, last. The main process makes the box file at the end, whole,
    and beside it a list of the pictures that could not be used. The folder stays: with it, a later call with more
    pictures looks only at the new ones and at those whose file has changed.

    A batch on which the detector fails is looked at in smaller ones, down to the picture that it fails on, which is
    listed with the reason. Where memory runs out, batches stay smaller from there on. Detectors that pad the pictures
    of a batch to one size (DETR, Grounding DINO) place and score boxes a little differently in other batches.

    Args:
        pictures: as `find_pictures` lists them, the same in every process.
        load: makes the detector and, if it needs tags, their source; not called in a process with nothing left to do.
        output: the box file. Coordinates are in pixels of the upright picture, rounded to 0.01; scores to 1e-6.
        settings: what the detections depend on, as JSON; a call that goes on must have the same.
        batch_size: pictures to a call of the detector.
        draw: folder for a drawing of each picture, named by its id; see `explain_selection`. Of pictures done before,
            those that it lacks are drawn.
        num_workers: processes that read pictures ahead; 0 reads them between the batches. None: one for each core that
            is to be had, at most 8.
        progress: show on standard error what was done before and a bar, for the main process's share.

    Returns:
        What was written; None in every process but the main one.

    Raises:
        ValueError: other settings than the call before, an output that is not of an earlier call, a detector without
            the tags it needs or that refuses every picture, or no picture that could be used.
        RuntimeError: the detector fails on many pictures in a row, or on the first ones.
        OSError: the disk is full or not writable, or another process ended early or is at work on the same files. What
            is found is not lost.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    output = Path(os.path.abspath(output))
    _check_output(output, any(parts_folder(output).glob("process-*.jsonl")))
    processes = join_processes()
    with _alone(output, processes):
        parts = Parts(output)
        parts.check_settings(settings)
        _check_output(output, bool(parts))
        share = _share(pictures, processes.index, processes.count)
        stamps = {picture.path: stamp_of(picture) for picture in share}
        todo = [picture for picture in share if not parts.has_boxes(picture, stamps[picture.path])]
        failed_before = {picture.path for picture in todo if parts.has_failed(picture, stamps[picture.path])}
        todo.sort(key=lambda picture: picture.path in failed_before)
        any_found = len(parts) > 0
        if any_found and progress and processes.is_main:
            of = f" of process 1 of {processes.count}" if processes.count > 1 else ""
            _say(
                f"{len(share) - len(todo)} of {len(share)} pictures{of} were done before, by {parts_folder(output)}"
            )
        del parts  # of all processes' shares; a large data set has millions
        if not processes.is_main:
            pictures = share
        if draw is not None:
            draw = Path(draw)
            draw.mkdir(parents=True, exist_ok=True)
        if todo:
            with PartFile(parts_folder(output), processes.index) as file:
                detector, tagger = load()
                if detector.needs_tags and tagger is None:
                    raise ValueError(
                        f"{detector.name} looks for the names it is given; give it a source of tags"
                    )
                Parts.keep_settings(output, settings)
                if num_workers is None:
                    num_workers = _idle_cores(processes)
                run = _Run(detector, tagger, stamps, failed_before, any_found, draw)
                with _bar(len(share), len(share) - len(todo), processes, progress) as bar:
                    for batch in _batches(todo, batch_size, num_workers):
                        file.append(run.find(batch))
                        bar.update(len(batch))
                        run.stop_if_broken()
        if draw is not None:
            _draw_missing(share, Parts(output), draw)
        if progress and processes.is_main and processes.count > 1:
            _say("waiting for the other processes")
        processes.wait()
        if not processes.is_main:
            return None
        num_pictures, num_boxes = Parts(output).merge(pictures, output)
        return Annotated(output, num_pictures, num_boxes, len(pictures) - num_pictures, errors_file(output))


def _check_output(output: Path, is_known: bool) -> None:
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name the box file to write")
    if output.exists() and not is_known:
        raise ValueError(
            f"{output} exists, but not of an earlier call: {parts_folder(output)} holds none of its boxes; name "
            "another output, or remove the file if nobody needs it"
        )


@contextmanager
def _alone(output: Path, processes: Processes) -> Iterator[None]:
    with hold_lock(run_lock(output)) if processes.is_main else nullcontext():
        processes.wait()  # none reads the lines of former runs before the main process holds them
        yield


class _Run:
    """A detector at work on one process's share.

    Args:
        stamps: of the pictures, by their paths.
        failed_before: paths of pictures that could not be used before; that they fail again says nothing new.
        any_found: whether this data set has any detections.
        draw: folder for drawings.
    """

    def __init__(
        self,
        detector: Detector,
        tagger: Tagger | None,
        stamps: Mapping[str, int | None],
        failed_before: Set[str],
        any_found: bool,
        draw: Path | None,
    ) -> None:
        self._detector = detector
        self._tagger = tagger if detector.needs_tags else None
        self._stamps = stamps
        self._failed_before = failed_before
        self._any_found = any_found
        self._draw = draw
        self._largest_batch = sys.maxsize
        self._failed_in_a_row = 0
        self._broken: Exception | None = None

    def find(self, batch: Sequence[tuple[Picture, Image.Image | str]]) -> list[Found]:
        """What is on the pictures of a batch, each read or the reason why it was not."""
        read = [(picture, image) for picture, image in batch if isinstance(image, Image.Image)]
        results = iter(self._detect(read) if read else ())
        found = []
        for picture, image in batch:
            stamp = self._stamps[picture.path]
            result = image if isinstance(image, str) else next(results)
            if isinstance(result, str):
                found.append(Found(picture.path, stamp, error=result))
                continue
            if self._draw is not None and isinstance(image, Image.Image):
                drawing = explain_selection(image, **result.as_dict())
                save_drawing(drawing, self._draw / drawing_name(picture.id))
            found.append(Found(picture.path, stamp, result))
        return found

    def stop_if_broken(self) -> None:
        """Raise an error if the last pictures say that it is no single picture that is at fault."""
        if self._broken is None:
            return
        kind = ValueError if isinstance(self._broken, ValueError) else RuntimeError
        raise kind(
            f"{self._detector.name} fails on one picture after the other ({self._failed_in_a_row}), at last with "
            f"{type(self._broken).__name__}: {self._broken}; what was found before is kept, once this is put right "
            "the same command goes on"
        ) from self._broken

    def _detect(self, batch: Sequence[tuple[Picture, Image.Image]]) -> list[Detections | str]:
        """The detections of each picture, or why the detector finds none."""
        if len(batch) <= self._largest_batch:
            try:
                found = self._call(batch)
            except Exception as error:  # one picture must not end the run, whatever it brings to light
                if len(batch) == 1:
                    return [self._failure(batch[0][0], error)]
                if isinstance(error, OUT_OF_MEMORY):
                    self._largest_batch = len(batch) // 2
                    _say(
                        f"out of memory with {len(batch)} pictures at once; going on with {self._largest_batch} "
                        f"(--batch-size {self._largest_batch})"
                    )
            else:
                self._failed_in_a_row = 0
                self._any_found = True
                return found
        # Not in the handler: there the error's frames still hold the memory of the call that failed.
        middle = len(batch) // 2
        return self._detect(batch[:middle]) + self._detect(batch[middle:])

    def _call(self, batch: Sequence[tuple[Picture, Image.Image]]) -> list[Detections]:
        images = [image for _, image in batch]
        tags = None
        if self._tagger is not None:
            questions = [picture.question for picture, _ in batch] if self._tagger.needs_questions else None
            tags = self._tagger(images, questions)
        found = list(self._detector(images, tags))
        if len(found) != len(images):
            raise RuntimeError(f"{len(found)} results for {len(images)} pictures")
        for one in found:
            check_detections(**one.as_dict())
        return found

    def _failure(self, picture: Picture, error: Exception) -> str:
        """Why this picture cannot be used; notes if it is one of too many."""
        name = self._detector.name
        refused = isinstance(error, ValueError)
        reason = (
            f"{name} refuses it: {error}"
            if refused
            else f"{name} fails on it: {type(error).__name__}: {error}"
        )
        if picture.path not in self._failed_before and not (refused and self._any_found):
            self._failed_in_a_row += 1
            many = MOST_FAILED_IN_A_ROW if refused or self._any_found else MOST_BROKEN_AT_FIRST
            if self._failed_in_a_row >= many:
                self._broken = error
        return reason


def _draw_missing(share: Sequence[Picture], parts: Parts, folder: Path) -> None:
    """Draw the pictures that were done before and have no drawing yet."""
    missing = [picture for picture in share if not (folder / drawing_name(picture.id)).exists()]
    for picture, found in parts.found(missing):
        try:
            image = load_picture(Path(picture.path))
        except Exception as error:  # the file may have been damaged since
            _say(f"{picture.path} has boxes but cannot be drawn: {error}")
            continue
        save_drawing(explain_selection(image, **found), folder / drawing_name(picture.id))


class _Read(Dataset):
    """Pictures, decoded."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Picture, Image.Image | str]:
        picture = self._pictures[index]
        try:
            if os.path.exists(picture.path) and not os.path.isfile(picture.path):
                return picture, "it is a folder, a pipe or a device"  # the end of a pipe might never come
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
    for first in range(0, len(pictures), batch_size):
        try:
            batch = list(islice(loader, batch_size))
        except RuntimeError as error:  # all that a picture raises is caught where it is read
            raise ChildProcessError(
                f"a process that reads pictures ended ({error}); memory is short, or one of the pictures that follow "
                f"{pictures[first].path}, or that one, is at fault"
            ) from error
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
        picture
        for path, picture in first.items()
        if zlib.crc32(path.encode(errors="surrogatepass")) % num_processes == process
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


def _say(text: str) -> None:
    tqdm.write(f"detect: {text}", file=sys.stderr)
