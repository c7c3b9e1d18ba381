"""Detectors by name: open vocabulary, closed vocabulary, and class-agnostic proposals without weights.

    detector = load_detector("owlv2", device="cuda")
    (found,) = detector([picture], tags=[["cat", "dog"]])

Each family has its file; `pretrained.py` holds what those with weights share, `output.py` what all do.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ..detector import Detector

__all__ = ["DETECTORS", "DetectorFamily", "default_threshold", "load_detector"]


@dataclass(frozen=True)
class DetectorFamily:
    """What is known of a detector before its weights load.

    Attributes:
        module: the file of this folder that has it, and in it
        builder: the name of what builds it.
        checkpoint: hub id of the published weights taken by default; None for a detector without weights.
        needs_tags: whether it looks for the names it is given (open vocabulary).
    """

    module: str
    builder: str
    checkpoint: str | None
    needs_tags: bool


# Hub ids: the paper's own detector; for the others the largest of the plain published ones.
DETECTORS: dict[str, DetectorFamily] = {
    "owlv2": DetectorFamily(
        "owlv2",
        "Owlv2Detector",
        "google/owlv2-large-patch14-ensemble",
        needs_tags=True,
    ),
    "grounding-dino": DetectorFamily(
        "grounding_dino",
        "GroundingDinoDetector",
        "IDEA-Research/grounding-dino-base",
        needs_tags=True,
    ),
    "mm-grounding-dino": DetectorFamily(
        "grounding_dino",
        "MMGroundingDinoDetector",
        "openmmlab-community/mm_grounding_dino_large_all",
        needs_tags=True,
    ),
    "llmdet": DetectorFamily(
        "grounding_dino",
        "MMGroundingDinoDetector",
        "iSEE-Laboratory/llmdet_large",
        needs_tags=True,
    ),
    "florence-2": DetectorFamily(
        "florence2",
        "Florence2Detector",
        "florence-community/Florence-2-large",
        needs_tags=False,
    ),
    "florence-2-captions": DetectorFamily(
        "florence2",
        "Florence2CaptionDetector",
        "florence-community/Florence-2-large",
        needs_tags=False,
    ),
    "detr": DetectorFamily(
        "detr",
        "DetrDetector",
        "facebook/detr-resnet-50",
        needs_tags=False,
    ),
    "rt-detr": DetectorFamily(
        "detr",
        "DetrDetector",
        "PekingU/rtdetr_r50vd",
        needs_tags=False,
    ),
    "proposals": DetectorFamily(
        "proposals",
        "ProposalDetector",
        None,
        needs_tags=False,
    ),
}


def default_threshold(name: str) -> float:
    """The score that detections of this one of `DETECTORS` must exceed where no other is given."""
    return _builder(name).default_threshold


def load_detector(
    name: str,
    *,
    checkpoint: str | None = None,
    device: str | torch.device = "cpu",
    threshold: float | None = None,
) -> Detector:
    """Load a detector, ready to be called.

    Weights load in float32. `detr` and `rt-detr` take a checkpoint of either kind, and of Conditional DETR, Deformable
    DETR or RT-DETR v2.

    Args:
        name: one of `DETECTORS`.
        checkpoint: folder or hub id of the weights; by default the family's published ones.
        device: where it runs.
        threshold: detections scored at or below it are left out; by default the family's own.

    Raises:
        ValueError: unknown name, a threshold outside 0..1, a checkpoint of another architecture, or a checkpoint or
            threshold for a detector that has none.
        OSError: the weights are neither here nor can they be downloaded, or are damaged; says what to do.
        ImportError: a package that this detector needs is missing; names it.
    """
    if name not in DETECTORS:
        raise ValueError(f"detector is {name!r}; expected one of {', '.join(DETECTORS)}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a score from 0 to below 1")
    family = DETECTORS[name]
    if family.checkpoint is None and checkpoint is not None:
        raise ValueError(f"detector {name!r} has no weights, but checkpoint is {checkpoint!r}")
    build = _builder(name)
    if family.checkpoint is None:
        return build(threshold=threshold)
    return build(name, checkpoint or family.checkpoint, device=device, threshold=threshold)


def _builder(name: str) -> Any:
    family = DETECTORS[name]
    return getattr(import_module(f".{family.module}", __package__), family.builder)
