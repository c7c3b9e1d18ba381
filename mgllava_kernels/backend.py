"""Which implementation an op runs on: what the user asked for, what exists, and why the choice fell as it
did.

`reference` is the literal composition and the oracle, `torch` the fast algebra in PyTorch, `triton` the fused
kernels. Implementations are registered by module path and imported on first use, so that importing this
package touches neither triton nor CUDA.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

from mgllava_kernels._autocast import autocast_enabled
from mgllava_kernels._tracing import constant_when_traced

CHOICES = ("auto", "triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "MGLLAVA_KERNELS"
# torch.func.functionalize is not among them: it changes no derivative and no shape.
TRANSFORMS = (TransformType.Vmap, TransformType.Grad, TransformType.Jvp)

# Older GPUs have no asynchronous copies and no tf32, which the kernels count on.
OLDEST_CAPABILITY = (8, 0)

_chosen: ContextVar[str | None] = ContextVar("mgllava_kernels_backend", default=None)
_modules: dict[str, dict[str, str]] = {}
_exceptions: dict[str, Callable[[Tensor], str | None]] = {}


@dataclass(frozen=True)
class Backend:
    """The implementation an op would run on (`name`) and why (`reason`)."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation of every op of this package inside a `with` block.

    Args:
        name: `"auto"` (Triton on a GPU where the op has a Triton kernel, else `torch`; `torch` for float64),
            `"triton"`, `"torch"` or `"reference"`.

    The block wins over the environment variable `MGLLAVA_KERNELS`, which takes the same values (empty counts as
    unset) and is read at each call. The choice belongs to the current thread or asyncio task; it is resolved
    when an op is called and kept for its backward pass. `torch.compile` resolves it when it traces: enter the
    block around the first call of the compiled function. `torch.utils.checkpoint` calls its function again in
    the backward pass: enter the block inside the checkpointed function, or around the backward pass as well.
    Otherwise the recomputation may take another implementation, and torch raises CheckpointError.

    `torch` and `triton` have first derivatives by backpropagation only. Double backward and `is_grads_batched`
    need a forward pass on `reference`. Inside `torch.func` transforms (grad, jvp, jacrev, vmap, ...) and
    forward-mode differentiation `"auto"` takes `reference`, and `"torch"` and `"triton"` raise RuntimeError.
    `roi_align` and `pooled_roi_align` cannot be differentiated twice on any path and raise inside all of these.

    A module whose layers have been replaced, hooked, quantised or sharded one by one calls them instead of an
    op, unless the choice is `"triton"`: then, as always when that choice cannot be met, it raises RuntimeError.

    Raises:
        ValueError: `name` is none of the four.
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def active_backend(tensor: Tensor, op: str | None = None) -> Backend:
    """The implementation that an op called on `tensor` now would take, with the reason.

    Args:
        tensor: a tensor with the device and dtype the op would be called with.
        op: name of a public function of this package; None asks about an op with every implementation there
            is.

    Tuned tables may send single matrix products of the projector ops to torch (cuBLAS) though the op as a whole
    runs on Triton: the reason then names them, for the device and dtype of `tensor`.

    Raises:
        ValueError: unknown `op`, an illegal value in `MGLLAVA_KERNELS`, or an unusable tuned table.
        RuntimeError: an explicit choice that cannot be met, as the op itself would raise.
    """
    if op is not None and op not in _modules:
        raise ValueError(f"op must be one of {', '.join(sorted(_modules))}; got {op!r}")
    chosen = resolve(op, tensor)
    if chosen.name != "triton" or op not in _exceptions:
        return chosen
    exceptions = _exceptions[op](tensor)
    return chosen if exceptions is None else Backend(chosen.name, f"{chosen.reason}; {exceptions}")


def register(op: str, *, exceptions: Callable[[Tensor], str | None] | None = None, **modules: str) -> None:
    """Register the modules that implement `op`: `register("roi_align", torch="package.module")`.

    `exceptions` says what of the op does not run on Triton though the op does, for a tensor's device and dtype.
    """
    _modules.setdefault(op, {}).update(modules)
    if exceptions is not None:
        _exceptions[op] = exceptions


def registered_ops() -> list[str]:
    """The names `active_backend` takes as `op`."""
    return sorted(_modules)


def resolve(op: str | None, tensor: Tensor) -> Backend:
    """Apply the user's choice to one call of `op` on `tensor`."""
    choice, source = _requested()
    if choice == "reference":
        return Backend(choice, f"chosen by {source}")
    if in_transform():
        why = "only 'reference' runs inside torch.func transforms and forward-mode differentiation"
        if choice != "auto":
            raise RuntimeError(
                f'backend {choice!r} was chosen by {source}, but {why}: use_backend("reference")'
            )
        return Backend("reference", why)
    if choice == "torch":
        return Backend(choice, f"chosen by {source}")
    obstacle = _triton_obstacle(op, tensor)
    if choice == "triton":
        if obstacle is not None:
            raise RuntimeError(f"backend 'triton' was chosen by {source}, but {obstacle}")
        return Backend("triton", f"chosen by {source}")
    if obstacle is not None:
        return Backend("torch", obstacle)
    if tensor.device.type == "cpu":
        return Backend("torch", "the tensor is on the CPU")
    return Backend("triton", f"the tensor is on {tensor.device.type}")


def check_composition(why: str) -> None:
    """Refuse to call a module's layers one after the other where fused kernels were asked for by name.

    `torch` and `reference` are met by a composition, `triton` is not; `why` says what rules out fusing.
    """
    choice, source = _requested()
    if choice == "triton":
        raise RuntimeError(f"backend 'triton' was chosen by {source}, but {why}")


@constant_when_traced
def in_transform() -> bool:
    """Whether a `torch.func` transform or a level of forward-mode differentiation is active.

    Custom ops have no rules for them, and torch gives their outputs zero tangents without a word.
    """
    stack = get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() in TRANSFORMS for level in stack)


def refuse_batched_gradients(op: str, *grads: Tensor | None) -> None:
    """Say in a backward pass that it takes one gradient at a time, where torch would miss a batching rule."""
    if torch.compiler.is_compiling():
        return
    for grad in grads:
        # `is_grads_batched` has its own, older kind of batched tensor.
        if grad is not None and (is_legacy_batchedtensor(grad) or is_functorch_wrapped_tensor(grad)):
            raise RuntimeError(
                f"the backward pass of {op} takes no batched gradients (is_grads_batched, vmap) on this "
                f'backend: call {op} inside use_backend("reference")'
            )


def refuse_double_backward(
    op: str, remedy: str = 'call it inside use_backend("reference")'
) -> Callable[..., None]:
    """The autograd formula of a backward op: an error that says what to do."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{op} cannot be differentiated twice on this backend: {remedy}")

    return refuse


def call(op: str, backend: str, function: str, device: torch.device, *args: Any) -> Any:
    """Run `function` of the module that implements `op` on `backend`, with autocast off.

    Ops are opaque to autocast: the public functions have cast what is to be cast, and the algebra inside
    depends on the dtypes it chose.
    """
    implementation: Callable[..., Any] = getattr(_load(_modules[op][backend]), function)
    if autocast_enabled(device):
        with torch.autocast(device.type, enabled=False):
            return implementation(*args)
    return implementation(*args)


@constant_when_traced
def _requested() -> tuple[str, str]:
    """The requested backend and who asked for it."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen, "use_backend"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if value:
        return _checked(value, ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    return "auto", "default"


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}; got {name!r}")
    return name


def _triton_obstacle(op: str | None, tensor: Tensor) -> str | None:
    """Why `op` cannot run on Triton for `tensor`, or None."""
    if op is None:
        if not any("triton" in modules for modules in _modules.values()):
            return "no op has a Triton kernel yet"
    elif "triton" not in _modules[op]:
        return f"{op} has no Triton kernel yet"
    if tensor.dtype == torch.float64:
        return "Triton kernels do not compute in float64"
    if tensor.device.type not in ("cuda", "cpu"):
        return f"Triton kernels do not run on {tensor.device.type}"
    if tensor.device.type == "cpu" and not _interpreted():
        return "the tensor is on the CPU and TRITON_INTERPRET=1 is not set"
    if not _triton_installed():
        return "triton is not installed"
    if tensor.device.type == "cuda" and _capability(tensor.device) < OLDEST_CAPABILITY:
        return "Triton kernels need an NVIDIA GPU of compute capability 8.0 or newer, or an AMD one"
    return None


@constant_when_traced
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; of AMD GPUs, and where tensors only pretend to be on a GPU, the one asked for."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return OLDEST_CAPABILITY
    return torch.cuda.get_device_capability(device)


@constant_when_traced
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_traced
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _load(module: str) -> ModuleType:
    return importlib.import_module(module)
