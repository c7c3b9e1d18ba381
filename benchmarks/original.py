"""The original composition of MG-LLaVA's neck, the baseline: its order, its dtypes, its loop over pictures.

Each stage's map is upsampled in float32 and cast to the model's dtype, the maps are concatenated and cast to
float32; Conv-Gate is separate convolutions, GELUs, transposes, a concatenation, a mean, two linear layers and a
tanh; a projector is two linear layers and a GELU; then each picture's boxes go through torchvision's RoIAlign
in float32 to (K, ΣC_l, 56, 56), a cast to the model's dtype, a mean over the bins and the object projector.
Nothing here takes part in the choice of backends.

`extra_*` estimate the peak memory above the inputs in bytes, so that what does not fit is refused.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Sizes, model_width, stage_shapes, token_width, tokens_of
from mgllava_kernels._workloads import BINS
from mgllava_kernels.conv_gate import ConvGateFusion
from mgllava_kernels.projector import Projector

# torchvision's RoIAlign, or another function of its arguments.
Align = Callable[..., Tensor]

# Of rows measured on a CPU.
ONE_THREAD = "torchvision's RoIAlign runs on one thread of a CPU, this package's on all"

# torchvision's RoIAlign counts the elements of its result in 32-bit integers, on a CPU and on a GPU: beyond, it writes
# outside of it (0.29.2 ended the process at 300 boxes of 1 picture).
MOST_ELEMENTS = 2**31 - 1


def joined_stages(stages: Sequence[Tensor]) -> Tensor:
    """The stages' maps on the finest grid as one float32 map (B, ΣC_l, H_0, W_0); float64 stays."""
    finest = stages[0]
    maps = [finest]
    for stage in stages[1:]:
        wide = F.interpolate(_wide(stage), size=finest.shape[2:], mode="bilinear", align_corners=False)
        maps.append(wide.to(stage.dtype))
    return _wide(torch.cat(maps, dim=1))


def torchvision_roi_align(*arguments: Any, **options: Any) -> Tensor:
    """torchvision takes a second to import."""
    from torchvision.ops import roi_align

    return roi_align(*arguments, **options)


def object_vectors(
    joined: Tensor, boxes: Tensor, spatial_scale: float, dtype: torch.dtype, align: Align
) -> Tensor:
    """One picture's map (1, ΣC_l, H_0, W_0) and boxes (K, 4) to vectors (K, ΣC_l)."""
    regions = align(joined, [boxes.to(joined.dtype)], BINS, spatial_scale=spatial_scale)
    return regions.to(dtype).mean(dim=(2, 3))


def pooled_roi_align(
    stages: Sequence[Tensor],
    boxes: Sequence[Tensor],
    spatial_scale: float,
    align: Align = torchvision_roi_align,
) -> tuple[Tensor, ...]:
    """The object branch without its projector, picture after picture."""
    joined = joined_stages(stages)
    vectors = [
        object_vectors(joined[index : index + 1], own, spatial_scale, stages[0].dtype, align)
        for index, own in enumerate(boxes)
    ]
    return (torch.cat(vectors),)


def conv_gate(low_res: Tensor, high_res: Tensor, fusion: ConvGateFusion) -> tuple[Tensor]:
    """Conv-Gate fusion, layer after layer (variant `gate_sum`)."""
    low_map = low_res.transpose(1, 2).reshape(*low_res.shape[::2], *high_res.shape[2:])
    high_map = fusion.high_res_proj(F.gelu(fusion.high_res_conv(high_res)))
    low_map = low_map + fusion.low_res_proj(F.gelu(fusion.low_res_conv(low_map)))
    high = high_map.flatten(2).transpose(1, 2)
    low = low_map.flatten(2).transpose(1, 2)
    hidden = F.gelu(fusion.gate_in(torch.cat([low, high], dim=-1).mean(dim=1)))
    return (low + torch.tanh(fusion.gate_out(hidden)).unsqueeze(1) * high,)


def projector(module: Projector, x: Tensor) -> Tensor:
    """Linear, GELU, Linear."""
    return module.linear_2(F.gelu(module.linear_1(x)))


def neck(
    low_res: Tensor,
    stages: Sequence[Tensor],
    boxes: Sequence[Tensor],
    fusion: ConvGateFusion,
    image_projector: Projector,
    object_projector: Projector,
    spatial_scale: float,
    align: Align = torchvision_roi_align,
) -> tuple[Tensor, Tensor]:
    """The whole neck: image tokens (B, N, T), object tokens (ΣK, T)."""
    joined = joined_stages(stages)
    (fused,) = conv_gate(low_res, stages[-1], fusion)
    image_tokens = projector(image_projector, fused)
    object_tokens = [
        projector(
            object_projector,
            object_vectors(joined[index : index + 1], own, spatial_scale, low_res.dtype, align),
        )
        for index, own in enumerate(boxes)
    ]
    return image_tokens, torch.cat(object_tokens)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def extra_pooled_roi_align(sizes: Sizes, dtype: torch.dtype, mode: str) -> int:
    """The joined map in both dtypes, a copy for torchvision, one picture's bins in both dtypes; their gradients."""
    shapes = stage_shapes(sizes)
    channels = sum(shape[1] for shape in shapes)
    wide = max(4, dtype.itemsize)
    element = wide if dtype.itemsize == wide else wide + dtype.itemsize
    joined = sizes["images"] * channels * math.prod(shapes[0][2:]) * element
    # Upsampled stages and their concatenation exist at once.
    upsampled = joined * 15 // 16
    # torchvision copies a picture's map, which is channels_last, to NCHW.
    copied = channels * math.prod(shapes[0][2:]) * wide if sizes["boxes"] else 0
    bins = sizes["boxes"] * channels * BINS**2 * element
    if mode == "forward":
        return max(joined + upsampled, joined + copied + bins)
    return 2 * joined + copied + 2 * bins


def too_many_bins(sizes: Sizes) -> str | None:
    """Why torchvision's RoIAlign cannot pool one picture's boxes over the joined map, or None."""
    elements = sizes["boxes"] * sum(shape[1] for shape in stage_shapes(sizes)) * BINS**2
    if elements <= MOST_ELEMENTS:
        return None
    return f"torchvision's RoIAlign takes at most {MOST_ELEMENTS:,} elements, here it would make {elements:,}"


def extra_conv_gate(sizes: Sizes, dtype: torch.dtype, mode: str) -> int:
    """A dozen maps of tokens; a backward pass keeps them and makes as many gradients."""
    tokens = sizes["images"] * tokens_of(sizes)
    width = stage_shapes(sizes)[-1][1] + token_width(sizes)
    return (4 if mode == "forward" else 10) * tokens * width * dtype.itemsize


def extra_projectors(sizes: Sizes, dtype: torch.dtype, mode: str) -> int:
    """Three maps of the language model's width; their gradients and those of the weights."""
    tokens = sizes["images"] * (tokens_of(sizes) + sizes["boxes"])
    maps = 3 * tokens * model_width(sizes) * dtype.itemsize
    if mode == "forward":
        return maps
    channels = sum(shape[1] for shape in stage_shapes(sizes))
    weights = model_width(sizes) * (2 * model_width(sizes) + token_width(sizes) + channels)
    return 2 * maps + weights * dtype.itemsize


def extra_neck(sizes: Sizes, dtype: torch.dtype, mode: str) -> int:
    """The sum of its parts."""
    parts = (extra_pooled_roi_align, extra_conv_gate, extra_projectors)
    return sum(part(sizes, dtype, mode) for part in parts)


def extra_flow(sizes: Sizes, dtype: torch.dtype, mode: str) -> int:
    """The neck's, and the stages' maps, which its inputs are no longer. Frozen towers keep nothing for a backward
    pass; a block of them, and of the language model, needs less."""
    finest = math.prod(stage_shapes(sizes)[0])
    return extra_neck(sizes, dtype, "forward" if mode == "forward" else "both") + 8 * finest * dtype.itemsize
