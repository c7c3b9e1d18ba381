"""Opens an MG-LLaVA training checkpoint, whatever form it was saved in."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .tensors import ConversionError, LazyTensor, refused_as
from .weights import TRANSFORMERS_WEIGHTS, find_weights, open_weights
from .zero import is_deepspeed_folder, open_deepspeed_folder


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint under its original names.

    Attributes:
        name: its file or folder name.
        tensors: its tensors by name (`llm.*`, `projector.*`, `bbox_projector.*`, `fuse_module.*`).
        trained_in: the dtype of the model where the tensors are fp32 master weights; otherwise None.
    """

    name: str
    tensors: dict[str, LazyTensor]
    trained_in: torch.dtype | None = None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open an xtuner `.pth` file, a DeepSpeed folder of it, or safetensors (a file or a folder).

    Raises:
        ConversionError: if there is nothing of the kind, or it is incomplete; names the file.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return Checkpoint(path.name, open_weights(path))
    if not path.is_dir():
        raise ConversionError(f"--checkpoint {path}: no such file or folder")
    latest = path / "latest"  # DeepSpeed's pointer to the folder of the last step
    folder = path
    if latest.is_file():
        with refused_as(f"--checkpoint {path.name}: its file latest does not name a folder"):
            folder = path / latest.read_text().strip()
            folder.is_dir()  # raises for what can be no name
    if is_deepspeed_folder(folder):
        with refused_as(f"--checkpoint {path.name}: a damaged DeepSpeed checkpoint"):
            tensors, trained_in = open_deepspeed_folder(folder)
        return Checkpoint(path.name, tensors, trained_in)
    weights = find_weights(folder, TRANSFORMERS_WEIGHTS)
    if weights is None:
        raise ConversionError(
            f"--checkpoint {path.name}: the folder holds no checkpoint; expected *_model_states.pt of "
            f"DeepSpeed or one of {', '.join(TRANSFORMERS_WEIGHTS)}"
        )
    return Checkpoint(path.name, open_weights(weights))
