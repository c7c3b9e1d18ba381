"""One picture becomes the two pixel tensors of MG-LLaVA, its detections boxes (paper, section 3)."""

import base64
import binascii
import http.client
import io
import struct
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import ImagesKwargs

from .objects.boxes import detections_to_boxes

__all__ = ["MGLlavaBatchFeature", "MGLlavaImageProcessor", "flatten_images", "load_picture"]

URL_TIMEOUT_SECONDS = 30.0
# What Pillow raises for a file it cannot make sense of, the size limits included.
UNREADABLE = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    EOFError,
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
)
DETECTION_KEYS = {"boxes", "labels", "scores"}


class MGLlavaBatchFeature(BatchFeature):
    """A `BatchFeature` whose boxes keep float32: half precision moves a coordinate of 768 by whole pixels."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        boxes = self.get("boxes")
        super().to(*args, **kwargs)
        if isinstance(boxes, torch.Tensor):
            self["boxes"] = boxes.to(self["boxes"].device)
        return self


class MGLlavaImagesKwargs(ImagesKwargs, total=False):
    """Options of one call, beside those of the image processor itself."""

    iou_threshold: float | None
    max_objects: int | None
    max_per_category: int | None
    best_per_label: bool | None


class MGLlavaImageProcessor(BaseImageProcessor):
    """Turns pictures and their detections into the model's vision inputs.

    A picture is used upright: an EXIF orientation is applied, whether the picture comes as a path, a URL or a
    PIL image, and detections are pixels of that upright picture. Transparency is composed on white; 16-bit
    pictures are scaled, not clipped. Then: pad to a square with the mean colour, resize to `high_res_size`
    (bicubic), normalise. The low-resolution view is a bilinear resize of that normalised tensor.

    Args:
        high_res_size: side of the high-resolution canvas in pixels, S_h.
        low_res_size: side of the low-resolution view in pixels, S_l.
        image_mean: mean of each channel (CLIP's by default), also the padding colour.
        image_std: standard deviation of each channel (CLIP's by default).
        iou_threshold: overlap above which the lower-scored box of a label is suppressed.
        max_objects: number of boxes above which the limit per label applies.
        max_per_category: how many boxes of one label stay then.
    """

    valid_kwargs = MGLlavaImagesKwargs
    model_input_names = ["pixel_values", "pixel_values_high_res", "boxes", "num_boxes"]  # noqa: RUF012

    def __init__(
        self,
        high_res_size: int = 768,
        low_res_size: int = 336,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        iou_threshold: float = 0.2,
        max_objects: int = 100,
        max_per_category: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.high_res_size = high_res_size
        self.low_res_size = low_res_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.iou_threshold = iou_threshold
        self.max_objects = max_objects
        self.max_per_category = max_per_category

    @property
    def selection(self) -> dict[str, Any]:
        """What decides which detections the model gets, as `select_detections` takes it."""
        names = ("high_res_size", "iou_threshold", "max_objects", "max_per_category")
        return {name: getattr(self, name) for name in names}

    def preprocess(
        self,
        images: Any,
        detections: Any = None,
        *,
        iou_threshold: float | None = None,
        max_objects: int | None = None,
        max_per_category: int | None = None,
        best_per_label: bool = False,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        return_tensors: str | None = None,
    ) -> MGLlavaBatchFeature:
        """Process a picture or several; `image_processor(...)` is the same.

        Args:
            images: a picture (PIL, array, tensor, path, URL, base64 text), or lists of them at any depth.
                Arrays and tensors are (H, W), (H, W, C) or (C, H, W); integers 0..255 (uint16: 0..65535) or
                floats 0..1 or 0..255. Where the shape leaves the channel axis open, arrays are (H, W, C)
                and tensors (C, H, W).
            detections: for each picture `{"boxes": ..., "labels": ..., "scores": ...}` (labels and scores
                optional) or `None`; one of them for a single picture, lists of the same depth as `images`
                otherwise. See `mgllava.objects.detections_to_boxes`.
            iou_threshold, max_objects, max_per_category: instead of the processor's own settings.
            best_per_label: keep only the best box of each label.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays and tensors.
            device: where the tensors shall be.
            return_tensors: `"pt"` or `"np"`; torch tensors by default.

        Returns:
            `pixel_values` (B, 3, S_l, S_l) and `pixel_values_high_res` (B, 3, S_h, S_h), float32; and, if
            detections are given, `boxes` (B, K_max, 4) float32, x1 y1 x2 y2 in pixels of the canvas, padded
            with zeros, and `num_boxes` (B,) int64, at least 1.

        Raises:
            ValueError: a picture that cannot be read, is empty or too large, or detections of the wrong
                form or number; the message names the picture.
        """
        images = flatten_images(images)
        if not images:
            raise ValueError("images is empty, expected at least one picture")
        if detections is not None:
            detections = flatten_detections(detections, len(images))
        pictures = [
            load_picture(image, name=f"images[{index}]", input_data_format=input_data_format)
            for index, image in enumerate(images)
        ]
        data = {}
        if detections is not None:
            settings = {
                "high_res_size": self.high_res_size,
                "iou_threshold": self.iou_threshold if iou_threshold is None else iou_threshold,
                "max_objects": self.max_objects if max_objects is None else max_objects,
                "max_per_category": self.max_per_category if max_per_category is None else max_per_category,
                "best_per_label": best_per_label,
            }
            boxes = [
                _boxes_of(picture, found, index, settings)
                for index, (picture, found) in enumerate(zip(pictures, detections, strict=True))
            ]
            data["boxes"] = pad_sequence(boxes, batch_first=True)
            data["num_boxes"] = torch.tensor([len(rows) for rows in boxes])

        high_res = torch.stack([self._normalized(picture) for picture in pictures])
        low_res = F.interpolate(high_res, size=(self.low_res_size, self.low_res_size), mode="bilinear")
        data = {"pixel_values": low_res, "pixel_values_high_res": high_res, **data}
        if device is not None:
            data = {key: value.to(device) for key, value in data.items()}
        return MGLlavaBatchFeature(data, tensor_type=return_tensors)

    def _normalized(self, picture: Image.Image) -> torch.Tensor:
        side = max(picture.size)
        if picture.width != picture.height:
            colour = tuple(int(value * 255) for value in self.image_mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        if side != self.high_res_size:
            picture = picture.resize((self.high_res_size, self.high_res_size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return pixels.float().div_(255).sub_(mean).div_(std)


def _boxes_of(
    picture: Image.Image, found: Mapping[str, Any] | None, index: int, settings: dict[str, Any]
) -> torch.Tensor:
    try:
        boxes, _ = detections_to_boxes(
            **(found or {"boxes": []}), image_size=(picture.height, picture.width), **settings
        )
    except ValueError as error:
        raise ValueError(f"detections[{index}]: {error}") from error
    return boxes


def flatten_images(images: Any) -> list[Any]:
    """A flat list of single pictures out of one picture, a batch array or lists of these at any depth."""
    if isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in flatten_images(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def flatten_detections(detections: Any, num_images: int) -> list[Mapping[str, Any] | None]:
    """One entry (detections or `None`) for each of `num_images` pictures.

    Raises:
        ValueError: another number of entries, or an entry that is not `{"boxes", "labels", "scores"}`.
    """
    entries = _flatten_lists(detections)
    if len(entries) != num_images:
        raise ValueError(
            f"{len(entries)} detections for {num_images} pictures; give one for each picture or None"
        )
    for index, entry in enumerate(entries):
        if entry is None:
            continue
        if not isinstance(entry, Mapping) or "boxes" not in entry or not set(entry) <= DETECTION_KEYS:
            form = '{"boxes": ..., "labels": ..., "scores": ...} or None'
            found = f"keys {sorted(map(str, entry))}" if isinstance(entry, Mapping) else repr(entry)
            raise ValueError(f"detections[{index}] has {found}, expected {form}")
    return entries


def _flatten_lists(entries: Any) -> list[Any]:
    if isinstance(entries, (list, tuple)):
        return [leaf for entry in entries for leaf in _flatten_lists(entry)]
    return [entries]


def load_picture(source: Any, name: str = "image", input_data_format: str | None = None) -> Image.Image:
    """Read a picture as an upright 8-bit RGB image.

    Args:
        source: PIL image, array, tensor, path, `http(s)://` URL, `data:` URL or base64 text.
        name: what error messages call it, beside a path or URL.
        input_data_format: as in `MGLlavaImageProcessor.preprocess`.

    Raises:
        ValueError: naming the picture and why it cannot be used.
    """
    if isinstance(source, (str, Path)):
        text = str(source)
        name = f"{name} ({text if len(text) <= 200 else text[:60] + '...'})"
    try:
        if isinstance(source, (np.ndarray, torch.Tensor)):
            image = _from_array(source, input_data_format)
        elif isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, Path)):
            with Image.open(_open_source(source)) as image:
                return _to_rgb(_upright(image))
        else:
            raise ValueError(f"expected a picture, a path or a URL, got {type(source).__name__}")
        return _to_rgb(_upright(image))
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def _open_source(source: str | Path) -> Path | io.BytesIO:
    text = str(source)
    if text.startswith(("http://", "https://")):
        request = urllib.request.Request(text, headers={"User-Agent": "mgllava"})
        try:
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as answer:
                return io.BytesIO(answer.read())
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the download failed: {error}") from error
    if isinstance(source, Path) or (len(text) < 4096 and Path(text).exists()):
        return Path(text)
    try:
        encoded = text.split(",", 1)[1] if text.startswith("data:image/") else text
        return io.BytesIO(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError, IndexError):
        raise ValueError("there is no such file, and it is neither a URL nor base64") from None


def _upright(image: Image.Image) -> Image.Image:
    if not image.width or not image.height:
        raise ValueError(f"it is {image.width}x{image.height} pixels, empty")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width}x{image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS ({limit}); "
            "raise that limit if the picture is genuine"
        )
    # Padded to a square, a strip of a pixel's width can cost gigabytes; PIL itself refuses twice its limit.
    if limit is not None and max(image.size) ** 2 > 2 * limit:
        raise ValueError(
            f"it is {image.width}x{image.height} pixels, and the square that holds it has more than twice "
            f"PIL.Image.MAX_IMAGE_PIXELS ({limit}); crop it, or raise that limit"
        )
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(np.asarray(image))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    """Grey (H, W) of more than 8 bits: uint16 is scaled, others by the range they fall into."""
    return Image.fromarray(_to_uint8(grey)).convert("RGB")


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if not np.isfinite(pixels).all():
        raise ValueError("its pixels hold NaN or infinite values")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        scale = 1 / 257
    elif np.issubdtype(pixels.dtype, np.floating):
        scale, high_limit = (255.0, 1) if high <= 1 else (1.0, 255)
        _require_range(low, high, high_limit)
    else:
        scale, high_limit = (1.0, 255) if high <= 255 else (1 / 257, 65535)
        _require_range(low, high, high_limit)
    return np.rint(pixels.astype(np.float64) * scale).astype(np.uint8)


def _require_range(low: float, high: float, limit: int) -> None:
    if low < 0 or high > limit:
        raise ValueError(f"its pixels range from {low} to {high}, expected 0..1, 0..255 or 16-bit integers")


def _from_array(array: np.ndarray | torch.Tensor, input_data_format: str | None) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if not array.size:
        raise ValueError(f"its shape is {array.shape}, empty")
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        array = _channels_last(array, channels_first, input_data_format)
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"its shape is {array.shape}, expected (H, W), (H, W, C) or (C, H, W) with C from 1 to 4"
        )
    pixels = _to_uint8(array)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _channels_last(array: np.ndarray, channels_first: bool, input_data_format: str | None) -> np.ndarray:
    if input_data_format is not None:
        channels_first = str(getattr(input_data_format, "value", input_data_format)) == "channels_first"
    elif (array.shape[0] in (1, 3, 4)) != (array.shape[-1] in (1, 3, 4)):
        channels_first = array.shape[0] in (1, 3, 4)
    return np.moveaxis(array, 0, -1) if channels_first else array
