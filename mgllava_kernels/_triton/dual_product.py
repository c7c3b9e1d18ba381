"""The output of the fusion: low + f·W_lowᵀ + b_low and g·(s·W_highᵀ + b_high), added or side by side."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.gate_head import BLOCK_H, gate_of
from mgllava_kernels._triton.launch import Target, multiple, target_of
from mgllava_kernels._triton.matmul import (
    add_bias,
    add_product,
    descriptors_fit,
    grouped_tile,
    halves,
    launch_product,
    matrix_layout,
)
from mgllava_kernels._triton.product_configs import (
    candidates,
    heuristic,
    kernel_options,
    programs_of,
    shared_memory,
    wants_descriptors,
)
from mgllava_kernels.configs import Config, Sizes, Space, choose


@dataclass(frozen=True)
class Projections:
    """Weights (D, D) and (D, C) of any strides, and biases."""

    low: Tensor
    low_bias: Tensor
    high: Tensor
    high_bias: Tensor


def dual_product(
    low: Tensor,
    f: Tensor,
    s: Tensor,
    weights: Projections,
    gate: tuple[Tensor | int, ...] | None,
    side_by_side: bool,
) -> Tensor:
    """From low (B, N, D) of any strides, f (B, N, D) and s (B, N, C): (B, N, D), or (B, N, 2D) `side_by_side`.

    `gate` is of `gate_arguments`; without it g is 1.
    """
    (images, tokens, low_dim), high_dim = low.shape, s.shape[2]
    out = torch.empty(images, tokens, (1 + side_by_side) * low_dim, dtype=low.dtype, device=low.device)
    target = target_of(low.device)
    sizes = {"D": low_dim, "C": high_dim, "OUT": out.shape[2]}
    config = choose(DUAL, target, low.dtype, sizes, max(1, images * tokens))
    blocks = dict(config.blocks)
    row_tiles = triton.cdiv(tokens, blocks["BLOCK_M"])
    tiles = images * row_tiles * (1 + side_by_side) * triton.cdiv(low_dim, blocks["BLOCK_N"])
    (token_kind, token_align), (weight_kind, weight_align) = (
        matrix_layout([f, s]),
        matrix_layout([weights.low, weights.high]),
    )
    low_kind, low_align = matrix_layout([low, out])
    operands = [f, s], [weights.low, weights.high]
    launch_product(
        _dual_product_kernel,
        programs_of(config, target, tiles),
        low.device,
        (
            *(s, weights.high, weights.high_bias.contiguous()),
            *(f, weights.low, weights.low_bias.contiguous(), low, out),
            *((f, f, f, 0) if gate is None else gate),
            *(tokens, low_dim, high_dim, images, row_tiles),
            *(*weights.high.stride(), *weights.low.stride(), *low.stride()),
        ),
        TOKEN_LAYOUT=token_kind,
        TOKEN_ALIGN=token_align,
        WEIGHT_LAYOUT=weight_kind,
        WEIGHT_ALIGN=weight_align,
        ADJACENT=low_kind == "row",
        OUT_ALIGN=low_align if low_kind == "row" else 1,
        SIDE_BY_SIDE=side_by_side,
        GATE=gate is not None,
        BLOCK_H=BLOCK_H,
        USE_DESCRIPTORS=wants_descriptors(config) and descriptors_fit(target, *operands),
        **kernel_options(config, target, low.dtype),
    )
    return out


@triton.jit
def _finish_dual_tile(
    accumulator,
    bias_ptr,
    low_ptr,
    out_ptr,
    row,
    column,
    rows,
    columns,
    low_columns,
    stride_n,
    stride_d,
    stride_out,
    PIECE: tl.constexpr,
):
    """Bias and residual, of the first `low_columns` columns alone, PIECE columns at a time."""
    BLOCK_N: tl.constexpr = accumulator.shape[1]
    if BLOCK_N > PIECE:
        left, right = halves(accumulator)
        _finish_dual_tile(
            *(left, bias_ptr, low_ptr, out_ptr, row, column, rows, columns, low_columns),
            *(stride_n, stride_d, stride_out, PIECE),
        )
        _finish_dual_tile(
            *(right, bias_ptr, low_ptr, out_ptr, row, column + BLOCK_N // 2, rows, columns, low_columns),
            *(stride_n, stride_d, stride_out, PIECE),
        )
    else:
        m = (row + tl.arange(0, accumulator.shape[0])).to(tl.int64)[:, None]
        n = column + tl.arange(0, BLOCK_N)[None, :]
        accumulator = add_bias(accumulator, bias_ptr, column, low_columns)
        inside = (m < rows) & (n < low_columns)
        low = tl.load(low_ptr + m * stride_n + n * stride_d, mask=inside, other=0.0)
        accumulator += low.to(tl.float32)
        inside = (m < rows) & (n < columns)
        tl.store(out_ptr + m * stride_out + n, accumulator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("gate_size", "tokens", "low_dim", "high_dim", "images", "row_tiles"),
        *("stride_hn", "stride_hk", "stride_ln", "stride_lk", "stride_b", "stride_n", "stride_d"),
    ]
)
def _dual_product_kernel(
    s_ptr,
    high_weight_ptr,
    high_bias_ptr,
    f_ptr,
    low_weight_ptr,
    low_bias_ptr,
    low_ptr,
    out_ptr,
    hidden_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    gate_size,
    tokens,
    low_dim,
    high_dim,
    images,
    row_tiles,
    stride_hn,
    stride_hk,
    stride_ln,
    stride_lk,
    stride_b,
    stride_n,
    stride_d,
    TOKEN_LAYOUT: tl.constexpr,
    TOKEN_ALIGN: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    ADJACENT: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles of the output, each of one picture: g·(s·W_highᵀ + b_high), then + f·W_lowᵀ + b_low + low on top of it.

    SIDE_BY_SIDE a tile has one of the two summands, and the loop over the other has no steps.

    Bytes: s, f, low and the output once, 5.3 MB a picture in bfloat16 at published sizes, and 5.2 MB of weights;
    FLOPs: 2·N·D·(C + D), 3.0 GFLOP a picture. On 4.3 TB/s and 600 TFLOP/s a floor of 5.0, 40 and 161 µs for 1, 8
    and 32 pictures, set by the FLOPs.
    """
    column_tiles = tl.cdiv(low_dim, BLOCK_N)
    all_row_tiles = images * row_tiles
    all_column_tiles = column_tiles * (1 + SIDE_BY_SIDE)
    low_dim = multiple(low_dim, OUT_ALIGN)
    stride_out = low_dim.to(tl.int64) * (1 + SIDE_BY_SIDE)
    stride_n = multiple(stride_n.to(tl.int64), OUT_ALIGN)
    if ADJACENT:
        stride_d = 1
    else:
        stride_d = stride_d.to(tl.int64)
    first = tl.program_id(0)
    # A loop of one step is none to the compiler, which needs fewer registers then.
    end = all_row_tiles * all_column_tiles if PERSISTENT else first + 1
    for one in range(first, end, tl.num_programs(0) if PERSISTENT else 1):
        row_tile, column_tile = grouped_tile(one, all_row_tiles, all_column_tiles, GROUP)
        image = row_tile // row_tiles
        row = row_tile % row_tiles * BLOCK_M
        column = column_tile % column_tiles * BLOCK_N
        low_columns = low_dim
        high_columns = low_dim
        high_depth = high_dim
        low_depth = low_dim
        start = 0
        if SIDE_BY_SIDE:
            is_high = column_tile >= column_tiles
            high_depth = tl.where(is_high, high_dim, 0)
            low_depth = tl.where(is_high, 0, low_dim)
            high_columns = tl.where(is_high, low_dim, 0)
            low_columns = multiple(tl.where(is_high, 0, low_dim), OUT_ALIGN)
            start = multiple(tl.where(is_high, low_dim, 0), OUT_ALIGN)
        accumulator = add_product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            *(s_ptr, high_weight_ptr, row, column, tokens, low_dim, high_dim, 0, high_depth),
            *(high_dim.to(tl.int64), 1, stride_hn.to(tl.int64), stride_hk.to(tl.int64)),
            *(TOKEN_LAYOUT, WEIGHT_LAYOUT, TOKEN_ALIGN, WEIGHT_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
            *(image, images, tokens * high_dim.to(tl.int64), 0, True, False),
        )
        accumulator = add_bias(accumulator, high_bias_ptr, column, high_columns)
        if GATE:
            accumulator *= gate_of(hidden_ptr, gate_weight_ptr, gate_bias_ptr, image, gate_size, BLOCK_H)
        accumulator = add_product(
            accumulator,
            *(f_ptr, low_weight_ptr, row, column, tokens, low_dim, low_dim, 0, low_depth),
            *(low_dim.to(tl.int64), 1, stride_ln.to(tl.int64), stride_lk.to(tl.int64)),
            *(TOKEN_LAYOUT, WEIGHT_LAYOUT, TOKEN_ALIGN, WEIGHT_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
            *(image, images, tokens * low_dim.to(tl.int64), 0, True, False),
        )
        _finish_dual_tile(
            *(accumulator, low_bias_ptr),
            low_ptr + image.to(tl.int64) * multiple(stride_b.to(tl.int64), OUT_ALIGN),
            out_ptr + image.to(tl.int64) * tokens * stride_out + start,
            *(row, column, tokens, low_dim, low_columns, stride_n, stride_d, stride_out, PIECE),
        )


def _heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return heuristic(target, dtype, sizes, count, sizes["OUT"])


DUAL = Space("conv_gate_dual_product", _heuristic, candidates, shared_memory)
