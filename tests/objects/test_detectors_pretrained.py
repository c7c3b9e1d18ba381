"""Every detector with weights: end to end with random ones, and coordinates with planted outputs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_detectors import MAX_TEXT_LENGTH, NAMES, SIDE, save
from transformers.modeling_outputs import Seq2SeqLMOutput

from mgllava.objects.boxes import detections_to_boxes
from mgllava.objects.detector import Detections
from mgllava.objects.detectors import DETECTORS, default_threshold, florence2, load_detector
from mgllava.objects.detectors.output import to_detections

GOLDEN = Path(__file__).parents[1] / "golden"
WITH_WEIGHTS = [name for name, family in DETECTORS.items() if family.checkpoint]
CLOSED = ["detr", "rt-detr"]
OPEN = ["owlv2", "grounding-dino", "mm-grounding-dino", "llmdet"]
FLORENCE = ["florence-2", "florence-2-captions"]

SIZES = [(64, 64), (100, 40), (30, 90)]  # width, height
TAGS = ["zebra", "kite", "traffic light"]
NOTHING = -40.0  # a logit


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of each tiny checkpoint, written when first asked for."""
    written = {}

    def folder(name):
        name = {"llmdet": "mm-grounding-dino", "florence-2-captions": "florence-2"}.get(name, name)
        if name not in written:
            written[name] = save(name, tmp_path_factory.mktemp(name))
        return str(written[name])

    return folder


@pytest.fixture
def load(checkpoints):
    return lambda name, **options: load_detector(name, checkpoint=checkpoints(name), **options)


def pictures_of(sizes=SIZES):
    noise = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise).numpy())
        for width, height in sizes
    ]


def plant(detector, sizes, found):
    """Make the detector's model answer with these boxes, as (box, number of the tag, score) for each picture.

    The conventions are written out here: centre and size as shares of the picture, or for OWLv2 of the square
    around it; one logit for each tag, for each token of "zebra. kite. traffic light." or for each name and none.
    """
    most = max(map(len, found))
    family = "detr" if detector.name == "detr" else detector.name if detector.name in CLOSED else "open"
    columns = {"detr": len(NAMES) + 1, "rt-detr": len(NAMES), "open": len(TAGS)}[family]
    dino = detector.name in OPEN[1:]
    columns = MAX_TEXT_LENGTH if dino else columns
    logits = torch.full((len(sizes), most, columns), NOTHING, dtype=torch.float64)
    boxes = torch.full((len(sizes), most, 4), 0.5, dtype=torch.float64)
    if family == "detr":
        logits[:, :, -1] = 0
    for picture, ((width, height), rows) in enumerate(zip(sizes, found, strict=True)):
        if detector.name == "owlv2":
            width = height = max(width, height)
        for row, ((x1, y1, x2, y2), tag, score) in enumerate(rows):
            boxes[picture, row] = torch.tensor(
                [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height],
                dtype=torch.float64,
            )
            column = [1, 3, 6][tag] if dino else tag  # [CLS] zebra . kite . traffic light . [SEP]
            if family == "detr":
                logits[picture, row, column] = math.log(score)
                logits[picture, row, -1] = math.log(1 - score)
            else:
                logits[picture, row, column] = math.log(score / (1 - score))
    seen = []

    def forward(**inputs):
        seen.append(inputs)
        return SimpleNamespace(logits=logits.clone(), pred_boxes=boxes.clone())

    detector.model.forward = forward
    return seen


def tags_for(detector, sizes):
    return [TAGS] * len(sizes) if detector.needs_tags else None


def write(detector, texts):
    """Make Florence-2 write these texts, one for each picture, token by token."""
    tokenizer = detector.processor.tokenizer
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, rows)) + 1
    rows = [row + [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    steps = iter(range(longest))

    def forward(pixel_values=None, encoder_outputs=None, decoder_input_ids=None, past_key_values=None, **_):
        wanted = torch.tensor(rows)[:, next(steps)]
        logits = torch.full((len(rows), decoder_input_ids.shape[1], len(tokenizer)), NOTHING)
        logits[:, -1].scatter_(1, wanted[:, None], -NOTHING)
        return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)

    detector.model.forward = forward


def assert_found(found, expected):
    assert [len(detections.boxes) for detections in found] == [len(rows) for rows in expected]
    for detections, rows in zip(found, expected, strict=True):
        assert list(detections.labels) == [label for _, label, _ in rows]
        assert list(detections.scores) == pytest.approx([score for _, _, score in rows], abs=1e-6)
        for box, (wanted, _, _) in zip(detections.boxes, rows, strict=True):
            assert box == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_random_weights_end_to_end(name, load, monkeypatch):
    monkeypatch.setattr(florence2, "MAX_NEW_TOKENS", 8)
    detector = load(name, **({} if name in FLORENCE else {"threshold": 0.0}))
    assert detector.name == name
    assert detector.needs_tags == DETECTORS[name].needs_tags
    sizes = [*SIZES, (1, 1)]
    found = detector(pictures_of(sizes), tags_for(detector, sizes))
    assert len(found) == len(sizes)
    assert name in FLORENCE or any(detections.boxes for detections in found)
    for (width, height), detections in zip(sizes, found, strict=True):
        assert len(detections.boxes) == len(detections.labels) == len(detections.scores)
        assert list(detections.scores) == sorted(detections.scores, reverse=True)
        for x1, y1, x2, y2 in detections.boxes:
            assert 0 <= x1 <= x2 <= width
            assert 0 <= y1 <= y2 <= height
        if name not in FLORENCE:
            assert set(detections.labels) <= set(TAGS)
            assert all(0 < score < 1 for score in detections.scores)


# Their first convolutions see a picture's edge and its padding alike, so that no batch gives just what one alone gives.
PADDED = ["detr", "grounding-dino", "mm-grounding-dino"]


@pytest.mark.parametrize(
    ("name", "kind"), [("owlv2", "owlv2"), ("rt-detr", "rt-detr"), ("rt-detr", "rt-detr-v2")]
)
def test_a_batch_of_mixed_sizes_gives_what_each_picture_gives_alone(name, kind, checkpoints):
    detector = load_detector(name, checkpoint=checkpoints(kind), threshold=0.0)
    pictures = pictures_of()
    together = detector(pictures, tags_for(detector, SIZES))
    for picture, detections in zip(pictures, together, strict=True):
        (alone,) = detector([picture], tags_for(detector, [picture.size]))
        assert alone.labels == detections.labels
        assert torch.allclose(torch.tensor(alone.boxes), torch.tensor(detections.boxes), atol=1e-3)


@pytest.mark.parametrize("kind", ["conditional-detr", "deformable-detr"])
def test_next_of_kin_of_detr(kind, checkpoints):
    detector = load_detector("detr", checkpoint=checkpoints(kind), threshold=0.0)
    found = detector(pictures_of())
    assert len(found) == len(SIZES)
    for (width, height), detections in zip(SIZES, found, strict=True):
        assert detections.boxes
        assert set(detections.labels) <= set(NAMES)
        for x1, y1, x2, y2 in detections.boxes:
            assert 0 <= x1 <= x2 <= width
            assert 0 <= y1 <= y2 <= height


@pytest.mark.parametrize("name", PADDED)
def test_the_padding_of_a_batch_is_masked(name, load):
    detector = load(name)
    seen = plant(detector, SIZES, [[((0, 0, 1, 1), 0, 0.5)]] * 3)
    detector(pictures_of(), tags_for(detector, SIZES))
    resize = getattr(detector.processor, "image_processor", detector.processor)
    alone = [resize([picture], return_tensors="pt")["pixel_values"].shape[2:] for picture in pictures_of()]
    assert len(set(alone)) == 3
    assert seen[0]["pixel_mask"].sum((1, 2)).tolist() == [height * width for height, width in alone]


@pytest.mark.parametrize("name", OPEN)
def test_one_list_of_tags_is_not_taken_for_one_of_letters_each(name, load):
    with pytest.raises(ValueError, match=r"tags\[0\] is 'cat'; expected a list of names for each picture"):
        load(name)(pictures_of(), ["cat", "dog", "cow"])
    with pytest.raises(ValueError, match=r"tags\[2\] is 'cow'"):
        load(name)(pictures_of(), [["cat"], ["dog"], "cow"])


@pytest.mark.parametrize("name", ["owlv2", "grounding-dino"])
def test_each_picture_is_prepared_once_and_owlv2s_apart(name, load, monkeypatch):
    detector = load(name)
    prepared = []
    processor_class = type(detector.processor.image_processor)
    call = processor_class.__call__

    def counted(self, images, **options):
        prepared.append(len(images) if isinstance(images, list) else 1)
        return call(self, images, **options)

    monkeypatch.setattr(processor_class, "__call__", counted)
    detector(pictures_of(), [list("bcdefghijklm")] * 3)
    assert prepared == ([1, 1, 1] if name == "owlv2" else [3])


@pytest.mark.parametrize("name", [*OPEN, *CLOSED])
def test_planted_boxes_come_back_in_pixels_sorted_by_score(name, load):
    detector = load(name, threshold=0.2)
    planted = [
        [((10, 20, 30, 60), 0, 0.5), ((0, 0, 64, 64), 2, 0.9), ((1.5, 2.25, 3, 4), 1, 0.6)],
        [((90, 30, 100, 40), 1, 0.8), ((5, 5, 95, 35), 0, 0.3), ((5, 5, 95, 35), 0, 0.19)],
        [((0, 80, 30, 90), 2, 0.25)],
    ]
    plant(detector, SIZES, planted)
    found = detector(pictures_of(), tags_for(detector, SIZES))
    expected = [
        sorted(((box, TAGS[tag], score) for box, tag, score in rows if score > 0.2), key=lambda row: -row[2])
        for rows in planted
    ]
    assert_found(found, expected)


@pytest.mark.parametrize("name", [*OPEN, *CLOSED])
def test_boxes_beyond_the_picture_are_clipped_and_those_in_the_padding_dropped(name, load):
    detector = load(name)
    planted = [
        [((-5, 10, 20, 90), 0, 0.9), ((-9, 10, -1, 20), 1, 0.8), ((10, -9, 20, -1), 2, 0.7)],
        # At the right of the picture's 40 rows OWLv2 sees padding, below row 40.
        [((10, 50, 90, 90), 0, 0.9), ((10, 30, 90, 60), 1, 0.8), ((0, 40, 100, 100), 2, 0.7)],
        [((30, 0, 90, 90), 0, 0.9), ((20, -10, 60, 50), 1, 0.8), ((5, 5, 5, 9), 2, 0.7)],
    ]
    plant(detector, SIZES, planted)
    found = detector(pictures_of(), tags_for(detector, SIZES))
    expected = [
        [((0, 10, 20, 64), "zebra", 0.9)],
        [((10, 30, 90, 40), "kite", 0.8)],
        [((20, 0, 30, 50), "kite", 0.8), ((5, 5, 5, 9), "traffic light", 0.7)],
    ]
    assert_found(found, expected)


def test_equal_scores_keep_the_order_in_which_they_were_given():
    labels = [str(number) for number in range(2000)]
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2000, 4)
    assert to_detections(boxes, labels, torch.ones(2000), (5, 5)).labels == tuple(labels)


GOLDEN_CASES = json.loads((GOLDEN / "boxes.json").read_text())["cases"]


@pytest.mark.parametrize("name", ["owlv2", "detr"])
@pytest.mark.parametrize("case", GOLDEN_CASES, ids=[f"{c['width']}x{c['height']}" for c in GOLDEN_CASES])
def test_planted_golden_detections_become_the_golden_boxes(name, case, load):
    detector = load(name, threshold=0.0)
    if name == "owlv2":  # its own blur before it shrinks a large picture to the tiny one takes seconds
        detector.processor.image_processor.size = {"height": 960, "width": 960}
    names = list(dict.fromkeys(case["labels"])) or ["cat"]
    size = (case["width"], case["height"])
    sides = [max(size)] * 2 if name == "owlv2" else size
    corners = torch.tensor(case["boxes"], dtype=torch.float64).reshape(-1, 4)
    boxes = torch.cat([corners[:, :2] + corners[:, 2:], corners[:, 2:] - corners[:, :2]], 1)
    boxes = boxes / torch.tensor([2 * sides[0], 2 * sides[1], *sides])
    scores = torch.tensor(case["scores"], dtype=torch.float64)
    numbers = torch.tensor([names.index(label) for label in case["labels"]], dtype=torch.long)
    logits = torch.full((len(boxes), len(names) + (name == "detr")), NOTHING, dtype=torch.float64)
    logits.scatter_(1, numbers[:, None], scores.logit()[:, None])
    if name == "detr":
        logits[:, -1] = 0
        detector.model.config.id2label = dict(enumerate(names))
    outputs = SimpleNamespace(logits=logits[None], pred_boxes=boxes[None])
    detector.model.forward = lambda **inputs: outputs
    (found,) = detector([Image.new("RGB", size)], [names] if name == "owlv2" else None)
    settings = {
        key: case[key] for key in ("iou_threshold", "max_objects", "max_per_category", "high_res_size")
    }
    chosen, labels = detections_to_boxes(
        **found.as_dict(), image_size=(case["height"], case["width"]), **settings
    )
    # The original kept boxes in the padding, which can use up their label's limit; detectors here drop them.
    strays = {
        label
        for (x1, y1, x2, y2), label in zip(case["boxes"], case["labels"], strict=True)
        if x1 >= size[0] or y1 >= size[1] or x2 <= 0 or y2 <= 0
    }
    assert len(strays) <= (size == (1920, 1080))
    assert [row for row in zip(chosen.tolist(), labels, strict=False) if row[1] not in strays] == [
        (box, label)
        for box, label in zip(case["out_boxes"], case["out_labels"], strict=False)
        if label not in strays
    ]
    assert len(labels) == len(case["out_labels"])


def test_owlv2_asks_for_photos_of_the_tags_at_its_own_size(load):
    detector = load("owlv2")
    seen = plant(detector, SIZES, [[((0, 0, 1, 1), 0, 0.5)]] * 3)
    detector(pictures_of(), [TAGS] * 3)
    (inputs,) = seen
    assert inputs["pixel_values"].shape == (3, 3, SIDE, SIDE)
    texts = detector.processor.tokenizer.batch_decode(inputs["input_ids"][:2], skip_special_tokens=True)
    assert [text.replace(" ", "").rstrip("!") for text in texts] == ["aphotoofzebra", "aphotoofkite"]


def test_owlv2_threshold_is_the_papers(load):
    detector = load("owlv2")
    plant(detector, SIZES[:1], [[((0, 0, 9, 9), 0, 0.21), ((0, 0, 9, 9), 1, 0.19)]])
    (found,) = detector(pictures_of(SIZES[:1]), [TAGS])
    assert found.labels == ("zebra",)


def test_owlv2_with_fewer_tags_in_one_picture_ignores_the_prompts_that_fill_up(load):
    detector = load("owlv2")
    plant(detector, SIZES[:2], [[((0, 0, 9, 9), 2, 0.9)], [((0, 0, 9, 9), 2, 0.9), ((0, 0, 5, 5), 0, 0.4)]])
    found = detector(pictures_of(SIZES[:2]), [TAGS, ["zebra"]])
    assert found[0].labels == ("traffic light",)
    assert (found[1].labels, found[1].boxes) == (("zebra",), ((0.0, 0.0, 5.0, 5.0),))


@pytest.mark.parametrize("name", OPEN)
def test_pictures_without_tags_have_no_detections_and_do_not_shift_the_others(name, load):
    detector = load(name)
    plant(detector, SIZES[1:2], [[((10, 10, 20, 20), 1, 0.7)]])
    found = detector(pictures_of(), [[], TAGS, []])
    assert [detections.labels for detections in found] == [(), ("kite",), ()]
    assert detector(pictures_of(), [[], [], []]) == [Detections((), (), ())] * 3
    assert detector([], []) == []


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("tags", [None, [], [["cat"]]])
def test_an_open_vocabulary_wants_tags_for_each_picture(name, tags, load):
    with pytest.raises(ValueError, match=f"{name} looks for the names it is given: .* 3 pictures"):
        load(name)(pictures_of(), tags)


def test_grounding_dino_joins_the_tags_and_takes_the_tag_of_the_best_token(load):
    detector = load("grounding-dino")
    seen = plant(detector, SIZES[:1], [[((0, 0, 9, 9), 0, 0.3), ((0, 0, 9, 9), 1, 0.3)]])
    forward = detector.model.forward

    def with_more(**inputs):
        outputs = forward(**inputs)
        outputs.logits[0, 0, 2] = 5  # a full stop
        outputs.logits[0, 0, 5] = 1  # "traffic", better than the planted token of the same box
        outputs.logits[0, 1, 0] = 5  # [CLS]
        outputs.logits[0, 1, 10:] = 5  # beyond [SEP]
        return outputs

    detector.model.forward = with_more
    (found,) = detector(pictures_of(SIZES[:1]), [["Zebra", "kite", "traffic light"]])
    assert found.labels == ("traffic light", "kite")
    assert found.scores == pytest.approx([torch.tensor(1.0).sigmoid().item(), 0.3])
    tokenizer = detector.processor.tokenizer
    assert tokenizer.decode(seen[0]["input_ids"][0]).count(".") == 3


def test_grounding_dino_looks_for_many_tags_in_several_texts(load):
    detector = load("grounding-dino", threshold=0.0)
    letters = list("bcdefghijklm")
    tokenizer = detector.processor.tokenizer
    texts = []

    def forward(**inputs):
        texts.append(inputs["input_ids"].tolist())
        batch = len(inputs["input_ids"])
        logits = torch.full((batch, 1, MAX_TEXT_LENGTH), NOTHING)
        logits[:, 0, 3] = 1  # the second tag of each text
        return SimpleNamespace(logits=logits, pred_boxes=torch.full((batch, 1, 4), 0.5))

    detector.model.forward = forward
    found = detector(pictures_of(SIZES[:2]), [letters, ["b", "st. bernard", "c"]])
    assert [len(rows) for rows in texts] == [2, 1, 1]  # pictures in each turn
    assert all(len(row) <= MAX_TEXT_LENGTH for rows in texts for row in rows)
    assert tokenizer.convert_ids_to_tokens(texts[0][1])[:8] == [
        "[CLS]", "b", ".", "st", "bernard", ".", "c", ".",
    ]  # fmt: skip
    assert sorted(found[0].labels) == ["c", "h", "m"]  # five to a text
    assert found[1].labels == ("st. bernard",)


def test_grounding_dino_refuses_a_tag_longer_than_its_text(load):
    with pytest.raises(ValueError, match="tag 'cat cat .* has 12 tokens; grounding-dino reads at most 10"):
        load("grounding-dino")(pictures_of(SIZES[:1]), [["cat " * 11]])


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("florence-2", "Locate the objects with category name in the image."),
        ("florence-2-captions", "Locate the objects in the image, with their descriptions."),
    ],
)
def test_florence_2_writes_labels_and_boxes(name, prompt, load, monkeypatch):
    detector = load(name)
    seen = []
    processor_class = type(detector.processor)
    call = processor_class.__call__
    monkeypatch.setattr(
        processor_class, "__call__", lambda self, **inputs: seen.append(call(self, **inputs)) or seen[-1]
    )
    write(
        detector,
        [
            "cat<loc_0><loc_250><loc_500><loc_999>",
            "kite<loc_500><loc_500><loc_400><loc_600>"
            "red car<loc_100><loc_200><loc_300><loc_400><loc_0><loc_0><loc_999><loc_999>",
            "",
        ],
    )
    found = detector(pictures_of())
    # A coordinate is the middle of one of a thousand steps, in whole pixels; the kite's corners are swapped.
    assert found[0] == Detections(((0.0, 16.0, 32.0, 63.0),), ("cat",), (1.0,))
    assert found[1] == Detections(
        ((10.0, 8.0, 30.0, 16.0), (0.0, 0.0, 99.0, 39.0)), ("red car", "red car"), (1.0, 1.0)
    )
    assert found[2] == Detections((), (), ())
    (inputs,) = seen
    assert inputs["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert prompt in detector.processor.tokenizer.decode(inputs["input_ids"][0])


def test_florence_2_has_no_threshold():
    with pytest.raises(ValueError, match="'florence-2' gives no scores, but threshold is 0.3"):
        load_detector("florence-2", threshold=0.3)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_absent_weights_are_named_with_what_to_do(name):
    published = DETECTORS[name].checkpoint
    with pytest.raises(OSError, match=f"'{name}' cannot load its weights from '{published}'") as caught:
        load_detector(name)
    assert f"hf download {published}" in str(caught.value)
    assert "checkpoint" in str(caught.value)


def test_a_folder_without_weights_and_one_of_another_architecture(checkpoints, tmp_path):
    with pytest.raises(OSError, match="'detr' cannot load its weights from") as caught:
        load_detector("detr", checkpoint=str(tmp_path))
    assert "hf download" not in str(caught.value)
    for file in Path(checkpoints("detr")).glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="'detr' cannot load its weights from .*safetensors"):
        load_detector("detr", checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="'owlv2' runs checkpoints of type owlv2; .* is of type detr"):
        load_detector("owlv2", checkpoint=checkpoints("detr"))
    (tmp_path / "config.json").write_text('{"model_type": "yolos"}')
    with pytest.raises(ValueError, match="'detr' runs checkpoints of type detr, .* is of type yolos"):
        load_detector("detr", checkpoint=str(tmp_path))


def test_an_unknown_name_and_a_threshold_out_of_range():
    with pytest.raises(ValueError, match="detector is 'yolo'; expected one of owlv2, .*, proposals"):
        load_detector("yolo")
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="threshold is .*; expected a score from 0 to below 1"):
            load_detector("owlv2", threshold=threshold)


def test_every_adapter_is_held_to_the_detector_it_says_it_is():
    from importlib import import_module

    for family in DETECTORS.values():
        builder = getattr(import_module(f"mgllava.objects.detectors.{family.module}"), family.builder)
        assert builder.needs_tags == family.needs_tags


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_the_default_threshold_is_known_before_the_weights_load(name, load):
    assert default_threshold(name) == load(name).threshold


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _point(folder):  # what a clone without git-lfs has
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 64}))


@pytest.mark.parametrize("damage", [_cut, _point, _widen])
def test_damaged_weights_are_named_and_no_download_is_offered_for_a_folder(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(save("detr", Path("some/folder")))
    with pytest.raises(
        OSError, match="detector 'detr' cannot load its weights from 'some/folder': "
    ) as raised:
        load_detector("detr", checkpoint="some/folder")
    assert "hf download" not in str(raised.value)
