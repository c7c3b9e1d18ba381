"""Grounding DINO (arXiv 2303.05499), MM-Grounding-DINO (2401.02361) and LLMDet (2501.18954): open vocabulary."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from .output import target_sizes
from .pretrained import PretrainedDetector

__all__ = ["GroundingDinoDetector", "MMGroundingDinoDetector"]


class GroundingDinoDetector(PretrainedDetector):
    """Looks for tags joined to one text, "cat. dog.", in as many texts as their number takes.

    The model scores every token of the text. A box takes the tag of its best token and that token's score: the
    text transformers decodes from all tokens above a threshold may be half a tag, or two.
    """

    needs_tags = True
    default_threshold = 0.25
    auto_model = AutoModelForZeroShotObjectDetection
    auto_processor = AutoProcessor
    model_types: tuple[str, ...] = ("grounding-dino",)

    def _detect(
        self, pictures: list[Image.Image], tags: list[list[str]]
    ) -> list[tuple[Tensor, Sequence[str], Tensor]]:
        texts = [self._texts(names) for names in tags]
        images = self.processor.image_processor(pictures, return_tensors="pt").to(self.device)
        found: list[list[tuple[Tensor, Sequence[str], Tensor]]] = [[] for _ in pictures]
        for turn in range(max(map(len, texts))):
            asked = [index for index, pieces in enumerate(texts) if turn < len(pieces)]
            results = self._look_for(
                {key: values[asked] for key, values in images.items()},
                [texts[index][turn] for index in asked],
                target_sizes([pictures[index] for index in asked]),
            )
            for index, result in zip(asked, results, strict=True):
                found[index].append(result)
        return [
            (torch.cat(boxes), [label for group in labels for label in group], torch.cat(scores))
            for boxes, labels, scores in (zip(*results, strict=True) for results in found)
        ]

    def _look_for(
        self,
        images: dict[str, Tensor],
        texts: list[list[tuple[str, list[int]]]],
        sizes: list[tuple[int, int]],
    ) -> list[tuple[Tensor, Sequence[str], Tensor]]:
        """Detect what one text for each picture names: its tags and their token ids.

        `images` is what the image processor made of the pictures, `sizes` are their heights and widths.
        """
        prompts = ["".join(_prompt(tag) for tag, _ in text) for text in texts]
        words = self.processor(text=prompts, padding=True, return_tensors="pt").to(self.device)
        outputs = self.model(**words, **images)
        tag_of_token = [self._tags_of_tokens(text) for text in texts]
        for logits, owners in zip(outputs.logits, tag_of_token, strict=True):
            no_tag = [position for position, owner in enumerate(owners) if owner is None]
            logits[:, no_tag] = -torch.inf
            logits[:, len(owners) :] = -torch.inf
        results = self.processor.image_processor.post_process_object_detection(
            outputs, threshold=self.threshold, target_sizes=sizes
        )
        return [
            (result["boxes"], [owners[position] for position in result["labels"].tolist()], result["scores"])
            for result, owners in zip(results, tag_of_token, strict=True)
        ]

    def _texts(self, tags: list[str]) -> list[list[tuple[str, list[int]]]]:
        """Share the tags out to texts that the model reads whole, each tag with its token ids."""
        room = self.model.config.max_text_len - 2  # of them [CLS] and [SEP]
        texts: list[list[tuple[str, list[int]]]] = [[]]
        length = 0
        for tag in tags:
            tokens = self.processor.tokenizer(_prompt(tag), add_special_tokens=False)["input_ids"]
            if len(tokens) > room:
                raise ValueError(f"tag {tag!r} has {len(tokens)} tokens; {self.name} reads at most {room}")
            if length + len(tokens) > room:
                texts.append([])
                length = 0
            texts[-1].append((tag, tokens))
            length += len(tokens)
        return texts

    @staticmethod
    def _tags_of_tokens(text: list[tuple[str, list[int]]]) -> list[str | None]:
        """For each token of the text its tag; None for [CLS] and full stops."""
        owners: list[str | None] = [None]
        for tag, tokens in text:
            owners += [tag] * (len(tokens) - 1) + [None]
        return owners


class MMGroundingDinoDetector(GroundingDinoDetector):
    """The same faces on the model of MM-Grounding-DINO, which LLMDet's checkpoints share."""

    default_threshold = 0.3
    model_types = ("mm-grounding-dino",)


def _prompt(tag: str) -> str:
    """A tag as the text holds it: full stops and question marks part tags, so its own make way."""
    return " ".join(tag.replace(".", " ").replace("?", " ").split()) + ". "
