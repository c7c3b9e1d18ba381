"""Projector ops and module: values, gradients, registration, autocast, compilation, bad input."""

from importlib import import_module

import naive
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import PATHS, as_accurate, relative_error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

from mgllava_kernels import (
    Projector,
    backend,
    grouped_mlp_projector,
    linear_gelu,
    mlp_projector,
    project_groups,
    use_backend,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def group(*tokens: int, width=5, hidden=6, out=4, dtype=torch.float32, requires_grad=False):
    """x, w1, b1, w2, b2."""
    shapes = ((*tokens, width), (hidden, width), (hidden,), (out, hidden), (out,))
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def columns(groups):
    return [list(column) for column in zip(*groups, strict=True)]


@pytest.mark.parametrize("path", PATHS)
def test_values_of_the_naive_loop(path):
    values = group(7, dtype=torch.float64)
    other = group(3, width=2, hidden=3, out=8, dtype=torch.float64)
    with use_backend(path):
        torch.testing.assert_close(mlp_projector(*values), naive.mlp_projector(*values))
        outputs = grouped_mlp_projector(*columns([values, other]))
        hidden = linear_gelu(*values[:3])
    for output, expected in zip(outputs, (values, other), strict=True):
        torch.testing.assert_close(output, naive.mlp_projector(*expected))
    expected = [
        [naive.gelu(v) for v in naive.linear(row, *map(list, columns_of(values)))] for row in values[0]
    ]
    torch.testing.assert_close(hidden, torch.tensor(expected, dtype=torch.float64))


def columns_of(values):
    return values[1].tolist(), values[2].tolist()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (2, 0, 3)])
def test_any_number_of_axes(shape):
    values = group(*shape, requires_grad=True)
    output = mlp_projector(*values)
    assert output.shape == (*shape, 4)
    expected = F.linear(F.gelu(F.linear(*values[:3])), *values[3:])
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), values)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), values), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path):
    values = group(2, 3, dtype=torch.float64, requires_grad=True)
    other = group(1, width=2, hidden=3, dtype=torch.float64, requires_grad=True)
    with use_backend(path):
        assert gradcheck(mlp_projector, values)
        assert gradcheck(linear_gelu, values[:3])
        assert gradcheck(
            lambda *flat: grouped_mlp_projector(*columns([flat[:5], flat[5:]])), [*values, *other]
        )


@pytest.mark.parametrize("learning", [(0,), (1,), (2,), (3,), (4,), (1, 2, 3, 4), (2, 4)])
def test_only_needed_gradients_are_computed(monkeypatch, learning):
    implementation = import_module("mgllava_kernels._torch.projector")
    counts = []
    run = implementation.grouped_mlp_projector_backward

    def spy(*arguments):
        results = run(*arguments)
        counts.append(len(results))
        return results

    monkeypatch.setattr(implementation, "grouped_mlp_projector_backward", spy)
    values = group(6)
    for index in learning:
        values[index].requires_grad_()
    expected = F.linear(F.gelu(F.linear(*values[:3])), *values[3:]).square().sum()
    mlp_projector(*values).square().sum().backward()
    assert counts == [len(learning)]
    wanted = torch.autograd.grad(expected, [values[index] for index in learning])
    for index, gradient in zip(learning, wanted, strict=True):
        torch.testing.assert_close(values[index].grad, gradient)


def test_no_object_tokens_give_zero_gradients():
    images, objects = group(3, requires_grad=True), group(0, width=9, requires_grad=True)
    outputs = grouped_mlp_projector(*columns([images, objects]))
    assert outputs[1].shape == (0, 4)
    sum(output.sum() for output in outputs).backward()
    assert images[1].grad.any()
    assert all(value.grad is not None and not value.grad.any() for value in objects)


def test_intermediates_are_kept_only_for_a_backward_pass(monkeypatch):
    implementation = import_module("mgllava_kernels._torch.projector")
    saved = []
    run = implementation.grouped_mlp_projector

    def spy(*arguments):
        saved.append(arguments[-1])
        return run(*arguments)

    monkeypatch.setattr(implementation, "grouped_mlp_projector", spy)
    mlp_projector(*group(3))
    values = group(3, requires_grad=True)
    mlp_projector(*values)
    with torch.no_grad():
        mlp_projector(*values)
    assert saved == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_as_accurate_as_the_composition(dtype, seed):
    torch.manual_seed(seed)
    values = [value / value.shape[-1] ** 0.5 for value in group(60, width=96, hidden=128, out=128)]
    values = [value.to(dtype).requires_grad_() for value in values]
    wide = [value.detach().double().requires_grad_() for value in values]
    grad = torch.randn(60, 128).to(dtype)
    with use_backend("reference"):
        composition, exact = mlp_projector(*values), mlp_projector(*wide)
    output = mlp_projector(*values)
    assert as_accurate(output, composition, exact)
    actual = torch.autograd.grad(output, values, grad)
    literal = torch.autograd.grad(composition, values, grad)
    wanted = torch.autograd.grad(exact, wide, grad.double())
    for triple in zip(actual, literal, wanted, strict=True):
        assert as_accurate(*triple)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_casts_its_linear(path, dtype):
    values = group(4, 3, requires_grad=True)
    with use_backend(path), torch.autocast("cpu", dtype=dtype):
        output = mlp_projector(*values)
        hidden = linear_gelu(*values[:3])
        expected = F.linear(F.gelu(F.linear(*values[:3])), *values[3:])
        assert mlp_projector(*group(2, dtype=torch.float64)).dtype == torch.float64
    assert output.dtype == hidden.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.float().sum(), values)
    wanted = torch.autograd.grad(expected.float().sum(), values)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, other) < 8 * torch.finfo(dtype).eps


def test_autocast_reconciles_mixed_operands():
    x, *parameters = group(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp_projector(x.bfloat16(), *parameters).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, shape, requires_grad):
    module = import_module("mgllava_kernels.projector")
    values = group(*shape, dtype=dtype, requires_grad=requires_grad)
    other = group(2, width=3, dtype=dtype)
    opcheck(module._linear_gelu, (*values[:3], requires_grad, "torch"))
    for groups in ([values], [values, other]):
        opcheck(module._grouped_mlp_projector, (*columns(groups), requires_grad, "torch"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needed", [[True] * 5, [False, True, False, True, False]])
def test_opcheck_backward(needed, dtype):
    module = import_module("mgllava_kernels.projector")
    x, w1, _, w2, _ = group(2, 3, dtype=dtype)
    hidden, grad = torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    opcheck(module._grouped_mlp_projector_backward, ([grad], [x], [w1], [w2], [hidden], needed, "torch"))
    opcheck(module._linear_gelu_backward, (hidden, x, w1, hidden.clone(), needed[:3], "torch"))


def test_four_graphs_for_any_sequence_of_token_counts():
    counter = CompileCounterWithBackend("aot_eager")
    image, objects = Projector(5, 4), Projector(7, 4)
    torch._dynamo.reset()

    def project(x):
        tokens = objects(x)
        return torch.cat([image(torch.ones(3, 5)), tokens])

    compiled = torch.compile(project, fullgraph=True, backend=counter)
    for count in (4, 9, 1, 0, 2, 100, 0, 1):
        x = torch.randn(count, 7)
        output = compiled(x)
        torch.testing.assert_close(output, project(x))
        output.sum().backward()
    assert counter.frame_count <= 4


def test_module_names_and_initialisation():
    projector = Projector(5, 4)
    assert {name: tuple(value.shape) for name, value in projector.named_parameters()} == {
        "linear_1.weight": (4, 5),
        "linear_1.bias": (4,),
        "linear_2.weight": (4, 4),
        "linear_2.bias": (4,),
    }
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.fill_(99)
    torch.manual_seed(3)
    projector.reset_parameters()
    torch.manual_seed(3)
    for layer, expected in zip(projector.children(), (nn.Linear(5, 4), nn.Linear(4, 4)), strict=True):
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


def test_module_equals_its_layers():
    projector, x = Projector(5, 4), torch.randn(2, 3, 5)
    expected = projector.linear_2(F.gelu(projector.linear_1(x)))
    torch.testing.assert_close(projector(x), expected)


def test_replaced_and_hooked_layers_are_obeyed():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(3, 5)
    projector = Projector(5, 4)
    plain = projector(x)
    projector.linear_2.register_forward_hook(lambda *_: torch.zeros(3, 4))
    assert not projector(x).any()
    projector = Projector(5, 4)
    replacement = Doubled(4, 4)
    projector.linear_2 = replacement
    torch.testing.assert_close(projector(x), replacement(F.gelu(projector.linear_1(x))))
    assert plain.any()


@pytest.fixture
def grouped_calls(monkeypatch):
    """The number of token sets of each projector op that runs."""
    calls = []
    run = backend.call

    def spy(op, path, function, device, *arguments):
        if function == "grouped_mlp_projector":
            calls.append(len(arguments[0]))
        return run(op, path, function, device, *arguments)

    monkeypatch.setattr(backend, "call", spy)
    return calls


def projectors():
    return [Projector(5, 4), Projector(7, 4)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objects", [0, 1, 6])
def test_project_groups_is_every_projector_in_one_op(path, objects, grouped_calls):
    modules, xs = projectors(), [torch.randn(2, 3, 5), torch.randn(objects, 7)]
    expected = [module.linear_2(F.gelu(module.linear_1(x))) for module, x in zip(modules, xs, strict=True)]
    parameters = [value for module in modules for value in module.parameters()]
    with use_backend(path):
        outputs = project_groups(modules, xs)
    assert grouped_calls == ([2] if path == "torch" else [])
    torch.testing.assert_close(outputs, expected)
    gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), parameters)
    wanted = torch.autograd.grad(sum(output.square().sum() for output in expected), parameters)
    torch.testing.assert_close(gradients, wanted)


def test_project_groups_under_autocast(grouped_calls):
    modules, xs = projectors(), [torch.randn(3, 5), torch.randn(0, 7).bfloat16()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = project_groups(modules, xs)
        expected = [module(x) for module, x in zip(modules, xs, strict=True)]
    assert grouped_calls == [2, 1, 1]
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 2
    assert all(torch.equal(output, want) for output, want in zip(outputs, expected, strict=True))
    sum(output.float().sum() for output in outputs).backward()
    assert all(value.grad.dtype == torch.float32 for module in modules for value in module.parameters())


def hook_module(modules):
    modules[1].register_forward_hook(lambda module, arguments, output: output + 1)


def hook_layer(modules):
    modules[0].linear_1.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))


def patch_forward(modules):
    modules[0].forward = lambda x: torch.ones(len(x), 4)


def replace_projector(modules):
    modules[1] = nn.Linear(7, 4)


def replace_layer(modules):
    modules[1].linear_1 = nn.Linear(7, 4, bias=False)


def other_dtype(modules):
    modules[0].double()


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        (hook_module, [1, 1]),
        (hook_layer, [1]),
        (patch_forward, [1]),
        (replace_projector, [1]),
        (replace_layer, [1]),
        (other_dtype, [1, 1]),
    ],
)
def test_project_groups_calls_the_modules_where_something_else_acts(change, ops, grouped_calls):
    modules = projectors()
    change(modules)
    dtype = torch.float64 if change is other_dtype else torch.float32
    xs = [torch.randn(3, 5, dtype=dtype), torch.randn(2, 7)]
    outputs = project_groups(modules, xs)
    assert grouped_calls == ops
    expected = [module(x) for module, x in zip(modules, xs, strict=True)]
    assert all(torch.equal(output, want) for output, want in zip(outputs, expected, strict=True))


def test_project_groups_compiles_without_graph_breaks():
    counter = CompileCounterWithBackend("aot_eager")
    modules = projectors()
    torch._dynamo.reset()
    compiled = torch.compile(lambda xs: project_groups(modules, xs), fullgraph=True, backend=counter)
    for count in (4, 9, 1, 0, 2, 100, 0, 1):
        xs = [torch.ones(3, 5), torch.randn(count, 7)]
        torch.testing.assert_close(compiled(xs), project_groups(modules, xs))
    assert counter.frame_count <= 4


def test_project_groups_with_bad_arguments():
    modules = projectors()
    assert project_groups([], []) == []
    with pytest.raises(ValueError, match="xs must hold one tensor per projector, 2, got 1"):
        project_groups(modules, [torch.ones(3, 5)])
    with pytest.raises(ValueError, match=r"xs\[1\] must have shape \(..., 7\), got \(3, 5\)"):
        project_groups(modules, [torch.ones(3, 5), torch.ones(3, 5)])
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        project_groups(modules, [torch.ones(3, 5), [1.0]])


X, W1, B1, W2, B2 = group(3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": X.long()}, ValueError, "x must be float16, .* got torch.int64"),
        ({"x": torch.zeros(3, 6)}, ValueError, r"x must have shape \(..., 5\), got \(3, 6\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(..., 5\), got \(\)"),
        ({"w1": W1[0]}, ValueError, r"w1 must have shape \(out, in\), got \(5,\)"),
        ({"b1": B1[:2]}, ValueError, r"b1 must have shape \(6\), got \(2,\)"),
        ({"w2": W2.T}, ValueError, r"w2 must have shape \(out, 6\), got \(6, 4\)"),
        ({"b2": None}, TypeError, "b2 must be a tensor, got NoneType"),
        ({"w2": W2.double()}, ValueError, "w2 must have the dtype of x, torch.float32, got torch.float64"),
        ({"b1": B1.to("meta")}, ValueError, "b1 must be on the device of x, cpu, got meta"),
    ],
)
def test_bad_input(path, change, error, message):
    values = {"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2} | change
    with use_backend(path):
        with pytest.raises(error, match=message):
            mlp_projector(**values)
        if not {"w2", "b2"} & change.keys():
            renamed = message.replace("w1", "weight").replace("b1", "bias")
            with pytest.raises(error, match=renamed):
                linear_gelu(values["x"], values["w1"], values["b1"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], [], [], []), ValueError, "xs must hold at least one token set"),
        ((X, [W1], [B1], [W2], [B2]), TypeError, "xs must be a sequence of tensors, got Tensor"),
        (([X], [W1, W1], [B1], [W2], [B2]), ValueError, "w1s must hold one tensor per token set, 1, got 2"),
        (
            ([X, X], [W1, W1], [B1, B1], [W2, W2], [B2, B2[:1]]),
            ValueError,
            r"b2s\[1\] must have shape \(4\), got \(1,\)",
        ),
        (
            ([X, X.double()], [W1, W1], [B1, B1], [W2, W2], [B2, B2]),
            ValueError,
            r"xs\[1\] must have the dtype of xs\[0\], torch.float32, got torch.float64",
        ),
    ],
)
def test_bad_groups(path, arguments, error, message):
    with use_backend(path), pytest.raises(error, match=message):
        grouped_mlp_projector(*arguments)


@pytest.mark.parametrize("path", PATHS)
def test_a_set_whose_output_is_not_used_gets_no_gradient(path):
    """Not zeros: these would make NaN of what is infinite in it."""
    x, infinite = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    infinite.data.fill_(torch.inf)
    shared = [torch.randn(5, 4), torch.randn(5), torch.randn(6, 5), torch.randn(6)]
    parameters = [value.requires_grad_() for value in shared]
    with use_backend(path):
        used, _ = grouped_mlp_projector([x, infinite], *([value, value] for value in parameters))
        gradients = torch.autograd.grad(used.sum(), [x, *parameters, infinite], allow_unused=True)
    assert gradients[-1] is None
    assert all(gradient.isfinite().all() for gradient in gradients[:-1])
