"""Objects in a picture: box geometry and selection."""

from .boxes import detections_to_boxes, load_detections

__all__ = ["detections_to_boxes", "load_detections"]
