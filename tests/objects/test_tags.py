"""Where tags come from: lists, files, vocabularies, questions, Florence-2 and RAM++."""

import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

from mgllava.objects.detector import Detections
from mgllava.objects.tags import (
    VOCABULARIES,
    FlorenceTags,
    load_tagger,
    question_tags,
    read_tags,
    vocabulary,
)

PICTURES = [Image.new("RGB", (8, 6), "red"), Image.new("RGB", (5, 9), "blue")]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_has_as_many_names_as_it_says_each_once_and_its_source(name):
    names = vocabulary(name)
    assert VOCABULARIES[name].split()[1] == str(len(names))
    assert len(set(names)) == len(names)
    assert all(entry == entry.strip().replace("_", " ") for entry in names)
    head = (read_tags.__globals__["FOLDER"] / f"{name}.txt").read_text().partition("\n")[0]
    assert head.startswith("# The ")
    assert "https://" in head


def test_coco_is_what_torchvision_lists():
    meta = pytest.importorskip("torchvision.models._meta")
    assert vocabulary("coco") == [n for n in meta._COCO_CATEGORIES if n not in ("__background__", "N/A")]


def test_an_unknown_vocabulary():
    with pytest.raises(ValueError, match="vocabulary is 'imagenet'; expected one of coco, open-images, lvis"):
        vocabulary("imagenet")


@pytest.mark.parametrize("source", ["coco", "cat,  traffic   light ,cat,", "kite"])
def test_fixed_tags_are_the_same_for_every_picture(source):
    expected = {"coco": vocabulary("coco"), "kite": ["kite"]}.get(source, ["cat", "traffic light"])
    tagger = load_tagger(source)
    assert tagger.name == source
    assert not tagger.needs_questions
    assert tagger(PICTURES) == [expected, expected]
    assert tagger([]) == []


def test_tags_from_a_file(tmp_path):
    path = tmp_path / "tags.txt"
    path.write_text("# street\ncat\ntraffic light, dog # two\n\ncat\n", encoding="utf-8")
    assert load_tagger(str(path))(PICTURES[:1]) == [["cat", "traffic light", "dog"]]


def test_a_file_may_have_any_suffix(tmp_path):
    for name in ("names.lst", "names.v2_final"):
        (tmp_path / name).write_text("cat\ndog\n")
        assert load_tagger(str(tmp_path / name))(PICTURES[:1]) == [["cat", "dog"]]
    with pytest.raises(FileNotFoundError):
        load_tagger("absent.lst")
    assert load_tagger("st. bernard")(PICTURES[:1]) == [["st. bernard"]]


@pytest.mark.parametrize("source", ["COCO", " Coco", "LVIS", "Open-Images", "Question"])
def test_sources_are_known_in_any_case(source):
    assert load_tagger(source).name == source.strip().lower()


@pytest.mark.parametrize(
    ("source", "meant"),
    [("openimages", "open-images"), ("open_images", "open-images"), ("florence2", "florence-2"), ("ram", "ram++"),
     ("lviss", "lvis")],
)  # fmt: skip
def test_what_looks_like_a_misspelt_source_is_not_looked_for(source, meant):
    if source == "ram":  # an animal
        assert load_tagger(source)(PICTURES[:1]) == [["ram"]]
        return
    with pytest.raises(ValueError, match=f"tags are '{source}'; did you mean '{meant}'.*write '{source},'"):
        load_tagger(source)
    assert load_tagger(f"{source},")(PICTURES[:1]) == [[source]]


def test_several_sources_are_no_list_of_names():
    with pytest.raises(ValueError, match="tags are 'coco,LVIS'; expected names, or 'coco' alone"):
        load_tagger("coco,LVIS")


@pytest.mark.parametrize("name", ["cat", "zebra", "kite", "cocoa", "question mark", "unicorn", "cacao, ram"])
def test_names_of_things_are_looked_for(name):
    assert load_tagger(name)(PICTURES[:1]) == [name.split(", ")]


def test_files_and_lists_that_name_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tagger(str(tmp_path / "absent.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n,,\n")
    with pytest.raises(ValueError, match=r"empty.txt names no tags"):
        load_tagger(str(empty))
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"empty.txt is not a UTF-8 text file"):
        load_tagger(str(empty))
    for text in ("", " , "):
        with pytest.raises(ValueError, match="expected names with commas between"):
            load_tagger(text)
    with pytest.raises(ValueError, match="tags from 'coco' have no weights"):
        load_tagger("coco", checkpoint="somewhere")


@pytest.mark.parametrize(
    ("question", "tags"),
    [
        ("How many dogs are near the fire hydrant?", ["dog", "fire hydrant"]),
        ("Is the man's hot dog on the dining table?", ["man", "hot dog", "dining table"]),
        ("Which of the women hold knives or wine glasses?", ["woman", "knife", "wine glass"]),
        ("Are people and children feeding mice, geese or puppies with strawberries?", None),
        ("CAN you see a bat, a Bat or two bats?", ["bat"]),
        ("Are there hot air balloons, or one hot-air balloon?", ["hot-air balloon"]),
        ("What is the meaning of it all?", []),
        ("", []),
    ],
)
def test_things_that_a_question_names(question, tags):
    found = question_tags(question)
    if tags is None:
        assert {"person", "mouse", "goose", "puppy", "strawberry"} <= set(found)
    else:
        assert found == tags


def test_each_picture_has_its_own_question():
    tagger = load_tagger("question")
    assert tagger.needs_questions
    assert tagger(PICTURES, ["What breed is the dog?", "Why?"]) == [["dog"], []]
    with pytest.raises(ValueError, match="expected 2 questions, got none"):
        tagger(PICTURES)
    with pytest.raises(ValueError, match="expected 2 questions, got 1"):
        tagger(PICTURES, ["What?"])


def test_florence_2_names_what_it_detects():
    found = [
        Detections(((0, 0, 1, 1),) * 3, ("red car", "dog", "red car"), (1.0,) * 3),
        Detections((), (), ()),
    ]
    assert FlorenceTags(lambda pictures: found)(PICTURES) == [["red car", "dog"], []]


def test_ram_without_its_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ram", None)
    with pytest.raises(ImportError, match=r"need the package `ram`.*recognize-anything.*coco"):
        load_tagger("ram++")


@pytest.fixture
def ram(monkeypatch):
    """A stand-in for the package: the tags of a picture are its mean colour's name."""
    built = []

    class Model(torch.nn.Module):
        def generate_tag(self, batch):
            assert batch.shape[1:] == (3, 4, 4)
            assert not self.training
            return ["red | fire  truck |red" if row[0].mean() > 0.5 else "blue" for row in batch], ["", ""]

    def ram_plus(**options):
        built.append(options)
        return Model()

    package, models = ModuleType("ram"), ModuleType("ram.models")
    package.get_transform = lambda image_size: (
        lambda picture: torch.tensor([band.getextrema()[1] / 255 for band in picture.split()])[
            :, None, None
        ].expand(3, 4, 4)
    )
    models.ram_plus = ram_plus
    package.models = models
    monkeypatch.setitem(sys.modules, "ram", package)
    monkeypatch.setitem(sys.modules, "ram.models", models)
    return built


def test_ram_tags_a_batch(ram, tmp_path):
    weights = tmp_path / "ram_plus_swin_large_14m.pth"
    weights.touch()
    for checkpoint in (weights, tmp_path):
        assert load_tagger("ram++", checkpoint=str(checkpoint))(PICTURES) == [["red", "fire truck"], ["blue"]]
        assert ram.pop() == {"pretrained": str(weights), "image_size": 384, "vit": "swin_l"}


def test_ram_without_its_weights_says_what_to_do(ram, tmp_path):
    with pytest.raises(OSError, match=r"weights of RAM\+\+ are not at .*ram_plus_swin_large_14m.pth"):
        load_tagger("ram++", checkpoint=str(tmp_path))
    with pytest.raises(OSError, match=r"hf download xinyu1205/recognize-anything-plus-model ram_plus"):
        load_tagger("ram++")
    assert not ram


def test_a_mark_of_the_encoding_is_no_part_of_the_first_tag(tmp_path):
    (tmp_path / "tags.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert read_tags(tmp_path / "tags.txt") == ["cat", "dog"]


def test_a_list_longer_than_the_name_of_any_file():
    names = [f"st. {number}" for number in range(2000)]
    assert load_tagger(", ".join(names))(PICTURES[:1]) == [names]
