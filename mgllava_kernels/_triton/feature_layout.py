"""What the compiler may assume of a feature map's memory."""

import math
from collections.abc import Sequence

from torch import Tensor


def feature_layout(features: Sequence[Tensor]) -> tuple[str, int]:
    """Layout and alignment of maps (B, C, H, W), as constexpr parameters of a kernel.

    Returns:
        "nchw" if columns are adjacent in every map, "nhwc" if channels are, else "strided"; and the largest
        power of two, at most 16 bytes' worth of elements, that divides every other stride, the size of the
        adjacent axis and the address: with it, loads of that many elements stay within the map and aligned.
    """
    for name, axis in (("nchw", 3), ("nhwc", 1)):
        if all(level.stride(axis) == 1 or level.shape[axis] == 1 for level in features):
            common = 16 // features[0].element_size()
            for level in features:
                common = math.gcd(common, level.data_ptr() // level.element_size())
                others = (
                    level.stride(other) for other in range(4) if other != axis and level.shape[other] > 1
                )
                common = math.gcd(common, level.shape[axis], *others)
            return name, common
    return "strided", 1
