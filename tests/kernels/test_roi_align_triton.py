"""`roi_align` in Triton, forward and backward: values, gradients, memory, edge cases, the public op."""

from importlib import import_module

import hypothesis.strategies as st
import naive
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from kernel_cases import KERNEL_DEVICE, KERNEL_DTYPES, as_accurate, random_boxes, relative_error
from torch.library import opcheck

from mgllava_kernels import reference, use_backend
from mgllava_kernels import roi_align as public_roi_align
from mgllava_kernels._torch import roi_align as torch_path
from mgllava_kernels._triton import roi_align as kernels
from mgllava_kernels._triton.launch import Target

GUARD = 4096

# Inside, across every edge, beyond every edge, thin, smaller than a pixel, on whole numbers.
BOXES = [
    [0, 3.2, 4.1, 20.7, 15.3],
    [1, -9.3, -7.9, 11.2, 40.0],
    [1, 30.1, 12.4, 70.6, 33.3],
    [0, 100.0, 100.0, 140.0, 120.0],
    [0, -60.0, -50.0, -40.0, -45.0],
    [1, 5.5, 2.5, 5.6, 14.5],
    [1, 7.1, 7.2, 7.3, 7.35],
    [0, 0.0, 0.0, 16.0, 8.0],
]
INVERTED = [[0, 25.3, 14.2, 6.1, 3.7], [1, 20.0, 1.0, 10.0, 12.0]]

coordinate = st.one_of(
    st.integers(-60, 80).map(lambda value: value / 2),
    st.floats(-40, 60, width=32, allow_subnormal=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
)


def tensor(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=KERNEL_DEVICE).reshape(-1, 5)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(KERNEL_DEVICE, dtype)


def expected(input, boxes, *options):
    """torchvision's values and a gradient in float64 at float32 boxes, with the output's gradient."""
    input = input.detach().double().cpu().requires_grad_()
    output = reference.roi_align(input, boxes.cpu().double(), *options)
    grad = torch.randn(output.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(output, input, grad)
    return output.detach(), grad, gradient


def check(input, boxes, *options, tolerance=3e-6):
    """Forward and backward against torchvision."""
    output, grad, gradient = expected(input, boxes, *options)
    actual = kernels.roi_align(input, boxes, *options)
    assert actual.dtype == input.dtype
    assert actual.is_contiguous()
    assert relative_error(actual.cpu(), output) < tolerance
    grad = grad.to(input)
    actual = kernels.roi_align_backward(grad, boxes, input.shape, *options)
    assert actual.dtype == input.dtype
    assert actual.is_contiguous()
    assert relative_error(actual.cpu(), gradient) < tolerance


@pytest.mark.parametrize(
    ("sampling_ratio", "aligned"), [(-1, False), (-1, True), (1, True), (2, False), (3, True)]
)
def test_torchvision_s_values_and_gradients(sampling_ratio, aligned):
    # torchvision has values for inverted boxes where the number of samples is given.
    boxes = tensor(BOXES + (INVERTED if sampling_ratio > 0 else []))
    check(randn(2, 3, 7, 13), boxes, 0.5, 3, 5, sampling_ratio, aligned)


def test_one_bin():
    check(randn(2, 3, 7, 13), tensor(BOXES), 0.5, 1, 1, -1, False)


def test_seven_bins_of_several_blocks():
    check(randn(2, 6, 11, 17), tensor(BOXES[:3]), 0.5, 7, 7, 2, False)


def test_more_bins_than_a_block_of_weights():
    check(randn(1, 2, 5, 40), tensor([[0, 3, 1, 75, 9]]), 0.5, 9, 20, -1, False)


def test_bins_of_many_samples():
    check(randn(2, 2, 7, 13), tensor(BOXES[:3] + INVERTED), 1.0, 2, 1, 67, True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_naive_loop_s_values(dtype):
    input = randn(2, 3, 8, 11, dtype=dtype)
    boxes = tensor(BOXES + INVERTED)
    output = kernels.roi_align(input, boxes, 0.5, 2, 3, 2, False)
    loop = naive.roi_align(input.cpu(), boxes.cpu(), (2, 3), 0.5, 2, False)
    assert relative_error(output.cpu(), loop) < 4 * torch.finfo(dtype).eps


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    boxes=st.lists(st.tuples(st.integers(0, 1), *(coordinate,) * 4), min_size=2, max_size=4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 18)),
    scale=st.sampled_from([0.25, 0.5, 1 / 3]),
    sampling_ratio=st.sampled_from([-1, 0, 1, 2, 3]),
    aligned=st.booleans(),
)
def test_any_box(boxes, size, scale, sampling_ratio, aligned):
    """Against the same algebra on torch in float32, so that samples fall on the same side of the edges."""
    input, boxes = randn(2, 3, *size), tensor(boxes)
    options = (scale, 2, 3, sampling_ratio, aligned)
    output = torch_path.roi_align(input, boxes, *options)
    torch.testing.assert_close(kernels.roi_align(input, boxes, *options), output, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(output)
    gradient = torch_path.roi_align_backward(grad, boxes, input.shape, *options)
    actual = kernels.roi_align_backward(grad, boxes, input.shape, *options)
    torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(-1, False), (2, True)])
def test_samples_on_and_across_the_edges(sampling_ratio, aligned):
    """Samples exactly at -1 and at the size count, those beyond do not; several lie between -1 and 0."""
    ends = [(-3, 5), (6, 14), (-6, 3), (3, 20), (-2.5, 5.5), (6.5, 14.5), (-20, 30), (7.5, 8.5)]
    boxes = tensor([[0, a, a, b, b] for a, b in ends])
    check(randn(1, 2, 8, 8), boxes, 1.0, 2, 2, sampling_ratio, aligned)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_as_accurate_as_the_composition(dtype):
    input = randn(2, 3, 16, 24, dtype=dtype)
    boxes = random_boxes(10, 80, images=2).to(KERNEL_DEVICE)
    options = (0.25, 2, 3, 2, False)
    leaf = input.clone().requires_grad_()
    composition = reference.roi_align(leaf, boxes, *options)
    grad = torch.randn_like(composition)
    (composed,) = torch.autograd.grad(composition, leaf, grad)
    leaf = input.double().requires_grad_()
    exact = reference.roi_align(leaf, boxes.double(), *options)
    (exact_gradient,) = torch.autograd.grad(exact, leaf, grad.double())

    assert as_accurate(kernels.roi_align(input, boxes, *options), composition.detach(), exact.detach())
    gradient = kernels.roi_align_backward(grad, boxes, input.shape, *options)
    assert as_accurate(gradient, composed, exact_gradient)


def test_gradients_have_the_same_bits_every_time():
    boxes = random_boxes(8, 40, images=2).to(KERNEL_DEVICE)
    grad = randn(8, 3, 2, 2)
    first, second = (
        kernels.roi_align_backward(grad, boxes, (2, 3, 10, 12), 0.25, 2, 2, 2, False) for _ in range(2)
    )
    assert torch.equal(first, second)


def views(input: torch.Tensor) -> dict[str, torch.Tensor]:
    """`input` in other memory."""
    b, c, h, w = input.shape
    embedded = input.new_full((b, c + 2, h + 1, 2 * w + 3), torch.nan)
    embedded[:, 1:-1, 1:, 1:-2:2] = input
    return {
        "channels_last": input.to(memory_format=torch.channels_last),
        "batch last": input.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "columns first": input.transpose(2, 3).contiguous().transpose(2, 3),
        "part of a larger map": embedded[:, 1:-1, 1:, 1:-2:2],
        "off by one element": torch.cat([input.new_zeros(1), input.flatten()])[1:].view_as(input),
    }


def test_any_strides():
    dtype = torch.float16  # eight elements in 16 bytes, more than a stride that is off could hide
    input, boxes = randn(2, 8, 5, 16, dtype=dtype), tensor(BOXES[:2])
    options = (0.5, 1, 2, 2, False)
    output = kernels.roi_align(input, boxes, *options)
    for name, view in views(input).items():
        assert torch.equal(kernels.roi_align(view, boxes, *options), output), name
    same = input[:, :1].expand(-1, 8, -1, -1)
    assert torch.equal(
        kernels.roi_align(same, boxes, *options), kernels.roi_align(same.contiguous(), boxes, *options)
    )
    wide = torch.cat([boxes, boxes], dim=1)[:, :5]
    assert torch.equal(kernels.roi_align(input, wide, *options), output)

    grad = randn(2, 8, 1, 2, dtype=dtype)
    gradient = kernels.roi_align_backward(grad, boxes, input.shape, *options)
    for name, view in views(grad).items():
        assert torch.equal(kernels.roi_align_backward(view, boxes, input.shape, *options), gradient), name
    one = grad[:1, :1, :1, :1].expand(2, 8, 1, 2)
    assert torch.equal(
        kernels.roi_align_backward(one, boxes, input.shape, *options),
        kernels.roi_align_backward(one.contiguous(), boxes, input.shape, *options),
    )


@pytest.mark.parametrize("strides", [(2**31, 48, 8, 1), (48, 2**31 - 96, 8, 1), (48, 96, 8, 2**28)])
def test_offsets_beyond_32_bits(strides):
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=KERNEL_DEVICE)
    input = memory.as_strided((2, 2, 6, 8), strides).copy_(randn(2, 2, 6, 8))
    boxes = tensor([[1, 1, 1, 12, 9], [0, 3, 2, 9, 20]])
    options = (0.5, 2, 2, 2, False)
    assert torch.equal(
        kernels.roi_align(input, boxes, *options), kernels.roi_align(input.contiguous(), boxes, *options)
    )


def test_blocks_of_a_gpu(monkeypatch):
    """The interpreter runs with small blocks; here with those that the heuristics choose for a GPU."""
    target = Target("cuda", 90, "H100", 132, 232448, 32)
    monkeypatch.setattr(kernels, "choose", lambda space, _, *arguments: space.heuristic(target, *arguments))
    check(randn(2, 70, 10, 70), tensor(BOXES[:4]), 0.5, 2, 18, 2, False)


def test_heuristics_and_candidates_fit():
    for target in (
        Target("cuda", 80, "A100", 108, 166912, 32),
        Target("cuda", 90, "H100", 132, 232448, 32),
        Target("hip", "gfx942", "MI300X", 304, 65536, 64),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for size in (1, 7, 56):
                sizes = {"channels": 256, "output_height": size, "output_width": size, "channels_last": 0}
                for space in (kernels.FORWARD, kernels.BACKWARD):
                    heuristic = space.heuristic(target, dtype, sizes, 512)
                    candidates = list(space.candidates(target, dtype, sizes, 512))
                    assert len(candidates) == len(set(candidates))
                    assert space.shared_memory(heuristic, dtype) < target.shared_memory
                    for config in candidates:
                        assert [name for name, _ in config.blocks] == [name for name, _ in heuristic.blocks]


@pytest.fixture
def guarded(monkeypatch):
    """Uninitialised memory is NaN or a huge number and lies between guards, which are checked at the end."""
    buffers = []
    empty = torch.empty

    def poison(dtype):
        return torch.nan if dtype.is_floating_point else 2**30

    def allocate(*shape, dtype, device):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = empty(shape.numel() + 2 * GUARD, dtype=dtype, device=device).fill_(poison(dtype))
        buffer[:GUARD] = buffer[-GUARD:] = 77
        buffers.append(buffer)
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    class Torch:
        """torch, as the kernels' module sees it."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, dtype, device):
            return allocate(*shape, dtype=dtype, device=device)

        def empty_like(self, like, dtype):
            return allocate(*like.shape, dtype=dtype, device=like.device)

    monkeypatch.setattr(kernels, "torch", Torch())
    yield
    assert len(buffers) >= 5
    for buffer in buffers:
        assert (buffer[:GUARD] == 77).all()
        assert (buffer[-GUARD:] == 77).all()


UNKNOWN = [[-1, 1, 1, 9, 9], [2, 1, 1, 9, 9], [torch.nan, 1, 1, 9, 9], [1e30, 1, 1, 9, 9]]


@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_rows_of_no_picture_are_zero_and_every_element_is_written(guarded, sampling_ratio):
    padded = torch.full((2 * GUARD + 2 * 3 * 7 * 13,), torch.nan, device=KERNEL_DEVICE)
    input = padded[GUARD:-GUARD].view(2, 3, 7, 13).copy_(randn(2, 3, 7, 13))
    known = tensor(BOXES)
    boxes = torch.cat([tensor(UNKNOWN[:2]), known, tensor(UNKNOWN[2:])])
    options = (0.5, 3, 2, sampling_ratio, False)
    output = kernels.roi_align(input, boxes, *options)
    assert not output[:2].any()
    assert not output[-2:].any()
    exact, grad, gradient = expected(input, known, *options)
    assert relative_error(output[2:-2].cpu(), exact) < 1e-6
    grad = torch.nn.functional.pad(grad, (0, 0, 0, 0, 0, 0, 2, 2), value=torch.nan).to(input)
    actual = kernels.roi_align_backward(grad, boxes, input.shape, *options)
    assert relative_error(actual.cpu(), gradient) < 1e-6


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(-1, True), (2, False)])
def test_coordinates_that_are_not_finite_stay_in_memory(guarded, sampling_ratio, aligned):
    bad = [torch.nan, torch.inf, -torch.inf, 3e38]
    boxes = tensor([[0, *(a if i == j else 4.0 * (j + 1) for j in range(4))] for a in bad for i in range(4)])
    boxes = torch.cat([boxes, tensor([[1, 3, 2, 9, 11], [1, *(torch.nan,) * 4]])])
    input = randn(2, 2, 6, 9)
    options = (0.5, 1, 2, sampling_ratio, aligned)
    output = kernels.roi_align(input, boxes, *options)
    row = torch_path.roi_align(input, boxes[-2:-1], *options)
    torch.testing.assert_close(output[-2:-1], row)
    gradient = kernels.roi_align_backward(randn(*output.shape), boxes, input.shape, *options)
    assert gradient.shape == input.shape


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (0, 3, 5, 6), (2, 0, 5, 6)])
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_do(shape, count):
    options = (0.5, 2, 3, 2, False)
    boxes = tensor(BOXES[:count])
    output = kernels.roi_align(randn(*shape), boxes, *options)
    assert output.shape == (count, shape[1], 2, 3)
    gradient = kernels.roi_align_backward(torch.zeros_like(output), boxes, shape, *options)
    assert gradient.shape == shape
    assert not gradient.any()
    if shape[0] == 0:
        assert not output.any()


@pytest.mark.parametrize("box_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_public_op_takes_any_mix_of_dtypes(dtype, box_dtype):
    input = randn(2, 2, 6, 6, dtype=dtype).requires_grad_()
    boxes = random_boxes(3, 6, images=2).to(KERNEL_DEVICE, box_dtype)
    with use_backend("triton"):
        output = public_roi_align(input, boxes, 2)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert output.dtype == gradient.dtype == dtype
    exact = naive.roi_align(input.detach().cpu(), boxes.double().cpu(), (2, 2))
    assert relative_error(output.detach().cpu(), exact) < 8 * torch.finfo(dtype).eps


def test_public_op_is_torchvision_s_with_its_gradient():
    boxes = tensor(BOXES)
    results = []
    for function in (public_roi_align, torchvision.ops.roi_align):
        torch.manual_seed(1)
        input = randn(2, 3, 9, 12).requires_grad_()
        with use_backend("triton"):
            output = function(input, boxes, (2, 3), 0.5, 2)
            (output * randn(8, 3, 2, 3)).sum().backward()
        results.append((output.detach(), input.grad))
    for actual, other in zip(*results, strict=True):
        assert relative_error(actual, other) < 1e-6


def test_autocast_changes_nothing():
    input, boxes = randn(1, 2, 8, 8).requires_grad_(), tensor(BOXES[:1])
    with use_backend("triton"):
        plain = public_roi_align(input, boxes, 2)
        with torch.autocast(KERNEL_DEVICE, dtype=torch.bfloat16):
            under = public_roi_align(input, boxes, 2)
            (gradient,) = torch.autograd.grad(under.sum(), input)
    assert under.dtype == torch.float32
    assert torch.equal(plain, under)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), input)[0])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("count", [0, 1])
def test_opcheck(dtype, count):
    ops = import_module("mgllava_kernels.roi_align")
    input = randn(1, 2, 4, 5, dtype=dtype).requires_grad_()
    boxes = random_boxes(count, 6).to(KERNEL_DEVICE)
    arguments = (0.5, 1, 2, 2, False, "triton")
    opcheck(ops._roi_align, (input, boxes, *arguments))
    grad = randn(count, 2, 1, 2, dtype=dtype)
    opcheck(ops._roi_align_backward, (grad, boxes, list(input.shape), *arguments))
