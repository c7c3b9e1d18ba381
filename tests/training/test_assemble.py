"""A model put together of published parts, and a stage 1 that begins with it."""

import pytest
import torch
from miniature import tiny_recipe, write_data
from safetensors.torch import load_file

from mgllava import MGLlavaForConditionalGeneration, MGLlavaProcessor
from mgllava.training.assemble import assemble_model
from mgllava.training.errors import RecipeError
from mgllava.training.neck import is_neck
from mgllava.training.recipe import Parts
from mgllava.training.run import build_trainer


@pytest.fixture
def parts(golden_dir):
    files = golden_dir / "end_to_end"
    return {
        "language_model": str(files / "llm"),
        "vision_tower": str(files / "clip"),
        "high_res_tower": str(files / "convnext"),
        "template": "vicuna",
    }


def test_everything_but_the_neck_is_that_of_the_parts(parts, converted_golden, tmp_path):
    assemble_model(Parts(**parts), tmp_path / "model", seed=1, progress=False)
    assembled = load_file(tmp_path / "model" / "model.safetensors")
    converted = load_file(converted_golden / "model.safetensors")
    assert assembled.keys() == converted.keys()
    towers = [name for name in assembled if "tower" in name]
    assert len(towers) > 50
    assert all(torch.equal(assembled[name], converted[name]) for name in towers)
    for name in ("high_res_proj", "low_res_proj"):
        assert not assembled[f"model.fusion.{name}.weight"].any()
    assert assembled["model.fusion.gate_in.weight"].any()
    assert MGLlavaProcessor.from_pretrained(tmp_path / "model").chat_template
    MGLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_the_seed_decides_the_neck_and_nothing_else(parts, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        before = torch.random.get_rng_state()
        assemble_model(Parts(**parts), tmp_path / name, seed=seed, progress=False)
        assert torch.equal(torch.random.get_rng_state(), before)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    differing = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert differing
    assert all(is_neck(name) for name in differing)


@pytest.mark.parametrize("variant", ["gate_sum", "concat_raw"])
def test_a_recipe_puts_its_model_together_once(parts, tmp_path, variant):
    data = write_data(tmp_path)
    changes = {"stage": 1, "parts": {**parts, "fusion_variant": variant}, "text_limit": 1000}
    recipe = tiny_recipe(tmp_path / "base", data, tmp_path / "run", **changes)
    trainer = build_trainer(recipe)
    assert trainer.model.config.fusion_variant == variant
    written = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    build_trainer(recipe)
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(RecipeError, match=r"base, which was put together of .*; the recipe says .*'seed': 7"):
        build_trainer(tiny_recipe(tmp_path / "base", data, tmp_path / "other", **changes, seed=7))
