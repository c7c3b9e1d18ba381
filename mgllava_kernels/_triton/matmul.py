"""The matrix product that this package's kernels are made of: accumulator += A · Bᵀ for one tile of the output.

A kernel that multiplies matrices composes these jit functions:

    row, column = grouped_tile(tile, row_tiles, column_tiles, GROUP)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    accumulator = add_product(accumulator, a_ptr, b_ptr, row * BLOCK_M, column * BLOCK_N, M, N, K, 0, K, strides...)
    values = gelu(add_bias(accumulator, bias_ptr, column * BLOCK_N, N))

A product that continues another is a second call on the accumulator, scaled or not in between. A is (M, K) and B
is (N, K), each anywhere in memory: `matrix_layout` says on the host which axis is adjacent and what the compiler
may assume. Tokens read from a map (C, H·W) are a matrix whose rows are adjacent, "column"; nothing is copied. Of a
batch of matrices `add_product` takes the one of a picture. The launch goes through `launch_product` wherever
DESCRIPTORS may be on, with the answer of `descriptors_fit`.
"""

import contextvars
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import Target, launch, multiple


def matrix_layout(matrices: Sequence[Tensor]) -> tuple[str, int]:
    """LAYOUT and ALIGN of matrices, or batches of them, that one launch reads as the same operand.

    Returns:
        "row" if the elements of a row are adjacent in every matrix, "column" if those of a column are, else
        "strided"; and the largest power of two, at most 16 bytes' worth of elements, that divides the other
        strides, the size of the adjacent axis and the address: with it, loads of that many elements stay
        within the matrix and aligned.
    """
    for name, axis in (("row", -1), ("column", -2)):
        if all(matrix.stride(axis) == 1 or matrix.shape[axis] == 1 for matrix in matrices):
            common = 16 // matrices[0].element_size()
            for matrix in matrices:
                common = math.gcd(common, matrix.data_ptr() // matrix.element_size(), matrix.shape[axis])
                for other in {0, matrix.ndim - 1, matrix.ndim - 2} - {matrix.ndim + axis}:
                    if matrix.shape[other] > 1:
                        common = math.gcd(common, matrix.stride(other))
            return name, common
    return "strided", 1


def descriptors_fit(target: Target, *operands: Sequence[Tensor]) -> bool:
    """Whether the operands of a product can be read through tensor descriptors (TMA), on Hopper and later.

    Addresses and strides must be multiples of 16 bytes; an empty or repeated axis cannot be described.
    """
    if target.backend != "interpreter" and target.capability < 90:
        return False
    for matrices in operands:
        layout, align = matrix_layout(matrices)
        if layout == "strided" or align * matrices[0].element_size() < 16:
            return False
        if any(matrix.numel() == 0 or 0 in matrix.stride() for matrix in matrices):
            return False
    return True


def launch_product(
    kernel: Any, programs: int, device: torch.device, args: Sequence[Any], **options: Any
) -> None:
    """`launch`, with memory for the tensor descriptors that programs make.

    Triton asks the allocator of the calling context for it, and autograd's threads have none: each launch
    brings its own and leaves the user's as it was.
    """
    contextvars.copy_context().run(_launch_with_allocator, kernel, programs, device, args, options)


def _launch_with_allocator(
    kernel: Any, programs: int, device: torch.device, args: Sequence[Any], options: dict[str, Any]
) -> None:
    triton.set_allocator(functools.partial(_scratch, device))
    launch(kernel, programs, device, args, **options)


def _scratch(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=device)


@triton.jit
def grouped_tile(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile in an order that keeps what neighbours read in the L2 cache.

    GROUP rows of tiles are gone through column by column: programs that run at the same time share GROUP
    blocks of A and few of B.
    """
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = tile % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def add_product(
    accumulator,
    a_ptr,
    b_ptr,
    row,
    column,
    rows,
    columns,
    depth,
    first,
    last,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    image=0,
    images=1,
    stride_ab=0,
    stride_bb=0,
    A_BATCH: tl.constexpr = False,
    B_BATCH: tl.constexpr = False,
):
    """accumulator[m, n] + Σ_k A[row + m, k] · B[column + n, k] over k in [first, last), in float32.

    The accumulator is (BLOCK_M, BLOCK_N), A is (rows, depth) and B (columns, depth); elements beyond count as
    zero. `first` is a multiple of BLOCK_K, and so is `last` if it is less than `depth`. The stride of an
    adjacent axis is not looked at. LAYOUT and ALIGN are those of `matrix_layout`. With A_BATCH A is that of
    picture `image` among `images`, whose matrices are stride_ab apart; with B_BATCH alike B. With DESCRIPTORS
    the hardware copies whole tiles, through descriptors that are made once where pointers and sizes do not
    change from tile to tile; otherwise threads copy, asynchronously, sixteen bytes at a time where ALIGN allows.
    """
    BLOCK_M: tl.constexpr = accumulator.shape[0]
    BLOCK_N: tl.constexpr = accumulator.shape[1]
    first = multiple(first, BLOCK_K)
    if A_LAYOUT == "row":
        stride_ak = 1
        stride_am = multiple(stride_am, A_ALIGN)
    elif A_LAYOUT == "column":
        stride_am = 1
        stride_ak = multiple(stride_ak, A_ALIGN)
    if B_LAYOUT == "row":
        stride_bk = 1
        stride_bn = multiple(stride_bn, B_ALIGN)
    elif B_LAYOUT == "column":
        stride_bn = 1
        stride_bk = multiple(stride_bk, B_ALIGN)

    if A_BATCH:
        stride_ab = multiple(tl.cast(stride_ab, tl.int64), A_ALIGN)
    if B_BATCH:
        stride_bb = multiple(tl.cast(stride_bb, tl.int64), B_ALIGN)

    if DESCRIPTORS:
        a = _describe(
            *(a_ptr, rows, depth, images, stride_am, stride_ak, stride_ab),
            *(BLOCK_M, BLOCK_K, A_LAYOUT, A_BATCH),
        )
        b = _describe(
            *(b_ptr, columns, depth, images, stride_bn, stride_bk, stride_bb),
            *(BLOCK_N, BLOCK_K, B_LAYOUT, B_BATCH),
        )
        for at in range(first, last, BLOCK_K):
            left = _copy(a, image, row, at, BLOCK_M, BLOCK_K, A_LAYOUT, A_BATCH)
            right = _copy(b, image, column, at, BLOCK_N, BLOCK_K, B_LAYOUT, B_BATCH)
            accumulator = tl.dot(left, tl.trans(right), accumulator, input_precision=PRECISION)
    else:
        m = row + tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        a_inside = m[:, None] < (multiple(rows, A_ALIGN) if A_LAYOUT == "column" else rows)
        b_inside = n[None, :] < (multiple(columns, B_ALIGN) if B_LAYOUT == "column" else columns)
        a_depth = multiple(depth, A_ALIGN) if A_LAYOUT == "row" else depth
        b_depth = multiple(depth, B_ALIGN) if B_LAYOUT == "row" else depth
        start = first + k.to(tl.int64)
        if A_BATCH:
            a_ptr += image * stride_ab
        if B_BATCH:
            b_ptr += image * stride_bb
        a_tile = a_ptr + m[:, None].to(tl.int64) * stride_am + start[None, :] * stride_ak
        b_tile = b_ptr + n[None, :].to(tl.int64) * stride_bn + start[:, None] * stride_bk
        for at in range(first, last, BLOCK_K):
            left = tl.load(a_tile, mask=a_inside & (at + k[None, :] < a_depth), other=0.0)
            right = tl.load(b_tile, mask=b_inside & (at + k[:, None] < b_depth), other=0.0)
            accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
            a_tile += BLOCK_K * stride_ak
            b_tile += BLOCK_K * stride_bk
    return accumulator


@triton.jit
def _describe(
    ptr,
    rows,
    depth,
    images,
    stride_row,
    stride_k,
    stride_image,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    BATCH: tl.constexpr,
):
    """A descriptor of (rows, depth), or of a batch of such matrices, that copies (BLOCK, BLOCK_K)."""
    tl.static_assert(LAYOUT != "strided")
    if LAYOUT == "row" and BATCH:
        return tl.make_tensor_descriptor(
            ptr, [images, rows, depth], [stride_image, stride_row, 1], [1, BLOCK, BLOCK_K]
        )
    elif LAYOUT == "row":
        return tl.make_tensor_descriptor(ptr, [rows, depth], [stride_row, 1], [BLOCK, BLOCK_K])
    elif BATCH:
        return tl.make_tensor_descriptor(
            ptr, [images, depth, rows], [stride_image, stride_k, 1], [1, BLOCK_K, BLOCK]
        )
    else:
        return tl.make_tensor_descriptor(ptr, [depth, rows], [stride_k, 1], [BLOCK_K, BLOCK])


@triton.jit
def _copy(
    descriptor,
    image,
    row,
    at,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    BATCH: tl.constexpr,
):
    """The tile (BLOCK, BLOCK_K) at (row, at) of what `_describe` described."""
    if LAYOUT == "row" and BATCH:
        return descriptor.load([image, row, at]).reshape(BLOCK, BLOCK_K)
    elif LAYOUT == "row":
        return descriptor.load([row, at])
    elif BATCH:
        return tl.trans(descriptor.load([image, at, row]).reshape(BLOCK_K, BLOCK))
    else:
        return tl.trans(descriptor.load([at, row]))


@triton.jit
def gelu(x):
    """x · Φ(x), exact, in float32."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    """Φ(x) + x · φ(x), in float32."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def add_bias(accumulator, bias_ptr, column, columns):
    """accumulator[m, n] + bias[column + n]."""
    n = column + tl.arange(0, accumulator.shape[1])
    return accumulator + tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def tile_offsets(
    row, column, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr
):
    """Offsets in a contiguous (rows, columns) matrix of the tile at (row, column), and which of them are inside.

    ALIGN divides `columns`.
    """
    columns = multiple(columns, ALIGN)
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    return m[:, None].to(tl.int64) * columns + n[None, :], inside


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns.

    GELU of more than some 32 elements a thread at a time spills: epilogues go through a tile in pieces.
    """
    pairs = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2)
    return pairs.permute(0, 2, 1).split()
