"""`pooled_roi_align` on Triton: on the GPU where there is one, else in Triton's interpreter."""

from importlib import import_module

import hypothesis.strategies as st
import naive
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import (
    GOLDEN_TOLERANCE,
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    as_accurate,
    golden,
    random_boxes,
    relative_error,
)
from test_roi_align import box_rows, in_naive_reach, options
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from mgllava_kernels import active_backend, pooled_roi_align, use_backend
from mgllava_kernels._triton import pooled_roi_align as implementation
from mgllava_kernels._triton.box_groups import group_boxes
from mgllava_kernels._triton.launch import odd

ON_MAP = {"spatial_scale": 0.25, "output_size": 5}


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def levels(dtype=torch.float32, images=2, sizes=((9, 12), (5, 6), (3, 3)), requires_grad=False):
    """Levels of 18, 3 and 33 channels: one block and a rest, less than a block, two blocks and a rest."""
    return [
        torch.randn(images, channels, *size, dtype=dtype, device=KERNEL_DEVICE, requires_grad=requires_grad)
        for channels, size in zip((18, 3, 33), sizes, strict=False)
    ]


def boxes_on_device(count, images=2, seed=0, size=48.0, dtype=torch.float32):
    return random_boxes(count, size, images, seed, dtype).to(KERNEL_DEVICE)


def composition(features, boxes, **arguments):
    with use_backend("reference"):
        return pooled_roi_align(features, boxes, **arguments)


def exact(features, boxes, **arguments):
    return composition([level.double() for level in features], boxes, **arguments)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def configure(monkeypatch, space, *choice):
    """Launch with these block sizes, warps and stages, whatever the heuristic says."""
    config = getattr(implementation, f"_{space.lower()}_config")(*choice)
    monkeypatch.setattr(implementation, "choose", lambda *_: config)


def test_triton_is_what_runs():
    assert active_backend(levels()[0], "pooled_roi_align").name == "triton"


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_golden_object_vectors(dtype):
    values = {name: value.to(KERNEL_DEVICE) for name, value in golden("object_tokens").items()}
    features = [values[f"stage{level}"].to(dtype) for level in range(4)]
    boxes = [values["boxes0"], values["boxes1"]]
    pooled = pooled_roi_align(features, boxes, spatial_scale=0.25)
    if dtype == torch.float32:
        expected = torch.cat([values["pooled0"], values["pooled1"]])
        for row, value in zip(pooled, expected, strict=True):
            assert relative_error(row, value) < GOLDEN_TOLERANCE
    literal = composition(features, boxes, spatial_scale=0.25)
    assert as_accurate(pooled, literal, exact(features, boxes, spatial_scale=0.25))


@settings(max_examples=15, deadline=None)
@given(boxes=box_rows, options=options, coarse=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_any_box_gives_the_naive_loop_s_values(boxes, options, coarse):
    features = [
        torch.randn(2, 1, 8, 6, device=KERNEL_DEVICE),
        torch.randn(2, 2, *coarse, device=KERNEL_DEVICE),
    ]
    boxes = in_naive_reach(boxes, options).float()
    output = pooled_roi_align(features, boxes.to(KERNEL_DEVICE), output_size=(2, 3), **options)
    expected = naive.pooled_roi_align(features, boxes, (2, 3), **options)
    # Coordinates up to 2000 have 1e-4 left after the point.
    torch.testing.assert_close(output.cpu().double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("sampling_ratio", "aligned"), [(-1, False), (-1, True), (1, True), (2, False), (3, True)]
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_values_and_gradients_are_the_composition_s(dtype, sampling_ratio, aligned):
    features = levels(dtype, requires_grad=True)
    boxes = boxes_on_device(20)
    boxes[:4, 1:] = boxes[:4, 1:] * 3 - 48  # across the edges
    boxes[4, 1:] += 1000  # far outside
    boxes[5, 1:] = boxes[5, [3, 4, 1, 2]]  # inverted
    boxes[6, 3:] = boxes[6, 1:3]  # of no size
    arguments = ON_MAP | {"sampling_ratio": sampling_ratio, "aligned": aligned}
    output = pooled_roi_align(features, boxes, **arguments)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, features, upstream)
    literal = composition(features, boxes, **arguments)
    wide = [level.detach().double().requires_grad_() for level in features]
    true = composition(wide, boxes.double(), **arguments)
    assert as_accurate(output, literal, true)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    literal_gradients = torch.autograd.grad(literal, features, upstream)
    true_gradients = torch.autograd.grad(true, wide, upstream.double())
    assert as_accurate(flat(gradients), flat(literal_gradients), flat(true_gradients))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("longest", [3, 30, 768])
def test_as_accurate_as_the_composition(dtype, longest):
    features = levels(dtype, images=1, sizes=((48, 48), (24, 24), (12, 12)))
    boxes = boxes_on_device(16, images=1, size=192.0)
    boxes[:, 3:] = torch.minimum(boxes[:, 3:], boxes[:, 1:3] + longest)
    output = pooled_roi_align(features, boxes, spatial_scale=0.25)
    literal = composition(features, boxes, spatial_scale=0.25)
    assert as_accurate(output, literal, exact(features, boxes, spatial_scale=0.25))


FORWARD_CHOICES = [(16, 16, 16, 8, 1, 4, 1), (16, 32, 32, 32, 64, 4, 2), (64, 16, 16, 16, 4, 4, 1)]
BACKWARD_CHOICES = [(16, 16, 16, 8, 1, 4, 1), (16, 32, 32, 32, 16, 4, 2), (64, 16, 16, 16, 4, 4, 1)]


@pytest.mark.parametrize("choice", range(3))
def test_block_sizes_change_nothing(monkeypatch, choice):
    """Several slots a picture and one; one part of a level and many; blocks wider and narrower than maps."""
    features, boxes = levels(requires_grad=True), boxes_on_device(40)
    expected = composition(features, boxes, **ON_MAP)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, features, upstream)
    configure(monkeypatch, "FORWARD", *FORWARD_CHOICES[choice])
    output = pooled_roi_align(features, boxes, **ON_MAP)
    assert relative_error(output, expected) < 1e-6
    configure(monkeypatch, "BACKWARD", *BACKWARD_CHOICES[choice])
    for gradient, value in zip(
        torch.autograd.grad(output, features, upstream), expected_gradients, strict=True
    ):
        assert relative_error(gradient, value) < 1e-6


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_two_runs_have_identical_bits(dtype):
    features, boxes = levels(dtype, requires_grad=True), boxes_on_device(30)
    runs = []
    for _ in range(2):
        output = pooled_roi_align(features, boxes, **ON_MAP)
        runs.append([output, *torch.autograd.grad(output.float().sin().sum(), features)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_a_picture_s_result_does_not_depend_on_its_neighbours():
    features, boxes = levels(images=3), boxes_on_device(12, images=3)
    together = pooled_roi_align(features, boxes, **ON_MAP)
    for image in range(3):
        own = boxes[:, 0] == image
        alone = boxes[own].clone()
        alone[:, 0] = 0
        single = pooled_roi_align([level[image : image + 1] for level in features], alone, **ON_MAP)
        assert relative_error(together[own], single) < 1e-6


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "every other channel", "expanded", "one column", "odd address"]
)
def test_strides(layout):
    """No layout is copied, none is read wrongly."""
    features = levels()
    if layout == "channels_last":
        features = [level.contiguous(memory_format=torch.channels_last) for level in features]
    elif layout == "transposed":
        features = [level.transpose(2, 3) for level in features]
    elif layout == "every other channel":
        features = [level[:, ::2] for level in features]
    elif layout == "expanded":
        features = [level[:1].expand(2, -1, -1, -1) for level in features]
    elif layout == "one column":
        features = [level[..., :1] for level in features]
    else:
        features = [level.flatten()[1:-1][: level[:1].numel() - 18].view(1, -1, 1, 3) for level in features]
    images = features[0].shape[0]
    boxes = boxes_on_device(6, images=images)
    output = pooled_roi_align(features, boxes, **ON_MAP)
    expected = composition([level.contiguous() for level in features], boxes, **ON_MAP)
    assert relative_error(output, expected) < 1e-6


def test_strided_gradients_from_above():
    features, boxes = levels(requires_grad=True), boxes_on_device(7)
    output = pooled_roi_align(features, boxes, **ON_MAP)
    upstream = torch.randn(output.shape[::-1], device=KERNEL_DEVICE).T
    for given_gradient in (upstream, torch.ones(1, 1, device=KERNEL_DEVICE).expand_as(output)):
        expected = torch.autograd.grad(composition(features, boxes, **ON_MAP), features, given_gradient)
        gradients = torch.autograd.grad(output, features, given_gradient, retain_graph=True)
        for gradient, value in zip(gradients, expected, strict=True):
            assert relative_error(gradient, value) < 1e-6


@pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_of_any_dtype(box_dtype):
    features, boxes = levels(), boxes_on_device(6).to(box_dtype)
    expected = composition(features, boxes, **ON_MAP)
    assert relative_error(pooled_roi_align(features, boxes, **ON_MAP), expected) < 1e-6


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (40, 0), (1, 1)])
def test_any_count_of_boxes_per_picture(counts):
    features = levels(requires_grad=True)
    boxes = [boxes_on_device(count)[:, 1:] for count in counts]
    output = pooled_roi_align(features, boxes, **ON_MAP)
    expected = composition(features, boxes, **ON_MAP)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(output.square().sum(), features)
    for gradient, level in zip(gradients, features, strict=True):
        assert gradient.shape == level.shape
        for image, count in enumerate(counts):
            assert bool(gradient[image].any()) == bool(count)


def test_no_pictures_and_no_channels():
    none = levels(images=0, requires_grad=True)
    output = pooled_roi_align(none, torch.zeros(0, 5, device=KERNEL_DEVICE), **ON_MAP)
    assert output.shape == (0, 54)
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), none)] == [x.shape for x in none]
    empty = torch.zeros(2, 0, 4, 4, device=KERNEL_DEVICE, requires_grad=True)
    mixed = [levels()[0], empty, levels()[2]]
    boxes = boxes_on_device(5)
    output = pooled_roi_align(mixed, boxes, **ON_MAP)
    with use_backend("torch"):
        assert relative_error(output, pooled_roi_align(mixed, boxes, **ON_MAP)) < 1e-6
    assert torch.autograd.grad(output.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("needed", [[0], [2], [0, 2], [1]])
def test_only_needed_levels_are_written(needed):
    shapes = [list(level.shape) for level in levels()]
    grad, boxes = torch.randn(9, 54, device=KERNEL_DEVICE), boxes_on_device(9)
    arguments = (0.25, 5, 5, -1, False)
    every = implementation.pooled_roi_align_backward(grad, boxes, shapes, [0, 1, 2], *arguments)
    some = implementation.pooled_roi_align_backward(grad, boxes, shapes, needed, *arguments)
    for level, gradient in zip(needed, some, strict=True):
        assert torch.equal(gradient, every[level])


def test_every_element_is_written(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        features, boxes = levels(requires_grad=True), boxes_on_device(9)
        boxes[:, 0] = 1  # picture 0 has none
        output = pooled_roi_align(features, boxes, **ON_MAP)
        assert torch.empty(3).isnan().all(), "empty memory is not poisoned"
        assert output.isfinite().all()
        for gradient in torch.autograd.grad(output.sum(), features):
            assert gradient.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_of_no_picture_are_zero_and_change_no_other():
    """Of a GPU tensor only a synchronisation could see the index; on the CPU the public op refuses it."""
    features, boxes = levels(requires_grad=True), boxes_on_device(9)
    arguments = (0.25, 5, 5, -1, False)
    expected = implementation.pooled_roi_align(features, boxes[4:], *arguments)
    for row, index in enumerate((2.0, -1.0, float("nan"), 1e30)):
        boxes[row, 0] = index
    output = implementation.pooled_roi_align(features, boxes, *arguments)
    assert torch.equal(output[:4], torch.zeros_like(output[:4]))
    assert relative_error(output[4:], expected) < 1e-6
    shapes = [list(level.shape) for level in features]
    grad = torch.randn_like(output)
    gradients = implementation.pooled_roi_align_backward(grad, boxes, shapes, [0, 1, 2], *arguments)
    alone = implementation.pooled_roi_align_backward(grad[4:], boxes[4:], shapes, [0, 1, 2], *arguments)
    for gradient, value in zip(gradients, alone, strict=True):
        assert relative_error(gradient, value) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_coordinates_that_are_no_numbers_stay_within_memory(value):
    """Maps lie between guards of infinity: a read beside them would spread."""
    shapes = [level.shape for level in levels()]
    features = []
    for shape in shapes:
        size = shape.numel()
        buffer = torch.full((3 * size,), torch.inf, device=KERNEL_DEVICE)
        buffer[size : 2 * size] = 1
        features.append(buffer[size : 2 * size].view(shape))
    boxes = boxes_on_device(8)
    for row in range(4):
        boxes[row, row + 1] = value
    output = implementation.pooled_roi_align(features, boxes, 0.25, 5, 5, -1, False)
    assert output[4:].isfinite().all()
    assert not output[:4].isinf().any()


@pytest.mark.parametrize("far", [1e30, 3e38])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_the_farthest_finite_coordinates(far, sampling_ratio):
    features = levels(requires_grad=True)
    boxes = torch.tensor([[0, far, far, far, far], [1, -far, -far, far, far], [0, -far, 0, far, 9]])
    boxes = boxes.to(KERNEL_DEVICE)
    arguments = ON_MAP | {"sampling_ratio": sampling_ratio}
    output = pooled_roi_align(features, boxes, **arguments)
    with use_backend("torch"):
        expected = pooled_roi_align(features, boxes, **arguments)
    torch.testing.assert_close(output, expected)
    for gradient in torch.autograd.grad(output.sum(), features):
        assert gradient.isfinite().all()


def test_packed_integers_are_never_specialised():
    """Triton compiles a kernel anew for an integer of a tuple that is 1 or a multiple of 16."""
    for packed in odd(*range(100), 2**31, 2**40):
        assert packed > 1
        assert packed % 2 == 1


@pytest.mark.parametrize(("count", "images"), [(0, 1), (1, 1), (70, 3), (130, 200)])
def test_boxes_are_sorted_by_picture(count, images):
    boxes = torch.rand(count, 5, device=KERNEL_DEVICE)
    boxes[:, 0] = torch.randint(-1, images + 2, (count,)).to(boxes)
    if count > 2:
        boxes[2, 0] = torch.nan
    order, offsets = group_boxes(boxes, images)
    index = boxes[:, 0]
    index = torch.where((index > -1) & (index < images), index.trunc(), images).long()
    assert torch.equal(order.long(), index.argsort(stable=True))
    first = [(index < image).sum().item() for image in range(images + 2)]
    assert offsets.tolist() == first


@pytest.mark.parametrize(("dtype", "learning"), [(torch.float16, ()), (torch.float32, (1,))])
def test_opcheck(dtype, learning):
    module = import_module("mgllava_kernels.roi_align")
    features = levels(dtype, sizes=((3, 4), (2, 2)))
    for level in learning:
        features[level].requires_grad_()
    boxes = boxes_on_device(2)
    arguments = (0.25, 2, 3, -1, False, "triton")
    opcheck(module._pooled_roi_align, (features, boxes, *arguments))
    shapes = [size for level in features for size in level.shape]
    grad = torch.randn(2, 21, dtype=dtype, device=KERNEL_DEVICE)
    opcheck(module._pooled_roi_align_backward, (grad, boxes, shapes, list(learning), *arguments))


@pytest.mark.parametrize(
    "counts",
    [
        [(3, 2), (40, 2), (1, 2), (0, 2), (7, 2)],
        [(3, 2), (40, 3), (7, 4), (5, 2)],
    ],
)
def test_four_graphs_for_any_sequence_of_counts(counts):
    """Of (boxes, pictures). torch itself specialises each of the two on 0 and on 1."""
    counter = CompileCounterWithBackend("aot_eager")

    def pool(feature, boxes):
        return pooled_roi_align([feature], boxes, **ON_MAP)

    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend=counter)
    for step, (count, images) in enumerate(counts):
        feature = torch.randn(images, 3, 4, 5, device=KERNEL_DEVICE, requires_grad=True)
        boxes = boxes_on_device(count, images=images, seed=step, size=16.0)
        output, expected = compiled(feature, boxes), composition([feature], boxes, **ON_MAP)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        torch.autograd.grad(output.sum(), feature)
    assert counter.frame_count <= 4


def test_autocast_changes_nothing():
    features, boxes = levels(requires_grad=True), boxes_on_device(5)
    plain = pooled_roi_align(features, boxes, **ON_MAP)
    with torch.autocast(KERNEL_DEVICE, dtype=torch.bfloat16):
        under = pooled_roi_align(features, boxes, **ON_MAP)
        gradients = torch.autograd.grad(under.sum(), features)
    assert torch.equal(plain, under)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain.sum(), features), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: captures a CUDA graph")
def test_replays_in_a_cuda_graph():
    features, boxes = levels(torch.bfloat16), boxes_on_device(12)
    pooled_roi_align(features, boxes, **ON_MAP)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = pooled_roi_align(features, boxes, **ON_MAP)
    boxes.copy_(boxes_on_device(12, seed=5))
    graph.replay()
    assert torch.equal(output, pooled_roi_align(features, boxes, **ON_MAP))


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: 5 GB of features")
def test_more_elements_than_an_int32_counts():
    feature = torch.zeros(3, 48, 4096, 4096, dtype=torch.float16, device=KERNEL_DEVICE)
    feature[2, 47] = 1
    boxes = torch.tensor([[2.0, 10, 10, 90, 90]], device=KERNEL_DEVICE)
    output = pooled_roi_align([feature], boxes, spatial_scale=1.0)
    assert output[0, 47] == 1
    assert not output[0, :47].any()
