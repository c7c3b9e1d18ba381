"""Recipes: what they hold, and what is said of wrong ones."""

import pytest
import yaml
from miniature import tiny_recipe

from mgllava.training.arguments import training_arguments
from mgllava.training.errors import RecipeError
from mgllava.training.recipe import check_same_run, load_recipe, recipe_from_dict, shipped_recipes

GOOD = {
    "model": "models/base",
    "data": [{"records": "a.json", "pictures": "pictures", "boxes": "b.json"}],
    "output": "runs/a",
    "stage": 2,
    "global_batch": 128,
    "per_device_batch": 16,
    "learning_rate": 2e-5,
}
# Global batch and learning rate of the published models, stage 1 and 2.
PUBLISHED = {
    "vicuna-7b": ((256, 1e-3), (128, 2e-5)),
    "vicuna-13b": ((256, 1e-3), (128, 2e-5)),
    "phi-3-mini": ((256, 1e-3), (64, 2e-5)),
    "llama-3-8b": ((256, 1e-3), (64, 1e-5)),
    "yi-1.5-34b": ((512, 2e-3), (128, 2e-5)),
}


def changed(**changes):
    return {**GOOD, **changes}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_recipes_hold_the_published_settings(name):
    for stage, (global_batch, learning_rate) in enumerate(PUBLISHED[name], start=1):
        recipe = load_recipe(f"{name}-stage-{stage}")
        assert (recipe.stage, recipe.global_batch, recipe.learning_rate) == (
            stage,
            global_batch,
            learning_rate,
        )
        assert (recipe.epochs, recipe.max_steps, recipe.schedule, recipe.warmup_share) == (
            1,
            None,
            "cosine",
            0.03,
        )
        assert recipe.lora is None
        assert recipe.accumulation(8) >= 1
    first, second, lora = (load_recipe(f"{name}-{kind}") for kind in ("stage-1", "stage-2", "lora"))
    assert second.neck == lora.neck == f"{first.output}/neck.safetensors"
    assert first.model == second.model == lora.model
    assert first.parts is not None
    assert lora.lora is not None


def test_all_shipped_recipes_load():
    names = shipped_recipes()
    assert {f"{name}-{kind}" for name in PUBLISHED for kind in ("stage-1", "stage-2", "lora")} <= set(names)
    assert len({load_recipe(name).output for name in names}) == len(names)


def test_a_file_and_its_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(GOOD).replace("2.0e-05", "2e-5"))
    recipe = load_recipe(tmp_path / "a.yaml")
    assert recipe.learning_rate == 2e-5
    assert recipe.data[0].boxes == "b.json"
    assert recipe.precision == "bfloat16"
    assert recipe == recipe_from_dict(recipe.to_dict())


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"neon": True}, "float32"),
    ],
)
def test_precision_of_the_machine(monkeypatch, capabilities, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    recipe = recipe_from_dict(changed(precision="auto"))
    assert recipe.precision == recipe.to_dict()["precision"] == precision
    assert load_recipe("embedded-towers").precision == precision
    assert load_recipe("vicuna-7b-stage-1").precision == "bfloat16"


@pytest.mark.parametrize(("precision", "expected"), [("float32", "no"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("launched", ["no", "bf16"])
def test_the_recipe_decides_the_precision_whatever_accelerate_was_told(
    monkeypatch, tmp_path, launched, precision, expected
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    recipe = recipe_from_dict(changed(precision=precision, output=str(tmp_path)))
    assert training_arguments(recipe).mixed_precision == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(learnin_rate=1e-3), "unknown key learnin_rate: 0.001; did you mean learning_rate?"),
        (changed(xyz=1), "unknown key xyz: 1; expected one of output, global_batch"),
        ({k: v for k, v in GOOD.items() if k != "model"}, "missing key model; expected text"),
        (changed(learning_rate="fast"), "learning_rate is 'fast'; expected a number"),
        (changed(learning_rate=3), "learning_rate is 3.0; expected a number between 0 and 1"),
        (changed(global_batch=12.5), "global_batch is 12.5; expected a whole number"),
        (changed(global_batch=True), "global_batch is True; expected a whole number"),
        (changed(global_batch=0), "global_batch is 0; expected at least 1"),
        (changed(stage=3), "stage is 3; expected 1 or 2"),
        (changed(stage=True), "stage is True; expected 1 or 2"),
        (changed(precision="fp8"), "precision is 'fp8'; expected 'bfloat16' or 'float32' or 'auto'"),
        (changed(gradient_checkpointing="yes"), "gradient_checkpointing is 'yes'; expected true or false"),
        (changed(report_to="tensorboard"), "report_to is 'tensorboard'; expected a list, each entry text"),
        (changed(report_to=[1]), r"report_to\[0\] is 1; expected text"),
        (changed(max_bad_share=1.5), "max_bad_share is 1.5; expected a share from 0 to 1"),
        (changed(warmup_share=1), "warmup_share is 1.0; expected a share, 0 or more and below 1"),
        (changed(max_steps=0), "max_steps is 0; expected at least 1"),
        (changed(workers=-1), "workers is -1; expected at least 0"),
        (changed(stage=1, lora={}), "lora is .*; expected no adapters in stage 1"),
        (changed(lora={"rank": 0}), "lora.rank is 0; expected at least 1"),
        (changed(lora={"r": 8}), "unknown key lora.r: 8; expected one of rank, alpha, dropout"),
        (changed(lora=8), "lora is 8; expected keys and values"),
        (changed(parts={"template": "vicuna"}), "missing key parts.language_model; expected text"),
        (changed(data=[]), "data is .*; expected at least one source"),
        (changed(data={"records": "a.json"}), "data is .*; expected a list, each entry keys and values"),
        (changed(data=[{}]), r"data\[0\] has .*; expected records or dataset, one of them"),
        (changed(data=[{"records": "a", "dataset": "b:c"}]), "expected records or dataset, one of them"),
        (
            changed(data=[{"dataset": "b:c", "boxes": "x"}]),
            r"data\[0\].boxes is x; expected only beside records",
        ),
        (changed(data=[{"dataset": "b.c"}]), r"data\[0\].dataset is 'b.c'; expected module:name"),
        (changed(data=[{"record": "a"}]), r"unknown key data\[0\].record: 'a'; did you mean records?"),
        ([], "the recipe is .*; expected keys and values"),
        (None, "the recipe is None; expected keys and values"),
    ],
)
def test_wrong_recipes_name_key_value_and_what_was_expected(values, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(values)


def test_wrong_files(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe vicuna; shipped are embedded-language-model, "):
        load_recipe("vicuna")
    bad = tmp_path / "bad.yaml"
    for text, message in {
        "model: [": "it is not YAML",
        "model: a\nmodel: b\n": "the key model stands there twice",
        "just text": "the recipe is 'just text'; expected keys and values",
    }.items():
        bad.write_text(text)
        with pytest.raises(RecipeError, match=rf"bad\.yaml: {message}"):
            load_recipe(bad)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_gradients_of_several_batches_make_up_the_global_batch(world_size, accumulation):
    assert recipe_from_dict(GOOD).accumulation(world_size) == accumulation


@pytest.mark.parametrize("world_size", [3, 16])
def test_a_global_batch_that_cannot_be_made_up_names_all_numbers(world_size):
    with pytest.raises(
        RecipeError,
        match=f"global_batch is 128, which {world_size} processes with per_device_batch: 16 .*"
        f"they take {16 * world_size} samples",
    ):
        recipe_from_dict(GOOD).accumulation(world_size)


def test_a_run_goes_on_with_other_comforts_but_not_with_another_recipe(tmp_path):
    data = {"records": "a.json"}
    old = tiny_recipe(tmp_path, data, tmp_path)
    check_same_run(old, tiny_recipe(tmp_path, data, tmp_path, log_every=5, save_every=7, workers=2), tmp_path)
    with pytest.raises(
        RecipeError, match="holds a run with learning_rate: 0.001, the recipe says 0.1; choose another"
    ):
        check_same_run(old, tiny_recipe(tmp_path, data, tmp_path, learning_rate=0.1), tmp_path)
