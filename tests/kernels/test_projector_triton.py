"""Projector ops on Triton: on the GPU where there is one, else in Triton's interpreter."""

from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module

import naive
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernel_cases import KERNEL_DEVICE, KERNEL_DTYPES, as_accurate, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from mgllava_kernels import (
    Projector,
    active_backend,
    configs,
    grouped_mlp_projector,
    linear_gelu,
    mlp_projector,
    project_groups,
    use_backend,
)
from mgllava_kernels._triton import matmul, products
from mgllava_kernels._triton import projector as implementation
from mgllava_kernels._triton.launch import INTERPRETER, Target, half, odd, target_of
from mgllava_kernels._triton.product_configs import TMA, product_config
from mgllava_kernels.aot import TARGETS

SPACES = (implementation.LINEAR, implementation.INPUT_GRADIENT, implementation.WEIGHT_GRADIENT)


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def group(*tokens, width=40, hidden=24, out=36, dtype=torch.float32, requires_grad=False):
    """x, w1, b1, w2, b2."""
    shapes = ((*tokens, width), (hidden, width), (hidden,), (out, hidden), (out,))
    values = [torch.randn(shape, device=KERNEL_DEVICE) / max(shape[-1], 1) ** 0.5 for shape in shapes]
    return [value.to(dtype).requires_grad_(requires_grad) for value in values]


def columns(groups):
    return [list(column) for column in zip(*groups, strict=True)]


def composition(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def double(values):
    return [value.detach().double().requires_grad_() for value in values]


@contextmanager
def forced(tile=(32, 32, 32), route=implementation.TRITON, **choices):
    """Every product of the block is launched with this tile and these choices."""
    config = product_config(target_of(torch.device(KERNEL_DEVICE)), tile, 4, 1, **choices)
    config = implementation.routed(config, route)
    with ExitStack() as stack:
        for space in SPACES:
            stack.enter_context(configs.force(space.kernel, config))
        yield


def test_triton_is_what_runs():
    for op in ("linear_gelu", "mlp_projector", "grouped_mlp_projector"):
        assert active_backend(group(1)[0], op).name == "triton"


def test_values_of_the_naive_loop():
    values, other = group(7, width=5, hidden=6, out=4), group(3, width=2, hidden=3, out=8)
    outputs = grouped_mlp_projector(*columns([values, other]))
    for output, arguments in zip(outputs, (values, other), strict=True):
        expected = naive.mlp_projector(*(value.double().cpu() for value in arguments))
        assert relative_error(output.cpu(), expected) < 1e-6


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("tokens", [(90, 17), (1, 1)])
def test_as_accurate_as_the_composition(dtype, tokens):
    """Values and every gradient, of two token sets of different widths, the second of odd sizes."""
    groups = [
        group(tokens[0], width=64, hidden=96, out=48, dtype=dtype, requires_grad=True),
        group(tokens[1], width=35, hidden=53, out=37, dtype=dtype, requires_grad=True),
    ]
    outputs = grouped_mlp_projector(*columns(groups))
    for output, values in zip(outputs, groups, strict=True):
        wide = double(values)
        literal, exact = composition(*values), composition(*wide)
        assert as_accurate(output, literal, exact)
        grad = torch.randn_like(output)
        actual = torch.autograd.grad(output, values, grad, retain_graph=True)
        wanted = torch.autograd.grad(exact, wide, grad.double())
        for triple in zip(actual, torch.autograd.grad(literal, values, grad), wanted, strict=True):
            assert as_accurate(*triple)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("sizes", [(70, 48, 64), (33, 21, 35)])
def test_linear_gelu_is_as_accurate_as_the_composition(dtype, sizes):
    tokens, hidden, width = sizes
    values = group(tokens, width=width, hidden=hidden, dtype=dtype, requires_grad=True)[:3]
    wide = double(values)
    output, literal, exact = linear_gelu(*values), F.gelu(F.linear(*values)), F.gelu(F.linear(*wide))
    assert as_accurate(output, literal, exact)
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, values, grad)
    wanted = torch.autograd.grad(exact, wide, grad.double())
    for triple in zip(actual, torch.autograd.grad(literal, values, grad), wanted, strict=True):
        assert as_accurate(*triple)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 5)])
def test_any_number_of_axes(shape):
    values = group(*shape, requires_grad=True)
    output, hidden = mlp_projector(*values), linear_gelu(*values[:3])
    assert (output.shape, hidden.shape) == ((*shape, 36), (*shape, 24))
    expected = composition(*values)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(output.square().sum(), values)
    wanted = torch.autograd.grad(expected.square().sum(), values)
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(hidden.square().sum(), values[:3])
    wanted = torch.autograd.grad(F.gelu(F.linear(*values[:3])).square().sum(), values[:3])
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)


def test_a_width_of_zero():
    values = group(5, width=0, requires_grad=True)
    output = mlp_projector(*values)
    expected = composition(*values)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.sum(), values)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), values))


def test_no_object_tokens_give_zero_gradients():
    images, objects = group(40, requires_grad=True), group(0, width=72, requires_grad=True)
    outputs = grouped_mlp_projector(*columns([images, objects]))
    assert outputs[1].shape == (0, 36)
    gradients = torch.autograd.grad(sum(output.sum() for output in outputs), images + objects)
    expected = torch.autograd.grad(composition(*images).sum(), images)
    torch.testing.assert_close(gradients[:5], expected, rtol=1e-5, atol=1e-5)
    assert all(not value.any() for value in gradients[5:])


# Tokens (2, 12, 40) in different places of memory.
TOKEN_LAYOUTS = {
    "map": lambda randn: randn(2, 40, 12).transpose(1, 2),
    "one map": lambda randn: randn(40, 24).T.view(2, 12, 40),
    "every other": lambda randn: randn(4, 12, 80)[::2, :, ::2],
    "odd address": lambda randn: randn(2 * 12 * 40 + 1)[1:].view(2, 12, 40),
    "expanded": lambda randn: randn(1, 1, 40).expand(2, 12, 40),
    "one value": lambda randn: randn(1, 1, 1).expand(2, 12, 40),
}


def assert_close_to_the_largest(actual, expected):
    """Within 1e-5 of the largest value: the terms of sums over tokens cancel, more so when tokens are equal."""
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
def test_strided_operands(layout):
    x = TOKEN_LAYOUTS[layout](partial(torch.randn, device=KERNEL_DEVICE))
    _, w1, b1, w2, b2 = group(1)
    w1 = w1.T.contiguous().T
    b1 = torch.stack([b1, b1], dim=1)[:, 0]
    values = [x.detach().requires_grad_(), *(value.requires_grad_() for value in (w1, b1, w2, b2))]
    expected = composition(*values)
    output = mlp_projector(*values)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for upstream in (
        torch.randn(36, 12, 2, device=KERNEL_DEVICE).permute(2, 1, 0),
        torch.ones_like(x[..., :1]),
    ):
        upstream = upstream.expand_as(output)
        gradients = torch.autograd.grad(output, values, upstream, retain_graph=True)
        wanted = torch.autograd.grad(expected, values, upstream, retain_graph=True)
        assert_close_to_the_largest(gradients, wanted)


def test_maps_are_not_copied(monkeypatch):
    """One map (C, H·W) read as tokens: the operand of the product is the map itself."""
    layouts = []

    def spy(kernel, programs, device, args, **options):
        layouts.append((options["A_LAYOUT"], args[0][0].data_ptr()))

    monkeypatch.setattr(products, "launch_product", spy)
    map_ = torch.randn(40, 24, device=KERNEL_DEVICE)
    _, w1, b1, _, _ = group(1)
    implementation.linear_gelu(map_.T, w1, b1, False)
    assert layouts == [("column", map_.data_ptr())]


CHOICES = (
    {"tile": (32, 64, 32), "group": 2, "programs": 1},
    {"tile": (64, 32, 16), "group": 1, "programs": 2},
    {"descriptors": TMA},
    {"tile": (128, 128, 32), "descriptors": TMA, "programs": 1},
    {"route": implementation.TORCH},
)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_config_computes_the_same(choice):
    """More tiles than programs and fewer, pieces of tiles, descriptors and pointers, torch's own products."""
    groups = [group(70, requires_grad=True), group(9, width=72, requires_grad=True)]
    flat = [value for values in groups for value in values]
    expected = [composition(*values) for values in groups]
    upstream = [torch.randn_like(value) for value in expected]
    with forced(**choice):
        outputs = grouped_mlp_projector(*columns(groups))
        hidden = linear_gelu(*groups[0][:3])
        gradients = torch.autograd.grad(outputs, flat, upstream)
        of_hidden = torch.autograd.grad(hidden.square().sum(), groups[0][:3])
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, flat, upstream)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(F.gelu(F.linear(*groups[0][:3])).square().sum(), groups[0][:3])
    torch.testing.assert_close(of_hidden, wanted, rtol=1e-4, atol=1e-5)


def test_long_sums_are_cut_into_parts(monkeypatch):
    """Few tiles and many tokens: the weights' gradients are summed in parts."""
    parts = []
    run = products.launch_product

    def spy(kernel, programs, device, args, **options):
        parts.append([partial.shape[0] for partial in args[6] if options["EPILOGUE"] == "none"])
        run(kernel, programs, device, args, **options)

    monkeypatch.setattr(products, "launch_product", spy)
    values = group(300, width=16, hidden=8, out=12, requires_grad=True)
    with forced((32, 32, 16)):
        gradients = torch.autograd.grad(mlp_projector(*values).sum(), values)
    assert any(min(cut, default=0) > 1 for cut in parts)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(composition(*values).sum(), values), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("learning", [(0,), (1,), (2,), (3,), (4,), (1, 2, 3, 4), (2, 4), (0, 3)])
def test_only_needed_gradients(learning):
    values, other = group(33), group(5, width=8, requires_grad=True)
    for index in learning:
        values[index].requires_grad_()
    wanted_of = [values[index] for index in learning]
    outputs = grouped_mlp_projector(*columns([values, other]))
    gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), wanted_of)
    expected = torch.autograd.grad(composition(*values).square().sum(), wanted_of)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    if max(learning) < 3:
        gradients = torch.autograd.grad(linear_gelu(*values[:3]).square().sum(), wanted_of)
        expected = torch.autograd.grad(F.gelu(F.linear(*values[:3])).square().sum(), wanted_of)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_two_runs_have_identical_bits(dtype):
    groups = [
        group(300, dtype=dtype, requires_grad=True),
        group(9, width=72, dtype=dtype, requires_grad=True),
    ]
    flat = [value for values in groups for value in values]
    runs = []
    for _ in range(2):
        outputs = grouped_mlp_projector(*columns(groups))
        runs.append(
            [*outputs, *torch.autograd.grad(sum(output.float().sin().sum() for output in outputs), flat)]
        )
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_every_element_is_written(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        groups = [group(33, requires_grad=True), group(0, width=72, requires_grad=True)]
        outputs = grouped_mlp_projector(*columns(groups))
        flat = [value for values in groups for value in values]
        gradients = torch.autograd.grad(sum(output.sum() for output in outputs), flat)
        assert torch.empty(3).isnan().all(), "empty memory is not poisoned"
        assert all(value.isfinite().all() for value in (*outputs, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


def test_layers_of_several_sets_are_one_launch(monkeypatch):
    launched = []
    run = products.launch_product

    def spy(kernel, programs, device, args, **options):
        launched.append((options["EPILOGUE"], len(args[0])))
        run(kernel, programs, device, args, **options)

    monkeypatch.setattr(products, "launch_product", spy)
    groups = [group(9, requires_grad=True), group(1, width=72, requires_grad=True)]
    outputs = grouped_mlp_projector(*columns(groups))
    assert launched == [("bias_gelu", 2), ("bias", 2)]
    launched.clear()
    sum(output.sum() for output in outputs).backward()
    assert launched == [("gelu_backward", 2), ("none", 4), ("none", 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_opcheck(dtype, shape):
    module = import_module("mgllava_kernels.projector")
    values = group(*shape, width=5, hidden=6, out=4, dtype=dtype, requires_grad=True)
    other = group(2, width=3, hidden=6, out=4, dtype=dtype)
    opcheck(module._linear_gelu, (*values[:3], True, "triton"))
    opcheck(module._grouped_mlp_projector, (*columns([values, other]), True, "triton"))


@pytest.mark.parametrize("needed", [[True] * 5, [False, True, False, True, False]])
def test_opcheck_backward(needed):
    module = import_module("mgllava_kernels.projector")
    x, w1, _, w2, _ = group(2, 3, width=5, hidden=6, out=4)
    hidden, grad = (torch.randn(2, 3, width, device=KERNEL_DEVICE) for width in (6, 4))
    opcheck(module._grouped_mlp_projector_backward, ([grad], [x], [w1], [w2], [hidden], needed, "triton"))
    opcheck(module._linear_gelu_backward, (hidden, x, w1, hidden.clone(), needed[:3], "triton"))


def test_four_graphs_for_any_sequence_of_token_counts():
    counter = CompileCounterWithBackend("aot_eager")
    modules = [Projector(5, 4).to(KERNEL_DEVICE), Projector(7, 4).to(KERNEL_DEVICE)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda xs: project_groups(modules, xs), fullgraph=True, backend=counter)
    for count in (4, 9, 1, 0, 2, 40, 0, 1):
        xs = [torch.ones(3, 5, device=KERNEL_DEVICE), torch.randn(count, 7, device=KERNEL_DEVICE)]
        outputs = compiled(xs)
        with use_backend("reference"):
            torch.testing.assert_close(outputs, project_groups(modules, xs), rtol=1e-5, atol=1e-5)
        sum(output.sum() for output in outputs).backward()
    assert counter.frame_count <= 4


def test_autocast_casts_as_torch_casts_its_linear():
    values = group(4, 3, requires_grad=True)
    with torch.autocast(KERNEL_DEVICE, dtype=torch.float16):
        output = mlp_projector(*values)
        expected = composition(*values)
    assert output.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(output.float().sum(), values)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.float().sum(), values), strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, wanted) < 8 * torch.finfo(torch.float16).eps


@triton.jit
def _dual_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    numbers,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns, depth, cut = half(numbers[0]), half(numbers[1]), half(numbers[2]), half(numbers[3])
    a_m, a_k, b_n, b_k = half(numbers[4]), half(numbers[5]), half(numbers[6]), half(numbers[7])
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row, column = matmul.grouped_tile(tile, row_tiles, column_tiles, 2)
        row *= BLOCK_M
        column *= BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        accumulator = matmul.add_product(
            *(accumulator, a_ptr, b_ptr, row, column, rows, columns, depth, 0, cut, a_m, a_k, b_n, b_k),
            *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, DESCRIPTORS, BLOCK_K, "ieee"),
        )
        accumulator = matmul.add_product(
            *(accumulator * 2, a_ptr, b_ptr, row, column, rows, columns, depth, cut, depth),
            *(a_m, a_k, b_n, b_k),
            *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, DESCRIPTORS, BLOCK_K, "ieee"),
        )
        values = matmul.gelu(matmul.add_bias(accumulator, bias_ptr, column, columns))
        offsets, inside = matmul.tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, 1)
        tl.store(out_ptr + offsets, values, mask=inside)


def matrix(layout, rows, columns, dtype):
    shape = {"row": (rows, columns), "column": (columns, rows), "strided": (2 * rows, 2 * columns)}[layout]
    values = torch.randn(shape, device=KERNEL_DEVICE).to(dtype)
    return {"row": values, "column": values.T, "strided": values[::2, ::2]}[layout]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("a_layout", ["row", "column", "strided"])
@pytest.mark.parametrize("b_layout", ["row", "column", "strided"])
def test_products_of_any_strides_compose(a_layout, b_layout, dtype):
    """Two products into one accumulator, scaled between them; through pointers, and descriptors where they fit."""
    device, tried = torch.device(KERNEL_DEVICE), []
    for rows, columns, depth, cut in ((70, 33, 50, 32), (64, 16, 96, 32), (40, 16, 24, 0)):
        a, b = matrix(a_layout, rows, depth, dtype), matrix(b_layout, columns, depth, dtype)
        bias = torch.randn(columns, device=device)
        wide_a, wide_b = a.double(), b.double()
        sums = 2 * wide_a[:, :cut] @ wide_b[:, :cut].T + wide_a[:, cut:] @ wide_b[:, cut:].T
        expected = F.gelu(sums + bias.double())
        layouts = (*matmul.matrix_layout([a]), *matmul.matrix_layout([b]))
        assert (layouts[0], layouts[2]) == (a_layout, b_layout)
        for descriptors in {False, matmul.descriptors_fit(target_of(device), [a], [b])}:
            tried.append(descriptors)
            out = torch.full((rows, columns), torch.nan, device=device)
            matmul.launch_product(
                _dual_kernel,
                3,
                device,
                (a, b, bias, out, odd(rows, columns, depth, cut, *a.stride(), *b.stride())),
                **dict(zip(("A_LAYOUT", "A_ALIGN", "B_LAYOUT", "B_ALIGN"), layouts, strict=True)),
                DESCRIPTORS=descriptors,
                BLOCK_M=32,
                BLOCK_N=16,
                BLOCK_K=32,
                num_warps=4,
            )
            assert relative_error(out, expected) < 1e-6
    assert any(tried) == ("strided" not in (a_layout, b_layout) and matmul.descriptors_fit(target_of(device)))


def test_layouts_and_what_descriptors_can_hold():
    rows, hopper = torch.zeros(6, 16, dtype=torch.float16), TARGETS["sm_90"]
    layout = matmul.matrix_layout
    assert (layout([rows]), layout([rows.T]), layout([rows[:, ::2]])) == (
        ("row", 8),
        ("column", 8),
        ("strided", 1),
    )
    assert layout([rows[:, :4]]) == ("row", 4)
    assert layout([rows.flatten()[2:-14].view(5, 16)]) == ("row", 2)
    # One row is whatever the others are.
    assert layout([rows[:1].T, rows.T]) == ("column", 8)
    assert layout([rows[:1], rows]) == ("row", 8)
    assert matmul.descriptors_fit(hopper, [rows, rows[:1]], [rows.T])
    for misfit in (
        rows[:, :4],
        rows[:0],
        rows[:1].expand(6, -1),
        rows[:, ::2],
        rows.flatten()[1:9].view(1, 8),
    ):
        assert not matmul.descriptors_fit(hopper, [rows], [misfit])
    for target in ("sm_80", "gfx942"):
        assert not matmul.descriptors_fit(TARGETS[target], [rows])


SMALL_MEMORY = Target("cuda", 120, "sm_120", 188, 101376, 32)


@pytest.mark.parametrize(
    "target", [*TARGETS.values(), SMALL_MEMORY, INTERPRETER], ids=lambda target: target.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.kernel)
def test_heuristics_are_legal_on_every_target(space, dtype, target):
    names = ("M", "N") if space is implementation.WEIGHT_GRADIENT else ("N", "K")
    for sizes in ((1, 1), (4096, 1024), (5120, 5120)):
        for count in (1, 100, 676, 21632):
            config = space.heuristic(target, dtype, dict(zip(names, sizes, strict=True)), count)
            assert configs.legal(config, space, target, dtype) is None
            assert dict(config.blocks)["ROUTE"] == implementation.TRITON
            candidates = list(space.candidates(target, dtype, dict(zip(names, sizes, strict=True)), count))
            assert any(dict(other.blocks)["ROUTE"] == implementation.TORCH for other in candidates)


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: captures a CUDA graph")
def test_replays_in_a_cuda_graph():
    """Descriptors included, which programs make in memory of the graph."""
    values = group(300, width=64, hidden=128, out=128, dtype=torch.bfloat16)
    mlp_projector(*values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = mlp_projector(*values)
    values[0].copy_(torch.randn_like(values[0]))
    graph.replay()
    assert torch.equal(output, mlp_projector(*values))
