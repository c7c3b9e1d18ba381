"""The command line as a newcomer meets it: answers on standard output, one clear line for bad input."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

QUESTION = "what is in the image ?"


@pytest.fixture
def picture(golden_dir):
    return golden_dir / "end_to_end" / "image.png"


@pytest.fixture
def boxes(golden_dir):
    return golden_dir / "end_to_end" / "detections.json"


def test_chat_answers_a_prompt(run, converted_golden, picture, boxes):
    arguments = ["chat", "--model", converted_golden, "--image", picture, "--prompt", QUESTION]
    arguments += ["--max-new-tokens", 6, "--device", "cpu"]
    with_boxes = run(*arguments, "--boxes", boxes)
    assert with_boxes.exit_code == 0, with_boxes.output
    assert with_boxes.stdout.strip()
    assert "without objects" not in with_boxes.stderr
    without = run(*arguments)
    assert without.exit_code == 0
    assert "without objects" in without.stderr


def test_chat_finds_objects_and_draws_what_the_model_gets(run, converted_golden, picture, tmp_path):
    arguments = ["chat", "--model", converted_golden, "--image", picture, "--image", picture]
    arguments += ["--prompt", QUESTION, "--max-new-tokens", 4, "--device", "cpu"]
    result = run(*arguments, "--detector", "proposals", "--draw", tmp_path / "drawn")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "without objects" not in result.stderr
    drawings = [tmp_path / "drawn" / name for name in ("image.png", "image-2.png")]
    assert sorted((tmp_path / "drawn").iterdir()) == sorted(drawings)
    with Image.open(drawings[0]) as drawn, Image.open(picture) as original:
        assert drawn.size == original.size
        assert drawn.convert("RGB").tobytes() != original.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detector", "owl"], "detector is 'owl'; expected one of owlv2"),
        (["--detector", "proposals", "--boxes", "x.json"], "two sources of boxes"),
        (["--tags", "cat"], "add --detector NAME"),
        (["--detector", "owlv2"], "looks for the names it is given; add --tags"),
        (["--detector", "proposals", "--tags", "cat"], "proposals has names of its own"),
        (["--detector", "owlv2", "--tags", "question"], "ask it with --prompt"),
        (["--detector", "owlv2", "--tags", "cat", "--device", "nowhere"], "device 'nowhere' cannot be used"),
    ],
)
def test_detectors_of_a_conversation(run, converted_golden, picture, options, message):
    result = run("chat", "--model", converted_golden, "--image", picture, *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_detector_needs_a_picture(run, converted_golden):
    result = run("chat", "--model", converted_golden, "--detector", "proposals", "--prompt", QUESTION)
    assert result.exit_code == 1
    assert "add --image FILE" in result.stderr


def test_a_wrong_model_shows_before_the_detector_loads(run, picture, tmp_path):
    result = run("chat", "--model", tmp_path, "--image", picture, "--detector", "owlv2", "--tags", "cat")
    assert result.exit_code == 1
    assert "no config.json" in result.stderr


def test_chat_answers_without_a_picture(run, converted_golden):
    result = run("chat", "--model", converted_golden, "--prompt", "what is red ?", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_a_conversation_streams_resets_and_ends(run, converted_golden, picture):
    turns = [QUESTION, "how many are there ?", "RESET", QUESTION, "EXIT", "never read"]
    result = run(
        "chat", "--model", converted_golden, "--image", picture, "--max-new-tokens", 5, input="\n".join(turns)
    )
    assert result.exit_code == 0, result.output
    answers = [part.strip() for part in result.stdout.split(">")[1:]]
    assert len(answers) == 5  # three answers, and the prompts that RESET and EXIT answered
    assert answers[0] == answers[3] != ""
    assert answers[2] == answers[4] == ""


def test_a_turn_that_cannot_be_asked_does_not_end_the_conversation(run, converted_golden, picture):
    turns = [QUESTION, "what is <object> ?", QUESTION, "EXIT"]
    arguments = ["chat", "--model", converted_golden, "--image", picture, "--max-new-tokens", 5]
    result = run(*arguments, input="\n".join(turns))
    assert result.exit_code == 0, result.output
    assert "<object>" in result.stderr
    answers = [part.strip() for part in result.stdout.split(">")[1:]]
    assert [bool(answer) for answer in answers] == [True, False, True, False]


def test_sampling(run, converted_golden):
    result = run(
        "chat",
        "--model",
        converted_golden,
        "--prompt",
        "what is red ?",
        "--temperature",
        3,
        "--max-new-tokens",
        4,
    )
    assert result.exit_code == 0, result.output


def test_python_dash_m_is_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "mgllava", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert all(command in result.stdout for command in ("demo", "chat", "detect", "convert", "doctor"))


def test_doctor_reports_versions_and_the_path_of_every_op(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "transformers", "pooled_roi_align", "conv_gate_fusion", "MGLLAVA_KERNELS"):
        assert word in result.stdout


@pytest.fixture
def broken_torchvision(tmp_path):
    """An environment whose torchvision was built for another torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def test_doctor_explains_a_torchvision_that_does_not_fit(broken_torchvision):
    result = subprocess.run(
        [sys.executable, "-m", "mgllava", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        env=broken_torchvision | {"COLUMNS": "500"},
    )
    assert result.returncode == 0, result.stderr
    assert "nms does not exist" in result.stdout
    assert "same index" in result.stdout


def test_classes_that_cannot_be_imported_say_why(broken_torchvision):
    result = subprocess.run(
        [sys.executable, "-c", "from mgllava import MGLlavaConfig"],
        capture_output=True,
        text=True,
        timeout=120,
        env=broken_torchvision,
    )
    assert result.returncode == 1
    assert "mgllava doctor" in result.stderr.splitlines()[-1]


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m mgllava doctor | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "error:" not in result.stderr
    assert "Broken pipe" not in result.stderr


def test_doctor_names_an_unknown_backend(run, monkeypatch):
    monkeypatch.setenv("MGLLAVA_KERNELS", "cudnn")
    result = run("doctor")
    assert "cudnn" in result.stdout
    assert "reference" in result.stdout


@pytest.fixture
def damage(tmp_path, picture):
    """Files that are not what they should be, by name."""

    def make(kind):
        path = tmp_path / f"{kind}.png"
        if kind == "text":
            path.write_text("not a picture")
        elif kind == "truncated":
            path.write_bytes(picture.read_bytes()[:2000])
        elif kind == "bomb":
            Image.new("1", (20000, 20000)).save(path)
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "missing.png"),
        ("text", "text.png"),
        ("truncated", "truncated"),
        ("bomb", "400000000 pixels"),
    ],
)
def test_bad_pictures_end_chat_before_the_model_loads(
    run, converted_golden, damage, kind, message, monkeypatch
):
    monkeypatch.setattr("mgllava.chat.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    result = run("chat", "--model", converted_golden, "--image", damage(kind), "--prompt", "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("error:")
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ('{"scores": []}', "boxes"),
        ('{"boxes": [[1, 2, 3]], "labels": ["a"], "scores": [0.5]}', "boxes"),
        ('{"boxes": [[50, 2, 10, 30]], "labels": ["a"], "scores": [0.5]}', "50"),
        ('{"boxes": [[1, 2, 30, 40]], "labels": [], "scores": [0.5]}', "labels"),
        ('{"boxes": [[1, 2, 30, 40]], "labels": [["a"]], "scores": [0.5]}', "labels"),
        ("[" * 100000, "JSON"),
    ],
)
def test_bad_boxes_end_chat_before_the_model_loads(
    run, converted_golden, picture, tmp_path, content, message, monkeypatch
):
    monkeypatch.setattr("mgllava.chat.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    path = tmp_path / "boxes.json"
    path.write_text(content)
    result = run("chat", "--model", converted_golden, "--image", picture, "--boxes", path, "--prompt", "hi")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_boxes_without_a_picture_are_refused(run, converted_golden, boxes):
    result = run("chat", "--model", converted_golden, "--boxes", boxes, "--prompt", "hi")
    assert result.exit_code == 1
    assert "0 pictures came with 1 boxes files" in result.stderr


@pytest.mark.parametrize(
    "option", [("--dtype", "float8"), ("--device", "cuda:99"), ("--device", "abacus"), ("--device", "meta")]
)
def test_unknown_dtypes_and_devices_are_named(run, converted_golden, option):
    result = run("chat", "--model", converted_golden, "--prompt", "hi", *option)
    assert result.exit_code == 1
    assert option[1] in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("value", "message"), [("cudnn", "reference"), ("triton", "triton")])
def test_a_backend_that_cannot_be_is_refused_before_the_model_loads(
    run, converted_golden, monkeypatch, value, message
):
    monkeypatch.setenv("MGLLAVA_KERNELS", value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        "mgllava.chat.AutoModelForImageTextToText.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    result = run("chat", "--model", converted_golden, "--prompt", "hi", "--device", "cpu")
    assert result.exit_code == 1
    assert message in result.stderr
    assert value in result.stderr


def test_folders_that_hold_no_model_are_refused(run, tmp_path, converted_golden):
    cases = {
        "absent": "no model folder",
        "empty": "config.json",
        "other": "'bert'",
        "half": "incomplete; missing model.safetensors",
        "cut": "damaged or cut short",
        "untold": "incomplete; missing chat_template.jinja",
    }
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    for name in ("half", "cut", "untold"):
        shutil.copytree(converted_golden, tmp_path / name)
    (tmp_path / "half" / "model.safetensors").unlink()
    (tmp_path / "untold" / "chat_template.jinja").unlink()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    weights = (converted_golden / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for name, message in cases.items():
        result = run("chat", "--model", tmp_path / name, "--prompt", "hi")
        assert result.exit_code == 1, name
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_an_answer_longer_than_the_context_is_refused(run, converted_golden):
    result = run("chat", "--model", converted_golden, "--prompt", "hi", "--max-new-tokens", 5000)
    assert result.exit_code == 1
    assert "context holds 2048" in result.stderr


def test_a_drawing_does_not_take_the_place_of_the_picture(run, converted_golden, picture, tmp_path):
    copy = tmp_path / "image.png"
    shutil.copy(picture, copy)
    arguments = [
        "chat",
        "--model",
        converted_golden,
        "--image",
        copy,
        "--prompt",
        QUESTION,
        "--device",
        "cpu",
    ]
    result = run(*arguments, "--detector", "proposals", "--draw", tmp_path)
    assert result.exit_code == 1
    assert "of which a drawing could take the place" in result.stderr
    assert copy.read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--draw", __file__], "drawings go to a folder"), (["--dtype", "int8"], "dtype is 'int8'")],
)
def test_wrong_options_show_before_a_detector_loads(run, converted_golden, picture, options, message):
    arguments = ["chat", "--model", converted_golden, "--image", picture, "--prompt", QUESTION]
    result = run(*arguments, "--detector", "owlv2", "--tags", "cat", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_doctor_knows_opencv(run):
    cv2 = pytest.importorskip("cv2")
    result = run("doctor")
    (line,) = [line for line in result.stdout.splitlines() if "opencv" in line]
    assert "proposals" in line
    assert cv2.__version__ in line
    assert "OpenCV" not in result.stdout


def test_doctor_says_what_to_install_for_proposals(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "`proposals` cannot run: OpenCV does not import" in result.stdout
    assert "pip install opencv-python-headless" in result.stdout
