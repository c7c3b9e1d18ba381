"""The files of an annotation: what is found so far, one line a picture, and the box file made of it."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ..files import remove_scratch, replace_file
from .detector import Detections
from .locks import lock_file
from .pictures import Picture

__all__ = ["Found", "PartFile", "Parts", "errors_file", "parts_folder", "run_lock", "stamp_of"]

SETTINGS = "settings.json"


def parts_folder(output: Path) -> Path:
    """Where the lines for a box file are collected: one file a process, beside the box file."""
    return output.with_name(f"{output.name}.parts")


def errors_file(output: Path) -> Path:
    """Where it says which pictures have no entry in the box file, and why."""
    return output.with_name(f"{output.name.removesuffix('.json')}.errors.json")


def run_lock(output: Path) -> Path:
    """What the main process of a run holds, so that no other run takes its scratch files away or adds to its lines."""
    return parts_folder(output) / "lock"


def stamp_of(picture: Picture) -> int | None:
    """A number that changes with the picture's file (its size or time of change) and question; None without a file."""
    try:
        status = os.stat(picture.path)
    except (OSError, ValueError):  # a name that no file can have is a ValueError
        return None
    state = f"{status.st_size} {status.st_mtime_ns} {picture.question}"
    return zlib.crc32(state.encode(errors="replace"))


class Found(NamedTuple):
    """What became of one picture.

    Attributes:
        path: of the picture.
        stamp: of the state it was in, by `stamp_of`.
        detections: on it; None if there is an error.
        error: why the picture could not be used.
    """

    path: str
    stamp: int | None
    detections: Detections | None = None
    error: str | None = None


class PartFile:
    """The file that one process appends its lines to.

    A line is written in one piece where the system does so, and is whole once its end is there: what a kill cut in half
    is skipped by whoever reads it, so nothing written is ever changed.

    Raises:
        OSError: the disk is full or not writable, or another process has the file open here; lines written before are
            intact.
    """

    def __init__(self, folder: Path, process: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"process-{process}.jsonl"

    def __enter__(self) -> Self:
        self._file = self.path.open("ab+", buffering=0)
        try:
            lock_file(self._file, self.path)
        except OSError:
            self._file.close()
            raise
        if (
            self._file.seek(0, os.SEEK_END)
            and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n"
        ):
            self._write(b"\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, found: Iterable[Found]) -> None:
        """Add a line for each picture."""
        self._write(b"".join(_line(one) for one in found))

    def _write(self, content: bytes) -> None:
        with _say_what_is_kept(self.path):
            while content:
                content = content[self._file.write(content) :]


def _line(found: Found) -> bytes:
    line: dict[str, Any] = {"picture": found.path, "stamp": found.stamp}
    if found.detections is None:
        line["error"] = found.error
    else:
        line["boxes"] = [[round(edge, 2) for edge in box] for box in found.detections.boxes]
        line["scores"] = [round(score, 6) for score in found.detections.scores]
        line["labels"] = list(found.detections.labels)
    return json.dumps(line, allow_nan=False).encode() + b"\n"


class Line(NamedTuple):
    """Where a picture's line is.

    Attributes:
        stamp: of the state the picture was in.
        error: why it could not be used; None if the line holds boxes.
        file: number of the file.
        start: first byte of the line.
        length: in bytes.
    """

    stamp: int | None
    error: str | None
    file: int
    start: int
    length: int


class Parts:
    """What all processes of all runs have found so far for one box file."""

    def __init__(self, output: Path) -> None:
        self._folder = parts_folder(output)
        self._files = sorted(self._folder.glob("process-*.jsonl"))
        self._first: dict[str, Line] = {}
        self._all: dict[str, list[Line]] = {}  # of pictures with several
        self._num_found = 0
        for number, path in enumerate(self._files):
            for start, raw, content in _whole_lines(path):
                error = None if "boxes" in content else content["error"]
                line = Line(content.get("stamp"), error, number, start, len(raw))
                self._num_found += error is None
                first = self._first.setdefault(content["picture"], line)
                if first is not line:
                    self._all.setdefault(content["picture"], [first]).append(line)

    def __len__(self) -> int:
        """How many lines hold boxes."""
        return self._num_found

    def has_boxes(self, picture: Picture, stamp: int | None) -> bool:
        """Whether the boxes of this picture are found, in the state of the stamp; in any where it has no file now."""
        return any(
            line.error is None and stamp in (None, line.stamp) for line in self._lines_of(picture.path)
        )

    def has_failed(self, picture: Picture, stamp: int | None) -> bool:
        """Whether this picture, in the state of the stamp, could not be used before."""
        return any(line.error is not None and line.stamp == stamp for line in self._lines_of(picture.path))

    def _lines_of(self, path: str) -> list[Line]:
        if path in self._all:
            return self._all[path]
        return [self._first[path]] if path in self._first else []

    def _line_of(self, picture: Picture) -> Line | None:
        """The line that counts: of the picture as it is now rather than as it was, with boxes rather than without."""
        lines = self._lines_of(picture.path)
        if len(lines) < 2:
            return lines[0] if lines else None
        stamp = stamp_of(picture)
        return max(lines, key=lambda line: (line.stamp == stamp, line.error is None))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to mix detections of two kinds.

        Raises:
            ValueError: there are detections made with other settings; names the first that differs.
        """
        if not self:
            return
        path = self._folder / SETTINGS
        try:
            begun = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}, which says what these boxes were made with, cannot be read ({error}); remove "
                f"{self._folder} or name another output"
            ) from error
        now = json.loads(json.dumps(dict(settings)))
        for key in sorted(begun.keys() | now.keys()):
            name, before, after = _first_difference(key, begun.get(key), now.get(key))
            if before != after:
                raise ValueError(
                    f"{self._folder} was begun with {name} = {_short(before)}, now it is {_short(after)}; go on with "
                    "the former, name another output, or remove this folder and the box file"
                )

    @staticmethod
    def keep_settings(output: Path, settings: Mapping[str, Any]) -> None:
        """Write down what the detections for a box file are made with."""
        path = parts_folder(output) / SETTINGS
        with _say_what_is_kept(path), replace_file(path) as scratch:
            scratch.write_text(json.dumps(dict(settings), indent=1), encoding="utf-8")

    def merge(self, pictures: Sequence[Picture], output: Path) -> tuple[int, int]:
        """Write the box file, `[{"id", "boxes", "scores", "labels"}, ...]` in the pictures' order, and the errors.

        Returns:
            The number of pictures in it, and of boxes.

        Raises:
            ValueError: a picture of which nothing is known yet, or none that could be used.
            OSError: the disk is full or not writable; a box file that was there still is.
        """
        lines = [self._line_of(picture) for picture in pictures]
        missing = [picture for picture, line in zip(pictures, lines, strict=True) if line is None]
        if missing:
            raise ValueError(
                f"{len(missing)} pictures have no boxes yet, {missing[0].path} for one; run the same command again"
            )
        errors = [
            {"id": picture.id, "picture": picture.path, "error": line.error}
            for picture, line in zip(pictures, lines, strict=True)
            if line is not None and line.error is not None
        ]
        for path in (output, errors_file(output)):
            remove_scratch(path)
        _write_errors(errors_file(output), errors)
        if len(errors) == len(pictures):
            raise ValueError(
                f"none of the pictures ({len(pictures)}) could be used, {errors[0]['picture']} for one: "
                f"{errors[0]['error']}"
            )
        num_boxes = 0
        with (
            _say_what_is_kept(output),
            replace_file(output) as scratch,
            scratch.open("w", encoding="utf-8") as file,
        ):
            for number, (picture, found) in enumerate(self.found(pictures)):
                num_boxes += len(found["boxes"])
                file.write((",\n" if number else "[\n") + json.dumps({"id": picture.id, **found}))
            file.write("\n]\n")
        return len(pictures) - len(errors), num_boxes

    def found(self, pictures: Iterable[Picture]) -> Iterator[tuple[Picture, dict[str, Any]]]:
        """Those of the pictures that have boxes, each with these, their scores and labels."""
        files = [path.open("rb") for path in self._files]
        try:
            for picture in pictures:
                line = self._line_of(picture)
                if line is not None and line.error is None:
                    files[line.file].seek(line.start)
                    content = json.loads(files[line.file].read(line.length))
                    yield picture, {key: content[key] for key in ("boxes", "scores", "labels")}
        finally:
            for file in files:
                file.close()


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """First byte, bytes and content of each line that is whole."""
    start = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if _is_whole(line):
                yield start, raw, line
            start += len(raw)


def _is_whole(line: Any) -> bool:
    """Whether it says of one picture what was found or why nothing was; a damaged line may still be JSON."""
    if not isinstance(line, dict) or not isinstance(line.get("picture"), str):
        return False
    if "boxes" not in line:
        return isinstance(line.get("error"), str)
    columns = [line.get(key) for key in ("boxes", "scores", "labels")]
    return (
        all(isinstance(column, list) for column in columns)
        and len({len(column) for column in columns}) == 1
        and all(isinstance(box, list) and len(box) == 4 for box in columns[0])
    )


def _write_errors(path: Path, errors: list[dict[str, Any]]) -> None:
    if not errors:
        path.unlink(missing_ok=True)
        return
    with _say_what_is_kept(path), replace_file(path) as scratch:
        scratch.write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _say_what_is_kept(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}; nothing found before is lost, once this is put right the same command goes on",
            str(path),
        ) from error


def _first_difference(name: str, before: Any, after: Any) -> tuple[str, Any, Any]:
    """Of long lists, which look the same when cut short, the first entry that differs."""
    if isinstance(before, list) and isinstance(after, list) and max(len(before), len(after)) > 5:
        for index, (one, other) in enumerate(zip_longest(before, after)):
            if one != other:
                return f"{name}[{index}]", one, other
    return name, before, after


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
