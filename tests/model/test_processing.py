import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from small_tokenizers import CORPUS, GOLDEN, NAMES, OWN_TEMPLATE, build
from tiny import HIGH_RES, LOW_RES, tiny_config, tiny_model, tiny_text_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    pipeline,
)

from mgllava.chat_templates import (
    PIECE_SEPARATOR,
    TEMPLATES,
    adapt_language_model_template,
    load_chat_template,
)
from mgllava.image_processing_mgllava import MGLlavaImageProcessor
from mgllava.objects import load_detections
from mgllava.objects.detector import Detections
from mgllava.processing_mgllava import MGLlavaProcessor

NUM_IMAGE_TOKENS = 4
TOKENIZERS = {name: build(name) for name in NAMES}
PICTURE = Image.new("RGB", (40, 30), "teal")
CAT = {"boxes": [[0, 0, 9, 9]], "labels": ["cat"], "scores": [0.9]}
CAT_AND_DOG = {"boxes": [[0, 0, 9, 9], [20, 0, 39, 29]], "labels": ["cat", "dog"], "scores": [0.9, 0.8]}

# The training layout, written down once more: text before an answer, what ends the answer inside its piece,
# whether the end-of-sequence token follows (and that of a beginning leads the next turn), separator.
LAYOUT = {
    "vicuna": ("USER: {} ASSISTANT:", "", True, "\n"),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        False,
        "",
    ),
    "phi-3": ("<|user|>{}<|end|>\n<|assistant|>\n", "<|end|>", False, "\n"),
    "chatml": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", False, "\n"),
}


def make(name="golden", template=None, tokenizer=None, **settings):
    return MGLlavaProcessor(
        MGLlavaImageProcessor(high_res_size=32, low_res_size=14),
        tokenizer or TOKENIZERS[name],
        chat_template=load_chat_template(template or OWN_TEMPLATE[name]).source,
        num_image_tokens=NUM_IMAGE_TOKENS,
        **settings,
    )


def piecewise_reference(tokenizer, template, turns):
    """Ids and answer mask of (boxes of each picture, text, answer or None) turns, encoded piece by piece."""
    instruction, suffix, with_eos, separator = LAYOUT[template]
    image_id, object_id = tokenizer.convert_tokens_to_ids(["<image>", "<object>"])
    ids, mask = [], []

    def add(new, answer=0):
        ids.extend(new)
        mask.extend([answer] * len(new))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    needs_bos = True
    for boxes, text, answer in turns:
        if boxes:
            text = ("<image>\n" * len(boxes) + text.strip()).strip()
        if needs_bos:
            add([tokenizer.bos_token_id])
        before, *after = instruction.format(text).split("<image>")
        add(encode(before))
        for count, chunk in zip(boxes, after, strict=True):
            add([image_id] * NUM_IMAGE_TOKENS + [object_id] * count)
            add(encode(chunk))
        if answer is None:
            break
        add(encode(answer + suffix), answer=1)
        if with_eos:
            add([tokenizer.eos_token_id], answer=1)
        needs_bos = with_eos
        add(encode(separator))
    return ids, mask


def conversation_of(turns):
    messages = []
    for boxes, text, answer in turns:
        blocks = [{"type": "text", "text": text}]
        for count in boxes:
            found = {1: CAT, 2: CAT_AND_DOG}[count]
            blocks.append({"type": "image", "image": PICTURE, **found})
        messages.append({"role": "user", "content": blocks if boxes else text})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


TURNS = {
    "one picture": [([2], "What is in the picture?", "A cat.")],
    "text only": [([], " How many dogs?\n", "Two dogs, and one sleeps.\n")],
    "several turns": [
        ([1], "  What is in the picture? \n", "A cat and a dog."),
        ([], "How many dogs are there?", " There are two.\n\nReally."),
        ([], "Answer with one word.", "Yes"),
    ],
    "several pictures": [([1, 2], "Compare.", "No."), ([2], "And this?", "Yes.")],
    "picture without text": [([1], "", "A street with cars.")],
    "prompt": [([2], "What is it?", "A cat."), ([], "Describe the image in detail.", None)],
    "markup": [([1], "a</s> <s>b <|end|>\n c <|im_end|>\nd é 🐈", "e\n\n<|eot_id|> f </s>")],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_ids_and_answers_equal_the_piecewise_reference(name, template, turns):
    processor = make(name, template)
    prompt = turns[-1][2] is None
    inputs = processor.apply_chat_template(
        conversation_of(turns),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=True,
    )
    ids, mask = piecewise_reference(processor.tokenizer, template, turns)
    assert inputs["input_ids"] == [ids]
    assert inputs["assistant_masks"] == [mask]
    assert inputs["attention_mask"] == [[1] * len(ids)]


def test_ids_equal_those_of_sentencepiece_itself(tmp_path):
    """As Vicuna is published: a `tokenizer.model` without `tokenizer.json`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 10))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<image>", "<object>"], special_tokens=True)

    processor = make(template="vicuna", tokenizer=tokenizer)
    ids = processor.apply_chat_template(conversation_of(TURNS["one picture"]), tokenize=True)[0]
    encode = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode
    placeholders = [processor.image_token_id] * NUM_IMAGE_TOKENS + [processor.object_token_id] * 2
    assert ids == [
        1,
        *encode("USER: "),
        *placeholders,
        *encode("\nWhat is in the picture? ASSISTANT:"),
        *encode("A cat."),
        2,
        *encode("\n"),
    ]


any_text = st.text(st.sampled_from("aceh .\n\té🐈\x1f<>|"), max_size=20)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.booleans(), any_text, any_text), min_size=1, max_size=3))
def test_any_text_equals_the_piecewise_reference(name, drawn):
    turns = [([1] if picture else [], text, answer) for picture, text, answer in drawn]
    inputs = make(name).apply_chat_template(
        conversation_of(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    clean = [(boxes, text.replace("\x1f", ""), answer.replace("\x1f", "")) for boxes, text, answer in turns]
    ids, mask = piecewise_reference(TOKENIZERS[name], OWN_TEMPLATE[name], clean)
    assert inputs["input_ids"] == [ids]
    assert inputs["assistant_masks"] == [mask]


@pytest.mark.parametrize("name", ["legacy-llama", "phi-like"])
def test_joined_text_has_other_ids(name):
    """What the pieces are for: these tokenizers give other ids for the same text in one go."""
    processor = make(name)
    turns = TURNS["several turns"]
    text = processor.apply_chat_template(conversation_of(turns))
    ids, _ = piecewise_reference(processor.tokenizer, OWN_TEMPLATE[name], turns)
    joined = processor.tokenizer.encode(text.replace(PIECE_SEPARATOR, ""), add_special_tokens=False)
    places = {processor.image_token_id, processor.object_token_id}
    assert [i for i in joined if i not in places] != [i for i in ids if i not in places]


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text_gives_the_same_ids(name):
    processor = make(name)
    conversation = conversation_of(TURNS["prompt"])
    at_once = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text.count("<image>") == 1
    later = processor(images=[PICTURE], text=text, detections=[CAT_AND_DOG], return_tensors="pt")
    assert list(at_once) == list(later)
    for key, value in at_once.items():
        assert torch.equal(value, later[key]), key
    ids = processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
    assert ids == at_once["input_ids"].tolist()


def test_golden_end_to_end_inputs():
    """Picture, detections and text of the tiny published-style model give its expected ids and boxes."""
    golden = load_file(GOLDEN / "end_to_end" / "expected.safetensors")
    detections = load_detections(GOLDEN / "end_to_end" / "detections.json")
    processor = MGLlavaProcessor(MGLlavaImageProcessor(), TOKENIZERS["golden"])
    before, after = golden["input_ids"][0].tolist()[1:4], golden["input_ids"][0].tolist()[5:]
    decode = processor.tokenizer.decode
    text = f"<s>{decode(before)}<image>{decode(after)}"
    inputs = processor(
        images=str(GOLDEN / "end_to_end" / "image.png"), text=text, detections=detections, return_tensors="pt"
    )
    placeholders = [processor.image_token_id] * 576 + [processor.object_token_id] * 4
    assert inputs["input_ids"].tolist() == [[1, *before, *placeholders, *after]]
    assert torch.equal(inputs["boxes"][0], golden["boxes"])


@pytest.mark.parametrize(("name", "adds"), [("legacy-llama", 1), ("llama-3-like", 1), ("yi-like", 0)])
def test_plain_text_gets_bos_where_the_tokenizer_adds_one(name, adds):
    processor = make(name)
    tokenizer = processor.tokenizer
    plain = tokenizer.encode("What is it?", add_special_tokens=False)
    assert processor(text="What is it?")["input_ids"] == [[tokenizer.bos_token_id] * adds + plain]
    assert processor(text="What is it?", add_special_tokens=False)["input_ids"] == [plain]
    led = processor(text=tokenizer.bos_token + "What is it?")["input_ids"][0]
    assert led.count(tokenizer.bos_token_id) == 1


def test_batch_of_conversations():
    processor = make("legacy-llama")
    all_turns = [TURNS["prompt"], TURNS["text only"], TURNS["several pictures"]]
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            [conversation_of(turns) for turns in all_turns],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": side,
                "pad_to_multiple_of": 8,
                "return_mm_token_type_ids": True,
            },
        )
        length = inputs["input_ids"].shape[1]
        assert length % 8 == 0
        for row, turns in enumerate(all_turns):
            ids, mask = piecewise_reference(processor.tokenizer, "vicuna", turns)
            place = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
            assert inputs["input_ids"][row, place].tolist() == ids
            assert inputs["assistant_masks"][row, place].tolist() == mask
            assert inputs["assistant_masks"][row].sum() == sum(mask)
            assert inputs["attention_mask"][row].sum() == len(ids)
            assert inputs["attention_mask"][row, place].all()
        held = torch.isin(
            inputs["input_ids"], torch.tensor([processor.image_token_id, processor.object_token_id])
        )
        assert torch.equal(inputs["mm_token_type_ids"], held.long())
        assert inputs["num_boxes"].tolist() == [2, 1, 2, 2]
        assert inputs["boxes"].shape == (4, 2, 4)
        assert inputs["pixel_values"].shape == (4, 3, 14, 14)
        assert inputs["pixel_values_high_res"].shape == (4, 3, 32, 32)


def test_text_only_has_no_vision_inputs():
    assert set(make()(text="hello")) == {"input_ids", "attention_mask"}
    assert "pixel_values" not in make().apply_chat_template(
        conversation_of(TURNS["text only"]), tokenize=True, return_dict=True
    )


def test_pictures_only():
    inputs = make()(images=[PICTURE, PICTURE], detections=[CAT, None], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "pixel_values_high_res", "boxes", "num_boxes"}


def test_nested_pictures_and_detections():
    processor = make()
    inputs = processor(
        images=[[PICTURE], [], [PICTURE, PICTURE]],
        text=["<image>a", "b", "<image><image>c"],
        detections=[[CAT_AND_DOG], [], [None, CAT]],
    )
    assert [row.count(processor.object_token_id) for row in inputs["input_ids"]] == [2, 0, 2]
    assert inputs["num_boxes"].tolist() == [2, 1, 1]


def test_no_detections_gives_one_box():
    processor = make()
    inputs = processor(images=PICTURE, text="<image>")
    assert inputs["num_boxes"].tolist() == [1]
    assert inputs["boxes"].tolist() == [[[0, 0, 0, 0]]]
    assert inputs["input_ids"][0].count(processor.object_token_id) == 1


def test_detections_through_processor_kwargs():
    processor = make()
    conversation = [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]
    for options in (
        {"processor_kwargs": {"detections": [CAT_AND_DOG]}},
        {"detections": [CAT_AND_DOG]},
        {"detections": [[CAT_AND_DOG]]},
    ):
        inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)
        assert inputs["num_boxes"].tolist() == [2]
    beside = [{"role": "user", "content": [{"type": "image", **CAT_AND_DOG}]}]
    inputs = processor.apply_chat_template(
        beside, tokenize=True, return_dict=True, processor_kwargs={"images": [PICTURE]}
    )
    assert inputs["num_boxes"].tolist() == [2]
    with pytest.raises(ValueError, match="0 pictures were given but the text holds 1"):
        processor.apply_chat_template(beside, tokenize=True)
    both = [{"role": "user", "content": [{"type": "image", "image": PICTURE, **CAT}]}]
    with pytest.raises(ValueError, match="in the conversation and in processor_kwargs"):
        processor.apply_chat_template(both, tokenize=True, processor_kwargs={"detections": [CAT]})


class CornerDetector:
    """Finds one thing in the upper left corner of every picture, called as the first tag."""

    name = "corner"

    def __init__(self, needs_tags=False):
        self.needs_tags = needs_tags
        self.calls = []

    def __call__(self, pictures, tags=None):
        self.calls.append(([picture.size for picture in pictures], tags))
        labels = ["thing"] * len(pictures) if tags is None else [names[0] for names in tags]
        return [
            Detections(((0.0, 0.0, picture.width / 2, picture.height / 2),), (label,), (0.9,))
            for picture, label in zip(pictures, labels, strict=True)
        ]


def test_a_detector_finds_what_comes_without_detections(tmp_path):
    """Boxes in pixels of each picture move to its canvas as given ones do; given ones stay."""
    wide, detector = tmp_path / "wide.png", CornerDetector()
    Image.new("RGB", (64, 32)).save(wide)
    text = "<image> <image> <image>"
    pictures = [PICTURE, wide, torch.zeros(3, 20, 20)]
    inputs = make()(images=pictures, text=text, detections=[None, CAT_AND_DOG, None], detector=detector)
    assert detector.calls == [([(40, 30), (20, 20)], None)]
    found = [{"boxes": [[0, 0, 20, 15]]}, CAT_AND_DOG, {"boxes": [[0, 0, 10, 10]]}]
    given = make()(images=pictures, text=text, detections=found)
    assert inputs["num_boxes"].tolist() == [1, 2, 1]
    for name in ("boxes", "pixel_values_high_res"):
        torch.testing.assert_close(inputs[name], given[name], rtol=0, atol=0)
    assert inputs["input_ids"] == given["input_ids"]


def test_a_detector_reads_tags_and_conversations():
    detector = CornerDetector(needs_tags=True)
    user = {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Hi"}]}
    options = {"tokenize": True, "return_dict": True, "detector": detector}
    inputs = make().apply_chat_template([[user], [user]], tags=["cat", "dog"], **options)
    assert detector.calls[-1] == ([(40, 30)] * 2, [["cat", "dog"]] * 2)
    assert inputs["num_boxes"].tolist() == [1, 1]
    make().apply_chat_template([[user], [user]], tags=[["cat"], ["bird"]], **options)
    assert detector.calls[-1] == ([(40, 30)] * 2, [["cat"], ["bird"]])


@pytest.mark.parametrize(
    ("needs_tags", "tags", "message"),
    [
        (True, None, "add tags="),
        (False, ["cat"], "leave tags out"),
        (True, "cat", "expected a list"),
        (True, [], "expected a list"),
        (True, [["cat"], ["dog"]], "2 lists of tags for 1 pictures"),
        (None, ["cat"], "tags are for a detector"),
    ],
)
def test_tags_that_do_not_fit_the_detector_are_refused(needs_tags, tags, message):
    detector = None if needs_tags is None else CornerDetector(needs_tags)
    with pytest.raises(ValueError, match=message):
        make()(images=PICTURE, text="<image>", detector=detector, tags=tags)


@pytest.mark.parametrize("name", ["boxes", "detection", "scores", "detectors", "tag"])
def test_detections_under_another_name_are_not_lost_silently(name):
    with pytest.raises(ValueError, match=f"unknown option {name}.*detections="):
        make()(images=PICTURE, text="<image>", **{name: [CAT]})


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "without text"),
        ([{"role": "user"}], "no content"),
        ({"role": "user", "content": "hi"}, "expected a list of messages"),
        ([], "expected a list of messages"),
        ([{"role": "assistant", "content": "hi"}], "alternate"),
    ],
)
def test_conversations_of_the_wrong_form_are_refused(conversation, message):
    with pytest.raises(ValueError, match=message):
        make().apply_chat_template(conversation)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"text\[1\] is ''"):
        make()(text=["what", ""])


def test_box_settings_reach_the_image_processor():
    near = {"boxes": [[0, 0, 9, 9], [20, 0, 39, 29]], "labels": ["cat", "cat"], "scores": [0.9, 0.8]}
    for options in ({"best_per_label": True}, {"images_kwargs": {"best_per_label": True}}):
        inputs = make()(images=PICTURE, text="<image>", detections=near, **options)
        assert inputs["num_boxes"].tolist() == [1]


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"type": "image_url", "image_url": {"url": "PATH"}}, 1),
        ({"type": "image_url", "image_url": "PATH"}, 1),
        ({"type": "image", "url": "PATH"}, 1),
        ({"type": "image", "path": "PATH", "boxes": None, "image": None}, 1),
        ({"type": "image", "path": "PATH", "boxes": [[0, 0, 1, 1], [0, 0, 2, 2]]}, 2),
    ],
)
def test_forms_of_picture_blocks(tmp_path, block, found):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    block = json.loads(json.dumps(block).replace("PATH", path.as_posix()))
    inputs = make().apply_chat_template(
        [{"role": "user", "content": [block]}], tokenize=True, return_dict=True
    )
    assert inputs["num_boxes"].tolist() == [found]


def test_continue_final_message():
    processor = make("legacy-llama")
    turns = [([1], "What is it?", "A cat sits")]
    ids = processor.apply_chat_template(conversation_of(turns), tokenize=True, continue_final_message=True)
    whole, mask = piecewise_reference(processor.tokenizer, "vicuna", turns)
    kept = max(index for index, answer in enumerate(mask) if answer)  # all but the end of the answer
    assert ids == [whole[:kept]]


def test_own_template_of_a_language_model():
    own = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    processor = make("legacy-llama")
    processor.chat_template = adapt_language_model_template(own)
    conversation = conversation_of([([1, 2], "Compare.", "Yes."), ([], "Why?", None)])
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == ("<s>[user] <image>\n<image>\nCompare.\n[assistant] Yes.\n[user] Why?\n[assistant]")
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].count(1) == 1
    assert inputs["num_boxes"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="does not mark answers"):
        processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )


@pytest.mark.parametrize("name", ["llama-3-like", "golden"])
def test_answers_inside_a_piece_are_found_by_their_characters(name):
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    )
    processor = make(name)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "hat man"}, {"role": "assistant", "content": "cup dog"}],
        chat_template=adapt_language_model_template(marked),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    answer = [i for i, m in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if m]
    assert answer == processor.tokenizer.encode("hat man cup dog", add_special_tokens=False)[-len(answer) :]
    assert 0 < len(answer) < len(inputs["input_ids"][0])


def test_named_chat_templates():
    processor = make()
    processor.chat_template = {name: load_chat_template(name).source for name in ("vicuna", "chatml")}
    conversation = conversation_of(TURNS["text only"])
    assert "<|im_start|>" in processor.apply_chat_template(conversation, chat_template="chatml")
    assert "<|eot_id|>" in processor.apply_chat_template(conversation, chat_template="llama-3")
    with pytest.raises(ValueError, match="choose one of vicuna, chatml"):
        processor.apply_chat_template(conversation)
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        processor.apply_chat_template(conversation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [PICTURE], "text": "hello"}, "1 pictures were given but the text holds 0 <image>"),
        ({"text": "<image> hello"}, "0 pictures were given but the text holds 1 <image>"),
        ({"images": [PICTURE] * 3, "text": ["<image>", "<image>"]}, "3 pictures .* holds 2 <image>"),
        (
            {"images": [[PICTURE], [PICTURE]], "text": ["<image><image>", "a"]},
            r"1 pictures are given for text\[0\], it has 2 <image>",
        ),
        ({"text": "an <object> tag"}, r"text\[0\] holds <object>"),
        (
            {"images": PICTURE, "text": "<image>", "detections": [CAT, CAT]},
            "2 detections for 1 pictures",
        ),
        ({"text": "hello", "detections": [CAT]}, "1 detections for 0 pictures"),
        ({"images": PICTURE, "text": "<image>", "detections": {"box": []}}, r"detections\[0\] has keys"),
        ({"images": PICTURE, "text": "<image>", "detections": [[1, 2, 3, 4]]}, "4 detections for 1"),
        ({}, "give a text, pictures or both"),
        ({"text": [3]}, r"text\[0\] is a int"),
        ({"text": "a", "videos": ["b"]}, "neither videos nor audio"),
        ({"text": "a", "return_offsets_mapping": True}, "return_offsets_mapping cannot be met"),
        (
            {"images": PICTURE, "text": "<image>", "truncation": True, "max_length": 3},
            r"truncating text\[0\] from 5 to 3",
        ),
        ({"text": ["a", "b"], "assistant_spans": [[]]}, "1 assistant_spans for 2 texts"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(**arguments)


def test_errors_come_before_pictures_are_read():
    with pytest.raises(ValueError, match="1 pictures were given"):
        make()(images=["nowhere.png"], text="hello")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_assistant_tokens_mask": True}, "needs tokenize=True and return_dict=True"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "excludes"),
        ({"sanitize_control_tokens": True}, "not supported"),
    ],
)
def test_errors_of_chat_options(options, message):
    with pytest.raises(ValueError, match=message):
        make().apply_chat_template(conversation_of(TURNS["text only"]), **options)


def test_truncation_of_text():
    processor = make("legacy-llama")
    whole = processor(images=PICTURE, text="<image> what is it")["input_ids"][0]
    cut = processor(images=PICTURE, text="<image> what is it", truncation=True, max_length=8)["input_ids"][0]
    assert cut == whole[:8]
    plain = processor.tokenizer("what is it", add_special_tokens=False)["input_ids"]
    processor.tokenizer.truncation_side = "left"
    try:
        options = {"truncation": True, "max_length": 3, "add_special_tokens": False}
        assert processor(text="what is it", **options)["input_ids"] == [plain[-3:]]
        with pytest.raises(ValueError, match="would cut a picture"):
            processor(images=PICTURE, text="<image>what is it", **options)
    finally:
        processor.tokenizer.truncation_side = "right"
    padded = processor(text="a", padding="max_length", max_length=8, padding_side="left", return_tensors="np")
    assert padded["input_ids"].shape == (1, 8)
    assert padded["attention_mask"][0, 0] == 0


def test_missing_placeholder_tokens():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "end_to_end" / "llm")
    with pytest.raises(ValueError, match="lacks <image> and <object>"):
        make(tokenizer=tokenizer)


def test_other_placeholder_tokens():
    tokenizer = build("golden")
    tokenizer.add_tokens(["<picture>", "<thing>"], special_tokens=True)
    processor = make(tokenizer=tokenizer, image_token="<picture>", object_token="<thing>")
    text = processor.apply_chat_template(conversation_of(TURNS["one picture"]))
    assert "USER: <picture>\n" in text
    assert processor(images=PICTURE, text=text)["num_boxes"].tolist() == [1]


def test_decoding_shows_no_placeholders():
    processor = make("llama-3-like")
    inputs = processor(images=PICTURE, text="What is it? <image>Yes.", return_tensors="pt")
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["What is it? Yes."]
    assert processor.post_process_image_text_to_text(inputs["input_ids"]) == ["What is it? Yes."]


def test_half_precision_leaves_boxes_exact():
    box = {"boxes": [[0, 0, 39, 29.0]]}
    inputs = MGLlavaImageProcessor(low_res_size=14)(PICTURE, [box], return_tensors="pt").to(torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["boxes"].dtype == torch.float32
    assert inputs["boxes"].tolist() == [[[0, 96, 749, 653]]]


def test_number_of_tokens_for_engines():
    processor = make()
    assert processor._get_num_multimodal_tokens([(30, 40), (5, 5)]).num_image_tokens == [5, 5]
    counted = processor._get_num_multimodal_tokens([(30, 40)], detections=[CAT_AND_DOG])
    assert counted.num_image_tokens == [6]
    assert counted.num_image_patches == [1]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_model_input_names():
    names = make().model_input_names
    expected = {"input_ids", "attention_mask", "pixel_values", "pixel_values_high_res", "boxes", "num_boxes"}
    assert expected <= set(names)


def test_pipeline_takes_boxes_in_the_conversation():
    tokenizer = build("legacy-llama")
    image_id, object_id = tokenizer.convert_tokens_to_ids(["<image>", "<object>"])
    config = tiny_config(
        tiny_text_config(vocab_size=len(tokenizer), max_position_embeddings=256),
        text_vocab_size=len(tokenizer) - 2,
        image_token_id=image_id,
        object_token_id=object_id,
    )
    model = tiny_model(config)
    processor = MGLlavaProcessor(
        MGLlavaImageProcessor(high_res_size=HIGH_RES, low_res_size=LOW_RES),
        tokenizer,
        chat_template=load_chat_template("vicuna").source,
        num_image_tokens=4,
    )
    conversation = conversation_of(TURNS["prompt"])
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    answerer = pipeline("image-text-to-text", model=model, processor=processor)
    [found] = answerer(text=conversation, max_new_tokens=5, return_full_text=False)
    assert found["generated_text"] == processor.decode(answer, skip_special_tokens=True)


class ProcessorTestConfig(PreTrainedConfig):
    model_type = "mgllava_processor_test"


def test_save_and_load_through_the_auto_classes(tmp_path):
    AutoConfig.register(ProcessorTestConfig.model_type, ProcessorTestConfig, exist_ok=True)
    classes = {"pil": MGLlavaImageProcessor, "torchvision": MGLlavaImageProcessor}
    AutoImageProcessor.register(ProcessorTestConfig, image_processor_classes=classes, exist_ok=True)
    AutoProcessor.register(ProcessorTestConfig, MGLlavaProcessor, exist_ok=True)
    processor = make("legacy-llama")
    processor.image_processor.max_objects = 7
    processor.save_pretrained(tmp_path)

    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MGLlavaProcessor
    assert type(loaded.image_processor) is MGLlavaImageProcessor
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    conversation = conversation_of(TURNS["several turns"])
    assert loaded.apply_chat_template(conversation, tokenize=True) == processor.apply_chat_template(
        conversation, tokenize=True
    )

    alone = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(alone) is MGLlavaImageProcessor
    assert alone.max_objects == 7
    alone.save_pretrained(tmp_path / "alone")
    assert MGLlavaImageProcessor.from_pretrained(tmp_path / "alone").to_dict() == alone.to_dict()


def test_the_name_of_a_detector_is_none():
    with pytest.raises(
        ValueError, match=r"detector is 'owlv2'; expected a detector: .*load_detector\('owlv2'\)"
    ):
        make()(images=PICTURE, text="<image>", detector="owlv2")
