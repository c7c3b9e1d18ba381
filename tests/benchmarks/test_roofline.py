"""Bytes and FLOPs against counts by hand, and predictions marked as such."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import boxes, roofline
from benchmarks.benchmark import make_problem
from benchmarks.registry import OPS

ONE = {"images": 1, "boxes": 100, "canvas": 768}


def test_pooled_roi_align_reads_what_boxes_cover_once():
    maps = 192 * 192**2 + 384 * 96**2 + 768 * 48**2 + 1536 * 24**2
    assert 26.5e6 < maps * 2 < 26.6e6  # as the design counts it
    for count, least, most in ((1000, 0.99, 1), (100, 0.94, 0.98), (10, 0.6, 0.75), (0, 0, 0)):
        cost = roofline.pooled_roi_align(ONE | {"boxes": count}, torch.bfloat16, "forward")
        read = cost.bytes - count * 2880 * 2 - count * 20
        assert least <= read / (maps * 2) <= most, count
        # Boxes lie between two uniform corners: a ninth of the map, and a cell more on coarse levels.
        assert 0.11 * count <= cost.flops / (2 * maps) <= 0.14 * count
        backward = roofline.pooled_roi_align(ONE | {"boxes": count}, torch.bfloat16, "backward")
        assert backward.bytes == maps * 2 + count * 2880 * 2 + count * 20


def test_cells_of_pooled_roi_align_are_those_with_a_gradient():
    """They are those with a gradient."""
    sizes = {"images": 2, "boxes": 3, "canvas": 128, "divisor": 16}
    touched = boxes.pooled_cells(sizes)
    problem = make_problem(OPS["pooled_roi_align"], sizes, torch.float64, torch.device("cpu"))
    (vectors,) = OPS["pooled_roi_align"].providers[0].function(**problem.inputs)
    grads = torch.autograd.grad(vectors.sum(), problem.inputs["stages"])
    assert [int(grad[:, 0].count_nonzero()) for grad in grads] == [together for together, _ in touched]


@pytest.mark.parametrize("large", [0, 1])
@pytest.mark.parametrize("ratio", [2, -1])
def test_cells_of_plain_roi_align_are_those_with_a_gradient(large, ratio):
    sizes = OPS["roi_align"].tiny | {"large": large, "ratio": ratio}
    problem = make_problem(OPS["roi_align"], sizes, torch.float64, torch.device("cpu"))
    (bins,) = OPS["roi_align"].providers[0].function(**problem.inputs)
    (grad,) = torch.autograd.grad(bins.sum(), problem.inputs["maps"])
    assert int(grad[:, 0].count_nonzero()) == boxes.region_cells(sizes)


def test_conv_gate_is_three_matmuls_and_a_depthwise_convolution():
    cost = roofline.conv_gate(ONE, torch.bfloat16, "forward")
    weights = 1536 * 1536 + 1536 * 1024 + 1024 * 1024 + 49 * 1024
    assert cost.flops == 2 * 576 * weights
    gate = 2 * 1024 * 512
    assert cost.bytes == 2 * (576 * (1024 + 1536 + 1024) + weights + gate)


def test_projectors_are_two_matmuls_a_set():
    cost = roofline.projectors(ONE, torch.float32, "forward")
    image, objects = 4096 * (1024 + 4096), 4096 * (2880 + 4096)
    assert cost.flops == 2 * (576 * image + 100 * objects)
    assert cost.bytes == 4 * (image + objects + 576 * (1024 + 4096) + 100 * (2880 + 4096))
    assert roofline.projectors(ONE | {"boxes": 0}, torch.float32, "forward").flops == 2 * 576 * image


def test_roi_align_reads_sampled_cells_and_writes_bins_and_whole_gradients():
    sizes = OPS["roi_align"].tiny
    bins = 6 * 16 * 49
    forward, backward = (roofline.roi_align(sizes, torch.float32, mode) for mode in ("forward", "backward"))
    assert forward.bytes == 4 * (16 * boxes.region_cells(sizes) + bins) + 120
    assert backward.bytes == 4 * (2 * 16 * 20 * 24 + bins) + 120


def test_the_neck_moves_no_more_than_its_parts_and_computes_all_of_them():
    for mode in ("forward", "backward"):
        parts = [
            part(ONE, torch.bfloat16, mode)
            for part in (roofline.conv_gate, roofline.pooled_roi_align, roofline.projectors)
        ]
        whole = roofline.neck(ONE, torch.bfloat16, mode)
        assert whole.bytes < sum(part.bytes for part in parts)
        if mode == "forward":
            assert whole.bytes > max(part.bytes for part in parts)
            assert whole.flops == sum(part.flops for part in parts)


def test_the_backward_of_the_neck_is_that_of_training():
    """The towers are frozen: no gradients of maps and tokens."""
    parts = [
        part(ONE, torch.bfloat16, "backward")
        for part in (roofline.conv_gate, roofline.pooled_roi_align, roofline.projectors)
    ]
    whole = roofline.neck(ONE, torch.bfloat16, "backward")
    left_out = 2 * 576 * (1536 * 1536 + 49 * 1024) + 2 * 100 * 4096 * 2880
    assert whole.flops == sum(part.flops for part in parts) - parts[1].flops - left_out
    problem = make_problem(OPS["neck"], OPS["neck"].tiny, torch.float32, torch.device("cpu"))
    assert all(isinstance(leaf, torch.nn.Parameter) for leaf in problem.leaves)


def test_forward_and_backward_add_up():
    for benchmark in OPS.values():
        for case in benchmark.cases:
            forward, backward, both = (
                benchmark.cost(case.sizes, torch.bfloat16, mode) for mode in ("forward", "backward", "both")
            )
            assert forward + backward == both


def test_the_floor_is_the_longer_of_both_limits():
    ceilings = roofline.Ceilings("device", 1e9, {"float32": 1e12}, "a test")
    assert ceilings.floor_ms(roofline.Cost(bytes=10**6, flops=0), "float32") == 1.0
    assert ceilings.floor_ms(roofline.Cost(bytes=10**6, flops=4 * 10**9), "float32") == 4.0


def test_a_prediction_says_that_it_is_one():
    result = CliRunner().invoke(command.app, ["roofline", "--device", "H200", "--op", "pooled_roi_align"])
    assert result.exit_code == 0
    assert "PREDICTED floors, not measured: NVIDIA H200 SXM, bfloat16, forward; 4.8 TB/s" in result.output
    line = next(line for line in result.output.splitlines() if "1 picture, 100 boxes " in line)
    assert [cell.strip() for cell in line.split("│")[3:7]] == ["26.0", "0.32", "5.4", "bytes"]


@pytest.mark.parametrize(("seconds", "bandwidth"), [((0.5, 0.5), 2**30), ((0.5, 0.125), 2**31)])
def test_ceilings_count_what_a_copy_a_sum_and_a_matmul_do(seconds, bandwidth, monkeypatch):
    """A copy of 2^28 bytes reads and writes them, a sum reads them; a matmul of 2,048 is 2^34 FLOPs."""
    times, results = iter([*seconds, 0.25]), []

    def timed(call, device):
        results.append(call())
        return next(times)

    monkeypatch.setattr(roofline, "_best_seconds", timed)
    ceilings = roofline.measure_ceilings(torch.device("cpu"), [torch.float32], "here")
    assert ceilings.bandwidth == bandwidth
    assert ceilings.matmul == {"float32": 2**36}
    copied, summed, product = results
    assert copied.nbytes == 2**28
    assert summed.shape == ()
    assert product.shape == (2048, 2048)


def test_a_ceiling_is_of_the_shortest_call(monkeypatch):
    lengths = [3.0, *([2.0] * (roofline.REPEATS - 1))]
    clock = iter([moment for length in lengths for moment in (0.0, length)])
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(clock))
    calls = []
    assert roofline._best_seconds(lambda: calls.append(None), torch.device("cpu")) == 2.0
    assert len(calls) == 1 + roofline.REPEATS  # the first, which warms up, is not timed


def test_ceilings_that_change_are_told():
    before = roofline.Ceilings("here", 10e9, {"float32": 3e11}, "a test")
    assert roofline.drift(before, dataclasses.replace(before, bandwidth=10.4e9)) is None
    told = roofline.drift(before, dataclasses.replace(before, bandwidth=8e9, matmul={"float32": 2e11}))
    assert told == "bandwidth 10.0, then 8.0 G/s, float32 matmuls 300.0, then 200.0 G/s"
