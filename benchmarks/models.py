"""Whole models with random weights: published sizes, or layers left out so that a CPU can keep up.

transformers takes seconds to import, so only functions here import it: other benchmarks do not wait for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import neck, original, threaded
from benchmarks.benchmark import Inputs
from benchmarks.boxes import picture_boxes
from benchmarks.shapes import Sizes, model_width, stage_shapes, token_width, tokens_of

# Random values that weights are filled with, over and over: drawing seven billion takes minutes. Their number is
# prime, so that no two rows of a weight are the same.
# What a benchmark of the model measures with, beside its own file.
MODEL_FILES = ("models", "neck", "conv_gate", "original_repository", "pooled_roi_align", "projectors")
FILLING = 1_000_003
NECK = ("fusion", "image_projector", "object_projector")


def config_of(sizes: Sizes) -> Any:
    """An MGLlavaConfig; `vit_layers`, `blocks` (of ConvNeXt's third stage) and `layers` may be fewer than published."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from mgllava import MGLlavaConfig

    divisor, grid = sizes.get("divisor", 1), stage_shapes(sizes)[-1][2]
    blocks, others = sizes["blocks"], min(3, sizes["blocks"])
    widths = [shape[1] for shape in stage_shapes(sizes)]
    heads = max(1, 16 // divisor)
    return MGLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=token_width(sizes),
            intermediate_size=4 * token_width(sizes),
            num_hidden_layers=sizes["vit_layers"],
            num_attention_heads=heads,
            image_size=14 * grid,
            patch_size=14,
        ),
        high_res_config={
            "architecture": "convnext_large",
            "model_kwargs": {"depths": [others, others, blocks, others], "dims": widths},
            "image_size": sizes["canvas"],
            "stage_widths": widths,
        },
        text_config=LlamaConfig(
            vocab_size=sizes["vocabulary"] + 2,
            hidden_size=model_width(sizes),
            intermediate_size=11008 // divisor,
            num_hidden_layers=sizes["layers"],
            num_attention_heads=2 * heads,
            num_key_value_heads=2 * heads,
            max_position_embeddings=4096,
            pad_token_id=0,
        ),
        text_vocab_size=sizes["vocabulary"],
        image_token_id=sizes["vocabulary"],
        object_token_id=sizes["vocabulary"] + 1,
    )


def parameters(sizes: Sizes) -> int:
    """How many a model has, nearly: those of its matrices and large convolutions."""
    low, out, widths = token_width(sizes), model_width(sizes), [shape[1] for shape in stage_shapes(sizes)]
    others = min(3, sizes["blocks"])
    towers = 12 * low**2 * sizes["vit_layers"]
    for width, blocks in zip(widths, (others, others, sizes["blocks"], others), strict=True):
        towers += 8 * width**2 * blocks
    language = sizes["layers"] * (4 * out**2 + 3 * out * (11008 // sizes.get("divisor", 1)))
    projectors = out * (low + sum(widths) + 2 * out)
    return towers + projectors + language + 2 * sizes["vocabulary"] * out


def make_model(sizes: Sizes, generator: torch.Generator) -> Any:
    """An MGLlavaForConditionalGeneration in eval mode with random weights; nothing in it learns."""
    from transformers.initialization import no_init_weights

    from mgllava import MGLlavaForConditionalGeneration

    with no_init_weights():
        model = MGLlavaForConditionalGeneration(config_of(sizes))
    values = torch.randn(FILLING, generator=generator).repeat(2)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            # Weights that start at the same value would make queries equal keys.
            fill(parameter, values[index * 7919 % FILLING :][:FILLING], name)
    return model.eval().requires_grad_(False)


def fill(parameter: nn.Parameter, values: Tensor, name: str) -> None:
    """Weights that keep the size of activations, norms of one, small biases and layer scales."""
    flat = parameter.view(-1)
    if parameter.dim() == 1 and not name.endswith("bias"):
        flat.fill_(0.1 if name.endswith("gamma") else 1.0)
        return
    for part in flat.split(FILLING):
        part.copy_(values[: len(part)])
    flat.mul_(parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02)


def picture_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Random pictures and as many boxes in each."""
    images, boxes, canvas = sizes["images"], sizes["boxes"], sizes["canvas"]
    side = 14 * stage_shapes(sizes)[-1][2]
    rows = picture_boxes(sizes)
    return {
        "pixel_values": torch.randn(images, 3, side, side, generator=generator),
        "pixel_values_high_res": torch.randn(images, 3, canvas, canvas, generator=generator),
        "boxes": rows[:, 1:].reshape(images, boxes, 4),
    }


def prompt(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Ids (images, L): one picture a row, between two halves of `words` random words."""
    images, half, vocabulary = sizes["images"], sizes["words"] // 2, sizes["vocabulary"]
    words = torch.randint(3, vocabulary, (images, 2 * half), generator=generator)
    picture = torch.tensor([vocabulary] * tokens_of(sizes) + [vocabulary + 1] * sizes["boxes"])
    return torch.cat([words[:, :half], picture.expand(images, -1), words[:, half:]], dim=1)


def original_flow(
    model: Any, pixel_values: Tensor, pixel_values_high_res: Tensor, boxes: Tensor
) -> Sequence[Tensor]:
    """The vision flow with the original's neck: tokens (N + K, T) of each picture. The towers are the same."""
    return _flow(original.neck, model, pixel_values, pixel_values_high_res, boxes)


def threaded_flow(
    model: Any, pixel_values: Tensor, pixel_values_high_res: Tensor, boxes: Tensor
) -> Sequence[Tensor]:
    """The same with torchvision's RoIAlign on all threads of a CPU."""
    align = partial(original.neck, align=threaded.roi_align)
    return _flow(align, model, pixel_values, pixel_values_high_res, boxes)


def reference_flow(
    model: Any, pixel_values: Tensor, pixel_values_high_res: Tensor, boxes: Tensor
) -> Sequence[Tensor]:
    """The same with the literal composition."""
    return _flow(neck.reference, model, pixel_values, pixel_values_high_res, boxes)


def _flow(
    function: Callable[..., tuple[Tensor, Tensor]],
    model: Any,
    pixel_values: Tensor,
    pixel_values_high_res: Tensor,
    boxes: Tensor,
) -> Sequence[Tensor]:
    low_res = model.encode_low_res(pixel_values)
    stages = model.high_res_tower(pixel_values_high_res)
    modules = [getattr(model, name) for name in NECK]
    scale = stages[0].shape[-1] / pixel_values_high_res.shape[-1]
    image_tokens, object_tokens = function(low_res, stages, list(boxes), *modules, scale)
    objects = object_tokens.split([len(own) for own in boxes])
    return [torch.cat(pair) for pair in zip(image_tokens, objects, strict=True)]


def package_flow(
    model: Any, pixel_values: Tensor, pixel_values_high_res: Tensor, boxes: Tensor
) -> Sequence[Tensor]:
    """The vision flow as the model runs it."""
    return model.get_image_features(pixel_values, pixel_values_high_res, boxes).pooler_output


def encoded(tokens: Sequence[Tensor]) -> dict[str, Any]:
    """The tokens of pictures as the model takes them in place of the pictures."""
    from mgllava.modeling_mgllava import MGLlavaImageFeatures

    return {"image": MGLlavaImageFeatures(pooler_output=list(tokens))}
