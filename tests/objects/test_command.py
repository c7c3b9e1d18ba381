"""`mgllava detect`, with a detector that is made on the spot."""

import json

import pytest
import typer
from annotate_cases import Numbers, assert_complete, looked_at, write_picture, write_pictures
from PIL import Image
from typer.testing import CliRunner

from mgllava.cli import friendly_errors
from mgllava.objects import detectors
from mgllava.objects.command import add_detect_command
from mgllava.objects.detector import Detections

APP = typer.Typer()
add_detect_command(APP, friendly_errors)


class OneOfEach:
    """Finds every tag once, everywhere."""

    name = "owlv2"
    needs_tags = True

    def __call__(self, pictures, tags=None):
        return [
            Detections(((0.0, 0.0, 1.0, 1.0),) * len(names), tuple(names), (0.5,) * len(names))
            for names in tags
        ]


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """What `load_detector` was asked for; `detr` is `Numbers`, `owlv2` is `OneOfEach`."""
    calls = []

    def load(name, **options):
        calls.append((name, options))
        return OneOfEach() if name == "owlv2" else Numbers(tmp_path / "log")

    monkeypatch.setattr(detectors, "load_detector", load)
    return calls


def _run(*arguments):
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def test_it_annotates_a_folder_and_says_what_it_did(tmp_path, loaded):
    write_pictures(tmp_path / "pictures", 12)
    (tmp_path / "pictures" / "bad.jpg").write_text("this is a text")
    command = (
        tmp_path / "pictures",
        "--detector",
        "detr",
        "--output",
        tmp_path / "boxes.json",
        "--device",
        "cpu",
    )
    code, output = _run(*command, "--threshold", 0.3, "--checkpoint", "folder", "--batch-size", 5)
    assert code == 0, output
    entries = json.loads((tmp_path / "boxes.json").read_text())
    assert len(entries) == 12
    assert f"wrote {tmp_path / 'boxes.json'}: 12 boxes of 12 pictures".replace(" ", "") in output.replace(
        " ", ""
    )
    assert "pictures that could not be used: 1; " in output
    ((name, options),) = loaded
    assert name == "detr"
    assert options["checkpoint"] == "folder"
    assert options["threshold"] == 0.3
    assert str(options["device"]) == "cpu"

    code, output = _run(*command, "--checkpoint", "folder")
    assert code == 1
    assert "was begun with threshold = 0.3, now it is 0.5" in output
    assert _run(*command, "--checkpoint", "folder", "--threshold", 0.3)[0] == 0


def test_a_threshold_that_is_the_detectors_own_changes_nothing(tmp_path, loaded):
    picture = write_picture(tmp_path / "a.png", 0)
    command = (picture, "--detector", "detr", "--output", tmp_path / "boxes.json")
    assert _run(*command)[0] == 0
    assert _run(*command, "--threshold", 0.5)[0] == 0


def test_it_goes_on(tmp_path, loaded):
    write_pictures(tmp_path / "pictures", 4)
    command = (tmp_path / "pictures", "--detector", "detr", "--output", tmp_path / "boxes.json")
    assert _run(*command)[0] == 0
    for number in (4, 5):
        write_picture(tmp_path / "pictures" / f"{number:04}.png", number, (8 + number % 5, 8 + number % 3))
    code, output = _run(*command)
    assert code == 0
    assert "4 of 6 pictures were done before" in output
    assert_complete(tmp_path, 6)
    assert sorted(looked_at(tmp_path)) == list(range(6))


def test_tags_are_looked_for(tmp_path, loaded):
    picture = write_picture(tmp_path / "a.png", 0)
    command = (picture, "--detector", "owlv2", "--output", tmp_path / "boxes.json")
    code, output = _run(*command, "--tags", "cat, traffic light")
    assert code == 0
    assert "looking for 2 names: cat, traffic light" in output
    (entry,) = json.loads((tmp_path / "boxes.json").read_text())
    assert entry["labels"] == ["cat", "traffic light"]
    code, output = _run(*command, "--tags", "cat")
    assert code == 1
    assert "was begun with tags = ['cat', 'traffic light'], now it is ['cat']" in output


def test_the_names_of_a_file_count_not_its_path(tmp_path, loaded):
    picture = write_picture(tmp_path / "a.png", 0)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    command = (picture, "--detector", "owlv2", "--output", tmp_path / "boxes.json", "--tags")
    assert _run(*command, tmp_path / "names.txt")[0] == 0
    assert _run(*command, "cat, dog")[0] == 0
    (tmp_path / "names.txt").write_text("cat\n")
    assert _run(*command, tmp_path / "names.txt")[0] == 1


def test_a_vocabulary_is_known_in_any_case(tmp_path, loaded):
    picture = write_picture(tmp_path / "a.png", 0)
    command = (picture, "--detector", "owlv2", "--output", tmp_path / "boxes.json", "--tags")
    code, output = _run(*command, "COCO")
    assert code == 0
    assert "looking for 80 names: person, bicycle, car, motorcycle, airplane, ..." in output
    assert _run(*command, "coco")[0] == 0


def test_records_are_searched_for_what_they_ask_about(tmp_path, loaded):
    write_pictures(tmp_path / "pictures", 2)
    talk = [{"from": "human", "value": "<image>\nIs the dog on the sofa?"}]
    records = [{"id": 5, "image": "0001.png", "conversations": talk}]
    (tmp_path / "records.json").write_text(json.dumps(records))
    command = ("--detector", "owlv2", "--tags", "question", "--output", tmp_path / "boxes.json")
    command = (tmp_path / "records.json", "--pictures", tmp_path / "pictures", *command)
    assert _run(*command)[0] == 0
    (entry,) = json.loads((tmp_path / "boxes.json").read_text())
    assert entry["labels"] == ["dog", "sofa"]
    talk[0]["value"] = "Is there a unicorn?"
    (tmp_path / "records.json").write_text(json.dumps(records))
    code, output = _run(*command)
    assert code == 0
    assert "no objects were found; other tags or a lower --threshold" in output
    talk.clear()
    (tmp_path / "records.json").write_text(json.dumps(records))
    code, output = _run(*command)
    assert code == 1
    assert "comes without one; expected records" in output


def test_records_give_their_ids(tmp_path, loaded):
    write_pictures(tmp_path / "pictures", 3)
    (tmp_path / "records.json").write_text(json.dumps([{"id": 5, "image": "0001.png"}]))
    command = (tmp_path / "records.json", "--detector", "detr", "--output", tmp_path / "boxes.json")
    assert _run(*command, "--pictures", tmp_path / "pictures")[0] == 0
    (entry,) = json.loads((tmp_path / "boxes.json").read_text())
    assert (entry["id"], entry["labels"]) == (5, ["number 1"])


def test_drawings(tmp_path, loaded):
    write_picture(tmp_path / "a.png", 2, (60, 40))
    command = (tmp_path / "a.png", "--detector", "detr", "--output", tmp_path / "boxes.json")
    assert _run(*command, "--draw", tmp_path / "drawn")[0] == 0
    with Image.open(tmp_path / "drawn" / "a.jpg") as drawing:
        assert drawing.size == (60, 40)


def test_drawings_below_the_pictures_are_refused(tmp_path, loaded):
    write_pictures(tmp_path / "pictures", 2)
    command = (tmp_path / "pictures", "--detector", "detr", "--output", tmp_path / "boxes.json")
    code, output = _run(*command, "--draw", tmp_path / "pictures" / "drawn")
    assert code == 1
    assert "would be taken for pictures" in output
    assert not loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--detector", "owl"), "detector is 'owl'; expected one of owlv2, grounding-dino"),
        (("--detector", "owlv2"), "owlv2 looks for the names it is given; add --tags"),
        (("--detector", "detr", "--tags", "cat"), "detr has names of its own; leave --tags out"),
        (("--detector", "owlv2", "--tags", "question"), "comes without one; expected records"),
        (("--detector", "owlv2", "--tags", "openimages"), "did you mean 'open-images'?"),
        (("--detector", "owlv2", "--tags", " , "), "tags are ' , '; expected names"),
        (("--detector", "detr", "--device", "nowhere"), "device 'nowhere' cannot be used"),
    ],
)
def test_wrong_arguments_end_with_one_line_before_any_weights_load(tmp_path, loaded, arguments, message):
    write_pictures(tmp_path / "pictures", 1)
    code, output = _run(tmp_path / "pictures", "--output", tmp_path / "boxes.json", *arguments)
    assert code == 1
    assert message in output
    assert output.startswith("error: ")
    assert not loaded
    assert not (tmp_path / "boxes.json").exists()


def test_an_empty_folder(tmp_path, loaded):
    (tmp_path / "pictures").mkdir()
    code, output = _run(tmp_path / "pictures", "--detector", "detr", "--output", tmp_path / "boxes.json")
    assert code == 1
    assert "there is no picture in" in output


def test_weights_that_are_absent(tmp_path):
    """The real detector, offline."""
    picture = write_picture(tmp_path / "a.png", 0)
    options = (
        "--detector",
        "detr",
        "--checkpoint",
        tmp_path / "nowhere",
        "--output",
        tmp_path / "boxes.json",
    )
    code, output = _run(picture, *options)
    assert code == 1
    assert "'detr' cannot load its weights from" in output
    assert "Give a folder or a hub id that holds them as checkpoint" in output


def test_a_picture_of_one_pixel_with_the_detector_that_needs_no_weights(tmp_path):
    pytest.importorskip("cv2")
    picture = write_picture(tmp_path / "dot.png", 0, (1, 1))
    code, output = _run(picture, "--detector", "proposals", "--output", tmp_path / "boxes.json")
    assert code == 0, output
    (entry,) = json.loads((tmp_path / "boxes.json").read_text())
    assert entry["id"] == "dot"
