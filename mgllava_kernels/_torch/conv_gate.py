"""Conv-Gate fusion without the projected maps.

The gate needs only means over tokens, and the mean of a projection is the projection of the mean, so three
column means (of `low`, of f and of s) decide it before any projection is computed. Then the output is one sum
of two matmuls, low + f·W_lowᵀ + b_low + (g·s)·W_highᵀ + g·b_high. Only the inputs of the two GELUs and the
means are kept for the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgllava_kernels._torch.projector import gelu_backward
from mgllava_kernels.conv_gate import WEIGHT_NAMES


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, N, D) as a channels-last map (B, D, height, width); a view."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def _as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _depthwise(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    maps = _as_map(tokens, height, width)
    return _as_tokens(F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]))


def _depthwise_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    padding = weight.shape[-1] // 2
    grad_map, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _as_map(grad, height, width),
        _as_map(tokens, height, width),
        weight,
        [weight.shape[0]],
        [1, 1],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        list(needed),
    )
    # The operator also returns gradients that its mask excludes.
    return (
        _as_tokens(grad_map) if needed[0] else None,
        grad_weight if needed[1] else None,
        grad_bias if needed[2] else None,
    )


def depthwise_conv_gelu(
    tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, save: bool
) -> tuple[Tensor, Tensor]:
    pre_activation = _depthwise(tokens, weight, bias, height, width)
    output = F.gelu(pre_activation).contiguous()
    return output, pre_activation.contiguous() if save else tokens.new_empty(0)


def depthwise_conv_gelu_backward(
    grad: Tensor,
    tokens: Tensor,
    weight: Tensor,
    pre_activation: Tensor,
    height: int,
    width: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    grad_pre = gelu_backward(grad, pre_activation)
    grads = _depthwise_backward(grad_pre, tokens, weight, height, width, needed)
    return [value.contiguous() for value in grads if value is not None]


@dataclass(frozen=True)
class GateHead:
    """The gate of each image, (B, 1), and what its backward pass needs, in the accumulation dtype."""

    gate: Tensor
    column_means: Tensor
    pre_activation: Tensor
    hidden: Tensor


def _gate_head(mean_low: Tensor, mean_f: Tensor, mean_s: Tensor, weights: dict[str, Tensor]) -> GateHead:
    wide = {name: weight.to(mean_low.dtype) for name, weight in weights.items() if "conv" not in name}
    mean_l = mean_low + F.linear(mean_f, wide["low_res_proj_weight"].flatten(1), wide["low_res_proj_bias"])
    mean_h = F.linear(mean_s, wide["high_res_proj_weight"].flatten(1), wide["high_res_proj_bias"])
    column_means = torch.cat([mean_l, mean_h], dim=1)
    pre_activation = F.linear(column_means, wide["gate_in_weight"], wide["gate_in_bias"])
    hidden = F.gelu(pre_activation)
    gate = torch.tanh(F.linear(hidden, wide["gate_out_weight"], wide["gate_out_bias"]))
    return GateHead(gate, column_means, pre_activation, hidden)


def conv_gate_fusion(
    low_res: Tensor, high_res: Tensor, weights: Sequence[Tensor], variant: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fused tokens; then (with `save`) both inputs of GELUs and the column means of low, f and s."""
    named = dict(zip(WEIGHT_NAMES, weights, strict=False))
    images, tokens, low_dim = low_res.shape
    height, width = high_res.shape[2:]
    low_weight = named["low_res_proj_weight"].flatten(1)
    high_weight = named["high_res_proj_weight"].flatten(1)

    high_pre = F.linear(
        _as_tokens(high_res), named["high_res_conv_weight"].flatten(1), named["high_res_conv_bias"]
    )
    s = F.gelu(high_pre)
    low_pre = _depthwise(low_res, named["low_res_conv_weight"], named["low_res_conv_bias"], height, width)
    f = F.gelu(low_pre)
    high_bias = named["high_res_proj_bias"].expand(images, -1)
    column_means = low_res.new_empty(0)
    if variant != "concat_projected":
        dtype = _accumulation_dtype(low_res)
        mean_low, mean_f, mean_s = (value.mean(dim=1, dtype=dtype) for value in (low_res, f, s))
        gate = _gate_head(mean_low, mean_f, mean_s, named).gate
        column_means = torch.cat([mean_low, mean_f, mean_s], dim=1)
        s = (s * gate.unsqueeze(1)).to(s.dtype)
        high_bias = (high_bias * gate).to(s.dtype)

    flat_f, flat_s = f.flatten(0, 1), s.flatten(0, 1)
    if variant == "gate_sum":
        fused = (low_res + (named["low_res_proj_bias"] + high_bias).unsqueeze(1)).contiguous()
        fused.view(images * tokens, low_dim).addmm_(flat_f, low_weight.T).addmm_(flat_s, high_weight.T)
    else:
        fused = low_res.new_empty(images, tokens, 2 * low_dim)
        low_half, high_half = fused.view(images * tokens, 2 * low_dim).chunk(2, dim=1)
        fused[..., :low_dim] = low_res + named["low_res_proj_bias"]
        fused[..., low_dim:] = high_bias.unsqueeze(1)
        low_half.addmm_(flat_f, low_weight.T)
        high_half.addmm_(flat_s, high_weight.T)
    if not save:
        return fused, low_res.new_empty(0), low_res.new_empty(0), low_res.new_empty(0)
    return fused, low_pre.contiguous(), high_pre, column_means


def conv_gate_fusion_backward(
    grad: Tensor,
    low_res: Tensor,
    high_res: Tensor,
    weights: Sequence[Tensor],
    low_pre: Tensor,
    high_pre: Tensor,
    column_means: Tensor,
    variant: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients to (low_res, high_res, *weights).

    The gate's derivative is dg = Σ (dh·W_high) ∘ s + (Σ dh)·b_high, a by-product of ds; through the column
    means it comes back as one constant row per image on dl and dh, added below as rank-one terms instead of
    being written out over all tokens.
    """
    named = dict(zip(WEIGHT_NAMES, weights, strict=False))
    need = dict(zip(("low_res", "high_res", *WEIGHT_NAMES), needed, strict=False))
    images, tokens, low_dim = low_res.shape
    height, width = high_res.shape[2:]
    dtype = _accumulation_dtype(low_res)
    low_weight = named["low_res_proj_weight"].flatten(1)
    high_weight = named["high_res_proj_weight"].flatten(1)
    grads: dict[str, Tensor | None] = {}

    f, s = F.gelu(low_pre), F.gelu(high_pre)
    grad_low, grad_high = (grad, grad) if variant == "gate_sum" else grad.split(low_dim, dim=-1)
    grad_low_sum, grad_high_sum = (value.sum(dim=1, dtype=dtype) for value in (grad_low, grad_high))
    grad_s = grad_high @ high_weight
    row_low = row_high = grad_low_sum.new_zeros(images, low_dim)
    mean_f = mean_s = None
    gate = grad_low_sum.new_ones(images, 1)
    if variant != "concat_projected":
        mean_low, mean_f, mean_s = column_means.split([low_dim, low_dim, s.shape[-1]], dim=1)
        head = _gate_head(mean_low, mean_f, mean_s, named)
        gate = head.gate
        grad_gate = (grad_s * s).sum(dim=(1, 2), dtype=dtype).unsqueeze(1)
        grad_gate = grad_gate + (grad_high_sum @ named["high_res_proj_bias"].to(dtype)).unsqueeze(1)
        grad_logit = grad_gate * (1 - gate**2)
        grad_hidden = gelu_backward(grad_logit @ named["gate_out_weight"].to(dtype), head.pre_activation)
        grads["gate_out_weight"] = grad_logit.T @ head.hidden
        grads["gate_out_bias"] = grad_logit.sum(dim=0)
        grads["gate_in_weight"] = grad_hidden.T @ head.column_means
        grads["gate_in_bias"] = grad_hidden.sum(dim=0)
        row_low, row_high = (grad_hidden @ named["gate_in_weight"].to(dtype)).split(low_dim, dim=1)

    def with_row(value: Tensor, row: Tensor) -> Tensor:
        """Add an image's constant row, the gradient of a mean, to the gradient of each of its tokens."""
        return value if mean_s is None else value + (row / tokens).to(value.dtype).unsqueeze(1)

    if need["high_res_proj_bias"]:
        grads["high_res_proj_bias"] = (gate * grad_high_sum + row_high).sum(dim=0)
    if need["high_res_proj_weight"]:
        scaled = grad_high if mean_s is None else (grad_high * gate.unsqueeze(1)).to(s.dtype)
        grad_weight = scaled.flatten(0, 1).T @ s.flatten(0, 1)
        grads["high_res_proj_weight"] = grad_weight if mean_s is None else grad_weight + row_high.T @ mean_s
    if need["high_res"] or need["high_res_conv_weight"] or need["high_res_conv_bias"]:
        if mean_s is not None:
            grad_s = (grad_s * gate.unsqueeze(1)).to(s.dtype)
        grad_pre = gelu_backward(with_row(grad_s, row_high @ high_weight.to(dtype)), high_pre)
        if need["high_res"]:
            grads["high_res"] = (
                (grad_pre @ named["high_res_conv_weight"].flatten(1)).transpose(1, 2).reshape(high_res.shape)
            )
        if need["high_res_conv_weight"]:
            flat_high = _as_tokens(high_res).flatten(0, 1)
            grads["high_res_conv_weight"] = grad_pre.flatten(0, 1).T @ flat_high
        grads["high_res_conv_bias"] = grad_pre.sum(dim=(0, 1))

    if need["low_res_proj_bias"]:
        grads["low_res_proj_bias"] = (grad_low_sum + row_low).sum(dim=0)
    if need["low_res_proj_weight"]:
        grad_weight = grad_low.flatten(0, 1).T @ f.flatten(0, 1)
        grads["low_res_proj_weight"] = grad_weight if mean_f is None else grad_weight + row_low.T @ mean_f
    conv_needed = (need["low_res"], need["low_res_conv_weight"], need["low_res_conv_bias"])
    if any(conv_needed):
        grad_f = with_row(grad_low @ low_weight, row_low @ low_weight.to(dtype))
        grad_map, grads["low_res_conv_weight"], grads["low_res_conv_bias"] = _depthwise_backward(
            gelu_backward(grad_f, low_pre),
            low_res,
            named["low_res_conv_weight"],
            height,
            width,
            conv_needed,
        )
        if grad_map is not None:
            grads["low_res"] = grad_map + with_row(grad_low, row_low)

    inputs = {"low_res": low_res, "high_res": high_res, **named}
    results = []
    for name, value in inputs.items():
        if need[name]:
            gradient = grads[name]
            assert gradient is not None
            results.append(gradient.reshape(value.shape).to(value.dtype).contiguous())
    return results
