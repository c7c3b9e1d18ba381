"""How many questions about scenes a model answers exactly."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..objects.detector import Detector
from ..objects.detectors import load_detector
from .dataset import SceneDataset
from .objects import SIZES
from .questions import CHANCE, FAMILIES
from .scene import sample_scene
from .vocabulary import split_words

__all__ = ["SHOWN", "FamilyScore", "evaluate_answers"]

SHOWN = ("all", "proposals", "no_objects", "low_res")
LONGEST_ANSWER = 12  # tokens


@dataclass(frozen=True)
class FamilyScore:
    """Exact matches in one group of questions.

    Attributes:
        group: a family, `all`, or the size of the smallest thing that the answers hang on.
        questions: how many were asked.
        right: how many were answered with the right words in the right order.
        chance: what words alone can score; NaN where the group mixes families.
    """

    group: str
    questions: int
    right: int
    chance: float

    @property
    def accuracy(self) -> float:
        return self.right / self.questions

    @property
    def margin(self) -> float:
        """Half of the 95% interval (Wald) that the number of questions allows for."""
        return 1.96 * (self.accuracy * (1 - self.accuracy) / self.questions) ** 0.5


def evaluate_answers(
    model: Any,
    processor: Any,
    *,
    split: str = "test",
    num_scenes: int = 2000,
    first: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    show: str = "all",
    batch_size: int = 32,
    progress: bool = False,
) -> list[FamilyScore]:
    """Ask one question about each scene, of a family drawn at random, and compare greedy answers word by word.

    Args:
        model: a `MGLlavaForConditionalGeneration`; its device is used.
        processor: its processor.
        split, num_scenes, first: the scenes.
        families: of the questions.
        show: `all`: pictures with the boxes of `mgllava.scenes.detect`; `proposals`: with those that the detector of
            that name finds; `no_objects`: without boxes; `low_res`: without them, and with a blank high-resolution
            view.
        batch_size: questions at once.
        progress: show a bar on standard error.

    Returns:
        `all` first, then each family, then the sizes.

    Raises:
        ValueError: an unknown split, family or name in `show`, or no scenes.
        ImportError: `proposals` without OpenCV.
    """
    if show not in SHOWN:
        raise ValueError(f"show is {show!r}; expected one of {', '.join(SHOWN)}")
    detector = load_detector(show) if show == "proposals" else None
    scenes = SceneDataset(split, num_scenes, turns=1, families=families, first=first)
    loader = DataLoader(scenes, batch_size=batch_size, collate_fn=list, num_workers=1)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    bar = tqdm(total=num_scenes, desc="questions", disable=not progress)
    for items in loader:
        for item, answer in zip(items, _answers(model, processor, items, show, detector), strict=True):
            (turn,) = item["turns"]
            is_right = split_words(answer.lower()) == split_words(turn.answer)
            for group in ("all", turn.family, *_smallest(item)):
                counts[group][0] += 1
                counts[group][1] += is_right
        bar.update(len(items))
    bar.close()
    order = [
        "all",
        *families,
        *(group for group in sorted(counts) if group not in families and group != "all"),
    ]
    return [
        FamilyScore(group, *counts[group], CHANCE.get(group, float("nan")))
        for group in order
        if group in counts
    ]


def _smallest(item: dict[str, Any]) -> list[str]:
    """The size of the smallest thing the answer hangs on, if it hangs on any."""
    split, _, index = item["id"].rpartition("-")
    scene = sample_scene(split, int(index))
    sizes = [scene.things[index].size for index in item["turns"][0].things]
    return [min(sizes, key=list(SIZES).index)] if sizes else []


@torch.inference_mode()
def _answers(
    model: Any, processor: Any, items: Sequence[dict[str, Any]], show: str, detector: Detector | None
) -> list[str]:
    conversations = []
    for item in items:
        picture = {"type": "image", "image": item["image"]}
        if show == "all":
            picture |= item["detections"]
        question = {"type": "text", "text": item["turns"][0].question}
        conversations.append([{"role": "user", "content": [picture, question]}])
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "detector": detector},
    ).to(model.device)
    if show == "low_res":
        inputs["pixel_values_high_res"] = torch.zeros_like(inputs["pixel_values_high_res"])
    output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    return processor.tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
