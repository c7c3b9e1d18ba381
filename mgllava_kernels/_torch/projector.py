"""Linear, GELU, Linear for several token sets, keeping only the inputs of the GELUs for the backward pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_backward(grad: Tensor, pre_activation: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, pre_activation)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x · weightᵀ + bias to x, weight and bias; None for each that is not needed."""
    flat = grad.reshape(-1, weight.shape[0])
    grad_x = grad @ weight if needed[0] else None
    grad_weight = flat.T @ x.reshape(-1, weight.shape[1]) if needed[1] else None
    grad_bias = flat.sum(dim=0) if needed[2] else None
    return grad_x, grad_weight, grad_bias


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    pre_activation = F.linear(x, weight, bias)
    output = F.gelu(pre_activation)
    return output, pre_activation if save else x.new_empty(0)


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre_activation: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    grads = linear_backward(gelu_backward(grad, pre_activation), x, weight, needed)
    return [value for value in grads if value is not None]


def grouped_mlp_projector(
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    b1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    b2s: Sequence[Tensor],
    save: bool,
) -> list[Tensor]:
    """The outputs of all groups, then (with `save`) the inputs of their GELUs."""
    outputs, pre_activations = [], []
    for x, w1, b1, w2, b2 in zip(xs, w1s, b1s, w2s, b2s, strict=True):
        pre_activation = F.linear(x, w1, b1)
        hidden = F.gelu(pre_activation)
        if save:
            pre_activations.append(pre_activation)
        # Its memory can serve the output.
        del pre_activation
        outputs.append(F.linear(hidden, w2, b2))
    return outputs + pre_activations


def grouped_mlp_projector_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed ones of each group's gradients to (x, w1, b1, w2, b2), group after group."""
    results = []
    for group, (grad, x, w1, w2, pre_activation) in enumerate(
        zip(grads, xs, w1s, w2s, pre_activations, strict=True)
    ):
        need_x, need_w1, need_b1, need_w2, need_b2 = needed[5 * group : 5 * group + 5]
        hidden = F.gelu(pre_activation) if need_w2 else pre_activation
        need_hidden = need_x or need_w1 or need_b1
        grad_hidden, *second = linear_backward(grad, hidden, w2, (need_hidden, need_w2, need_b2))
        first: tuple[Tensor | None, ...] = ()
        if grad_hidden is not None:
            grad_pre = gelu_backward(grad_hidden, pre_activation)
            first = linear_backward(grad_pre, x, w1, (need_x, need_w1, need_b1))
        results += [value for value in (*first, *second) if value is not None]
    return results
