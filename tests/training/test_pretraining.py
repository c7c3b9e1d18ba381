"""Stage 0: parts from nothing, in the form of published ones."""

import json
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from full_disk import fill_disk
from miniature import losses_of
from safetensors.torch import load_file

from mgllava.chat import load_model
from mgllava.modeling_mgllava import IGNORE_INDEX
from mgllava.pretraining import pretrain
from mgllava.pretraining.attributes import (
    CELL_SIZE,
    CLASSES,
    NONE,
    POSITION_BINS,
    cell_labels,
    classes_of,
    one_hot_places,
    position_of,
)
from mgllava.pretraining.language import VIEWS, SymbolicScenes
from mgllava.pretraining.run import _processor
from mgllava.pretraining.tokenizer import build_tokenizer
from mgllava.scenes import CAPTION_FAMILIES, WORDS, ask, caption, detect, sample_scene, things_of_boxes
from mgllava.scenes.evaluate import SHOWN, evaluate_answers
from mgllava.training.assemble import assemble_model
from mgllava.training.encode import Encoder
from mgllava.training.errors import CheckpointError, RecipeError
from mgllava.training.recipe import Parts, load_recipe, recipe_from_dict
from mgllava.training.records import Record
from mgllava.training.run import train
from mgllava.training.trainer import MGLlavaTrainer

VISION = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def tiny(part, output, **changes):
    values = {
        "stage": 0,
        "part": part,
        "vision": VISION,
        "architecture": "test_convnext",
        "max_steps": 4,
        "global_batch": 4,
        "per_device_batch": 2,
        "learning_rate": 1e-3,
        "muon_learning_rate": 2e-3,
        "precision": "float32",
        "workers": 0,
        "save_every": 2,
        "log_every": 1,
        "output": str(output),
    }
    if part == "language_model":
        values |= {"text": TEXT, "turns": 3, "lists": 2, "caption_share": 0.3}
    return recipe_from_dict(values | changes)


@pytest.fixture(autouse=True)
def _few_validation_scenes(monkeypatch):
    monkeypatch.setattr("mgllava.pretraining.run.VALIDATION_SCENES", 6)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage-0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mgllava.pretraining.run.VALIDATION_SCENES", 6)
        return {part: pretrain(tiny(part, folder / part)) for part in ("towers", "language_model")}


def test_the_tokenizer_gives_back_all_that_scenes_say():
    tokenizer = build_tokenizer(WORDS)
    for index in range(40):
        scene = sample_scene("train", index)
        things = things_of_boxes(scene, detect(scene))
        turns = ask(scene, 10) + [caption(scene, things, family) for family in CAPTION_FAMILIES]
        for turn in turns:
            for text in (turn.question, turn.answer):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer("How MANY elephants?")["input_ids"]) == "how many <unk>?"
    assert tokenizer("USER: a\n")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("\n")


def test_attributes_say_what_a_thing_is():
    scene = sample_scene("train", 3)
    for thing in scene.things:
        classes = dict(zip(CLASSES, classes_of(thing), strict=True))
        assert CLASSES["kind"][classes["kind"]] == thing.kind
        assert CLASSES["colour"][classes["colour"]] == thing.colour
        assert classes["digit"] == (NONE if thing.digit is None else thing.digit)
        if thing.digit is None:
            assert classes["frame"] == NONE
        else:
            assert CLASSES["frame"][classes["frame"]] == (thing.frame or "none")
    assert classes_of(None) == [CLASSES["kind"].index("nothing"), NONE, NONE, NONE]


@pytest.mark.parametrize("centre", [0.0, 3.0, 8.0, 100.0, 255.9])
def test_positions_are_shared_between_two_bins(centre):
    shares = position_of(centre, 256)
    assert shares.sum() == pytest.approx(1)
    assert (shares > 0).sum() <= 2
    width = 256 / POSITION_BINS
    expected = min(max(centre, width / 2), 256 - width / 2)
    assert (shares * (np.arange(POSITION_BINS) + 0.5) * width).sum() == pytest.approx(expected, abs=1e-3)


def test_cells_hold_the_words_of_what_is_centred_there():
    scene = sample_scene("train", 5)
    labels = cell_labels(scene, 8)
    assert labels.shape == (64, CELL_SIZE)
    nothing = CLASSES["kind"].index("nothing")
    occupied = {int(y / 32) * 8 + int(x / 32) for x, y in (thing.centre for thing in scene.things)}
    assert set(np.flatnonzero(labels[:, nothing] == 0)) == occupied
    for thing in scene.things:
        x, y = thing.centre
        assert labels[int(y / 32) * 8 + int(x / 32), one_hot_places(classes_of(thing))].all()


def _symbolic(**options):
    processor = _processor(build_tokenizer(WORDS), 16)
    return SymbolicScenes("train", 40, Encoder(processor, 1024), turns=4, **options)


@pytest.mark.parametrize("view", VIEWS)
def test_turns_encoded_one_by_one_are_the_conversation(view):
    scenes = _symbolic(views=[view], lists=3)
    encoder = scenes.encoder
    for index in range(5):
        sample = scenes[index]
        scene = sample_scene("train", index)
        things = things_of_boxes(scene, detect(scene))
        rng = Random(f"symbols {scene.id}")
        rng.choice(scenes.views)
        pairs = [(turn.question, turn.answer) for turn in scenes._turns(scene, things, view, rng)]
        assert len(pairs) == 7
        pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
        text = encoder.encode_text(Record(scene.id, tuple(pairs), Path(scene.id)))
        is_picture = np.isin(
            sample["input_ids"], (encoder.processor.image_token_id, encoder.processor.object_token_id)
        )
        assert np.array(sample["input_ids"])[~is_picture].tolist() == [
            token for token in text.input_ids if token != encoder.processor.image_token_id
        ]
        assert [label for label in sample["labels"] if label != IGNORE_INDEX] == [
            label for label in text.labels if label != IGNORE_INDEX
        ]
        assert is_picture.sum() == len(sample["cells"]) + len(sample["regions"])
        assert (len(sample["cells"]), len(sample["regions"])) == (
            16 if view != "boxes" else 0,
            len(things) if view != "cells" else 0,
        )


def test_parts_make_a_model_that_stage_1_and_2_train(parts, tmp_path):
    report = json.loads((parts["towers"] / "report.json").read_text())
    assert set(report["regions"]) == set(CLASSES)
    assert 0 <= json.loads((parts["language_model"] / "report.json").read_text())["answers"] <= 1
    recipe = load_recipe("embedded-stage-1").to_dict() | {
        "model": str(tmp_path / "base"),
        "parts": {
            "language_model": str(parts["language_model"] / "language_model"),
            "vision_tower": str(parts["towers"] / "vision_tower"),
            "high_res_tower": str(parts["towers"] / "high_res_tower"),
            "template": "vicuna",
        },
        "features": str(tmp_path / "features"),
        "precision": "float32",
        "max_steps": 2,
        "global_batch": 2,
        "per_device_batch": 2,
        "workers": 0,
        "text_limit": 450,
        "output": str(tmp_path / "stage-1"),
    }
    recipe["data"][0]["arguments"]["num_scenes"] = 4
    neck = train(recipe_from_dict(recipe))
    second = load_recipe("embedded-stage-2").to_dict() | {
        key: recipe[key]
        for key in (
            "model",
            "features",
            "precision",
            "max_steps",
            "global_batch",
            "per_device_batch",
            "workers",
        )
    }
    second |= {"neck": str(neck), "text_limit": 450, "output": str(tmp_path / "stage-2")}
    for source in second["data"]:
        source["arguments"]["num_scenes"] = 4
    model = train(recipe_from_dict(second))
    tensors = load_file(model / "model.safetensors")
    trained = load_file(parts["towers"] / "high_res_tower" / "open_clip_model.safetensors")
    for name, value in trained.items():
        assert torch.equal(tensors[name.replace("visual.trunk.", "model.high_res_tower.")], value)

    loaded, processor = load_model(str(model), "float32")
    for show in SHOWN:
        if show == "proposals" and find_spec("cv2") is None:
            continue  # the detector without weights is OpenCV's
        everything, *groups = evaluate_answers(loaded, processor, num_scenes=5, batch_size=2, show=show)
        assert everything.questions == 5
        assert 0 <= everything.right <= 5
        assert len(groups) > 1


@pytest.mark.parametrize("part", ["towers", "language_model"])
def test_an_interrupted_run_goes_on_exactly(parts, part, tmp_path, monkeypatch):
    step = MGLlavaTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MGLlavaTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(part, tmp_path / "run"))
    result = pretrain(tiny(part, tmp_path / "run"))
    for path in sorted(parts[part].glob("*/*.safetensors")):
        if "checkpoint" in str(path):
            continue
        again = load_file(result / path.parent.name / path.name)
        for name, value in load_file(path).items():
            torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["towers", "language_model"])
def test_a_full_disk_loses_nothing(parts, part, tmp_path, monkeypatch):
    recipe = tiny(part, tmp_path / "run")
    with monkeypatch.context() as patch:
        fill_disk(patch, step=4, room=20_000)
        with pytest.raises(CheckpointError, match=r"of step 4 cannot be written: .*checkpoint-2 is intact"):
            pretrain(recipe)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert losses_of(pretrain(recipe)) == pytest.approx(losses_of(parts[part]), abs=1e-6)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("towers", {"architecture": "resnet_of_dreams"}, "timm knows no such model"),
        ("towers", {"text": TEXT}, "nothing for towers"),
        ("towers", {"vision": {"image_size": 28}}, r"vision\.patch_size is None"),
        ("towers", {"vision": VISION | {"hidden_size": 15}}, "vision is"),
        ("towers", {"max_steps": None}, "max_steps is None"),
        ("language_model", {"text": {}}, "arguments of LlamaConfig"),
        ("language_model", {"turns": 0}, "turns is 0"),
        ("language_model", {"lists": 25}, "lists is 25"),
        (
            "language_model",
            {"views": ["boxes", "sounds"]},
            "views is .*sounds.*expected some of cells, boxes, both",
        ),
        ("towers", {"muon_learning_rate": 0.0}, "muon_learning_rate is 0.0"),
        ("towers", {"first": -1}, "first is -1"),
    ],
)
def test_bad_recipes(part, changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        pretrain(tiny(part, tmp_path / "run", **changes))


def test_ablations_make_other_models(parts, tmp_path):
    for variant in ("gate_concat", "concat_projected", "concat_raw"):
        made = Parts(
            language_model=str(parts["language_model"] / "language_model"),
            vision_tower=str(parts["towers"] / "vision_tower"),
            high_res_tower=str(parts["towers"] / "high_res_tower"),
            template="vicuna",
            fusion_variant=variant,
        )
        assemble_model(made, tmp_path / variant, seed=1, progress=False)
        assert json.loads((tmp_path / variant / "config.json").read_text())["fusion_variant"] == variant
