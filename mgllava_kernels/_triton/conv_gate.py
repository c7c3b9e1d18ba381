"""Conv-Gate fusion without the projected maps, forward and backward; the algebra is that of the torch path.

Forward, six launches: s = GELU(pointwise) with column sums, where programs of their own lay out the taps of the
convolution; f = GELU(depthwise) with column sums; the means; the gate's two matrix-vector products; the output,
one dual product: low + f·W_lowᵀ + b_low + g·(s·W_highᵀ + b_high), whose accumulator is scaled by g between its
halves. Without a gate three. Six and not five, because what is left cannot be joined without loss: if the first
of the gate's launches added up the partial sums, each of its 512 programs (at up to 4 pictures, published sizes)
would read 9 of them, 37 KB or 55 KB for the 4 or 6 KB of a mean; 24 MB from an L2 cache of some 5.5 TB/s is 4 µs,
the launch that it would save 2. And the convolution, which needs many small programs to hide the latency of its
loads, would run one program a multiprocessor in a launch with the pointwise product's shared memory.

Backward, with G the incoming gradient, G_low and G_high its parts: the gate's derivative is, of each picture,
dg = <G_high·W_high, s> + <Σ_n G_high, b_high>, a by-product of d_s without its gate. Through the means it comes
back as one constant row a picture on dl and dh:

    the gate's head again                                                                             2 launches
    G_high·W_high with <·, s>, G_low·W_low; taps                                                      1
    sums of G over tokens                                                                             1
    dg, rows on the means of l and h, of f and s                                                      3
    d_s and d_f = (g·G·W + row / N) ∘ GELU'; g·s and f, again from the inputs of the GELUs; sums      1
    gradients of W_low, W_high and the pointwise weight, with Σ_b row ⊗ mean in the epilogue          1
    of high_res; of low_res; of the taps (2); of the biases; of the gate's weights                    6

15 launches where all gradients are needed; 16 where high_res is not channels_last, because operands of a launch
lie in memory alike. Without a gate GELU' is in the epilogue of the first product: 8 or 9. Every sum has one fixed
order.

Bytes and FLOPs a picture at published sizes (D 1024, C 1536, 24x24 tokens) in bfloat16, forward: 1.2 MB low and
1.8 MB high read, 1.2 MB written, f and s, 1.2 and 1.8 MB, written and read once more, and 12.2 MB of weights for
any number of pictures; 5.7 GFLOP in matrix products and 0.06 in the convolution. At 4.3 TB/s and 600 TFLOP/s the
floor for 1, 8 and 32 pictures is 9.6, 77 and 306 µs, set by the matrix products. Backward, where all is needed:
each of them twice, 11.5 GFLOP a picture; 19, 153 and 612 µs. The one elementwise pass is 11.8 MB a picture, 2.7 µs
from memory. 2.9 MB of them are G·W, written before: 1.4 µs for both, where a product of its own for dg would be
1.8 GFLOP, 3 µs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgllava_kernels._triton.depthwise import (
    convolution_parameter_gradients,
    convolve_gelu,
    convolve_transposed,
    depthwise_conv_gelu,
    depthwise_conv_gelu_backward,
    taps_and_job,
)
from mgllava_kernels._triton.dual_product import Projections, dual_product
from mgllava_kernels._triton.gate_head import (
    GateWeights,
    gate_arguments,
    gate_gradients,
    gate_head,
    gate_parameter_gradients,
)
from mgllava_kernels._triton.matmul import matrix_layout
from mgllava_kernels._triton.product_configs import token_space, weight_space
from mgllava_kernels._triton.products import (
    Product,
    Side,
    config_of_tokens,
    config_of_weights,
    multiply,
)
from mgllava_kernels._triton.tokens import (
    BiasGradient,
    GeluGradient,
    bias_gradients,
    column_sums,
    gelu_gradients,
    token_sums,
)
from mgllava_kernels.conv_gate import WEIGHT_NAMES

__all__ = [
    "conv_gate_fusion",
    "conv_gate_fusion_backward",
    "depthwise_conv_gelu",
    "depthwise_conv_gelu_backward",
]

PRODUCT = token_space("conv_gate_product")
WEIGHT = weight_space("conv_gate_weight_gradient")


def conv_gate_fusion(
    low_res: Tensor, high_res: Tensor, weights: Sequence[Tensor], variant: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as of the function of this name in `mgllava_kernels._torch.conv_gate`."""
    named = dict(zip(WEIGHT_NAMES, weights, strict=False))
    tokens = low_res.shape[1]
    height, width = high_res.shape[2:]
    gated = variant != "concat_projected"
    taps, side = taps_and_job(named["low_res_conv_weight"])
    s, high_pre, high_sums = _pointwise_gelu(
        *(_as_tokens(high_res), named["high_res_conv_weight"].flatten(1), named["high_res_conv_bias"]),
        *(save, gated, side),
    )
    f, low_pre, low_sums = convolve_gelu(
        *(low_res, taps, named["low_res_conv_bias"], height, width, save, gated)
    )
    column_means, gate = low_res.new_empty(0), None
    if gated:
        column_means = column_sums([low_sums, high_sums], 1.0 / max(tokens, 1))
        gate_weights = _gate_weights(named)
        gate = gate_arguments(gate_head(column_means, gate_weights), gate_weights)
    fused = dual_product(low_res, f, s, _projections(named), gate, variant != "gate_sum")
    if not save:
        column_means = low_res.new_empty(0)
    return fused, low_pre, high_pre, column_means


@dataclass(frozen=True)
class _Flow:
    """One of both flows, backward: gradient of its projection's result, (B, N, D), without the gate where there is
    one; the projection's weight, (D, width); the input of the GELU, (B, N, width).
    """

    grad: Tensor
    weight: Tensor
    pre: Tensor


@dataclass(frozen=True)
class _Back:
    """What became of a flow: the gradient of the GELU's input; the GELU's result, times the gate where there is one,
    both (B, N, width); sums over tokens of the former in parts, (B, P, width), float32.
    """

    grad_pre: Tensor
    activation: Tensor
    sums: Tensor


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
    """Arguments and results as of the function of this name in `mgllava_kernels._torch.conv_gate`."""
    named = dict(zip(WEIGHT_NAMES, weights, strict=False))
    inputs = {"low_res": low_res, "high_res": high_res, **named}
    need = dict(zip(inputs, needed, strict=True))
    low_dim, gated = low_res.shape[2], variant != "concat_projected"
    if matrix_layout([grad])[0] == "strided":
        grad = grad.contiguous()
    low_pre, high_pre = low_pre.contiguous(), high_pre.contiguous()
    grad_low, grad_high = (grad, grad) if variant == "gate_sum" else grad.split(low_dim, dim=-1)
    projections = _projections(named)
    flows = {}
    if gated or _flow_needed("high_res", need):
        flows["high"] = _Flow(grad_high, projections.high, high_pre)
    if _flow_needed("low_res", need):
        flows["low"] = _Flow(grad_low, projections.low, low_pre)
    taps, side = taps_and_job(named["low_res_conv_weight"]) if need["low_res"] else (low_pre, None)
    (grad_sums,) = token_sums([grad])
    low_sums, high_sums = grad_sums[..., :low_dim], grad_sums[..., -low_dim:]
    grads: dict[str, Tensor] = {}

    gate = row_low = row_high = outer_low = outer_high = None
    if gated:
        gate_weights = _gate_weights(named)
        head = gate_head(column_means, gate_weights)
        products, dots = _multiply_without_gate(flows, side)
        through = gate_gradients(head, dots, high_sums, gate_weights)
        gate = through.gate
        row_low, row_high = through.means.split(low_dim, dim=1)
        _, mean_f, mean_s = column_means.split([low_dim, low_dim, high_pre.shape[2]], dim=1)
        outer_low, outer_high = (row_low, mean_f), (row_high, mean_s)
        back = _finish(flows, products, gate, {"high": through.mean_s, "low": through.mean_f})
        if any(need[name] for name in need if name.startswith("gate")):
            grads.update(gate_parameter_gradients(head, through, gate_weights))
    else:
        back = _multiply_by_weights(flows, side)

    def result(name: str) -> Tensor:
        """Memory for a gradient, contiguous."""
        grads[name] = torch.empty(inputs[name].shape, dtype=grad.dtype, device=grad.device)
        return grads[name]

    of_weights = []
    if need["high_res_proj_weight"]:
        out = result("high_res_proj_weight").flatten(1)
        of_weights.append(_weight_product(grad_high, back["high"].activation, out, outer_high))
    if need["low_res_proj_weight"]:
        out = result("low_res_proj_weight").flatten(1)
        of_weights.append(_weight_product(grad_low, back["low"].activation, out, outer_low))
    if need["high_res_conv_weight"]:
        out = result("high_res_conv_weight").flatten(1)
        of_weights.append(_weight_product(back["high"].grad_pre, _as_tokens(high_res), out))
    if of_weights:
        multiply(config_of_weights(WEIGHT, of_weights), "none", of_weights)

    if need["high_res"]:
        weight = named["high_res_conv_weight"].flatten(1)
        grad_pre, out = _matrices(back["high"].grad_pre, result("high_res").flatten(2))
        # The map's layout: channels are the rows, so that tables know this product by N = H·W, count B·C.
        of_maps = [Product(weight.T, grad_pre, out)]
        multiply(config_of_tokens(PRODUCT, of_maps), "none", of_maps)
    if need["low_res"]:
        height, width = high_res.shape[2:]
        grads["low_res"] = convolve_transposed(back["low"].grad_pre, taps, height, width, grad_low, row_low)
    if need["low_res_conv_weight"] or need["low_res_conv_bias"]:
        grads["low_res_conv_weight"], grads["low_res_conv_bias"] = convolution_parameter_gradients(
            back["low"].grad_pre, low_res, named["low_res_conv_weight"], *high_res.shape[2:]
        )
    of_biases = []
    if need["low_res_proj_bias"]:
        of_biases.append(BiasGradient(low_sums, result("low_res_proj_bias"), row=row_low))
    if need["high_res_proj_bias"]:
        of_biases.append(BiasGradient(high_sums, result("high_res_proj_bias"), gate, row_high))
    if need["high_res_conv_bias"]:
        of_biases.append(BiasGradient(back["high"].sums, result("high_res_conv_bias")))
    if of_biases:
        bias_gradients(of_biases)
    return [grads[name].reshape(value.shape) for name, value in inputs.items() if need[name]]


def _flow_needed(flow: str, need: dict[str, bool]) -> bool:
    return any(need[flow + part] for part in ("", "_conv_weight", "_conv_bias", "_proj_weight"))


def _as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _projections(named: dict[str, Tensor]) -> Projections:
    return Projections(
        *(named["low_res_proj_weight"].flatten(1), named["low_res_proj_bias"]),
        *(named["high_res_proj_weight"].flatten(1), named["high_res_proj_bias"]),
    )


def _gate_weights(named: dict[str, Tensor]) -> GateWeights:
    return GateWeights(
        *(named["low_res_proj_weight"].flatten(1), named["low_res_proj_bias"]),
        *(named["high_res_proj_weight"].flatten(1), named["high_res_proj_bias"]),
        *(named["gate_in_weight"], named["gate_in_bias"]),
        *(named["gate_out_weight"], named["gate_out_bias"]),
    )


def _matrices(*batches: Tensor, join: bool = False) -> tuple[Tensor, ...]:
    """Operands of a product from batches of one length: matrices of the one picture, or, to `join`, of all pictures
    where they follow each other in memory; else the batches. Tiles of a matrix may cross pictures.
    """
    if len(batches[0]) == 1:
        return tuple(batch[0] for batch in batches)
    if join and all(batch.stride(0) == batch.shape[1] * batch.stride(1) for batch in batches):
        return tuple(batch.flatten(0, 1) for batch in batches)
    return batches


def _pointwise_gelu(
    high: Tensor, weight: Tensor, bias: Tensor, save: bool, sums: bool, side: Side
) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(high · weightᵀ + bias) of tokens (B, N, C); GELU's input if `save`; sums over tokens if `sums`.

    The sums (B, P, C), float32, are partial, over P, and of the result before it is rounded.
    """
    output = torch.empty(*high.shape[:2], len(weight), dtype=high.dtype, device=high.device)
    pre = torch.empty_like(output) if save else output
    a, out, second = _matrices(high, output, pre, join=not sums)
    products = [Product(a, weight, out, bias=bias, second=second if save else None)]
    config = config_of_tokens(PRODUCT, products)
    partials = multiply(config, "bias_gelu", products, sums=sums, side=side)
    return output, pre if save else output.new_empty(0), partials[0] if sums else output.new_empty(0)


def _multiply_by_weights(flows: dict[str, _Flow], side: Side | None) -> dict[str, _Back]:
    """Without a gate: (grad · weight) ∘ GELU'(pre) of each flow, and GELU(pre)."""
    back, products = {}, []
    for name, flow in flows.items():
        grad_pre, activation = torch.empty_like(flow.pre), torch.empty_like(flow.pre)
        grad, pre, out, second = _matrices(flow.grad, flow.pre, grad_pre, activation, join=True)
        products.append(Product(grad, flow.weight.T, out, pre_activation=pre, second=second))
        back[name] = grad_pre, activation
    if not products:
        return {}
    config = config_of_tokens(PRODUCT, products)
    sums = multiply(config, "gelu_backward", products, sums=True, side=side)
    return {name: _Back(*back[name], part) for name, part in zip(flows, sums, strict=True)}


def _multiply_without_gate(flows: dict[str, _Flow], side: Side | None) -> tuple[dict[str, Tensor], Tensor]:
    """grad · weight of each flow; and <grad · weight, GELU(pre)> of each picture of the high-resolution flow, in
    parts (B, P), float32."""
    results = {name: torch.empty_like(flow.pre) for name, flow in flows.items()}
    products = []
    for name, flow in flows.items():
        grad, pre, out = _matrices(flow.grad, flow.pre, results[name])
        products.append(Product(grad, flow.weight.T, out, pre_activation=pre if name == "high" else None))
    dots = multiply(config_of_tokens(PRODUCT, products), "gelu_dot", products, side=side)
    return results, dots[list(flows).index("high")]


def _finish(
    flows: dict[str, _Flow], products: dict[str, Tensor], gate: Tensor, rows: dict[str, Tensor]
) -> dict[str, _Back]:
    """With a gate, from the products without it: (gate·product + row / N) ∘ GELU'(pre) of each flow, and
    gate·GELU(pre); rows (B, width). The gate of the low-resolution flow is 1. The former overwrite the products."""
    activations = {name: torch.empty_like(flow.pre) for name, flow in flows.items()}
    problems = [
        GeluGradient(
            *(products[name], flow.pre, products[name], activations[name]),
            *(gate if name == "high" else None, rows[name]),
        )
        for name, flow in flows.items()
    ]
    return {
        name: _Back(one.result, activations[name], part)
        for name, one, part in zip(flows, problems, gelu_gradients(problems), strict=True)
    }


def _weight_product(
    grad: Tensor, x: Tensor, out: Tensor, outer: tuple[Tensor, Tensor] | None = None
) -> Product:
    """out = Σ_b grad_bᵀ·x_b, and Σ_b rows_b ⊗ columns_b of `outer`, from tokens (B, N, M) and (B, N, K)."""
    a, b = _matrices(grad, x, join=True)
    return Product(a.transpose(-1, -2), b.transpose(-1, -2), out, outer=outer)
