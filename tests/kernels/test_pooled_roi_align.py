"""`pooled_roi_align`: golden object vectors, the literal composition, gradients, compilation, bad input."""

from importlib import import_module

import hypothesis.strategies as st
import naive
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from kernel_cases import GOLDEN_TOLERANCE, PATHS, as_accurate, golden, random_boxes, relative_error
from test_roi_align import DTYPES, box_rows, in_naive_reach, options
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

from mgllava_kernels import mlp_projector, pooled_roi_align, use_backend


def levels(dtype=torch.float32, images=2, sizes=(12, 6, 3), requires_grad=False):
    return [
        torch.randn(images, channels, size, size, dtype=dtype, requires_grad=requires_grad)
        for channels, size in zip((2, 3, 4), sizes, strict=False)
    ]


@pytest.mark.parametrize("path", PATHS)
def test_golden_object_vectors_and_tokens(path):
    values = golden("object_tokens")
    features = [values[f"stage{level}"].float() for level in range(4)]
    projector = [values[f"projector.{layer}.{leaf}"] for layer in (0, 2) for leaf in ("weight", "bias")]
    with use_backend(path):
        pooled = pooled_roi_align(features, [values["boxes0"], values["boxes1"]], spatial_scale=0.25)
        tokens = mlp_projector(pooled, *projector)
    per_image = pooled.split([len(values["boxes0"]), len(values["boxes1"])])
    for image, rows in enumerate(per_image):
        for row, expected in zip(rows, values[f"pooled{image}"], strict=True):
            assert relative_error(row, expected) < GOLDEN_TOLERANCE
    expected = torch.cat([values["tokens0"], values["tokens1"]])
    assert relative_error(tokens, expected) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=30, deadline=None)
@given(boxes=box_rows, options=options, coarse=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_any_box_gives_the_naive_loop_s_values(path, boxes, options, coarse):
    features = [
        torch.randn(2, 1, 8, 6, dtype=torch.float64),
        torch.randn(2, 2, *coarse, dtype=torch.float64),
    ]
    boxes = in_naive_reach(boxes, options)
    with use_backend(path):
        output = pooled_roi_align(features, boxes, output_size=(2, 3), **options)
    expected = naive.pooled_roi_align(features, boxes, (2, 3), **options)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(boxes=box_rows, options=options, bins=st.integers(1, 9))
def test_any_box_gives_the_composition_s_values(boxes, options, bins):
    features = levels(torch.float64)
    with use_backend("reference"):
        expected = pooled_roi_align(features, boxes, output_size=bins, **options)
    output = pooled_roi_align(features, boxes, output_size=bins, **options)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)


def test_one_level_is_the_mean_of_torchvision_s_bins():
    import torchvision

    feature, boxes = torch.randn(2, 3, 20, 24), random_boxes(30, 80, images=2)
    expected = torchvision.ops.roi_align(feature, boxes, 56, 0.25).mean(dim=(2, 3))
    assert relative_error(pooled_roi_align([feature], boxes, spatial_scale=0.25), expected) < 1e-5


def test_float32_keeps_six_digits_at_published_grids():
    features = levels(sizes=(192, 96, 48), images=1)
    boxes = random_boxes(50, 768).round()
    exact = pooled_roi_align([level.double() for level in features], boxes, spatial_scale=0.25)
    assert relative_error(pooled_roi_align(features, boxes, spatial_scale=0.25), exact) < 1e-5


def test_small_boxes_far_from_the_origin_keep_their_digits():
    feature, corners = torch.randn(1, 5, 192, 192), torch.rand(200, 2) * 720
    boxes = [torch.cat([corners, corners + 4], dim=1)]
    with use_backend("reference"):
        composition = pooled_roi_align([feature], boxes, spatial_scale=0.25)
        exact = pooled_roi_align([feature.double()], boxes, spatial_scale=0.25)
    output = pooled_roi_align([feature], boxes, spatial_scale=0.25)
    assert relative_error(output, exact) < 1.3 * relative_error(composition, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("longest", [3, 30, 768])
def test_as_accurate_as_the_composition(dtype, longest):
    features = [level.to(dtype) for level in levels(sizes=(96, 48, 24), images=1)]
    boxes = random_boxes(40, 384)
    boxes[:, 3:] = torch.minimum(boxes[:, 3:], boxes[:, 1:3] + longest)
    with use_backend("reference"):
        composition = pooled_roi_align(features, boxes, spatial_scale=0.25)
        exact = pooled_roi_align([level.double() for level in features], boxes, spatial_scale=0.25)
    assert as_accurate(pooled_roi_align(features, boxes, spatial_scale=0.25), composition, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_accurate_as_the_composition_on_golden(dtype):
    values = golden("object_tokens")
    features = [values[f"stage{level}"].to(dtype) for level in range(4)]
    boxes = [values["boxes0"], values["boxes1"]]
    with use_backend("reference"):
        composition = pooled_roi_align(features, boxes, spatial_scale=0.25)
        exact = pooled_roi_align([level.double() for level in features], boxes, spatial_scale=0.25)
    assert as_accurate(pooled_roi_align(features, boxes, spatial_scale=0.25), composition, exact)


def test_low_precision_composition_upsamples_in_float32_and_casts():
    features = [level.bfloat16() for level in levels(images=1, sizes=(8, 4))]
    boxes = random_boxes(5, 8)
    upsampled = F.interpolate(features[1].float(), size=(8, 8), mode="bilinear").bfloat16()
    joined = torch.cat([features[0], upsampled], dim=1)
    with use_backend("reference"):
        output = pooled_roi_align(features, boxes, spatial_scale=1.0, output_size=4)
    from torchvision.ops import roi_align

    expected = roi_align(joined.float(), boxes, 4).bfloat16().mean(dim=(2, 3))
    assert torch.equal(output, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(path, sampling_ratio, aligned, seed):
    torch.manual_seed(seed)
    features = levels(torch.float64, sizes=(6, 3), requires_grad=True)
    boxes = torch.cat([random_boxes(3, 14, images=2, seed=seed), torch.tensor([[1.0, 3, 3, 1, 1]])])
    settings = {"spatial_scale": 0.5, "output_size": 3, "sampling_ratio": sampling_ratio, "aligned": aligned}
    with use_backend(path):
        assert gradcheck(lambda *maps: pooled_roi_align(maps, boxes, **settings), features)


def test_gradient_is_the_composition_s_and_bitwise_reproducible():
    boxes = random_boxes(40, 48, images=2)
    gradients = []
    for path in ("torch", "torch", "reference"):
        torch.manual_seed(1)
        features = levels(requires_grad=True)
        with use_backend(path):
            output = pooled_roi_align(features, boxes, spatial_scale=0.25)
        (output * torch.randn_like(output)).sum().backward()
        gradients.append([level.grad for level in features])
    for first, second, composition in zip(*gradients, strict=True):
        assert torch.equal(first, second)
        assert relative_error(first, composition) < 1e-5


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_only_needed_levels_get_a_gradient(monkeypatch, frozen):
    implementation = import_module("mgllava_kernels._torch.roi_align")
    asked = []
    run = implementation.pooled_roi_align_backward

    def spy(grad, boxes, shapes, needed, *arguments):
        asked.append(list(needed))
        return run(grad, boxes, shapes, needed, *arguments)

    monkeypatch.setattr(implementation, "pooled_roi_align_backward", spy)
    features = levels(requires_grad=True)
    for level in frozen:
        features[level].requires_grad_(False)
    boxes = random_boxes(4, 12, images=2).requires_grad_()
    output = pooled_roi_align(features, boxes, spatial_scale=1.0)
    learning = [level for level in range(3) if level not in frozen]
    assert output.requires_grad == bool(learning)
    if learning:
        output.sum().backward()
        assert asked == [learning]
        assert [level for level in range(3) if features[level].grad is not None] == learning
    assert boxes.grad is None


def test_list_of_boxes_equals_rows_and_any_order():
    features, boxes = levels(images=3), random_boxes(7, 12, images=3)
    output = pooled_roi_align(features, boxes, spatial_scale=1.0)
    per_image = [boxes[boxes[:, 0] == image, 1:] for image in range(3)]
    from_list = pooled_roi_align(features, per_image, spatial_scale=1.0)
    order = torch.cat([(boxes[:, 0] == image).nonzero().flatten() for image in range(3)])
    assert torch.equal(from_list, output[order])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("images", [0, 2])
def test_no_boxes(path, images):
    features = levels(images=images, requires_grad=True)
    with use_backend(path):
        for boxes in (torch.zeros(0, 5), [torch.zeros(0, 4)] * images):
            output = pooled_roi_align(features, boxes, spatial_scale=1.0, output_size=4)
            assert output.shape == (0, 9)
            for level, gradient in zip(features, torch.autograd.grad(output.sum(), features), strict=True):
                assert gradient.shape == level.shape
                assert not gradient.any()


def test_thousands_of_boxes_in_chunks(monkeypatch):
    implementation = import_module("mgllava_kernels._torch.roi_align")
    features, boxes = levels(requires_grad=True), random_boxes(3000, 48, images=2)
    whole = pooled_roi_align(features, boxes, spatial_scale=0.25)
    grads = torch.autograd.grad(whole.square().sum(), features)
    monkeypatch.setattr(implementation, "CHUNK_ELEMENTS", 12 * 12 * 100)
    chunked = pooled_roi_align(features, boxes, spatial_scale=0.25)
    assert relative_error(chunked, whole) < 1e-6
    for again, expected in zip(torch.autograd.grad(chunked.square().sum(), features), grads, strict=True):
        assert relative_error(again, expected) < 1e-5


def test_boxes_far_outside_are_zero_and_cost_nothing_more():
    features = levels()
    far = torch.tensor([[0, 1e6, 1e6, 2e6, 2e6], [1, -3e9, -3e9, -2e9, -1e9], [0, -1e9, 4, 1e9, 5]])
    output = pooled_roi_align(features, far, spatial_scale=0.25)
    assert not output[:2].any()
    assert output.isfinite().all()


def test_rows_by_mask_equal_rows_by_index(monkeypatch):
    """What a GPU does, where the image index is not read, here on the CPU; a wrong index gives a zero row."""
    implementation = import_module("mgllava_kernels._torch.roi_align")
    roi_align = import_module("mgllava_kernels.roi_align")

    def by_mask(image_index, images, limit):
        rows = slice(0, len(image_index))
        for image in range(images):
            yield image, rows, (image_index[rows] == image).unsqueeze(-1)

    features, boxes = levels(requires_grad=True), random_boxes(9, 12, images=2)
    expected = pooled_roi_align(features, boxes, spatial_scale=1.0)
    expected_grads = torch.autograd.grad(expected.square().sum(), features)
    expected_bins = roi_align.roi_align(features[0], boxes, 3)
    expected_bin_grads = torch.autograd.grad(expected_bins.square().sum(), features[0])
    monkeypatch.setattr(implementation, "rows_by_image", by_mask)
    monkeypatch.setattr(implementation, "_box_by_box", lambda device: False)
    output = pooled_roi_align(features, boxes, spatial_scale=1.0)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), features), expected_grads)
    bins = roi_align.roi_align(features[0], boxes, 3)
    torch.testing.assert_close(bins, expected_bins)
    torch.testing.assert_close(torch.autograd.grad(bins.square().sum(), features[0]), expected_bin_grads)

    monkeypatch.setattr(roi_align, "_check_box_values", lambda *_: None)
    boxes[0, 0], boxes[1, 0] = 2, -1
    output = pooled_roi_align(features, boxes, spatial_scale=1.0)
    assert not output[:2].any()
    torch.testing.assert_close(output[2:], expected[2:])
    assert not roi_align.roi_align(features[0], boxes, 3)[:2].any()


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path):
    features, boxes = levels(requires_grad=True), random_boxes(5, 12, images=2)
    with use_backend(path):
        plain = pooled_roi_align(features, boxes, spatial_scale=1.0, output_size=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = pooled_roi_align(features, boxes, spatial_scale=1.0, output_size=4)
            grads = torch.autograd.grad(under.sum(), features)
    assert torch.equal(plain, under)
    for gradient, expected in zip(grads, torch.autograd.grad(plain.sum(), features), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("learning", [(), (0, 1, 2), (1,)])
def test_opcheck(dtype, count, learning):
    module = import_module("mgllava_kernels.roi_align")
    features = levels(dtype)
    for level in learning:
        features[level].requires_grad_()
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    boxes = random_boxes(count, 12, images=2, dtype=coordinates)
    arguments = (1.0, 2, 3, -1, False, "torch")
    opcheck(module._pooled_roi_align, (features, boxes, *arguments))
    shapes = [size for level in features for size in level.shape]
    grad = torch.randn(count, 9, dtype=dtype)
    opcheck(module._pooled_roi_align_backward, (grad, boxes, shapes, list(learning), *arguments))


def test_four_graphs_for_any_sequence_of_box_counts():
    counter = CompileCounterWithBackend("aot_eager")
    features = levels(requires_grad=True)

    def pool(boxes):
        return pooled_roi_align(features, boxes, spatial_scale=1.0, output_size=4)

    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend=counter)
    for step, count in enumerate((3, 100, 1, 0, 7, 3000, 1, 0, 2)):
        boxes = random_boxes(count, 12, images=2, seed=step)
        output, expected = compiled(boxes), pool(boxes)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.sum(), features), torch.autograd.grad(expected.sum(), features)
        )
    assert counter.frame_count <= 4


def test_one_graph_for_any_sequence_of_unbacked_counts():
    """Of images and boxes, 0 and 1 among them, on which torch specialises sizes that are not marked."""
    counter = CompileCounterWithBackend("aot_eager")

    def pool(features, boxes):
        return pooled_roi_align(features, boxes, spatial_scale=1.0, output_size=3)

    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend=counter)
    for images, count in ((2, 4), (2, 3), (1, 1), (1, 0), (3, 1), (3, 5), (3, 0), (1, 5)):
        features = levels(images=images, requires_grad=True)
        boxes = random_boxes(count, 12, images=images)
        for tensor in (boxes, *features):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        output, expected = compiled(features, boxes), pool(features, boxes)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.sum(), features), torch.autograd.grad(expected.sum(), features)
        )
    assert counter.frame_count == 1


def test_lists_compile_without_graph_breaks():
    torch._dynamo.reset()
    features = levels()
    compiled = torch.compile(pooled_roi_align, fullgraph=True, backend="aot_eager")
    for counts in ((2, 3), (0, 1), (0, 0)):
        boxes = [random_boxes(count, 12)[:, 1:] for count in counts]
        expected = pooled_roi_align(features, boxes, spatial_scale=1.0)
        torch.testing.assert_close(compiled(features, boxes, spatial_scale=1.0), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"features": torch.zeros(1, 2, 3, 3)},
            TypeError,
            "features must be a non-empty sequence .* got Tensor",
        ),
        ({"features": []}, TypeError, "features must be a non-empty sequence"),
        ({"features": [torch.zeros(2, 8, 8)]}, ValueError, r"features\[0\] must have shape \(B, C, H, W\)"),
        (
            {"features": [torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 4, 4)]},
            ValueError,
            r"features\[1\] must have shape \(2, C, H, W\), got \(1, 1, 4, 4\)",
        ),
        (
            {"features": [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4).half()]},
            ValueError,
            r"features\[1\] must have the dtype of features\[0\], torch.float32, got torch.float16",
        ),
        (
            {"features": [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4, device="meta")]},
            ValueError,
            r"features\[1\] must be on the device of features\[0\], cpu, got meta",
        ),
        (
            {"features": [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 0)]},
            ValueError,
            r"features\[1\] must have at least one row and one column, got \(2, 1, 4, 0\)",
        ),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have shape \(K, 5\), got \(3, 4\)"),
        ({"boxes": [torch.zeros(1, 4)]}, ValueError, "boxes must hold one tensor per image, 2, got 1"),
        ({"boxes": torch.full((1, 5), torch.nan)}, ValueError, "boxes must be finite"),
        ({"boxes": torch.full((1, 5), 2.0)}, ValueError, r"image index in \[0, 2\), got 2.0"),
        ({"spatial_scale": -0.25}, ValueError, "spatial_scale must be .* got -0.25"),
        ({"output_size": 0}, ValueError, "output_size must be at least 1, got 0"),
        ({"sampling_ratio": None}, TypeError, "sampling_ratio must be an int, got NoneType"),
    ],
)
def test_bad_input(path, change, error, message):
    arguments = {"features": levels(), "boxes": torch.zeros(1, 5), "spatial_scale": 1.0} | change
    with use_backend(path), pytest.raises(error, match=message):
        pooled_roi_align(arguments.pop("features"), arguments.pop("boxes"), **arguments)
