"""`roi_align`: torchvision's semantics, gradients, registration, bad input."""

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from kernel_cases import PATHS, as_accurate, random_boxes, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

from mgllava_kernels import pooled_roi_align, roi_align, use_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Whole and half numbers put samples exactly on the edges at -1 and at the size of the map.
coordinate = st.one_of(
    st.integers(-60, 80).map(lambda value: value / 2),
    st.floats(-40, 60, width=32, allow_subnormal=False),
    st.floats(-2000, 2000, width=32, allow_subnormal=False),
)
box_rows = st.lists(st.tuples(st.integers(0, 1), *(coordinate,) * 4), max_size=5).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
)
options = st.fixed_dictionaries(
    {
        "spatial_scale": st.sampled_from([0.25, 0.5, 1.0, 1 / 3]),
        "sampling_ratio": st.sampled_from([-1, 0, 1, 2, 3]),
        "aligned": st.booleans(),
    }
)


def in_naive_reach(boxes: torch.Tensor, settings: dict) -> torch.Tensor:
    """Boxes whose adaptive samples a Python loop can visit."""
    length = (boxes[:, 3:] - boxes[:, 1:3]).abs().amax(1) * settings["spatial_scale"]
    return boxes[length < 60] if settings["sampling_ratio"] <= 0 else boxes


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(boxes=box_rows, size=st.tuples(st.integers(1, 9), st.integers(1, 9)), options=options)
def test_any_box_gives_the_naive_loop_s_values(path, boxes, size, options):
    input = torch.randn(2, 2, *size, dtype=torch.float64)
    boxes = in_naive_reach(boxes, options)
    with use_backend(path):
        output = roi_align(input, boxes, (2, 3), **options)
    torch.testing.assert_close(output, naive.roi_align(input, boxes, (2, 3), **options), atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(boxes=box_rows, size=st.tuples(st.integers(1, 20), st.integers(1, 20)), options=options)
def test_any_box_gives_torchvision_s_values(boxes, size, options):
    input = torch.randn(2, 3, *size, dtype=torch.float64)
    with use_backend("reference"):
        expected = roi_align(input, boxes, (7, 5), **options)
    output = roi_align(input, boxes, (7, 5), **options)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 7])
def test_samples_on_and_across_the_edges(path, sampling_ratio, aligned):
    """Samples exactly at -1 and at the size count, those beyond do not; several lie between -1 and 0."""
    input = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    starts_and_ends = [
        (-3, 5),
        (6, 14),
        (-6, 3),
        (3, 20),
        (-2.5, 5.5),
        (6.5, 14.5),
        (-20, 30),
        (7.5, 8.5),
        (5, -3),
    ]
    boxes = torch.tensor([[0, a, a, b, b] for a, b in starts_and_ends], dtype=torch.float64)
    with use_backend(path):
        for size in ((2, 2), (1, 4)):
            output = roi_align(input, boxes, size, 1.0, sampling_ratio, aligned)
            expected = naive.roi_align(input, boxes, size, 1.0, sampling_ratio, aligned)
            torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
            pooled = pooled_roi_align(
                [input],
                boxes,
                spatial_scale=1.0,
                output_size=size,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
            )
            torch.testing.assert_close(pooled, expected.mean(dim=(2, 3)), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_reference_is_torchvision(aligned, sampling_ratio):
    input = torch.randn(2, 3, 16, 12)
    boxes = random_boxes(20, 48, images=2)
    with use_backend("reference"):
        output = roi_align(input, boxes, 7, 0.25, sampling_ratio, aligned)
    expected = torchvision.ops.roi_align(input, boxes, 7, 0.25, sampling_ratio, aligned)
    assert torch.equal(output, expected)


def test_torchvision_detection_shape_in_float32():
    input = torch.randn(2, 16, 50, 76)
    boxes = random_boxes(300, 200, images=2)
    expected = torchvision.ops.roi_align(input, boxes, 7, 0.25, 2)
    assert relative_error(roi_align(input, boxes, 7, 0.25, 2), expected) < 1e-5


def test_thousands_of_boxes_in_chunks(monkeypatch):
    from mgllava_kernels._torch import roi_align as implementation

    input = torch.randn(2, 2, 10, 10)
    boxes = random_boxes(3000, 40, images=2)
    expected = torchvision.ops.roi_align(input, boxes, 3, 0.25)
    monkeypatch.setattr(implementation, "CHUNK_ELEMENTS", 3 * 2 * 10 * 7)
    assert relative_error(roi_align(input, boxes, 3, 0.25), expected) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("box_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_mix_of_dtypes(path, dtype, box_dtype):
    input = torch.randn(2, 3, 8, 8, dtype=dtype)
    boxes = random_boxes(6, 8, images=2).to(box_dtype)
    with use_backend(path):
        output = roi_align(input, boxes, 3)
    assert output.dtype == dtype
    expected = naive.roi_align(input, boxes.double(), (3, 3))
    # Coordinates up to 8 cost three of the dtype's bits.
    assert relative_error(output, expected) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_as_accurate_as_the_composition(dtype, seed):
    input = torch.randn(2, 8, 40, 40, dtype=dtype)
    boxes = random_boxes(60, 160, images=2, seed=seed)
    with use_backend("reference"):
        composition, exact = roi_align(input, boxes, 7, 0.25), roi_align(input.double(), boxes, 7, 0.25)
    assert as_accurate(roi_align(input, boxes, 7, 0.25), composition, exact)


@pytest.mark.parametrize("path", PATHS)
def test_list_of_boxes_equals_rows(path):
    input = torch.randn(3, 2, 8, 8)
    boxes = random_boxes(5, 8)
    rows = boxes.clone()
    rows[:2, 0], rows[2:, 0] = 0, 2
    with use_backend(path):
        from_list = roi_align(input, [boxes[:2, 1:], boxes[:0, 1:], boxes[2:, 1:].double()], 3)
        assert torch.equal(from_list, roi_align(input, rows, 3))
        assert torch.equal(from_list, roi_align(input, (boxes[:2, 1:], boxes[:0, 1:], boxes[2:, 1:]), 3))


@pytest.mark.parametrize("path", PATHS)
def test_order_of_boxes_is_kept(path):
    input = torch.randn(3, 2, 8, 8)
    boxes = random_boxes(9, 8, images=3)
    with use_backend(path):
        together = roi_align(input, boxes, 3)
        for row, box in zip(together, boxes, strict=True):
            torch.testing.assert_close(row[None], roi_align(input, box[None], 3))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_gradcheck(path, sampling_ratio, aligned, seed):
    torch.manual_seed(seed)
    input = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    if seed % 2:
        input = input.transpose(2, 3)
    boxes = torch.cat([random_boxes(3, 14, images=2, seed=seed), torch.tensor([[1.0, 3, 3, 1, 1]])])
    with use_backend(path):
        assert gradcheck(lambda x: roi_align(x, boxes, (2, 3), 0.5, sampling_ratio, aligned), input)


def test_gradient_is_torchvision_s_and_bitwise_reproducible():
    boxes = random_boxes(50, 80, images=2)
    gradients = []
    for function in (roi_align, roi_align, torchvision.ops.roi_align):
        torch.manual_seed(1)
        input = torch.randn(2, 4, 20, 24, requires_grad=True)
        (function(input, boxes, 7, 0.25) * torch.randn(50, 4, 7, 7)).sum().backward()
        gradients.append(input.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert relative_error(gradients[0], gradients[2]) < 1e-5


def test_nothing_handed_in_is_changed():
    input = torch.randn(1, 2, 6, 6, requires_grad=True)
    boxes = random_boxes(4, 6)
    output = roi_align(input, boxes, 2)
    grad = torch.randn_like(output)
    kept = [value.clone() for value in (input, boxes, grad)]
    output.backward(grad)
    for value, copy in zip((input, boxes, grad), kept, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("images", [0, 2])
def test_no_boxes(path, images):
    input = torch.randn(images, 3, 5, 5, requires_grad=True)
    with use_backend(path):
        for boxes in (torch.zeros(0, 5), [torch.zeros(0, 4)] * images):
            output = roi_align(input, boxes, (2, 3))
            assert output.shape == (0, 3, 2, 3)
            (gradient,) = torch.autograd.grad(output.sum(), input)
            assert gradient.shape == input.shape
            assert not gradient.any()


@pytest.mark.parametrize("box_by_box", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_no_channels(monkeypatch, path, box_by_box):
    from mgllava_kernels._torch import roi_align as implementation

    monkeypatch.setattr(implementation, "_box_by_box", lambda device: box_by_box)
    none, some = torch.zeros(2, 0, 5, 5, requires_grad=True), torch.randn(2, 3, 4, 4)
    boxes = random_boxes(4, 5, images=2)
    with use_backend(path):
        output = roi_align(none, boxes, (2, 3))
        pooled = pooled_roi_align([none], boxes, spatial_scale=1.0)
        mixed = pooled_roi_align([none, some], boxes, spatial_scale=1.0)
    assert output.shape == (4, 0, 2, 3)
    assert pooled.shape == (4, 0)
    assert mixed.shape == (4, 3)
    for result in (output, pooled, mixed):
        assert torch.autograd.grad(result.sum(), none)[0].shape == none.shape


FAR_BOXES = [[-1, -1, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1], [0, 0, 1, 1], [-1, 0, 1, 1e-38], [1, 1, -1, -1]]


@pytest.mark.parametrize("far", [1e30, 1e38, 3e38])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_the_farthest_finite_coordinates(far, scale, aligned, sampling_ratio):
    """No sample but at most one of an adaptive grid of countless ones lies on the map."""
    input = torch.ones(1, 2, 6, 6, requires_grad=True)
    boxes = torch.tensor([[0, *(far * value for value in box)] for box in FAR_BOXES])
    paths = ("torch",) if sampling_ratio < 0 else PATHS  # torchvision counts adaptive samples as C ints
    for path in paths:
        with use_backend(path):
            output = roi_align(input, boxes, 2, scale, sampling_ratio, aligned)
            pooled = pooled_roi_align(
                [input],
                boxes,
                spatial_scale=scale,
                output_size=2,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
            )
        for result in (output, pooled, torch.autograd.grad(output.sum() + pooled.sum(), input)[0]):
            torch.testing.assert_close(result, torch.zeros_like(result), atol=1e-15, rtol=0)


def test_numbers_of_numpy():
    input, boxes = torch.randn(1, 2, 8, 8), random_boxes(3, 16)
    expected = roi_align(input, boxes, 3, 0.5, 2)
    assert torch.equal(roi_align(input, boxes, np.int64(3), np.float32(0.5), np.int64(2)), expected)
    assert torch.equal(roi_align(input, boxes, (np.int32(3), 3), np.float64(0.5), 2), expected)


def test_few_boxes_cost_what_they_touch():
    """400 GB of map that lie in one number: nothing of its size is made."""
    maps = torch.full((1,), 3.0).expand(1, 256, 20_000, 20_000)
    with use_backend("torch"):
        bins = roi_align(maps, torch.tensor([[0.0, 10, 10, 30, 40], [0, 900, 19_000, 960, 19_990]]), 7)
    torch.testing.assert_close(bins, torch.full((2, 256, 7, 7), 3.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format):
    input = torch.randn(2, 3, 8, 7)
    boxes = random_boxes(5, 8, images=2)
    expected = torchvision.ops.roi_align(input, boxes, 3)
    output = roi_align(input.to(memory_format=memory_format), boxes, 3)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(roi_align(input[:, ::2], boxes, 3), expected[:, ::2])


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path):
    input = torch.randn(1, 2, 8, 8, requires_grad=True)
    boxes = random_boxes(5, 8)
    with use_backend(path):
        plain = roi_align(input, boxes, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = roi_align(input, boxes, 3)
            (gradient,) = torch.autograd.grad(under.sum(), input)
    assert under.dtype == torch.float32
    assert torch.equal(plain, under)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), input)[0])


def ops():
    from importlib import import_module

    return import_module("mgllava_kernels.roi_align")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, count, requires_grad):
    input = torch.randn(2, 3, 6, 5, dtype=dtype, requires_grad=requires_grad)
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    boxes = random_boxes(count, 6, images=2, dtype=coordinates)
    arguments = (0.5, 2, 3, -1, False, "torch")
    opcheck(ops()._roi_align, (input, boxes, *arguments))
    grad = torch.randn(count, 3, 2, 3, dtype=dtype)
    opcheck(ops()._roi_align_backward, (grad, boxes, list(input.shape), *arguments))


def test_four_graphs_for_any_sequence_of_box_counts():
    counter = CompileCounterWithBackend("aot_eager")
    input = torch.randn(2, 3, 6, 5, requires_grad=True)

    def align(boxes):
        return roi_align(input, boxes, (2, 3), 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(align, fullgraph=True, backend=counter)
    for step, count in enumerate((3, 100, 1, 0, 7, 3000, 1, 0, 2)):
        boxes = random_boxes(count, 12, images=2, seed=step)
        output, expected = compiled(boxes), align(boxes)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.sum(), input), torch.autograd.grad(expected.sum(), input)
        )
    assert counter.frame_count <= 4


def test_one_graph_for_any_sequence_of_unbacked_counts():
    """Of images and boxes, 0 and 1 among them, on which torch specialises sizes that are not marked."""
    counter = CompileCounterWithBackend("aot_eager")

    def align(input, boxes):
        return roi_align(input, boxes, (2, 3), 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(align, fullgraph=True, backend=counter)
    for images, count in ((2, 4), (1, 1), (1, 0), (3, 1), (3, 5), (3, 0), (1, 5)):
        input = torch.randn(images, 3, 6, 5, requires_grad=True)
        boxes = random_boxes(count, 12, images=images)
        for tensor in (boxes, input):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        output, expected = compiled(input, boxes), align(input, boxes)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.sum(), input), torch.autograd.grad(expected.sum(), input)
        )
    assert counter.frame_count == 1


IMAGE, BOXES = torch.zeros(2, 3, 8, 8), torch.zeros(1, 5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, BOXES, 2), TypeError, "input must be a tensor, got NoneType"),
        ((IMAGE[0], BOXES, 2), ValueError, r"input must have shape \(B, C, H, W\), got \(3, 8, 8\)"),
        ((IMAGE.long(), BOXES, 2), ValueError, "input must be float16, .* got torch.int64"),
        ((IMAGE, BOXES[:, 1:], 2), ValueError, r"boxes must have shape \(K, 5\), got \(1, 4\)"),
        ((IMAGE, BOXES.long(), 2), ValueError, "boxes must be float16, .* got torch.int64"),
        (
            (IMAGE, BOXES.to("meta"), 2),
            ValueError,
            "boxes must be on the device of the features, cpu, got meta",
        ),
        ((IMAGE, None, 2), TypeError, r"boxes must be a tensor \(K, 5\) or a list .* got NoneType"),
        ((IMAGE, [BOXES[:, 1:]], 2), ValueError, "boxes must hold one tensor per image, 2, got 1"),
        ((IMAGE, [BOXES, BOXES], 2), ValueError, r"boxes\[0\] must have shape \(L, 4\), got \(1, 5\)"),
        ((IMAGE[:, :, :0], BOXES, 2), ValueError, r"input must have at least one row .*, got \(2, 3, 0, 8\)"),
        ((IMAGE[..., :0], BOXES, 2), ValueError, r"input must have at least one row .*, got \(2, 3, 8, 0\)"),
        ((IMAGE, BOXES, 2, True), TypeError, "spatial_scale must be a number, got bool"),
        ((IMAGE, BOXES, True), TypeError, "output_size must be an int, got bool"),
        ((IMAGE, BOXES, 2, 1.0, np.bool_(True)), TypeError, "sampling_ratio must be an int, got bool"),
        ((IMAGE, BOXES, 0), ValueError, "output_size must be at least 1, got 0"),
        ((IMAGE, BOXES, (2, -1)), ValueError, r"output_size must be at least 1, got \(2, -1\)"),
        ((IMAGE, BOXES, (2, 2, 2)), ValueError, "output_size must be an int or a pair"),
        ((IMAGE, BOXES, 2.0), TypeError, "output_size must be an int, got float"),
        ((IMAGE, BOXES, 2, 0.0), ValueError, "spatial_scale must be finite and greater than 0, got 0.0"),
        ((IMAGE, BOXES, 2, -1.0), ValueError, "spatial_scale must be .* got -1.0"),
        ((IMAGE, BOXES, 2, float("nan")), ValueError, "spatial_scale must be .* got nan"),
        (
            (IMAGE, BOXES, 2, 1e300),
            ValueError,
            "spatial_scale must be finite and greater than 0, got 1e\\+300",
        ),
        ((IMAGE, BOXES, 2**31), ValueError, "output_size must fit in 32 bits, got 2147483648"),
        ((IMAGE, BOXES, 2, "1"), TypeError, "spatial_scale must be a number, got str"),
        ((IMAGE, BOXES, 2, 1.0, 0.5), TypeError, "sampling_ratio must be an int, got float"),
        ((IMAGE, BOXES + torch.nan, 2), ValueError, r"boxes must be finite, got \[nan.* in row 0"),
        ((IMAGE, BOXES + torch.inf, 2), ValueError, r"boxes must be finite, got \[inf.* in row 0"),
        ((IMAGE, BOXES + 2, 2), ValueError, r"image index in \[0, 2\), got 2.0 in row 0"),
        ((IMAGE, BOXES - 1, 2), ValueError, r"image index in \[0, 2\), got -1.0 in row 0"),
    ],
)
def test_bad_input(path, arguments, error, message):
    with use_backend(path), pytest.raises(error, match=message):
        roi_align(*arguments)
