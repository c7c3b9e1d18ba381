"""The gate of each picture from column means, and its gradients.

mean(l) = mean(low) + W_low·mean(f) + b_low, mean(h) = W_high·mean(s) + b_high, p = W_in·[mean(l) ; mean(h)] + b_in,
g = tanh(w_out·GELU(p) + b_out), all in float32: one launch for both means, one for p. g itself is computed where
it is needed, by `gate_of`. Matrices are read once for up to BLOCK_B pictures.

Bytes: W_low, W_high and W_in once, 7.3 MB in bfloat16 at published sizes, 1.7 µs at 4.3 TB/s for up to 8
pictures; from the L2 cache, which they fit into, for the pictures after them. FLOPs: 7.3 MFLOP a picture.
"""

# ruff: noqa: RUF005 — Triton compiles no starred elements

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import Target, half, launch, multiple, odd, target_of
from mgllava_kernels._triton.matmul import gelu, gelu_derivative, matrix_layout
from mgllava_kernels.configs import Config, Sizes, Space, choose

# Elements of the hidden layer that a program takes at once, parts of a sum, and a tile of a weight's gradient.
BLOCK_H = 512
BLOCK_PARTS = 16
BLOCK_GRAD_H, BLOCK_GRAD_D = 32, 64


@dataclass(frozen=True)
class GateWeights:
    """Weights and biases of the layers that the gate depends on; matrices (out, in) of any strides."""

    low_proj: Tensor
    low_proj_bias: Tensor
    high_proj: Tensor
    high_proj_bias: Tensor
    gate_in: Tensor
    gate_in_bias: Tensor
    gate_out: Tensor
    gate_out_bias: Tensor


@dataclass(frozen=True)
class GateHead:
    """[mean(l) ; mean(h)], (B, 2D), and p, the input of the hidden layer's GELU, (B, M); both float32."""

    means: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class GateGradients:
    """g and the gradient of tanh's input, (B,), of p, (B, M), of [mean(l) ; mean(h)], (B, 2D), of mean(f), (B, D),
    and of mean(s), (B, C), the latter two through the projections alone; all float32."""

    gate: Tensor
    logit: Tensor
    hidden: Tensor
    means: Tensor
    mean_f: Tensor
    mean_s: Tensor


@dataclass(frozen=True)
class _Rows:
    """out[b] = weight · x[b] + bias + add[b]; `x`, `add` and `out` float32 with adjacent columns."""

    weight: Tensor
    x: Tensor
    out: Tensor
    bias: Tensor | None = None
    add: Tensor | None = None


def gate_head(column_means: Tensor, weights: GateWeights) -> GateHead:
    """From the column means (B, 2D + C) of low, f and s."""
    images = len(column_means)
    hidden_size, low_dim = len(weights.gate_in), len(weights.low_proj)
    mean_low, mean_f, mean_s = column_means.split([low_dim, low_dim, weights.high_proj.shape[1]], dim=1)
    means = column_means.new_empty(images, 2 * low_dim)
    hidden = column_means.new_empty(images, hidden_size)
    _multiply_rows(
        [
            _Rows(weights.low_proj, mean_f, means[:, :low_dim], weights.low_proj_bias, mean_low),
            _Rows(weights.high_proj, mean_s, means[:, low_dim:], weights.high_proj_bias),
        ]
    )
    _multiply_rows([_Rows(weights.gate_in, means, hidden, weights.gate_in_bias)])
    return GateHead(means, hidden)


def gate_gradients(head: GateHead, dots: Tensor, high_sums: Tensor, weights: GateWeights) -> GateGradients:
    """From dots (B, Q), whose sum over Q is <G_high·W_high, s>, and high_sums (B, P, D), whose sum over P is that
    of G_high over tokens.
    """
    images, hidden_size = head.hidden.shape
    low_dim, high_dim = weights.high_proj.shape
    result = GateGradients(
        *(head.hidden.new_empty(images) for _ in range(2)),
        *(head.hidden.new_empty(images, size) for size in (hidden_size, 2 * low_dim, low_dim, high_dim)),
    )
    launch(
        _gate_gradient_kernel,
        images,
        dots.device,
        (
            *(dots, high_sums, weights.high_proj_bias.contiguous()),
            *(head.hidden, *_output_layer(weights), result.gate, result.logit, result.hidden),
            *(dots.shape[1], low_dim, high_sums.shape[1], *high_sums.stride()[:2], hidden_size),
        ),
        BLOCK=BLOCK_H,
        BLOCK_PARTS=BLOCK_PARTS,
        num_warps=4,
    )
    _multiply_rows([_Rows(weights.gate_in.T, result.hidden, result.means)])
    _multiply_rows(
        [
            _Rows(weights.low_proj.T, result.means[:, :low_dim], result.mean_f),
            _Rows(weights.high_proj.T, result.means[:, low_dim:], result.mean_s),
        ]
    )
    return result


def gate_parameter_gradients(
    head: GateHead, gradients: GateGradients, weights: GateWeights
) -> dict[str, Tensor]:
    """Gradients of gate_in and gate_out by the names of the op's parameters."""
    (images, hidden_size), inputs = head.hidden.shape, head.means.shape[1]
    grad_in = torch.empty_like(weights.gate_in, memory_format=torch.contiguous_format)
    grad_in_bias, grad_out = (grad_in.new_empty(hidden_size) for _ in range(2))
    grad_out_bias = grad_in.new_empty(1)
    across = max(1, triton.cdiv(inputs, BLOCK_GRAD_D))
    launch(
        _gate_weights_kernel,
        max(1, triton.cdiv(hidden_size, BLOCK_GRAD_H)) * across,
        grad_in.device,
        (
            *(head.means, head.hidden, gradients.hidden, gradients.logit),
            *(grad_in, grad_in_bias, grad_out, grad_out_bias, images, hidden_size, inputs, across),
        ),
        BLOCK_H=BLOCK_GRAD_H,
        BLOCK_D=BLOCK_GRAD_D,
        num_warps=4,
    )
    return {
        "gate_in_weight": grad_in,
        "gate_in_bias": grad_in_bias,
        "gate_out_weight": grad_out,
        "gate_out_bias": grad_out_bias,
    }


def gate_arguments(head: GateHead, weights: GateWeights) -> tuple[Tensor | int, ...]:
    """The arguments of `gate_of` before `image`, and the size after it."""
    return head.hidden, *_output_layer(weights), head.hidden.shape[1]


def _output_layer(weights: GateWeights) -> tuple[Tensor, Tensor]:
    return weights.gate_out.flatten().contiguous(), weights.gate_out_bias


def _multiply_rows(products: Sequence[_Rows]) -> None:
    """One launch; either all of them have a bias or none, and only the first may have `add`."""
    first = products[0]
    images, device = len(first.x), first.x.device
    working = [one for one in products if one.out.numel()]
    if not working:
        return
    weights = [one.weight for one in products]
    layout, align = matrix_layout(weights)
    sizes = {"M": len(first.weight), "K": first.weight.shape[1]}
    space = COLUMNS if layout == "column" else ROWS
    config = choose(space, target_of(device), first.weight.dtype, sizes, images)
    blocks = dict(config.blocks)
    launch(
        _rows_kernel,
        triton.cdiv(images, blocks["BLOCK_B"])
        * sum(triton.cdiv(len(weight), blocks["BLOCK_O"]) for weight in weights),
        device,
        (
            *(tuple(weights), tuple(one.x for one in products)),
            tuple(one.weight if one.bias is None else one.bias.contiguous() for one in products),
            first.x if first.add is None else first.add,
            tuple(one.out for one in products),
            tuple(
                odd(*one.weight.shape, *one.weight.stride(), one.x.stride(0), one.out.stride(0))
                for one in products
            ),
            *(images, 0 if first.add is None else first.add.stride(0)),
        ),
        LAYOUT=layout,
        ALIGN=align,
        BIAS=first.bias is not None,
        ADD=first.add is not None,
        **config.options,
    )


@triton.jit
def _tanh(x):
    """tanh in float32, of small numbers too."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def gate_of(hidden_ptr, weight_ptr, bias_ptr, image, size, BLOCK: tl.constexpr):
    """g of a picture from p, (B, size): 4·size bytes from the cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        hidden = tl.load(hidden_ptr + image * size + at, mask=at < size, other=0.0)
        weight = tl.load(weight_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        total += gelu(hidden) * weight
    return _tanh(tl.sum(total, axis=0) + tl.load(bias_ptr).to(tl.float32))


@triton.jit(do_not_specialize=["images", "stride_add"])
def _rows_kernel(
    weights,
    xs,
    biases,
    add_ptr,
    outs,
    numbers,
    images,
    stride_add,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_O rows of one matrix times the vectors of BLOCK_B pictures.

    `numbers` holds for each matrix its rows and columns, its strides and those of x and out. Bytes: each matrix
    once for BLOCK_B pictures.
    """
    tile = tl.program_id(0)
    begin = 0
    image_tiles = tl.cdiv(images, BLOCK_B)
    for i in tl.static_range(len(outs)):
        tiles = tl.cdiv(half(numbers[i][0]), BLOCK_O) * image_tiles
        if (tile >= begin) & (tile < begin + tiles):
            rows = half(numbers[i][0])
            depth = half(numbers[i][1])
            stride_o = half(numbers[i][2])
            stride_k = half(numbers[i][3])
            if LAYOUT == "row":
                stride_k = 1
                stride_o = multiple(stride_o, ALIGN)
                depth = multiple(depth, ALIGN)
            elif LAYOUT == "column":
                stride_o = 1
                stride_k = multiple(stride_k, ALIGN)
                rows = multiple(rows, ALIGN)
            image = (tile - begin) % image_tiles * BLOCK_B
            o = (tile - begin) // image_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
            k = tl.arange(0, BLOCK_K)
            sums = (tl.zeros((BLOCK_O, BLOCK_K), tl.float32),) * BLOCK_B
            weight_ptr = weights[i] + o[:, None] * stride_o + k[None, :] * stride_k
            x_ptr = xs[i] + image * half(numbers[i][4]) + k
            for first in range(0, depth, BLOCK_K):
                inside = (o[:, None] < rows) & (first + k[None, :] < depth)
                weight = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
                added: tl.tuple = ()
                for b in tl.static_range(BLOCK_B):
                    present = first + k < tl.where(image + b < images, depth, 0)
                    x = tl.load(x_ptr + b * half(numbers[i][4]), mask=present, other=0.0)
                    added = added + (sums[b] + weight * x[None, :],)
                sums = added
                weight_ptr += BLOCK_K * stride_k
                x_ptr += BLOCK_K
            for b in tl.static_range(BLOCK_B):
                total = tl.sum(sums[b], axis=1)
                if BIAS:
                    total += tl.load(biases[i] + o, mask=o < rows, other=0.0).to(tl.float32)
                present = o < tl.where(image + b < images, rows, 0)
                if ADD and i == 0:
                    total += tl.load(add_ptr + (image + b) * stride_add + o, mask=present, other=0.0)
                tl.store(outs[i] + (image + b) * half(numbers[i][5]) + o, total, mask=present)
        begin += tiles


@triton.jit(do_not_specialize=["dots", "low_dim", "parts", "stride_b", "stride_p", "size"])
def _gate_gradient_kernel(
    dots_ptr,
    sums_ptr,
    high_bias_ptr,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    logit_ptr,
    grad_hidden_ptr,
    dots,
    low_dim,
    parts,
    stride_b,
    stride_p,
    size,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """g, the gradient of tanh's input and of p for one picture.

    dg = Σ_q dots[q] + <Σ_p sums[p], b_high>. Bytes: 4·P·D a picture, 37 KB at published sizes, from the cache.
    """
    image = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, dots, BLOCK):
        total += tl.load(dots_ptr + image * dots + first + i, mask=first + i < dots, other=0.0)
    p = tl.arange(0, BLOCK_PARTS)[:, None]
    for first in range(0, low_dim, BLOCK):
        inside = first + i < low_dim
        bias = tl.load(high_bias_ptr + first + i, mask=inside, other=0.0).to(tl.float32)
        for part in range(0, parts, BLOCK_PARTS):
            sums = sums_ptr + image * stride_b + (part + p) * stride_p + first + i[None, :]
            values = tl.load(sums, mask=(part + p < parts) & inside[None, :], other=0.0)
            total += bias * tl.sum(values, axis=0)
    gate = gate_of(hidden_ptr, weight_ptr, bias_ptr, image, size, BLOCK)
    logit = tl.sum(total, axis=0) * (1.0 - gate * gate)
    tl.store(gate_ptr + image, gate)
    tl.store(logit_ptr + image, logit)
    for first in range(0, size, BLOCK):
        inside = first + i < size
        hidden = tl.load(hidden_ptr + image * size + first + i, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + first + i, mask=inside, other=0.0).to(tl.float32)
        grad = logit * weight * gelu_derivative(hidden)
        tl.store(grad_hidden_ptr + image * size + first + i, grad, mask=inside)


@triton.jit(do_not_specialize=["images", "size", "inputs", "across"])
def _gate_weights_kernel(
    means_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    logit_ptr,
    grad_in_ptr,
    grad_in_bias_ptr,
    grad_out_ptr,
    grad_out_bias_ptr,
    images,
    size,
    inputs,
    across,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of Σ_b dp[b] ⊗ means[b]; the first of a row of tiles has the row's share of the small gradients.

    Bytes: the gradient of W_in once, 2.1 MB in bfloat16 at published sizes.
    """
    column = tl.program_id(0) % across
    h = tl.program_id(0) // across * BLOCK_H + tl.arange(0, BLOCK_H)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_in = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    grad_in_bias = tl.zeros((BLOCK_H,), tl.float32)
    grad_out = tl.zeros((BLOCK_H,), tl.float32)
    grad_out_bias = 0.0
    for image in tl.range(0, images, loop_unroll_factor=2):
        grad_hidden = tl.load(grad_hidden_ptr + image * size + h, mask=h < size, other=0.0)
        means = tl.load(means_ptr + image * inputs + d, mask=d < inputs, other=0.0)
        hidden = tl.load(hidden_ptr + image * size + h, mask=h < size, other=0.0)
        logit = tl.load(logit_ptr + image)
        grad_in += grad_hidden[:, None] * means[None, :]
        grad_in_bias += grad_hidden
        grad_out += logit * gelu(hidden)
        grad_out_bias += logit
    dtype = grad_in_ptr.dtype.element_ty
    inside = (h[:, None] < size) & (d[None, :] < inputs)
    tl.store(grad_in_ptr + h[:, None] * inputs + d[None, :], grad_in.to(dtype), mask=inside)
    first = h < tl.where(column == 0, size, 0)
    tl.store(grad_in_bias_ptr + h, grad_in_bias.to(dtype), mask=first)
    tl.store(grad_out_ptr + h, grad_out.to(dtype), mask=first)
    if tl.program_id(0) == 0:
        tl.store(grad_out_bias_ptr, tl.cast(grad_out_bias, tl.float32).to(dtype))


def _rows_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _config(4, 32, 64, 4)
    return _config(*(4, 4, 512) if count <= 4 else (8, 4, 256), 128 // target.warp_size)


def _columns_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _config(4, 32, 64, 4)
    return _config(*(4, 16, 128) if count <= 4 else (8, 16, 64), 128 // target.warp_size)


def _config(images: int, block_o: int, block_k: int, warps: int) -> Config:
    """Pictures, rows of the matrix, and columns that a program takes at once; warps."""
    return Config((("BLOCK_B", images), ("BLOCK_O", block_o), ("BLOCK_K", block_k)), warps, 1)


def _rows_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    choices = (min(8, triton.next_power_of_2(count)),), (2, 4), (256, 512), (2, 4)
    return (_config(*choice) for choice in product(*choices))


def _columns_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    choices = (min(8, triton.next_power_of_2(count)),), (16, 32), (64, 128), (2, 4)
    return (_config(*choice) for choice in product(*choices))


def _shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Sums over columns of the matrix meet there."""
    return 4 * config.num_warps * dict(config.blocks)["BLOCK_O"]


ROWS = Space("gate_head_rows", _rows_heuristic, _rows_candidates, _shared_memory)
COLUMNS = Space("gate_head_columns", _columns_heuristic, _columns_candidates, _shared_memory)
