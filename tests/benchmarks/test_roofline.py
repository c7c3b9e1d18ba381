"""Bytes and FLOPs against counts by hand, and predictions marked as such."""

import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import roofline
from benchmarks.registry import OPS

ONE = {"images": 1, "boxes": 100, "canvas": 768}


def test_pooled_roi_align_reads_the_four_stages_once():
    cost = roofline.pooled_roi_align(ONE, torch.bfloat16, "forward")
    maps = 192 * 192**2 + 384 * 96**2 + 768 * 48**2 + 1536 * 24**2
    assert cost.bytes == maps * 2 + 100 * 2880 * 2 + 100 * 20
    assert 26.5e6 < maps * 2 < 26.6e6  # as the design counts it
    assert cost.flops == int(2 * 100 * maps / 9)


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


def test_roi_align_reads_the_map_and_writes_the_bins():
    sizes = {"images": 2, "channels": 3, "height": 5, "width": 7, "boxes": 4, "side": 2}
    assert roofline.roi_align(sizes, torch.float32, "forward").bytes == 4 * (2 * 3 * 5 * 7 + 4 * 3 * 4) + 80


def test_the_neck_moves_no_more_than_its_parts_and_computes_all_of_them():
    for mode in ("forward", "backward", "both"):
        parts = [
            part(ONE, torch.bfloat16, mode)
            for part in (roofline.conv_gate, roofline.pooled_roi_align, roofline.projectors)
        ]
        whole = roofline.neck(ONE, torch.bfloat16, mode)
        assert whole.flops == sum(part.flops for part in parts)
        assert max(part.bytes for part in parts) < whole.bytes < sum(part.bytes for part in parts)


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
    assert [cell.strip() for cell in line.split("│")[3:7]] == ["27.1", "0.29", "5.7", "bytes"]


def test_ceilings_are_measured():
    ceilings = roofline.measure_ceilings(torch.device("cpu"), [torch.float32], "here")
    assert 1e8 < ceilings.bandwidth < 1e13
    assert 1e9 < ceilings.matmul["float32"] < 1e14
