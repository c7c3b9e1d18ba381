"""Training records: where they come from, and what one is."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..image_processing_mgllava import UNREADABLE, load_picture
from ..objects.boxes import check_detections
from .errors import BadRecord, DataError
from .packed_list import PackedList

__all__ = ["LlavaRecords", "PythonRecords", "Record", "RecordSource", "file_version", "turns_of_llava"]

IMAGE_TOKEN = "<image>"
CONVERSATION = '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]'

VIDEO = "it is a video, which is not supported"
SEVERAL_PICTURES = "it has several pictures, one is supported"
NO_PICTURE_FILE = "its picture does not exist"
UNREADABLE_PICTURE = "its picture cannot be read"
NO_ID = "it has no id to find its boxes by"
NO_BOXES = "there are no boxes for its id"
BAD_BOXES = "its boxes are malformed"
BAD_CONVERSATION = "its conversation is malformed"


@dataclass(frozen=True)
class Record:
    """One conversation about at most one picture.

    Attributes:
        id: its name in messages.
        turns: question and answer of each turn; `<image>` in one question stands for the picture.
        image: the picture's path, or the picture; None for text alone.
        detections: `{"boxes", "labels", "scores"}` in pixels of the picture, labels and scores optional; None for
            a picture without objects.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    image: Path | Image.Image | None = None
    detections: Mapping[str, Any] | None = None


class RecordSource(Protocol):
    """A sequence of records that any process can read, in any order.

    Attributes:
        is_checked: whether every record is known to be good. The records of other sources are looked at before
            training starts.
        fingerprint: text that differs wherever the records do.
    """

    is_checked: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`.

        Raises:
            BadRecord: it cannot be trained on.
        """
        ...


class LlavaRecords:
    """Records in LLaVA's form with detections in that of the published annotation files.

    A record is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`, without `image` for
    text alone; an annotation `{"id", "boxes", "scores", "labels"}`. Ids are text or numbers; `7` is `"7"`.

    Args:
        records: a JSON list, JSON lines (`.jsonl`), or a folder that `datasets` saved.
        pictures: the folder that the records' pictures are relative to.
        boxes: a JSON list of annotations, or an object of them by id. None: pictures have no objects.

    Raises:
        DataError: a file that is missing or not of that form; names it and what was expected.
    """

    is_checked = False

    def __init__(
        self, records: str | Path, pictures: str | Path | None = None, boxes: str | Path | None = None
    ) -> None:
        self._records = _open_records(Path(records).expanduser())
        if not len(self._records):
            raise DataError(f"{records} holds no records")
        self._pictures = None if pictures is None else Path(pictures).expanduser()
        if self._pictures is not None and not self._pictures.is_dir():
            raise DataError(f"pictures: there is no folder {pictures}")
        self._boxes = None if boxes is None else _Boxes(Path(boxes).expanduser())
        paths = [Path(path).expanduser() for path in (records, boxes) if path is not None]
        self.fingerprint = f"{[file_version(path) for path in paths]} {self._pictures}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        entry = self._records[index]
        if not isinstance(entry, Mapping):
            raise BadRecord(
                BAD_CONVERSATION, f"record {index} is a {type(entry).__name__}, expected an object"
            )
        id = entry.get("id")
        name = str(index if id is None else id)
        if entry.get("video"):
            raise BadRecord(VIDEO, f"id {name}, {entry['video']}")
        turns = turns_of_llava(entry.get("conversations"), name)
        image = entry.get("image")
        if isinstance(image, (list, tuple)):
            if len(image) > 1:
                raise BadRecord(SEVERAL_PICTURES, f"id {name} has {len(image)}")
            image = image[0] if image else None
        if not image:
            return Record(name, turns)
        return Record(name, turns, self._find_picture(image, name), self._find_boxes(id, name))

    def _find_picture(self, image: Any, name: str) -> Path | Image.Image:
        if isinstance(image, Image.Image):
            return image
        if not isinstance(image, str):
            raise BadRecord(UNREADABLE_PICTURE, f"id {name}, image is {image!r}, expected a path")
        if self._pictures is None and not Path(image).is_absolute():
            raise DataError(
                f"record {name} has the picture {image!r}; give the folder of pictures (pictures:)"
            )
        return Path(image) if self._pictures is None else self._pictures / image

    def _find_boxes(self, id: Any, name: str) -> Mapping[str, Any] | None:
        if self._boxes is None:
            return None
        if id is None:
            raise BadRecord(NO_ID, f"record {name}")
        return self._boxes.of(str(id))


class PythonRecords:
    """A map-style dataset of pictures made by code.

    Its items are mappings with `turns` (pairs of question and answer, or objects with these attributes) and,
    optionally, `id`, `image` (a PIL picture or a path) and `detections`. Where no question holds `<image>`, the
    first one gets it. Code is taken to make good records only, so they are not looked at before training.

    Args:
        dataset: with `__len__` and `__getitem__`, the same item for the same index in every process.
        name: what it is made by, with all arguments.
    """

    is_checked = True

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self.fingerprint = f"{name} {len(dataset)}"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        item = self._dataset[index]
        if isinstance(item, Record):
            return item
        turns = [
            turn if isinstance(turn, (tuple, list)) else (turn.question, turn.answer)
            for turn in item["turns"]
        ]
        image = item.get("image")
        if image is not None and not any(IMAGE_TOKEN in question for question, _ in turns):
            turns[0] = (f"{IMAGE_TOKEN}\n{turns[0][0]}", turns[0][1])
        return Record(
            str(item.get("id", index)),
            tuple((question, answer) for question, answer in turns),
            image,
            item.get("detections"),
        )


def turns_of_llava(messages: Any, name: str) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a conversation in LLaVA's form, as the original training read it.

    Answers before the first question are skipped, questions in a row are one question, and one that no answer
    follows is left out.

    Raises:
        BadRecord: not of this form, or without any answer.
    """
    if not isinstance(messages, (list, tuple)):
        raise BadRecord(
            BAD_CONVERSATION, f"id {name}, conversations is {messages!r}, expected {CONVERSATION}"
        )
    turns: list[tuple[str, str]] = []
    question: str | None = None
    for message in messages:
        role = message.get("from") if isinstance(message, Mapping) else None
        value = message.get("value") if isinstance(message, Mapping) else None
        if role not in ("human", "gpt") or not isinstance(value, str):
            raise BadRecord(
                BAD_CONVERSATION, f"id {name}, a message is {str(message)[:80]}, expected {CONVERSATION}"
            )
        if role == "human":
            question = (question or "") + _picture_first(value)
        elif question is not None or turns:
            turns.append((question or "", value))
            question = None
    if not turns:
        raise BadRecord(BAD_CONVERSATION, f"id {name} has no answer")
    return tuple(turns)


def check_record(record: Record) -> None:
    """Look at a record's picture, without decoding it, and at its detections.

    Raises:
        BadRecord: the picture is missing or no picture, or the boxes are malformed.
    """
    if isinstance(record.image, Path):
        try:
            with Image.open(record.image):
                pass
        except FileNotFoundError as error:
            raise BadRecord(NO_PICTURE_FILE, str(record.image)) from error
        except UNREADABLE as error:
            raise BadRecord(UNREADABLE_PICTURE, f"{record.image}: {error}") from error
    if record.detections is not None:
        try:
            check_detections(**record.detections)
        except ValueError as error:
            raise BadRecord(BAD_BOXES, f"id {record.id}: {error}") from error


def read_image(record: Record) -> Image.Image:
    """The record's picture, decoded.

    Raises:
        BadRecord: it cannot be read.
    """
    try:
        return load_picture(record.image)
    except ValueError as error:
        raise BadRecord(UNREADABLE_PICTURE, str(error)) from error


def _picture_first(value: str) -> str:
    if IMAGE_TOKEN not in value:
        return value
    return f"{IMAGE_TOKEN}\n{value.replace(IMAGE_TOKEN, '').strip()}".strip()


class _Boxes:
    """Detections by id."""

    def __init__(self, path: Path) -> None:
        content = _read_json(path)
        if isinstance(content, Mapping):
            content = [{**entry, "id": id} for id, entry in content.items() if isinstance(entry, Mapping)]
        if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
            raise DataError(f'{path}: expected a list of {{"id", "boxes", "scores", "labels"}}')
        missing = next((index for index, entry in enumerate(content) if entry.get("id") is None), None)
        if missing is not None:
            raise DataError(f"{path}: entry {missing} has no id")
        self._index = {str(entry["id"]): index for index, entry in enumerate(content)}
        self._entries = PackedList(content)

    def of(self, id: str) -> dict[str, Any]:
        if id not in self._index:
            raise BadRecord(NO_BOXES, f"id {id}")
        entry = self._entries[self._index[id]]
        if "frames" in entry:
            raise BadRecord(VIDEO, f"the boxes of id {id} are those of frames")
        found = {key: entry[key] for key in ("boxes", "labels", "scores") if entry.get(key) is not None}
        if "boxes" not in found:
            raise BadRecord(
                BAD_BOXES, f"id {id} has the keys {sorted(entry)}, expected boxes, scores, labels"
            )
        return found


def _open_records(path: Path) -> Sequence[Any]:
    if path.is_dir():
        return _open_datasets_folder(path)
    if path.suffix == ".jsonl":
        return PackedList(_json_lines(path))
    content = _read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of records, got a {type(content).__name__}")
    return PackedList(content)


def _open_datasets_folder(path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder of the datasets library, which is not installed; pip install 'mgllava[train]'"
        ) from error
    try:
        content = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is no folder that datasets saved: {error}") from error
    if isinstance(content, datasets.DatasetDict):
        raise DataError(f"{path} holds the splits {', '.join(content)}; give the folder of one of them")
    return content


def _read_json(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def file_version(path: Path) -> tuple[str, int, int]:
    """Path, size and time of change of a file, which tell it from what it was before."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns
