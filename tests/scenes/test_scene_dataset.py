"""Scenes without files."""

import pytest
from torch.utils.data import DataLoader

from mgllava.scenes import (
    CAPTION_FAMILIES,
    FAMILIES,
    SceneDataset,
    ask,
    caption,
    detect,
    render,
    sample_scene,
    things_of_boxes,
)


def test_an_item_is_what_the_functions_make_of_the_scene():
    dataset = SceneDataset("train", 5, first=100)
    assert len(dataset) == 5
    for index in range(5):
        scene = sample_scene("train", 100 + index)
        item = dataset[index]
        assert set(item) == {"id", "image", "detections", "turns", "things"}
        assert item["id"] == scene.id == f"train-{100 + index:07d}"
        assert item["image"].size == (256, 256)
        assert item["image"].tobytes() == render(scene).tobytes()
        assert item["detections"] == detect(scene).as_dict()
        assert item["turns"] == ask(scene, 6)
        assert item["things"] == things_of_boxes(scene, detect(scene))


def test_captions_follow_the_canvas_of_the_model():
    dataset = SceneDataset("train", 20, turns=3, families=list(CAPTION_FAMILIES), high_res_size=768)
    for item, index in zip(dataset, range(20), strict=True):
        scene = sample_scene("train", index)
        things = things_of_boxes(scene, detect(scene), 768)
        assert item["things"] == things
        expected = [caption(scene, things, family) for family in CAPTION_FAMILIES]
        assert sorted(item["turns"], key=str) == sorted(expected, key=str)


def test_one_caption_is_drawn_at_random_and_the_seed_draws_anew():
    datasets = [
        SceneDataset("train", 40, turns=1, families=list(CAPTION_FAMILIES), seed=seed) for seed in (0, 0, 1)
    ]
    drawn = [[item["turns"][0].family for item in dataset] for dataset in datasets]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(CAPTION_FAMILIES)


def test_the_seed_asks_other_questions_about_the_same_pictures():
    one, other = SceneDataset("test", 3), SceneDataset("test", 3, seed=1)
    for index in range(3):
        assert one[index]["image"].tobytes() == other[index]["image"].tobytes()
        assert one[index]["turns"] != other[index]["turns"]


def test_workers_of_a_data_loader_give_the_same_items():
    dataset = SceneDataset("validation", 6, turns=2)
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    for item, expected in zip(loader, (dataset[index] for index in range(6)), strict=True):
        assert item["image"].tobytes() == expected["image"].tobytes()
        assert item["turns"] == expected["turns"]


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match=f"index is {index}; the dataset has 3 scenes"):
        SceneDataset("train", 3)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "holdout"}, "split is 'holdout'; expected one of train, validation, test"),
        ({"num_scenes": 0}, "num_scenes is 0"),
        ({"first": -1}, "first is -1"),
        ({"high_res_size": 0}, "high_res_size is 0"),
        ({"turns": 0}, "turns is 0; expected at least 1"),
        (
            {"families": ["objects"]},
            "turns is 6; expected at least 1, of captions at most one of each family",
        ),
        ({"families": [], "turns": 1}, r"families are \[\]; expected a list"),
        ({"families": ["objects", "count_kind"]}, r"families are \['objects', 'count_kind'\]"),
        ({"families": "count_kind"}, "families are 'count_kind'; expected a list"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset(**{"split": "train", "num_scenes": 4, **arguments})


def test_all_families_are_the_default():
    assert SceneDataset("train", 1).families == tuple(FAMILIES)
