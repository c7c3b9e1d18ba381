"""Projector layers of several token sets, forward and backward: every layer is one launch for all sets (on AMD
one for each).

The forward pass is two launches, H = GELU(X·W1ᵀ + b1) and H·W2ᵀ + b2. The backward pass, with G the incoming
gradient and P the input of the GELU, is

    column sums of G                              for b2
    D = (G·W2) ∘ GELU'(P), sums of D, GELU(P)     for b1; H is written again here, not kept since the forward pass
    Gᵀ·H and Dᵀ·X, of both layers in one launch   for W2 and W1
    D·W1                                          for X

and a launch that adds up what programs summed in parts. Every sum has one fixed order.

Bytes and FLOPs in bfloat16, of a projector K → 4096 → 4096 on T tokens: forward 2·T·4096·(K + 4096) FLOPs on
weights of 8192·(K + 4096) bytes and tokens of 2·T·(K + 3·4096), and 2·4096·T more where P is kept; backward
with all gradients twice the FLOPs. On 600 TFLOP/s and 4.3 TB/s that is, forward,

    tokens    1024→4096→4096                       2880→4096→4096
       576     24 GFLOP,  57 MB:   40 µs (FLOPs)    33 GFLOP,  75 MB:   55 µs (FLOPs)
     4,608    193 GFLOP, 165 MB:  322 µs (FLOPs)   263 GFLOP, 197 MB:  439 µs (FLOPs)
    18,432    773 GFLOP, 533 MB: 1288 µs (FLOPs)  1053 GFLOP, 616 MB: 1756 µs (FLOPs)

and the 100 objects of a picture, 2880→4096→4096, are 5.7 GFLOP on 60 MB: 14 µs, set by the bytes.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mgllava_kernels._triton.launch import Target
from mgllava_kernels._triton.product_configs import token_space, weight_space
from mgllava_kernels._triton.products import (
    Product,
    add_parts,
    config_of_tokens,
    config_of_weights,
    multiply,
)
from mgllava_kernels._triton.tokens import GeluGradient, gelu_gradients, token_sums
from mgllava_kernels.configs import Config, Sizes, Space

# Values of a config's ROUTE: this package's kernel, or torch's own matrix products where a table says they win.
TRITON, TORCH = 1, 2


def routed(config: Config, route: int) -> Config:
    return Config((*config.blocks, ("ROUTE", route)), config.num_warps, config.num_stages)


def _routed_space(space: Space) -> Space:
    """`space` with ROUTE among what is chosen."""

    def heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
        return routed(space.heuristic(target, dtype, sizes, count), TRITON)

    def candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterator[Config]:
        for config in space.candidates(target, dtype, sizes, count):
            yield routed(config, TRITON)
        yield routed(space.heuristic(target, dtype, sizes, count), TORCH)

    return Space(space.kernel, heuristic, candidates, space.shared_memory)


LINEAR = _routed_space(token_space("linear"))
INPUT_GRADIENT = _routed_space(token_space("linear_input_gradient"))
WEIGHT_GRADIENT = _routed_space(weight_space("linear_weight_gradient"))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """GELU(x · weightᵀ + bias), and with `save` what the GELU was applied to, else an empty tensor."""
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    pre_activation = torch.empty_like(output) if save else x.new_empty(0)
    second = _rows(pre_activation) if save else None
    _multiply(LINEAR, "bias_gelu", [Product(_rows(x), weight, _rows(output), bias=bias, second=second)])
    return output, pre_activation


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre_activation: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    need_x, need_weight, need_bias = needed
    flat = _rows(x)
    grad_pre = x.new_empty(len(flat), weight.shape[0])
    problem = GeluGradient(
        *(
            value.unsqueeze(0)
            for value in (_rows(grad).contiguous(), _rows(pre_activation).contiguous(), grad_pre)
        )
    )
    (sums,) = gelu_gradients([problem])
    results = []
    if need_x:
        results.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        _multiply(INPUT_GRADIENT, "none", [Product(grad_pre, weight.T, _rows(results[-1]))])
    if need_weight:
        results.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
        _multiply(WEIGHT_GRADIENT, "none", [Product(grad_pre.T, flat.T, results[-1])])
    if need_bias:
        results.append(x.new_empty(weight.shape[0]))
        add_parts([(sums[0], results[-1])])
    return results


def grouped_mlp_projector(
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    b1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    b2s: Sequence[Tensor],
    save: bool,
) -> list[Tensor]:
    """The outputs of all groups, then (with `save`) the inputs of their GELUs."""
    hidden = [x.new_empty(*x.shape[:-1], w1.shape[0]) for x, w1 in zip(xs, w1s, strict=True)]
    pre_activations = [torch.empty_like(value) for value in hidden] if save else []
    outputs = [x.new_empty(*x.shape[:-1], w2.shape[0]) for x, w2 in zip(xs, w2s, strict=True)]
    kept: Sequence[Tensor | None] = [_rows(value) for value in pre_activations] or [None] * len(xs)
    first = [
        Product(_rows(x), w1, _rows(value), bias=b1, second=pre_activation)
        for x, w1, b1, value, pre_activation in zip(xs, w1s, b1s, hidden, kept, strict=True)
    ]
    second = [
        Product(_rows(value), w2, _rows(output), bias=b2)
        for value, w2, b2, output in zip(hidden, w2s, b2s, outputs, strict=True)
    ]
    _multiply(LINEAR, "bias_gelu", first)
    _multiply(LINEAR, "bias", second)
    return outputs + pre_activations


def grouped_mlp_projector_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed ones of each group's gradients to (x, w1, b1, w2, b2), group after group."""
    sets = range(len(xs))
    needs = [list(needed[5 * i : 5 * i + 5]) for i in sets]
    flat_grads = [_rows(grad).contiguous() for grad in grads]
    flat_xs = [_rows(x) for x in xs]
    flat_pre = [_rows(value).contiguous() for value in pre_activations]
    results = [
        [
            w1.new_empty(shape) if need else w1.new_empty(0)
            for shape, need in zip(shapes, need_all, strict=True)
        ]
        for x, w1, w2, need_all in zip(xs, w1s, w2s, needs, strict=True)
        for shapes in [(x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])]
    ]
    sums = []
    with_b2 = [i for i in sets if needs[i][4]]
    parts = _column_sums([flat_grads[i] for i in with_b2])
    sums += [(part, results[i][4]) for i, part in zip(with_b2, parts, strict=True)]

    through = [i for i in sets if any(needs[i][:3])]
    keep_hidden = any(needs[i][3] for i in through)
    grad_pre = {i: torch.empty_like(flat_pre[i]) for i in through}
    hidden = {i: torch.empty_like(flat_pre[i]) for i in through if keep_hidden}
    hidden |= {i: F.gelu(flat_pre[i]) for i in sets if needs[i][3] and i not in through}
    parts = _multiply(
        INPUT_GRADIENT,
        "gelu_backward",
        [
            Product(*(flat_grads[i], w2s[i].T, grad_pre[i]), pre_activation=flat_pre[i], second=hidden.get(i))
            for i in through
        ],
    )
    sums += [(part, results[i][2]) for i, part in zip(through, parts, strict=True) if needs[i][2]]

    of_w2 = [Product(flat_grads[i].T, hidden[i].T, results[i][3]) for i in sets if needs[i][3]]
    of_w1 = [Product(grad_pre[i].T, flat_xs[i].T, results[i][1]) for i in sets if needs[i][1]]
    _multiply(WEIGHT_GRADIENT, "none", of_w2 + of_w1)
    of_x = [Product(grad_pre[i], w1s[i].T, _rows(results[i][0])) for i in sets if needs[i][0]]
    _multiply(INPUT_GRADIENT, "none", of_x)
    add_parts(sums)
    return [value for i in sets for value, need in zip(results[i], needs[i], strict=True) if need]


def _rows(x: Tensor) -> Tensor:
    """All tokens as the rows of one matrix, a view wherever strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _multiply(space: Space, epilogue: str, products: Sequence[Product]) -> list[Tensor]:
    """`multiply`, or torch's matrix products where the config says so; column sums with "gelu_backward".

    One entry of a table decides for all token sets of a layer: that of the largest product's weight, at the number
    of tokens of all.
    """
    if not products:
        return []
    config = (config_of_weights if space is WEIGHT_GRADIENT else config_of_tokens)(space, products)
    if dict(config.blocks)["ROUTE"] == TORCH:
        return [part for one in products for part in _multiply_in_torch(one, epilogue)]
    return [part[0] for part in multiply(config, epilogue, products, sums=epilogue == "gelu_backward")]


def _multiply_in_torch(one: Product, epilogue: str) -> list[Tensor]:
    """What `_multiply` returns for one product, by torch's matrix products.

    cuBLAS adds the bias in its epilogue. GELU is a pass of its own: `torch._addmm_activation` fuses the tanh
    approximation, another function.
    """
    if one.bias is not None:
        sums = torch.addmm(one.bias, one.a, one.b.T, out=one.out if one.second is None else one.second)
        if epilogue == "bias_gelu":
            torch.ops.aten.gelu.out(sums, out=one.out)
    elif epilogue == "none":
        torch.mm(one.a, one.b.T, out=one.out)
    else:
        grad = torch.mm(one.a, one.b.T)
        torch.ops.aten.gelu_backward.grad_input(grad, one.pre_activation, grad_input=one.out)
        if one.second is not None:
            torch.ops.aten.gelu.out(one.pre_activation, out=one.second)
        return _column_sums([one.out])
    return []


def _column_sums(matrices: Sequence[Tensor]) -> list[Tensor]:
    """In parts, (parts, N) float32 each."""
    return [parts[0] for parts in token_sums([matrix.unsqueeze(0) for matrix in matrices])]
