"""A model to begin stage 1 with: published parts and an untrained neck."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mgllava_kernels import ConvGateFusion, Projector

from ..conversion import convert_checkpoint
from ..conversion.mapping import CHECKPOINT_NAMES
from ..conversion.parts import find_part, read_high_res_config, read_text_config, read_vision_config
from ..conversion.weights import OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS
from .recipe import Parts

__all__ = ["assemble_model"]


def assemble_model(parts: Parts, output: str | Path, seed: int, *, progress: bool = True) -> None:
    """Write a model folder of published parts whose neck is initialised as the paper's code does.

    Args:
        parts: where the parts are.
        output: the folder to write; must not exist or be empty.
        seed: of the neck's initialisation.
        progress: show a progress bar.

    Raises:
        ConversionError: as `convert_checkpoint`.
    """
    vision = read_vision_config(find_part("vision_tower", parts.vision_tower, TRANSFORMERS_WEIGHTS))
    high_res = read_high_res_config(
        find_part("high_res_tower", parts.high_res_tower, OPEN_CLIP_WEIGHTS),
        vision.image_size // vision.patch_size,
    )
    text = read_text_config(find_part("language_model", parts.language_model, TRANSFORMERS_WEIGHTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fusion = ConvGateFusion(vision.hidden_size, high_res.stage_widths[-1], variant=parts.fusion_variant)
        neck = {
            "model.fusion": fusion,
            "model.image_projector": Projector(fusion.out_features, text.hidden_size),
            "model.object_projector": Projector(sum(high_res.stage_widths), text.hidden_size),
        }
    published = {target: source for source, target in CHECKPOINT_NAMES.items() if "tower" not in target}
    tensors = {}
    for part, module in neck.items():
        for name, value in module.state_dict(prefix=f"{part}.").items():
            layer, leaf = name.rsplit(".", 1)
            tensors[published[f"{layer}."] + leaf] = value
    with tempfile.TemporaryDirectory() as folder:
        untrained = Path(folder) / "untrained_neck.safetensors"
        save_file(tensors, untrained)
        convert_checkpoint(
            untrained,
            llm=parts.language_model,
            clip=parts.vision_tower,
            convnext=parts.high_res_tower,
            output=output,
            template=parts.template,
            progress=progress,
        )
