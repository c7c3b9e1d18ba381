"""Batches of tokens (B, N, width): their sums over tokens, GELU's derivative of them, and gradients of biases.

Sums over tokens are made in parts, one of TOKENS tokens of a picture to a program; who reads them adds them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import half, launch, multiple, odd
from mgllava_kernels._triton.matmul import gelu, gelu_derivative, matrix_layout, tile_offsets

# Tokens and columns of a program.
TOKENS, BLOCK_COLUMNS = 64, 64
# Partial sums that a program adds at once.
BLOCK_PARTS = 16


@dataclass(frozen=True)
class GeluGradient:
    """result = (gate·grad + row / N) ∘ GELU'(pre), and second = gate·GELU(pre).

    `grad`, `pre`, `result` and `second` are contiguous (B, N, width); gate (B,) and row (B, width) with adjacent
    columns are float32, of all pictures.
    """

    grad: Tensor
    pre: Tensor
    result: Tensor
    second: Tensor | None = None
    gate: Tensor | None = None
    row: Tensor | None = None


@dataclass(frozen=True)
class BiasGradient:
    """result = Σ_b gate[b]·Σ_p sums[b, p] + row[b]; sums (B, P, width), gate (B,), row (B, width) in float32."""

    sums: Tensor
    result: Tensor
    gate: Tensor | None = None
    row: Tensor | None = None


def column_sums(partials: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """scale · Σ_p partials[:, p] of contiguous partial sums (B, P, width) in float32, side by side."""
    groups, device = len(partials[0]), partials[0].device
    sums = torch.empty(groups, sum(one.shape[2] for one in partials), dtype=torch.float32, device=device)
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


def token_sums(batches: Sequence[Tensor]) -> list[Tensor]:
    """Sums over tokens in parts (B, P, width), float32, of batches (B, N, width) of any strides; one launch."""
    partials = [_parts(batch) for batch in batches]
    working = [i for i, partial in enumerate(partials) if partial.numel()]
    if working:
        used = [batches[i] for i in working]
        layout, align = matrix_layout(used)
        launch(
            _token_sums_kernel,
            sum(_programs(batch) for batch in used),
            used[0].device,
            (
                *(tuple(used), tuple(partials[i] for i in working)),
                tuple(odd(*batch.shape, *batch.stride()) for batch in used),
            ),
            ADJACENT=layout == "row",
            ALIGN=align if layout == "row" else 1,
            BLOCK_TOKENS=TOKENS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=4,
        )
    return partials


def gelu_gradients(problems: Sequence[GeluGradient]) -> list[Tensor]:
    """Compute them in one launch; those with a gate come first, and all or none have `second`, and `row`.

    Returns:
        Sums of each `result` over tokens before it is rounded, in parts (B, P, width), float32.
    """
    partials = [_parts(one.pre) for one in problems]
    first = problems[0]
    launch(
        _gelu_gradients_kernel,
        sum(_programs(one.pre) for one in problems),
        first.pre.device,
        (
            *(tuple(one.grad for one in problems), tuple(one.pre for one in problems)),
            tuple(one.result for one in problems),
            tuple(one.result if one.second is None else one.second for one in problems),
            tuple(partials),
            tuple(partials[0] if one.gate is None else one.gate for one in problems),
            tuple(partials[0] if one.row is None else one.row for one in problems),
            tuple(odd(*one.pre.shape, 0 if one.row is None else one.row.stride(0)) for one in problems),
        ),
        ALIGN=matrix_layout([value for one in problems for value in (one.grad, one.pre, one.result)])[1],
        SECOND=first.second is not None,
        GATED=sum(one.gate is not None for one in problems),
        ROW=first.row is not None,
        BLOCK_TOKENS=TOKENS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=8,
    )
    return partials


def bias_gradients(problems: Sequence[BiasGradient]) -> None:
    """Compute them in one launch."""
    launch(
        _bias_gradients_kernel,
        sum(triton.cdiv(len(one.result), BLOCK_COLUMNS) for one in problems),
        problems[0].result.device,
        (
            *(tuple(one.sums for one in problems), tuple(one.result for one in problems)),
            tuple(one.sums if one.gate is None else one.gate for one in problems),
            tuple(one.sums if one.row is None else one.row for one in problems),
            tuple(
                odd(
                    *(*one.sums.shape, *one.sums.stride()[:2], int(one.gate is not None)),
                    *((0, 0) if one.row is None else (len(one.row), one.row.stride(0))),
                )
                for one in problems
            ),
        ),
        BLOCK_PARTS=BLOCK_PARTS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
    )


def _parts(batch: Tensor) -> Tensor:
    images, tokens, columns = batch.shape
    shape = images, triton.cdiv(tokens, TOKENS), columns
    return torch.empty(shape, dtype=torch.float32, device=batch.device)


def _programs(batch: Tensor) -> int:
    images, tokens, columns = batch.shape
    return images * triton.cdiv(tokens, TOKENS) * triton.cdiv(columns, BLOCK_COLUMNS)


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
            sums = tl.sum(total, axis=0) * scale
            tl.store(sums_ptr + group * width + offset + column, sums, mask=column < columns)
        begin += blocks
        offset += columns


@triton.jit
def _token_sums_kernel(
    batches,
    partials,
    numbers,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums of BLOCK_TOKENS tokens. `numbers` holds B, N and the width of each batch, and its strides.

    Bytes: the tokens once.
    """
    begin = 0
    for i in tl.static_range(len(batches)):
        count = half(numbers[i][1])
        columns = half(numbers[i][2])
        stride_d = half(numbers[i][5])
        if ADJACENT:
            stride_d = 1
            columns = multiple(columns, ALIGN)
        parts = tl.cdiv(count, BLOCK_TOKENS)
        blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        end = begin + half(numbers[i][0]) * parts * blocks
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            part = (tl.program_id(0) - begin) // blocks
            image = tl.cast(part // parts, tl.int64)
            token = part % parts * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            column = (tl.program_id(0) - begin) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            address = batches[i] + image * multiple(half(numbers[i][3]), ALIGN)
            address += token[:, None].to(tl.int64) * multiple(half(numbers[i][4]), ALIGN)
            address += column[None, :].to(tl.int64) * stride_d
            inside = (token[:, None] < count) & (column[None, :] < columns)
            sums = tl.sum(tl.load(address, mask=inside, other=0.0).to(tl.float32), axis=0)
            tl.store(partials[i] + tl.cast(part, tl.int64) * columns + column, sums, mask=column < columns)
        begin = end


@triton.jit
def _gelu_gradients_kernel(
    grads,
    pre_activations,
    results,
    seconds,
    partials,
    gates,
    rows,
    numbers,
    ALIGN: tl.constexpr,
    SECOND: tl.constexpr,
    GATED: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """(gate·grad + row / N) ∘ GELU'(pre) of BLOCK_TOKENS tokens, and their sums; gate·GELU(pre) with SECOND.

    The first GATED batches have gates. `numbers` holds B, N, the width and the stride of `row` of each.
    Bytes: two batches read, one or two written.
    """
    begin = 0
    for i in tl.static_range(len(grads)):
        count = half(numbers[i][1])
        columns = half(numbers[i][2])
        parts = tl.cdiv(count, BLOCK_TOKENS)
        blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        end = begin + half(numbers[i][0]) * parts * blocks
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            part = (tl.program_id(0) - begin) // blocks
            image = tl.cast(part // parts, tl.int64)
            token = part % parts * BLOCK_TOKENS
            column = (tl.program_id(0) - begin) % blocks * BLOCK_COLUMNS
            offsets, inside = tile_offsets(token, column, count, columns, BLOCK_TOKENS, BLOCK_COLUMNS, ALIGN)
            offsets += image * count * multiple(columns, ALIGN)
            n = column + tl.arange(0, BLOCK_COLUMNS)
            values = tl.load(grads[i] + offsets, mask=inside, other=0.0).to(tl.float32)
            pre = tl.load(pre_activations[i] + offsets, mask=inside, other=0.0).to(tl.float32)
            if i < GATED:
                gate = tl.load(gates[i] + image)
                values *= gate
            if ROW:
                row = tl.load(rows[i] + image * half(numbers[i][3]) + n, mask=n < columns, other=0.0)
                values += (row / count)[None, :]
            values = tl.where(inside, values * gelu_derivative(pre), 0.0)
            tl.store(results[i] + offsets, values.to(results[i].dtype.element_ty), mask=inside)
            if SECOND:
                second = gelu(pre)
                if i < GATED:
                    second *= gate
                tl.store(seconds[i] + offsets, second.to(seconds[i].dtype.element_ty), mask=inside)
            sums = tl.sum(values, axis=0)
            tl.store(partials[i] + tl.cast(part, tl.int64) * columns + n, sums, mask=n < columns)
        begin = end


@triton.jit
def _bias_gradients_kernel(
    sums, results, gates, rows, numbers, BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Σ_b gate[b]·Σ_p sums[b, p] + row[b], of BLOCK_COLUMNS columns.

    `numbers` holds B, P, the width and two strides of `sums`, whether there is a gate, the rows and their stride.
    Bytes: 4·(P + 1) for each column of each picture, most of them still in the cache.
    """
    begin = 0
    for i in tl.static_range(len(sums)):
        parts = half(numbers[i][1])
        columns = half(numbers[i][2])
        end = begin + tl.cdiv(columns, BLOCK_COLUMNS)
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            column = (tl.program_id(0) - begin) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            present = column[None, :] < columns
            total = tl.zeros((BLOCK_PARTS, BLOCK_COLUMNS), tl.float32)
            count = half(numbers[i][0]) * parts
            for first in range(0, count, BLOCK_PARTS):
                part = first + tl.arange(0, BLOCK_PARTS)
                image = part // parts
                gated = part < tl.where(half(numbers[i][5]) == 1, count, 0)
                gate = tl.load(gates[i] + image, mask=gated, other=1.0)
                at = image.to(tl.int64) * half(numbers[i][3]) + (part % parts) * half(numbers[i][4])
                inside = (part[:, None] < count) & present
                total += gate[:, None] * tl.load(
                    sums[i] + at[:, None] + column[None, :], mask=inside, other=0.0
                )
            for first in range(0, half(numbers[i][6]), BLOCK_PARTS):
                image = first + tl.arange(0, BLOCK_PARTS)
                inside = (image[:, None] < half(numbers[i][6])) & present
                row = rows[i] + image[:, None].to(tl.int64) * half(numbers[i][7]) + column[None, :]
                total += tl.load(row, mask=inside, other=0.0)
            values = tl.sum(total, axis=0).to(results[i].dtype.element_ty)
            tl.store(results[i] + column, values, mask=column < columns)
        begin = end
