"""Conv-Gate fusion: golden values, all variants, every gradient, initialisation, registration, bad input."""

import inspect
from importlib import import_module

import naive
import pytest
import torch
from kernel_cases import GOLDEN_TOLERANCE, PATHS, as_accurate, golden, golden_fusion, relative_error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

from mgllava_kernels import ConvGateFusion, conv_gate_fusion, depthwise_conv_gelu, use_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VARIANTS = ("gate_sum", "gate_concat", "concat_projected", "concat_raw")
LAYERED = VARIANTS[:3]


def fusion(variant="gate_sum", low_dim=4, high_dim=6, dtype=torch.float32):
    """A module whose projections are not zero, so that every path carries a gradient."""
    module = ConvGateFusion(low_dim, high_dim, variant)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return module.to(dtype)


def inputs(images=2, height=3, width=2, low_dim=4, high_dim=6, dtype=torch.float32):
    return (
        torch.randn(images, height * width, low_dim, dtype=dtype, requires_grad=True),
        torch.randn(images, high_dim, height, width, dtype=dtype, requires_grad=True),
    )


def parameters_of(module):
    return {name.replace(".", "_"): value for name, value in module.named_parameters()}


def ordered_parameters(module):
    names = import_module("mgllava_kernels.conv_gate").WEIGHT_NAMES
    by_name = parameters_of(module)
    return [by_name[name] for name in names if name in by_name]


@pytest.mark.parametrize("path", PATHS)
def test_golden_output_and_every_gradient(path):
    values = golden("conv_gate")
    module = ConvGateFusion(32, 48)
    module.load_state_dict(golden_fusion(values, "param"))
    low_res, high_res = values["low_res"].requires_grad_(), values["high_res"].requires_grad_()
    with use_backend(path):
        output = module(low_res, high_res)
    assert relative_error(output, values["output"]) < GOLDEN_TOLERANCE
    output.backward(values["grad_output"])
    assert relative_error(low_res.grad, values["grad_low_res"]) < GOLDEN_TOLERANCE
    assert relative_error(high_res.grad, values["grad_high_res"]) < GOLDEN_TOLERANCE
    expected = golden_fusion(values, "grad")
    assert expected.keys() == dict(module.named_parameters()).keys()
    for name, gradient in expected.items():
        assert relative_error(module.get_parameter(name).grad, gradient) < GOLDEN_TOLERANCE, name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_golden_variants(path, variant):
    values = golden("conv_gate")
    module = ConvGateFusion(32, 48, variant)
    state = golden_fusion(values, "param")
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    with use_backend(path):
        output = module(values["low_res"], values["high_res"])
    assert output.shape[-1] == module.out_features
    assert relative_error(output, values[f"output_{variant}"]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_of_the_naive_loop(path, variant):
    module = fusion(variant, dtype=torch.float64)
    low_res, high_res = inputs(height=5, width=4, dtype=torch.float64)
    with use_backend(path):
        output = module(low_res, high_res)
    expected = naive.conv_gate_fusion(low_res, high_res, dict(module.named_parameters()), variant)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("path", PATHS)
def test_depthwise_values_of_the_naive_loop(path):
    tokens, weight, bias = torch.randn(2, 40, 3), torch.randn(3, 1, 7, 7), torch.randn(3)
    values = [value.double() for value in (tokens, weight, bias)]
    with use_backend(path):
        output = depthwise_conv_gelu(*values, height=5, width=8)
    torch.testing.assert_close(output, naive.depthwise_conv_gelu(*values, 5, 8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(path, variant):
    module = fusion(variant, low_dim=2, high_dim=3, dtype=torch.float64)
    names = list(parameters_of(module))
    values = [*inputs(low_dim=2, high_dim=3, dtype=torch.float64), *parameters_of(module).values()]

    def call(low_res, high_res, *weights):
        return conv_gate_fusion(low_res, high_res, **dict(zip(names, weights, strict=True)), variant=variant)

    with use_backend(path):
        assert gradcheck(call, values)


@pytest.mark.parametrize("path", PATHS)
def test_depthwise_gradcheck(path):
    shapes = ((2, 6, 2), (2, 1, 7, 7), (2,))
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with use_backend(path):
        assert gradcheck(lambda *args: depthwise_conv_gelu(*args, height=2, width=3), values)


@pytest.mark.parametrize("variant", LAYERED)
@pytest.mark.parametrize(
    "learning",
    [
        "low_res",
        "high_res",
        "high_res_conv_weight",
        "high_res_proj_weight",
        "high_res_proj_bias",
        "low_res_conv_bias",
        "low_res_proj_weight",
        "low_res_proj_bias",
        "parameters",
    ],
)
def test_only_needed_gradients_are_computed(monkeypatch, variant, learning):
    implementation = import_module("mgllava_kernels._torch.conv_gate")
    counts = []
    run = implementation.conv_gate_fusion_backward

    def spy(*arguments):
        results = run(*arguments)
        counts.append(len(results))
        return results

    monkeypatch.setattr(implementation, "conv_gate_fusion_backward", spy)
    low_res, high_res = inputs()
    values = {"low_res": low_res, "high_res": high_res, **parameters_of(fusion(variant))}
    wanted = [
        name
        for name in values
        if name == learning or (learning == "parameters" and not name.endswith("_res"))
    ]
    for name, value in values.items():
        value.requires_grad_(name in wanted)
    gradients = {}
    for path in PATHS:
        with use_backend(path):
            output = conv_gate_fusion(**values, variant=variant)
        gradients[path] = torch.autograd.grad(output.square().sum(), [values[name] for name in wanted])
    assert counts == [len(wanted)]
    for actual, expected in zip(gradients["torch"], gradients["reference"], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 1), (1, 1, 5)])
def test_odd_sizes(path, variant, size):
    module = fusion(variant, low_dim=3, high_dim=5)
    low_res, high_res = inputs(*size, low_dim=3, high_dim=5)
    with use_backend(path):
        output = module(low_res, high_res)
        assert output.shape == (size[0], size[1] * size[2], module.out_features)
        output.sum().backward()
    expected = naive.conv_gate_fusion(low_res, high_res, dict(module.named_parameters()), variant)
    if size[0]:
        torch.testing.assert_close(output, expected.float())
    for value in (low_res, high_res, *module.parameters()):
        assert value.grad is not None
        assert value.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_layouts(variant, layout):
    module, (low_res, high_res) = fusion(variant), inputs(height=4, width=4)
    expected = module(low_res, high_res)
    other = {
        "channels_last": (high_res.contiguous(memory_format=torch.channels_last), low_res),
        "strided": (
            torch.stack([high_res, high_res], -1)[..., 0],
            torch.stack([low_res, low_res], -1)[..., 1],
        ),
        "transposed": (high_res, low_res.transpose(1, 2).contiguous().transpose(1, 2)),
    }[layout]
    output = module(other[1], other[0])
    torch.testing.assert_close(output, expected)
    grad = torch.randn(2, module.out_features, 16).transpose(1, 2)
    gradients = torch.autograd.grad(output, [low_res, high_res], grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [low_res, high_res], grad))


def test_nothing_handed_in_is_changed():
    module, (low_res, high_res) = fusion(), inputs()
    output = module(low_res, high_res)
    grad = torch.randn_like(output)
    values = [low_res, high_res, grad, *module.parameters()]
    kept = [value.clone() for value in values]
    output.backward(grad)
    for value, copy in zip(values, kept, strict=True):
        assert torch.equal(value, copy)


def accuracy_cases():
    values = golden("conv_gate")
    module = ConvGateFusion(32, 48)
    module.load_state_dict(golden_fusion(values, "param"))
    yield module, values["low_res"], values["high_res"], values["grad_output"]
    for seed in range(3):
        torch.manual_seed(seed)
        module = fusion(low_dim=64, high_dim=96)
        low_res, high_res = inputs(height=6, width=6, low_dim=64, high_dim=96)
        yield module, low_res.detach(), high_res.detach(), torch.randn(2, 36, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_accurate_as_the_composition(dtype):
    for module, *tensors in accuracy_cases():
        low_res, high_res, grad = (tensor.to(dtype) for tensor in tensors)
        module = module.to(dtype)
        with use_backend("reference"):
            composition = module(low_res, high_res)
            composition_grads = torch.autograd.grad(composition, list(module.parameters()), grad)
        output = module(low_res, high_res)
        grads = torch.autograd.grad(output, list(module.parameters()), grad)
        module = module.double()
        with use_backend("reference"):
            exact = module(low_res.double(), high_res.double())
            exact_grads = torch.autograd.grad(exact, list(module.parameters()), grad.double())
        assert as_accurate(output, composition, exact)
        together = [
            torch.cat([value.flatten() for value in g]) for g in (grads, composition_grads, exact_grads)
        ]
        assert as_accurate(*together)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", LAYERED)
def test_autocast_computes_in_its_dtype(path, dtype, variant):
    module, (low_res, high_res) = fusion(variant), inputs()
    expected = module(low_res, high_res)
    with use_backend(path), torch.autocast("cpu", dtype=dtype):
        output = module(low_res, high_res)
        tokens = depthwise_conv_gelu(
            low_res, module.low_res_conv.weight, module.low_res_conv.bias, height=3, width=2
        )
        output.float().sum().backward()
    assert output.dtype == tokens.dtype == dtype
    assert relative_error(output, expected) < 16 * torch.finfo(dtype).eps
    assert all(value.grad.dtype == torch.float32 for value in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", LAYERED)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, variant, requires_grad):
    module = import_module("mgllava_kernels.conv_gate")
    weights = ordered_parameters(fusion(variant, dtype=dtype).requires_grad_(requires_grad))
    low_res, high_res = (value.requires_grad_(requires_grad) for value in inputs(dtype=dtype))
    opcheck(module._conv_gate_fusion, (low_res, high_res, weights, variant, requires_grad, "torch"))
    convolution = weights[4:6]
    opcheck(module._depthwise_conv_gelu, (low_res, *convolution, 3, 2, requires_grad, "torch"))


@pytest.mark.parametrize("variant", LAYERED)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_backward(dtype, variant, every):
    module = import_module("mgllava_kernels.conv_gate")
    weights = [value.detach() for value in ordered_parameters(fusion(variant, dtype=dtype))]
    low_res, high_res = (value.detach() for value in inputs(dtype=dtype))
    fused, *saved = module._conv_gate_fusion(low_res, high_res, weights, variant, True, "torch")
    needed = [index % every == 0 for index in range(2 + len(weights))]
    grad = torch.randn_like(fused)
    opcheck(
        module._conv_gate_fusion_backward,
        (grad, low_res, high_res, weights, *saved, variant, needed, "torch"),
    )
    arguments = (low_res.clone(), low_res, weights[4], low_res.clone(), 3, 2, needed[:3], "torch")
    opcheck(module._depthwise_conv_gelu_backward, arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_graphs_for_any_sequence_of_batch_sizes(variant):
    counter = CompileCounterWithBackend("aot_eager")
    module = fusion(variant)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *maps: module(*maps), fullgraph=True, backend=counter)
    for images in (2, 3, 1, 0, 5, 1, 0, 4):
        low_res, high_res = inputs(images)
        output, expected = compiled(low_res, high_res), module(low_res, high_res)
        torch.testing.assert_close(output, expected)
        gradients = torch.autograd.grad(output.sum(), [low_res, high_res])
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), [low_res, high_res]))
    assert counter.frame_count <= 4


def test_weights_are_named_once_and_as_the_parameters_of_the_op():
    names = import_module("mgllava_kernels.conv_gate").WEIGHT_NAMES
    keywords = list(inspect.signature(conv_gate_fusion).parameters)
    assert keywords == ["low_res", "high_res", *names, "variant"]
    assert list(parameters_of(ConvGateFusion(4, 6))) == list(names)
    assert import_module("mgllava_kernels._torch.conv_gate").WEIGHT_NAMES is names


@pytest.mark.parametrize("path", PATHS)
def test_weights_may_come_in_any_order(path):
    module, (low_res, high_res) = fusion(), inputs()
    reordered = dict(reversed(parameters_of(module).items()))
    with use_backend(path):
        output = conv_gate_fusion(low_res, high_res, **reordered)
        torch.testing.assert_close(output, module(low_res, high_res))


def test_parameter_names_and_shapes():
    expected = {
        "high_res_conv": (6, 6, 1, 1),
        "high_res_proj": (4, 6, 1, 1),
        "low_res_conv": (4, 1, 7, 7),
        "low_res_proj": (4, 4, 1, 1),
        "gate_in": (2, 8),
        "gate_out": (1, 2),
    }
    module = ConvGateFusion(4, 6)
    assert {name: tuple(layer.weight.shape) for name, layer in module.named_children()} == expected
    assert list(dict(ConvGateFusion(4, 6, "concat_projected").named_children())) == list(expected)[:4]
    assert not list(ConvGateFusion(4, 6, "concat_raw").parameters())
    widths = {variant: ConvGateFusion(4, 6, variant).out_features for variant in VARIANTS}
    assert widths == {"gate_sum": 4, "gate_concat": 8, "concat_projected": 8, "concat_raw": 10}


def test_initialisation():
    module = ConvGateFusion(64, 96)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 99)
    module.reset_parameters()
    for name, layer in module.named_children():
        assert not layer.bias.any(), name
        if name.endswith("_proj"):
            assert not layer.weight.any()
        elif name.endswith("_conv"):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
        else:
            bound = layer.in_features**-0.5
            assert 0.5 * bound < layer.weight.abs().max() <= bound


def test_a_fresh_module_passes_low_res_through():
    low_res, high_res = inputs()
    assert torch.equal(ConvGateFusion(4, 6)(low_res, high_res), low_res)


@pytest.mark.parametrize("variant", LAYERED)
def test_replaced_and_hooked_layers_are_obeyed(variant):
    module, (low_res, high_res) = fusion(variant), inputs()
    expected = module(low_res, high_res)
    called = []
    module.low_res_proj.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(module(low_res, high_res), expected)
    assert called == [True]
    module.high_res_proj = nn.Conv2d(6, 4, 1)
    assert relative_error(module(low_res, high_res), expected) > 0.01


LOW, HIGH = torch.zeros(2, 6, 4), torch.zeros(2, 6, 3, 2)
WEIGHTS = {name: value.detach() for name, value in parameters_of(ConvGateFusion(4, 6)).items()}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variant": "sum"}, ValueError, "variant must be one of gate_sum, .*; got 'sum'"),
        ({"low_res": None}, TypeError, "low_res must be a tensor, got NoneType"),
        ({"low_res": LOW[0]}, ValueError, r"low_res must have shape \(B, N, D\), got \(6, 4\)"),
        ({"low_res": LOW[:, :5]}, ValueError, "5 tokens, 3 x 2 = 6 positions"),
        ({"high_res": HIGH[0]}, ValueError, r"high_res must have shape \(2, C, H, W\), got \(6, 3, 2\)"),
        ({"high_res": HIGH[:1]}, ValueError, r"high_res must have shape \(2, C, H, W\), got \(1,"),
        (
            {"high_res": HIGH.half()},
            ValueError,
            "high_res must have the dtype of low_res, torch.float32, got",
        ),
        (
            {"high_res": HIGH.to("meta")},
            ValueError,
            "high_res must be on the device of low_res, cpu, got meta",
        ),
        ({"gate_in_weight": None}, ValueError, "gate_in_weight must be given for variant 'gate_sum'"),
        ({"variant": "concat_projected"}, ValueError, "gate_in_weight must be None for variant 'concat_pro"),
        ({"variant": "concat_raw"}, ValueError, "high_res_conv_weight must be None for variant 'concat_raw'"),
        (
            {"low_res_conv_weight": torch.zeros(4, 1, 3, 3)},
            ValueError,
            r"low_res_conv_weight must have shape \(4, 1, 7, 7\), got \(4, 1, 3, 3\)",
        ),
        ({"gate_out_weight": torch.zeros(1, 3)}, ValueError, r"gate_out_weight must have shape \(1, 2\)"),
        (
            {"low_res_proj_bias": torch.zeros(4).double()},
            ValueError,
            "low_res_proj_bias must have the dtype of low_res",
        ),
    ],
)
def test_bad_input(path, change, error, message):
    with use_backend(path), pytest.raises(error, match=message):
        conv_gate_fusion(**{"low_res": LOW, "high_res": HIGH, **WEIGHTS, **change})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": LOW[0]}, ValueError, r"tokens must have shape \(B, N, D\)"),
        ({"height": 2}, ValueError, "number of tokens, 6, got 2 x 2 = 4"),
        ({"height": -3, "width": -2}, ValueError, "number of tokens, 6, got -3 x -2"),
        ({"height": 3.0}, TypeError, "height must be an int, got float"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, ValueError, r"weight must have shape \(4, 1, 7, 7\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4\), got \(3,\)"),
        ({"bias": torch.zeros(4).half()}, ValueError, "bias must have the dtype of tokens"),
    ],
)
def test_bad_depthwise_input(path, change, error, message):
    arguments = {
        "tokens": LOW,
        "weight": torch.zeros(4, 1, 7, 7),
        "bias": torch.zeros(4),
        "height": 3,
        "width": 2,
    }
    with use_backend(path), pytest.raises(error, match=message):
        depthwise_conv_gelu(**(arguments | change))


def test_module_names_a_bad_variant_and_a_bad_grid():
    with pytest.raises(ValueError, match="variant must be one of"):
        ConvGateFusion(4, 6, "gate")
    hooked = ConvGateFusion(4, 6)
    hooked.gate_in.register_forward_hook(lambda *_: None)
    for module in (ConvGateFusion(4, 6), hooked):
        with pytest.raises(ValueError, match="7 tokens, 3 x 2 = 6 positions"):
            module(torch.zeros(1, 7, 4), HIGH[:1])


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_the_op(strict):
    module = ConvGateFusion(4, 6)
    values = torch.randn(2, 12, 4), torch.randn(2, 6, 3, 4)
    program = torch.export.export(module, values, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "mgllava.conv_gate_fusion.default" in targets
    torch.testing.assert_close(program.module()(*values), module(*values))


@pytest.mark.parametrize(
    ("low_shape", "high_shape", "message"),
    [
        ((2, 0, 4), (2, 6, 0, 5), "high_res must have at least one row and one column"),
        ((2, 4, 0), (2, 6, 2, 2), "low_res must have at least one channel, got D = 0"),
        ((2, 4, 4), (2, 0, 2, 2), "high_res must have at least one channel, got C = 0"),
    ],
)
def test_empty_maps_are_named(low_shape, high_shape, message):
    with pytest.raises(ValueError, match=message):
        ConvGateFusion(4, 6)(torch.randn(low_shape), torch.randn(high_shape))


def test_sparse_and_nested_tensors_are_named():
    module = ConvGateFusion(4, 6)
    with pytest.raises(ValueError, match="low_res must be a dense tensor, got a sparse_coo one"):
        module(torch.randn(2, 12, 4).to_sparse(), torch.randn(2, 6, 3, 4))
    nested = torch.nested.nested_tensor([torch.randn(12, 4), torch.randn(12, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match="low_res must be a dense tensor, got a nested one"):
        module(nested, torch.randn(2, 6, 3, 4))
