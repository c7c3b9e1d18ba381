"""Objects in a picture: detectors, box geometry and selection."""

from .boxes import detections_to_boxes, load_detections
from .detectors import load_detector

__all__ = ["detections_to_boxes", "load_detections", "load_detector"]
