"""Projectors (Linear, GELU, Linear) and their first half: public functions, custom ops, autograd, module."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgllava_kernels import backend, reference
from mgllava_kernels._autocast import autocast_operands
from mgllava_kernels._checks import check_alike, check_tensor, check_width
from mgllava_kernels._layers import call_obstacle, fusion_obstacle
from mgllava_kernels._routes import products_in_torch

for _name in ("linear_gelu", "mlp_projector", "grouped_mlp_projector"):
    backend.register(
        _name,
        torch="mgllava_kernels._torch.projector",
        triton="mgllava_kernels._triton.projector",
        exceptions=products_in_torch,
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x · weightᵀ + bias) with the exact (erf) GELU.

    Args:
        x: (..., K), floating.
        weight: (M, K); bias: (M,); device and dtype of `x`.

    Returns:
        (..., M) in the dtype of `x`, or the autocast dtype inside an autocast region, as
        `torch.nn.functional.linear`.

    Raises:
        TypeError, ValueError: an argument that is no floating tensor, or of the wrong shape, dtype or device.
    """
    _check_layer("x", x, "weight", weight, "bias", bias)
    x, weight, bias = autocast_operands(x.device, [x, weight, bias])
    check_alike("weight", weight, "x", x)
    check_alike("bias", bias, "x", x)
    path = backend.resolve("linear_gelu", x).name
    if path == "reference":
        return reference.linear_gelu(x, weight, bias)
    return _linear_gelu(x, weight, bias, _save(x, weight, bias), path)[0]


def mlp_projector(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GELU(x · w1ᵀ + b1) · w2ᵀ + b2, the projector of LLaVA-1.5 and of both branches of MG-LLaVA.

    Args:
        x: (..., K), floating.
        w1: (M, K), b1: (M,), w2: (T, M), b2: (T,); device and dtype of `x`.

    Returns:
        (..., T) in the dtype of `x`, or the autocast dtype inside an autocast region.

    Raises:
        TypeError, ValueError: as `linear_gelu`.

    Source: MG-LLaVA, arXiv 2406.17770, section 3.
    """
    groups, path = _prepared_groups("mlp_projector", [(x, w1, b1, w2, b2)], [("x", "w1", "b1", "w2", "b2")])
    return _projected(groups, path)[0]


def grouped_mlp_projector(
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    b1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    b2s: Sequence[Tensor],
) -> list[Tensor]:
    """`mlp_projector` of several token sets, each with its own widths and weights, in one call.

    Args:
        xs: token sets (..., K_g), of any number of tokens; one floating dtype and device.
        w1s, b1s, w2s, b2s: for each set (M_g, K_g), (M_g,), (T_g, M_g), (T_g,).

    Returns:
        A list of (..., T_g).

    Raises:
        TypeError, ValueError: as `mlp_projector`, naming the set; sequences of different lengths.
    """
    sequences = {"xs": xs, "w1s": w1s, "b1s": b1s, "w2s": w2s, "b2s": b2s}
    for name, value in sequences.items():
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(value).__name__}")
        if len(value) != len(xs):
            raise ValueError(f"{name} must hold one tensor per token set, {len(xs)}, got {len(value)}")
    if len(xs) == 0:
        raise ValueError("xs must hold at least one token set, got none")
    names = [tuple(f"{name}[{group}]" for name in sequences) for group in range(len(xs))]
    groups, path = _prepared_groups(
        "grouped_mlp_projector", list(zip(*sequences.values(), strict=True)), names
    )
    return _projected(groups, path)


class Projector(nn.Module):
    """Two linear layers with a GELU between: (..., in_features) to (..., out_features).

    Parameters live in `linear_1` (in_features → out_features) and `linear_2` (out_features → out_features).
    If a layer has been replaced, hooked, quantised or sharded on its own, the module calls the layers one after
    the other, or raises RuntimeError if the backend `triton` was chosen.

    Args:
        in_features: K of the tokens.
        out_features: T, also the hidden width.
        device, dtype: of the parameters, as torch's layers take them.

    Raises:
        TypeError, ValueError: a width that is no positive int.

    Source: MG-LLaVA, arXiv 2406.17770, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check_width("in_features", in_features)
        out_features = check_width("out_features", out_features)
        self.linear_1 = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(out_features, out_features, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """torch's default initialisation of both linear layers."""
        self.linear_1.reset_parameters()
        self.linear_2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., in_features) to (..., out_features); as `mlp_projector`."""
        first, second = self.linear_1, self.linear_2
        obstacle = fusion_obstacle({"linear_1": first, "linear_2": second}, x)
        if obstacle is not None:
            backend.check_composition(obstacle)
            return second(F.gelu(first(x)))
        return mlp_projector(x, first.weight, first.bias, second.weight, second.bias)


def project_groups(projectors: Sequence[Projector], xs: Sequence[Tensor]) -> list[Tensor]:
    """`[projector(x) for projector, x in zip(projectors, xs)]`, in one op where that changes nothing.

    It is one `grouped_mlp_projector` if no projector or layer of one has been replaced, hooked, quantised or
    sharded on its own, and all tokens and parameters share a device and a dtype (that of the autocast region
    inside one). Otherwise the projectors are called one after the other.

    Args:
        projectors: modules, each with its own widths.
        xs: for each a token set (..., in_features), of any number of tokens.

    Returns:
        A list of (..., out_features), as the projectors return.

    Raises:
        ValueError: not one token set per projector. TypeError, ValueError, RuntimeError: as `Projector`.
    """
    if len(projectors) != len(xs):
        raise ValueError(f"xs must hold one tensor per projector, {len(projectors)}, got {len(xs)}")
    groups = _one_op(projectors, xs)
    if groups is None:
        return [projector(x) for projector, x in zip(projectors, xs, strict=True)]
    token_sets, w1s, b1s, w2s, b2s = (list(values) for values in zip(*groups, strict=True))
    return grouped_mlp_projector(token_sets, w1s, b1s, w2s, b2s)


Group = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _one_op(projectors: Sequence[Projector], xs: Sequence[Tensor]) -> list[Group] | None:
    """The operands of all projectors in the compute dtype, or None if they must be called one by one."""
    groups: list[Group] = []
    for projector, x in zip(projectors, xs, strict=True):
        if type(projector) is not Projector or not isinstance(x, Tensor):
            return None
        first, second = projector.linear_1, projector.linear_2
        layers = {"linear_1": first, "linear_2": second}
        if call_obstacle(projector, x) is not None or fusion_obstacle(layers, x) is not None:
            return None
        parameters = [first.weight, first.bias, second.weight, second.bias]
        x, w1, b1, w2, b2 = autocast_operands(x.device, [x, *parameters])
        groups.append((x, w1, b1, w2, b2))
    operands = [value for group in groups for value in group]
    alike = all(value.dtype == operands[0].dtype and value.device == operands[0].device for value in operands)
    return groups if groups and alike else None


def _check_layer(x_name: str, x: Tensor, w_name: str, weight: Tensor, b_name: str, bias: Tensor) -> None:
    check_tensor(w_name, weight, ("out", "in"))
    check_tensor(b_name, bias, (weight.shape[0],))
    if not isinstance(x, Tensor) or x.ndim == 0:
        check_tensor(x_name, x, ("...", weight.shape[1]))
    check_tensor(x_name, x, (*("...",) * (x.ndim - 1), weight.shape[1]))


def _prepared_groups(
    op: str, groups: Sequence[Sequence[Tensor]], names: Sequence[Sequence[str]]
) -> tuple[list[Group], str]:
    """Checked groups with their operands in the compute dtype, and the path to take."""
    prepared: list[Group] = []
    for group, (x_name, w1_name, b1_name, w2_name, b2_name) in zip(groups, names, strict=True):
        x, w1, b1, w2, b2 = group
        _check_layer(x_name, x, w1_name, w1, b1_name, b1)
        check_tensor(w2_name, w2, ("out", w1.shape[0]))
        check_tensor(b2_name, b2, (w2.shape[0],))
        x, w1, b1, w2, b2 = autocast_operands(x.device, [x, w1, b1, w2, b2])
        model_name, model = (names[0][0], prepared[0][0]) if prepared else (x_name, x)
        for name, value in zip(
            (x_name, w1_name, b1_name, w2_name, b2_name), (x, w1, b1, w2, b2), strict=True
        ):
            check_alike(name, value, model_name, model)
        prepared.append((x, w1, b1, w2, b2))
    return prepared, backend.resolve(op, prepared[0][0]).name


def _projected(groups: list[Group], path: str) -> list[Tensor]:
    if path == "reference":
        return [reference.mlp_projector(*group) for group in groups]
    xs, w1s, b1s, w2s, b2s = (list(values) for values in zip(*groups, strict=True))
    save = any(_save(*group) for group in groups)
    return _grouped_mlp_projector(xs, w1s, b1s, w2s, b2s, save, path)[: len(groups)]


def _save(*inputs: Tensor) -> bool:
    """Whether a backward pass can follow, so that its intermediates must be kept."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in inputs)


@torch.library.custom_op("mgllava::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, save: bool, path: str) -> tuple[Tensor, Tensor]:
    return backend.call("linear_gelu", path, "linear_gelu", x.device, x, weight, bias, save)


@_linear_gelu.register_fake
def _(x, weight, bias, save, path):
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    return output, torch.empty_like(output) if save else x.new_empty(0)


@torch.library.custom_op("mgllava::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre_activation: Tensor, needed: Sequence[bool], path: str
) -> list[Tensor]:
    arguments = (grad, x, weight, pre_activation, needed)
    return backend.call("linear_gelu", path, "linear_gelu_backward", x.device, *arguments)


@_linear_gelu_backward.register_fake
def _(grad, x, weight, pre_activation, needed, path):
    like = (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]))
    return [value for value, need in zip(like, needed, strict=True) if need]


def _linear_gelu_setup(ctx, inputs, output):
    x, weight, _, _, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _linear_gelu_autograd(ctx, grad, _):
    needed = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 5
    backend.refuse_batched_gradients("linear_gelu", grad)
    grads = iter(_linear_gelu_backward(grad, *ctx.saved_tensors, needed, ctx.path))
    return *(next(grads) if need else None for need in needed), None, None


_linear_gelu.register_autograd(_linear_gelu_autograd, setup_context=_linear_gelu_setup)
_linear_gelu_backward.register_autograd(backend.refuse_double_backward("linear_gelu"))


@torch.library.custom_op("mgllava::grouped_mlp_projector", mutates_args=())
def _grouped_mlp_projector(
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    b1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    b2s: Sequence[Tensor],
    save: bool,
    path: str,
) -> list[Tensor]:
    """The outputs, then (with `save`) the inputs of the GELUs."""
    arguments = (xs, w1s, b1s, w2s, b2s, save)
    return backend.call("grouped_mlp_projector", path, "grouped_mlp_projector", xs[0].device, *arguments)


@_grouped_mlp_projector.register_fake
def _(xs, w1s, b1s, w2s, b2s, save, path):
    outputs = [x.new_empty(*x.shape[:-1], b2.shape[0]) for x, b2 in zip(xs, b2s, strict=True)]
    hidden = [x.new_empty(*x.shape[:-1], b1.shape[0]) for x, b1 in zip(xs, b1s, strict=True)]
    return outputs + hidden if save else outputs


@torch.library.custom_op("mgllava::grouped_mlp_projector_backward", mutates_args=())
def _grouped_mlp_projector_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    needed: Sequence[bool],
    path: str,
) -> list[Tensor]:
    """`needed` holds five answers per group: x, w1, b1, w2, b2."""
    arguments = (grads, xs, w1s, w2s, pre_activations, needed)
    return backend.call(
        "grouped_mlp_projector", path, "grouped_mlp_projector_backward", xs[0].device, *arguments
    )


@_grouped_mlp_projector_backward.register_fake
def _(grads, xs, w1s, w2s, pre_activations, needed, path):
    shapes = []
    for x, w1, w2 in zip(xs, w1s, w2s, strict=True):
        shapes += [x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]]
    return [xs[0].new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


def _grouped_setup(ctx, inputs, output):
    xs, w1s, _, w2s, _, _, ctx.path = inputs
    ctx.groups = len(xs)
    pre_activations = output[ctx.groups :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*pre_activations)
    ctx.save_for_backward(*xs, *w1s, *w2s, *pre_activations)


def _grouped_autograd(ctx, grads):
    backend.refuse_batched_gradients("mlp_projector", *grads)
    sets = range(ctx.groups)
    saved = ctx.saved_tensors
    xs, w1s, w2s, pre_activations = (saved[ctx.groups * i : ctx.groups * (i + 1)] for i in range(4))
    # Nothing flows into a set whose output was not used: zeros in its place would make NaN of what is infinite.
    used = [i for i in sets if grads[i] is not None]
    needs = list(zip(*ctx.needs_input_grad[:5], strict=True))
    results: dict[int, list[Tensor | None]] = {i: [None] * 5 for i in sets}
    if used:
        columns = ([column[i] for i in used] for column in (grads, xs, w1s, w2s, pre_activations))
        needed = [need for i in used for need in needs[i]]
        found = iter(_grouped_mlp_projector_backward(*columns, needed, ctx.path))
        results.update({i: [next(found) if need else None for need in needs[i]] for i in used})
    return *(list(column) for column in zip(*results.values(), strict=True)), None, None


_grouped_mlp_projector.register_autograd(_grouped_autograd, setup_context=_grouped_setup)
_grouped_mlp_projector_backward.register_autograd(backend.refuse_double_backward("grouped_mlp_projector"))
