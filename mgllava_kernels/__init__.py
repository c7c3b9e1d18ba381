"""Fused ops of MG-LLaVA's vision neck, usable in any model: RoIAlign, Conv-Gate fusion, projectors."""

from mgllava_kernels.backend import active_backend, use_backend
from mgllava_kernels.conv_gate import ConvGateFusion, conv_gate_fusion, depthwise_conv_gelu
from mgllava_kernels.neck import vision_neck
from mgllava_kernels.projector import (
    Projector,
    grouped_mlp_projector,
    linear_gelu,
    mlp_projector,
    project_groups,
)
from mgllava_kernels.roi_align import pooled_roi_align, roi_align

__all__ = [
    "ConvGateFusion",
    "Projector",
    "active_backend",
    "conv_gate_fusion",
    "depthwise_conv_gelu",
    "grouped_mlp_projector",
    "linear_gelu",
    "mlp_projector",
    "pooled_roi_align",
    "project_groups",
    "roi_align",
    "use_backend",
    "vision_neck",
]
