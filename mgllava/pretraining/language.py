"""A language model from nothing, on scenes given as symbols in the place of image and object tokens."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from ..modeling_mgllava import IGNORE_INDEX
from ..objects.boxes import detections_to_boxes
from ..scenes import (
    CANVAS,
    CAPTION_FAMILIES,
    Scene,
    Thing,
    Turn,
    ask,
    caption,
    detect,
    list_things,
    sample_scene,
    things_of_boxes,
)
from ..training.encode import EncodedText, Encoder
from ..training.records import IMAGE_TOKEN, Record
from .symbols import SYMBOL_SIZE, SYMBOL_WORDS, symbols_of_boxes, symbols_of_cells

__all__ = ["VIEWS", "LanguagePretraining", "SymbolCollator", "SymbolicScenes"]

NOISE = 0.05  # standard deviation added to every symbol, so that tokens of real towers need not be exact
# What of a scene is there: symbols of the grid's cells, of the boxes, or both.
VIEWS = ("cells", "boxes", "both")
TEXTS_KEPT = 65536  # of questions with their answers some ten thousand differ


class SymbolicScenes(Dataset):
    """Scenes in the layout of the model's conversations, with symbols in the place of what a picture becomes.

    Every cell of the grid is the words of the things that have their centre in it, every box those of what it shows,
    and both say where they are. What is not in view has no tokens.

    Args:
        split: `train`, `validation` or `test`.
        num_scenes: how many.
        encoder: of a processor with the final model's number of image tokens. Its chat template must treat all turns
            alike: they are encoded one by one, and what is asked again is not encoded again.
        turns: questions to a scene.
        lists: requests of `mgllava.scenes.list_things` among them.
        first: number of the first scene.
        caption_share: share of the scenes that have a caption instead.
        views: names of `VIEWS`; one is drawn for each scene.
    """

    def __init__(
        self,
        split: str,
        num_scenes: int,
        encoder: Encoder,
        turns: int,
        lists: int = 0,
        first: int = 0,
        caption_share: float = 0.0,
        views: Sequence[str] = VIEWS,
    ) -> None:
        self.split = split
        self.num_scenes = num_scenes
        self.encoder = encoder
        self.turns = turns
        self.lists = lists
        self.first = first
        self.caption_share = caption_share
        self.views = tuple(views)
        self._encode = lru_cache(TEXTS_KEPT)(self._encode_turn)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._encode = lru_cache(TEXTS_KEPT)(self._encode_turn)

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = sample_scene(self.split, self.first + index)
        detections = detect(scene)
        things = things_of_boxes(scene, detections)
        rng = Random(f"symbols {scene.id}")
        view = rng.choice(self.views)
        cells = regions = np.zeros((0, SYMBOL_SIZE), np.float32)
        processor = self.encoder.processor
        if view != "boxes":
            cells = symbols_of_cells(scene, int(processor.num_image_tokens**0.5))
        if view != "cells":
            boxes, _ = detections_to_boxes(
                **detections.as_dict(), image_size=(CANVAS, CANVAS), high_res_size=CANVAS
            )
            regions = symbols_of_boxes(things, boxes)
        tokens = [processor.image_token_id] * len(cells) + [processor.object_token_id] * len(regions)
        input_ids: list[int] = []
        labels: list[int] = []
        for turn in self._turns(scene, things, view, rng):
            text = self._encode(turn.question, turn.answer, not input_ids)
            position = text.image_position
            if position is None:
                input_ids += text.input_ids
                labels += text.labels
            else:
                input_ids += [*text.input_ids[:position], *tokens, *text.input_ids[position + 1 :]]
                labels += [
                    *text.labels[:position],
                    *[IGNORE_INDEX] * len(tokens),
                    *text.labels[position + 1 :],
                ]
        return {"input_ids": input_ids, "labels": labels, "cells": cells, "regions": regions}

    def _encode_turn(self, question: str, answer: str, is_first: bool) -> EncodedText:
        question = f"{IMAGE_TOKEN}\n{question}" if is_first else question
        return self.encoder.encode_text(Record("", ((question, answer),), Path() if is_first else None))

    def _turns(self, scene: Scene, things: list[Thing | None], view: str, rng: Random) -> list[Turn]:
        if rng.random() < self.caption_share:
            # Which boxes there are cannot be told from cells.
            return [
                caption(scene, things, "places" if view == "cells" else rng.choice(list(CAPTION_FAMILIES)))
            ]
        turns = [*list_things(scene, self.lists), *ask(scene, self.turns)]
        rng.shuffle(turns)
        return turns


class SymbolCollator:
    """Pads conversations on the right; cells side by side, the regions of all scenes in one list."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "cells": torch.from_numpy(np.concatenate([sample["cells"] for sample in samples])),
            "regions": torch.from_numpy(np.concatenate([sample["regions"] for sample in samples])),
        }


class LanguagePretraining(nn.Module):
    """A Llama that reads symbols as sums of words, through one linear layer more each for cells and boxes.

    A symbol is the sum of the embeddings of the words that name it, so that what is read can be said at once; what has
    no word of its own (frames, whose colours are the inks' words, and exact positions) is the linear layer's.

    Args:
        config: of the language model; its vocabulary does not hold the placeholders.
        tokenizer: knows `SYMBOL_WORDS`.
        image_token_id, object_token_id: the placeholders in `input_ids`.
    """

    def __init__(
        self, config: LlamaConfig, tokenizer: Any, image_token_id: int, object_token_id: int
    ) -> None:
        super().__init__()
        self.language_model = LlamaForCausalLM(config)
        self.image_token_id = image_token_id
        self.object_token_id = object_token_id
        self.cell_symbols = nn.Linear(SYMBOL_SIZE, config.hidden_size)
        self.region_symbols = nn.Linear(SYMBOL_SIZE, config.hidden_size)
        for layer in (self.cell_symbols, self.region_symbols):
            nn.init.normal_(layer.weight, std=config.initializer_range)
            nn.init.zeros_(layer.bias)
        words = torch.tensor(tokenizer.convert_tokens_to_ids(list(SYMBOL_WORDS)))
        self.register_buffer("words", words, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        cells: Tensor,
        regions: Tensor,
        num_items_in_batch: Any = None,
    ) -> dict[str, Tensor]:
        """Next-token loss.

        Args:
            input_ids, attention_mask, labels: (B, L).
            cells: (image tokens of the batch, `SYMBOL_SIZE`); regions: (object tokens, `SYMBOL_SIZE`).

        Returns:
            `loss`, a scalar, and `logits` (B, L, vocabulary).
        """
        if self.training:
            cells, regions = (values + NOISE * torch.randn_like(values) for values in (cells, regions))
        masks = (input_ids == self.image_token_id), (input_ids == self.object_token_id)
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(masks[0] | masks[1], 0))
        words = self.language_model.get_input_embeddings()(self.words)
        for mask, symbols, layer in zip(
            masks, (cells, regions), (self.cell_symbols, self.region_symbols), strict=True
        ):
            tokens = symbols[:, : len(words)] @ words + layer(symbols)
            embeds = embeds.masked_scatter(mask[..., None], tokens.to(embeds.dtype))
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            use_cache=False,
        )
        return {"loss": output.loss, "logits": output.logits}
