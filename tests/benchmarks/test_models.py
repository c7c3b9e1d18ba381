"""The benchmarks of whole models: every provider computes the same, and what is compared depends on the pictures."""

import pytest
import torch

from benchmarks import check
from benchmarks.benchmark import Problem, make_call, make_problem
from benchmarks.registry import MODELS, OPS

CPU = torch.device("cpu")


def problem_of(name: str) -> tuple[Problem, str]:
    benchmark = MODELS[name]
    return make_problem(benchmark, benchmark.tiny, torch.float32, CPU), benchmark.cases[0].modes[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_provider_computes_the_same(name):
    benchmark = MODELS[name]
    problem, mode = problem_of(name)
    held_to = check.standard(benchmark, benchmark.tiny, problem, mode, benchmark.providers[0].function)
    held_to.judge_baseline()
    for one in benchmark.providers:
        if one.gpu_only is None and not one.needs_gpu:
            check.check(held_to, one.function, problem, mode, one.leniency)
    results = make_call(benchmark.function, problem, "forward")()
    assert [tuple(one.shape) for one in results] == benchmark.output_shapes(benchmark.tiny)


@pytest.mark.parametrize("name", ["vision_flow", "first_token", "generation"])
def test_a_slightly_wrong_neck_is_found(name, monkeypatch):
    from mgllava_kernels._torch import roi_align

    benchmark = MODELS[name]
    problem, mode = problem_of(name)
    held_to = check.standard(benchmark, benchmark.tiny, problem, mode, benchmark.providers[0].function)
    right = roi_align.pooled_roi_align
    monkeypatch.setattr(roi_align, "pooled_roi_align", lambda *arguments: right(*arguments) * 1.01)
    torch_path = next(one for one in benchmark.providers if one.name == "torch")
    with pytest.raises(check.WrongResult):
        check.check(held_to, torch_path.function, problem, mode)


def test_the_neck_alone_learns_in_the_training_step():
    problem, _ = problem_of("training_step")
    model = problem.inputs["model"].model
    neck = [model.fusion, model.image_projector, model.object_projector]
    expected = [parameter for module in neck for parameter in module.parameters()]
    assert {id(leaf) for leaf in problem.leaves} == {id(parameter) for parameter in expected}


def test_published_models_have_published_sizes():
    from benchmarks.models import config_of
    from mgllava import MGLlavaConfig

    sizes = next(case.sizes for case in MODELS["first_token"].cases if case.gpu_only)
    ours, published = config_of(sizes), MGLlavaConfig.published("vicuna-7b")
    for part, names in {
        "vision_config": (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
        ),
        "high_res_config": ("image_size",),
        "text_config": (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        ),
    }.items():
        for name in names:
            assert getattr(getattr(ours, part), name) == getattr(getattr(published, part), name), name
    assert tuple(ours.high_res_config.stage_widths) == tuple(published.high_res_config.stage_widths)
    assert ours.high_res_config.model_kwargs["depths"] == [3, 3, 27, 3]  # ConvNeXt-L


def test_parameters_are_counted_without_a_model():
    """Making one of published size takes 13 GB."""
    from transformers.initialization import no_init_weights

    from benchmarks.models import config_of, parameters
    from mgllava import MGLlavaForConditionalGeneration

    sizes = next(case.sizes for case in MODELS["first_token"].cases if case.gpu_only)
    with torch.device("meta"), no_init_weights():
        model = MGLlavaForConditionalGeneration(config_of(sizes))
    assert parameters(sizes) == pytest.approx(sum(one.numel() for one in model.parameters()), rel=0.01)


def test_the_op_benchmarks_hand_over_what_the_towers_do():
    """The strides of tokens and stage maps decide which kernels run."""
    problem, _ = problem_of("vision_flow")
    model, pictures = problem.inputs["model"], problem.inputs
    with torch.no_grad():
        tokens = model.encode_low_res(pictures["pixel_values"])
        stages = model.high_res_tower(pictures["pixel_values_high_res"])
    for dtype in (torch.float32, torch.float16):
        made = make_problem(OPS["neck"], OPS["neck"].tiny, dtype, CPU).inputs
        assert made["low_res"].shape == tokens.shape
        assert made["low_res"].stride() == tokens.stride()
        assert [one.stride() for one in made["stages"]] == [one.stride() for one in stages]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_compared_with_a_wider_dtype(dtype):
    benchmark = MODELS["vision_flow"]
    problem = make_problem(benchmark, benchmark.tiny, dtype, CPU)
    held_to = check.standard(benchmark, benchmark.tiny, problem, "forward")
    wide = {torch.float32: torch.float64, torch.bfloat16: torch.float32}[dtype]
    assert {one.dtype for one in held_to.expected} == {wide}
    assert held_to.source == f"literal composition in {str(wide).removeprefix('torch.')}"


def test_work_of_the_cpu_is_measured_there():
    assert [name for name, one in MODELS.items() if one.on_cpu] == ["preprocessing", "conversion"]
    assert all(not MODELS[name].graph for name in MODELS if name != "vision_flow")


def test_preprocessing_is_that_of_the_original_to_the_last_digits():
    benchmark = MODELS["preprocessing"]
    problem, mode = problem_of("preprocessing")
    held_to = check.standard(benchmark, benchmark.tiny, problem, mode)
    names = {one.name: one for one in benchmark.providers}
    assert check.check(held_to, names["mgllava"].function, problem, mode) < 1e-6
    rounded = names["original, torchvision"]
    assert check.check(held_to, rounded.function, problem, mode, rounded.leniency) > 1e-4
