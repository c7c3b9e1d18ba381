"""RoIAlign, drop-in and pooled over several levels: public functions, custom ops, autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgllava_kernels import backend, reference
from mgllava_kernels._checks import check_alike, check_int, check_map, check_scale, check_size, check_tensor

backend.register(
    "roi_align", torch="mgllava_kernels._torch.roi_align", triton="mgllava_kernels._triton.roi_align"
)
backend.register(
    "pooled_roi_align",
    torch="mgllava_kernels._torch.roi_align",
    triton="mgllava_kernels._triton.pooled_roi_align",
)

NO_REMEDY = "RoIAlign has first derivatives only, on every backend"

Boxes = Tensor | Sequence[Tensor]


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign with the semantics and the signature of `torchvision.ops.roi_align`.

    Args:
        input: feature map (B, C, H, W), floating.
        boxes: (K, 5) rows (image index, x1, y1, x2, y2), or B tensors (L, 4) of xyxy, one per image; any
            floating dtype. Coordinates are those of the picture; `spatial_scale` takes them to the map. Boxes
            may be inverted, of no size, or outside the map. In a function compiled by `torch.compile` use
            (K, 5): of a list every tensor is specialised on 0, 1 and many boxes, so lists whose lengths vary
            exceed torch's recompile limit and then run uncompiled, or fail with `fullgraph=True`. Of (K, 5)
            torch compiles up to four graphs for one number of images; it specialises that number on 0 and 1
            as well. `torch._dynamo.decorators.mark_unbacked(tensor, 0)` on `boxes` and `input` keeps any
            sequence of both to one graph.
        output_size: bins (height, width), or one int for both.
        spatial_scale: map size / picture size.
        sampling_ratio: samples per bin and axis; 0 or less: ceil(box length / bins), as many as the bin is
            long.
        aligned: shift by half a pixel and do not stretch small boxes to length 1.

    Returns:
        (K, C, height, width) in the dtype of `input`, boxes in the order given. Coordinates and sums are
        float32, or float64 for a float64 input. Autocast does not change the dtype. `boxes` gets no gradient;
        the gradient of `input` is deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; a non-positive size or
            scale; a map without rows or columns. On the CPU also a non-finite coordinate or an image index
            outside [0, B). On a GPU, where only a synchronisation could see those, a row with such an index is
            zero, infinite coordinates count as 1e18 cells away, and a coordinate that is NaN makes its own row
            some finite average of a finite map; nothing beside the map is read.
        RuntimeError: inside a `torch.func` transform or forward-mode differentiation.

    Source: He et al., Mask R-CNN, arXiv 1703.06870, section 3.
    """
    check_map("input", input, ("B", "C", "H", "W"))
    height, width = check_size("output_size", output_size)
    arguments = (check_scale("spatial_scale", spatial_scale), height, width)
    options = (check_int("sampling_ratio", sampling_ratio), bool(aligned))
    rows = _box_rows(boxes, input)
    _refuse_transforms("roi_align")
    path = backend.resolve("roi_align", input).name
    if path == "reference":
        _check_box_values(rows, input.shape[0])
        return reference.roi_align(input, rows, *arguments, *options)
    return _roi_align(input, rows, *arguments, *options, path)


def pooled_roi_align(
    features: Sequence[Tensor],
    boxes: Boxes,
    *,
    spatial_scale: float,
    output_size: int | Sequence[int] = 56,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """One vector per box: the mean over the bins of RoIAlign on all levels, each upsampled to the finest.

    Equals `roi_align(cat([upsample(f) for f in features]), boxes, ...).mean((2, 3))` with bilinear upsampling
    (align_corners=False) to the grid of `features[0]`, but neither the upsampled maps nor the bins exist:
    out[k, c] = Σ_y Σ_x a_y[k, y] · a_x[k, x] · F[c, y, x] for each level.

    Args:
        features: levels (B, C_l, H_l, W_l), the finest first; one floating dtype and device.
        boxes: as for `roi_align`: (K, 5) or B tensors (L, 4), xyxy. In a function compiled by `torch.compile`
            use (K, 5), and `mark_unbacked` as there.
        spatial_scale: size of `features[0]` / picture size.
        output_size, sampling_ratio, aligned: as for `roi_align`; they decide where samples lie.

    Returns:
        (K, ΣC_l) in the dtype of `features`, in the order of the boxes. Precision, autocast, gradients and
        errors as for `roi_align`. A value that is not finite spoils the vectors of all boxes of its picture that
        share its row or column range (0 · ∞), where the literal composition would spoil fewer.

    Source: the object branch of MG-LLaVA, arXiv 2406.17770, section 3.2.
    """
    if isinstance(features, Tensor) or not isinstance(features, Sequence) or len(features) == 0:
        raise TypeError(f"features must be a non-empty sequence of tensors, got {type(features).__name__}")
    finest = check_map("features[0]", features[0], ("B", "C", "H", "W"))
    for index, level in enumerate(features[1:], start=1):
        check_map(f"features[{index}]", level, (finest.shape[0], "C", "H", "W"))
        check_alike(f"features[{index}]", level, "features[0]", finest)
    height, width = check_size("output_size", output_size)
    arguments = (check_scale("spatial_scale", spatial_scale), height, width)
    options = (check_int("sampling_ratio", sampling_ratio), bool(aligned))
    rows = _box_rows(boxes, finest)
    _refuse_transforms("pooled_roi_align")
    path = backend.resolve("pooled_roi_align", finest).name
    if path == "reference":
        _check_box_values(rows, finest.shape[0])
        return reference.pooled_roi_align(features, rows, *arguments, *options)
    return _pooled_roi_align(list(features), rows, *arguments, *options, path)


def _box_rows(boxes: Boxes, features: Tensor) -> Tensor:
    """Boxes as (K, 5) in the coordinate dtype, without gradient."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(boxes, Tensor):
        check_tensor("boxes", boxes, ("K", 5))
        if boxes.device != features.device:
            raise ValueError(
                f"boxes must be on the device of the features, {features.device}, got {boxes.device}"
            )
        return boxes.detach().to(dtype)
    if not isinstance(boxes, Sequence):
        raise TypeError(
            f"boxes must be a tensor (K, 5) or a list of tensors (L, 4), got {type(boxes).__name__}"
        )
    if len(boxes) != features.shape[0]:
        raise ValueError(f"boxes must hold one tensor per image, {features.shape[0]}, got {len(boxes)}")
    rows = [features.new_zeros(0, 5, dtype=dtype)]
    for index, image_boxes in enumerate(boxes):
        check_tensor(f"boxes[{index}]", image_boxes, ("L", 4))
        if image_boxes.device != features.device:
            raise ValueError(
                f"boxes[{index}] must be on the device of the features, {features.device}, "
                f"got {image_boxes.device}"
            )
        image_index = torch.full((image_boxes.shape[0], 1), index, dtype=dtype, device=features.device)
        rows.append(torch.cat([image_index, image_boxes.detach().to(dtype)], dim=1))
    return torch.cat(rows)


def _refuse_transforms(op: str) -> None:
    """Refuse where torchvision's op, and so the reference, has no rules either: tangents would be zero."""
    if backend.in_transform():
        raise RuntimeError(
            f"{op} does not run inside torch.func transforms (grad, jvp, vmap, ...) and forward-mode "
            f"differentiation, on any backend: call it outside and pass in its result"
        )


def _check_box_values(rows: Tensor, images: int) -> None:
    """What only the values show; skipped where reading them would synchronise or stop a trace."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"boxes must be finite, got {rows[row].tolist()} in row {row}")
    index = rows[:, 0].trunc()
    outside = (index < 0) | (index >= images)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"boxes must have an image index in [0, {images}), got {rows[row, 0].item()} in row {row}"
        )


@torch.library.custom_op("mgllava::roi_align", mutates_args=())
def _roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
    path: str,
) -> Tensor:
    _check_box_values(boxes, input.shape[0])
    arguments = (input, boxes, spatial_scale, output_height, output_width, sampling_ratio, aligned)
    return backend.call("roi_align", path, "roi_align", input.device, *arguments)


@_roi_align.register_fake
def _(input, boxes, spatial_scale, output_height, output_width, sampling_ratio, aligned, path):
    return input.new_empty(boxes.shape[0], input.shape[1], output_height, output_width)


@torch.library.custom_op("mgllava::roi_align_backward", mutates_args=())
def _roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    shape: Sequence[int],
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
    path: str,
) -> Tensor:
    arguments = (grad, boxes, shape, spatial_scale, output_height, output_width, sampling_ratio, aligned)
    return backend.call("roi_align", path, "roi_align_backward", grad.device, *arguments)


@_roi_align_backward.register_fake
def _(grad, boxes, shape, spatial_scale, output_height, output_width, sampling_ratio, aligned, path):
    return grad.new_empty(shape)


def _roi_align_setup(ctx, inputs, output):
    input, boxes, *ctx.options = inputs
    ctx.shape = input.shape
    ctx.save_for_backward(boxes)


def _roi_align_autograd(ctx, grad):
    (boxes,) = ctx.saved_tensors
    grad_input = None
    if ctx.needs_input_grad[0]:
        grad_input = _roi_align_backward(grad, boxes, ctx.shape, *ctx.options)
    return grad_input, *(None,) * 7


_roi_align.register_autograd(_roi_align_autograd, setup_context=_roi_align_setup)
_roi_align_backward.register_autograd(backend.refuse_double_backward("roi_align", NO_REMEDY))


@torch.library.custom_op("mgllava::pooled_roi_align", mutates_args=())
def _pooled_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
    path: str,
) -> Tensor:
    _check_box_values(boxes, features[0].shape[0])
    arguments = (features, boxes, spatial_scale, output_height, output_width, sampling_ratio, aligned)
    return backend.call("pooled_roi_align", path, "pooled_roi_align", boxes.device, *arguments)


@_pooled_roi_align.register_fake
def _(features, boxes, spatial_scale, output_height, output_width, sampling_ratio, aligned, path):
    return features[0].new_empty(boxes.shape[0], sum(level.shape[1] for level in features))


@torch.library.custom_op("mgllava::pooled_roi_align_backward", mutates_args=())
def _pooled_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    shapes: Sequence[int],
    levels: Sequence[int],
    spatial_scale: float,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
    path: str,
) -> list[Tensor]:
    """`shapes` holds four sizes per level; `levels` names those that need a gradient."""
    arguments = (grad, boxes, _by_level(shapes), levels)
    options = (spatial_scale, output_height, output_width, sampling_ratio, aligned)
    return backend.call(
        "pooled_roi_align", path, "pooled_roi_align_backward", grad.device, *arguments, *options
    )


@_pooled_roi_align_backward.register_fake
def _(
    grad,
    boxes,
    shapes,
    levels,
    spatial_scale,
    output_height,
    output_width,
    sampling_ratio,
    aligned,
    path,
):
    return [grad.new_empty(_by_level(shapes)[level]) for level in levels]


def _by_level(shapes: Sequence[int]) -> list[Sequence[int]]:
    return [shapes[first : first + 4] for first in range(0, len(shapes), 4)]


def _pooled_roi_align_setup(ctx, inputs, output):
    features, boxes, *ctx.options = inputs
    ctx.shapes = [size for level in features for size in level.shape]
    ctx.save_for_backward(boxes)


def _pooled_roi_align_autograd(ctx, grad):
    backend.refuse_batched_gradients("pooled_roi_align", grad)
    (boxes,) = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    levels = [level for level, need in enumerate(needed) if need]
    grads: list[Tensor | None] = [None] * len(needed)
    for level, value in zip(
        levels, _pooled_roi_align_backward(grad, boxes, ctx.shapes, levels, *ctx.options), strict=True
    ):
        grads[level] = value
    return grads, *(None,) * 7


_pooled_roi_align.register_autograd(_pooled_roi_align_autograd, setup_context=_pooled_roi_align_setup)
_pooled_roi_align_backward.register_autograd(backend.refuse_double_backward("pooled_roi_align", NO_REMEDY))
