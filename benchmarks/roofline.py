"""Bytes and FLOPs of each op, and what a device could make of them.

The bytes are those that any implementation moves: inputs and weights read once, of maps the cells that boxes touch,
results written once. FLOPs are those of the matmul-shaped part. The floor is the longer of bytes / bandwidth and
FLOPs / matmul rate; both rates are measured on the device in the same run, before and after an op
(`measure_ceilings`), or are a vendor's for a prediction. On a CPU inputs are not rotated, so a large cache may hold
them and beat the floor, which is the memory's.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.boxes import pooled_cells, region_cells
from benchmarks.shapes import Sizes, model_width, stage_shapes, token_width, tokens_of
from benchmarks.timing import launched

# Calls behind a ceiling of a CPU; two measurements that differ by more than this factor are a machine's that does
# something else, too.
REPEATS, DRIFT = 10, 1.05


@dataclass(frozen=True)
class Cost:
    """What one call cannot do without."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device: bytes moved by a copy or a sum, whichever is faster, and FLOPs of a matmul, per second."""

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
    """The cells under boxes once, vectors once; a multiplication and an addition for each box, channel and its cells.

    Backward the same the other way round, but every gradient is written whole.
    """
    shapes = stage_shapes(sizes)
    maps = sum(math.prod(shape) for shape in shapes)
    boxes = sizes["images"] * sizes["boxes"]
    vectors = boxes * sum(shape[1] for shape in shapes)
    read = flops = 0
    for shape, (together, alone) in zip(shapes, pooled_cells(sizes), strict=True):
        read += shape[1] * together
        flops += 2 * shape[1] * alone
    coordinates = boxes * 5 * 4
    return by_mode(
        Cost((read + vectors) * dtype.itemsize + coordinates, flops),
        Cost((maps + vectors) * dtype.itemsize + coordinates, flops),
        mode,
    )


def roi_align(sizes: Sizes, dtype: torch.dtype, mode: str) -> Cost:
    """The sampled cells once, the bins once; backward the whole gradient.

    Its arithmetic is no matmul and small beside that: none is counted.
    """
    cells = sizes["images"] * sizes["height"] * sizes["width"]
    bins = sizes["boxes"] * sizes["channels"] * sizes["side"] ** 2
    coordinates = sizes["boxes"] * 5 * 4
    forward, backward = (
        Cost((count * sizes["channels"] + bins) * dtype.itemsize + coordinates, 0)
        for count in (region_cells(sizes), cells)
    )
    return by_mode(forward, backward, mode)


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
    """All arithmetic of its parts; what one part hands to the next is not counted as moved.

    Backward: the gradients of the weights, for both towers are frozen.
    """
    parts = [part(sizes, dtype, "forward") for part in (conv_gate, pooled_roi_align, projectors)]
    tokens, boxes = sizes["images"] * tokens_of(sizes), sizes["images"] * sizes["boxes"]
    low, high, out = token_width(sizes), stage_shapes(sizes)[-1][1], model_width(sizes)
    channels = sum(shape[1] for shape in stage_shapes(sizes))
    # The fused tokens are written and read, the vectors too, and cells of the last stage are read by two parts.
    handed = 2 * tokens * low + 2 * boxes * channels + high * pooled_cells(sizes)[-1][0]
    forward = Cost(
        sum(part.bytes for part in parts) - handed * dtype.itemsize, sum(part.flops for part in parts)
    )
    # A matmul for each weight, and one for the input of each layer that has another before it.
    flops = 2 * tokens * (high * high + 2 * high * low + 2 * low * low + 49 * low + 2 * out * (low + out))
    flops += 2 * boxes * out * (channels + 2 * out)
    # Read: the inputs, what layers kept (vectors, fused tokens, inputs of the GELUs) and the results' gradients.
    moved = tokens * (2 * low + high + 2 * out) + boxes * (channels + 2 * out)
    sets = [width for count, width in _projector_sets(sizes) if count]
    written = _conv_gate_weights(sizes) + sum(out * (width + out) for width in sets)
    read = high * low + low * low + low * out + len(sets) * out * out
    return by_mode(forward, Cost((moved + read + written) * dtype.itemsize, flops), mode)


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], name: str) -> Ceilings:
    """Bandwidth and matmul rate of each dtype on `device`, now. Takes about two seconds.

    The bandwidth is that of a copy (read plus written) or of a sum (read), whichever is more: what mostly reads can
    beat a copy, which on a CPU reads what it overwrites, too.
    """
    on_gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if on_gpu else (1 << 28), dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    numbers = source.view(torch.float32)
    bandwidth = max(
        2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
        source.nbytes / _best_seconds(numbers.sum, device),
    )
    side = 8192 if on_gpu else 2048
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best_seconds(lambda a=a, b=b: a @ b, device)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    return Ceilings(name, bandwidth, rates, "measured in the same run")


def best(before: Ceilings, after: Ceilings) -> Ceilings:
    """The higher rates of two measurements of one device: what it can do, whatever else it did in one of them."""
    matmul = {name: max(rate, after.matmul[name]) for name, rate in before.matmul.items()}
    return replace(before, bandwidth=max(before.bandwidth, after.bandwidth), matmul=matmul)


def drift(before: Ceilings, after: Ceilings) -> str | None:
    """In words, how far two measurements of one device are apart, if that is too far to rely on either."""
    pairs = [("bandwidth", before.bandwidth, after.bandwidth)]
    pairs += [(f"{name} matmuls", rate, after.matmul[name]) for name, rate in before.matmul.items()]
    apart = [
        f"{name} {old / 1e9:,.1f}, then {new / 1e9:,.1f} G/s"
        for name, old, new in pairs
        if max(old, new) > DRIFT * min(old, new)
    ]
    return ", ".join(apart) or None


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few calls: a ceiling is what the device can do."""
    if device.type == "cuda":
        return min(launched([call], budget=1.0))
    call()
    best = math.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
