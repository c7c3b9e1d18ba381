"""Towers' features in files: the same training, with towers that run once."""

from pathlib import Path

import pytest
import torch
from miniature import losses_of, tiny_processor, tiny_recipe, write_data, write_tiny_model
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tiny import one_row, tiny_inputs, tiny_model

from mgllava.modeling_mgllava import MGLlavaModel
from mgllava.scenes import dataset as dataset_module
from mgllava.training import samples as samples_module
from mgllava.training.encode import Encoder
from mgllava.training.errors import CheckpointError, DataError
from mgllava.training.features import FeatureStore
from mgllava.training.records import Record
from mgllava.training.run import build_trainer, train


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_both_halves_are_the_whole():
    model, inputs = tiny_model(), tiny_inputs([[2], [], [1, 3]])
    pictures = {
        name: inputs.pop(name) for name in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")
    }
    with torch.no_grad():
        expected = model(**inputs, **pictures).logits
        towers = model.model.encode_towers(**pictures)
        assert towers.objects.shape[:2] == (3, 3)
        torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"towers": towers}).logits, expected)
        without = {**pictures, "boxes": None, "num_boxes": None}
        features = model.get_image_features(**without)
        halves = model.model.project_towers(model.model.encode_towers(**without))
        torch.testing.assert_close(halves.pooler_output, features.pooler_output)


def test_beams_read_features_too():
    model = tiny_model()
    inputs = one_row(tiny_inputs([[2]]), 0, slice(0, 1))
    settings = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    pictures = {
        name: inputs.pop(name) for name in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")
    }
    towers = model.model.encode_towers(**pictures)
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"towers": towers}, **settings), expected)


@pytest.mark.parametrize(("stage", "show"), [(1, "all"), (2, "all"), (1, "no_objects"), (1, "low_res")])
def test_features_train_as_pictures_do(model_folder, data, tmp_path, stage, show):
    settings = {"stage": stage, "show": show}
    plain = train(tiny_recipe(model_folder, data, tmp_path / "plain", **settings))
    stored = train(
        tiny_recipe(model_folder, data, tmp_path / "stored", **settings, features=str(tmp_path / "features"))
    )
    expected, losses = losses_of(tmp_path / "plain"), losses_of(tmp_path / "stored")
    assert losses == pytest.approx(expected, rel=1e-5)
    if stage == 1:
        weights = load_file(stored)
        for name, value in load_file(plain).items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_towers_run_once_for_every_picture(model_folder, data, tmp_path, monkeypatch):
    encoded = []
    run = MGLlavaModel.encode_towers
    monkeypatch.setattr(
        MGLlavaModel,
        "encode_towers",
        lambda self, low, *rest: encoded.append(len(low)) or run(self, low, *rest),
    )
    features = str(tmp_path / "features")
    for number in (1, 2):
        train(tiny_recipe(model_folder, data, tmp_path / f"run-{number}", features=features))
        assert sum(encoded) == 12
    for show, more in (("no_objects", 0), ("low_res", 1), ("low_res", 0)):
        encoded.clear()
        build_trainer(tiny_recipe(model_folder, data, tmp_path / show, features=features, show=show))
        assert sum(encoded) == more, show


def test_what_code_makes_is_not_gone_through_again(model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "features"
    asked = []
    ask = samples_module._Pictures.__getitem__
    monkeypatch.setattr(
        samples_module._Pictures,
        "__getitem__",
        lambda self, index: asked.append(index) or ask(self, index),
    )

    def start(name):
        asked.clear()
        scenes = {
            "dataset": "mgllava.scenes:SceneDataset",
            "arguments": {"split": "train", "num_scenes": 20, "turns": 1},
        }
        return build_trainer(tiny_recipe(model_folder, scenes, tmp_path / name, features=str(folder)))

    start("first")
    assert len(asked) == 20
    start("second")
    assert len(asked) == 8
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    assert "objects" in start("third").train_dataset[0]
    assert len(asked) == 20
    render = dataset_module.render
    monkeypatch.setattr(dataset_module, "render", lambda scene: ImageOps.mirror(render(scene)))
    start("changed code")
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_pictures_that_changed_are_encoded_anew(model_folder, tmp_path):
    data = write_data(tmp_path / "data")

    def features_of(name):
        recipe = tiny_recipe(model_folder, data, tmp_path / name, features=str(tmp_path / "features"))
        return build_trainer(recipe).train_dataset[3]["low_res"]

    before = features_of("before")
    path = tmp_path / "data" / "pictures" / "3.png"
    ImageOps.mirror(Image.open(path)).save(path)
    assert not torch.equal(features_of("after"), before)


def test_pictures_in_memory_are_told_apart_whatever_their_ids(tmp_path):
    encoder = Encoder(tiny_processor(), 400)
    white, black = (Record("0", (), Image.new("RGB", (8, 8), colour)) for colour in ("white", "black"))
    assert encoder.picture_key(white) != encoder.picture_key(black)


def test_a_picture_that_cannot_be_read_is_replaced_and_tried_again(model_folder, tmp_path):
    data = write_data(tmp_path / "data")
    path = tmp_path / "data" / "pictures" / "3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])

    def samples_of(name):
        settings = {"features": str(tmp_path / "features"), "max_bad_share": 0.1}
        return build_trainer(tiny_recipe(model_folder, data, tmp_path / name, **settings)).train_dataset

    samples = samples_of("damaged")
    assert samples[3]["input_ids"] == samples[4]["input_ids"]
    assert samples.replaced.sum() == 1
    path.write_bytes(whole)
    samples = samples_of("mended")
    assert samples[3]["input_ids"] != samples[4]["input_ids"]
    assert samples.replaced.sum() == 0


def test_what_a_full_disk_interrupts_goes_on(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("mgllava.training.features.PICTURES_PER_FILE", 4)
    monkeypatch.setattr("mgllava.training.features.PICTURES_AT_ONCE", 2)
    recipe = tiny_recipe(model_folder, data, tmp_path / "run", features=str(tmp_path / "features"))
    with monkeypatch.context() as full:
        from mgllava.training import features

        written = []

        def save(*args, **kwargs):
            if written:
                raise OSError(28, "No space left on device")
            written.append(1)
            save_file(*args, **kwargs)

        save_file = features.save_file
        full.setattr(features, "save_file", save)
        with pytest.raises(CheckpointError, match=r"No space left.*intact"):
            build_trainer(recipe)
    assert len(list((tmp_path / "features").iterdir())) == 2  # what it is, and four pictures
    trainer = build_trainer(recipe)
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3
    assert trainer.train_dataset[0].keys() >= {"input_ids", "labels"}


def test_features_of_other_towers_are_refused(tmp_path):
    FeatureStore(tmp_path / "features", "a")
    FeatureStore(tmp_path / "features", "a")
    with pytest.raises(DataError, match="other towers"):
        FeatureStore(tmp_path / "features", "b")
    (tmp_path / "features" / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"x\.safetensors is damaged"):
        FeatureStore(tmp_path / "features", "a")


def test_text_that_nearly_fills_its_limit_cannot_use_them(data, tmp_path):
    processor = tiny_processor()
    encoder = Encoder(processor, 60, with_features=True)
    encoder.features = FeatureStore(tmp_path, "a")
    record = Record("1", (("<image>\n" + "What is in the picture? " * 3, "A cat."),), tmp_path / "1.png")
    with pytest.raises(ValueError, match="nearly fills"):
        encoder(record)


def test_what_is_shown(data):
    processor = tiny_processor()
    record = Record(
        "3",
        (("<image>\nWhat?", "A cat."),),
        Path(data["pictures"]) / "3.png",
        {"boxes": [[5, 5, 15, 20], [13, 3, 33, 25]], "labels": ["cat", "dog"], "scores": [0.9, 0.6]},
    )
    seen = {show: Encoder(processor, 400, show)(record) for show in ("all", "no_objects", "low_res")}
    assert [seen[show]["boxes"].shape[1] for show in seen] == [2, 1, 1]
    assert not seen["no_objects"]["boxes"].any()
    assert seen["no_objects"]["pixel_values_high_res"].any()
    assert not seen["low_res"]["pixel_values_high_res"].any()
    for sample in seen.values():
        assert torch.equal(sample["pixel_values"], seen["all"]["pixel_values"])
