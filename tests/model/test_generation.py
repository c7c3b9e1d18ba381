"""Generation: vision once, every row its own pictures, placeholders never."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny import IMAGE, OBJECT, TEXT_VOCAB, one_row, tiny_inputs, tiny_model

ROWS = [[2, 1], [3], []]
PICTURES_OF_ROW = [slice(0, 2), slice(2, 3), slice(3, 3)]


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def encoded(model) -> Iterator[list[int]]:
    """The number of pictures in every pass through the high-resolution tower."""
    passes: list[int] = []
    hook = model.model.high_res_tower.register_forward_hook(
        lambda module, args, output: passes.append(len(args[0]))
    )
    yield passes
    hook.remove()


def new_tokens(model, inputs, **settings):
    outputs = model.generate(**inputs, max_new_tokens=5, **{"do_sample": False, **settings})
    return outputs[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["greedy", "beams", "no_cache", "sampling", "static_cache", "prompt_lookup"],
)
def test_vision_runs_once(model, encoded, settings):
    rows = [[2, 1]] if "prompt_lookup_num_tokens" in settings else ROWS
    new_tokens(model, tiny_inputs(rows, padding_side="left"), **settings)
    assert encoded == [sum(map(len, rows))]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_every_row_keeps_its_own_pictures(model, settings):
    inputs = tiny_inputs(ROWS, padding_side="left")
    together = new_tokens(model, inputs, **settings)
    copies = settings.get("num_return_sequences", 1)
    for row, pictures in enumerate(PICTURES_OF_ROW):
        alone = new_tokens(model, one_row(inputs, row, pictures), **settings)
        assert torch.equal(together[row * copies : (row + 1) * copies], alone), row


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["no_cache", "static_cache"],
)
def test_caches_do_not_change_the_answer(model, settings):
    inputs = tiny_inputs(ROWS, padding_side="left")
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, **settings))


def test_the_answer_depends_on_the_picture(model):
    inputs = tiny_inputs([[2]])
    other = dict(inputs, pixel_values_high_res=-3 * inputs["pixel_values_high_res"])
    scores = [
        model.generate(**i, max_new_tokens=1, output_scores=True, return_dict_in_generate=True).scores[0]
        for i in (inputs, other)
    ]
    assert not torch.allclose(*scores)


def test_features_computed_beforehand_give_the_same_answer(model, encoded):
    inputs = tiny_inputs(ROWS, padding_side="left")
    expected = new_tokens(model, inputs, num_beams=2)
    pictures = {k: inputs.pop(k) for k in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")}
    features = model.get_image_features(**pictures)
    encoded.clear()
    assert torch.equal(
        new_tokens(model, inputs, num_beams=2, mm_encoder_outputs={"image": features}), expected
    )
    assert not encoded


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_generation_from_embeddings_of_text(model, settings):
    inputs = tiny_inputs([[]])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    from_embeddings = model.generate(
        inputs_embeds=embeddings,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
        **settings,
    )
    assert torch.equal(from_embeddings, new_tokens(model, inputs, **settings))


def test_an_assistant_model_sees_the_pictures_too(model):
    inputs = tiny_inputs([[2, 1]])
    assisted = new_tokens(model, inputs, assistant_model=copy.deepcopy(model))
    assert torch.equal(assisted, new_tokens(model, inputs))


def test_placeholders_are_never_generated(model):
    with torch.no_grad():
        weight = model.lm_head.weight.clone()
        model.lm_head.weight[[IMAGE, OBJECT]] = 50.0
    try:
        sampled = model.generate(
            **tiny_inputs([[2]]), max_new_tokens=8, do_sample=True, temperature=5.0, num_return_sequences=32
        )
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
    assert sampled[:, tiny_inputs([[2]])["input_ids"].shape[1] :].max() < TEXT_VOCAB


def test_repetition_penalty_works_on_a_prompt_with_placeholders(model):
    inputs = tiny_inputs([[2]])
    outputs = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        repetition_penalty=2.0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    penalised = (outputs.scores[0] != outputs.logits[0])[0, :TEXT_VOCAB].nonzero().flatten()
    prompt = inputs["input_ids"].unique()
    assert torch.equal(penalised, prompt[prompt < TEXT_VOCAB])
    assert outputs.sequences[0, inputs["input_ids"].shape[1] :].max() < TEXT_VOCAB


def test_generation_refuses_a_wrong_number_of_pictures(model):
    inputs = tiny_inputs([[2], [2]])
    for name in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes"):
        inputs[name] = inputs[name][:1]
    with pytest.raises(ValueError, match="2 pictures, 1"):
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="8 image placeholders.* 4 image features"):
        model.generate(**inputs, max_new_tokens=2)
