"""RoIAlign as products of separable axis weights.

RoIAlign samples a regular grid with bilinear interpolation, a product of one hat per axis; averaging is
linear. So every output is Σ_y Σ_x w_y[y] · w_x[x] · F[y, x], where an axis weight is the average, over the
samples of the axis, of the hat of each row. The averages come in closed form from how many samples fall
between two rows, whatever their number, so neither table size nor run time depends on the values of the boxes
and nothing is read back from a GPU.

The price off the CPU: which boxes belong to which picture is not read back either, so every picture
multiplies the boxes of the whole batch under a mask, B times the arithmetic for B pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgllava_kernels import reference
from mgllava_kernels._torch import roi_crops

# Largest temporary of one chunk of boxes, in elements: 16 MB of float32. At published sizes 113 boxes fit.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class AxisSamples:
    """Sample points on one axis: `bins` consecutive bins from `first_bin` on, of `grid` points each.

    The tensors broadcast to (..., 1); the last axis is the one that the rows of the map will take.
    """

    start: Tensor
    bin_size: Tensor
    grid: Tensor
    first_bin: Tensor
    bins: int

    def position(self, i: Tensor) -> Tensor:
        """Coordinate of the i-th point in ascending order, in torchvision's order of operations."""
        i = torch.where(self.bin_size < 0, self.grid * self.bins - 1 - i, i)
        points = self.grid.clamp_min(1)
        bin_index = torch.floor(i / points)
        within = i - bin_index * points
        return (
            self.start
            + (self.first_bin + bin_index) * self.bin_size
            + (within + 0.5) * self.bin_size / points
        )


def axis_samples(
    low: Tensor,
    high: Tensor,
    spatial_scale: float,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
    per_bin: bool,
) -> AxisSamples:
    """Samples of boxes `low` to `high`, (K,) each: over all bins, (K, 1), or of each bin, (K, bins, 1)."""
    offset = 0.5 if aligned else 0.0
    start, end = (
        (value * spatial_scale).clamp(-reference.FARTHEST, reference.FARTHEST) - offset
        for value in (low, high)
    )
    length = end - start
    if not aligned:
        length = length.clamp_min(1)
    bin_size = length / bins
    # A box of negative or no length has no adaptive samples.
    grid = (
        torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else torch.ceil(bin_size).clamp_min(0)
    )
    start, bin_size, grid = (value.unsqueeze(-1) for value in (start, bin_size, grid))
    if not per_bin:
        return AxisSamples(start, bin_size, grid, torch.zeros_like(start), bins)
    first_bin = torch.arange(bins, dtype=low.dtype, device=low.device).unsqueeze(-1)
    return AxisSamples(start.unsqueeze(-1), bin_size.unsqueeze(-1), grid.unsqueeze(-1), first_bin, 1)


def axis_weights(samples: AxisSamples, size: int) -> Tensor:
    """Average hat weight of each of `size` rows over the samples, with RoIAlign's edge rules; shape (...,
    size).

    Samples below -1 or above `size` count as zero, those between -1 and 0 belong to row 0, those from the
    last row on to the last row.
    """
    count = samples.grid * samples.bins
    last = (count - 1).clamp_min(0)
    step = samples.bin_size.abs() / samples.grid.clamp_min(1)
    lowest, highest = samples.position(torch.zeros_like(count)), samples.position(last)
    # Distances are taken from the whole number below the first sample: differences of large, close coordinates
    # lose digits (float32 error of small boxes on a 192-row map: 3.7e-6 with this, 6.4e-6 without).
    base = torch.floor(lowest)
    origin = lowest - base

    def samples_before(coordinate: Tensor) -> Tensor:
        before = torch.ceil((coordinate - base - origin) / step.clamp_min(torch.finfo(step.dtype).tiny))
        return torch.minimum(before.clamp_min(0), count)

    def position_is(test: torch.Tensor) -> Tensor:
        return test.to(count.dtype)

    # The weights jump at -1 and at `size`, so there the counts must agree with the rounded positions.
    enter = samples_before(torch.full_like(base, -1))
    enter = enter - position_is((enter > 0) & (samples.position((enter - 1).clamp_min(0)) >= -1))
    enter = enter + position_is((enter < count) & (samples.position(torch.minimum(enter, last)) < -1))
    enter = torch.where(lowest >= -1, torch.zeros_like(enter), enter)
    leave = samples_before(torch.full_like(base, size))
    leave = leave + position_is((leave < count) & (samples.position(torch.minimum(leave, last)) <= size))
    leave = leave - position_is((leave > 0) & (samples.position((leave - 1).clamp_min(0)) > size))
    leave = torch.maximum(torch.where(highest <= size, count, leave), enter)

    rows = torch.arange(size, dtype=step.dtype, device=step.device)
    before = torch.minimum(torch.maximum(samples_before(rows), enter), leave)
    between = before[..., 1:] - before[..., :-1]
    first_distance = origin + before[..., :-1] * step - (rows[:-1] - base)
    # Distances of the samples between two rows from the upper one: the sum of an arithmetic progression.
    distances = between * (first_distance + step * (between - 1) / 2)
    distances = torch.minimum(distances.clamp_min(0), between)

    weights = torch.zeros_like(before)
    weights[..., :-1] += between - distances
    weights[..., 1:] += distances
    weights[..., :1] += before[..., :1] - enter
    weights[..., -1:] += leave - before[..., -1:]
    return weights / count.clamp_min(1)


def rows_by_image(
    image_index: Tensor, images: int, limit: int
) -> Iterator[tuple[int, slice | Tensor, Tensor | None]]:
    """Yield (image, rows, mask): groups of at most `limit` boxes for each image.

    On the CPU `rows` holds exactly that image's boxes. Elsewhere reading the index would synchronise, so
    `rows` runs over all boxes and `mask`, (rows, 1), says which are the image's own.
    """
    if image_index.device.type == "cpu":
        for image in range(images):
            for rows in (image_index == image).nonzero().flatten().split(limit):
                if len(rows):
                    yield image, rows, None
        return
    boxes = len(image_index)
    for image in range(images):
        for first in range(0, boxes, limit):
            rows = slice(first, min(first + limit, boxes))
            yield image, rows, (image_index[rows] == image).unsqueeze(-1)


def _own(weights: Tensor, rows: slice | Tensor, mask: Tensor | None) -> Tensor:
    weights = weights[rows]
    return weights if mask is None else weights.where(mask, 0)


def upsampled_weights(weights: Tensor, size: int) -> Tensor:
    """Weights (K, fine) on the finest grid as weights (K, size) on a coarser: upsampling transposed."""
    fine = weights.shape[1]
    if size == fine:
        return weights
    identity = torch.eye(size, dtype=weights.dtype, device=weights.device)
    upsampling = F.interpolate(identity.unsqueeze(0), size=fine, mode="linear", align_corners=False)[0]
    return weights @ upsampling.T


def _pooled_axis_weights(
    boxes: Tensor,
    height: int,
    width: int,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, x1, y1, x2, y2 = boxes.unbind(1)
    rows = axis_samples(y1, y2, spatial_scale, output_height, sampling_ratio, aligned, per_bin=False)
    columns = axis_samples(x1, x2, spatial_scale, output_width, sampling_ratio, aligned, per_bin=False)
    return boxes[:, 0].trunc(), axis_weights(rows, height), axis_weights(columns, width)


def _outer(weights_y: Tensor, weights_x: Tensor) -> Tensor:
    return (weights_y.unsqueeze(2) * weights_x.unsqueeze(1)).flatten(1)


def pooled_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """P · F for each level and image, with P = a_y ⊗ a_x: 2·K·H·W·C operations a level, one (K, H·W)
    temporary.

    Computes in the dtype of `boxes`, float32 or float64: a weight can be as small as 1/(H·W), which float16
    holds only as a subnormal number.
    """
    images, _, height, width = features[0].shape
    image_index, weights_y, weights_x = _pooled_axis_weights(
        boxes, height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned
    )
    outputs = []
    for level in features:
        channels, level_height, level_width = level.shape[1:]
        level_y = upsampled_weights(weights_y, level_height)
        level_x = upsampled_weights(weights_x, level_width)
        output = boxes.new_zeros(len(boxes), channels)
        limit = max(1, CHUNK_ELEMENTS // (level_height * level_width))
        for image, rows, mask in rows_by_image(image_index, images, limit):
            weights = _outer(_own(level_y, rows, mask), level_x[rows])
            output[rows] += weights @ level[image].to(boxes.dtype).flatten(1).T
        outputs.append(output)
    return torch.cat(outputs, dim=1).to(features[0].dtype)


def pooled_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    shapes: Sequence[Sequence[int]],
    levels: Sequence[int],
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """Pᵀ · grad for each of `levels`; no atomics, one fixed order of summation."""
    images, _, height, width = shapes[0]
    image_index, weights_y, weights_x = _pooled_axis_weights(
        boxes, height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned
    )
    grads = grad.to(boxes.dtype).split([shape[1] for shape in shapes], dim=1)
    results = []
    for index in levels:
        _, channels, level_height, level_width = shapes[index]
        level_y = upsampled_weights(weights_y, level_height)
        level_x = upsampled_weights(weights_x, level_width)
        result = boxes.new_zeros(images, channels, level_height * level_width)
        limit = max(1, CHUNK_ELEMENTS // (level_height * level_width))
        for image, rows, mask in rows_by_image(image_index, images, limit):
            weights = _outer(_own(level_y, rows, mask), level_x[rows])
            result[image].addmm_(grads[index][rows].T, weights)
        results.append(result.view(images, channels, level_height, level_width).to(grad.dtype))
    return results


def _roi_axis_weights(
    boxes: Tensor,
    height: int,
    width: int,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    _, x1, y1, x2, y2 = boxes.unbind(1)
    rows = axis_samples(y1, y2, spatial_scale, output_height, sampling_ratio, aligned, per_bin=True)
    columns = axis_samples(x1, x2, spatial_scale, output_width, sampling_ratio, aligned, per_bin=True)
    return axis_weights(rows, height), axis_weights(columns, width)


def _box_by_box(device: torch.device) -> bool:
    """Whether to go from box to box, which reads the boxes on the host; elsewhere that would synchronise."""
    return device.type == "cpu"


def _touched_cells(boxes: Tensor, height: int, width: int, spatial_scale: float) -> float:
    """About how many cells the boxes touch, each box its own."""
    extent = (boxes[:, 3:] - boxes[:, 1:3]).abs() * spatial_scale + 2
    return (extent[:, 0].clamp(max=width) * extent[:, 1].clamp(max=height)).sum().item()


def _weight_chunks(boxes: Tensor, elements: int) -> Sequence[Tensor]:
    """Groups of boxes whose axis weights, `elements` a box, stay within one chunk; at least one group."""
    return boxes.split(max(1, CHUNK_ELEMENTS // elements))


def roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """W_y · F · W_xᵀ for each box and channel, rows first; computes in the dtype of `boxes`."""
    images, channels, height, width = input.shape
    if channels == 0:
        return input.new_zeros(len(boxes), 0, output_height, output_width)
    image_index = boxes[:, 0].trunc()
    if _box_by_box(input.device):
        maps = input.permute(0, 2, 3, 1)
        if _touched_cells(boxes, height, width, spatial_scale) > images * height * width:
            maps = maps.to(boxes.dtype).contiguous()
        sizes = (height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned)
        bins = [
            roi_crops.align(
                maps,
                chunk[:, 0].trunc(),
                *_roi_axis_weights(chunk, *sizes),
            )
            for chunk in _weight_chunks(boxes, output_height * height + output_width * width)
        ]
        return torch.cat(bins).permute(0, 3, 1, 2).to(input.dtype).contiguous()
    output = boxes.new_zeros(len(boxes), channels, output_height, output_width)
    limit = max(1, CHUNK_ELEMENTS // (output_height * channels * width))
    for image, rows, mask in rows_by_image(image_index, images, limit):
        weights_y, weights_x = _roi_axis_weights(
            boxes[rows], height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned
        )
        if mask is not None:
            weights_y = weights_y.where(mask.unsqueeze(-1), 0)
        by_row = input[image].to(boxes.dtype).transpose(0, 1).reshape(height, channels * width)
        partial = (weights_y.flatten(0, 1) @ by_row).view(-1, output_height * channels, width)
        result = partial @ weights_x.transpose(1, 2)
        output[rows] += result.view(-1, output_height, channels, output_width).transpose(1, 2)
    return output.to(input.dtype)


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
    """W_yᵀ · grad · W_x summed over the boxes of each image, in one fixed order."""
    images, channels, height, width = shape
    if channels == 0:
        return grad.new_zeros(shape)
    image_index = boxes[:, 0].trunc()
    if _box_by_box(grad.device):
        channels_last = boxes.new_zeros(images, height, width, channels)
        sizes = (height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned)
        chunks = _weight_chunks(boxes, output_height * height + output_width * width)
        grads = grad.split([len(chunk) for chunk in chunks])
        for chunk, part in zip(chunks, grads, strict=True):
            by_bin = part.permute(0, 2, 3, 1).to(boxes.dtype).contiguous()
            weights = _roi_axis_weights(chunk, *sizes)
            roi_crops.align_backward(by_bin, channels_last, chunk[:, 0].trunc(), *weights)
        return channels_last.permute(0, 3, 1, 2).to(grad.dtype).contiguous()
    result = boxes.new_zeros(images, height, channels * width)
    limit = max(1, CHUNK_ELEMENTS // (output_height * channels * width))
    for image, rows, mask in rows_by_image(image_index, images, limit):
        weights_y, weights_x = _roi_axis_weights(
            boxes[rows], height, width, spatial_scale, output_height, output_width, sampling_ratio, aligned
        )
        if mask is not None:
            weights_y = weights_y.where(mask.unsqueeze(-1), 0)
        by_bin = (
            grad[rows].to(boxes.dtype).transpose(1, 2).reshape(-1, output_height * channels, output_width)
        )
        partial = (by_bin @ weights_x).view(-1, channels * width)
        result[image].addmm_(weights_y.flatten(0, 1).T, partial)
    return result.view(images, height, channels, width).transpose(1, 2).contiguous().to(grad.dtype)
