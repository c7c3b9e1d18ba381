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
from typing import Any, TypeVar

import torch
from torch import Tensor

CHOICES = ("auto", "triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "MGLLAVA_KERNELS"

Function = TypeVar("Function", bound=Callable[..., Any])

_chosen: ContextVar[str | None] = ContextVar("mgllava_kernels_backend", default=None)
_modules: dict[str, dict[str, str]] = {}


def _constant_when_traced(function: Function) -> Function:
    """Have torch.compile call `function` while tracing and keep the result.

    The mark is all that `torch.compiler.assume_constant_result` sets, but that function imports
    torch._dynamo, and with it triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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

    The block wins over the environment variable `MGLLAVA_KERNELS`, which takes the same values and is read at
    each call. The choice belongs to the current thread or asyncio task; it is resolved when an op is called
    and kept for its backward pass. `torch.compile` resolves it when it traces: enter the block around the
    first call of the compiled function.

    A module whose layers have been replaced, hooked or quantised calls them instead of an op, unless the
    choice is `"triton"`: then, as always when that choice cannot be met, it raises RuntimeError.

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

    Raises:
        ValueError: unknown `op`, or an illegal value in `MGLLAVA_KERNELS`.
        RuntimeError: an explicit choice that cannot be met, as the op itself would raise.
    """
    if op is not None and op not in _modules:
        raise ValueError(f"op must be one of {', '.join(sorted(_modules))}; got {op!r}")
    return resolve(op, tensor)


def register(op: str, **modules: str) -> None:
    """Register the modules that implement `op`: `register("roi_align", torch="package.module")`."""
    _modules.setdefault(op, {}).update(modules)


def registered_ops() -> list[str]:
    """The names `active_backend` takes as `op`."""
    return sorted(_modules)


def resolve(op: str | None, tensor: Tensor) -> Backend:
    """Apply the user's choice to one call of `op` on `tensor`."""
    choice, source = _requested()
    if choice in ("reference", "torch"):
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


def call(op: str, backend: str, function: str, device: torch.device, *args: Any) -> Any:
    """Run `function` of the module that implements `op` on `backend`, with autocast off.

    Ops are opaque to autocast: the public functions have cast what is to be cast, and the algebra inside
    depends on the dtypes it chose.
    """
    implementation: Callable[..., Any] = getattr(_load(_modules[op][backend]), function)
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return implementation(*args)
    return implementation(*args)


@_constant_when_traced
def _requested() -> tuple[str, str]:
    """The requested backend and who asked for it."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen, "use_backend"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if value is not None:
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
    return None


@_constant_when_traced
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant_when_traced
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _load(module: str) -> ModuleType:
    return importlib.import_module(module)
