"""Scenes as files: pictures, LLaVA-format conversations and the box file that belongs to them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from .dataset import SceneDataset, turns_of
from .detections import detect, things_of_boxes
from .objects import CANVAS, SIZES
from .questions import FAMILIES, Turn
from .render import render
from .scene import Scene, sample_scene

__all__ = ["write_split"]


def write_split(
    folder: str | Path,
    split: str,
    num_scenes: int,
    *,
    turns: int = 6,
    families: Sequence[str] = tuple(FAMILIES),
    first: int = 0,
    high_res_size: int = CANVAS,
    progress: bool = False,
) -> Path:
    """Write scenes as a LLaVA data set, into `folder/split`:

    - `images/ID.png`;
    - `conversations.jsonl`: `{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}`, one
      scene to a line, `<image>` leading the first turn, `image` relative to `folder/split`;
    - `boxes.json`: `[{"id", "boxes", "labels", "scores"}, ...]`, raw detections in pixels;
    - `metadata.jsonl`: for each scene the truth, and for each turn its family, the indices of the things it
      is about and the size of the smallest of them;
    - `settings.json`: the arguments.

    A file appears under its name once it is whole. After a kill the same call goes on where it stopped, and
    the files are the same as without it.

    Args:
        split, num_scenes, turns, families, first, high_res_size: as `SceneDataset` takes them.
        progress: show a bar on standard error.

    Returns:
        The folder written.

    Raises:
        ValueError: what `SceneDataset` refuses, or a folder begun with other arguments.
        OSError: the disk is full or not writable.
    """
    # Refuses what is wrong.
    SceneDataset(split, num_scenes, turns=turns, families=families, first=first, high_res_size=high_res_size)
    settings = {
        "split": split,
        "num_scenes": num_scenes,
        "turns": turns,
        "families": list(families),
        "first": first,
        "high_res_size": high_res_size,
        "generator": _fingerprint(split, first),
    }
    target = Path(folder) / split
    (target / "images").mkdir(parents=True, exist_ok=True)
    _check_settings(target / "settings.json", settings)

    conversations, boxes, metadata = [], [], []
    numbers: Iterable[int] = range(first, first + num_scenes)
    if progress:
        numbers = track(numbers, f"{split} scenes", console=Console(stderr=True))
    for number in numbers:
        scene = sample_scene(split, number)
        picture = target / "images" / f"{scene.id}.png"
        if not picture.exists():
            _write(picture, _png(render(scene)))
        detections = detect(scene)
        asked = turns_of(scene, things_of_boxes(scene, detections, high_res_size), families, turns)
        conversations.append(_conversation(scene, asked))
        boxes.append({"id": scene.id, **detections.as_dict()})
        metadata.append(_metadata(scene, asked))
    _write(target / "boxes.json", json.dumps(boxes).encode())
    _write(target / "metadata.jsonl", b"".join(_lines(metadata)))
    _write(target / "conversations.jsonl", b"".join(_lines(conversations)))
    return target


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        _write(path, json.dumps(settings, indent=1).encode())
        return
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove {path.parent} or name another folder"
        ) from error
    for key, value in settings.items():
        if begun.get(key) != value:
            raise ValueError(
                f"{path.parent} was begun with {key} = {begun.get(key)!r}, now it is {value!r}; remove it or name "
                "another folder"
            )


def _fingerprint(split: str, first: int) -> str:
    """Changes with the code, or the libraries, that make the scenes: pictures of two makings must not mix."""
    scene = sample_scene(split, first)
    return hashlib.sha256(repr((scene, detect(scene))).encode() + render(scene).tobytes()).hexdigest()[:16]


def _conversation(scene: Scene, turns: Sequence[Turn]) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(turns):
        lead = "" if number else "<image>\n"
        messages += [{"from": "human", "value": lead + turn.question}, {"from": "gpt", "value": turn.answer}]
    return {"id": scene.id, "image": f"images/{scene.id}.png", "conversations": messages}


def _metadata(scene: Scene, turns: Sequence[Turn]) -> dict[str, Any]:
    def smallest(turn: Turn) -> str | None:
        sizes = {scene.things[index].size for index in turn.things}
        return next((size for size in SIZES if size in sizes), None)

    about = [{"family": turn.family, "things": turn.things, "smallest": smallest(turn)} for turn in turns]
    return {"id": scene.id, "turns": about, "scene": asdict(scene)}


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _lines(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row).encode() + b"\n"


def _write(path: Path, content: bytes) -> None:
    """Write the whole file or none of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
