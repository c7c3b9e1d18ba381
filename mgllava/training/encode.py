"""A record becomes ids, labels and pictures, in the layout of the original training."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..image_processing_mgllava import UNREADABLE
from ..modeling_mgllava import IGNORE_INDEX
from ..processing_mgllava import MGLlavaProcessor
from .errors import BadRecord
from .features import FeatureStore
from .records import IMAGE_TOKEN, UNREADABLE_PICTURE, Record, file_version, read_image

__all__ = ["EncodedText", "Encoder"]

# A text this close to its limit keeps only the best box of each label (the original's rule).
NEARLY_FULL = 50

# Key of the blank high-resolution view among stored features.
BLANK = "blank"

BAD_TEXT = "its text does not fit its picture"
NO_FEATURES = "its picture could not be read when features were stored, or it has changed since"
NO_ROOM = "its text nearly fills the limit, which stored features do not allow for"


@dataclass(frozen=True)
class EncodedText:
    """A conversation's ids, in which one id stands for the whole picture.

    Attributes:
        input_ids: at most as many as the text limit; the picture counts as one.
        labels: the ids of answers and of what ends them, -100 elsewhere.
        image_position: where the picture's id is; None for text alone, and where the limit cut the picture off.
    """

    input_ids: list[int]
    labels: list[int]
    image_position: int | None

    @property
    def has_labels(self) -> bool:
        return any(label != IGNORE_INDEX for label in self.labels)


class Encoder:
    """Turns records into samples.

    Args:
        processor: the model's, with the chat template of its training.
        text_limit: tokens a conversation may have, its picture counting as one; what is beyond is cut off.
            Object tokens come on top. The original's is 2048 less the image tokens.
        show: what of a picture the model gets; see `Recipe`.
        with_features: towers' features will be stored, so that boxes cannot be chosen by the text.

    Attributes:
        features: where the towers' features of pictures are; None: samples hold the pictures.

    Raises:
        ValueError: fewer than one token.
    """

    def __init__(
        self, processor: MGLlavaProcessor, text_limit: int, show: str = "all", with_features: bool = False
    ) -> None:
        if text_limit < 1:
            raise ValueError(f"text_limit is {text_limit}; expected at least 1")
        self.processor = processor
        self.text_limit = text_limit
        self.show = show
        self.with_features = with_features
        self.features: FeatureStore | None = None
        # A processor that looks at no picture and puts one id in its place, as the original's tokenisation does.
        self._text_processor = copy.copy(processor)
        self._text_processor.image_processor = _no_pixels
        self._text_processor.num_image_tokens = 1

    def encode_text(self, record: Record) -> EncodedText:
        """Ids and labels of a record, cut to the limit.

        Raises:
            BadRecord: its text and its picture do not fit together, or it cannot be tokenised.
        """
        expected = 0 if record.image is None else 1
        pictures = sum(question.count(IMAGE_TOKEN) for question, _ in record.turns)
        if pictures != expected:
            raise BadRecord(
                BAD_TEXT,
                f"id {record.id} has {expected} pictures and {pictures} {IMAGE_TOKEN} in its questions",
            )
        messages = [
            {"role": role, "content": text}
            for turn in record.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        try:
            inputs = self._text_processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                processor_kwargs={"images": [record.id] * pictures or None},
            )
        except ValueError as error:
            raise BadRecord(BAD_TEXT, f"id {record.id}: {error}") from error
        ids = inputs["input_ids"][0][: self.text_limit]
        mask = inputs["assistant_masks"][0][: self.text_limit]
        labels = [token if learned else IGNORE_INDEX for token, learned in zip(ids, mask, strict=True)]
        image_token_id = self.processor.image_token_id
        return EncodedText(ids, labels, ids.index(image_token_id) if image_token_id in ids else None)

    def __call__(self, record: Record) -> dict[str, Any]:
        """A sample: `input_ids` and `labels`, lists of equal length, and for a picture also `pixel_values`
        (1, 3, S_l, S_l), `pixel_values_high_res` (1, 3, S_h, S_h), both float32, and `boxes` (1, K, 4), int64; or,
        where the towers' features are stored, `low_res` (N, D), `high_res` (C, H, W) and `objects` (K, ΣC_l).

        Boxes are whole pixels; as integers they survive engines that cast floating-point inputs to half precision.

        Raises:
            BadRecord: as `encode_text`, the picture cannot be read or could not be when features were stored, or the
                text is so long that the choice of boxes would depend on it while features of all are stored.
        """
        text = self.encode_text(record)
        position = text.image_position
        if position is None:
            return {"input_ids": text.input_ids, "labels": text.labels}
        self.check_room(record, text)
        if self.features is None:
            seen = self.encode_picture(record, self._is_nearly_full(text))
            num_objects = seen["boxes"].shape[1]
        else:
            seen = self._read_features(self.features, record)
            num_objects = len(seen["objects"])
        tokens = [self.processor.image_token_id] * self.processor.num_image_tokens
        tokens += [self.processor.object_token_id] * num_objects
        return {
            "input_ids": _replaced(text.input_ids, position, tokens),
            "labels": _replaced(text.labels, position, [IGNORE_INDEX] * len(tokens)),
            **seen,
        }

    def check_room(self, record: Record, text: EncodedText) -> None:
        """Raise BadRecord if the choice of boxes depends on the text while features of all are stored."""
        if (
            self.with_features
            and self.show == "all"
            and text.image_position is not None
            and self._is_nearly_full(text)
        ):
            raise BadRecord(NO_ROOM, f"id {record.id} has {len(text.input_ids)} tokens of {self.text_limit}")

    def _is_nearly_full(self, text: EncodedText) -> bool:
        return len(text.input_ids) >= self.text_limit - NEARLY_FULL

    def encode_picture(self, record: Record, best_per_label: bool = False) -> dict[str, Tensor]:
        """The picture's half of a sample.

        Raises:
            BadRecord: the picture cannot be read.
        """
        detections = record.detections if self.show == "all" else None
        picture = self._encode_picture(record, detections, best_per_label)
        if self.show == "low_res":  # the colour of padding is zero once normalised
            picture["pixel_values_high_res"] = torch.zeros_like(picture["pixel_values_high_res"])
        return picture

    def encode_picture_to_store(self, record: Record) -> dict[str, Tensor]:
        """What the towers have to see of a record, whatever of it is shown.

        Behind its own boxes a picture has the one that stands for none, of which a picture without objects gets
        features, too.

        Raises:
            BadRecord: the picture cannot be read.
        """
        picture = self._encode_picture(record, record.detections, False)
        picture["boxes"] = pad(picture["boxes"], (0, 0, 0, 1))
        return picture

    def blank_to_store(self) -> tuple[str, dict[str, Tensor]]:
        """Key and picture of the blank high-resolution view that `show: low_res` sees."""
        low, high = self.processor.image_processor.low_res_size, self.processor.image_processor.high_res_size
        return BLANK, {
            "pixel_values": torch.zeros(1, 3, low, low),
            "pixel_values_high_res": torch.zeros(1, 3, high, high),
            "boxes": torch.zeros(1, 1, 4, dtype=torch.long),
        }

    def picture_key(self, record: Record) -> str:
        """A name for a record's picture, a file by its path, size and time, and its detections.

        Raises:
            BadRecord: the picture cannot be read.
        """
        digest = hashlib.sha256(json.dumps(record.detections, default=repr).encode())
        try:
            if isinstance(record.image, Path):
                digest.update(repr(file_version(record.image)).encode())
            elif record.image is not None:
                digest.update(f"{record.image.mode} {record.image.size}".encode() + record.image.tobytes())
        except UNREADABLE as error:
            raise BadRecord(UNREADABLE_PICTURE, f"id {record.id}, {error}") from error
        return digest.hexdigest()

    def _encode_picture(
        self, record: Record, detections: Mapping[str, Any] | None, best_per_label: bool
    ) -> dict[str, Tensor]:
        pictures = self.processor.image_processor(
            [read_image(record)], [detections], best_per_label=best_per_label
        )
        return {
            "pixel_values": pictures["pixel_values"],
            "pixel_values_high_res": pictures["pixel_values_high_res"],
            "boxes": pictures["boxes"].round().long(),
        }

    def _read_features(self, store: FeatureStore, record: Record) -> dict[str, Tensor]:
        key = self.picture_key(record)
        if key not in store:
            raise BadRecord(NO_FEATURES, f"id {record.id}")
        seen = store.read(key)
        if self.show == "all":
            return seen | {"objects": seen["objects"][:-1]}
        if self.show == "no_objects":
            return seen | {"objects": seen["objects"][-1:]}
        return store.read(BLANK) | {"low_res": seen["low_res"]}


def _replaced(values: Sequence[int], position: int, replacement: list[int]) -> list[int]:
    return [*values[:position], *replacement, *values[position + 1 :]]


def _no_pixels(pictures: Sequence[Any], detections: Sequence[Any], **options: Any) -> dict[str, Tensor]:
    """Stands in for an image processor: pictures without boxes."""
    return {"num_boxes": torch.zeros(len(pictures), dtype=torch.long)}
