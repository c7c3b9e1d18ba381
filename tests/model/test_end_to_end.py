"""From the published file format and a picture file to the original's tokens, on every path of the kernels."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import mgllava_kernels
from mgllava.chat import ChatSession

BACKENDS = ("torch", "reference")


@pytest.fixture(scope="module")
def expected(golden_dir):
    return load_file(golden_dir / "end_to_end" / "expected.safetensors")


@pytest.fixture(scope="module")
def processor(converted_golden):
    return AutoProcessor.from_pretrained(converted_golden)


@pytest.fixture(scope="module")
def model(converted_golden):
    return AutoModelForImageTextToText.from_pretrained(converted_golden).eval()


@pytest.fixture(scope="module")
def detections(golden_dir):
    return json.loads((golden_dir / "end_to_end" / "detections.json").read_text())


@pytest.fixture(scope="module")
def picture(golden_dir):
    return Image.open(golden_dir / "end_to_end" / "image.png")


@pytest.fixture(scope="module")
def inputs(processor, model, expected, picture, detections):
    """The processor's picture tensors with the original's ids, whose -200 becomes the picture's placeholders."""
    inputs = processor(images=picture, text="<image>", detections=[detections], return_tensors="pt")
    placeholders = inputs["input_ids"][0].tolist()
    ids = []
    for token in expected["input_ids"][0].tolist():
        ids += placeholders if token == -200 else [token]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs.pop("mm_token_type_ids", None)
    return inputs


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def test_boxes(inputs, expected):
    assert torch.equal(inputs["boxes"][0].float(), expected["boxes"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_and_object_tokens(model, inputs, expected, backend):
    with torch.no_grad(), mgllava_kernels.use_backend(backend):
        features = model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")}
        )
    tokens = features.pooler_output[0]
    assert relative_error(tokens[:576], expected["image_tokens"][0]) < 1e-4
    assert relative_error(tokens[576:], expected["object_tokens"]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_greedy_tokens(model, inputs, expected, backend):
    with torch.no_grad(), mgllava_kernels.use_backend(backend):
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert relative_error(logits[..., :96], expected["logits"]) < 1e-3
    assert torch.equal(generated[0, inputs["input_ids"].shape[1] :], expected["greedy"])


def conversation(picture, detections, question="what is in the image ?"):
    content = [{"type": "image", "image": picture, **detections}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_the_pipeline_answers(converted_golden, picture, detections):
    pipe = pipeline("image-text-to-text", model=str(converted_golden))
    chat = conversation(picture, detections)
    answer = pipe(text=chat, max_new_tokens=4, return_full_text=False, do_sample=False)
    model, processor = pipe.model, pipe.processor
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    direct = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"].strip() == processor.decode(direct, skip_special_tokens=True)


def test_a_batch_of_conversations(model, processor, picture, detections):
    chats = [
        conversation(picture, detections),
        [{"role": "user", "content": [{"type": "text", "text": "what is red ?"}]}],
        conversation(picture.rotate(180), {"boxes": [[5, 5, 40, 40]]}, "how many are there ?"),
    ]
    settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    together = processor.apply_chat_template(chats, **settings, processor_kwargs={"padding": True})
    answers = model.generate(**together, max_new_tokens=4, do_sample=False)
    answers = answers[:, together["input_ids"].shape[1] :]
    for chat, answer in zip(chats, answers, strict=True):
        alone = processor.apply_chat_template(chat, **settings)
        single = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        # Shorter answers are padded in a batch.
        assert torch.equal(answer[: len(single)], single)


def test_later_turns_reuse_the_encoded_picture(model, processor, picture, detections):
    passes = []
    hook = model.model.high_res_tower.register_forward_hook(lambda *args: passes.append(1))
    session = ChatSession(model, processor, [picture], [detections], max_new_tokens=4, do_sample=False)
    try:
        first = session.ask("what is in the image ?")
        session.ask("how many are there ?")
        session.reset()
        assert session.ask("what is in the image ?") == first
    finally:
        hook.remove()
    assert len(passes) == 1
    with pytest.raises(ValueError, match="1 pictures came with 2 detections"):
        ChatSession(model, processor, [picture], [detections, detections])


def test_a_second_turn_sees_the_first(model, processor, picture, detections):
    session = ChatSession(model, processor, [picture], [detections], max_new_tokens=4, do_sample=False)
    first = session.ask("what is in the image ?")
    second = session.ask("how many are there ?")
    chat = [
        *conversation(picture, detections),
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": [{"type": "text", "text": "how many are there ?"}]},
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output, skip_special_tokens=True).strip() == second


def test_placeholders_that_the_model_spells_out_do_not_count_as_pictures(
    model, processor, picture, monkeypatch
):
    session = ChatSession(model, processor, [picture], max_new_tokens=2, do_sample=False)
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *args, **kwargs: "an <image> and an <object>")
    assert session.ask("what is in the image ?") == "an <image> and an <object>"
    session.ask("how many are there ?")
    with pytest.raises(ValueError, match="<object> cannot be part of a question"):
        session.ask("what is <object> ?")
    assert len(session.history) == 4
