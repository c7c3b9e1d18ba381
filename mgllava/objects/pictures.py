"""The pictures of a data set, and the id that the boxes of each are found by."""

import filecmp
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["SUFFIXES", "Picture", "check_box_file", "check_drawings", "find_pictures"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm")


class Picture(NamedTuple):
    """One picture of a data set.

    Attributes:
        id: what its boxes are found by; of the type that the records have.
        path: where it is, absolute.
        question: all that records ask about it; empty where nobody wants to know.
    """

    id: str | int
    path: str
    question: str = ""


def find_pictures(
    sources: Sequence[str | Path], pictures: str | Path | None = None, *, questions: bool = False
) -> list[Picture]:
    """The pictures of files, folders and records, each once and in the order given; folders are sorted.

    In a folder and all that is below it, names that end in one of `SUFFIXES` count, except hidden ones. Such a picture,
    and one given by its name, has its stem for an id; several of the same stem have their path below the folder common
    to all pictures, `train/1.jpg` and `test/1.jpg`.

    A file `.json` or `.jsonl` holds records in LLaVA's form, `{"id", "image", ...}`; the id is the record's, or its
    `question_id` where it has none. Records with no picture, or with several, are left out, as training leaves them
    out. One id may stand for several files if their bytes are the same; the first counts.

    Args:
        sources: files, folders and records.
        pictures: the folder that the records' pictures are relative to.
        questions: whether to read what the records ask: their `text`, or what the human says.

    Raises:
        OSError: a source that does not exist, or a folder that cannot be read.
        ValueError: no picture at all, records that are malformed, or one id for several pictures.
    """
    paths: dict[str, None] = {}
    recorded: list[Picture] = []
    for source in map(Path, sources):
        if source.is_dir():
            paths |= dict.fromkeys(_pictures_below(source))
        elif not source.exists():
            raise FileNotFoundError(f"there is no file or folder {source}")
        elif source.suffix.lower() in (".json", ".jsonl"):
            recorded += _pictures_of_records(source, pictures, questions)
        else:
            paths[os.path.abspath(source)] = None
    if pictures is not None and not any(_is_records(source) for source in sources):
        raise ValueError(
            f"pictures is {pictures}, the folder for the pictures of records, but no records (.json, .jsonl) are given"
        )
    found = [Picture(id, path) for path, id in _ids_of_paths(list(paths)).items()] + recorded
    if not found:
        raise ValueError(
            f"there is no picture in {', '.join(map(str, sources))}; looked for {' '.join(SUFFIXES)} in folders and "
            'for records with an "image" in JSON files'
        )
    return _each_once(found)


def check_box_file(output: str | Path, sources: Sequence[str | Path], pictures: Sequence[Picture]) -> None:
    """Refuse a box file that would take the place of what is read.

    Raises:
        ValueError: it is one of `sources`, or one of the pictures.
    """
    place = os.path.realpath(output)
    for read in (*sources, *(picture.path for picture in pictures)):
        if os.path.basename(read) == os.path.basename(output) and os.path.realpath(read) == place:
            raise ValueError(f"{output} is one of the files to read; name another for the boxes")


def check_drawings(folder: str | Path, sources: Sequence[str | Path], pictures: Sequence[Picture]) -> None:
    """Refuse a folder for drawings where they would be found as pictures, or take the place of one.

    Raises:
        ValueError: it is a file, it is a folder out of `sources`, is below one, or holds one of the pictures.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"drawings go to a folder, but {folder} is a file; name another")
    place = Path(os.path.realpath(folder))
    for source in sources:
        if Path(source).is_dir() and place.is_relative_to(os.path.realpath(source)):
            raise ValueError(
                f"drawings in {folder} would be taken for pictures of {source} by the next call; name a folder that is "
                "not below it"
            )
    for beside in {os.path.dirname(picture.path) for picture in pictures}:
        if os.path.realpath(beside) == str(place):
            raise ValueError(
                f"there are pictures in {folder}, of which a drawing could take the place; name another folder for "
                "drawings"
            )


def _is_records(source: str | Path) -> bool:
    return Path(source).suffix.lower() in (".json", ".jsonl") and Path(source).is_file()


def _pictures_below(folder: Path) -> Iterator[str]:
    seen = set()  # a link to a folder above would never end
    for place, folders, names in os.walk(os.path.abspath(folder), onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(place, name)


def _raise(error: OSError) -> None:
    """A folder that is passed over in silence would lose its pictures."""
    raise error


def _ids_of_paths(paths: list[str]) -> dict[str, str]:
    """For each path its stem or, where that is ambiguous, its path below the common folder, or its whole path."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    ids = {path: Path(path).stem for path in paths}
    for longer in (lambda path: os.path.relpath(path, common), lambda path: path):
        count = Counter(ids.values())
        ids = {path: id if count[id] == 1 else longer(path) for path, id in ids.items()}
    return ids


def _pictures_of_records(records: Path, pictures: str | Path | None, questions: bool) -> list[Picture]:
    if pictures is not None and not Path(pictures).is_dir():
        raise ValueError(f"pictures: there is no folder {pictures}")
    found = []
    for number, record in enumerate(_read_records(records)):
        if not isinstance(record, Mapping):
            raise ValueError(f"{records}: record {number} is a {type(record).__name__}, expected an object")
        image = record.get("image")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if not image or isinstance(image, list):
            continue
        id = record.get("id", record.get("question_id"))
        if isinstance(id, bool) or not isinstance(id, (str, int)):
            raise ValueError(
                f"{records}: record {number} has the id {id!r}, expected text or a number; boxes are found by it"
            )
        if not isinstance(image, str):
            raise ValueError(f"{records}: record {number} has the image {image!r}, expected a path")
        if pictures is None and not os.path.isabs(image):
            raise ValueError(
                f"{records}: record {number} has the picture {image!r}; give the folder of pictures (--pictures)"
            )
        path = os.path.abspath(os.path.join(pictures or "", image))
        found.append(Picture(id, path, _question(record) if questions else ""))
    return found


def _question(record: Mapping[str, Any]) -> str:
    turns = record.get("conversations")
    asked = [record.get("text")]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping) and turn.get("from") == "human":
            asked.append(turn.get("value"))
    return "\n".join(text.replace("<image>", " ").strip() for text in asked if isinstance(text, str))


def _read_records(path: Path) -> list[Any]:
    try:
        # Editors on Windows begin a file with a mark of its encoding, which is no part of it.
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                return [_read_line(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of records, got a {type(content).__name__}")
    return content


def _read_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:  # knows its place in the line alone
        raise ValueError(
            f"{path}: line {number} is not JSON: {error.msg} at character {error.pos}"
        ) from error


def _each_once(pictures: list[Picture]) -> list[Picture]:
    by_id: dict[str, Picture] = {}
    asked: dict[str, dict[str, None]] = {}  # the questions of each path
    for picture in pictures:
        other = by_id.setdefault(str(picture.id), picture)
        if other.path != picture.path and not _same_bytes(other.path, picture.path):
            raise ValueError(
                f"the id {picture.id} stands for {other.path} and for {picture.path}, which differ; boxes are found by "
                "the id, so give each picture its own"
            )
        if picture.question:
            asked.setdefault(other.path, {})[picture.question] = None
    return [
        picture._replace(question="\n".join(asked[picture.path])) if picture.path in asked else picture
        for picture in by_id.values()
    ]


def _same_bytes(path: str, other: str) -> bool:
    try:
        return filecmp.cmp(path, other, shallow=False)
    except (OSError, ValueError):  # a name that no file can have is a ValueError
        return False
