"""Muon for matrices, AdamW for all else, as one optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonWithAdamW"]


class MuonWithAdamW(Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) on the weights of linear layers, AdamW on everything else.

    Embeddings and the output layer of a language model are tables of vectors, not matrices: AdamW takes them too. For
    models that learn from nothing in little time: after 250 steps of 8 scenes the towers of `mgllava.pretraining` told
    80% of kinds; with AdamW alone, and a stem that does not overlap, 56%.

    Args:
        model: its parameters that learn.
        lr: of AdamW.
        matrix_lr: of Muon, whose updates are scaled to the size of AdamW's (arXiv 2502.16982).
        betas: of AdamW.
    """

    def __init__(
        self, model: nn.Module, lr: float, matrix_lr: float, betas: tuple[float, float] = (0.9, 0.98)
    ) -> None:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        if output is not None:
            tables.add(id(output.weight))
        matrices = {
            id(module.weight): module.weight
            for module in model.modules()
            if isinstance(module, nn.Linear)
            and module.weight.requires_grad
            and id(module.weight) not in tables
        }
        rest = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and id(parameter) not in matrices
        ]
        muon = _Float32Muon(
            matrices.values(), lr=matrix_lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self._parts: tuple[Optimizer, ...] = (muon, AdamW(rest, lr=lr, betas=betas, weight_decay=0.0))
        super().__init__([{"params": [*matrices.values(), *rest]}], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, so that a schedule that sets `lr` here sets it there.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in zip(("muon", "adamw"), self._parts, strict=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in zip(("muon", "adamw"), self._parts, strict=True):
            part.load_state_dict(state_dict[name])
        self._share_groups()


class _Float32Muon(Muon):
    """torch's Muon with iterations in float32 rather than bfloat16, which a CPU with AVX2 alone has no instructions
    for: there they took two thirds of a training step of the embedded model."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum_buffer"], group["momentum"])
                scale = 0.2 * max(weight.shape) ** 0.5  # `match_rms_adamw`
                weight.add_(_orthogonalise(update, group), alpha=-group["lr"] * scale)


def _orthogonalise(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """About U Vᵀ of the matrix's singular value decomposition, by the quintic iteration of the group's settings."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = (matrix.T if is_tall else matrix).float()
    result = result / result.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.T if is_tall else result
