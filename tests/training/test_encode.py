"""Ids, labels and pictures of samples, against an encoding of one piece after the other."""

import pytest
import torch
from miniature import NUM_IMAGE_TOKENS, tiny_processor
from PIL import Image
from small_tokenizers import NAMES, OWN_TEMPLATE
from tiny import HIGH_RES

from mgllava.training.collate import Collator
from mgllava.training.encode import Encoder
from mgllava.training.errors import BadRecord
from mgllava.training.records import Record, turns_of_llava

# Instruction, what the answer ends with, whether turns begin with BOS and end with EOS, separator.
LAYOUT = {
    "vicuna": ("USER: {} ASSISTANT:", "", True, "\n"),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        False,
        "",
    ),
    "phi-3": ("<|user|>{}<|end|>\n<|assistant|>\n", "<|end|>", False, "\n"),
    "chatml": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", False, "\n"),
}
PICTURE = Image.new("RGB", (60, 40), (200, 30, 90))
DETECTIONS = {
    "boxes": [[2, 3, 20, 30], [1, 1, 18, 29], [30, 5, 55, 35], [8, 8, 50, 38]],
    "labels": ["cat", "cat", "dog", "cat"],
    "scores": [0.9, 0.3, 0.8, 0.7],
}
CONVERSATIONS = {
    "one turn": [("human", "What is in the picture?\n<image>"), ("gpt", "A cat sits on a red chair.")],
    "several turns": [
        ("human", "<image>\n  What is this? "),
        ("gpt", "A cat."),
        ("human", "How many dogs are there?"),
        ("gpt", " There are two dogs.\n\nOne sleeps. "),
        ("human", "And now?"),
        ("gpt", "No."),
    ],
    "text alone": [("human", "Answer with one word. "), ("gpt", "Yes."), ("human", "\nWhy?"), ("gpt", "No.")],
    "the picture later": [
        ("human", "Hello"),
        ("gpt", "Yes."),
        ("human", "See <image> here"),
        ("gpt", "A street."),
    ],
    "an answer first, a question last": [
        ("gpt", "skipped"),
        ("human", "<image>\nOne"),
        ("human", "two?"),
        ("gpt", "Three."),
        ("gpt", "Four."),
        ("human", "left out"),
    ],
    "a question that is only the picture": [("human", "<image>"), ("gpt", "The image shows a street.")],
}


def piece_by_piece(tokenizer, template: str, messages, limit: int | None = None):
    """Ids with -200 for the picture, and labels, as the original training code makes them of a conversation."""
    instruction, suffix, own_tokens, separator = LAYOUT[template]
    turns, question = [], None
    for role, value in messages:
        if role == "human":
            if "<image>" in value:
                value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
            question = (question or "") + value
        elif question is not None or turns:
            turns.append((question or "", value))
            question = None
    ids, labels = [], []

    def add(pieces, learned=False):
        ids.extend(pieces)
        labels.extend(pieces if learned else [-100] * len(pieces))

    for number, (question, answer) in enumerate(turns):
        if own_tokens or number == 0:
            add([tokenizer.bos_token_id])
        for position, piece in enumerate(instruction.format(question).split("<image>")):
            add([-200] * min(position, 1))
            add(tokenizer.encode(piece, add_special_tokens=False))
        add(tokenizer.encode(answer + suffix, add_special_tokens=False), learned=True)
        add([tokenizer.eos_token_id] * own_tokens, learned=True)
        add(tokenizer.encode(separator, add_special_tokens=False))
    return ids[:limit], labels[:limit]


def record_of(messages, **values) -> Record:
    turns = turns_of_llava([{"from": role, "value": value} for role, value in messages], "0")
    if any("<image>" in value for _, value in messages):
        values = {"image": PICTURE, "detections": DETECTIONS, **values}
    return Record("0", turns, **values)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", NAMES)
def test_ids_and_labels_are_those_of_the_original(tokenizer, name):
    encoder = Encoder(tiny_processor(tokenizer), 10_000)
    ids, labels = piece_by_piece(encoder.processor.tokenizer, OWN_TEMPLATE[tokenizer], CONVERSATIONS[name])
    text = encoder.encode_text(record_of(CONVERSATIONS[name]))
    assert text.image_position == (ids.index(-200) if -200 in ids else None)
    assert text.input_ids == [encoder.processor.image_token_id if token == -200 else token for token in ids]
    assert text.labels == labels

    sample = encoder(record_of(CONVERSATIONS[name]))
    if text.image_position is None:
        assert sample == {"input_ids": ids, "labels": labels}
        return
    place, boxes = text.image_position, sample["boxes"].shape[1]
    picture = [encoder.processor.image_token_id] * NUM_IMAGE_TOKENS + [
        encoder.processor.object_token_id
    ] * boxes
    assert boxes == 3  # the fourth detection lies on the first
    assert sample["input_ids"] == ids[:place] + picture + ids[place + 1 :]
    assert sample["labels"] == labels[:place] + [-100] * len(picture) + labels[place + 1 :]


@pytest.mark.parametrize("tokenizer", ["legacy-llama", "llama-3-like", "phi-like", "yi-like"])
def test_the_limit_counts_the_picture_once_and_boxes_never(tokenizer):
    messages = CONVERSATIONS["several turns"]
    processor = tiny_processor(tokenizer)
    ids, labels = piece_by_piece(processor.tokenizer, OWN_TEMPLATE[tokenizer], messages)
    for limit in (len(ids), len(ids) - 1, len(ids) // 2, 9):
        text = Encoder(processor, limit).encode_text(record_of(messages))
        assert len(text.input_ids) == limit
        assert text.labels == labels[:limit]
        assert text.image_position == ids.index(-200)


def test_a_limit_before_the_answer_leaves_no_label():
    encoder = Encoder(tiny_processor(), 6)
    text = encoder.encode_text(record_of(CONVERSATIONS["one turn"]))
    assert not text.has_labels
    assert len(text.input_ids) == 6


def test_a_picture_that_the_limit_cuts_off_leaves_text_alone():
    messages = CONVERSATIONS["the picture later"]
    processor = tiny_processor()
    ids, labels = piece_by_piece(processor.tokenizer, "vicuna", messages)
    sample = Encoder(processor, ids.index(-200))(record_of(messages))
    assert sample == {"input_ids": ids[: ids.index(-200)], "labels": labels[: ids.index(-200)]}
    assert Encoder(processor, ids.index(-200) + 1)(record_of(messages))["boxes"].shape[1] == 2


@pytest.mark.parametrize(("spare", "boxes"), [(51, 3), (50, 2), (0, 2), (-5, 2)])
def test_one_box_of_each_label_near_the_limit(spare, boxes):
    """With 50 tokens to spare or fewer only the best box of each label stays, as in the original."""
    messages = CONVERSATIONS["several turns"]
    processor = tiny_processor()
    ids, _ = piece_by_piece(processor.tokenizer, "vicuna", messages)
    sample = Encoder(processor, len(ids) + spare)(record_of(messages))
    assert sample["boxes"].shape[1] == boxes
    assert sample["input_ids"].count(processor.object_token_id) == boxes


def test_boxes_are_the_processors_as_whole_numbers():
    encoder = Encoder(tiny_processor(), 1000)
    sample = encoder(record_of(CONVERSATIONS["one turn"]))
    expected = encoder.processor.image_processor([PICTURE], [DETECTIONS])
    assert sample["boxes"].dtype == torch.int64
    assert torch.equal(sample["boxes"].float(), expected["boxes"])
    assert sample["boxes"].max() <= HIGH_RES
    for name in ("pixel_values", "pixel_values_high_res"):
        assert torch.equal(sample[name], expected[name])


def test_a_picture_without_detections_has_one_empty_box():
    sample = Encoder(tiny_processor(), 1000)(record_of(CONVERSATIONS["one turn"], detections=None))
    assert sample["boxes"].tolist() == [[[0, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("7", (("What?", "A cat."),), PICTURE), "id 7 has 1 pictures and 0 <image>"),
        (Record("7", (("<image>\nWhat?", "A cat."),)), "id 7 has 0 pictures and 1 <image>"),
        (Record("7", (("<image>\nA", "B"), ("<image>\nC", "D")), PICTURE), "1 pictures and 2 <image>"),
        (Record("7", (("What?", "An <image>."),)), "1 <image>"),
        (Record("7", (("What <object>?", "This."),)), "<object>"),
    ],
)
def test_text_that_does_not_fit_its_picture(record, message):
    with pytest.raises(BadRecord, match=message):
        Encoder(tiny_processor(), 1000).encode_text(record)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="text_limit is 0"):
        Encoder(tiny_processor(), 0)


def test_a_batch_is_padded_on_the_right_and_joins_pictures():
    encoder = Encoder(tiny_processor(), 1000)
    samples = [
        encoder(record_of(CONVERSATIONS["one turn"])),
        encoder(record_of(CONVERSATIONS["text alone"])),
        encoder(record_of(CONVERSATIONS["several turns"], detections={"boxes": [[0, 0, 30, 30]]})),
    ]
    batch = Collator(pad_token_id=7)(samples)
    length = max(len(sample["input_ids"]) for sample in samples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (3, length)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        assert batch["input_ids"][row].tolist() == sample["input_ids"] + [7] * (length - size)
        assert batch["labels"][row].tolist() == sample["labels"] + [-100] * (length - size)
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (length - size)
    assert batch["num_boxes"].tolist() == [3, 1]
    assert batch["boxes"].shape == (2, 3, 4)
    assert not batch["boxes"][1, 1:].any()
    assert torch.equal(batch["pixel_values"][1:], samples[2]["pixel_values"])
    assert torch.equal(batch["pixel_values_high_res"][:1], samples[0]["pixel_values_high_res"])


def test_a_batch_of_text_alone_holds_no_pictures():
    sample = Encoder(tiny_processor(), 1000)(record_of(CONVERSATIONS["text alone"]))
    assert set(Collator(pad_token_id=0)([sample, sample])) == {"input_ids", "attention_mask", "labels"}
