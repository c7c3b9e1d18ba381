"""What frozen towers make of pictures, kept in files."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..files import replace_file
from ..modeling_mgllava import MGLlavaModel
from .errors import CheckpointError, DataError

__all__ = ["FeatureStore", "fingerprint_towers"]

PICTURES_PER_FILE = 512
PICTURES_AT_ONCE = 16
KEYS_FILE = "towers.json"
COMPLETE_FILE = "complete.json"


class FeatureStore:
    """A folder of towers' features by pictures' keys.

    A file holds the features of up to 512 pictures and is there whole or not at all; what a killed run has finished
    stays. Files are mapped, not read, so that any number of processes share them in memory.

    Args:
        folder: made if it does not exist.
        towers: `fingerprint_towers` of the model.

    Raises:
        DataError: the folder holds features of other towers, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path, towers: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.folder / KEYS_FILE
        if not before.is_file():
            with replace_file(before) as scratch:
                scratch.write_text(json.dumps({"towers": towers}) + "\n")
        elif json.loads(before.read_text()).get("towers") != towers:
            raise DataError(
                f"features: {folder} holds those of other towers or of another image processor; choose another folder"
            )
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    keys = json.loads(file.metadata()["keys"])
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path} is damaged: {error}; remove it, it will be made again") from error
            self._places |= {key: (path, row) for row, key in enumerate(keys)}

    def is_complete(self, data: str) -> bool:
        """Whether `mark_complete` was called with this text, and every file of then is still there."""
        marks = self._marks()
        return data in marks and self._files().issuperset(marks[data])

    def mark_complete(self, data: str) -> None:
        """Remember that there is nothing to encode for the data that this text stands for."""
        marks = self._marks() | {data: sorted(self._files())}
        with replace_file(self.folder / COMPLETE_FILE) as scratch:
            scratch.write_text(json.dumps(marks) + "\n")

    def _files(self) -> set[str]:
        return {path.name for path, _ in self._places.values()}

    def _marks(self) -> dict[str, list[str]]:
        path = self.folder / COMPLETE_FILE
        return json.loads(path.read_text()) if path.is_file() else {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # every process maps the files anew

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> dict[str, Tensor]:
        """`low_res` (N, D), `high_res` (C, H, W) and `objects` (K, ΣC_l) of one picture."""
        path, row = self._places[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        file = self._open[path]
        first, end = file.get_slice("starts")[row : row + 2].tolist()
        return {
            "low_res": file.get_slice("low_res")[row],
            "high_res": file.get_slice("high_res")[row],
            "objects": file.get_slice("objects")[first:end],
        }

    def fill(self, model: MGLlavaModel, pictures: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        """Encode pictures and keep the result.

        Args:
            model: whose towers.
            pictures: keys that are not here yet, and what `Encoder.encode_picture_to_store` returns.

        Raises:
            CheckpointError: the disk is full.
        """
        was_training = model.training
        model.eval()
        kept: list[tuple[str, dict[str, Tensor]]] = []
        for batch in _batches(pictures, PICTURES_AT_ONCE):
            kept += zip(
                [key for key, _ in batch], _encode(model, [picture for _, picture in batch]), strict=True
            )
            if len(kept) >= PICTURES_PER_FILE:
                self._write(kept)
                kept = []
        if kept:
            self._write(kept)
        model.train(was_training)

    def _write(self, kept: Sequence[tuple[str, dict[str, Tensor]]]) -> None:
        keys = [key for key, _ in kept]
        rows = [features for _, features in kept]
        counts = torch.tensor([0, *(len(row["objects"]) for row in rows)])
        tensors = {
            "low_res": torch.stack([row["low_res"] for row in rows]),
            "high_res": torch.stack([row["high_res"] for row in rows]),
            "objects": torch.cat([row["objects"] for row in rows]),
            "starts": counts.cumsum(0),
        }
        path = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        try:
            with replace_file(path) as scratch:
                save_file(tensors, scratch, metadata={"keys": json.dumps(keys)})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be written: {error}; what is there is intact, and the same command goes on"
            ) from error
        self._places |= {key: (path, row) for row, key in enumerate(keys)}


def fingerprint_towers(model: MGLlavaModel, image_processor: Any) -> str:
    """Text that differs wherever the features of some picture would."""
    digest = hashlib.sha256()
    for tower in (model.vision_tower, model.high_res_tower):
        for name, value in tower.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    config = model.config
    roi = (config.vision_feature_layer, config.roi_output_size, config.roi_sampling_ratio, config.roi_aligned)
    facts = [str(model.dtype), roi, image_processor.to_dict()]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@torch.no_grad()
def _encode(model: MGLlavaModel, pictures: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    device = next(model.parameters()).device
    boxes = [picture["boxes"][0] for picture in pictures]
    counts = torch.tensor([len(rows) for rows in boxes])
    towers = model.encode_towers(
        *(
            torch.cat([picture[name] for picture in pictures]).to(device)
            for name in ("pixel_values", "pixel_values_high_res")
        ),
        pad_sequence(boxes, batch_first=True).to(device),
        counts.to(device),
    )
    return [
        {
            "low_res": towers.low_res[index].cpu(),
            "high_res": towers.high_res[index].cpu().contiguous(),
            "objects": towers.objects[index, :count].cpu(),
        }
        for index, count in enumerate(counts.tolist())
    ]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
