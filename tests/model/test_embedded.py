"""The embedded model: what is shipped, what it can do, and the commands that use it."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image

from mgllava.chat import load_model
from mgllava.embedded import MODEL, PICTURE, load_conversation
from mgllava.scenes.evaluate import evaluate_answers

MAX_BYTES = 15_000_000


@pytest.fixture(scope="module")
def embedded():
    return load_model(str(MODEL), "float32", "cpu")


def test_it_is_small_and_has_every_part(embedded):
    assert sum(path.stat().st_size for path in MODEL.parent.rglob("*") if path.is_file()) < MAX_BYTES
    model, processor = embedded
    parts = (
        "vision_tower",
        "high_res_tower",
        "fusion",
        "image_projector",
        "object_projector",
        "language_model",
    )
    for name in parts:
        weights = list(getattr(model.model, name).parameters())
        assert weights
        assert all(torch.isfinite(weight).all() for weight in weights)
    assert model.config.fusion_variant == "gate_sum"
    # The gate is open: what the high-resolution tower sees gets through.
    assert model.model.fusion.high_res_proj.weight.abs().max() > 0.01
    assert len(processor.tokenizer) < 200


def test_it_answers_questions_about_scenes_it_has_never_seen(embedded):
    everything, *_ = evaluate_answers(*embedded, split="test", num_scenes=100, first=50_000)
    blind, *_ = evaluate_answers(*embedded, split="test", num_scenes=100, first=50_000, show="low_res")
    assert everything.accuracy > 0.75
    assert everything.accuracy > blind.accuracy + 0.1


def test_its_card_says_what_it_scores_and_how_it_was_made():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert float(re.search(r"answers (\d\d\.\d)% \(± \d\.\d\)", card)[1]) >= 85
    assert "low resolution alone | blind | chance |" in card
    for stage in ("towers", "language-model", "language-model-cells", "stage-1", "stage-2"):
        assert f"`mgllava train embedded-{stage}`" in card


def test_demo_asks_and_draws(run, tmp_path):
    drawing = tmp_path / "folder" / "boxes.png"
    result = run("demo", "--output", drawing)
    assert result.exit_code == 0, result.output
    turns = load_conversation()["turns"]
    for turn in turns:
        assert f"> {turn['question']}\n" in result.stdout
    right = sum(f"> {turn['question']}\n{turn['answer']}\n" in result.stdout for turn in turns)
    assert f"{right} of {len(turns)} answers are right" in result.stderr
    assert right >= len(turns) - 1
    with Image.open(drawing) as drawn, Image.open(PICTURE) as picture:
        assert drawn.size == picture.size
        assert drawn.convert("RGB").tobytes() != picture.convert("RGB").tobytes()
    assert list(drawing.parent.iterdir()) == [drawing]


@pytest.mark.slow
def test_demo_takes_seconds(tmp_path):
    """Of one core: 11 s on a busy machine. How long it waited for a core does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mgllava", "demo", "--output", str(tmp_path / "boxes.png")]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30


def test_demo_finds_boxes_itself(run, tmp_path):
    pytest.importorskip("cv2", reason="the detector without weights is OpenCV's")
    result = run("demo", "--output", tmp_path / "boxes.png", "--detector", "proposals")
    assert result.exit_code == 0, result.output
    assert "boxes found by proposals" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "boxes.jpg"], "--output is boxes.jpg; expected a file that ends in .png"),
        (["--detector", "eyes"], "detector is 'eyes'; expected one of"),
        (["--detector", "owlv2"], "owlv2 looks for the names it is given"),
    ],
)
def test_demo_refuses(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("demo", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_chat_without_a_model_says_which_one_answers(run):
    pytest.importorskip("cv2", reason="the detector without weights is OpenCV's")
    result = run("chat", "--image", PICTURE, "--prompt", "how many digits are there?")
    assert result.exit_code == 0, result.output
    assert "no --model: the embedded one answers" in result.stderr
    assert "the detector without weights finds objects" in result.stderr
    assert result.stdout.strip() in {"1", "2", "3"}


def test_the_shipped_conversation_has_boxes_and_answers():
    conversation = load_conversation()
    boxes = conversation["detections"]["boxes"]
    assert (
        len(boxes) == len(conversation["detections"]["labels"]) == len(conversation["detections"]["scores"])
    )
    assert len({turn["question"] for turn in conversation["turns"]}) == len(conversation["turns"]) >= 5
    assert json.loads((MODEL / "config.json").read_text())["model_type"] == "mgllava"
