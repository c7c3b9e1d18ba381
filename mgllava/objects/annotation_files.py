"""The files of an annotation: what is found so far, one line a picture, and the box file made of it."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ..files import replace_file
from .detector import Detections
from .pictures import Picture

__all__ = ["Found", "PartFile", "Parts", "errors_file", "parts_folder"]

SETTINGS = "settings.json"


def parts_folder(output: Path) -> Path:
    """Where the lines for a box file are collected: one file a process, beside the box file."""
    return output.with_name(f"{output.name}.parts")


def errors_file(output: Path) -> Path:
    """Where it says which pictures have no entry in the box file, and why."""
    return output.with_name(f"{output.stem}.errors.json")


class Found(NamedTuple):
    """What became of one picture.

    Attributes:
        path: of the picture.
        detections: on it; None if there is an error.
        error: why the picture could not be used.
    """

    path: str
    detections: Detections | None = None
    error: str | None = None


class PartFile:
    """The file that one process appends its lines to.

    A line is written in one piece where the system does so, and is whole once its end is there: what a kill cut in half
    is skipped by whoever reads it, so nothing written is ever changed.

    Raises:
        OSError: the disk is full or not writable; lines written before are intact.
    """

    def __init__(self, folder: Path, process: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"process-{process}.jsonl"

    def __enter__(self) -> Self:
        self._file = self.path.open("ab+", buffering=0)
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
    line: dict[str, Any] = {"picture": found.path}
    if found.detections is None:
        line["error"] = found.error
    else:
        line["boxes"] = [[round(edge, 2) for edge in box] for box in found.detections.boxes]
        line["scores"] = [round(score, 6) for score in found.detections.scores]
        line["labels"] = list(found.detections.labels)
    return json.dumps(line, allow_nan=False).encode() + b"\n"


class Parts:
    """What all processes of all runs have found so far for one box file.

    Attributes:
        errors: by the path of each picture that could not be used, why.
    """

    def __init__(self, output: Path) -> None:
        self._folder = parts_folder(output)
        self._files = sorted(self._folder.glob("process-*.jsonl"))
        self._places: dict[str, tuple[int, int, int]] = {}  # file, first byte and length of a picture's line
        self.errors: dict[str, str] = {}
        for number, path in enumerate(self._files):
            for start, raw, line in _whole_lines(path):
                if "boxes" in line:
                    self._places.setdefault(line["picture"], (number, start, len(raw)))
                else:
                    self.errors[line["picture"]] = line["error"]
        for path in self._places.keys() & self.errors.keys():
            del self.errors[path]

    def __contains__(self, path: str) -> bool:
        """Whether the boxes of this picture are found."""
        return path in self._places

    def __len__(self) -> int:
        """How many pictures' boxes are found."""
        return len(self._places)

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
            if begun.get(key) != now.get(key):
                raise ValueError(
                    f"{self._folder} was begun with {key} = {_short(begun.get(key))}, now it is "
                    f"{_short(now.get(key))}; go on with the former, remove the folder or name another output"
                )

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Write down what the detections are made with."""
        path = self._folder / SETTINGS
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
        missing = [path for _, path in pictures if path not in self and path not in self.errors]
        if missing:
            raise ValueError(
                f"{len(missing)} pictures have no boxes yet, {missing[0]} for one; run the same command again"
            )
        errors = [
            {"id": id, "picture": path, "error": self.errors[path]}
            for id, path in pictures
            if path not in self
        ]
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
            for number, (id, line) in enumerate(self._lines(pictures)):
                num_boxes += len(line["boxes"])
                entry = {"id": id, **{key: line[key] for key in ("boxes", "scores", "labels")}}
                file.write((",\n" if number else "[\n") + json.dumps(entry))
            file.write("\n]\n")
        return len(pictures) - len(errors), num_boxes

    def _lines(self, pictures: Sequence[Picture]) -> Iterator[tuple[str | int, dict[str, Any]]]:
        files = [path.open("rb") for path in self._files]
        try:
            for id, path in pictures:
                if path in self:
                    number, start, length = self._places[path]
                    files[number].seek(start)
                    yield id, json.loads(files[number].read(length))
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
            except ValueError:
                line = None
            if isinstance(line, dict) and "picture" in line and ("boxes" in line or "error" in line):
                yield start, raw, line
            start += len(raw)


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
