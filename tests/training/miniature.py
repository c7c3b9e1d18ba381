"""A miniature model folder, data for it and recipes."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from small_tokenizers import OWN_TEMPLATE, build
from tiny import HIGH_RES, LOW_RES, tiny_config, tiny_model, tiny_text_config

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor
from mgllava.chat_templates import load_chat_template
from mgllava.training.recipe import Recipe, recipe_from_dict

NUM_IMAGE_TOKENS = 4
QUESTIONS = ("What is in the picture?", "How many dogs are there?", "Describe the image in detail.")
ANSWERS = ("A cat sits on a red chair.", "There are two dogs.", "Yes.", "The image shows a street with cars.")


def tiny_processor(tokenizer: str = "legacy-llama", **image_settings: Any) -> MGLlavaProcessor:
    settings = {"high_res_size": HIGH_RES, "low_res_size": LOW_RES, **image_settings}
    return MGLlavaProcessor(
        MGLlavaImageProcessor(**settings),
        build(tokenizer),
        chat_template=load_chat_template(OWN_TEMPLATE[tokenizer]).source,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )


def write_tiny_model(folder: Path, tokenizer: str = "legacy-llama") -> Path:
    """A model folder whose vocabulary is the tokenizer's."""
    processor = tiny_processor(tokenizer)
    vocabulary = processor.tokenizer.get_vocab()
    config = tiny_config(
        tiny_text_config(
            vocab_size=len(vocabulary),
            pad_token_id=processor.tokenizer.pad_token_id,
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
            max_position_embeddings=512,
        ),
        text_vocab_size=len(vocabulary) - 2,
        image_token_id=vocabulary["<image>"],
        object_token_id=vocabulary["<object>"],
    )
    tiny_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_data(folder: Path, pictured: int = 12, text_only: int = 4) -> dict[str, str]:
    """Records, pictures and boxes, every size different; returns what a recipe says of them."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records, boxes = [], []
    for index in range(pictured + text_only):
        turns = []
        for turn in range(1 + index % 3):
            question = QUESTIONS[(index + turn) % len(QUESTIONS)]
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": ANSWERS[(index + 2 * turn) % len(ANSWERS)]})
        record: dict[str, Any] = {"id": index if index % 2 else str(index), "conversations": turns}
        if index < pictured:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"{index}.png"
            picture = Image.new("RGB", (40 + index, 30 + 2 * index), (20 * index % 256, 90, 200 - 10 * index))
            ImageDraw.Draw(picture).rectangle((5, 5, 15, 20), fill=(250, 10 * index, 0))
            picture.save(folder / "pictures" / f"{index}.png")
            found = [[5, 5, 15, 20], [10 + index, 3, 30 + index, 25]][: 1 + index % 2]
            boxes.append(
                {
                    "id": str(index) if index % 3 else index,
                    "boxes": found,
                    "labels": ["cat", "dog"][: len(found)],
                    "scores": [0.9, 0.6][: len(found)],
                }
            )
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return {
        "records": str(folder / "records.json"),
        "pictures": str(folder / "pictures"),
        "boxes": str(folder / "boxes.json"),
    }


def tiny_recipe(model: Path, data: dict[str, str], output: Path, **changes: Any) -> Recipe:
    values = {
        "model": str(model),
        "data": [data],
        "output": str(output),
        "stage": 2,
        "global_batch": 4,
        "per_device_batch": 4,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "schedule": "constant",
        "warmup_share": 0.0,
        "text_limit": 400,
        "precision": "float32",
        "gradient_checkpointing": False,
        "workers": 0,
        "save_every": 2,
        "log_every": 1,
    }
    return recipe_from_dict({**values, **changes})


def losses_of(output: Path) -> list[float]:
    """The loss of every step, as the last checkpoint of a run remembers it."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]
