"""What stage 0 leaves behind, in the form of published parts."""

import json
from pathlib import Path

import timm
from safetensors.torch import save_file
from transformers import CLIPVisionModel, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..files import replace_folder
from ..high_res_tower import MGLlavaHighResTower

__all__ = ["write_high_res_tower", "write_language_model", "write_vision_tower"]


def write_vision_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """A CLIP ViT as transformers saves it, with what its pictures are normalised by."""
    statistics = {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
    with replace_folder(folder) as scratch:
        tower.save_pretrained(scratch)
        (scratch / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2) + "\n")


def write_high_res_tower(tower: MGLlavaHighResTower, folder: Path) -> None:
    """A ConvNeXt as open_clip saves it."""
    published = timm.create_model(tower.config.architecture, pretrained=False).state_dict()
    tensors = {  # the same matrices, as linear layers or as convolutions of one pixel
        f"visual.trunk.{name}": value.reshape(published[name].shape).contiguous()
        for name, value in tower.state_dict().items()
    }
    vision = {"timm_model_name": tower.config.architecture, "image_size": tower.config.image_size}
    with replace_folder(folder) as scratch:
        save_file(tensors, scratch / "open_clip_model.safetensors", metadata={"format": "pt"})
        config = {"model_cfg": {"vision_cfg": vision}}
        (scratch / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_language_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A causal language model and its tokenizer as transformers saves them."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with replace_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
