"""Pooled RoIAlign of several levels as one matrix product, forward and backward.

out[k, c] = Σ_y a_y[k, y] · Σ_x a_x[k, x] · F[c, y, x] for every level; `pooled_slots` makes a_y and a_x. Four
launches: boxes by picture, weights, product, and the sum of partial products where one program a tile would
leave multiprocessors idle. Every sum has one fixed order.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.feature_layout import feature_layout
from mgllava_kernels._triton.launch import Target, half, launch, multiple, odd, target_of
from mgllava_kernels._triton.pooled_slots import Samples, fill_slots
from mgllava_kernels._triton.precision import interpolation_precision
from mgllava_kernels.configs import Config, Sizes, Space, choose

# float16 weights are multiplied by this before they are rounded: 1 / (H · W) is subnormal there.
FLOAT16_SCALE = 2.0**15
# Elements of the output that a program of the partial sums computes.
BLOCK_SUM = 1024

Shape = Sequence[int]


def pooled_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Arguments and result as of the function of this name in `mgllava_kernels._torch.roi_align`.

    Features float32, float16 or bfloat16 of any strides; boxes (K, 5) float32.
    """
    images, dtype, device = features[0].shape[0], features[0].dtype, boxes.device
    shapes = [level.shape for level in features]
    channels = sum(shape[1] for shape in shapes)
    output = torch.empty(len(boxes), channels, dtype=dtype, device=device)
    if output.numel() == 0:
        return output
    target = target_of(device)
    config = choose(FORWARD, target, dtype, _sizes(shapes), triton.cdiv(len(boxes), max(images, 1)))
    blocks = dict(config.blocks)
    waves = blocks.pop("WAVES")
    samples = Samples(spatial_scale, output_height, output_width, sampling_ratio, aligned)
    slots = fill_slots(boxes, shapes, samples, blocks)
    parts = _parts(shapes, len(boxes), config, waves * target.multiprocessors)
    splits = [part.rows * part.columns for part in parts]
    partial_sizes = [
        len(boxes) * shape[1] * split if split > 1 else 0 for shape, split in zip(shapes, splits, strict=True)
    ]
    partials = torch.empty(sum(partial_sizes), dtype=torch.float32, device=device)
    layout, align = feature_layout(features)
    launch(
        _product_kernel,
        slots.number
        * sum(_tiles(shape, blocks) * split for shape, split in zip(shapes, splits, strict=True)),
        device,
        (
            tuple(features),
            tuple(
                odd(*shape[1:], *level.stride(), part.height, part.width)
                for level, shape, part in zip(features, shapes, parts, strict=True)
            ),
            *(*slots[1:5], output, partials, slots.number, images, len(boxes), channels),
        ),
        LAYOUT=layout,
        ALIGN=align,
        ALIGN_BYTES=align * dtype.itemsize,
        ALIGN_C=_channel_alignment(dtype, shapes),
        SCALE=FLOAT16_SCALE if dtype == torch.float16 else 1.0,
        PRECISION=_precision(dtype, target),
        **blocks,
        **_register_limit(target, dtype, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    launch(
        _sum_partials_kernel,
        sum(
            triton.cdiv(len(boxes) * shape[1], BLOCK_SUM)
            for shape, split in zip(shapes, splits, strict=True)
            if split > 1
        ),
        device,
        (
            *(partials, output, len(boxes), channels),
            tuple(odd(shape[1], split) for shape, split in zip(shapes, splits, strict=True)),
        ),
        BLOCK=BLOCK_SUM,
        num_warps=4,
    )
    return output


def pooled_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    shapes: Sequence[Shape],
    levels: Sequence[int],
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """Gradients (B, C, H, W), contiguous, of those `levels` alone; arguments as of the torch path."""
    device, dtype = grad.device, grad.dtype
    results = [torch.empty(tuple(shapes[level]), dtype=dtype, device=device) for level in levels]
    if not any(result.numel() for result in results):
        return results
    if grad.numel() == 0:
        return [result.zero_() for result in results]
    images = shapes[0][0]
    target = target_of(device)
    config = choose(BACKWARD, target, dtype, _sizes(shapes), triton.cdiv(len(boxes), images))
    blocks = dict(config.blocks)
    samples = Samples(spatial_scale, output_height, output_width, sampling_ratio, aligned)
    slots = fill_slots(boxes, shapes, samples, blocks)
    grad = grad.contiguous()
    _, align = feature_layout(results)
    launch(
        _transposed_product_kernel,
        images * sum(_map_tiles(shapes[level], blocks) for level in levels),
        device,
        (
            tuple(results),
            tuple(odd(*shape[1:]) for shape in shapes),
            *(grad, slots.weights, slots.rows, slots.offsets, slots.number, images, grad.shape[1]),
        ),
        LEVELS=tuple(levels),
        ALIGN=align,
        ALIGN_C=_channel_alignment(dtype, shapes),
        SCALE=FLOAT16_SCALE if dtype == torch.float16 else 1.0,
        PRECISION=_precision(dtype, target),
        **blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return results


def _precision(dtype: torch.dtype, target: Target) -> str:
    return interpolation_precision(target) if dtype == torch.float32 else "ieee"


def _sizes(shapes: Sequence[Shape]) -> Sizes:
    """What a model fixes: the key of a tuned table."""
    return {
        f"{axis}{level}": shape[i]
        for level, shape in enumerate(shapes)
        for i, axis in ((1, "C"), (2, "H"), (3, "W"))
    }


def _tiles(shape: Shape, blocks: dict[str, int]) -> int:
    """Programs of one slot that share no rows of the map."""
    return triton.cdiv(shape[1], blocks["BLOCK_C"])


def _map_tiles(shape: Shape, blocks: dict[str, int]) -> int:
    """Programs of the backward pass for one picture."""
    _, channels, height, width = shape
    across = triton.cdiv(channels, blocks["BLOCK_C"]) * triton.cdiv(width, blocks["BLOCK_X"])
    return across * triton.cdiv(height, blocks["ROWS"])


class Part(NamedTuple):
    """How a level is split: into `rows` times `columns` parts of `height` rows and `width` times BLOCK_X columns."""

    rows: int
    columns: int
    height: int
    width: int


def _parts(shapes: Sequence[Shape], boxes: int, config: Config, programs: int) -> list[Part]:
    """Parts of each level, so that `programs` programs have about equal work.

    A program needs at least 16 steps of a row and BLOCK_X columns to earn the tile of partial sums it writes.
    Columns are split first: a program loads their weights once.
    """
    blocks = dict(config.blocks)
    slots = max(shapes[0][0], triton.cdiv(boxes, blocks["BLOCK_K"]))
    across = [triton.cdiv(shape[3], blocks["BLOCK_X"]) for shape in shapes]
    steps = sum(
        _tiles(shape, blocks) * slots * shape[2] * columns
        for shape, columns in zip(shapes, across, strict=True)
    )
    wanted = max(16, triton.cdiv(steps, programs))
    parts = []
    for shape, columns in zip(shapes, across, strict=True):
        number = max(1, round(shape[2] * columns / wanted))
        blocks_wide = triton.cdiv(columns, min(number, columns))
        columns = triton.cdiv(columns, blocks_wide)
        height = triton.cdiv(shape[2], max(1, round(number / columns)))
        rows = triton.cdiv(shape[2], height)
        parts.append(Part(rows, columns, height, blocks_wide))
    return parts


def _channel_alignment(dtype: torch.dtype, shapes: Sequence[Shape]) -> int:
    """Elements by which every level's channels are aligned in a row of the output, at most 16 bytes."""
    return math.gcd(16 // dtype.itemsize, *(shape[1] for shape in shapes))


def _register_limit(target: Target, dtype: torch.dtype, config: Config) -> dict[str, int]:
    """Registers of a thread, where the assembler's own choice is worse.

    On sm_90 with 16 bits it takes 165, and one program of eight warps fills a multiprocessor; two run with
    128, without a spill. On sm_100 it spills a few to make room for a third.
    """
    hopper = target.capability == 90 and dtype.itemsize == 2
    blackwell = target.capability >= 100 and dict(config.blocks)["BLOCK_K"] < 128
    return {"maxnreg": 128} if config.num_warps == 8 and (hopper or blackwell) else {}


@triton.jit
def _level_range(first, last, size, fine_size):
    """Rows of a level of `size` that rows [first, last) of the finest grid read when upsampled."""
    ratio = size.to(tl.float32) / fine_size.to(tl.float32)
    low = tl.floor((first.to(tl.float32) + 0.5) * ratio - 0.5).to(tl.int32) - 1
    high = tl.floor((last.to(tl.float32) - 0.5) * ratio - 0.5).to(tl.int32) + 3
    return tl.maximum(low, 0), tl.minimum(high, size)


@triton.jit(do_not_specialize=["slots", "images", "count", "out_channels"])
def _product_kernel(
    features,
    numbers,
    weights_ptr,
    rows_ptr,
    images_ptr,
    spans_ptr,
    out_ptr,
    partials_ptr,
    slots,
    images,
    count,
    out_channels,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    ALIGN_C: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Vectors of the boxes of one slot, BLOCK_C channels of one level, over one part of the level.

    For each row y of the map one product F[:, y, :] (BLOCK_C, BLOCK_X) · a_x (BLOCK_X, BLOCK_K), scaled by a_y
    as it is added to the accumulator. a_x stays in shared memory while y runs: of P = a_y ⊗ a_x only one
    factor is rounded to the features' dtype, and nothing is rebuilt. Only rows and columns that a box of the
    slot touches are read. `numbers` holds for each level C, H, W, the four strides and the height of a
    part and its width in blocks.

    Bytes: the maps once for each slot of a picture, Σ_l B·C_l·H_l·W_l·itemsize where a picture's boxes fill at
    most one slot; 26.5 MB a picture in bfloat16 at published sizes. FLOPs: 2·K·Σ C_l·H_l·W_l, 2.7 GFLOP for a
    picture with 100 boxes. On 4.3 TB/s and 600 TFLOP/s that is a floor of 6.2 µs a picture, set by the bytes;
    in float32, with three products of tf32 for one, 12.3 µs for the bytes and 16 for the products on
    500 TFLOP/s. A slot fuller than half wastes less than half of the products.
    """
    slot = tl.program_id(0) % slots
    tile = tl.program_id(0) // slots
    image = tl.load(images_ptr + slot)
    if image < 0:
        return

    address = features[0].to(tl.int64)
    channels = half(numbers[0][0])
    height = half(numbers[0][1])
    width = half(numbers[0][2])
    stride_b = half(numbers[0][3]).to(tl.int64)
    stride_c = half(numbers[0][4]).to(tl.int64)
    stride_y = half(numbers[0][5]).to(tl.int64)
    stride_x = half(numbers[0][6]).to(tl.int64)
    part_height = half(numbers[0][7])
    part_width = half(numbers[0][8]) * BLOCK_X
    fine_height = height
    fine_width = width
    tile_begin = 0
    channel_begin = 0
    position = 0
    partial_begin = tl.zeros((), tl.int64)
    next_tile = tl.cdiv(channels, BLOCK_C) * tl.cdiv(height, part_height) * tl.cdiv(width, part_width)
    next_partial = _partial_size(channels, tl.cdiv(height, part_height) * tl.cdiv(width, part_width), count)
    next_channel = channels
    next_position = tl.cdiv(height, BLOCK_P) * BLOCK_P + tl.cdiv(width, BLOCK_X) * BLOCK_X
    for level in tl.static_range(1, len(features)):
        if tile >= next_tile:
            address = features[level].to(tl.int64)
            channels = half(numbers[level][0])
            height = half(numbers[level][1])
            width = half(numbers[level][2])
            stride_b = half(numbers[level][3]).to(tl.int64)
            stride_c = half(numbers[level][4]).to(tl.int64)
            stride_y = half(numbers[level][5]).to(tl.int64)
            stride_x = half(numbers[level][6]).to(tl.int64)
            part_height = half(numbers[level][7])
            part_width = half(numbers[level][8]) * BLOCK_X
            tile_begin = next_tile
            channel_begin = next_channel
            position = next_position
            partial_begin = next_partial
            next_tile += (
                tl.cdiv(channels, BLOCK_C) * tl.cdiv(height, part_height) * tl.cdiv(width, part_width)
            )
            next_channel += channels
            next_position += tl.cdiv(height, BLOCK_P) * BLOCK_P + tl.cdiv(width, BLOCK_X) * BLOCK_X
            next_partial += _partial_size(
                channels, tl.cdiv(height, part_height) * tl.cdiv(width, part_width), count
            )
    column_position = position + tl.cdiv(height, BLOCK_P) * BLOCK_P

    feature_ptr = tl.multiple_of(address.to(features[0].dtype), ALIGN_BYTES)
    stride_b = multiple(stride_b, ALIGN)
    stride_y = multiple(stride_y, ALIGN)
    if LAYOUT == "nchw":
        stride_x = 1
        stride_c = multiple(stride_c, ALIGN)
        width = multiple(width, ALIGN)
    elif LAYOUT == "nhwc":
        stride_c = 1
        stride_x = multiple(stride_x, ALIGN)
        channels = multiple(channels, ALIGN)

    channel_blocks = tl.cdiv(channels, BLOCK_C)
    part = (tile - tile_begin) // channel_blocks
    channel = (tile - tile_begin) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row_low, row_high = _level_range(
        tl.load(spans_ptr + slot * 4), tl.load(spans_ptr + slot * 4 + 1), height, fine_height
    )
    part_columns = tl.cdiv(width, part_width)
    row_low = tl.maximum(row_low, part // part_columns * part_height)
    row_high = tl.minimum(row_high, part // part_columns * part_height + part_height)
    row_high = tl.where(image < images, row_high, row_low)
    column_low, column_high = _level_range(
        tl.load(spans_ptr + slot * 4 + 2), tl.load(spans_ptr + slot * 4 + 3), width, fine_width
    )
    column_low = multiple(tl.maximum(column_low, part % part_columns * part_width), BLOCK_X)
    column_high = tl.minimum(column_high, part % part_columns * part_width + part_width)

    k = tl.arange(0, BLOCK_K)
    x = tl.arange(0, BLOCK_X)
    weight_stride = slots * BLOCK_K
    weights_ptr += slot * BLOCK_K
    feature_ptr += image * stride_b + row_low * stride_y
    accumulator = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for first_x in range(column_low, column_high, BLOCK_X):
        weight_ptr = weights_ptr + (column_position + first_x).to(tl.int64) * weight_stride
        weight_x = tl.load(weight_ptr + x[:, None] * weight_stride + k[None, :]) * SCALE
        weight_x = weight_x.to(feature_ptr.dtype.element_ty)
        column = first_x + x
        inside = (channel[:, None] < channels) & (column[None, :] < width)
        feature = feature_ptr + channel[:, None] * stride_c + column[None, :] * stride_x
        weight_y_ptr = weights_ptr + (position + row_low).to(tl.int64) * weight_stride + k
        for _ in range(row_low, row_high):
            weight_y = tl.load(weight_y_ptr)
            values = tl.load(feature, mask=inside, other=0.0)
            accumulator += weight_y[None, :] * tl.dot(values, weight_x, input_precision=PRECISION)
            feature += stride_y
            weight_y_ptr += weight_stride
    accumulator *= 1.0 / SCALE

    box = tl.load(rows_ptr + slot * BLOCK_K + k).to(tl.int64)[None, :]
    channels = multiple(channels, ALIGN_C)
    channel_begin = multiple(channel_begin, ALIGN_C)
    store = (box >= 0) & (channel[:, None] < channels)
    if (part_height >= height) & (part_width >= width):
        out = out_ptr + box * multiple(out_channels, ALIGN_C) + channel_begin + channel[:, None]
        tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=store)
    else:
        partial = (
            partials_ptr + multiple(partial_begin, ALIGN_C) + (part.to(tl.int64) * count + box) * channels
        )
        tl.store(partial + channel[:, None], accumulator, mask=store)


@triton.jit
def _partial_size(channels, parts, count):
    """Partial sums of a level, in elements: none where it is one part."""
    return tl.where(parts > 1, parts.to(tl.int64) * count * channels, 0)


@triton.jit(do_not_specialize=["count", "out_channels"])
def _sum_partials_kernel(partials_ptr, out_ptr, count, out_channels, numbers, BLOCK: tl.constexpr):
    """out[k, c] = Σ_s partials[s, k, c] in the order of s, for the levels in parts.

    `numbers` holds C and the number of parts of each level. Bytes: 4·K·Σ S_l·C_l read, 10 MB for 8 pictures
    with 100 boxes at published sizes, most of it still in the cache; FLOPs: as many as elements read.
    """
    tile = tl.program_id(0)
    channels = 1
    parts = 0
    tile_begin = 0
    channel_begin = 0
    partial_begin = tl.zeros((), tl.int64)
    next_tile = 0
    next_channel = 0
    next_partial = tl.zeros((), tl.int64)
    for level in tl.static_range(len(numbers)):
        level_channels = half(numbers[level][0])
        level_parts = half(numbers[level][1])
        split = (level_parts > 1) & (level_channels > 0)
        elements = count.to(tl.int64) * level_channels
        inside = split & (tile >= next_tile)
        channels = tl.where(inside, level_channels, channels)
        parts = tl.where(inside, level_parts, parts)
        tile_begin = tl.where(inside, next_tile, tile_begin)
        channel_begin = tl.where(inside, next_channel, channel_begin)
        partial_begin = tl.where(inside, next_partial, partial_begin)
        next_tile += tl.where(split, tl.cdiv(elements, BLOCK), 0).to(tl.int32)
        next_channel += level_channels
        next_partial += tl.where(split, elements * level_parts, 0)
    elements = count.to(tl.int64) * channels
    element = (tile - tile_begin).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    total = tl.zeros((BLOCK,), tl.float32)
    partial = partials_ptr + partial_begin + element
    for _ in range(parts):
        total += tl.load(partial, mask=inside, other=0.0)
        partial += elements
    out = out_ptr + element // channels * out_channels + channel_begin + element % channels
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slots", "images", "grad_channels"])
def _transposed_product_kernel(
    results,
    numbers,
    grad_ptr,
    weights_ptr,
    rows_ptr,
    offsets_ptr,
    slots,
    images,
    grad_channels,
    LEVELS: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of one tile of one level of one picture: Pᵀ · grad over the picture's slots, in their order.

    P = a_y ⊗ a_x is built in registers for each row of the tile; no element of the gradient is written twice.
    `numbers` holds C, H and W of every level, `results` the gradients of LEVELS.

    Bytes written: each gradient once, Σ C_l·H_l·W_l·itemsize a picture, 26.5 MB in bfloat16 at published sizes.
    Read, from the cache: the incoming gradient and the columns' weights of the picture's boxes once for each
    tile of ROWS rows where they fill one slot, else once for each row; with 100 boxes in two slots of 64 that
    is 6 bytes for each byte written. FLOPs as of the product. On 4.3 TB/s the floor of what is written is
    6.2 µs a picture.
    """
    image = tl.program_id(0) % images
    tile = tl.program_id(0) // images
    result_ptr = results[0]
    channels = half(numbers[LEVELS[0]][0])
    height = half(numbers[LEVELS[0]][1])
    width = half(numbers[LEVELS[0]][2])
    channel_begin = 0
    position = 0
    tile_begin = 0
    next_tile = 0
    next_channel = 0
    next_position = 0
    for level in tl.static_range(len(numbers)):
        level_channels = half(numbers[level][0])
        level_height = half(numbers[level][1])
        level_width = half(numbers[level][2])
        for i in tl.static_range(len(results)):
            if LEVELS[i] == level:
                if tile >= next_tile:
                    result_ptr = results[i]
                    channels = level_channels
                    height = level_height
                    width = level_width
                    channel_begin = next_channel
                    position = next_position
                    tile_begin = next_tile
                next_tile += (
                    tl.cdiv(level_channels, BLOCK_C)
                    * tl.cdiv(level_width, BLOCK_X)
                    * tl.cdiv(level_height, ROWS)
                )
        next_channel += level_channels
        next_position += tl.cdiv(level_height, BLOCK_P) * BLOCK_P + tl.cdiv(level_width, BLOCK_X) * BLOCK_X
    column_position = position + tl.cdiv(height, BLOCK_P) * BLOCK_P
    width = multiple(width, ALIGN)
    channels = multiple(channels, ALIGN_C)
    channel_begin = multiple(channel_begin, ALIGN_C)
    grad_channels = multiple(grad_channels, ALIGN_C)

    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(width, BLOCK_X)
    tile -= tile_begin
    channel = tile % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first_x = tile // channel_blocks % column_blocks * BLOCK_X
    first_y = tile // channel_blocks // column_blocks * ROWS

    offset = tl.load(offsets_ptr + image)
    first_row = (offset // BLOCK_K + image) * BLOCK_K
    last_row = first_row + tl.load(offsets_ptr + image + 1) - offset
    k = tl.arange(0, BLOCK_K)
    x = tl.arange(0, BLOCK_X)
    weight_stride = slots * BLOCK_K
    weight_x_ptr = weights_ptr + (column_position + first_x).to(tl.int64) * weight_stride
    weight_x_ptr = weight_x_ptr + x[:, None] * weight_stride + k[None, :]
    inside = (first_x + x[:, None] < width) & (channel[None, :] < channels)
    result = result_ptr + (image * channels.to(tl.int64) + channel[None, :]) * height * width
    result += first_y.to(tl.int64) * width + first_x + x[:, None]
    weight_y_ptr = weights_ptr + (position + first_y).to(tl.int64) * weight_stride + k
    last_y = tl.minimum(first_y + ROWS, height)
    if last_row <= first_row + BLOCK_K:
        # One slot, or none, whose weights nobody wrote: what does not depend on the row stays where it is.
        known = first_row + k < last_row
        grads = _slot_grads(
            grad_ptr, rows_ptr + first_row + k, channel_begin + channel, channel < channels, grad_channels
        )
        weight_x = tl.load(weight_x_ptr + first_row, mask=known[None, :], other=0.0) * SCALE
        for _ in range(first_y, last_y):
            weight_y = tl.load(weight_y_ptr + first_row, mask=known, other=0.0)
            weight = (weight_x * weight_y[None, :]).to(grads.dtype)
            values = tl.dot(weight, grads, input_precision=PRECISION) * (1.0 / SCALE)
            tl.store(result, values.to(result_ptr.dtype.element_ty), mask=inside)
            result += width
            weight_y_ptr += weight_stride
    else:
        for _ in range(first_y, last_y):
            accumulator = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
            for row in range(first_row, last_row, BLOCK_K):
                grads = _slot_grads(
                    grad_ptr, rows_ptr + row + k, channel_begin + channel, channel < channels, grad_channels
                )
                weight = tl.load(weight_x_ptr + row) * (tl.load(weight_y_ptr + row) * SCALE)[None, :]
                accumulator = tl.dot(weight.to(grads.dtype), grads, accumulator, input_precision=PRECISION)
            values = accumulator * (1.0 / SCALE)
            tl.store(result, values.to(result_ptr.dtype.element_ty), mask=inside)
            result += width
            weight_y_ptr += weight_stride


@triton.jit
def _slot_grads(grad_ptr, rows_ptr, columns, inside, grad_channels):
    """Incoming gradients (BLOCK_K, BLOCK_C) of a slot's boxes; zero for rows without one."""
    box = tl.load(rows_ptr).to(tl.int64)[:, None]
    return tl.load(
        grad_ptr + box * grad_channels + columns[None, :], mask=(box >= 0) & inside[None, :], other=0.0
    )


def _forward_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    """As many rows as a picture has boxes, up to 128: a second slot reads the maps again."""
    if target.backend == "interpreter":
        return _forward_config(32, 32, 16, 16, 4, 4, 1)
    rows = _slot_rows(count, 128)
    columns = 64 if dtype.itemsize == 2 else 32
    warps = 8 if rows > 16 or target.capability >= 100 else 4
    return _forward_config(rows, 64, columns, 8, 4, warps, 3)


def _backward_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _backward_config(32, 32, 16, 16, 3, 4, 1)
    # More spill on sm_100, on AMD and, of float32, on sm_80.
    most = 64 if target.capability in (80, 86, 89, 90) or target.backend == "interpreter" else 32
    rows = _slot_rows(count, most) if dtype.itemsize == 2 else 16
    return _backward_config(rows, 64, 64, 8, 8, 4, 2)


def _slot_rows(count: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(count)))


def _forward_config(*numbers: int) -> Config:
    """Boxes of a slot; channels, columns and weight positions of a program; WAVES; warps, stages.

    WAVES programs are made for each multiprocessor, as far as there is work.
    """
    names = ("BLOCK_K", "BLOCK_C", "BLOCK_X", "BLOCK_P", "WAVES")
    return Config(tuple(zip(names, numbers[:5], strict=True)), *numbers[5:])


def _backward_config(*numbers: int) -> Config:
    """Boxes of a slot; channels, columns, weight positions and rows of a program; warps, stages."""
    names = ("BLOCK_K", "BLOCK_C", "BLOCK_X", "BLOCK_P", "ROWS")
    return Config(tuple(zip(names, numbers[:5], strict=True)), *numbers[5:])


def _forward_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    rows = _slot_rows(count, 128)
    columns = (32, 64) if dtype.itemsize == 2 else (16, 32)
    choices = sorted({rows, max(16, rows // 2)}), (64, 128), columns, (8,), (2, 4, 8), (4, 8), (2, 3, 4)
    return (_forward_config(*choice) for choice in product(*choices))


def _backward_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    most = _slot_rows(count, 128 if dtype.itemsize == 2 else 32)
    choices = sorted({most, max(16, most // 2)}), (64, 128), (32, 64), (8,), (4, 8, 16), (4, 8), (2, 3)
    return (_backward_config(*choice) for choice in product(*choices))


def _forward_shared_memory(config: Config, dtype: torch.dtype) -> int:
    """A tile of the map for every stage beside the column weights, or the tile of the output."""
    blocks = dict(config.blocks)
    stages = config.num_stages * blocks["BLOCK_C"] * blocks["BLOCK_X"]
    loop = (stages + blocks["BLOCK_K"] * blocks["BLOCK_X"]) * dtype.itemsize
    return max(loop, 4 * blocks["BLOCK_K"] * blocks["BLOCK_C"])


def _backward_shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Incoming gradients of every stage and weights of all but one, or the tile of the result."""
    blocks = dict(config.blocks)
    grads = config.num_stages * blocks["BLOCK_K"] * blocks["BLOCK_C"] * dtype.itemsize
    weights = max(1, config.num_stages - 1) * 4 * blocks["BLOCK_K"] * (blocks["BLOCK_X"] + 1)
    return max(grads + weights, 4 * blocks["BLOCK_X"] * blocks["BLOCK_C"])


FORWARD = Space("pooled_roi_align", _forward_heuristic, _forward_candidates, _forward_shared_memory)
BACKWARD = Space(
    "pooled_roi_align_backward", _backward_heuristic, _backward_candidates, _backward_shared_memory
)
