"""What each Triton op is compiled ahead of time and tuned for: calls at published sizes.

`mgllava_kernels.aot` makes the calls on meta tensors, `mgllava_kernels.tune` on a GPU. An op takes part in
both by one entry in OPS; its kernels and their spaces are found by watching what it launches and chooses.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgllava_kernels import configs
from mgllava_kernels._triton import launch
from mgllava_kernels._triton.launch import Target
from mgllava_kernels.configs import Request

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Arguments = Callable[[torch.dtype, str, torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Workload:
    """One call of an op. `arguments` makes random arguments for a dtype, a layout and a device."""

    name: str
    arguments: Arguments


@dataclass(frozen=True)
class Op:
    """A host function of `mgllava_kernels._triton`, imported when it is called.

    `layouts` are those of FORMATS in which the op takes its maps.
    """

    name: str
    module: str
    workloads: tuple[Workload, ...]
    layouts: tuple[str, ...] = tuple(FORMATS)

    def call(self, arguments: tuple[Any, ...]) -> Any:
        return getattr(importlib.import_module(self.module), self.name)(*arguments)


def select(names: Sequence[str], ops: Sequence[Op]) -> list[Op]:
    """The ops of these names, or all if there are none.

    Raises:
        ValueError: unknown name.
    """
    known = {op.name: op for op in ops}
    for name in names:
        if name not in known:
            raise ValueError(f"op must be one of {', '.join(known)}; got {name!r}")
    return [known[name] for name in names] or list(ops)


def select_dtypes(names: Sequence[str]) -> list[torch.dtype]:
    """The dtypes of these names, or all if there are none.

    Raises:
        ValueError: the kernels do not take such a dtype.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    for name in names:
        if name not in known:
            raise ValueError(f"dtype must be one of {', '.join(known)}; got {name!r}")
    return [known[name] for name in names] or list(DTYPES)


def requests_of(op: Op, target: Target, dtype: torch.dtype, layout: str) -> list[tuple[Op, list[Request]]]:
    """What each workload of `op` asks `choose`, each with the op of that workload alone; nothing is compiled.

    Of several requests that tables do not tell apart one is kept.
    """
    found = []
    for workload in op.workloads:
        one = dataclasses.replace(op, workloads=(workload,))
        with launch.compile_only(target, lambda *_: None), configs.observe() as observed:
            one.call(workload.arguments(dtype, layout, torch.device("meta")))
        distinct = {(request.space.kernel, request.key, request.count): request for request in observed}
        found.append((one, list(distinct.values())))
    return found


def maps(shape: Sequence[int], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """Random maps of `shape` (B, C, H, W)."""
    return torch.randn(*shape, dtype=dtype, device=device).contiguous(memory_format=FORMATS[layout])


def random_boxes(images: int, per_image: int, width: int, height: int, device: torch.device) -> Tensor:
    """Boxes (images · per_image, 5) in whole pixels of a picture, picture after picture.

    They lie between two uniform corners: on average a third of the picture's width and of its height.
    """
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(images * per_image, 2, 2, generator=generator) * torch.tensor([width, height])
    index = torch.arange(images).repeat_interleave(per_image).unsqueeze(1)
    return torch.cat([index, corners.amin(1).round(), corners.amax(1).round()], dim=1).to(device)


# ConvNeXt-L's stages for a picture of 768 pixels: channels and side.
STAGES = ((192, 192), (384, 96), (768, 48), (1536, 24))
PICTURE = 768
BINS = 56
# Pictures, boxes in each. A picture without detections has one box.
PICTURES = ((1, 100), (8, 100), (32, 100), (1, 60), (1, 30), (1, 10), (1, 1))


def _stage_shapes(images: int) -> list[tuple[int, int, int, int]]:
    return [(images, channels, side, side) for channels, side in STAGES]


def _pooled_arguments(
    images: int, per_image: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    features = [maps(shape, dtype, layout, device) for shape in _stage_shapes(images)]
    boxes = random_boxes(images, per_image, PICTURE, PICTURE, device)
    return features, boxes, STAGES[0][1] / PICTURE, BINS, BINS, -1, False


def _pooled_backward_arguments(
    images: int, per_image: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    boxes = random_boxes(images, per_image, PICTURE, PICTURE, device)
    channels = sum(channels for channels, _ in STAGES)
    grad = torch.randn(len(boxes), channels, dtype=dtype, device=device)
    shapes, levels = _stage_shapes(images), list(range(len(STAGES)))
    return grad, boxes, shapes, levels, STAGES[0][1] / PICTURE, BINS, BINS, -1, False


# torchvision's feature pyramid: the finest level of two pictures of 1216x800 pixels, with stride 4. It gets the
# boxes of sqrt(area) below 112 pixels: level floor(4 + log2(sqrt(area) / 224)), brought within 2 to 5.
LEVEL = (2, 256, 200, 304)
LEVEL_PICTURE = (1216, 800)
LEVEL_ROOTS = (16, 112)


def level_boxes(images: int, per_image: int, width: int, height: int, device: torch.device) -> Tensor:
    """Boxes (images · per_image, 5) inside a picture as the finest level gets them, picture after picture.

    sqrt(area) is log-uniform in LEVEL_ROOTS, width / height log-uniform in 1/2 to 2, the place uniform. On the
    map that is 12.7 cells a side on average and 40 at most.
    """
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(images * per_image, 4, generator=generator)
    smallest, largest = LEVEL_ROOTS
    root = smallest * (largest / smallest) ** uniform[:, :1]
    stretch = 2 ** (uniform[:, 1:2] - 0.5)
    sides = torch.cat([root * stretch, root / stretch], dim=1)
    low = uniform[:, 2:] * (torch.tensor([width, height]) - sides)
    index = torch.arange(images).repeat_interleave(per_image).unsqueeze(1)
    return torch.cat([index, low, low + sides], dim=1).to(device)


Draw = Callable[[int, int, int, int, torch.device], Tensor]

# What the boxes are called and how they are drawn, boxes in all, side of the output, sampling ratio, aligned.
REGIONS = (
    ("boxes", level_boxes, 512, 7, 2, False),
    ("boxes", level_boxes, 1000, 7, 2, False),
    ("boxes", level_boxes, 512, 14, 2, False),
    ("boxes", level_boxes, 1000, 14, 2, False),
    ("boxes", level_boxes, 512, 7, -1, True),
    ("large boxes", random_boxes, 512, 7, 2, False),
)


def _roi_arguments(
    draw: Draw,
    boxes: int,
    side: int,
    ratio: int,
    aligned: bool,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> tuple[Any, ...]:
    rows = draw(LEVEL[0], boxes // LEVEL[0], *LEVEL_PICTURE, device)
    return maps(LEVEL, dtype, layout, device), rows, LEVEL[3] / LEVEL_PICTURE[0], side, side, ratio, aligned


def _roi_backward_arguments(
    draw: Draw,
    boxes: int,
    side: int,
    ratio: int,
    aligned: bool,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> tuple[Any, ...]:
    rows = draw(LEVEL[0], boxes // LEVEL[0], *LEVEL_PICTURE, device)
    grad = maps((boxes, LEVEL[1], side, side), dtype, layout, device)
    return grad, rows, LEVEL, LEVEL[3] / LEVEL_PICTURE[0], side, side, ratio, aligned


# Pictures, boxes in each, for the projectors: CLIP's tokens of a picture, and those of its boxes.
PROJECTED = ((1, 100), (8, 100), (32, 100))
TOKENS = 576
# CLIP's width and the channels of all stages, to the width of a language model of 7B.
IMAGE_WIDTH, OBJECT_WIDTH, MODEL_WIDTH = 1024, 2880, 4096


def _layers(
    images: int, per_image: int, dtype: torch.dtype, device: torch.device, object_width: int = OBJECT_WIDTH
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """x, w1, b1, w2, b2 of the image tokens and of the objects."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device) / shape[-1] ** 0.5

    return [
        (
            normal(images * tokens, width) * width**0.5,
            *(normal(MODEL_WIDTH, width), normal(MODEL_WIDTH)),
            *(normal(MODEL_WIDTH, MODEL_WIDTH), normal(MODEL_WIDTH)),
        )
        for tokens, width in ((TOKENS, IMAGE_WIDTH), (per_image, object_width))
    ]


def projector_arguments(
    images: int,
    per_image: int,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    object_width: int = OBJECT_WIDTH,
) -> tuple[Any, ...]:
    columns = zip(*_layers(images, per_image, dtype, device, object_width), strict=True)
    return *(list(column) for column in columns), True


def _projector_backward_arguments(
    images: int, per_image: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    xs, w1s, _, w2s, _ = (list(c) for c in zip(*_layers(images, per_image, dtype, device), strict=True))
    grads, pre_activations = (
        [torch.randn(len(x), MODEL_WIDTH, dtype=dtype, device=device) for x in xs] for _ in range(2)
    )
    return grads, xs, w1s, w2s, pre_activations, [True] * 10


def _linear_arguments(
    images: int, per_image: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    return *_layers(images, per_image, dtype, device)[0][:3], True


def _linear_backward_arguments(
    images: int, per_image: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    x, weight, *_ = _layers(images, per_image, dtype, device)[0]
    grad, pre_activation = (torch.randn(len(x), MODEL_WIDTH, dtype=dtype, device=device) for _ in range(2))
    return grad, x, weight, pre_activation, [True] * 3


def _projected(arguments: Callable[..., tuple[Any, ...]]) -> tuple[Workload, ...]:
    return tuple(
        Workload(f"{images} x {TOKENS} tokens and {per_image} boxes", partial(arguments, images, per_image))
        for images, per_image in PROJECTED
    )


CONV_GATE = "mgllava_kernels._triton.conv_gate"

# Conv-Gate's sizes: the grid of CLIP's tokens and of ConvNeXt-L's last stage; CLIP's width and the channels of that
# stage. The hidden layer of the gate is half as wide as CLIP.
GRID = STAGES[3][1]
WIDTHS = IMAGE_WIDTH, STAGES[3][0]

# Pictures, variant, and whether what the backward pass needs is kept, as in training. The first call has the
# largest tiles and epilogues.
FUSED = (
    (32, "gate_sum", True),
    (32, "gate_sum", False),
    (8, "gate_sum", False),
    (1, "gate_sum", True),
    (1, "gate_sum", False),
    (8, "gate_concat", False),
    (8, "concat_projected", True),
)
FUSED_BACKWARD = (
    (32, "gate_sum"),
    (8, "gate_sum"),
    (1, "gate_sum"),
    (8, "gate_concat"),
    (8, "concat_projected"),
)
CONVOLVED = ((32, True), (32, False), (8, False), (1, True), (1, False))
CONVOLVED_BACKWARD = (32, 8, 1)


def _low_res(images: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """CLIP's tokens as the model passes them, a view without the class token."""
    return torch.randn(images, 1 + TOKENS, width, dtype=dtype, device=device)[:, 1:]


def _fusion_weights(
    variant: str, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    low, high = widths
    shapes: list[tuple[int, ...]] = [
        (high, high, 1, 1),
        (low, high, 1, 1),
        (low, 1, 7, 7),
        (low, low, 1, 1),
    ]
    if variant.startswith("gate"):
        shapes += [(low // 2, 2 * low), (1, low // 2)]
    weights = []
    for rows, *inside in shapes:
        scale = math.prod(inside) ** -0.5
        weights.append(scale * torch.randn(rows, *inside, dtype=dtype, device=device))
        weights.append(scale * torch.randn(rows, dtype=dtype, device=device))
    return weights


def fusion_arguments(
    images: int,
    variant: str,
    save: bool,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    widths: tuple[int, int] = WIDTHS,
) -> tuple[Any, ...]:
    low, high = widths
    high_res = maps((images, high, GRID, GRID), dtype, layout, device)
    weights = _fusion_weights(variant, widths, dtype, device)
    return _low_res(images, low, dtype, device), high_res, weights, variant, save


def fusion_backward_arguments(
    images: int,
    variant: str,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    widths: tuple[int, int] = WIDTHS,
) -> tuple[Any, ...]:
    low, high = widths
    low_res, high_res, weights, *_ = fusion_arguments(images, variant, True, dtype, layout, device, widths)
    grad, low_pre, high_pre = (
        torch.randn(images, TOKENS, size, dtype=dtype, device=device)
        for size in (low if variant == "gate_sum" else 2 * low, low, high)
    )
    means = low_res.new_empty(0)
    if variant.startswith("gate"):
        means = torch.randn(images, 2 * low + high, device=device) / TOKENS**0.5
    needed = [True] * (2 + len(weights))
    return grad, low_res, high_res, weights, low_pre, high_pre, means, variant, needed


def _convolution_arguments(
    images: int, save: bool, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    weight, bias = _fusion_weights("concat_projected", WIDTHS, dtype, device)[4:6]
    return _low_res(images, IMAGE_WIDTH, dtype, device), weight, bias, GRID, GRID, save


def _convolution_backward_arguments(
    images: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Any, ...]:
    tokens, weight, *_ = _convolution_arguments(images, True, dtype, layout, device)
    grad, pre_activation = (torch.randn(tokens.shape, dtype=dtype, device=device) for _ in range(2))
    return grad, tokens, weight, pre_activation, GRID, GRID, [True] * 3


def _saved(name: str, save: bool) -> str:
    return f"{name}, for training" if save else name


def _pooled(arguments: Callable[..., tuple[Any, ...]]) -> tuple[Workload, ...]:
    return tuple(
        Workload(f"{images} x {per_image} boxes", partial(arguments, images, per_image))
        for images, per_image in PICTURES
    )


def _regions(arguments: Callable[..., tuple[Any, ...]]) -> tuple[Workload, ...]:
    return tuple(
        Workload(
            f"{boxes} {name} to {side}x{side}, ratio {ratio}" + (", aligned" if aligned else ""),
            partial(arguments, draw, boxes, side, ratio, aligned),
        )
        for name, draw, boxes, side, ratio, aligned in REGIONS
    )


OPS = (
    Op("pooled_roi_align", "mgllava_kernels._triton.pooled_roi_align", _pooled(_pooled_arguments)),
    Op(
        "pooled_roi_align_backward",
        "mgllava_kernels._triton.pooled_roi_align",
        _pooled(_pooled_backward_arguments),
        layouts=("contiguous",),
    ),
    Op("roi_align", "mgllava_kernels._triton.roi_align", _regions(_roi_arguments)),
    Op("roi_align_backward", "mgllava_kernels._triton.roi_align", _regions(_roi_backward_arguments)),
    *(
        Op(name, "mgllava_kernels._triton.projector", _projected(arguments), layouts=("contiguous",))
        for name, arguments in (
            ("grouped_mlp_projector", projector_arguments),
            ("grouped_mlp_projector_backward", _projector_backward_arguments),
            ("linear_gelu", _linear_arguments),
            ("linear_gelu_backward", _linear_backward_arguments),
        )
    ),
    Op(
        "conv_gate_fusion",
        CONV_GATE,
        tuple(
            Workload(
                _saved(f"{images} x {TOKENS} tokens, {variant}", save),
                partial(fusion_arguments, images, variant, save),
            )
            for images, variant, save in FUSED
        ),
    ),
    Op(
        "conv_gate_fusion_backward",
        CONV_GATE,
        tuple(
            Workload(
                f"{images} x {TOKENS} tokens, {variant}",
                partial(fusion_backward_arguments, images, variant),
            )
            for images, variant in FUSED_BACKWARD
        ),
    ),
    Op(
        "depthwise_conv_gelu",
        CONV_GATE,
        tuple(
            Workload(
                _saved(f"{images} x {TOKENS} tokens", save), partial(_convolution_arguments, images, save)
            )
            for images, save in CONVOLVED
        ),
        layouts=("contiguous",),
    ),
    Op(
        "depthwise_conv_gelu_backward",
        CONV_GATE,
        tuple(
            Workload(f"{images} x {TOKENS} tokens", partial(_convolution_backward_arguments, images))
            for images in CONVOLVED_BACKWARD
        ),
        layouts=("contiguous",),
    ),
)
