"""`vision_neck`: its parts, one graph, gradients of everything that learns."""

import pytest
import torch
from kernel_cases import KERNEL_DEVICE, PATHS, random_boxes, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from mgllava_kernels import ConvGateFusion, Projector, pooled_roi_align, use_backend, vision_neck

SCALE = 0.25


def parts():
    torch.manual_seed(1)
    fusion = ConvGateFusion(6, 5)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return {"fusion": fusion, "image_projector": Projector(6, 8), "object_projector": Projector(8, 8)}


def features(images=2):
    stages = [
        torch.randn(images, 3, 8, 8, requires_grad=True),
        torch.randn(images, 5, 4, 4, requires_grad=True),
    ]
    return torch.randn(images, 16, 6, requires_grad=True), stages


@pytest.mark.parametrize("path", PATHS)
def test_it_is_its_parts_one_after_the_other(path):
    modules, (low_res, stages), boxes = parts(), features(), random_boxes(7, 32, images=2)
    with use_backend("reference"):
        expected_image = modules["image_projector"](modules["fusion"](low_res, stages[-1]))
        pooled = pooled_roi_align(stages, boxes, spatial_scale=SCALE, output_size=3)
        expected_objects = modules["object_projector"](pooled)
    with use_backend(path):
        image, objects = vision_neck(low_res, stages, boxes, **modules, spatial_scale=SCALE, output_size=3)
    assert relative_error(image, expected_image) < 1e-5
    assert relative_error(objects, expected_objects) < 1e-5
    learning = [low_res, *stages, *(value for part in modules.values() for value in part.parameters())]
    expected = torch.autograd.grad(expected_image.sum() + expected_objects.sin().sum(), learning)
    gradients = torch.autograd.grad(image.sum() + objects.sin().sum(), learning)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-5)


def on_the_kernels_device(dtype=torch.float32):
    """Modules, both towers' features and boxes as rows and as a list."""
    modules, (low_res, stages) = parts(), features()
    modules = {name: module.to(KERNEL_DEVICE, dtype) for name, module in modules.items()}
    low_res, *stages = (
        value.detach().to(KERNEL_DEVICE, dtype).requires_grad_() for value in (low_res, *stages)
    )
    rows = random_boxes(7, 32, images=2).to(KERNEL_DEVICE)
    return modules, low_res, stages, (rows, [rows[rows[:, 0] == image, 1:] for image in (0, 1)])


def tokens_and_gradients(path, modules, low_res, stages, boxes):
    with use_backend(path):
        image, objects = vision_neck(low_res, stages, boxes, **modules, spatial_scale=SCALE, output_size=3)
    learning = [low_res, *stages, *(value for part in modules.values() for value in part.parameters())]
    total = image.float().square().sum() + objects.float().square().sum()
    return [image, objects, *torch.autograd.grad(total, learning)]


def test_triton_computes_what_the_reference_does():
    modules, low_res, stages, kinds = on_the_kernels_device()
    for boxes in kinds:
        actual, expected = (
            tokens_and_gradients(path, modules, low_res, stages, boxes) for path in ("triton", "reference")
        )
        for value, other in zip(actual, expected, strict=True):
            assert relative_error(value, other) < 1e-5


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: captures a CUDA graph")
@pytest.mark.parametrize("kind", ["rows", "list"])
def test_replays_in_a_cuda_graph(kind):
    modules, low_res, stages, kinds = on_the_kernels_device(torch.bfloat16)
    arguments = modules, low_res, stages, kinds[kind == "list"]
    tokens_and_gradients("triton", *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tokens_and_gradients("triton", *arguments)
    with torch.no_grad():
        for value in (low_res, *stages):
            value.copy_(torch.randn_like(value))
    graph.replay()
    for value, expected in zip(captured, tokens_and_gradients("triton", *arguments), strict=True):
        assert torch.equal(value, expected)


def test_four_graphs_for_any_sequence_of_box_counts():
    counter = CompileCounterWithBackend("aot_eager")
    modules, (low_res, stages) = parts(), features()
    torch._dynamo.reset()
    compiled = torch.compile(vision_neck, fullgraph=True, backend=counter)
    for count in (3, 40, 1, 0, 7):
        boxes = random_boxes(count, 32, images=2, seed=count)
        arguments = {**modules, "spatial_scale": SCALE, "output_size": 3}
        torch.testing.assert_close(
            compiled(low_res, stages, boxes, **arguments), vision_neck(low_res, stages, boxes, **arguments)
        )
    assert counter.frame_count <= 4


@pytest.mark.parametrize("wrong", [None, [], torch.zeros(2, 5, 4, 4)])
def test_stages_that_are_no_maps_are_named(wrong):
    low_res, _ = features()
    with pytest.raises(TypeError, match="stages must be a non-empty sequence of maps"):
        vision_neck(low_res, wrong, random_boxes(3, 32, images=2), **parts(), spatial_scale=SCALE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvGateFusion(0, 5), "low_res_dim must be at least 1, got 0"),
        (lambda: ConvGateFusion(6, -5, "concat_raw"), "high_res_dim must be at least 1, got -5"),
        (lambda: ConvGateFusion(6, 2.5), "high_res_dim must be an int, got float"),
        (lambda: Projector(0, 8), "in_features must be at least 1, got 0"),
        (lambda: Projector(6, True), "out_features must be an int, got bool"),
    ],
)
def test_modules_name_a_width_that_is_none(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
