"""Samples become a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..modeling_mgllava import IGNORE_INDEX

__all__ = ["Collator"]


class Collator:
    """Pads samples on the right and puts their pictures one after the other.

    Args:
        pad_token_id: id at padded positions; the attention mask hides it.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The model's inputs.

        Args:
            samples: as `Encoder` returns them.

        Returns:
            `input_ids`, `attention_mask`, `labels`, each (samples, length); where a sample has a picture also
            `pixel_values`, `pixel_values_high_res`, `boxes` (pictures, K_max, 4) int64 and `num_boxes` (pictures,),
            or `mm_encoder_outputs` with the towers' features.
        """
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        pictured = [sample for sample in samples if "boxes" in sample]
        if pictured:
            boxes = [sample["boxes"] for sample in pictured]
            most = max(rows.shape[1] for rows in boxes)
            batch["boxes"] = torch.cat([pad(rows, (0, 0, 0, most - rows.shape[1])) for rows in boxes])
            batch["num_boxes"] = torch.tensor([rows.shape[1] for rows in boxes])
            for name in ("pixel_values", "pixel_values_high_res"):
                batch[name] = torch.cat([sample[name] for sample in pictured])
        encoded = [sample for sample in samples if "objects" in sample]
        if encoded:
            batch["mm_encoder_outputs"] = {"towers": _stack_features(encoded)}
        return batch


def _stack_features(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Entries of `MGLlavaTowerFeatures`."""
    return {
        "low_res": torch.stack([sample["low_res"] for sample in samples]),
        "high_res": torch.stack([sample["high_res"] for sample in samples]),
        "objects": pad_sequence([sample["objects"] for sample in samples], batch_first=True),
        "num_objects": torch.tensor([len(sample["objects"]) for sample in samples]),
    }
