"""What keeps a module's layers from being fused, and what does not."""

import functools
import types

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn

from mgllava_kernels import ConvGateFusion, Projector, backend, project_groups, reference, use_backend
from mgllava_kernels._layers import call_obstacle, fusion_obstacle

X = torch.ones(2, 5)


@pytest.fixture
def ops(monkeypatch):
    """The ops that run."""
    called = []
    run = backend.call

    def spy(op, path, function, *arguments):
        called.append(function)
        return run(op, path, function, *arguments)

    monkeypatch.setattr(backend, "call", spy)
    return called


def placed(module, **options):
    """`module` with the hook that a device map puts on it and on each of its layers."""
    for part in module.modules():
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", **options))
    return module


def test_a_device_map_without_offloading_is_fused(ops):
    projector = Projector(5, 4)
    expected = projector(X)
    placed(projector)
    assert "forward" in projector.linear_1.__dict__
    torch.testing.assert_close(projector(X), expected)
    torch.testing.assert_close(project_groups([projector, projector], [X, X]), [expected, expected])
    assert ops == ["grouped_mlp_projector"] * 3
    fusion = placed(ConvGateFusion(4, 6))
    fusion(torch.ones(1, 6, 4), torch.ones(1, 6, 2, 3))
    assert ops[3:] == ["conv_gate_fusion"]


def test_an_offloaded_layer_is_called(ops):
    projector = Projector(5, 4)
    expected = projector(X)
    for layer in projector.children():
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True))
    assert projector.linear_1.weight.is_meta
    torch.testing.assert_close(projector(X), expected)
    torch.testing.assert_close(project_groups([projector, projector], [X, X]), [expected, expected])
    assert ops == ["grouped_mlp_projector"]


def test_layers_on_another_device_than_the_input_are_called():
    layer = nn.Linear(5, 4)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="meta"))
    assert "placed on another device" in fusion_obstacle({"layer": layer}, X)
    assert fusion_obstacle({"layer": layer}, X.to("meta")) is None
    assert "placed on another device" in fusion_obstacle({"layer": layer}, X.to("meta"), X)


def test_an_offloaded_layer_is_never_fused_on_any_device():
    layer = nn.Linear(5, 4)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True))
    for device in ("cpu", "meta"):
        assert "offloaded" in fusion_obstacle({"layer": layer}, X.to(device))


def test_a_compiled_device_map_without_offloading_has_no_graph_breaks():
    projector = Projector(5, 4)
    for layer in projector.children():
        placed(layer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: projector(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), projector(X))


def double(forward):
    @functools.wraps(forward)
    def doubled(x):
        return 2 * forward(x)

    return doubled


def test_only_accelerate_s_own_wrapper_is_seen_through():
    hook = AlignDevicesHook(execution_device="cpu")
    layers = [nn.Linear(5, 4) for _ in range(6)]
    patched_before, method_before, patched_after, sequence, other, subclass = layers
    method_before.forward = types.MethodType(lambda layer, x: 2 * x, method_before)
    add_hook_to_module(method_before, hook)
    patched_before.forward = double(patched_before.forward)
    add_hook_to_module(patched_before, hook)
    add_hook_to_module(patched_after, hook)
    patched_after.forward = double(patched_after.forward)
    add_hook_to_module(sequence, SequentialHook(hook, ModelHook()))
    add_hook_to_module(other, ModelHook())
    add_hook_to_module(subclass, type("Scaling", (AlignDevicesHook,), {})(execution_device="cpu"))
    for layer in layers:
        assert "forward of its own" in call_obstacle(layer, X)


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        ("register_forward_hook", lambda *_: None),
        ("register_forward_pre_hook", lambda *_: None),
        ("register_full_backward_hook", lambda *_: None),
        ("register_full_backward_pre_hook", lambda *_: None),
    ],
)
def test_every_kind_of_hook_counts(register, hook):
    layer = nn.Linear(5, 4)
    assert fusion_obstacle({"layer": layer}, X) is None
    getattr(layer, register)(hook)
    assert fusion_obstacle({"layer": layer}, X) == "layer is hooked"


def test_the_answer_names_every_layer():
    layers = {
        "plain": nn.Linear(5, 4),
        "replaced": nn.Identity(),
        "unbiased": nn.Linear(5, 4, bias=False),
        "quantised": nn.Linear(5, 4),
    }
    layers["quantised"].weight = type("Quantised", (nn.Parameter,), {})(torch.ones(4, 5))
    assert fusion_obstacle(layers, X) == (
        "replaced is of type Identity; unbiased has a bias of type NoneType; quantised has a weight of type Quantised"
    )


def hooked_projector():
    projector = Projector(5, 4)
    projector.linear_2.register_forward_hook(lambda *_: None)
    return projector, (X,), "linear_2 is hooked"


def replaced_projector():
    projector = Projector(5, 4)
    projector.linear_1 = nn.Sequential(nn.Linear(5, 4))
    return projector, (X,), "linear_1 is of type Sequential"


def offloaded_fusion():
    fusion = ConvGateFusion(4, 6)
    add_hook_to_module(fusion.gate_in, AlignDevicesHook(execution_device="cpu", offload=True))
    return fusion, (torch.ones(1, 6, 4), torch.ones(1, 6, 2, 3)), "gate_in has a forward of its own"


@pytest.mark.parametrize("make", [hooked_projector, replaced_projector, offloaded_fusion])
def test_a_composition_refuses_an_explicit_triton(make, monkeypatch):
    module, arguments, message = make()
    expected = module(*arguments)
    for name in ("auto", "torch", "reference"):
        with use_backend(name):
            assert torch.equal(module(*arguments), expected)
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"'triton' .* use_backend, but {message}"):
        module(*arguments)
    monkeypatch.setenv("MGLLAVA_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=f"'triton' .* MGLLAVA_KERNELS, but {message}"):
        module(*arguments)


def test_project_groups_refuses_an_explicit_triton():
    projector, (x,), message = hooked_projector()
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        project_groups([projector, projector], [x, x])


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("low_res_conv", nn.Conv2d(4, 4, 7, padding=3, groups=4, padding_mode="circular")),
        ("low_res_conv", nn.Conv2d(4, 4, 7, padding=9, groups=4, dilation=3)),
        ("low_res_conv", nn.Conv2d(4, 4, 5, padding=2, groups=4)),
        ("low_res_conv", nn.Conv2d(4, 4, 7, padding=3)),
        ("high_res_proj", nn.Conv2d(6, 4, 3, padding=1)),
    ],
    ids=str,
)
def test_a_convolution_of_another_kind_is_called(name, replacement):
    torch.manual_seed(0)
    fusion = ConvGateFusion(4, 6)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    setattr(fusion, name, replacement)
    low_res, high_res = torch.randn(2, 12, 4), torch.randn(2, 6, 3, 4)
    names = ("high_res_conv", "high_res_proj", "low_res_conv", "low_res_proj", "gate_in", "gate_out")
    expected = reference.conv_gate_fusion(
        low_res, high_res, *(getattr(fusion, layer) for layer in names), "gate_sum"
    )
    torch.testing.assert_close(fusion(low_res, high_res), expected)
    with pytest.raises(RuntimeError, match=f"{name} is Conv2d"), use_backend("triton"):
        fusion(low_res, high_res)


def test_weights_that_zero_3_has_taken_away_are_left_alone():
    """DeepSpeed takes each layer's weights as soon as it is made, before the module around it sets them."""
    fusion = ConvGateFusion(6, 8)
    taken = [fusion.high_res_conv, fusion.low_res_proj, fusion.gate_in]
    for layer in taken:
        layer.weight.data = torch.empty(0)
    fusion.gate_out.weight.data.fill_(7.0)
    fusion.reset_parameters()
    assert all(layer.weight.shape == (0,) for layer in taken)
    assert fusion.gate_out.weight.abs().max() < 1
