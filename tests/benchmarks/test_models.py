"""The benchmarks of whole models: every provider computes the same, and what is compared depends on the pictures."""

import pytest
import torch

from benchmarks import check
from benchmarks.benchmark import Problem, make_call, make_problem
from benchmarks.registry import MODELS

CPU = torch.device("cpu")


def problem_of(name: str) -> tuple[Problem, str]:
    benchmark = MODELS[name]
    return make_problem(benchmark, benchmark.tiny, torch.float32, CPU), benchmark.cases[0].modes[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_provider_computes_the_same(name):
    benchmark = MODELS[name]
    problem, mode = problem_of(name)
    reference, _ = check.expected(benchmark, benchmark.tiny, problem, mode)
    for one in benchmark.providers:
        if one.gpu_only is None and not one.needs_gpu:
            check.check(benchmark, one.function, problem, mode, reference)
    results = make_call(benchmark.function, problem, "forward")()
    assert [tuple(one.shape) for one in results] == benchmark.output_shapes(benchmark.tiny)


@pytest.mark.parametrize("name", ["vision_flow", "first_token", "generation"])
def test_a_slightly_wrong_neck_is_found(name, monkeypatch):
    from mgllava_kernels._torch import roi_align

    benchmark = MODELS[name]
    problem, mode = problem_of(name)
    reference, _ = check.expected(benchmark, benchmark.tiny, problem, mode)
    right = roi_align.pooled_roi_align
    monkeypatch.setattr(roi_align, "pooled_roi_align", lambda *arguments: right(*arguments) * 1.01)
    torch_path = next(one for one in benchmark.providers if one.name == "torch")
    with pytest.raises(check.WrongResult):
        check.check(benchmark, torch_path.function, problem, mode, reference)


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
