"""Conv-Gate fusion and its depthwise half: public functions, custom ops, autograd, module."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgllava_kernels import backend, reference
from mgllava_kernels._autocast import autocast_operands
from mgllava_kernels._checks import check_alike, check_int, check_map, check_tensor, check_width
from mgllava_kernels._layers import fusion_obstacle

for _name in ("conv_gate_fusion", "depthwise_conv_gelu"):
    backend.register(
        _name, torch="mgllava_kernels._torch.conv_gate", triton="mgllava_kernels._triton.conv_gate"
    )

VARIANTS = ("gate_sum", "gate_concat", "concat_projected", "concat_raw")
LAYERS = ("high_res_conv", "high_res_proj", "low_res_conv", "low_res_proj", "gate_in", "gate_out")
# The order in which the ops take the weights; a variant without a gate takes the first eight.
WEIGHT_NAMES = tuple(f"{layer}_{leaf}" for layer in LAYERS for leaf in ("weight", "bias"))


def conv_gate_fusion(
    low_res: Tensor,
    high_res: Tensor,
    *,
    high_res_conv_weight: Tensor | None = None,
    high_res_conv_bias: Tensor | None = None,
    high_res_proj_weight: Tensor | None = None,
    high_res_proj_bias: Tensor | None = None,
    low_res_conv_weight: Tensor | None = None,
    low_res_conv_bias: Tensor | None = None,
    low_res_proj_weight: Tensor | None = None,
    low_res_proj_bias: Tensor | None = None,
    gate_in_weight: Tensor | None = None,
    gate_in_bias: Tensor | None = None,
    gate_out_weight: Tensor | None = None,
    gate_out_bias: Tensor | None = None,
    variant: str = "gate_sum",
) -> Tensor:
    """Fuse low-resolution tokens with a high-resolution map of the same grid, with one gate per image.

    h = high_res_proj(GELU(high_res_conv(high))), l = low + low_res_proj(GELU(low_res_conv(low))),
    g = tanh(gate_out(GELU(gate_in(mean over tokens of [l ; h])))), GELU exact. By variant:
    `gate_sum` l + g·h, `gate_concat` [l ; g·h], `concat_projected` [l ; h], `concat_raw` [low ; high].

    Args:
        low_res: tokens (B, N, D) in row-major order of the grid, floating.
        high_res: map (B, C, H, W) with H·W = N; device and dtype of `low_res`.
        high_res_conv_weight: (C, C, 1, 1), bias (C,).
        high_res_proj_weight: (D, C, 1, 1), bias (D,).
        low_res_conv_weight: depthwise, (D, 1, 7, 7), bias (D,).
        low_res_proj_weight: (D, D, 1, 1), bias (D,).
        gate_in_weight: (M, 2D), bias (M,); M = D // 2 in the paper.
        gate_out_weight: (1, M), bias (1,).
        variant: the gate's parameters belong to the two gate variants only; `concat_raw` takes none at all.

    Returns:
        (B, N, D) for `gate_sum`, (B, N, 2D) for `gate_concat` and `concat_projected`, (B, N, D + C) for
        `concat_raw`; in the dtype of `low_res`, or inside an autocast region in its dtype, unless float64.
        Means and the gate are computed in float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: a parameter missing or superfluous, of the wrong type, shape, dtype or device;
            N ≠ H·W.

    Source: MG-LLaVA, arXiv 2406.17770, section 3.1.
    """
    parameters = {
        "high_res_conv_weight": high_res_conv_weight,
        "high_res_conv_bias": high_res_conv_bias,
        "high_res_proj_weight": high_res_proj_weight,
        "high_res_proj_bias": high_res_proj_bias,
        "low_res_conv_weight": low_res_conv_weight,
        "low_res_conv_bias": low_res_conv_bias,
        "low_res_proj_weight": low_res_proj_weight,
        "low_res_proj_bias": low_res_proj_bias,
        "gate_in_weight": gate_in_weight,
        "gate_in_bias": gate_in_bias,
        "gate_out_weight": gate_out_weight,
        "gate_out_bias": gate_out_bias,
    }
    _check_variant(variant)
    _check_maps(low_res, high_res)
    weights = _check_parameters(parameters, low_res.shape[2], high_res.shape[1], variant)
    low_res, high_res, *weights = autocast_operands(low_res.device, [low_res, high_res, *weights])
    for name, value in zip(("high_res", *WEIGHT_NAMES), (high_res, *weights), strict=False):
        check_alike(name, value, "low_res", low_res)
    path = backend.resolve("conv_gate_fusion", low_res).name
    if variant == "concat_raw":
        return torch.cat([low_res, high_res.flatten(2).transpose(1, 2)], dim=-1)
    if path == "reference":
        return _reference_fusion(low_res, high_res, weights, variant)
    save = torch.is_grad_enabled() and any(value.requires_grad for value in (low_res, high_res, *weights))
    return _conv_gate_fusion(low_res, high_res, weights, variant, save, path)[0]


def depthwise_conv_gelu(tokens: Tensor, weight: Tensor, bias: Tensor, *, height: int, width: int) -> Tensor:
    """GELU of a depthwise 7x7 convolution (padding 3) of tokens that form a grid; no transposed copy is made.

    Args:
        tokens: (B, height·width, D) in row-major order of the grid, floating.
        weight: (D, 1, 7, 7); bias: (D,); device and dtype of `tokens`.
        height, width: the grid.

    Returns:
        (B, height·width, D) in the dtype of `tokens`, or inside an autocast region in its dtype, unless float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_tensor("tokens", tokens, ("B", "N", "D"))
    count, channels = tokens.shape[1:]
    height, width = check_int("height", height), check_int("width", width)
    if height < 1 or width < 1 or height * width != count:
        raise ValueError(
            f"height x width must be the number of tokens, {count}, got {height} x {width} = {height * width}"
        )
    check_tensor("weight", weight, (channels, 1, 7, 7))
    check_tensor("bias", bias, (channels,))
    tokens, weight, bias = autocast_operands(tokens.device, [tokens, weight, bias])
    check_alike("weight", weight, "tokens", tokens)
    check_alike("bias", bias, "tokens", tokens)
    path = backend.resolve("depthwise_conv_gelu", tokens).name
    if path == "reference":
        return reference.depthwise_conv_gelu(tokens, weight, bias, height, width)
    save = torch.is_grad_enabled() and any(value.requires_grad for value in (tokens, weight, bias))
    return _depthwise_conv_gelu(tokens, weight, bias, height, width, save, path)[0]


class ConvGateFusion(nn.Module):
    """Conv-Gate fusion (`conv_gate_fusion`) with its parameters: (B, N, D) and (B, C, H, W) to (B, N,
    out_features).

    Layers: `high_res_conv`, `high_res_proj`, `low_res_conv`, `low_res_proj`, and `gate_in`, `gate_out` in the
    gate variants; `concat_raw` has none. If a layer has been replaced, hooked, quantised or sharded on its own,
    the module calls the layers one after the other, or raises RuntimeError if the backend `triton` was chosen.

    Args:
        low_res_dim: D; the gate's hidden width is D // 2.
        high_res_dim: C.
        variant: `gate_sum`, `gate_concat`, `concat_projected` or `concat_raw`, as for `conv_gate_fusion`.
        device, dtype: of the parameters, as torch's layers take them.

    Raises:
        TypeError, ValueError: a width that is no positive int; an unknown variant.

    Source: MG-LLaVA, arXiv 2406.17770, section 3.1.
    """

    def __init__(
        self,
        low_res_dim: int,
        high_res_dim: int,
        variant: str = "gate_sum",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_variant(variant)
        low = self.low_res_dim = check_width("low_res_dim", low_res_dim)
        high = self.high_res_dim = check_width("high_res_dim", high_res_dim)
        self.variant = variant
        if variant == "concat_raw":
            return
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.high_res_conv = nn.Conv2d(high, high, 1, **placed)
        self.high_res_proj = nn.Conv2d(high, low, 1, **placed)
        self.low_res_conv = nn.Conv2d(low, low, 7, padding=3, groups=low, **placed)
        self.low_res_proj = nn.Conv2d(low, low, 1, **placed)
        if variant in ("gate_sum", "gate_concat"):
            self.gate_in = nn.Linear(2 * low, low // 2, **placed)
            self.gate_out = nn.Linear(low // 2, 1, **placed)
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """Width of the fused tokens."""
        if self.variant == "gate_sum":
            return self.low_res_dim
        if self.variant == "concat_raw":
            return self.low_res_dim + self.high_res_dim
        return 2 * self.low_res_dim

    def reset_parameters(self) -> None:
        """Convolutions Xavier-uniform, both projections and all biases zero, gate weights as torch's linear
        layers.

        A fresh module passes the low-resolution tokens through unchanged. Layers without elements, whose weights
        DeepSpeed's ZeRO-3 has taken away already, are left alone: gather them and call this again.
        """
        for name, layer in self._layers().items():
            if not layer.weight.numel():
                continue
            if name.endswith("_conv"):
                nn.init.xavier_uniform_(layer.weight)
            elif name.endswith("_proj"):
                nn.init.zeros_(layer.weight)
            else:
                layer.reset_parameters()
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, low_res: Tensor, high_res: Tensor) -> Tensor:
        """Tokens (B, N, D) and map (B, C, H, W), H·W = N, to (B, N, out_features); as `conv_gate_fusion`."""
        layers = self._layers()
        obstacle = fusion_obstacle(layers, low_res, high_res)
        if obstacle is not None:
            backend.check_composition(obstacle)
            _check_maps(low_res, high_res)
            return reference.conv_gate_fusion(
                low_res,
                high_res,
                self.high_res_conv,
                self.high_res_proj,
                self.low_res_conv,
                self.low_res_proj,
                layers.get("gate_in"),
                layers.get("gate_out"),
                self.variant,
            )
        parameters: dict[str, Tensor | None] = {}
        for name, layer in layers.items():
            parameters[f"{name}_weight"] = layer.weight
            parameters[f"{name}_bias"] = layer.bias
        return conv_gate_fusion(low_res, high_res, **parameters, variant=self.variant)

    def _layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """The layers of this variant by name."""
        return {name: getattr(self, name) for name in LAYERS if hasattr(self, name)}

    def extra_repr(self) -> str:
        return f"{self.low_res_dim}, {self.high_res_dim}, variant={self.variant!r}"


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")


def _check_maps(low_res: Tensor, high_res: Tensor) -> None:
    check_tensor("low_res", low_res, ("B", "N", "D"))
    check_map("high_res", high_res, (low_res.shape[0], "C", "H", "W"))
    for name, width_name, value in (("low_res", "D", low_res.shape[2]), ("high_res", "C", high_res.shape[1])):
        if value == 0:
            raise ValueError(f"{name} must have at least one channel, got {width_name} = 0")
    tokens, (height, width) = low_res.shape[1], high_res.shape[2:]
    if tokens != height * width:
        raise ValueError(
            f"low_res must have as many tokens as high_res has positions: "
            f"{tokens} tokens, {height} x {width} = {height * width} positions"
        )


def _check_parameters(
    parameters: dict[str, Tensor | None], low_dim: int, high_dim: int, variant: str
) -> list[Tensor]:
    gate_hidden = parameters["gate_in_bias"]
    gate_width = gate_hidden.shape[0] if isinstance(gate_hidden, Tensor) and gate_hidden.ndim == 1 else "M"
    shapes: dict[str, tuple[int | str, ...]] = {
        "high_res_conv_weight": (high_dim, high_dim, 1, 1),
        "high_res_conv_bias": (high_dim,),
        "high_res_proj_weight": (low_dim, high_dim, 1, 1),
        "high_res_proj_bias": (low_dim,),
        "low_res_conv_weight": (low_dim, 1, 7, 7),
        "low_res_conv_bias": (low_dim,),
        "low_res_proj_weight": (low_dim, low_dim, 1, 1),
        "low_res_proj_bias": (low_dim,),
        "gate_in_weight": (gate_width, 2 * low_dim),
        "gate_in_bias": (gate_width,),
        "gate_out_weight": (1, gate_width),
        "gate_out_bias": (1,),
    }
    weights = []
    for name in WEIGHT_NAMES:
        value = parameters[name]
        wanted = variant != "concat_raw" and (not name.startswith("gate") or variant.startswith("gate"))
        if wanted != (value is not None):
            raise ValueError(f"{name} must be {'given' if wanted else 'None'} for variant {variant!r}")
        if value is not None:
            weights.append(check_tensor(name, value, shapes[name]))
    return weights


def _reference_fusion(low_res: Tensor, high_res: Tensor, weights: Sequence[Tensor], variant: str) -> Tensor:
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    conv, linear = F.conv2d, F.linear
    layers: list[reference.Layer] = [
        partial(_with, conv, *pairs[0]),
        partial(_with, conv, *pairs[1]),
        partial(_with, partial(conv, padding=3, groups=low_res.shape[2]), *pairs[2]),
        partial(_with, conv, *pairs[3]),
        *(partial(_with, linear, *pair) for pair in pairs[4:]),
    ]
    high_conv, high_proj, low_conv, low_proj, *gates = layers
    gate_in, gate_out = gates if gates else (None, None)
    return reference.conv_gate_fusion(
        low_res, high_res, high_conv, high_proj, low_conv, low_proj, gate_in, gate_out, variant
    )


def _with(function: Callable[..., Tensor], weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return function(x, weight, bias)


@torch.library.custom_op("mgllava::depthwise_conv_gelu", mutates_args=())
def _depthwise_conv_gelu(
    tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, save: bool, path: str
) -> tuple[Tensor, Tensor]:
    arguments = (tokens, weight, bias, height, width, save)
    return backend.call("depthwise_conv_gelu", path, "depthwise_conv_gelu", tokens.device, *arguments)


@_depthwise_conv_gelu.register_fake
def _(tokens, weight, bias, height, width, save, path):
    output = tokens.new_empty(tokens.shape)
    return output, tokens.new_empty(tokens.shape) if save else tokens.new_empty(0)


@torch.library.custom_op("mgllava::depthwise_conv_gelu_backward", mutates_args=())
def _depthwise_conv_gelu_backward(
    grad: Tensor,
    tokens: Tensor,
    weight: Tensor,
    pre_activation: Tensor,
    height: int,
    width: int,
    needed: Sequence[bool],
    path: str,
) -> list[Tensor]:
    arguments = (grad, tokens, weight, pre_activation, height, width, needed)
    return backend.call(
        "depthwise_conv_gelu", path, "depthwise_conv_gelu_backward", tokens.device, *arguments
    )


@_depthwise_conv_gelu_backward.register_fake
def _(grad, tokens, weight, pre_activation, height, width, needed, path):
    shapes = (tokens.shape, weight.shape, weight.shape[:1])
    return [tokens.new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


def _depthwise_setup(ctx, inputs, output):
    tokens, weight, _, ctx.height, ctx.width, _, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(tokens, weight, output[1])


def _depthwise_autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    backend.refuse_batched_gradients("depthwise_conv_gelu", grad)
    needed = list(ctx.needs_input_grad[:3])
    grads = iter(
        _depthwise_conv_gelu_backward(grad, *ctx.saved_tensors, ctx.height, ctx.width, needed, ctx.path)
    )
    return *(next(grads) if need else None for need in needed), None, None, None, None


_depthwise_conv_gelu.register_autograd(_depthwise_autograd, setup_context=_depthwise_setup)
_depthwise_conv_gelu_backward.register_autograd(backend.refuse_double_backward("depthwise_conv_gelu"))


@torch.library.custom_op("mgllava::conv_gate_fusion", mutates_args=())
def _conv_gate_fusion(
    low_res: Tensor, high_res: Tensor, weights: Sequence[Tensor], variant: str, save: bool, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fused tokens; with `save` also both GELU inputs, (B, N, D), (B, N, C), and means (B, 2D + C)."""
    arguments = (low_res, high_res, weights, variant, save)
    return backend.call("conv_gate_fusion", path, "conv_gate_fusion", low_res.device, *arguments)


@_conv_gate_fusion.register_fake
def _(low_res, high_res, weights, variant, save, path):
    images, tokens, low_dim = low_res.shape
    high_dim = high_res.shape[1]
    fused = low_res.new_empty(images, tokens, low_dim if variant == "gate_sum" else 2 * low_dim)
    if not save:
        return fused, low_res.new_empty(0), low_res.new_empty(0), low_res.new_empty(0)
    means = low_res.new_empty(0)
    if variant != "concat_projected":
        dtype = torch.float64 if low_res.dtype == torch.float64 else torch.float32
        means = low_res.new_empty(images, 2 * low_dim + high_dim, dtype=dtype)
    return fused, low_res.new_empty(low_res.shape), low_res.new_empty(images, tokens, high_dim), means


@torch.library.custom_op("mgllava::conv_gate_fusion_backward", mutates_args=())
def _conv_gate_fusion_backward(
    grad: Tensor,
    low_res: Tensor,
    high_res: Tensor,
    weights: Sequence[Tensor],
    low_pre: Tensor,
    high_pre: Tensor,
    column_means: Tensor,
    variant: str,
    needed: Sequence[bool],
    path: str,
) -> list[Tensor]:
    """The needed gradients to (low_res, high_res, *weights)."""
    arguments = (grad, low_res, high_res, weights, low_pre, high_pre, column_means, variant, needed)
    return backend.call("conv_gate_fusion", path, "conv_gate_fusion_backward", grad.device, *arguments)


@_conv_gate_fusion_backward.register_fake
def _(grad, low_res, high_res, weights, low_pre, high_pre, column_means, variant, needed, path):
    inputs = (low_res, high_res, *weights)
    return [value.new_empty(value.shape) for value, need in zip(inputs, needed, strict=True) if need]


def _conv_gate_setup(ctx, inputs, output):
    low_res, high_res, weights, ctx.variant, _, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(low_res, high_res, *weights, *output[1:])


def _conv_gate_autograd(ctx, grad, *_):
    needs_low, needs_high, needs_weights = ctx.needs_input_grad[:3]
    if grad is None:
        return None, None, [None] * len(needs_weights), None, None, None
    backend.refuse_batched_gradients("conv_gate_fusion", grad)
    low_res, high_res, *weights, low_pre, high_pre, means = ctx.saved_tensors
    needed = [needs_low, needs_high, *needs_weights]
    grads = iter(
        _conv_gate_fusion_backward(
            grad, low_res, high_res, weights, low_pre, high_pre, means, ctx.variant, needed, ctx.path
        )
    )
    low, high, *by_weight = (next(grads) if need else None for need in needed)
    return low, high, by_weight, None, None, None


_conv_gate_fusion.register_autograd(_conv_gate_autograd, setup_context=_conv_gate_setup)
_conv_gate_fusion_backward.register_autograd(backend.refuse_double_backward("conv_gate_fusion"))
