"""Products of matrices with an epilogue: several in one launch, each of one matrix or of a batch of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import Target, half, launch, multiple, odd, target_of
from mgllava_kernels._triton.matmul import (
    add_bias,
    add_product,
    descriptors_fit,
    gelu,
    gelu_derivative,
    grouped_tile,
    halves,
    launch_product,
    matrix_layout,
    tile_offsets,
)
from mgllava_kernels._triton.product_configs import (
    aligned,
    kernel_options,
    piece_of,
    programs_of,
    wants_descriptors,
)
from mgllava_kernels.configs import Config, Space, choose


@dataclass(frozen=True)
class Product:
    """out (M, N) = a (M, K) · b (N, K)ᵀ and what the epilogue reads and writes beside.

    `out`, `pre_activation` and `second` are contiguous. With a batch (B, M, N) as `out`, `a` or `b` or both are
    batches too, and so are `pre_activation` and `second`; with batches as `a` and `b` alone, `out` is the sum
    over pictures. `outer` are rows (B, M) and columns (B, N) in float32 with adjacent elements: the sum over B
    of their outer products is added to the result.
    """

    a: Tensor
    b: Tensor
    out: Tensor
    bias: Tensor | None = None
    pre_activation: Tensor | None = None
    second: Tensor | None = None
    outer: tuple[Tensor, Tensor] | None = None

    @property
    def images(self) -> int:
        return next((len(one) for one in (self.a, self.b) if one.ndim == 3), 1)

    @property
    def batch(self) -> str:
        """ "rows" with pictures in the result, "depth" with pictures that are summed, "none" without any."""
        if self.out.ndim == 3:
            return "rows"
        return "depth" if self.a.ndim == 3 else "none"

    @property
    def work(self) -> int:
        return self.out.numel() * self.a.shape[-1] * (self.images if self.batch == "depth" else 1)


@dataclass(frozen=True)
class Side:
    """A job that programs of their own do in the launch of a product: `function(program, arguments)`, jitted."""

    function: Any
    programs: int
    arguments: tuple[Any, ...]


def run(side: Side, device: torch.device) -> None:
    """The job in a launch of its own."""
    launch(_side_kernel, side.programs, device, (side.arguments,), SIDE=side.function, num_warps=4)


def config_of_tokens(space: Space, products: Sequence[Product]) -> Config:
    """The choice for products of tokens and weights, that of `_representative` for all of them."""
    one, sizes = _representative(products, [(one.out.shape[-1], one.a.shape[-1]) for one in products])
    rows = sum(math.prod(one.out.shape[:-1]) for one in products)
    named = dict(zip(("N", "K"), sizes, strict=True))
    return choose(space, target_of(one.out.device), one.out.dtype, named, max(1, rows))


def config_of_weights(space: Space, products: Sequence[Product]) -> Config:
    """The choice for gradients of weights, that of `_representative` for all of them."""
    one, sizes = _representative(products, [tuple(one.out.shape) for one in products])
    named = dict(zip(("M", "N"), sizes, strict=True))
    count = one.a.shape[-1] * one.images
    return choose(space, target_of(one.out.device), one.out.dtype, named, max(1, count))


def _representative(
    products: Sequence[Product], sizes: Sequence[tuple[int, ...]]
) -> tuple[Product, tuple[int, ...]]:
    """The largest product and its sizes; where some are not aligned, the largest of these: the tiles of aligned
    operands would spill in their launch.
    """
    dtype = products[0].out.dtype
    pairs = zip(products, sizes, strict=True)
    return max(pairs, key=lambda pair: (not aligned(dtype, *pair[1]), pair[0].work))


def multiply(
    config: Config,
    epilogue: str,
    products: Sequence[Product],
    *,
    sums: bool = False,
    side: Side | None = None,
) -> list[Tensor]:
    """Compute every product, in one launch where their operands lie in memory alike.

    `side` is done in the first launch.

    Epilogues: "none" does nothing, "bias" adds it, "bias_gelu" applies GELU after it and writes the sum to
    `second` if there is one, "gelu_backward" multiplies by GELU'(pre_activation) and writes GELU(pre_activation)
    to `second` if there is one, "gelu_dot" forms <result, GELU(pre_activation)> where there is one. Which of
    `second` there are is the same for all products.

    Returns:
        With `sums`, column sums of the results before they are rounded, in parts (B, parts, N), B being 1 for a
        matrix; for "gelu_dot" the inner products in parts (B, parts); all float32. Else nothing.
    """
    target = target_of(products[0].out.device)
    partials = [_partials(config, target, epilogue, sums, one) for one in products]
    working = []
    for i, one in enumerate(products):
        if one.a.numel() == 0 and epilogue == "none" and one.outer is None:
            one.out.zero_()
        elif one.out.numel():
            working.append(i)
    for alike in _alike(target, products, working):
        _launch(
            *(config, target, epilogue, sums),
            *([products[i] for i in alike], [partials[i] for i in alike], side),
        )
        side = None
    if side is not None:
        run(side, products[0].out.device)
    return partials if sums or epilogue == "gelu_dot" else []


def add_parts(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """result = Σ_s parts[s] in the order of s, for pairs of parts (S, ...) and contiguous result."""
    for parts, result in sums:
        if len(parts) == 0:
            result.zero_()
    working = [(parts, result) for parts, result in sums if parts.numel()]
    if not working:
        return
    # Sums of columns are few and long, parts of matrices many and short.
    few = max(len(parts) for parts, _ in working) <= 16
    block, block_parts = (512, 4) if few else (128, 16)
    launch(
        _add_parts_kernel,
        sum(triton.cdiv(result.numel(), block) for _, result in working),
        working[0][1].device,
        (
            *(tuple(parts for parts, _ in working), tuple(result for _, result in working)),
            tuple(odd(result.numel(), len(parts)) for parts, result in working),
        ),
        ALIGN=math.gcd(4, *(result.numel() for _, result in working)),
        BLOCK=block,
        BLOCK_PARTS=block_parts,
        num_warps=4,
    )


def _alike(target: Target, products: Sequence[Product], working: Sequence[int]) -> list[list[int]]:
    """`working` in groups of one launch: their operands have one layout each, and where a matrix has two, as one
    row does, that of the others; and all are batches or none. On AMD each is alone: the numbers of several spill
    scalar registers.
    """

    def layouts(group: Sequence[int]) -> tuple[str, str]:
        a_layout, _ = matrix_layout([products[i].a for i in group])
        return a_layout, matrix_layout([products[i].b for i in group])[0]

    if target.backend == "hip" or len(working) < 2:
        return [[i] for i in working]
    batches = {_batch(products[i]) for i in working}
    if len(batches) == 1 and "strided" not in layouts(working):
        return [list(working)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in working:
        groups.setdefault((*_batch(products[i]), *layouts([i])), []).append(i)
    return list(groups.values())


def _batch(one: Product) -> tuple[str, bool, bool]:
    return one.batch, one.a.ndim == 3, one.b.ndim == 3


def _row_tiles(one: Product, config: Config) -> int:
    """Tiles above each other, of all pictures of a batch."""
    pictures = len(one.out) if one.batch == "rows" else 1
    return pictures * triton.cdiv(one.out.shape[-2], dict(config.blocks)["BLOCK_M"])


def _tiles(one: Product, config: Config) -> int:
    return _row_tiles(one, config) * triton.cdiv(one.out.shape[-1], dict(config.blocks)["BLOCK_N"])


def _partials(config: Config, target: Target, epilogue: str, sums: bool, one: Product) -> Tensor:
    """Memory for column sums, or for inner products."""
    pictures, (rows, columns) = one.out.shape[:-2] or (1,), one.out.shape[-2:]
    row_tiles = triton.cdiv(rows, dict(config.blocks)["BLOCK_M"])
    shape: tuple[int, ...] = (0,)
    if sums:
        shape = row_tiles, columns
    elif epilogue == "gelu_dot":
        shape = (row_tiles * triton.cdiv(columns, piece_of(config, target)),)
    return torch.empty(*pictures, *shape, dtype=torch.float32, device=one.out.device)


def _launch(
    config: Config,
    target: Target,
    epilogue: str,
    sums: bool,
    products: Sequence[Product],
    partials: Sequence[Tensor],
    side: Side | None,
) -> None:
    device, dtype = products[0].out.device, products[0].out.dtype
    a, b, out = ([getattr(one, name) for one in products] for name in ("a", "b", "out"))
    parts = [1] * len(products)
    if epilogue == "none":
        tiles = sum(_tiles(one, config) for one in products)
        parts = [_parts(one, tiles, target.multiprocessors, config) for one in products]
        partials = [
            torch.empty(*(part, *one.out.shape) if part > 1 else (0,), dtype=torch.float32, device=device)
            for one, part in zip(products, parts, strict=True)
        ]
    biases = [one.out if one.bias is None else one.bias.contiguous() for one in products]
    # The result's own address says that there is none: "gelu_dot" looks for it.
    pre = [one.out if one.pre_activation is None else one.pre_activation for one in products]
    second = [one.out if one.second is None else one.second for one in products]
    outer = [one.outer or (partial, partial) for one, partial in zip(products, partials, strict=True)]
    (a_layout, a_align), (b_layout, b_align) = matrix_layout(a), matrix_layout(b)
    tiles = sum(_tiles(one, config) * part for one, part in zip(products, parts, strict=True))
    side_programs = 0 if side is None else side.programs
    batch, a_batch, b_batch = _batch(products[0])
    launch_product(
        _product_kernel,
        programs_of(config, target, tiles) + side_programs,
        device,
        (
            *(tuple(a), tuple(b), tuple(biases), tuple(pre), tuple(out), tuple(second), tuple(partials)),
            *(tuple(rows for rows, _ in outer), tuple(columns for _, columns in outer)),
            tuple(_numbers(one, part) for one, part in zip(products, parts, strict=True)),
            *(side_programs, () if side is None else side.arguments),
        ),
        A_LAYOUT=a_layout,
        B_LAYOUT=b_layout,
        A_ALIGN=a_align,
        B_ALIGN=b_align,
        OUT_ALIGN=matrix_layout([*out, *pre, *second])[1],
        ITEM_BYTES=dtype.itemsize,
        BATCH=batch,
        A_BATCH=a_batch,
        B_BATCH=b_batch,
        EPILOGUE=epilogue,
        SECOND=products[0].second is not None,
        SUMS=sums,
        OUTER=any(one.outer is not None for one in products),
        SIDE=None if side is None else side.function,
        USE_DESCRIPTORS=wants_descriptors(config) and descriptors_fit(target, a, b),
        **kernel_options(config, target, dtype),
    )
    add_parts(
        [(partial, one.out) for partial, one, part in zip(partials, products, parts, strict=True) if part > 1]
    )


def _numbers(one: Product, parts: int) -> tuple[int, ...]:
    """M, N, K, strides of rows and depth of a and b, parts; pictures, their strides; outer products, strides."""
    picture_strides = (operand.stride(0) if operand.ndim == 3 else 0 for operand in (one.a, one.b))
    outer = (0, 0, 0)
    if one.outer is not None:
        rows, columns = one.outer
        outer = len(rows), rows.stride(0), columns.stride(0)
    return odd(
        *(*one.out.shape[-2:], one.a.shape[-1], *one.a.stride()[-2:], *one.b.stride()[-2:], parts),
        *(one.images, *picture_strides, *outer),
    )


def _parts(one: Product, tiles: int, programs: int, config: Config) -> int:
    """Parts that the depth of a product, or the pictures that it sums, are cut into, so that a launch of few
    `tiles` fills the device.

    A part of less than eight steps does not earn the tile of partial sums it writes. A batch of results is not cut:
    its pictures are tiles enough.
    """
    if one.batch == "rows":
        return 1
    steps = one.a.shape[-1] // dict(config.blocks)["BLOCK_K"]
    longest = min(one.images, one.images * steps // 8) if one.batch == "depth" else steps // 8
    return max(1, min(programs // tiles, longest))


@triton.jit
def _finish_tile(
    accumulator,
    row_tile,
    row,
    column,
    rows,
    columns,
    part,
    parts,
    bias_ptr,
    pre_ptr,
    out_ptr,
    second_ptr,
    partial_ptr,
    OUT_ALIGN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SECOND: tl.constexpr,
    SUMS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The epilogue of the tile at (row, column) of one picture, PIECE columns at a time."""
    BLOCK_M: tl.constexpr = accumulator.shape[0]
    BLOCK_N: tl.constexpr = accumulator.shape[1]
    if BLOCK_N > PIECE:
        left, right = halves(accumulator)
        _finish_tile(
            *(left, row_tile, row, column, rows, columns, part, parts),
            *(bias_ptr, pre_ptr, out_ptr, second_ptr, partial_ptr),
            *(OUT_ALIGN, EPILOGUE, SECOND, SUMS, PIECE),
        )
        _finish_tile(
            *(right, row_tile, row, column + BLOCK_N // 2, rows, columns, part, parts),
            *(bias_ptr, pre_ptr, out_ptr, second_ptr, partial_ptr),
            *(OUT_ALIGN, EPILOGUE, SECOND, SUMS, PIECE),
        )
    else:
        n = column + tl.arange(0, BLOCK_N)
        offsets, inside = tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, OUT_ALIGN)
        if EPILOGUE == "bias" or EPILOGUE == "bias_gelu":
            accumulator = add_bias(accumulator, bias_ptr, column, columns)
        if EPILOGUE == "bias_gelu":
            if SECOND:
                tl.store(second_ptr + offsets, accumulator.to(second_ptr.dtype.element_ty), mask=inside)
            accumulator = gelu(accumulator)
        if EPILOGUE == "gelu_backward":
            pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if SECOND:
                tl.store(second_ptr + offsets, gelu(pre).to(second_ptr.dtype.element_ty), mask=inside)
            accumulator *= gelu_derivative(pre)
        if EPILOGUE == "gelu_dot" and pre_ptr.to(tl.int64) != out_ptr.to(tl.int64):
            pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            dot = partial_ptr + row_tile.to(tl.int64) * tl.cdiv(columns, BLOCK_N) + column // BLOCK_N
            tl.store(dot, tl.sum(accumulator * gelu(pre)), mask=column < columns)
        if SUMS:
            sums = partial_ptr + row_tile.to(tl.int64) * columns + n
            tl.store(sums, tl.sum(tl.where(inside, accumulator, 0.0), axis=0), mask=n < columns)
        if EPILOGUE == "none" and parts > 1:
            part_ptr = partial_ptr + part.to(tl.int64) * rows * multiple(columns, OUT_ALIGN)
            tl.store(part_ptr + offsets, accumulator, mask=inside)
        else:
            tl.store(out_ptr + offsets, accumulator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _within(first, size, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """first, first + 1, ..., and beyond `size`, of which nothing is stored, elements again: no masks to keep in
    registers, and of ALIGN neighbours, which divides `size`, one address.
    """
    i = tl.arange(0, BLOCK)
    return tl.minimum(first + i // ALIGN * ALIGN, size - ALIGN) + i % ALIGN


@triton.jit(do_not_specialize=["side_programs"])
def _product_kernel(
    as_,
    bs,
    biases,
    pre_activations,
    outs,
    seconds,
    partials,
    outer_rows,
    outer_columns,
    numbers,
    side_programs,
    side_arguments,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    BATCH: tl.constexpr,
    A_BATCH: tl.constexpr,
    B_BATCH: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SECOND: tl.constexpr,
    SUMS: tl.constexpr,
    OUTER: tl.constexpr,
    SIDE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = A · Bᵀ and an epilogue, of several matrices or batches, each with its own sizes.

    `numbers` holds for each what `_numbers` says. The tiles of all products are dealt to the programs in turn; a
    tile has rows of one picture only. The last `side_programs` programs do the side job.

    Bytes: (M·K + N·K)·itemsize read where the L2 cache holds what neighbouring tiles share, M·N·itemsize
    written, twice with SECOND, and as many read by "gelu_backward" and "gelu_dot". FLOPs: 2·M·N·K.
    """
    tile = tl.program_id(0)
    programs = tl.num_programs(0) - side_programs
    if SIDE is not None and tile >= programs:
        SIDE(tile - programs, side_arguments)
        tile = 1 << 30
    for problem in range(len(numbers)):
        a_address = as_[0].to(tl.int64)
        b_address = bs[0].to(tl.int64)
        bias_address = biases[0].to(tl.int64)
        pre_address = pre_activations[0].to(tl.int64)
        out_address = outs[0].to(tl.int64)
        second_address = seconds[0].to(tl.int64)
        partial_address = partials[0].to(tl.int64)
        outer_rows_address = outer_rows[0].to(tl.int64)
        outer_columns_address = outer_columns[0].to(tl.int64)
        rows = half(numbers[0][0])
        columns = half(numbers[0][1])
        depth = half(numbers[0][2])
        stride_am = tl.cast(half(numbers[0][3]), tl.int64)
        stride_ak = tl.cast(half(numbers[0][4]), tl.int64)
        stride_bn = tl.cast(half(numbers[0][5]), tl.int64)
        stride_bk = tl.cast(half(numbers[0][6]), tl.int64)
        parts = half(numbers[0][7])
        images = half(numbers[0][8])
        stride_ab = tl.cast(half(numbers[0][9]), tl.int64)
        stride_bb = tl.cast(half(numbers[0][10]), tl.int64)
        outers = half(numbers[0][11])
        stride_outer_rows = tl.cast(half(numbers[0][12]), tl.int64)
        stride_outer_columns = tl.cast(half(numbers[0][13]), tl.int64)
        for i in tl.static_range(1, len(numbers)):
            if problem == i:
                a_address = as_[i].to(tl.int64)
                b_address = bs[i].to(tl.int64)
                bias_address = biases[i].to(tl.int64)
                pre_address = pre_activations[i].to(tl.int64)
                out_address = outs[i].to(tl.int64)
                second_address = seconds[i].to(tl.int64)
                partial_address = partials[i].to(tl.int64)
                outer_rows_address = outer_rows[i].to(tl.int64)
                outer_columns_address = outer_columns[i].to(tl.int64)
                rows = half(numbers[i][0])
                columns = half(numbers[i][1])
                depth = half(numbers[i][2])
                stride_am = tl.cast(half(numbers[i][3]), tl.int64)
                stride_ak = tl.cast(half(numbers[i][4]), tl.int64)
                stride_bn = tl.cast(half(numbers[i][5]), tl.int64)
                stride_bk = tl.cast(half(numbers[i][6]), tl.int64)
                parts = half(numbers[i][7])
                images = half(numbers[i][8])
                stride_ab = tl.cast(half(numbers[i][9]), tl.int64)
                stride_bb = tl.cast(half(numbers[i][10]), tl.int64)
                outers = half(numbers[i][11])
                stride_outer_rows = tl.cast(half(numbers[i][12]), tl.int64)
                stride_outer_columns = tl.cast(half(numbers[i][13]), tl.int64)
        a_ptr = tl.multiple_of(a_address.to(as_[0].dtype), A_ALIGN * ITEM_BYTES)
        b_ptr = tl.multiple_of(b_address.to(bs[0].dtype), B_ALIGN * ITEM_BYTES)
        bias_ptr = bias_address.to(biases[0].dtype)
        pre_ptr = tl.multiple_of(pre_address.to(pre_activations[0].dtype), OUT_ALIGN * ITEM_BYTES)
        out_ptr = tl.multiple_of(out_address.to(outs[0].dtype), OUT_ALIGN * ITEM_BYTES)
        second_ptr = tl.multiple_of(second_address.to(seconds[0].dtype), OUT_ALIGN * ITEM_BYTES)
        partial_ptr = tl.multiple_of(partial_address.to(partials[0].dtype), 16)
        outer_rows_ptr = outer_rows_address.to(outer_rows[0].dtype)
        outer_columns_ptr = outer_columns_address.to(outer_columns[0].dtype)

        picture_tiles = tl.cdiv(rows, BLOCK_M)
        row_tiles = picture_tiles
        if BATCH == "rows":
            row_tiles = picture_tiles * images
        column_tiles = tl.cdiv(columns, BLOCK_N)
        tiles = row_tiles * column_tiles * parts
        part_depth = tl.cdiv(tl.cdiv(depth, BLOCK_K), parts) * BLOCK_K
        part_images = tl.cdiv(images, parts)
        # A loop of one step is none to the compiler, which needs fewer registers then.
        end = tiles if PERSISTENT else tl.minimum(tile + 1, tiles)
        for one in range(tile, end, programs if PERSISTENT else 1):
            part = one % parts
            row_tile, column_tile = grouped_tile(one // parts, row_tiles, column_tiles, GROUP)
            row = row_tile * BLOCK_M
            image = 0
            before = 0
            if BATCH == "rows":
                image = row_tile // picture_tiles
                row = row_tile % picture_tiles * BLOCK_M
                before = image.to(tl.int64) * rows * multiple(columns, OUT_ALIGN)
            column = column_tile * BLOCK_N
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if BATCH == "depth":
                for picture in range(part * part_images, tl.minimum((part + 1) * part_images, images)):
                    accumulator = add_product(
                        *(accumulator, a_ptr, b_ptr, row, column, rows, columns, depth, 0, depth),
                        *(stride_am, stride_ak, stride_bn, stride_bk),
                        *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
                        *(picture, images, stride_ab, stride_bb, A_BATCH, B_BATCH),
                    )
            else:
                first = part * part_depth
                last = tl.minimum(first + part_depth, depth)
                accumulator = add_product(
                    *(accumulator, a_ptr, b_ptr, row, column, rows, columns, depth, first, last),
                    *(stride_am, stride_ak, stride_bn, stride_bk),
                    *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
                    *(image, images, stride_ab, stride_bb, A_BATCH, B_BATCH),
                )
            if OUTER:
                outer_row_ptr = outer_rows_ptr + _within(row, rows, BLOCK_M, 1)
                outer_column_ptr = outer_columns_ptr + _within(column, columns, BLOCK_N, OUT_ALIGN)
                for _ in range(tl.where(part == 0, outers, 0)):
                    outer_row = tl.load(outer_row_ptr)
                    outer_column = tl.load(outer_column_ptr)
                    accumulator += outer_row[:, None] * outer_column[None, :]
                    outer_row_ptr += stride_outer_rows
                    outer_column_ptr += stride_outer_columns
            _finish_tile(
                *(accumulator, row_tile, row, column, rows, columns, part, parts),
                *(bias_ptr, pre_ptr + before, out_ptr + before, second_ptr + before, partial_ptr),
                *(OUT_ALIGN, EPILOGUE, SECOND, SUMS, PIECE),
            )
        tile += tl.cdiv(tl.maximum(tiles - tile, 0), programs) * programs - tiles


@triton.jit
def _side_kernel(arguments, SIDE: tl.constexpr):
    SIDE(tl.program_id(0), arguments)


@triton.jit
def _add_parts_kernel(
    partials, results, numbers, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """result[i] = Σ_s partials[s, i], in one order of s. `numbers` holds the elements and parts of each.

    Bytes: 4 for each element of each part; FLOPs: as many as elements.
    """
    tile = tl.program_id(0)
    partial_address = partials[0].to(tl.int64)
    result_address = results[0].to(tl.int64)
    elements = half(numbers[0][0])
    parts = half(numbers[0][1])
    tile_begin = 0
    next_tile = tl.cdiv(elements, BLOCK)
    for i in tl.static_range(1, len(numbers)):
        if tile >= next_tile:
            partial_address = partials[i].to(tl.int64)
            result_address = results[i].to(tl.int64)
            elements = half(numbers[i][0])
            parts = half(numbers[i][1])
            tile_begin = next_tile
            next_tile += tl.cdiv(elements, BLOCK)
    partial_ptr = tl.multiple_of(partial_address.to(partials[0].dtype), 16)
    result_ptr = tl.multiple_of(result_address.to(results[0].dtype), 16)
    elements = multiple(elements, ALIGN)
    element = (tile - tile_begin) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        values = partial_ptr + part[:, None].to(tl.int64) * elements + element[None, :]
        total += tl.sum(tl.load(values, mask=(part[:, None] < parts) & inside[None, :], other=0.0), axis=0)
    tl.store(result_ptr + element, total.to(result_ptr.dtype.element_ty), mask=inside)
