"""What stage 0 leaves behind, in the form of published parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..high_res_tower import MGLlavaHighResTower

__all__ = ["write_high_res_tower", "write_language_model", "write_vision_tower"]


def write_vision_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """A CLIP ViT as transformers saves it, with what its pictures are normalised by."""

    def write(scratch: Path) -> None:
        tower.save_pretrained(scratch)
        statistics = {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
        (scratch / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2) + "\n")

    _write_folder(folder, write)


def write_high_res_tower(tower: MGLlavaHighResTower, folder: Path) -> None:
    """A ConvNeXt as open_clip saves it."""

    def write(scratch: Path) -> None:
        tensors = {f"visual.trunk.{name}": value.contiguous() for name, value in tower.state_dict().items()}
        save_file(tensors, scratch / "open_clip_model.safetensors", metadata={"format": "pt"})
        vision = {"timm_model_name": tower.config.architecture, "image_size": tower.config.image_size}
        config = {"model_cfg": {"vision_cfg": vision}}
        (scratch / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")

    _write_folder(folder, write)


def write_language_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A causal language model and its tokenizer as transformers saves them."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def write(scratch: Path) -> None:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)

    _write_folder(folder, write)


@torch.no_grad()
def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """What is there is replaced once the new folder is complete."""
    scratch = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
