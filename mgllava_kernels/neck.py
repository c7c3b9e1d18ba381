"""The whole vision neck as one function: fusion, objects and both projectors."""

from collections.abc import Sequence

from torch import Tensor

from mgllava_kernels.conv_gate import ConvGateFusion
from mgllava_kernels.projector import Projector, project_groups
from mgllava_kernels.roi_align import Boxes, pooled_roi_align


def vision_neck(
    low_res: Tensor,
    stages: Sequence[Tensor],
    boxes: Boxes,
    *,
    fusion: ConvGateFusion,
    image_projector: Projector,
    object_projector: Projector,
    spatial_scale: float,
    output_size: int | Sequence[int] = 56,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Image and object tokens of pictures, from both towers' features.

    Nothing in it waits for the device, so a CUDA graph or `torch.compile(fullgraph=True)` takes it in one
    piece; image and object tokens share the launches of the projectors where their modules allow it.

    Args:
        low_res: ViT tokens (B, N, D).
        stages: maps (B, C_l, H_l, W_l), the finest first; the last has N positions and is what is fused.
        boxes: as for `pooled_roi_align`, in pixels of the high-resolution picture.
        fusion, image_projector, object_projector: modules of this package; the projectors end in one width T.
        spatial_scale, output_size, sampling_ratio, aligned: as for `pooled_roi_align`.

    Returns:
        Image tokens (B, N, T) and object tokens (K, T), in the order of the boxes.

    Bytes and FLOPs forward in bfloat16 at published sizes (tokens 576x1024, four stages of 26.5 MB a picture, T
    4096), for 1, 8 and 32 pictures of 100 boxes each: 145, 377 and 1,176 MB, of which 111 MB are weights; 36, 288
    and 1,151 GFLOP. At 600 TFLOP/s that is 60, 480 and 1,918 µs, set by the FLOPs, four fifths of them the
    projectors'. The original composition writes 425 MB a picture of joined maps and 3.6 GB of sampled boxes, in
    float32, before it averages them.

    Raises:
        TypeError, ValueError, RuntimeError: as the ops it is made of.

    Source: MG-LLaVA, arXiv 2406.17770, sections 3.1 and 3.2.
    """
    if isinstance(stages, Tensor) or not isinstance(stages, Sequence) or len(stages) == 0:
        raise TypeError(f"stages must be a non-empty sequence of maps, got {type(stages).__name__}")
    # The objects first: their arguments are checked before anything is computed.
    objects = pooled_roi_align(
        stages,
        boxes,
        spatial_scale=spatial_scale,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    fused = fusion(low_res, stages[-1])
    image_tokens, object_tokens = project_groups([image_projector, object_projector], [fused, objects])
    return image_tokens, object_tokens
