"""The literal compositions that the ops of this package stand for: the oracle, in plain differentiable
PyTorch.

The order of operations and the dtypes are those of the published MG-LLaVA (arXiv 2406.17770): stage maps are
upsampled in float32 and cast to the model's dtype, RoIAlign runs in float32, its bins are averaged in the
model's dtype. In float64 nothing is cast. torchvision is imported on first use.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Coordinates on the map are brought within this: sums and products of two stay finite in float32. All samples
# out there are outside the map anyway.
FARTHEST = 1e18

Layer = Callable[[Tensor], Tensor]


def roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """torchvision's compiled RoIAlign in the dtype of `boxes`, (K, 5), cast back to that of `input`."""
    import torchvision  # noqa: F401  registers the op

    limit = FARTHEST / spatial_scale
    boxes = torch.cat([boxes[:, :1], boxes[:, 1:].clamp(-limit, limit)], dim=1)
    if aligned and sampling_ratio <= 0:
        # An inverted box has no adaptive samples. torchvision's CPU op sizes a buffer by their negative
        # number and throws; with no length it gives the same zeros.
        ends = torch.maximum(boxes[:, 3:], boxes[:, 1:3])
        boxes = torch.cat([boxes[:, :3], ends], dim=1)
    output = torch.ops.torchvision.roi_align(
        input.to(boxes.dtype), boxes, spatial_scale, output_height, output_width, sampling_ratio, aligned
    )
    return output.to(input.dtype)


def pooled_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Upsample every level to the first one, concatenate the channels, RoIAlign, mean over the bins."""
    finest = features[0]
    maps = [finest]
    for level in features[1:]:
        upsampled = F.interpolate(
            level.to(boxes.dtype), size=finest.shape[2:], mode="bilinear", align_corners=False
        )
        maps.append(upsampled.to(level.dtype))
    regions = roi_align(
        torch.cat(maps, dim=1), boxes, spatial_scale, output_height, output_width, sampling_ratio, aligned
    )
    return regions.mean(dim=(2, 3))


def conv_gate_fusion(
    low_res: Tensor,
    high_res: Tensor,
    high_res_conv: Layer,
    high_res_proj: Layer,
    low_res_conv: Layer,
    low_res_proj: Layer,
    gate_in: Layer | None,
    gate_out: Layer | None,
    variant: str,
) -> Tensor:
    """Conv-Gate fusion from its layers: four convolutions over (B, channels, H, W) and two linear ones."""
    low_map = low_res.transpose(1, 2).unflatten(2, high_res.shape[2:])
    high_map = high_res_proj(F.gelu(high_res_conv(high_res)))
    low_map = low_map + low_res_proj(F.gelu(low_res_conv(low_map)))
    high = high_map.flatten(2).transpose(1, 2)
    low = low_map.flatten(2).transpose(1, 2)
    if gate_in is not None and gate_out is not None:
        column_means = torch.cat([low, high], dim=-1).mean(dim=1)
        high = torch.tanh(gate_out(F.gelu(gate_in(column_means)))).unsqueeze(1) * high
    return low + high if variant == "gate_sum" else torch.cat([low, high], dim=-1)


def depthwise_conv_gelu(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Depthwise convolution and GELU of tokens (B, height·width, D) laid out as a map."""
    maps = tokens.transpose(1, 2).unflatten(2, (height, width))
    output = F.gelu(F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]))
    return output.flatten(2).transpose(1, 2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def mlp_projector(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
