"""Quantisation configs of transformers reach the language model and spare the vision flow."""

import pytest
import torch
from tiny import TEXT_VOCAB, tiny_config, tiny_inputs, tiny_model, tiny_text_config
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from mgllava.quantization import UNQUANTISED, spare_vision


@pytest.fixture(scope="module")
def model():
    # bitsandbytes on a CPU wants widths that are multiples of 64.
    return tiny_model(
        tiny_config(tiny_text_config(hidden_size=128, intermediate_size=128, num_key_value_heads=4))
    )


def int8():
    return BitsAndBytesConfig(load_in_8bit=True)


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    ("package", "make_config", "tolerance"),
    [("bitsandbytes", int8, 0.05), ("bitsandbytes", nf4, 0.3), ("torchao", torchao_int8, 0.05)],
)
def test_quantised_models_answer(model, tmp_path, package, make_config, tolerance):
    pytest.importorskip(package)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=make_config())
    inputs = tiny_inputs([[2], [1]], model.config)
    expected = model(**inputs).logits[..., :TEXT_VOCAB]
    error = (quantised(**inputs).logits[..., :TEXT_VOCAB] - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    layer = quantised.model.language_model.layers[0].mlp.up_proj
    assert type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter
    for part in (quantised.model.image_projector, quantised.model.fusion, quantised.model.vision_tower):
        linear = next(m for m in part.modules() if isinstance(m, nn.Linear))
        assert type(linear) is nn.Linear
        assert type(linear.weight) is nn.Parameter
    assert quantised.generate(**tiny_inputs([[2]]), max_new_tokens=3, do_sample=False).shape[0] == 1


def test_a_choice_of_what_to_spare_is_kept():
    chosen = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert spare_vision(chosen).llm_int8_skip_modules == ["lm_head"]
    plain = BitsAndBytesConfig(load_in_8bit=True)
    assert spare_vision(plain).llm_int8_skip_modules == list(UNQUANTISED)
    assert plain.llm_int8_skip_modules is None
