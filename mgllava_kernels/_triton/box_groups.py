"""Boxes sorted by picture on the device, so that a program can serve boxes of one picture.

Box counts per picture are known to the GPU alone: reading them on the host would synchronise. Ranks are
counted, not sorted: K² comparisons, 10⁸ for ten thousand boxes, without atomics and in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import launch

# Boxes (or pictures) of a program, and boxes each is compared with at once: 128 spill scalar registers on gfx942.
BLOCK = 32
BLOCK_OTHERS = 64


def group_boxes(boxes: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Stable order of `boxes` (K, 5) by picture, and where each picture's boxes begin.

    Returns int32 tensors `order` (K,), the boxes' rows in sorted order, and `offsets` (images + 2,): picture i
    has order[offsets[i]:offsets[i + 1]], and boxes of no picture (index out of range or NaN) come last, from
    offsets[images] to offsets[images + 1] = K.
    """
    count = len(boxes)
    order = torch.empty(count, dtype=torch.int32, device=boxes.device)
    offsets = torch.empty(images + 2, dtype=torch.int32, device=boxes.device)
    programs = triton.cdiv(max(count, images + 2), BLOCK)
    launch(
        _group_boxes_kernel,
        programs,
        boxes.device,
        (boxes.contiguous(), order, offsets, count, images),
        BLOCK=BLOCK,
        BLOCK_OTHERS=BLOCK_OTHERS,
        num_warps=4,
    )
    return order, offsets


@triton.jit
def image_of(boxes_ptr, rows, count, images):
    """Picture of each row, or `images` where there is none; rows from `count` on get `images` + 1."""
    index = tl.load(boxes_ptr + rows.to(tl.int64) * 5, mask=rows < count, other=0.0)
    # Toward zero, as torch.trunc; comparisons with NaN are false.
    known = (index > -1.0) & (index < images.to(tl.float32))
    image = tl.where(known, tl.where(known, index, 0.0).to(tl.int32), images)
    return tl.where(rows < count, image, images + 1)


@triton.jit(do_not_specialize=["count", "images"], do_not_specialize_on_alignment=["boxes_ptr"])
def _group_boxes_kernel(
    boxes_ptr, order_ptr, offsets_ptr, count, images, BLOCK: tl.constexpr, BLOCK_OTHERS: tl.constexpr
):
    """Program p ranks boxes and counts the offsets of pictures p·BLOCK to (p + 1)·BLOCK.

    Reads 4·K bytes a program, L2 hits but for the first; K·BLOCK comparisons a program. With 800 boxes 25
    programs of 13 steps: the time of a launch.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = image_of(boxes_ptr, rows, count, images)
    rank = tl.zeros((BLOCK,), tl.int32)
    offset = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)
        other = image_of(boxes_ptr, others, count, images)
        earlier = (other[None, :] < image[:, None]) | (
            (other[None, :] == image[:, None]) & (others[None, :] < rows[:, None])
        )
        rank += tl.sum(earlier.to(tl.int32), axis=1)
        offset += tl.sum((other[None, :] < rows[:, None]).to(tl.int32), axis=1)
    tl.store(order_ptr + rank, rows, mask=rows < count)
    tl.store(offsets_ptr + rows, offset, mask=rows < images + 2)
