"""Both towers from nothing, on regions: what each box shows, what each cell of the grids holds."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from mgllava_kernels import pooled_roi_align, roi_align

from ..configuration_mgllava import MGLlavaHighResConfig
from ..high_res_tower import MGLlavaHighResTower
from ..image_processing_mgllava import MGLlavaImageProcessor
from ..objects.boxes import detections_to_boxes
from ..scenes import CANVAS, Thing, detect, render, sample_scene, things_of_boxes
from ..scenes.crowd import CROWD_SIDES, sample_crowd
from ..scenes.detections import jittered
from .attributes import CELL_SIZE, CLASSES, REGION_SIZE, cell_labels, classes_of, position_of

__all__ = ["RegionScenes", "TowerPretraining", "collate_regions", "region_accuracy"]

CELL_WEIGHT = 0.3  # of cells' losses, which are sums over many words
DIGIT_GRID = 4  # side of what the digit head reads of a box
LAYER_SCALE = 0.1  # of ConvNeXt's blocks at the start; the usual 1e-6 is meant for long runs


class RegionScenes(Dataset):
    """Scenes with what every box and every cell of the grid holds; in training three of four are crowds.

    Args:
        split: `train`, `validation` or `test`.
        num_scenes: how many.
        image_processor: makes the two views; its canvas has the scene's own size.
        grid: side of the towers' grids.
        first: number of the first scene.
    """

    def __init__(
        self, split: str, num_scenes: int, image_processor: MGLlavaImageProcessor, grid: int, first: int = 0
    ) -> None:
        self.split = split
        self.num_scenes = num_scenes
        self.image_processor = image_processor
        self.grid = grid
        self.first = first
        self.with_crowds = split == "train"

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self.first + index
        size = self.image_processor.high_res_size
        if self.with_crowds and index % 4:
            scene = sample_crowd(self.split, number, CROWD_SIDES[index % len(CROWD_SIDES)])
            rng = Random(f"boxes of crowd {self.split} {number}")
            boxes, _ = detections_to_boxes(
                [jittered(rng, thing.box) for thing in scene.things],
                image_size=(CANVAS, CANVAS),
                high_res_size=size,
            )
            things: list[Thing | None] = list(scene.things)
        else:
            scene = sample_scene(self.split, number)
            detections = detect(scene)
            boxes, _ = detections_to_boxes(
                **detections.as_dict(), image_size=(CANVAS, CANVAS), high_res_size=size
            )
            things = things_of_boxes(scene, detections, size)
        pictures = self.image_processor(render(scene))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        return {
            "pixel_values": pictures["pixel_values"][0],
            "pixel_values_high_res": pictures["pixel_values_high_res"][0],
            "boxes": boxes,
            "classes": torch.tensor([classes_of(thing) for thing in things]),
            "positions": torch.from_numpy(
                np.stack([[position_of(value, size) for value in centre] for centre in centres.tolist()])
            ),
            "cells": torch.from_numpy(cell_labels(scene, self.grid)),
        }


def collate_regions(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pictures and cells side by side, the regions of all pictures in one list."""
    counts = torch.tensor([len(sample["boxes"]) for sample in samples])
    index = torch.repeat_interleave(torch.arange(len(samples)), counts).float()
    boxes = torch.cat([sample["boxes"] for sample in samples])
    batch = {"boxes": torch.cat([index[:, None], boxes], dim=1)}
    for name in ("classes", "positions"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    for name in ("pixel_values", "pixel_values_high_res", "cells"):
        batch[name] = torch.stack([sample[name] for sample in samples])
    return batch


class TowerPretraining(nn.Module):
    """Two towers under linear heads that read their features as MG-LLaVA does.

    Boxes are pooled over the ConvNeXt's four stages, as the object flow does, and a head tells kind, colour, digit,
    frame and position of what they show. From means alone digits are learned slowly (after 2,000 crowds 10% were told
    with batches of 32, 15% with batches of 8), so a second head reads them from the first two stages with their places
    kept (30%, and 68% by this head): it teaches the stages strokes.

    Each cell of the ViT's tokens and of the last ConvNeXt stage tells what has its centre there, as a set of words. The
    ViT's CLS token tells the words of the whole scene: that trains its last layer, which MG-LLaVA does not read.
    """

    def __init__(self, vision: CLIPVisionConfig, high_res: MGLlavaHighResConfig) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionModel(vision)
        # On a CPU twice as fast as (B, C, H, W) in memory.
        self.high_res_tower = MGLlavaHighResTower(high_res).to(memory_format=torch.channels_last)
        for module in self.high_res_tower.modules():
            # The fixed 0.02 of wide models would leave these narrow layers almost linear.
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if isinstance(getattr(module, "gamma", None), nn.Parameter):
                nn.init.constant_(module.gamma, LAYER_SCALE)
        self.region_head = nn.Linear(sum(high_res.stage_widths), REGION_SIZE)
        self.digit_head = nn.Linear(DIGIT_GRID**2 * sum(high_res.stage_widths[:2]), len(CLASSES["digit"]))
        self.high_res_cell_head = nn.Linear(high_res.stage_widths[-1], CELL_SIZE)
        self.low_res_cell_head = nn.Linear(vision.hidden_size, CELL_SIZE)
        self.scene_head = nn.Linear(vision.hidden_size, CELL_SIZE)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_values_high_res: Tensor,
        boxes: Tensor,
        classes: Tensor,
        positions: Tensor,
        cells: Tensor,
        num_items_in_batch: Any = None,
    ) -> dict[str, Tensor]:
        """The loss, and its parts.

        Args:
            pixel_values: (B, 3, S_l, S_l); pixel_values_high_res: (B, 3, S_h, S_h).
            boxes: (K, 5), image index and corners on the canvas.
            classes: (K, 4) indices, as `classes_of`.
            positions: (K, 2, bins), as `position_of`.
            cells: (B, N, `CELL_SIZE`), as `cell_labels`.

        Returns:
            `loss`, a scalar, and the region head's `logits` (K, `REGION_SIZE`).
        """
        stages = self.high_res_tower(pixel_values_high_res.contiguous(memory_format=torch.channels_last))
        scales = [stage.shape[-1] / pixel_values_high_res.shape[-1] for stage in stages]
        pooled = pooled_roi_align(stages, boxes, spatial_scale=scales[0], output_size=56)
        logits = self.region_head(pooled)
        loss = _region_loss(logits, classes, positions) + self._digit_loss(
            stages[:2], scales[:2], boxes, classes
        )

        hidden = self.vision_tower(pixel_values, output_hidden_states=True)
        low_res = self.low_res_cell_head(hidden.hidden_states[-2][:, 1:])
        high_res = self.high_res_cell_head(stages[-1].flatten(2).transpose(1, 2))
        scene = self.scene_head(hidden.pooler_output)
        # As many words as a picture has cells with something in them, whatever the grid.
        for found, labels in ((low_res, cells), (high_res, cells), (scene, cells.amax(dim=1))):
            words = F.binary_cross_entropy_with_logits(found.float(), labels, reduction="sum")
            loss = loss + CELL_WEIGHT * words / labels.sum()
        return {"loss": loss, "logits": logits}

    def _digit_loss(
        self, stages: Sequence[Tensor], scales: Sequence[float], boxes: Tensor, classes: Tensor
    ) -> Tensor:
        digits = classes[:, list(CLASSES).index("digit")]
        shown = (digits >= 0).nonzero().flatten()
        read = [
            roi_align(stage, boxes[shown], DIGIT_GRID, spatial_scale=scale, sampling_ratio=2)
            for stage, scale in zip(stages, scales, strict=True)
        ]
        logits = self.digit_head(torch.cat(read, dim=1).flatten(1)).float()
        # Of no digits the sum is zero, with gradients: every process of a group must have them.
        return F.cross_entropy(logits, digits[shown], reduction="sum") / max(len(shown), 1)


def _region_loss(logits: Tensor, classes: Tensor, positions: Tensor) -> Tensor:
    parts = logits.float().split([*map(len, CLASSES.values()), *[positions.shape[-1]] * 2], dim=-1)
    loss = logits.new_zeros((), dtype=torch.float32)
    for index, part in enumerate(parts[: len(CLASSES)]):
        if bool((classes[:, index] >= 0).any()):
            loss = loss + F.cross_entropy(part, classes[:, index])
    for index, part in enumerate(parts[len(CLASSES) :]):
        loss = loss + F.cross_entropy(part, positions[:, index])
    return loss


@torch.no_grad()
def region_accuracy(logits: Tensor, classes: Tensor) -> dict[str, tuple[int, int]]:
    """For each attribute the number of regions told right, and of those that have it."""
    counts = {}
    parts = logits.split([*map(len, CLASSES.values()), logits.shape[-1] - CELL_SIZE], dim=-1)
    for index, (name, part) in enumerate(zip(CLASSES, parts, strict=False)):
        known = classes[:, index] >= 0
        counts[name] = (int((part.argmax(-1) == classes[:, index])[known].sum()), int(known.sum()))
    return counts
