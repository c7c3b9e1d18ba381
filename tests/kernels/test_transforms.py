"""Derivatives beyond one backpropagation: right on the reference path, refused elsewhere, never silently zero."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import random_boxes
from torch.autograd import forward_ad, gradgradcheck

from mgllava_kernels import (
    ConvGateFusion,
    Projector,
    active_backend,
    depthwise_conv_gelu,
    grouped_mlp_projector,
    linear_gelu,
    mlp_projector,
    pooled_roi_align,
    project_groups,
    roi_align,
    use_backend,
)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def layer_ops():
    """name: (function of one tensor, that tensor) for every op that is made of layers."""
    projector = Projector(3, 4).double()
    fusion = ConvGateFusion(4, 6).double()
    torch.nn.init.normal_(fusion.low_res_proj.weight)
    torch.nn.init.normal_(fusion.high_res_proj.weight)
    w1, b1, w2, b2 = double(4, 3), double(4), double(5, 4), double(5)
    tokens, kernel, high = double(2, 3), double(4, 1, 7, 7), double(2, 6, 2, 2)
    return {
        "linear_gelu": (lambda x: linear_gelu(x, w1, b1), double(2, 3)),
        "mlp_projector": (lambda x: mlp_projector(x, w1, b1, w2, b2), double(2, 3)),
        "grouped": (lambda x: grouped_mlp_projector([x], [w1], [b1], [w2], [b2])[0], double(2, 3)),
        "project_groups": (lambda x: project_groups([projector], [x])[0], double(2, 3)),
        "Projector": (projector, double(2, 3)),
        "weights": (lambda w: mlp_projector(tokens, w, b1, w2, b2), double(4, 3)),
        "depthwise": (lambda x: depthwise_conv_gelu(x, kernel, b1, height=2, width=2), double(2, 4, 4)),
        "ConvGateFusion": (lambda x: fusion(x, high), double(2, 4, 4)),
    }


LAYER_OPS = list(layer_ops())
BOXES = random_boxes(3, 6, images=2, dtype=torch.float64)
ROI_OPS = {
    "roi_align": lambda x: roi_align(x, BOXES, 2),
    "pooled_roi_align": lambda x: pooled_roi_align([x], BOXES, spatial_scale=1.0, output_size=3),
}


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def grad(function, x):
    return torch.func.grad(lambda value: function(value).sum())(x)


def jacrev(function, x):
    return torch.func.jacrev(function)(x)


def vmap(function, x):
    return torch.func.vmap(function)(torch.stack([x, 2 * x]))


def hessian(function, x):
    return torch.func.hessian(lambda value: function(value).sum())(x)


FORWARD = (jvp, dual)
TRANSFORMS = (*FORWARD, grad, jacrev, vmap, hessian)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYER_OPS)
def test_transforms_compose_by_default(name, transform):
    function, x = layer_ops()[name]
    result = transform(function, x)
    with use_backend("reference"):
        torch.testing.assert_close(result, transform(function, x))
    assert result.any()
    # Against backpropagation on the default path: the sum of a row of the Jacobian is a tangent.
    if transform in FORWARD:
        jacobian = torch.autograd.functional.jacobian(function, x)
        torch.testing.assert_close(result, jacobian.flatten(result.ndim).sum(-1))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYER_OPS)
def test_an_explicit_fast_backend_is_refused(name, transform):
    function, x = layer_ops()[name]
    with use_backend("torch"), pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        transform(function, x)


@pytest.mark.parametrize("path", ["auto", "torch", "reference"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ROI_OPS)
def test_roi_align_is_refused_on_every_path(name, transform, path):
    with use_backend(path), pytest.raises(RuntimeError, match=f"^{name} does not run inside torch.func"):
        transform(ROI_OPS[name], double(2, 3, 6, 6))


def test_the_reason_is_told():
    seen = []

    def ask(x):
        seen.append(active_backend(x, "linear_gelu"))
        return x

    torch.func.vmap(ask)(torch.ones(2, 3))
    torch.func.functionalize(ask)(torch.ones(2, 3))
    assert [answer.name for answer in seen] == ["reference", "torch"]
    assert "torch.func" in seen[0].reason
    assert active_backend(torch.ones(2)).name == "torch"


@pytest.mark.parametrize("transform", [jvp, grad])
def test_transforms_inside_a_compiled_function(transform):
    torch._dynamo.reset()
    function, x = layer_ops()["Projector"]
    compiled = torch.compile(lambda x: (transform(function, x), function(x)), backend="aot_eager")
    result, output = compiled(x)
    torch.testing.assert_close(result, transform(function, x))
    torch.testing.assert_close(output, function(x))


def test_a_compiled_function_gives_no_silent_zeros():
    torch._dynamo.reset()
    function, x = layer_ops()["Projector"]
    compiled = torch.compile(function, backend="aot_eager")
    compiled(x)
    try:
        tangent = dual(compiled, x)
    except Exception:
        return  # torch refuses to differentiate its compiled functions forward
    torch.testing.assert_close(tangent, dual(function, x))


def batched(function, x):
    x = x.clone().requires_grad_()
    output = function(x)
    directions = torch.stack([torch.ones_like(output), 2 * torch.ones_like(output)])
    return torch.autograd.grad(output, x, directions, is_grads_batched=True)[0]


@pytest.mark.parametrize("name", [*LAYER_OPS, "pooled_roi_align"])
def test_batched_gradients(name):
    function, x = {**layer_ops(), "pooled_roi_align": (ROI_OPS["pooled_roi_align"], double(2, 3, 6, 6))}[name]
    with pytest.raises(RuntimeError, match=r'takes no batched gradients .*use_backend\("reference"\)'):
        batched(function, x)
    with use_backend("reference"):
        first, second = batched(function, x)
    torch.testing.assert_close(2 * first, second)
    assert first.any()


def twice(function, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("name", LAYER_OPS)
def test_double_backward_names_the_way(name):
    function, x = layer_ops()[name]
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice .*use_backend\("reference"\)'):
        twice(function, x)
    with use_backend("reference"):
        assert gradgradcheck(function, x.requires_grad_())


@pytest.mark.parametrize("name", ROI_OPS)
def test_double_backward_of_roi_align(name):
    with pytest.raises(RuntimeError, match=f"^{name} cannot be differentiated twice .*on every backend"):
        twice(ROI_OPS[name], double(2, 3, 6, 6))


def test_meta_tensors():
    with torch.device("meta"):
        projector, fusion = Projector(3, 4), ConvGateFusion(4, 6)
        x, low, high = torch.empty(2, 3), torch.empty(2, 4, 4), torch.empty(2, 6, 2, 2)
    for path in ("auto", "reference"):
        with use_backend(path):
            assert projector(x).shape == F.linear(x, projector.linear_1.weight).shape
            fused = fusion(low, high)
            assert fused.device.type == "meta"
            assert fused.shape == low.shape
            fused.sum().backward()
    assert fusion.gate_in.weight.grad.shape == fusion.gate_in.weight.shape
