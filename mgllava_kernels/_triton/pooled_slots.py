"""Boxes in slots with their axis weights for every level: the left operand of pooled RoIAlign.

A slot is BLOCK_K rows, each a box or nothing, of one picture alone. How many boxes a picture has is known to
the GPU only, so slots lie by a rule that needs no count on the host: with the boxes sorted by picture and
offsets[i] the first of picture i, its slots begin at offsets[i] // BLOCK_K + i. That leaves room for
⌈n_i / BLOCK_K⌉ slots each, K // BLOCK_K + B + 1 in all. Boxes of no picture form a last group.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.axis_weights import (
    box_axis,
    distances,
    row_weight,
    sample_run,
    samples_before,
    upsampling_weight,
)
from mgllava_kernels._triton.box_groups import group_boxes
from mgllava_kernels._triton.launch import half, launch, odd

# Pictures among which a slot's own is looked up at once.
BLOCK_IMAGES = tl.constexpr(128)


class Samples(NamedTuple):
    """Where RoIAlign samples: what boxes are read with."""

    spatial_scale: float
    output_height: int
    output_width: int
    sampling_ratio: int
    aligned: bool


class Slots(NamedTuple):
    """Slots on the device, R = number · BLOCK_K rows.

    Attributes:
        number: slots, empty ones included.
        weights: (positions, R) float32; for each level its rows, padded to BLOCK_P, then its columns, padded
            to BLOCK_X. Zero in the padding and for a row without a box; undefined in empty slots.
        rows: (R,) int32, the box of each row or -1.
        images: (number,) int32, the picture of each slot, B for boxes of no picture, -1 for an empty slot.
        spans: (number, 4) int32, first row, row after the last, first column, column after the last of the
            finest grid that boxes of the slot touch.
        offsets: (B + 2,) int32, as `group_boxes` returns them.
    """

    number: int
    weights: Tensor
    rows: Tensor
    images: Tensor
    spans: Tensor
    offsets: Tensor


def fill_slots(
    boxes: Tensor, shapes: Sequence[Sequence[int]], samples: Samples, blocks: Mapping[str, int]
) -> Slots:
    """Slots of `boxes` (K, 5) float32 for levels of `shapes` (B, C, H, W), the finest first; K > 0.

    Of `blocks`, BLOCK_K is the size of a slot and BLOCK_P the positions a program computes, a divisor of
    BLOCK_X.
    """
    BLOCK_K, BLOCK_P, BLOCK_X = blocks["BLOCK_K"], blocks["BLOCK_P"], blocks["BLOCK_X"]
    if BLOCK_X % BLOCK_P:
        raise ValueError(f"BLOCK_X must be a multiple of BLOCK_P, got {BLOCK_X} and {BLOCK_P}")
    images, _, height, width = shapes[0]
    count = len(boxes) // BLOCK_K + images + 1
    positions = sum(_padded(shape[2], BLOCK_P) + _padded(shape[3], BLOCK_X) for shape in shapes)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=boxes.device)

    order, offsets = group_boxes(boxes, images)
    slots = Slots(
        count,
        empty(positions, count * BLOCK_K, dtype=torch.float32),
        empty(count * BLOCK_K),
        empty(count),
        empty(count, 4),
        offsets,
    )
    scale, bins_y, bins_x, ratio, aligned = samples
    launch(
        _fill_slots_kernel,
        positions // BLOCK_P * count,
        boxes.device,
        (
            *(boxes.contiguous(), order, offsets, *slots[1:5]),
            tuple(odd(*shape[2:]) for shape in shapes),
            *(height, width, count, images, scale, bins_y, bins_x, ratio),
        ),
        ALIGNED=aligned,
        BLOCK_K=BLOCK_K,
        BLOCK_P=BLOCK_P,
        BLOCK_X=BLOCK_X,
        num_warps=8 if BLOCK_K > 64 else 4,  # four spill on sm_100
        # A sample that must lie on an edge lies beside it when sums are contracted.
        enable_fp_fusion=False,
    )
    return slots


def _padded(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


@triton.jit
def slot_image(slot, offsets_ptr, images, BLOCK_K: tl.constexpr):
    """The group of `slot`: a picture, or `images` for the boxes of none."""
    found = 0
    for first in range(0, images + 1, BLOCK_IMAGES):
        image = first + tl.arange(0, BLOCK_IMAGES)
        offset = tl.load(offsets_ptr + image, mask=image <= images, other=0)
        begins = (image <= images) & (offset // BLOCK_K + image <= slot)
        found += tl.sum(begins.to(tl.int32), axis=0)
    return found - 1


@triton.jit
def _touched(low, high, spatial_scale, bins, sampling_ratio, size, ALIGNED: tl.constexpr):
    """First row and row after the last that samples of each box can touch, within [0, size]; int32."""
    start, bin_size, _ = box_axis(low, high, spatial_scale, bins, sampling_ratio, ALIGNED)
    end = start + bin_size * bins
    first = tl.floor(tl.minimum(start, end)) - 1
    last = tl.floor(tl.maximum(start, end)) + 3
    limit = size.to(tl.float32)
    # Of max(NaN, 0) Triton takes the number, so a box that is not one touches a range within the map too.
    first = tl.minimum(tl.maximum(first, 0.0), limit)
    last = tl.minimum(tl.maximum(last, 0.0), limit)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit(
    do_not_specialize=["height", "width", "slots", "images", "bins_y", "bins_x", "sampling_ratio"],
    do_not_specialize_on_alignment=["boxes_ptr"],
)
def _fill_slots_kernel(
    boxes_ptr,
    order_ptr,
    offsets_ptr,
    weights_ptr,
    rows_ptr,
    images_ptr,
    spans_ptr,
    sizes,
    height,
    width,
    slots,
    images,
    spatial_scale,
    bins_y,
    bins_x,
    sampling_ratio,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Weights of BLOCK_P rows or columns of one level for the boxes of one slot.

    a_l[k, j] = Σ_i U_l[i, j] · w[k, i]: the 2·H_0 / H_l rows i of the finest grid whose bilinear upsampling
    reads row j, each weight w in closed form. The first program of a slot also writes its rows, its picture
    and its span.

    Bytes: 4·R·Σ(H_l + W_l) written; 3 MB for 8 pictures with 100 boxes at published sizes, against 212 MB of
    maps. Instructions: about 70 for each of the R·Σ 2·(H_0 + W_0) pairs (i, j), many of them for one division
    rounded as IEEE asks; 16 pairs one after the other for the coarsest published level, the longest program.
    Neither bytes nor instructions are a tenth of the product's; the floor is a launch and those 16 steps.
    """
    slot = tl.program_id(0) % slots
    position = tl.program_id(0) // slots * BLOCK_P
    image = slot_image(slot, offsets_ptr, images, BLOCK_K)
    offset = tl.load(offsets_ptr + image)
    first_box = (slot - offset // BLOCK_K - image) * BLOCK_K
    in_group = tl.load(offsets_ptr + image + 1) - offset
    row = tl.arange(0, BLOCK_K)
    real = first_box + row < in_group
    box = tl.load(order_ptr + offset + first_box + row, mask=real, other=-1)
    corner = boxes_ptr + box.to(tl.int64) * 5
    bins_y = bins_y.to(tl.float32)
    bins_x = bins_x.to(tl.float32)
    sampling_ratio = sampling_ratio.to(tl.float32)
    if position == 0:
        tl.store(rows_ptr + slot * BLOCK_K + row, box)
        tl.store(images_ptr + slot, tl.where(first_box < in_group, image, -1))
        left = tl.load(corner + 1, mask=real, other=0.0)
        top = tl.load(corner + 2, mask=real, other=0.0)
        right = tl.load(corner + 3, mask=real, other=0.0)
        bottom = tl.load(corner + 4, mask=real, other=0.0)
        first, last = _touched(top, bottom, spatial_scale, bins_y, sampling_ratio, height, ALIGNED)
        tl.store(spans_ptr + slot * 4, tl.min(tl.where(real, first, height), axis=0))
        tl.store(spans_ptr + slot * 4 + 1, tl.max(tl.where(real, last, 0), axis=0))
        first, last = _touched(left, right, spatial_scale, bins_x, sampling_ratio, width, ALIGNED)
        tl.store(spans_ptr + slot * 4 + 2, tl.min(tl.where(real, first, width), axis=0))
        tl.store(spans_ptr + slot * 4 + 3, tl.max(tl.where(real, last, 0), axis=0))
    if first_box >= in_group:
        return

    # Which level and axis `position` belongs to; blocks never straddle two.
    level_begin = 0
    size = height
    horizontal = False
    begin = 0
    for level in tl.static_range(len(sizes)):
        for axis in tl.static_range(2):
            length = half(sizes[level][axis])
            inside = position >= begin
            level_begin = tl.where(inside, begin, level_begin)
            size = tl.where(inside, length, size)
            horizontal = tl.where(inside, axis == 1, horizontal)
            if axis == 1:
                begin += tl.cdiv(length, BLOCK_X) * BLOCK_X
            else:
                begin += tl.cdiv(length, BLOCK_P) * BLOCK_P
    fine_size = tl.where(horizontal, width, height)
    bins = tl.where(horizontal, bins_x, bins_y)
    column = tl.where(horizontal, 1, 2)

    low = tl.load(corner + column, mask=real, other=0.0)
    high = tl.load(corner + column + 2, mask=real, other=0.0)
    start, bin_size, points = box_axis(low, high, spatial_scale, bins, sampling_ratio, ALIGNED)
    fine = fine_size.to(tl.float32)
    coarse = size.to(tl.float32)
    base, origin, step, count, enter, leave = sample_run(
        start, bin_size, points, tl.zeros_like(start), bins, fine
    )
    j = (position - level_begin + tl.arange(0, BLOCK_P)).to(tl.float32)
    base, origin, step = base[None, :], origin[None, :], step[None, :]
    count, enter, leave = count[None, :], enter[None, :], leave[None, :]
    i = (tl.floor((j - 0.5) * (fine / coarse) - 0.5) + 1)[:, None]
    previous = samples_before(i - 1, base, origin, step, count, enter, leave)
    before = samples_before(i, base, origin, step, count, enter, leave)
    from_previous = distances(i - 1, previous, before - previous, base, origin, step)
    weight = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    padding = position - level_begin >= size
    for _ in range(tl.where(padding, 0, tl.cdiv(2 * fine_size, size))):
        after = samples_before(i + 1, base, origin, step, count, enter, leave)
        number = after - before
        to_row = distances(i, before, number, base, origin, step)
        sampled = row_weight(i, fine, before, number, to_row, from_previous, count, enter, leave)
        weight += upsampling_weight(i, j[:, None], fine, coarse) * sampled
        i += 1
        before = after
        from_previous = to_row
    weight = tl.where(real[None, :], weight, 0.0)
    stride = slots.to(tl.int64) * BLOCK_K
    to = weights_ptr + position * stride + slot * BLOCK_K
    tl.store(to + tl.arange(0, BLOCK_P)[:, None] * stride + row[None, :], weight)
