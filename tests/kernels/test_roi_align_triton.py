"""`roi_align` in Triton, forward and backward: values, gradients, memory, edge cases, the public op."""

from importlib import import_module
from itertools import product

import hypothesis.strategies as st
import naive
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from kernel_cases import KERNEL_DEVICE, KERNEL_DTYPES, as_accurate, random_boxes, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from mgllava_kernels import reference, use_backend
from mgllava_kernels import roi_align as public_roi_align
from mgllava_kernels._torch import roi_align as torch_path
from mgllava_kernels._triton import box_groups
from mgllava_kernels._triton import roi_align as kernels
from mgllava_kernels._triton.launch import INTERPRETER, Target

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


def gpu(capability: int, shared_memory: int = 232448) -> Target:
    return Target("cuda", capability, "GPU", 132, shared_memory, 32)


def tensor(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=KERNEL_DEVICE).reshape(-1, 5)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(KERNEL_DEVICE, dtype)


def expected(input, boxes, *options):
    """torchvision's values and a gradient in float64 at float32 boxes, with the output's gradient."""
    dtype, input = input.dtype, input.detach().double().cpu().requires_grad_()
    output = reference.roi_align(input, boxes.cpu().double(), *options)
    grad = torch.randn(output.shape).to(dtype).double()
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


def boxes_of_all_kinds(size: float) -> torch.Tensor:
    """Random ones inside two pictures of `size`, across their edges, far outside; inverted; of no size."""
    boxes = random_boxes(10, size, images=2, seed=3)
    boxes[2:4, 1:] = boxes[2:4, 1:] * 3 - size
    boxes[4, 1:] += 1000
    boxes[5, 1:] -= 1e6
    boxes[6] = boxes[6, [0, 3, 4, 1, 2]]
    boxes[7] = boxes[7, [0, 3, 2, 1, 4]]
    boxes[8, 3:] = boxes[8, 1:3]
    boxes[9, 3] = boxes[9, 1]
    return boxes


@pytest.mark.parametrize(
    ("sampling_ratio", "aligned", "dtype"),
    [
        *product((-1, 1, 2, 3), (False, True), (torch.float32,)),
        *((ratio, ratio % 2 == 1, torch.float16) for ratio in (-1, 1, 2, 3)),
    ],
)
def test_values_and_gradients_of_random_boxes(sampling_ratio, aligned, dtype):
    input, boxes = randn(2, 3, 7, 12, dtype=dtype), boxes_of_all_kinds(24)
    options = (0.5, 2, 3, sampling_ratio, aligned)
    tolerance = 3e-6 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    output = kernels.roi_align(input, boxes.to(KERNEL_DEVICE), *options)
    assert output.dtype == dtype
    assert output.is_contiguous()
    loop = naive.roi_align(input.cpu(), boxes, (2, 3), 0.5, sampling_ratio, aligned)
    assert relative_error(output.cpu(), loop) < tolerance

    # torchvision's reach: no inverted boxes of adaptive samples. Those have none, hence no gradient.
    adaptive = aligned and sampling_ratio <= 0
    known = (boxes[:, 3:] >= boxes[:, 1:3]).all(1) if adaptive else torch.ones(len(boxes), dtype=torch.bool)
    assert known.sum() >= 8
    assert not output.cpu()[~known].any()
    leaf = input.double().cpu().requires_grad_()
    exact = torchvision.ops.roi_align(leaf, boxes[known].double(), (2, 3), *options[:1], *options[3:])
    assert relative_error(output.cpu()[known], exact.detach()) < tolerance
    grad = torch.randn(output.shape).to(dtype)
    (gradient,) = torch.autograd.grad(exact, leaf, grad[known].double())
    actual = kernels.roi_align_backward(
        grad.to(KERNEL_DEVICE), boxes.to(KERNEL_DEVICE), input.shape, *options
    )
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert relative_error(actual.cpu(), gradient) < tolerance


def test_one_bin():
    check(randn(2, 3, 7, 13), tensor(BOXES[:4]), 0.5, 1, 1, -1, False)


def test_seven_bins_of_several_blocks():
    check(randn(2, 6, 11, 17), tensor(BOXES[:3]), 0.5, 7, 7, 2, False)


def test_more_bins_than_a_block_of_weights():
    check(randn(1, 2, 5, 40), tensor([[0, 3, 1, 75, 9]]), 0.5, 9, 20, -1, False)


def test_bins_of_many_samples():
    check(randn(2, 2, 7, 13), tensor(BOXES[:3] + INVERTED), 1.0, 2, 1, 67, True)


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


def nearest_tf32(value: torch.Tensor) -> torch.Tensor:
    """PTX's cvt.rna.tf32.f32 of finite values: 11 bits, to nearest, ties away from zero."""
    return ((value.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_rounding_to_tf32():
    ulp = 2.0**-10
    halfway = torch.tensor([1 + ulp / 2, 1 + ulp / 2 - 2**-23, 1 + 3 * ulp / 2, 2 - ulp / 2, 0.0, 3.0])
    expected = torch.tensor([1 + ulp, 1.0, 1 + 2 * ulp, 2.0, 0.0, 3.0])
    assert torch.equal(nearest_tf32(halfway), expected)
    assert torch.equal(nearest_tf32(-halfway), -expected)
    value = torch.randn(10_000) * 2.0 ** torch.randint(-60, 60, (10_000,))
    mantissa, exponent = torch.frexp(value.double())
    scaled = mantissa * 2**11
    expected = torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor(), exponent - 11)
    assert torch.equal(nearest_tf32(value).double(), expected)
    rest = value - nearest_tf32(value)
    assert ((nearest_tf32(value) + nearest_tf32(rest) - value).abs() <= value.abs() * 2.0**-22).all()


def tensor_core_product(equation: str, a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    """What a matmul of this `input_precision` makes of float32 operands, but for its order of summation."""
    high_a, high_b = nearest_tf32(a), nearest_tf32(b)
    result = torch.einsum(equation, high_a, high_b)
    if precision == "tf32x3":
        result += torch.einsum(equation, nearest_tf32(a - high_a), high_b)
        result += torch.einsum(equation, high_a, nearest_tf32(b - high_b))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_of_the_matmul(dtype):
    """The operands of both kernels, multiplied as on a GPU of the precision chosen there: no kernel runs."""
    input, boxes = torch.randn(2, 8, 32, 40).to(dtype), random_boxes(40, 140, images=2)
    options = (0.25, 7, 7, 2, False)
    leaf = input.clone().requires_grad_()
    composition = reference.roi_align(leaf, boxes, *options)
    grad = torch.randn_like(composition)
    (composed,) = torch.autograd.grad(composition, leaf, grad)
    leaf = input.double().requires_grad_()
    exact = reference.roi_align(leaf, boxes.double(), *options)
    (exact_gradient,) = torch.autograd.grad(exact, leaf, grad.double())

    image = boxes[:, 0].long()
    rows, columns = (
        torch_path.axis_weights(
            torch_path.axis_samples(
                boxes[:, low], boxes[:, low + 2], *options[:2], *options[3:], per_bin=True
            ),
            size,
        )
        for low, size in ((2, 32), (1, 40))
    )
    weighted = torch.einsum("kiy,kcyx->kcix", rows, input[image].float())
    weighted_grad = torch.einsum("kiy,kcij->kcyj", rows, grad.float())

    def errors(precision: str) -> tuple[float, float]:
        """Of values and gradients, as multiples of the composition's."""
        output = tensor_core_product("kcix,kjx->kcij", weighted, columns, precision).to(dtype)
        boxes_gradients = tensor_core_product("kcyj,kjx->kcyx", weighted_grad, columns, precision)
        gradient = torch.zeros(input.shape).index_add_(0, image, boxes_gradients).to(dtype)
        return (
            relative_error(output, exact) / relative_error(composition, exact),
            relative_error(gradient, exact_gradient) / relative_error(composed, exact_gradient),
        )

    chosen = {capability: kernels._precision(dtype, gpu(capability)) for capability in (80, 90, 100)}
    assert set(chosen.values()) == {"tf32" if dtype == torch.bfloat16 else "tf32x3"}
    assert kernels._precision(dtype, INTERPRETER) == "ieee"
    assert kernels._precision(dtype, Target("hip", "gfx942", "MI300X", 304, 65536, 64)) == "ieee"
    assert max(errors(chosen[90])) < 1.1
    low, high = {torch.float32: (100, 500), torch.float16: (1.5, 2), torch.bfloat16: (0.9, 1.1)}[dtype]
    for error in errors("tf32"):
        assert low < error < high


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_two_runs_have_identical_bits(dtype):
    boxes = random_boxes(40, 32).to(KERNEL_DEVICE)
    input, grad = randn(1, 3, 4, 8, dtype=dtype), randn(40, 3, 1, 2, dtype=dtype)
    options = (0.25, 1, 2, 2, False)
    for run in (
        # One program sums up a value, of one box; a gradient's sum goes through all boxes.
        lambda: kernels.roi_align(input, boxes[:8], *options),
        lambda: kernels.roi_align_backward(grad, boxes, input.shape, *options),
    ):
        assert torch.equal(run(), run())


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
    monkeypatch.setattr(kernels, "choose", lambda space, _, *arguments: space.heuristic(gpu(90), *arguments))
    check(randn(2, 70, 10, 70), tensor(BOXES[:4]), 0.5, 2, 18, 2, False)


def test_heuristics_and_candidates_fit():
    for target in (
        gpu(80, shared_memory=166912),
        gpu(90),
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
    known = tensor(BOXES[1:5])
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
def test_coordinates_that_are_not_finite(guarded, sampling_ratio, aligned):
    """Beyond 1e18 cells coordinates count as 1e18. With a NaN a row is finite, and no other row changes."""
    whole = [4.0, 8.0, 12.0, 16.0]
    rows = {
        bad: [[*whole[:i], bad, *whole[i + 1 :]] for i in range(4)] for bad in (torch.inf, 3e38, torch.nan)
    }
    far = tensor([[1, *row] for row in [*rows[torch.inf], *rows[3e38], [-torch.inf] * 4, [3, 2, 9, 11]]])
    nan = tensor([[0, *row] for row in [*rows[torch.nan], [torch.nan] * 4]])
    boxes = torch.cat([nan, far])
    input = randn(2, 2, 6, 9)
    options = (0.5, 1, 2, sampling_ratio, aligned)
    output = kernels.roi_align(input, boxes, *options)
    assert output[: len(nan)].abs().max() <= input.abs().max()
    expected = torch_path.roi_align(input, far, *options)
    torch.testing.assert_close(output[len(nan) :], expected, atol=1e-5, rtol=1e-5)
    grad = randn(*output.shape)
    gradient = kernels.roi_align_backward(grad, boxes, input.shape, *options)
    assert gradient[0].isfinite().all()
    expected = torch_path.roi_align_backward(grad[len(nan) :], far, input.shape, *options)
    torch.testing.assert_close(gradient[1], expected[1], atol=1e-5, rtol=1e-5)


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
    boxes = tensor(BOXES[:3])
    results = []
    for function in (public_roi_align, torchvision.ops.roi_align):
        torch.manual_seed(1)
        input = randn(2, 3, 9, 12).requires_grad_()
        with use_backend("triton"):
            output = function(input, boxes, (2, 3), 0.5, 2)
            (output * randn(3, 3, 2, 3)).sum().backward()
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


@pytest.mark.parametrize(
    "counts", [[(3, 2), (5, 2), (1, 2), (0, 2), (2, 2)], [(3, 2), (2, 3), (4, 4), (2, 2)]]
)
def test_four_graphs_for_any_sequence_of_counts(counts):
    """Of (boxes, pictures). torch itself specialises each of the two on 0 and on 1."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(public_roi_align, fullgraph=True, backend=counter)
    for step, (count, images) in enumerate(counts):
        input = randn(images, 2, 4, 5).requires_grad_()
        boxes = random_boxes(count, 8, images=images, seed=step).to(KERNEL_DEVICE)
        with use_backend("triton"):
            output = compiled(input, boxes, (1, 2), 0.5)
        exact = reference.roi_align(input, boxes, 0.5, 1, 2, -1, False)
        torch.testing.assert_close(output, exact)
        (gradient,) = torch.autograd.grad(output.sum(), input)
        torch.testing.assert_close(gradient, *torch.autograd.grad(exact.sum(), input))
    assert counter.frame_count <= 4


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: captures a CUDA graph")
def test_replays_in_a_cuda_graph():
    input, boxes = randn(2, 16, 20, 24, dtype=torch.bfloat16), random_boxes(12, 80, images=2).cuda()
    grad = randn(12, 16, 7, 7, dtype=torch.bfloat16)
    options = (0.25, 7, 7, 2, False)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            kernels.roi_align(input, boxes, *options),
            kernels.roi_align_backward(grad, boxes, input.shape, *options),
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    boxes.copy_(random_boxes(12, 80, images=2, seed=5))
    graph.replay()
    for actual, expected in zip(captured, run(), strict=True):
        assert torch.equal(actual, expected)


def test_every_kernel_is_launched_on_the_device_of_the_tensors(monkeypatch):
    """Of a second GPU, which only pretends to be there."""
    current, launches = [], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.name, *current))

    names = ("_axis_weights_kernel", "_roi_align_kernel", "_tile_lists_kernel", "_roi_align_backward_kernel")
    for name in names:
        monkeypatch.setattr(kernels, name, Kernel(name))
    monkeypatch.setattr(box_groups, "_group_boxes_kernel", Kernel("_group_boxes_kernel"))
    monkeypatch.setattr(kernels, "target_of", lambda device: gpu(90))
    monkeypatch.setattr(kernels, "feature_layout", lambda features: ("nchw", 1))
    monkeypatch.setattr(torch.cuda, "device", Device)
    device, options = torch.device("cuda:1"), (0.25, 7, 7, 2, False)
    with FakeTensorMode():
        input, boxes = torch.empty(2, 3, 8, 8, device=device), torch.empty(4, 5, device=device)
        output = kernels.roi_align(input, boxes, *options)
        assert output.device == device
        assert kernels.roi_align_backward(output, boxes, input.shape, *options).device == device
    weights, forward, lists, backward = names
    expected = [weights, forward, weights, "_group_boxes_kernel", lists, backward]
    assert launches == [(name, device) for name in expected]
