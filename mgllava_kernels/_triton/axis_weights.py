"""Separable weights of RoIAlign: how much each row (or column) of a map counts for a box.

The closed form of `mgllava_kernels._torch.roi_align.axis_weights`: samples of an axis lie at equal distances,
so the sum of their hats follows from how many fall between two rows. A weight costs about 40 operations
whatever the number of samples; nothing is looped over and nothing read but the box.
"""

import triton
import triton.language as tl

# Coordinates on the map are brought within this, as in mgllava_kernels.reference: products stay finite.
FARTHEST = tl.constexpr(1e18)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def box_axis(low, high, spatial_scale, bins, sampling_ratio, ALIGNED: tl.constexpr):
    """Start, bin length and sample points per bin of boxes from `low` to `high`, in rows of the map.

    All float32, of one shape; `bins` and `sampling_ratio` are float32 scalars. Divisions are rounded as IEEE
    asks: ceil(length / bins) of an inexact quotient would add samples.
    """
    start = tl.minimum(tl.maximum(low * spatial_scale, -FARTHEST), FARTHEST)
    end = tl.minimum(tl.maximum(high * spatial_scale, -FARTHEST), FARTHEST)
    if ALIGNED:
        start -= 0.5
        end -= 0.5
    length = end - start
    if not ALIGNED:
        length = tl.maximum(length, 1.0)
    bin_size = tl.div_rn(length, bins + tl.zeros_like(length))
    adaptive = tl.maximum(tl.ceil(bin_size), 0.0)
    points = tl.where(sampling_ratio > 0, sampling_ratio + tl.zeros_like(adaptive), adaptive)
    return start, bin_size, points


@triton.jit
def _position(i, start, bin_size, points, first_bin, bins):
    """Coordinate of the i-th sample in ascending order, in torchvision's order of operations."""
    i = tl.where(bin_size < 0, points * bins - 1 - i, i)
    at_least_one = tl.maximum(points, 1.0)
    bin_index = tl.floor(tl.div_rn(i, at_least_one))
    within = i - bin_index * at_least_one
    return start + (first_bin + bin_index) * bin_size + tl.div_rn((within + 0.5) * bin_size, at_least_one)


@triton.jit
def within(value, limit):
    """`value` (float32) brought into [0, limit] as int32; NaN becomes 0."""
    return tl.where(value > 0, tl.where(value < limit, value, limit), 0.0).to(tl.int32)


@triton.jit
def touched_rows(start, bin_size, points, first_bin, bins, size):
    """The first row and the one after the last that samples of these bins may touch, int32 in [0, size].

    One row wider on each side than the samples reach: where a sample falls on a row, rounding may give its
    neighbour a weight of some 1e-7.
    """
    count = points * bins
    lowest = _position(tl.zeros_like(count), start, bin_size, points, first_bin, bins)
    highest = _position(tl.maximum(count - 1, 0.0), start, bin_size, points, first_bin, bins)
    return within(tl.floor(lowest) - 1, size), within(tl.floor(highest) + 3, size)


@triton.jit
def _samples_before(distance, step, count):
    """How many samples lie before a coordinate `distance` after the first one."""
    before = tl.ceil(tl.div_rn(distance, tl.maximum(step, TINY)))
    return tl.minimum(tl.maximum(before, 0.0), count)


@triton.jit
def sample_run(start, bin_size, points, first_bin, bins, size):
    """The samples of `bins` consecutive bins from `first_bin` on, as far as they touch a map of `size` rows.

    Returns float32 tensors of the shape of `start`: `base`, the whole number below the first sample; `origin`,
    the first sample's distance from it; `step` between samples; their `count`; and `enter` and `leave`, the
    first sample at or after -1 and the first beyond `size`.
    """
    count = points * bins
    last = tl.maximum(count - 1, 0.0)
    step = tl.div_rn(tl.abs(bin_size), tl.maximum(points, 1.0))
    lowest = _position(tl.zeros_like(count), start, bin_size, points, first_bin, bins)
    highest = _position(last, start, bin_size, points, first_bin, bins)
    base = tl.floor(lowest)
    origin = lowest - base

    # The weights jump at -1 and at `size`, so there the counts must agree with the rounded positions.
    enter = _samples_before(-1.0 - base - origin, step, count)
    previous = _position(tl.maximum(enter - 1, 0.0), start, bin_size, points, first_bin, bins)
    enter = tl.where((enter > 0) & (previous >= -1), enter - 1, enter)
    at_enter = _position(tl.minimum(enter, last), start, bin_size, points, first_bin, bins)
    enter = tl.where((enter < count) & (at_enter < -1), enter + 1, enter)
    enter = tl.where(lowest >= -1, 0.0, enter)

    leave = _samples_before(size - base - origin, step, count)
    at_leave = _position(tl.minimum(leave, last), start, bin_size, points, first_bin, bins)
    leave = tl.where((leave < count) & (at_leave <= size), leave + 1, leave)
    before_leave = _position(tl.maximum(leave - 1, 0.0), start, bin_size, points, first_bin, bins)
    leave = tl.where((leave > 0) & (before_leave > size), leave - 1, leave)
    leave = tl.maximum(tl.where(highest <= size, count, leave), enter)
    return base, origin, step, count, enter, leave


@triton.jit
def samples_before(row, base, origin, step, count, enter, leave):
    """How many samples of a run lie before `row`; those that enter too early or leave never pass it."""
    before = _samples_before(row - base - origin, step, count)
    return tl.minimum(tl.maximum(before, enter), leave)


@triton.jit
def distances(row, before, number, base, origin, step):
    """Summed distances from `row` of the `number` samples after the first `before`, up to the next row."""
    # Distances from the whole number below the first sample keep the digits that large coordinates lose.
    first = origin + before * step - (row - base)
    total = number * (first + step * ((number - 1) * 0.5))
    return tl.minimum(tl.maximum(total, 0.0), number)


@triton.jit
def row_weight(row, size, before, number, to_row, from_previous, count, enter, leave):
    """Average hat weight of `row` with RoIAlign's edge rules; zero outside [0, size).

    `to_row` are the `distances` of the `number` samples between `row` and the next, `from_previous` those of
    the samples before it from the previous row. Samples between -1 and 0 belong to row 0, those from the last
    row on to the last row.
    """
    weight = tl.where(row == size - 1, leave - before, number - to_row)
    weight += tl.where(row == 0, before - enter, from_previous)
    weight = tl.div_rn(weight, tl.maximum(count, 1.0))
    return tl.where((row >= 0) & (row < size), weight, 0.0)


@triton.jit
def axis_weight(row, size, base, origin, step, count, enter, leave):
    """`row_weight` of `row` (float32) over a `sample_run`."""
    previous = samples_before(row - 1, base, origin, step, count, enter, leave)
    before = samples_before(row, base, origin, step, count, enter, leave)
    number = samples_before(row + 1, base, origin, step, count, enter, leave) - before
    from_previous = distances(row - 1, previous, before - previous, base, origin, step)
    to_row = distances(row, before, number, base, origin, step)
    return row_weight(row, size, before, number, to_row, from_previous, count, enter, leave)


@triton.jit
def upsampling_weight(fine_row, row, fine_size, size):
    """Weight of `row` of a map of `size` rows in `fine_row` of its bilinear upsampling to `fine_size` rows.

    align_corners=False, as torch.nn.functional.interpolate; all float32.
    """
    source = (fine_row + 0.5) * (size / fine_size) - 0.5
    source = tl.minimum(tl.maximum(source, 0.0), size - 1.0)
    return tl.maximum(1.0 - tl.abs(source - row), 0.0)
