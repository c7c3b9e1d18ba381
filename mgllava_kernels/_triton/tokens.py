"""Batches of token matrices (B, N, width): what a kernel may assume of their memory, their column sums, and GELU
and its derivative of them.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import half, launch, multiple, odd
from mgllava_kernels._triton.matmul import gelu, gelu_derivative

# Partial sums and columns that a program adds at once, and tokens that one partial sum is over.
BLOCK_PARTS = 16
BLOCK_COLUMNS = 64
TOKENS = 64
# Elements of a program of the GELU.
BLOCK_GELU = 1024


def token_layout(batches: Sequence[Tensor]) -> tuple[str, int]:
    """`matrix_layout` of every picture's matrix in batches (B, rows, columns) that one launch reads alike."""
    for name, axis in (("row", 2), ("column", 1)):
        if all(batch.stride(axis) == 1 or batch.shape[axis] == 1 for batch in batches):
            common = 16 // batches[0].element_size()
            for batch in batches:
                common = math.gcd(common, batch.data_ptr() // batch.element_size(), batch.shape[axis])
                others = (batch.stride(other) for other in (0, 3 - axis) if batch.shape[other] > 1)
                common = math.gcd(common, *others)
            return name, common
    return "strided", 1


def column_sums(partials: Sequence[Tensor], scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale · Σ_p partials[:, p] of contiguous partial sums (G, P, width) in float32, side by side."""
    groups, device = len(partials[0]), partials[0].device
    sums = torch.empty(groups, sum(one.shape[2] for one in partials), dtype=dtype, device=device)
    launch(
        _column_sums_kernel,
        groups * sum(triton.cdiv(one.shape[2], BLOCK_COLUMNS) for one in partials),
        device,
        (tuple(partials), sums, tuple(odd(*one.shape[1:]) for one in partials), groups, scale),
        BLOCK_PARTS=BLOCK_PARTS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
    )
    return sums


def token_sums(tokens: Tensor) -> Tensor:
    """Sums over tokens (B, width) of (B, N, width) with any strides, in float32."""
    images, count, columns = tokens.shape
    parts = triton.cdiv(count, TOKENS)
    partials = torch.empty(images, parts, columns, dtype=torch.float32, device=tokens.device)
    layout, align = token_layout([tokens])
    launch(
        _token_sums_kernel,
        images * parts * triton.cdiv(columns, BLOCK_COLUMNS),
        tokens.device,
        (tokens, partials, count, columns, parts, *tokens.stride()),
        ADJACENT=layout == "row",
        ALIGN=align if layout == "row" else 1,
        BLOCK_TOKENS=TOKENS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
    )
    return column_sums([partials])


def gelu_of(pre_activation: Tensor, grad: Tensor | None = None) -> Tensor:
    """GELU of a contiguous tensor, or `grad`, contiguous too, times its derivative there."""
    output = torch.empty_like(pre_activation)
    size = output.numel()
    launch(
        _gelu_kernel,
        triton.cdiv(size, BLOCK_GELU),
        output.device,
        (pre_activation if grad is None else grad, pre_activation, output, size),
        # A size that is no multiple of a load's elements has a rest that only narrow loads reach.
        ALIGN=math.gcd(16 // output.element_size(), size),
        DERIVATIVE=grad is not None,
        BLOCK=BLOCK_GELU,
        num_warps=4,
    )
    return output


@triton.jit(do_not_specialize=["groups", "scale"])
def _column_sums_kernel(
    partials, sums_ptr, numbers, groups, scale, BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """BLOCK_COLUMNS columns of one group. `numbers` holds P and the width of each of `partials`.

    Bytes: 4·P·width a group, most of them still in the cache.
    """
    block = tl.program_id(0) // groups
    group = (tl.program_id(0) % groups).to(tl.int64)
    width = 0
    for i in tl.static_range(len(partials)):
        width += half(numbers[i][1])
    begin = 0
    offset = 0
    for i in tl.static_range(len(partials)):
        parts = half(numbers[i][0])
        columns = half(numbers[i][1])
        blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        if (block >= begin) & (block < begin + blocks):
            column = (block - begin) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            part = tl.arange(0, BLOCK_PARTS)
            partial = partials[i] + (group * parts + part[:, None]) * columns + column[None, :]
            total = tl.zeros((BLOCK_PARTS, BLOCK_COLUMNS), tl.float32)
            for first in range(0, parts, BLOCK_PARTS):
                inside = (first + part[:, None] < parts) & (column[None, :] < columns)
                total += tl.load(partial, mask=inside, other=0.0)
                partial += BLOCK_PARTS * columns
            sums = (tl.sum(total, axis=0) * scale).to(sums_ptr.dtype.element_ty)
            tl.store(sums_ptr + group * width + offset + column, sums, mask=column < columns)
        begin += blocks
        offset += columns


@triton.jit(do_not_specialize=["count", "columns", "parts", "stride_b", "stride_n", "stride_d"])
def _token_sums_kernel(
    tokens_ptr,
    partials_ptr,
    count,
    columns,
    parts,
    stride_b,
    stride_n,
    stride_d,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums of BLOCK_TOKENS tokens. Bytes: the tokens once, 1.2 MB a picture in bfloat16 at published sizes."""
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    part = tl.program_id(0) // blocks
    image = (part // parts).to(tl.int64)
    token = part % parts * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    columns = multiple(columns, ALIGN)
    if ADJACENT:
        stride_d = 1
    address = tokens_ptr + image * multiple(stride_b.to(tl.int64), ALIGN)
    address += token[:, None].to(tl.int64) * multiple(stride_n, ALIGN) + column[None, :] * stride_d
    inside = (token[:, None] < count) & (column[None, :] < columns)
    sums = tl.sum(tl.load(address, mask=inside, other=0.0).to(tl.float32), axis=0)
    tl.store(partials_ptr + part.to(tl.int64) * columns + column, sums, mask=column < columns)


@triton.jit(do_not_specialize=["size"])
def _gelu_kernel(
    grad_ptr, pre_ptr, out_ptr, size, ALIGN: tl.constexpr, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """GELU(pre), or grad · GELU'(pre), elementwise. Bytes: two arrays, or three."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < multiple(size, ALIGN)
    pre = tl.load(pre_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if DERIVATIVE:
        values = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(pre)
    else:
        values = gelu(pre)
    tl.store(out_ptr + i, values.to(out_ptr.dtype.element_ty), mask=inside)
