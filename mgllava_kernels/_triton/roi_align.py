"""Drop-in RoIAlign as products of separable axis weights, forward and backward.

The algebra of `mgllava_kernels._torch.roi_align`: out[k, c] = W_y[k] · F[c] · W_x[k]ᵀ, with the average hat
weight of every row and column for each bin. A kernel that gathers, like torchvision's, works out indices and
weights again for every channel and reads 16 single elements an output at sampling ratio 2. Here the weights
are worked out once a box, by a kernel of their own; rows of the map are read in runs of 16 bytes, only those
of weight other than zero, and weighted on CUDA cores; the columns are left to a small matmul. The backward
gathers as well: every tile of the gradient visits the boxes that touch it in the order of `group_boxes`, so
that its sums have one order and nothing is added atomically.

Scratch is 4·K·(output_height·H + output_width·W) bytes of weights, in the forward as much again for rows as
for their weights, in the backward 20·K a tile of one map. A feature that is not finite spoils all bins of the
boxes around it (0·∞), as in the algebra on torch.

Accounts are those of "512 boxes to 7x7, ratio 2" in `mgllava_kernels._workloads`: torchvision's finest level,
2x256x200x304, and boxes as it gets them, 12.7 cells a side on average. Times are floors on an H100: 3.35 TB/s,
495 TFLOP/s in tf32, a third of it in tf32x3, 67 TFLOP/s on CUDA cores; nothing here is measured. The same
with its large boxes, 100 cells by 69, comes after.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.axis_weights import axis_weight, box_axis, sample_run, touched_rows, within
from mgllava_kernels._triton.box_groups import group_boxes, image_of
from mgllava_kernels._triton.feature_layout import feature_layout
from mgllava_kernels._triton.launch import Target, launch, multiple, target_of
from mgllava_kernels._triton.precision import interpolation_precision
from mgllava_kernels.configs import Config, Sizes, Space, choose

# Rows of a list that the forward reads at once; lists are padded to it. Four is what a bin of sampling ratio 2
# touches.
UNROLL = tl.constexpr(4)
BLOCK_BINS = 8
BLOCK_ROWS = 32
BLOCK_BOXES = 128


def roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """(K, C, output_height, output_width) in the dtype of `input`, read in whatever strides it has."""
    images, channels, height, width = input.shape
    count = len(boxes)
    output_shape = (count, channels, output_height, output_width)
    output = torch.empty(output_shape, dtype=input.dtype, device=input.device)
    boxes = boxes.contiguous()
    columns, rows, row_index, row_count = _axis_weights(
        boxes, height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned, lists=True
    )
    layout, align = feature_layout([input])
    target = target_of(input.device)
    sizes = {
        "channels": channels,
        "output_height": output_height,
        "output_width": output_width,
        "channels_last": int(layout == "nhwc"),
    }
    config = choose(FORWARD, target, input.dtype, sizes, count)
    blocks = dict(config.blocks)
    programs = (
        triton.cdiv(output_width, blocks["BLOCK_J"])
        * triton.cdiv(output_height, blocks["BINS"])
        * count
        * triton.cdiv(channels, blocks["BLOCK_C"])
    )
    launch(
        _roi_align_kernel,
        programs,
        input.device,
        (
            *(input, boxes, columns, rows, row_index, row_count, output),
            *(count, images, channels, height, width, output_height, output_width),
            *(columns.shape[2], rows.shape[2], *input.stride()),
            *(spatial_scale, sampling_ratio),
        ),
        ALIGNED=aligned,
        LAYOUT=layout,
        ALIGN=align,
        PRECISION=_precision(input.dtype, target),
        **config.options,
    )
    return output


def roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    shape: Sequence[int],
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Gradient of the input, contiguous and of `shape`, in the dtype of `grad`; one order of summation."""
    images, channels, height, width = shape
    count = len(boxes)
    result = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    boxes = boxes.contiguous()
    target = target_of(grad.device)
    sizes = {"channels": channels, "output_height": output_height, "output_width": output_width}
    config = choose(BACKWARD, target, grad.dtype, sizes, count)
    blocks = dict(config.blocks)
    tiles_x = triton.cdiv(width, blocks["BLOCK_X"])
    tiles = triton.cdiv(height, blocks["BLOCK_Y"]) * tiles_x

    columns, rows, _, _ = _axis_weights(
        boxes, height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned, lists=False
    )
    order, offsets = group_boxes(boxes, images)
    lists = torch.empty(5, tiles, count, dtype=torch.int32, device=grad.device)
    lengths = torch.empty(images, tiles, dtype=torch.int32, device=grad.device)
    launch(
        _tile_lists_kernel,
        images * tiles,
        grad.device,
        (
            *(boxes, order, offsets, lists, lengths),
            *(count, tiles, tiles_x, height, width, output_height, output_width),
            *(spatial_scale, sampling_ratio),
        ),
        ALIGNED=aligned,
        BLOCK_Y=blocks["BLOCK_Y"],
        BLOCK_X=blocks["BLOCK_X"],
        BLOCK=BLOCK_BOXES,
        num_warps=4,
    )
    launch(
        _roi_align_backward_kernel,
        images * tiles * triton.cdiv(channels, blocks["BLOCK_C"]),
        grad.device,
        (
            *(grad, columns, rows, offsets, lists, lengths, result),
            *(count, images, channels, height, width, tiles, tiles_x, output_height, output_width),
            *(columns.shape[2], rows.shape[2], *grad.stride()),
        ),
        PRECISION=_precision(grad.dtype, target),
        **config.options,
    )
    return result


def _precision(dtype: torch.dtype, target: Target) -> str:
    """`input_precision` of the matmul over columns, whose operands are float32 whatever the features are.

    Of the composition's error tf32 with operands rounded to nearest makes 1.0 times in bfloat16, 1.7 in float16
    and some 200 in float32, tf32x3 1.0 times in all: emulated, `test_precision_of_the_matmul`.
    """
    precision = interpolation_precision(target)
    return "tf32" if dtype == torch.bfloat16 and precision == "tf32x3" else precision


def _axis_weights(
    boxes: Tensor,
    height: int,
    width: int,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
    lists: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of all columns, (K, output_width, W), and rows, (K, output_height, H), float32 and padded.

    With `lists` those of rows other than zero come one after the other, filled up with zeros to a multiple of
    UNROLL: `row_index` names the rows, `row_count` (K, output_height) says how many.
    """
    count = len(boxes)
    pitch_x, pitch_y = triton.cdiv(width, 4) * 4, triton.cdiv(height, UNROLL.value) * UNROLL.value
    columns = torch.empty(count, output_width, pitch_x, dtype=torch.float32, device=boxes.device)
    rows = torch.empty(count, output_height, pitch_y, dtype=torch.float32, device=boxes.device)
    row_index = torch.empty_like(rows if lists else rows[:0], dtype=torch.int32)
    row_count = torch.empty(count, output_height, dtype=torch.int32, device=boxes.device)
    launch(
        _axis_weights_kernel,
        count * (triton.cdiv(output_width, BLOCK_BINS) + triton.cdiv(output_height, BLOCK_BINS)),
        boxes.device,
        (
            *(boxes, columns, rows, row_index, row_count),
            *(height, width, output_height, output_width, pitch_x, pitch_y),
            *(spatial_scale, sampling_ratio),
        ),
        ALIGNED=aligned,
        LISTS=lists,
        BLOCK_BINS=BLOCK_BINS,
        BLOCK=BLOCK_ROWS,
        num_warps=4,
        # Whether a sample at the very edge counts must not hang on an unrounded product.
        enable_fp_fusion=False,
    )
    return columns, rows, row_index, row_count


@triton.jit(
    do_not_specialize=[
        "height",
        "width",
        "bins_y",
        "bins_x",
        "pitch_x",
        "pitch_y",
        "spatial_scale",
        "sampling_ratio",
    ],
    do_not_specialize_on_alignment=["boxes_ptr"],
)
def _axis_weights_kernel(
    boxes_ptr,
    columns_ptr,
    rows_ptr,
    row_index_ptr,
    row_count_ptr,
    height,
    width,
    bins_y,
    bins_x,
    pitch_x,
    pitch_y,
    spatial_scale,
    sampling_ratio,
    ALIGNED: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (box, BLOCK_BINS bins of one axis), columns first: their weights on all rows of that axis.

    Writes 4·K·(J·W + I·H) bytes, or with LISTS 4·K·J·W and 8 for every row of weight other than zero; some 150
    operations a weight, but only in the blocks of rows that the bins touch. 4.4 MB of columns, and 0.1 MB of
    lists or 2.9 MB of rows: 1.3 or 2.2 us to memory, less to L2, where they stay.
    """
    blocks_x = tl.cdiv(bins_x, BLOCK_BINS)
    blocks = blocks_x + tl.cdiv(bins_y, BLOCK_BINS)
    program = tl.program_id(0)
    box = (program // blocks).to(tl.int64)
    block = program % blocks
    vertical = block >= blocks_x
    side = vertical.to(tl.int32)
    bins = tl.where(vertical, bins_y, bins_x)
    size = tl.where(vertical, height, width).to(tl.float32)
    bin = (block - side * blocks_x) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)[:, None]
    first_bin = bin.to(tl.float32)
    start, bin_size, points = box_axis(
        tl.load(boxes_ptr + box * 5 + 1 + side) + tl.zeros_like(first_bin),
        tl.load(boxes_ptr + box * 5 + 3 + side) + tl.zeros_like(first_bin),
        spatial_scale,
        bins.to(tl.float32),
        sampling_ratio.to(tl.float32),
        ALIGNED,
    )
    first, end = touched_rows(start, bin_size, points, first_bin, 1.0, size)
    first = tl.min(tl.where(bin < bins, first, size.to(tl.int32)))
    end = tl.max(tl.where(bin < bins, end, 0))
    base, origin, step, count, enter, leave = sample_run(start, bin_size, points, first_bin, 1.0, size)
    if LISTS and vertical:
        line = (box * bins_y + bin) * pitch_y
        length = tl.zeros((BLOCK_BINS, 1), tl.int32)
        for begin in range(first, end, BLOCK):
            row = begin + tl.arange(0, BLOCK)[None, :]
            weight = axis_weight(row.to(tl.float32), size, base, origin, step, count, enter, leave)
            used = (bin < bins) & (row < end) & (weight != 0)
            place = line + length + tl.cumsum(used.to(tl.int32), axis=1) - 1
            tl.store(rows_ptr + place, weight, mask=used)
            tl.store(row_index_ptr + place, row + tl.zeros_like(place).to(tl.int32), mask=used)
            length += tl.sum(used.to(tl.int32), axis=1)[:, None]
        padding = length + tl.arange(0, UNROLL)[None, :]
        missing = (bin < bins) & (padding < tl.cdiv(length, UNROLL) * UNROLL)
        tl.store(rows_ptr + line + padding, tl.zeros((BLOCK_BINS, UNROLL), tl.float32), mask=missing)
        tl.store(row_index_ptr + line + padding, tl.zeros((BLOCK_BINS, UNROLL), tl.int32), mask=missing)
        tl.store(row_count_ptr + box * bins_y + bin, length, mask=bin < bins)
    elif vertical:
        line_ptrs = rows_ptr + (box * bins_y + bin) * pitch_y
        _store_lines(
            line_ptrs, bin < bins, pitch_y, first, end, size, base, origin, step, count, enter, leave, BLOCK
        )
    else:
        line_ptrs = columns_ptr + (box * bins_x + bin) * pitch_x
        _store_lines(
            line_ptrs, bin < bins, pitch_x, first, end, size, base, origin, step, count, enter, leave, BLOCK
        )


@triton.jit
def _store_lines(
    line_ptrs, known, pitch, first, end, size, base, origin, step, count, enter, leave, BLOCK: tl.constexpr
):
    """Weights of sample runs on rows 0 to `pitch`; those in blocks beyond [first, end) are zero."""
    for begin in range(0, pitch, BLOCK):
        row = begin + tl.arange(0, BLOCK)[None, :]
        weight = tl.zeros_like(base) + tl.zeros_like(row).to(tl.float32)
        if (begin < end) & (begin + BLOCK > first):
            weight = axis_weight(row.to(tl.float32), size, base, origin, step, count, enter, leave)
        tl.store(line_ptrs + row, weight, mask=known & (row < pitch))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b of float32 operands."""
    if PRECISION == "tf32":
        a, b = _nearest_tf32(a), _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(value):
    """`value` with the 11 bits that tensor cores take; left to them, the others are cut off, toward zero."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(
    do_not_specialize=[
        "count",
        "images",
        "channels",
        "height",
        "width",
        "bins_y",
        "bins_x",
        "pitch_x",
        "pitch_y",
        "stride_b",
        "stride_c",
        "stride_y",
        "stride_x",
        "spatial_scale",
        "sampling_ratio",
    ],
    do_not_specialize_on_alignment=["boxes_ptr"],
)
def _roi_align_kernel(
    input_ptr,
    boxes_ptr,
    columns_ptr,
    rows_ptr,
    row_index_ptr,
    row_count_ptr,
    output_ptr,
    count,
    images,
    channels,
    height,
    width,
    bins_y,
    bins_x,
    pitch_x,
    pitch_y,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    spatial_scale,
    sampling_ratio,
    ALIGNED: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program (channel block, box, BINS bin rows, BLOCK_J bins of a row): those bins of that box.

    out[k, c, i, j] = Σ_x (Σ_y w_y[k, i, y] · F[c, y, x]) · w_x[k, j, x]: the inner sum over the listed rows in
    float32 on CUDA cores, BLOCK_C x BLOCK_X at a time over the columns of the box; the outer a matmul
    (BLOCK_C x BLOCK_X) · (BLOCK_X x BLOCK_J).

    With r listed rows in the I bins of a box and X columns read, each on average, reads of the map are K·C·r·X
    elements from L2 and at least the map once from memory, writes K·C·I·J; 2·K·C·r·X operations on CUDA cores
    and 2·K·C·I·X·max(J, 16) in the matmul, X a multiple of BLOCK_X in both. Channel blocks are outermost, so
    that the boxes share one block's part of the map in L2. Every program reads its weights, 4·I·J·X bytes.

    r = 20, X = 22 (14 touched, in runs of 8), 35 in whole blocks. In bfloat16 62 MB of map and 13 MB of output
    are 22 us, from L2 come 124 MB of map (77 channels last) and 14 of weights; 0.25 GFLOP on CUDA cores are 4
    us, 1.0 in the matmul 2 us, 6 in tf32x3. In float32 45 us of memory, 248 MB from L2, 5 us in the matmul.
    Of these memory bounds every dtype; L2, whose rate is not published, may. It does with large boxes: r = 26
    and X = 104 make 708 MB from it in bfloat16 and 1,416 in float32, for the same 22 and 45 us of memory and
    3.4 GFLOP in the matmul, 7 us or 21 in tf32x3.

    In NCHW columns between the samples are read as well. A group of 8 has no weight only where samples lie more
    than 9 cells apart: in none of those boxes, 0% of 124 MB. Of large boxes' groups it is 18%, but L2 hands out
    32 bytes, and of groups of 16 elements of 16 bits 1%. To skip them a reduction of the weights and a pass
    through shared memory would come before the loads of every block, which now wait for nothing.
    """
    program = tl.program_id(0)
    blocks_j = tl.cdiv(bins_x, BLOCK_J)
    blocks_i = tl.cdiv(bins_y, BINS)
    first_j = program % blocks_j * BLOCK_J
    first_i = program // blocks_j % blocks_i * BINS
    box = (program // (blocks_j * blocks_i) % count).to(tl.int64)
    c = program // (blocks_j * blocks_i) // count * BLOCK_C + tl.arange(0, BLOCK_C)
    j = first_j + tl.arange(0, BLOCK_J)

    image = image_of(boxes_ptr, box, count, images)
    start, bin_size, points = box_axis(
        tl.load(boxes_ptr + box * 5 + 1),
        tl.load(boxes_ptr + box * 5 + 3),
        spatial_scale,
        bins_x.to(tl.float32),
        sampling_ratio.to(tl.float32),
        ALIGNED,
    )
    bins = tl.minimum(bins_x - first_j, BLOCK_J).to(tl.float32)
    first, end = touched_rows(start, bin_size, points, first_j.to(tl.float32), bins, width.to(tl.float32))
    end = tl.where(image < images, end, 0)
    # Loads of 16 bytes begin and end at multiples of 8 elements, or of 4.
    first = first // 8 * 8
    end = tl.cdiv(end, 8) * 8
    pitch_x = multiple(pitch_x, 4)
    columns_ptr += box * bins_x * pitch_x

    stride_b, stride_y = multiple(stride_b, ALIGN), multiple(stride_y, ALIGN)
    if LAYOUT == "nchw":
        stride_x, stride_c = 1, multiple(stride_c, ALIGN)
        width = multiple(width, ALIGN)
    elif LAYOUT == "nhwc":
        stride_x, stride_c = multiple(stride_x, ALIGN), 1
        channels = multiple(channels, ALIGN)
    input_ptr += tl.where(image < images, image, 0).to(tl.int64) * stride_b
    channel_ptrs = input_ptr + c.to(tl.int64)[:, None] * stride_c

    for i in range(first_i, tl.minimum(first_i + BINS, bins_y)):
        line = box * bins_y + i
        length = tl.load(row_count_ptr + line)
        result = tl.zeros((BLOCK_C, BLOCK_J), tl.float32)
        for begin in range(first, end, BLOCK_X):
            x = begin + tl.arange(0, BLOCK_X)
            weights_x = tl.load(
                columns_ptr + j[None, :] * pitch_x + x[:, None],
                mask=(x < pitch_x)[:, None] & (j < bins_x)[None, :],
                other=0.0,
            )
            mask = (c < channels)[:, None] & ((x < end) & (x < width))[None, :]
            if LAYOUT == "nhwc":
                # A column is a load of its own: those between the samples of large bins need none.
                mask &= (tl.max(tl.abs(weights_x), axis=1) != 0)[None, :]
            ptrs = channel_ptrs + x.to(tl.int64)[None, :] * stride_x
            weighted = tl.zeros((BLOCK_C, BLOCK_X), tl.float32)
            for entry in range(0, length, UNROLL):
                for offset in tl.static_range(UNROLL):
                    place = line * pitch_y + entry + offset
                    weight = tl.load(rows_ptr + place)
                    row = tl.load(row_index_ptr + place).to(tl.int64)
                    # As a block: Triton's interpreter cannot broadcast the outcome of a scalar comparison.
                    used = weight + tl.zeros((1, 1), tl.float32) != 0
                    values = tl.load(ptrs + row * stride_y, mask=mask & used, other=0.0)
                    weighted += weight * values.to(tl.float32)
            result = _dot(weighted, weights_x, result, PRECISION)
        tl.store(
            output_ptr + ((box * channels + c)[:, None] * bins_y + i) * bins_x + j[None, :],
            result.to(output_ptr.dtype.element_ty),
            mask=(c < channels)[:, None] & (j < bins_x)[None, :],
        )


@triton.jit
def _touching_bins(start, bin_size, bins, first_row, block: tl.constexpr):
    """First and one past the last bin of which a sample may touch the `block` rows from `first_row` on.

    A sample touches the rows within 1 of it. A hundredth of a row and of a bin more covers the rounding.
    """
    length = tl.where(bin_size == 0, 1.0, bin_size)
    low = tl.div_rn(first_row.to(tl.float32) - 1.01 - start, length)
    high = tl.div_rn((first_row + block).to(tl.float32) + 0.01 - start, length)
    first = within(tl.floor(tl.minimum(low, high) - 0.01), bins)
    end = within(tl.floor(tl.maximum(low, high) + 0.01) + 1, bins)
    # Bins of no size all lie on one point.
    return tl.where(bin_size == 0, 0, first), tl.where(bin_size == 0, bins.to(tl.int32), end)


@triton.jit(
    do_not_specialize=[
        "count",
        "tiles",
        "tiles_x",
        "height",
        "width",
        "bins_y",
        "bins_x",
        "spatial_scale",
        "sampling_ratio",
    ],
    do_not_specialize_on_alignment=["boxes_ptr"],
)
def _tile_lists_kernel(
    boxes_ptr,
    order_ptr,
    offsets_ptr,
    lists_ptr,
    lengths_ptr,
    count,
    tiles,
    tiles_x,
    height,
    width,
    bins_y,
    bins_x,
    spatial_scale,
    sampling_ratio,
    ALIGNED: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (picture, tile of the map): the picture's boxes that touch the tile, in order.

    lists (5, tiles, K): box, first bin row that touches the tile, one past the last, and so for bin columns;
    those of picture b from offsets[b] on, lengths[b, tile] of them. Reads 24·K_b bytes, L2 hits, some 200
    operations a box and tile. With tiles of 8x32 500 programs of two steps: the time of a launch.
    """
    program = tl.program_id(0)
    tile = program % tiles
    y = tile // tiles_x * BLOCK_Y
    x = tile % tiles_x * BLOCK_X
    begin = tl.load(offsets_ptr + program // tiles)
    end = tl.load(offsets_ptr + program // tiles + 1)
    rows, columns = height.to(tl.float32), width.to(tl.float32)
    bins_y, bins_x = bins_y.to(tl.float32), bins_x.to(tl.float32)
    ratio = sampling_ratio.to(tl.float32)
    array = tiles.to(tl.int64) * count
    lists_ptr += tile.to(tl.int64) * count + begin
    length = 0
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        box = tl.load(order_ptr + place, mask=place < end, other=0)
        side_ptrs = boxes_ptr + box.to(tl.int64) * 5
        left = tl.load(side_ptrs + 1, mask=place < end, other=0.0)
        top = tl.load(side_ptrs + 2, mask=place < end, other=0.0)
        right = tl.load(side_ptrs + 3, mask=place < end, other=0.0)
        bottom = tl.load(side_ptrs + 4, mask=place < end, other=0.0)
        start, bin_size, points = box_axis(top, bottom, spatial_scale, bins_y, ratio, ALIGNED)
        first_row, end_row = touched_rows(start, bin_size, points, 0.0, bins_y, rows)
        first_i, end_i = _touching_bins(start, bin_size, bins_y, y, BLOCK_Y)
        start, bin_size, points = box_axis(left, right, spatial_scale, bins_x, ratio, ALIGNED)
        first_column, end_column = touched_rows(start, bin_size, points, 0.0, bins_x, columns)
        first_j, end_j = _touching_bins(start, bin_size, bins_x, x, BLOCK_X)
        touches = (first_row < y + BLOCK_Y) & (end_row > y) & (first_column < x + BLOCK_X) & (end_column > x)
        touches &= (first_i < end_i) & (first_j < end_j) & (place < end)
        list_ptrs = lists_ptr + length + tl.cumsum(touches.to(tl.int32), axis=0) - 1
        tl.store(list_ptrs, box, mask=touches)
        tl.store(list_ptrs + array, first_i, mask=touches)
        tl.store(list_ptrs + 2 * array, end_i, mask=touches)
        tl.store(list_ptrs + 3 * array, first_j, mask=touches)
        tl.store(list_ptrs + 4 * array, end_j, mask=touches)
        length += tl.sum(touches.to(tl.int32), axis=0)
    tl.store(lengths_ptr + program, length)


@triton.jit(
    do_not_specialize=[
        "count",
        "images",
        "channels",
        "height",
        "width",
        "tiles",
        "tiles_x",
        "bins_y",
        "bins_x",
        "pitch_x",
        "pitch_y",
        "stride_k",
        "stride_c",
        "stride_i",
        "stride_j",
    ]
)
def _roi_align_backward_kernel(
    grad_ptr,
    columns_ptr,
    rows_ptr,
    offsets_ptr,
    lists_ptr,
    lengths_ptr,
    result_ptr,
    count,
    images,
    channels,
    height,
    width,
    tiles,
    tiles_x,
    bins_y,
    bins_x,
    pitch_x,
    pitch_y,
    stride_k,
    stride_c,
    stride_i,
    stride_j,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Program (channel block, picture, tile): BLOCK_C x BLOCK_Y x BLOCK_X of the gradient, written once.

    dF[c, y, x] = Σ_k Σ_j (Σ_i w_y[k, i, y] · g[k, c, i, j]) · w_x[k, j, x] over the listed boxes: the inner sum
    in float32 on CUDA cores over the bin rows that touch the tile, the outer a matmul
    (BLOCK_Y·BLOCK_C x BLOCK_J) · (BLOCK_J x BLOCK_X) into the tile's accumulator.

    With n pairs of box and tile, i bin rows and j bin columns a pair, each pair reads its weights once for every
    channel block, 4·C/BLOCK_C·(j·BLOCK_X + i·BLOCK_Y) bytes, and C·i·j elements of g, all from L2 but the first
    time, and takes 2·C·BLOCK_Y·BLOCK_J·i operations on CUDA cores and 2·C·BLOCK_Y·BLOCK_J·BLOCK_X in the
    matmul. Memory gets dF once and gives g once; the weights are in L2 from the kernel before.

    Tiles of 8x32: n = 2,032, i = 3.4, j = 5.2; from L2 25 MB of weights and 19 MB of g in 16 bits, 38 in
    float32. 0.46 GFLOP on CUDA cores are 7 us; 4.3 in the matmul are 9 us in tf32 and 26 in tf32x3. Most of
    the matmul is padding, from 5 bins to 16 and from some 10 columns to 32. Memory: 62 MB of dF and 13 of g in
    16 bits are 22 us, 150 MB in float32 45 us. The larger of the two is 22 us in bfloat16 (memory), 26 in
    float16 (matmul) and 45 in float32 (memory).

    With large boxes n = 18,700, i = 1.8, j = 2.6: the matmul bounds every dtype, 39 GFLOP, 79 us in bfloat16
    and 238 in the others; 2.1 GFLOP on CUDA cores are 32 us, from L2 come 116 MB of weights and 43 of g.
    """
    program = tl.program_id(0)
    image_tile = program % (images * tiles)
    image = image_tile // tiles
    tile = image_tile % tiles
    first_c = program // (images * tiles) * BLOCK_C
    first_y = tile // tiles_x * BLOCK_Y
    first_x = tile % tiles_x * BLOCK_X
    c = first_c + tl.arange(0, BLOCK_C)
    y = first_y + tl.arange(0, BLOCK_Y)
    x = first_x + tl.arange(0, BLOCK_X)
    grad_ptrs = grad_ptr + c.to(tl.int64)[:, None] * stride_c
    stride_i = stride_i.to(tl.int64)
    pitch_x = multiple(pitch_x, 4)
    array = tiles.to(tl.int64) * count
    lists_ptr += tile.to(tl.int64) * count + tl.load(offsets_ptr + image)

    acc = tl.zeros((BLOCK_Y * BLOCK_C, BLOCK_X), tl.float32)
    for entry in range(tl.load(lengths_ptr + image_tile)):
        box = tl.load(lists_ptr + entry).to(tl.int64)
        first_i = tl.load(lists_ptr + array + entry)
        end_i = tl.load(lists_ptr + 2 * array + entry)
        first_j = tl.load(lists_ptr + 3 * array + entry)
        end_j = tl.load(lists_ptr + 4 * array + entry)
        for block_j in range(first_j, end_j, BLOCK_J):
            j = block_j + tl.arange(0, BLOCK_J)
            weights_x = tl.load(
                columns_ptr + box * bins_x * pitch_x + j[:, None] * pitch_x + x[None, :],
                mask=(j < end_j)[:, None] & (x < pitch_x)[None, :],
                other=0.0,
            )
            weighted = tl.zeros((BLOCK_Y, BLOCK_C, BLOCK_J), tl.float32)
            for i in range(first_i, end_i):
                weights_y = tl.load(rows_ptr + (box * bins_y + i) * pitch_y + y, mask=y < height, other=0.0)
                bins = tl.load(
                    grad_ptrs + box * stride_k + i * stride_i + j.to(tl.int64)[None, :] * stride_j,
                    mask=(c < channels)[:, None] & (j < end_j)[None, :],
                    other=0.0,
                )
                weighted += weights_y[:, None, None] * bins.to(tl.float32)[None, :, :]
            weighted = tl.reshape(weighted, (BLOCK_Y * BLOCK_C, BLOCK_J))
            acc = _dot(weighted, weights_x, acc, PRECISION)

    line = tl.arange(0, BLOCK_Y * BLOCK_C)
    line_y, line_c = first_y + line // BLOCK_C, first_c + line % BLOCK_C
    plane = (image * channels + line_c).to(tl.int64) * height + line_y
    tl.store(
        result_ptr + plane[:, None] * width + x[None, :],
        acc.to(result_ptr.dtype.element_ty),
        mask=(line_y < height)[:, None] & (line_c < channels)[:, None] & (x < width)[None, :],
    )


def _forward_config(block_c: int, block_x: int, block_j: int, bins: int, num_warps: int) -> Config:
    blocks = (("BLOCK_C", block_c), ("BLOCK_X", block_x), ("BLOCK_J", block_j), ("BINS", bins))
    return Config(blocks, num_warps, 1)


def _forward_tile(target: Target, dtype: torch.dtype, block_c: int, run: int, bins: int) -> Config:
    """Runs of `run` bytes, one load of 16 bytes a thread: with two, four rows in flight spill on sm_80."""
    return _forward_config(block_c, run // dtype.itemsize, 16, bins, block_c * run // 16 // target.warp_size)


def _forward_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _forward_config(4, 8, 4, 2, 1)
    # A program that serves a whole box works out its columns once; few boxes are spread over bin rows.
    boxes = count * triton.cdiv(sizes["channels"], 64)
    bins = sizes["output_height"] if boxes >= 4 * target.multiprocessors else 1
    return _forward_tile(target, dtype, 64, 64, bins)


def _forward_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterator[Config]:
    for (block_c, run), bins in product(
        ((32, 64), (64, 64), (32, 128)), dict.fromkeys((1, sizes["output_height"]))
    ):
        yield _forward_tile(target, dtype, block_c, run, bins)


def _forward_shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Both operands of the matmul, each in two parts for tf32x3, and 1 KB of the compiler's."""
    blocks = dict(config.blocks)
    return 8 * blocks["BLOCK_X"] * (blocks["BLOCK_C"] + blocks["BLOCK_J"]) + 1024


def _backward_config(block_c: int, block_y: int, block_x: int, block_j: int, num_warps: int) -> Config:
    blocks = (("BLOCK_C", block_c), ("BLOCK_Y", block_y), ("BLOCK_X", block_x), ("BLOCK_J", block_j))
    return Config(blocks, num_warps, 1)


def _backward_tile(target: Target, block_c: int, block_y: int, block_x: int) -> Config:
    """32 sums a thread: with 64, or from 512 threads on, it spills."""
    threads = block_c * block_y * block_x // 32
    return _backward_config(block_c, block_y, block_x, 16, threads // target.warp_size)


def _backward_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _backward_config(4, 4, 8, 4, 1)
    # Less padding than with 8x64: 4.3 GFLOP of matmul for 7.2, and 25 MB of weights for 44.
    return _backward_tile(target, 16, 8, 32)


def _backward_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterator[Config]:
    for block_c, block_y, block_x in ((16, 8, 32), (16, 8, 64), (16, 16, 32), (32, 4, 32), (32, 8, 32)):
        yield _backward_tile(target, block_c, block_y, block_x)


def _backward_shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Both operands of the matmul, each in two parts for tf32x3, or the tile on its way to rows of memory."""
    blocks = dict(config.blocks)
    lines = blocks["BLOCK_Y"] * blocks["BLOCK_C"]
    operands = 2 * blocks["BLOCK_J"] * (lines + blocks["BLOCK_X"])
    return 4 * max(operands, lines * blocks["BLOCK_X"]) + 1024


FORWARD = Space("roi_align", _forward_heuristic, _forward_candidates, _forward_shared_memory)
BACKWARD = Space("roi_align_backward", _backward_heuristic, _backward_candidates, _backward_shared_memory)
