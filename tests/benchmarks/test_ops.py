"""Every benchmark's providers compute the same thing, and one that does not is never timed."""

import dataclasses
import json
import threading

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import check, literal, memory, original, original_repository, roofline, rows, runner, threaded
from benchmarks.benchmark import Provider, make_call, make_problem
from benchmarks.registry import BENCHMARKS, OPS
from benchmarks.shapes import ALL_MODES, Case

CPU = torch.device("cpu")
NAMES = list(OPS)


def provider_of(name: str, provider: str) -> Provider:
    return next(one for one in BENCHMARKS[name].providers if one.name == provider)


def runs_here(provider: Provider, mode: str, dtype: str) -> bool:
    return provider.obstacle(CPU, dtype, mode, by_name=False) is None


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_provider_computes_the_op(name, mode):
    benchmark = BENCHMARKS[name]
    problem = make_problem(benchmark, benchmark.tiny, torch.float32, CPU)
    held_to = check.standard(benchmark, benchmark.tiny, problem, mode, benchmark.providers[0].function)
    assert held_to.source == "literal composition in float64"
    held_to.judge_baseline()
    checked = [one for one in benchmark.providers if runs_here(one, mode, "float32")]
    assert {one.name for one in checked} >= {benchmark.providers[0].name, "torch"}
    for one in checked:
        assert check.check(held_to, one.function, problem, mode) < 1e-5


def test_plain_roi_align_begins_its_curve_without_boxes():
    benchmark = BENCHMARKS["roi_align"]
    sizes = next(case.sizes for case in benchmark.cases if case.sizes["boxes"] == 0)
    problem = make_problem(benchmark, sizes | {"channels": 4}, torch.float32, CPU)
    held_to = check.standard(benchmark, sizes, problem, "forward", benchmark.providers[0].function)
    for one in benchmark.providers:
        if runs_here(one, "forward", "float32"):
            assert check.check(held_to, one.function, problem, "forward") == 0
    assert benchmark.cost(sizes, torch.float32, "forward").bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_within_the_tolerance(name, dtype):
    benchmark = BENCHMARKS[name]
    problem = make_problem(benchmark, benchmark.tiny, dtype, CPU)
    for mode in ("forward", "both"):
        held_to = check.standard(benchmark, benchmark.tiny, problem, mode, benchmark.providers[0].function)
        held_to.judge_baseline()
        for one in benchmark.providers:
            if runs_here(one, mode, str(dtype).removeprefix("torch.")):
                check.check(held_to, one.function, problem, mode)


def test_cublas_calls_compute_the_projectors():
    benchmark = BENCHMARKS["projectors"]
    problem = make_problem(benchmark, benchmark.tiny, torch.float16, CPU)
    held_to = check.standard(benchmark, benchmark.tiny, problem, "forward")
    for name in ("cuBLAS bias", "cuBLAS bias and GELU"):
        one = provider_of("projectors", name)
        check.check(held_to, one.function, problem, "forward", one.leniency)


@pytest.mark.parametrize("name", NAMES)
def test_output_shapes_are_those_of_the_results(name):
    benchmark = BENCHMARKS[name]
    problem = make_problem(benchmark, benchmark.tiny, torch.float32, CPU)
    results = make_call(benchmark.function, problem, "forward")()
    assert [tuple(one.shape) for one in results] == benchmark.output_shapes(benchmark.tiny)
    gradients = make_call(benchmark.function, problem, "backward")()
    assert [one.shape for one in gradients] == [leaf.shape for leaf in problem.leaves]
    assert "boxes" not in problem.inputs or not any(
        leaf is boxes for leaf in problem.leaves for boxes in problem.inputs["boxes"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_names_of_cases_are_distinct_and_some_are_quick(name):
    cases = BENCHMARKS[name].cases
    assert len({case.name for case in cases}) == len(cases)
    assert any(case.quick and not case.gpu_only for case in cases)


def test_published_sizes_are_those_of_the_paper():
    cases = {case.name: case for case in BENCHMARKS["neck"].cases}
    shapes = original.stage_shapes(cases["1 picture, 100 boxes"].sizes)
    assert shapes == [(1, 192, 192, 192), (1, 384, 96, 96), (1, 768, 48, 48), (1, 1536, 24, 24)]


WITH_OBJECTS = (
    *("neck", "pooled_roi_align", "vision_flow"),
    *("first_token", "generation", "training_step"),
)


@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_the_original_is_not_started_beyond_what_torchvision_counts(name):
    """300 boxes give 2.7e9 elements: torchvision's RoIAlign overflows and ends the process."""
    published = {"images": 1, "canvas": 768}
    whole = {"original", "original compiled", "original max-autotune"}
    for provider in whole & {one.name for one in BENCHMARKS[name].providers}:
        impossible = provider_of(name, provider).impossible
        assert impossible(published | {"boxes": 237}) is None
        assert "2,147,483,647 elements" in impossible(published | {"boxes": 238})
    assert provider_of(name, "torch").impossible(published | {"boxes": 1000}) is None


def test_the_original_at_a_thousand_boxes_is_refused_by_estimate():
    benchmark = BENCHMARKS["neck"]
    case = next(case for case in benchmark.cases if case.name == "1 picture, 1,000 boxes")
    reason = memory.refusal(provider_of("neck", "original"), case.sizes, torch.float32, "forward", 24 << 30)
    assert reason is not None
    assert "37 GB" in reason
    assert "26 GB" in reason
    assert memory.refusal(provider_of("neck", "torch"), case.sizes, torch.float32, "forward", 1) is None
    assert (
        memory.refusal(provider_of("neck", "original"), case.sizes, torch.float32, "forward", 80 << 30)
        is None
    )


@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_the_original_at_a_hundred_boxes_takes_gigabytes(name):
    """Measured: 4.7 to 5.0 GB with gradients or without; it must not take more than a machine has left."""
    case = next(case for case in BENCHMARKS[name].cases if case.sizes.get("boxes") == 100)
    wanted = provider_of(name, "original").extra_bytes(case.sizes, torch.float32, "forward")
    assert 4e9 < wanted < 6e9
    refusals = [
        memory.refusal(
            provider_of(name, "original"), case.sizes, torch.float32, "forward", int(share * wanted)
        )
        for share in (1.2, 1.3)
    ]
    assert refusals[0] is not None
    assert refusals[1] is None


def test_errors_are_relative_to_each_result():
    large, small = torch.full((4,), 1e6, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert check.errors_of([large, small], [large, small]).norms == [0, 0]
    assert check.errors_of([large, small * 1.5], [large, small]).norms == pytest.approx([0, 0.5])
    assert check.errors_of([torch.zeros(2)], [torch.zeros(2).double()]).norms == [0]
    for broken in (small[:3], small * float("nan")):
        (norm,), (row,) = (lambda errors: (errors.norms, errors.rows))(check.errors_of([broken], [small]))
        assert norm != norm
        assert row != row


def test_the_worst_row_is_relative_to_all_rows():
    right = torch.ones(1, 100, 8)
    wrong = right.clone()
    wrong[0, 3] = 0
    errors = check.errors_of([wrong], [right])
    assert errors.norms == pytest.approx([0.1])
    assert errors.rows == pytest.approx([1.0])
    kernels = torch.ones(6, 5, 1, 1)
    wrong = kernels.clone()
    wrong[2] = 0
    assert check.errors_of([wrong], [kernels]).rows == pytest.approx([1.0])


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def broken(name: str, dtype: torch.dtype, change, mode: str = "forward") -> None:
    """Judge the baseline's own results after a change of one of them."""
    benchmark = BENCHMARKS[name]
    sizes = benchmark.tiny | {"canvas": 384}  # 144 tokens a picture
    problem = make_problem(benchmark, sizes, dtype, CPU)
    held_to = check.standard(benchmark, sizes, problem, mode, benchmark.providers[0].function)
    results = [one.detach().clone() for one in make_call(benchmark.providers[0].function, problem, mode)()]
    held_to.judge(results)
    change(results)
    held_to.judge(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_percent_off_is_wrong_in_every_dtype(dtype):
    with pytest.raises(check.WrongResult, match="relative error"):
        broken("pooled_roi_align", dtype, lambda results: results[0].mul_(1.02))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_of_another_picture_is_wrong_in_every_dtype(dtype):
    def change(results):
        results[0][1, 17] = results[0][0, 17]

    with pytest.raises(check.WrongResult, match="wrong: relative error"):
        broken("conv_gate", dtype, change)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_token_of_many_is_wrong_though_the_norm_hides_it(dtype):
    expected = torch.randn(18432, 64, generator=torch.Generator().manual_seed(0)).double()
    least = check.LEAST[dtype]
    held_to = check.Standard(
        *([expected], "a test", [max(3e-3, least)], [10 * max(4e-3, least)]),
        *(check.Errors([0.0], [0.0]), 0.0, dtype, 1, []),
    )
    held_to.judge([expected * (1 + least / 2)])
    wrong = expected.clone()
    wrong[77] *= 0.7
    assert check.errors_of([wrong], [expected]).norms[0] < 3e-3
    with pytest.raises(check.WrongResult, match="relative error of one row 3"):
        held_to.judge([wrong])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_without_one_of_its_terms_is_wrong_in_every_dtype(dtype):
    """The design's example, a gradient 25% off, and a tenth of that."""
    with pytest.raises(check.WrongResult):
        broken("conv_gate", dtype, lambda results: results[3].mul_(1.03), "both")


def test_the_baseline_has_tolerances_of_its_own():
    benchmark = BENCHMARKS["pooled_roi_align"]
    problem = make_problem(benchmark, benchmark.tiny, torch.bfloat16, CPU)
    function = benchmark.providers[0].function
    tenfold = lambda **inputs: [one * 1.05 for one in function(**inputs)]
    held_to = check.standard(benchmark, benchmark.tiny, problem, "forward", tenfold)
    with pytest.raises(check.WrongResult, match="at most 3e-02"):
        held_to.judge_baseline()


def test_without_the_baseline_the_literal_composition_in_the_same_dtype_sets_the_limits():
    benchmark = BENCHMARKS["pooled_roi_align"]
    problem = make_problem(benchmark, benchmark.tiny, torch.bfloat16, CPU)
    held_to = check.standard(benchmark, benchmark.tiny, problem, "forward")
    assert 0 < held_to.baseline.norms[0] < 2.0**-7
    assert held_to.norms[0] >= 2 * held_to.baseline.norms[0]


@pytest.mark.parametrize("boxes", [[3, 0, 5], [0, 0, 0]])
def test_the_reference_in_pieces_is_the_composition_in_one(boxes, monkeypatch):
    monkeypatch.setattr(literal, "CHANNELS", 5)
    monkeypatch.setattr(literal, "BOXES", 2)
    shapes = [(3, channels, side, side) for channels, side in ((12, 16), (7, 8))]
    stages = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    own = [torch.rand(count, 4).mul(20).cumsum(1) for count in boxes]
    scale, grad = 0.25, torch.randn(sum(boxes), 19, dtype=torch.float64)
    found, expected = (
        (vectors, *torch.autograd.grad(vectors, stages, grad, materialize_grads=True))
        for (vectors,) in (function(stages, own, scale) for function in PIECES_AND_WHOLE)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("side", "ratio", "aligned"), [(7, 2, False), (5, -1, True)])
@pytest.mark.parametrize("count", [0, 1, 21])
def test_torchvision_on_all_threads_is_torchvision(side, ratio, aligned, count, monkeypatch):
    """In parts of a few boxes and of a few channels, with boxes of any picture in any order."""
    from torchvision.ops import roi_align

    monkeypatch.setattr(threaded, "BOXES", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    maps = torch.randn(2, 8, 12, 10).requires_grad_()
    index = torch.arange(count).remainder(2).unsqueeze(1)
    boxes = torch.cat([index, torch.rand(count, 4).mul(20).cumsum(1)], dim=1)
    options = (side, 0.25, ratio, aligned)
    found, expected = threaded.roi_align(maps, boxes, *options), roi_align(maps, boxes, *options)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    (own,), (right,) = (torch.autograd.grad(one, maps, grad) for one in (found, expected))
    torch.testing.assert_close(own, right, rtol=1e-6, atol=1e-6)
    of_each = [boxes[boxes[:, 0] == picture, 1:] for picture in (0, 1)]
    assert torch.equal(threaded.roi_align(maps, of_each, *options), roi_align(maps, of_each, *options))


def test_a_rival_on_all_threads_uses_them_and_runs_on_a_cpu_only(monkeypatch):
    import torchvision

    threads, align = set(), torchvision.ops.roi_align
    problem = make_problem(
        BENCHMARKS["roi_align"], BENCHMARKS["roi_align"].tiny | {"boxes": 64}, torch.float32, CPU
    )
    waiting = threading.Barrier(2, timeout=60)

    def watched(*arguments, **options):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            waiting.wait()  # nobody takes all the parts
        return align(*arguments, **options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torchvision.ops, "roi_align", watched)
    provider = provider_of("roi_align", "torchvision, all threads")
    make_call(provider.function, problem, "forward")()
    assert len(threads) == 2
    assert provider.obstacle(CPU, "float32", "forward", by_name=False) is None
    assert "GPU" in provider.obstacle(torch.device("cuda"), "float32", "forward", by_name=True)


PIECES_AND_WHOLE = (literal.pooled_roi_align, original.pooled_roi_align)


def shrink(monkeypatch, *names: str) -> None:
    """Let these benchmarks have one tiny case."""
    for name in names:
        case = Case("tiny", BENCHMARKS[name].tiny, "a test", quick=True)
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], cases=(case,)))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line on tiny cases; returns the result and the rows by provider."""

    def invoke(*arguments: str, op: str = "pooled_roi_align"):
        shrink(monkeypatch, op)
        options = ["--op", op, "--mode", "forward", "--budget", "0", "--results", str(tmp_path), *arguments]
        result = CliRunner().invoke(command.app, [*options, "--device", "cpu"])
        path = tmp_path / f"{op}.cpu.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return result, {row["provider"]: row for row in map(json.loads, lines)}

    ceilings = roofline.Ceilings("a CPU", 1e10, {"float32": 1e11}, "a test")
    monkeypatch.setattr(roofline, "measure_ceilings", lambda *arguments: ceilings)
    monkeypatch.setattr(memory, "apart", lambda *arguments: 1000)
    monkeypatch.setattr(
        runner, "WATCHED_SECONDS", 1e9
    )  # also where a busy machine takes seconds for an import
    return invoke


def test_a_run_times_what_is_right_and_says_why_the_rest_has_no_times(run):
    result, rows = run()
    assert result.exit_code == 0, result.output
    assert set(rows) == {one.name for one in BENCHMARKS["pooled_roi_align"].providers}
    for name in ("original", "original, all threads", "torch"):
        assert rows[name]["milliseconds"]["median"] > 0
        assert rows[name]["samples"] >= 3
        assert rows[name]["extra_bytes"] == 1000
        assert rows[name]["error"] < 1e-5
        assert rows[name]["reference"] == "literal composition in float64"
        assert rows[name]["share"] == pytest.approx(
            rows[name]["floor_ms"] / rows[name]["milliseconds"]["median"]
        )
        assert rows[name]["reason"] is None
    assert rows["original"]["run"] == rows["torch"]["run"]
    assert "needs a GPU" in rows["triton"]["reason"]
    assert "--provider" in rows["original compiled"]["reason"]
    assert rows["triton"]["milliseconds"] is None


def test_floors_are_those_of_the_better_of_two_measurements(run, monkeypatch):
    """Before and after; where they differ by more than a twentieth, the rows say so."""

    def rows_with(*bandwidths: float) -> dict:
        measured = iter(bandwidths)
        monkeypatch.setattr(
            roofline,
            "measure_ceilings",
            lambda *arguments: roofline.Ceilings("a CPU", next(measured), {"float32": 1e11}, "a test"),
        )
        return run("--fresh")[1]

    for bandwidths in ((2e10, 1e10), (1e10, 2e10)):
        found = rows_with(*bandwidths)
        for row in found.values():
            assert row["bandwidth"] == 2e10
            assert row["floor_ms"] == max(row["bytes"] / 2e10, row["flops"] / 1e11) * 1e3
            assert "rates changed meanwhile: bandwidth" in row["note"]
        share = found["torch"]["floor_ms"] / found["torch"]["milliseconds"]["median"]
        assert found["torch"]["share"] == pytest.approx(share)
    found = rows_with(1e10, 1.04e10)
    assert {row["bandwidth"] for row in found.values()} == {1.04e10}
    assert not any("rates changed" in (row["note"] or "") for row in found.values())


def test_a_broken_kernel_is_not_timed_and_fails_the_run(run, monkeypatch):
    from mgllava_kernels._torch import roi_align

    right = roi_align.pooled_roi_align
    monkeypatch.setattr(roi_align, "pooled_roi_align", lambda *arguments: right(*arguments) * 1.0001)
    result, rows = run()
    assert result.exit_code == 1
    assert "pooled_roi_align, tiny, float32, forward, torch: wrong: relative error 1.0e-04" in result.output
    assert rows["torch"]["wrong"]
    assert rows["torch"]["milliseconds"] is None
    assert rows["torch"]["error"] == pytest.approx(1e-4, rel=0.1)
    assert rows["original"]["milliseconds"] is not None


def test_a_wrong_row_is_measured_again(run, monkeypatch):
    from mgllava_kernels._torch import roi_align

    with monkeypatch.context() as patch:
        right = roi_align.pooled_roi_align
        patch.setattr(roi_align, "pooled_roi_align", lambda *arguments: right(*arguments) * 2)
        assert run()[1]["torch"]["wrong"]
    result, rows = run()
    assert result.exit_code == 0
    assert rows["torch"]["milliseconds"] is not None


def test_a_broken_gradient_is_not_timed(run, monkeypatch):
    from mgllava_kernels._torch import conv_gate

    right = conv_gate.conv_gate_fusion_backward

    def broken(*arguments):
        gradients = right(*arguments)
        return [gradients[0] * 1.01, *gradients[1:]]

    monkeypatch.setattr(conv_gate, "conv_gate_fusion_backward", broken)
    result, rows = run("--mode", "both", op="conv_gate")
    assert result.exit_code == 1
    assert rows["torch"]["wrong"]
    assert rows["torch"]["milliseconds"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")
def test_a_broken_triton_kernel_is_found_in_the_interpreter(monkeypatch):
    from mgllava_kernels._triton import pooled_roi_align

    benchmark = BENCHMARKS["pooled_roi_align"]
    problem = make_problem(benchmark, benchmark.tiny, torch.float32, CPU)
    held_to = check.standard(benchmark, benchmark.tiny, problem, "forward")
    triton = provider_of("pooled_roi_align", "triton").function
    assert check.check(held_to, triton, problem, "forward") < 1e-5
    right = pooled_roi_align.pooled_roi_align
    monkeypatch.setattr(pooled_roi_align, "pooled_roi_align", lambda *arguments: right(*arguments) * 1.0001)
    with pytest.raises(check.WrongResult, match="relative error 1.0e-04"):
        check.check(held_to, triton, problem, "forward")


def test_a_path_that_raises_is_a_row_and_fails_the_run(run, monkeypatch):
    from mgllava_kernels._torch import roi_align

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("no memory\nand a long story")

    monkeypatch.setattr(roi_align, "pooled_roi_align", out_of_memory)
    result, rows = run()
    assert result.exit_code == 1
    assert rows["torch"]["reason"] == "failed: OutOfMemoryError: no memory"
    assert rows["torch"]["milliseconds"] is None


def test_an_interrupted_run_goes_on_where_it_stopped(run, monkeypatch):
    measured = []
    right = runner.Runner.measure

    def measure(self, job):
        measured.append(job.mode)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return right(self, job)

    monkeypatch.setattr(runner.Runner, "measure", measure)
    run("--mode", "backward")
    assert measured == ["forward", "backward"]
    result, _ = run("--mode", "backward")
    assert result.exit_code == 0, result.output
    assert measured == ["forward", "backward", "backward"]
    result, _ = run("--mode", "backward")
    assert "0 measurements" in result.output
    assert len(measured) == 3
    run("--mode", "backward", "--fresh")
    assert len(measured) == 5


def test_a_provider_that_is_named_is_measured_beside_what_it_is_compared_with(run):
    run()
    result, rows = run("--provider", "original compiled", "--provider", "original, all threads", "--fresh")
    assert result.exit_code == 0, result.output
    timed = {name for name, row in rows.items() if row["milliseconds"] is not None}
    assert timed == {"original", "original, all threads", "original compiled", "torch"}
    assert len({rows[name]["run"] for name in timed}) == 1
    result, _ = run()
    assert "0 measurements, about 0 min" in result.output


def test_a_provider_that_is_not_asked_for_has_a_row_that_says_so(run):
    _, found = run("--provider", "torch")
    left_out = {name for name, row in found.items() if row["reason"] == runner.NOT_ASKED_FOR}
    assert left_out == set(found) - {"original", "torch"}
    assert set(found) == {one.name for one in BENCHMARKS["pooled_roi_align"].providers}
    result, found = run()
    assert "1 measurements" in result.output
    assert found["original, all threads"]["milliseconds"]
    assert "--provider" in found["original compiled"]["reason"]
    # What is known of them is no less true when they are left out next time.
    _, found = run("--provider", "torch", "--fresh")
    assert found["original, all threads"]["milliseconds"]
    assert "--provider" in found["original compiled"]["reason"]


def test_times_and_precision_of_a_run(run, monkeypatch, tmp_path):
    """Quick is quick, and float32 is float32 for everyone."""
    budgets = []

    class Recorded(runner.Runner):
        def __init__(self, conditions, ceilings, budget, *rest, **more):
            budgets.append(budget)
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            super().__init__(conditions, ceilings, 0.0, *rest, **more)

    monkeypatch.setattr(command, "Runner", Recorded)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    shrink(monkeypatch, "pooled_roi_align")
    for options in (["--quick"], ["--mode", "forward", "--results", str(tmp_path), "--fresh"]):
        result = CliRunner().invoke(command.app, ["--op", "pooled_roi_align", "--device", "cpu", *options])
        assert result.exit_code == 0, result.output
    assert budgets == [1.0, 5.0]


def test_other_versions_of_the_code_are_measured_anew(run, monkeypatch):
    monkeypatch.setattr(runner, "current_commit", lambda code: "abc")
    run()
    monkeypatch.setattr(runner, "current_commit", lambda code: "def")
    result, rows = run()
    assert "1 measurements" in result.output
    assert rows["torch"]["commit"] == "def"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "--op must be one of neck"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--provider", "nothing"], "--provider must be one of original"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda; got 'tpu'"),
        (["--case", "no such case"], "no case fits these options"),
        (["roofline", "--device", "TPU"], "--device must be one of H100, H200, A100; got 'TPU'"),
    ],
)
def test_a_bad_option_is_named(arguments, message):
    result = CliRunner().invoke(command.app, arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_the_help_tells_what_to_run():
    output = CliRunner().invoke(command.app, ["--help"]).output
    for line in ("python -m benchmarks --quick", "roofline --device H200", "benchmarks/test_cpu.py"):
        assert line in output


STAND_IN = """
import a_framework_that_is_not_installed

class DualPathFuseModule(nn.Module):
    def __init__(self, low_res_dim, high_res_dim):
        super().__init__()
        self.slow_conv = nn.Conv2d(high_res_dim, high_res_dim, 1)

    def forward(self, low_res_feat, high_res_feat):
        high = self.slow_proj(F.gelu(self.slow_conv(high_res_feat)))
        low = low_res_feat.transpose(1, 2).reshape(high.shape)
        low = low + self.fast_proj(F.gelu(self.fast_conv(low)))
        gate = self.gate(torch.cat([low, high], dim=1).mean(dim=(2, 3)))
        return (low + high * gate.tanh()[..., None, None]).flatten(2).transpose(1, 2)
"""


def test_the_original_repository_runs_on_request(monkeypatch, tmp_path):
    provider, benchmark = provider_of("conv_gate", "original repository"), BENCHMARKS["conv_gate"]
    variable = original_repository.ENVIRONMENT_VARIABLE
    monkeypatch.delenv(variable, raising=False)
    assert variable in provider.obstacle(CPU, "float32", "forward", by_name=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert "does not exist" in provider.obstacle(CPU, "float32", "forward", by_name=False)
    file = tmp_path / original_repository.FILE
    file.parent.mkdir(parents=True)
    file.write_text(STAND_IN)
    assert provider.obstacle(CPU, "float32", "forward", by_name=False) is None
    problem = make_problem(benchmark, benchmark.tiny, torch.float32, CPU)
    held_to = check.standard(benchmark, benchmark.tiny, problem, "both")
    check.check(held_to, provider.function, problem, "both")
    # Sets of inputs take turns in timed calls: none of them may read the file again.
    file.unlink()
    problems = [make_problem(benchmark, benchmark.tiny, torch.float32, CPU, seed) for seed in (0, 1)]
    for one in problems * 2:
        make_call(provider.function, one, "forward")()
    kept = [one.inputs["fusion"].__dict__[original_repository.KEPT] for one in problems]
    make_call(provider.function, problems[0], "forward")()
    assert problems[0].inputs["fusion"].__dict__[original_repository.KEPT] is kept[0]
    parameters = list(problems[0].inputs["fusion"].parameters())
    assert len(parameters) == len(
        list(BENCHMARKS["conv_gate"].inputs(benchmark.tiny, torch.Generator())["fusion"].parameters())
    )


def test_a_run_says_how_far_it_is_and_quick_ends_with_the_answer(run):
    result, found = run("--quick")
    assert result.exit_code == 0, result.output
    assert runner.NO_MEMORY in found["torch"]["note"]
    assert "1/1, 0 of 1 min: pooled_roi_align, tiny, float32, forward" in result.output
    assert "load " in result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("pooled_roi_align, tiny: torch ")
    assert last.endswith(" times as fast as original")


def test_a_second_run_into_the_same_folder_is_refused(run, tmp_path):
    with rows.locked(tmp_path):
        result, found = run()
    assert result.exit_code == 1
    assert "another run is writing here" in result.output
    assert found == {}


def test_a_reason_with_brackets_is_printed_as_it_is(run, monkeypatch):
    from mgllava_kernels._torch import roi_align

    def breaks(*arguments):
        raise RuntimeError("[/red] no such [thing]")

    monkeypatch.setattr(roi_align, "pooled_roi_align", breaks)
    result, found = run()
    assert "[/red] no such [thing]" in result.output
    assert found["torch"]["reason"] == "failed: RuntimeError: [/red] no such [thing]"
