"""A tiny MG-LLaVA with every part present: 2x2 grid, 64 px canvas, two-layer language model."""

from collections.abc import Sequence

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration

TEXT_VOCAB = 61
IMAGE, OBJECT, PAD, BOS, EOS = 61, 62, 0, 1, 2
LOW_RES, HIGH_RES = 28, 64


def tiny_text_config(**overrides) -> LlamaConfig:
    defaults = {
        "vocab_size": TEXT_VOCAB + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return LlamaConfig(**{**defaults, **overrides})


def tiny_config(text_config: PreTrainedConfig | None = None, **overrides) -> MGLlavaConfig:
    defaults = {
        "vision_config": CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=LOW_RES,
            patch_size=14,
        ),
        "high_res_config": {
            "architecture": "test_convnext",
            "image_size": HIGH_RES,
            "stage_widths": [24, 32, 48, 64],
        },
        "text_config": text_config or tiny_text_config(),
        "text_vocab_size": TEXT_VOCAB,
        "image_token_id": IMAGE,
        "object_token_id": OBJECT,
        "roi_output_size": 7,
    }
    return MGLlavaConfig(**{**defaults, **overrides})


def tiny_model(config: MGLlavaConfig | None = None, seed: int = 0) -> MGLlavaForConditionalGeneration:
    """A tiny model in eval mode whose every parameter matters: no zero projections, no vanishing layer scale."""
    torch.manual_seed(seed)
    model = MGLlavaForConditionalGeneration(config or tiny_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fusion" in name or "high_res_tower" in name or "projector" in name or "lm_head" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tiny_inputs(
    rows: Sequence[Sequence[int]],
    config: MGLlavaConfig | None = None,
    padding_side: str = "right",
    text_length: int = 3,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs of a batch; `rows[i]` lists the number of boxes of each picture in row i, `[]` is a text-only row."""
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(seed)

    def words() -> list[int]:
        return torch.randint(3, TEXT_VOCAB, (text_length,), generator=generator).tolist()

    ids = []
    for pictures in rows:
        row = [BOS, *words()]
        for boxes in pictures:
            row += [IMAGE] * config.num_image_tokens + [OBJECT] * boxes + words()
        ids.append(row)
    length = max(map(len, ids))
    input_ids = torch.full((len(ids), length), PAD)
    attention_mask = torch.zeros(len(ids), length, dtype=torch.long)
    for i, row in enumerate(ids):
        place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
        input_ids[i, place] = torch.tensor(row)
        attention_mask[i, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}

    counts = [boxes for pictures in rows for boxes in pictures]
    if counts:
        corners = torch.rand(len(counts), max(counts), 2, 2, generator=generator) * HIGH_RES
        corners = corners.sort(dim=2).values
        inputs |= {
            "pixel_values": torch.randn(len(counts), 3, LOW_RES, LOW_RES, generator=generator),
            "pixel_values_high_res": torch.randn(len(counts), 3, HIGH_RES, HIGH_RES, generator=generator),
            "boxes": corners.flatten(2),
            "num_boxes": torch.tensor(counts),
        }
    return inputs


def one_row(inputs: dict[str, torch.Tensor], row: int, pictures: slice) -> dict[str, torch.Tensor]:
    """Row `row` of a batch alone, without its padding, with its own pictures."""
    keep = inputs["attention_mask"][row].bool()
    alone = {
        "input_ids": inputs["input_ids"][row][keep][None],
        "attention_mask": inputs["attention_mask"][row][keep][None],
    }
    if pictures.stop > pictures.start:
        alone |= {
            name: inputs[name][pictures]
            for name in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")
        }
    return alone
