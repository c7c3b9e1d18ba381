"""Bytes and FLOPs of each op, and what a device could make of them.

The bytes are those that any implementation moves: inputs and weights read once, results written once. FLOPs are
those of the matmul-shaped part. The floor is the longer of bytes / copy bandwidth and FLOPs / matmul rate; both
rates are measured on the device in the same run (`measure_ceilings`), or are a vendor's for a prediction.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.shapes import Sizes, model_width, stage_shapes, token_width, tokens_of

# `random_boxes` lie between two uniform corners: a third of each side on average, a ninth of the map.
COVERED = 1 / 9


@dataclass(frozen=True)
class Cost:
    """What one call cannot do without."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device: bytes copied (read plus written) and FLOPs of a matmul, per second."""

    device: str
    bandwidth: float
    matmul: dict[str, float]
    source: str

    def floor_ms(self, cost: Cost, dtype: str) -> float:
        """The least time of a call, in milliseconds."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.matmul[dtype]) * 1e3


# NVIDIA's data sheets, dense rates: "H100 Tensor Core GPU" (SXM5), "H200 Tensor Core GPU" (SXM), "A100 80GB" (SXM4).
# float32 is IEEE, off the tensor cores.
VENDOR = {
    "H100": Ceilings(
        "NVIDIA H100 SXM",
        3.35e12,
        {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
        "NVIDIA H100 Tensor Core GPU data sheet, SXM5, dense",
    ),
    "H200": Ceilings(
        "NVIDIA H200 SXM",
        4.8e12,
        {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
        "NVIDIA H200 Tensor Core GPU data sheet, SXM, dense",
    ),
    "A100": Ceilings(
        "NVIDIA A100 80GB SXM",
        2.039e12,
        {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
        "NVIDIA A100 80GB Tensor Core GPU data sheet, SXM4, dense",
    ),
}


def by_mode(forward: Cost, backward: Cost, mode: str) -> Cost:
    """The cost of a mode."""
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def pooled_roi_align(sizes: Sizes, dtype: torch.dtype, mode: str) -> Cost:
    """Stage maps once, vectors once; a multiplication and an addition for each box, channel and cell in the box.

    Backward the same the other way round.
    """
    shapes = stage_shapes(sizes)
    maps = sum(math.prod(shape) for shape in shapes)
    boxes = sizes["images"] * sizes["boxes"]
    vectors = boxes * sum(shape[1] for shape in shapes)
    # Without boxes nothing need be read, but the gradient of every map is still zeros to be written.
    read = maps if boxes else 0
    flops = int(2 * sizes["boxes"] * maps * COVERED)
    coordinates = boxes * 5 * 4
    return by_mode(
        Cost((read + vectors) * dtype.itemsize + coordinates, flops),
        Cost((maps + vectors) * dtype.itemsize + coordinates, flops),
        mode,
    )


def roi_align(sizes: Sizes, dtype: torch.dtype, mode: str) -> Cost:
    """The map once, the bins once. Its arithmetic is no matmul and small beside that: none is counted."""
    cells = sizes["images"] * sizes["channels"] * sizes["height"] * sizes["width"]
    bins = sizes["boxes"] * sizes["channels"] * sizes["side"] ** 2
    moved = Cost((cells + bins) * dtype.itemsize + sizes["boxes"] * 5 * 4, 0)
    return by_mode(moved, moved, mode)


def _conv_gate_weights(sizes: Sizes) -> int:
    low, high = token_width(sizes), stage_shapes(sizes)[-1][1]
    return high * high + high * low + low * low + 49 * low + low * low


def conv_gate(sizes: Sizes, dtype: torch.dtype, mode: str) -> Cost:
    """Two 1x1 convolutions of the high-resolution map, one of the tokens, and the 7x7 depthwise one.

    Backward: a matmul for the gradient of each input and one for that of each weight.
    """
    tokens = sizes["images"] * tokens_of(sizes)
    low, high = token_width(sizes), stage_shapes(sizes)[-1][1]
    weights = _conv_gate_weights(sizes)
    flops = 2 * tokens * (high * high + high * low + low * low + 49 * low)
    forward = Cost((tokens * (2 * low + high) + weights) * dtype.itemsize, flops)
    backward = Cost((tokens * (3 * low + 2 * high) + 2 * weights) * dtype.itemsize, 2 * flops)
    return by_mode(forward, backward, mode)


def _projector_sets(sizes: Sizes) -> list[tuple[int, int]]:
    """Tokens and width of each token set."""
    channels = sum(shape[1] for shape in stage_shapes(sizes))
    sets = [(sizes["images"] * tokens_of(sizes), token_width(sizes))]
    return [*sets, (sizes["images"] * sizes["boxes"], channels)]


def projectors(sizes: Sizes, dtype: torch.dtype, mode: str) -> Cost:
    """Two matmuls for each token set; backward four, and the GELU's input that the forward pass kept."""
    out = model_width(sizes)
    forward = backward = Cost(0, 0)
    for tokens, width in _projector_sets(sizes):
        if tokens == 0:
            continue
        weights = out * (width + out)
        flops = 2 * tokens * weights
        forward += Cost((tokens * (width + out) + weights) * dtype.itemsize, flops)
        backward += Cost((tokens * (2 * width + 2 * out) + 2 * weights) * dtype.itemsize, 2 * flops)
    return by_mode(forward, backward, mode)


def neck(sizes: Sizes, dtype: torch.dtype, mode: str) -> Cost:
    """All arithmetic of its parts; what one part hands to the next is not counted as moved."""
    parts = [part(sizes, dtype, mode) for part in (conv_gate, pooled_roi_align, projectors)]
    images, tokens = sizes["images"], sizes["images"] * tokens_of(sizes)
    high = stage_shapes(sizes)[-1]
    boxes = images * sizes["boxes"]
    # The fused tokens are written and read, the vectors too, and the last stage is read by two parts.
    handed = 2 * tokens * token_width(sizes) + 2 * boxes * sum(shape[1] for shape in stage_shapes(sizes))
    handed += math.prod(high) if boxes else 0
    passes = {"forward": 1, "backward": 1, "both": 2}[mode]
    moved = sum(part.bytes for part in parts) - passes * handed * dtype.itemsize
    return Cost(moved, sum(part.flops for part in parts))


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], name: str) -> Ceilings:
    """Copy bandwidth and matmul rate of each dtype on `device`, now. Takes about a second."""
    on_gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if on_gpu else (1 << 28), dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    bandwidth = 2 * source.nbytes / seconds
    side = 8192 if on_gpu else 2048
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best_seconds(lambda a=a, b=b: a @ b, device)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    return Ceilings(name, bandwidth, rates, "measured in the same run")


def _best_seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The shortest of a few calls: a ceiling is what the device can do."""
    call()
    best = math.inf
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best
