"""How kernels of this package are launched: on which device, with which options, or only compiled."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for and scheduled on.

    `backend` is "cuda", "hip", or "interpreter" for Triton's interpreter on the CPU; `arch` as Triton names
    it: 90 or "gfx942". `name` is the device name as torch reports it; it selects the tuned tables.
    `shared_memory` is in bytes per program.
    """

    backend: str
    arch: int | str
    name: str
    multiprocessors: int
    shared_memory: int
    warp_size: int

    @property
    def capability(self) -> int:
        """CUDA compute capability times ten (90 on Hopper), 0 elsewhere."""
        return self.arch if self.backend == "cuda" and isinstance(self.arch, int) else 0


# The interpreter keeps the grid of a launch in a global.
_interpreter = threading.Lock()

INTERPRETER = Target("interpreter", "cpu", "interpreter", 4, 1 << 20, 32)

# What is done with a launch instead of running it, and the target it is done for.
Compile = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]
_compile_only: ContextVar[tuple[Target, Compile] | None] = ContextVar("compile_only", default=None)


@contextmanager
def compile_only(target: Target, compile: Compile) -> Iterator[None]:
    """Hand every launch inside the block, chosen as for `target`, to `compile`; nothing runs.

    Ops then take tensors on the meta device.
    """
    token = _compile_only.set((target, compile))
    try:
        yield
    finally:
        _compile_only.reset(token)


def target_of(device: torch.device) -> Target:
    """The target that launches on `device` are chosen for; no synchronisation."""
    override = _compile_only.get()
    if override is not None:
        return override[0]
    if device.type == "cpu":
        return INTERPRETER
    return _gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if hip else properties.major * 10 + properties.minor
    shared_memory = properties.shared_memory_per_block if hip else properties.shared_memory_per_block_optin
    return Target(
        "hip" if hip else "cuda",
        arch,
        properties.name,
        properties.multi_processor_count,
        shared_memory,
        properties.warp_size,
    )


def launch(kernel: Any, programs: int, device: torch.device, args: Sequence[Any], **options: Any) -> None:
    """Launch `kernel` over a one-dimensional grid on the current stream of `device`.

    `options` are the kernel's constexpr parameters and Triton's own (num_warps, num_stages, ...). Grids have
    one dimension because the others end at 65,535.
    """
    if programs == 0:
        return
    # Triton 3.10 changes the default. Contraction is wanted in sums; where a rounding decides on which side of
    # an edge a sample falls, the kernel's caller turns it off.
    options.setdefault("enable_fp_fusion", True)
    override = _compile_only.get()
    if override is not None:
        override[1](kernel, (programs,), args, options)
    elif device.type == "cpu":
        with _interpreter:
            kernel[(programs,)](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options)


def odd(*values: int) -> tuple[int, ...]:
    """Integers from 0 on for a tuple argument of a kernel, as 2·v + 3; the kernel reads them with `half`.

    Triton compiles a kernel anew for every integer of a tuple that becomes 1 or a multiple of 16, and
    `do_not_specialize` does not reach into tuples. Of odd numbers above 1 it knows nothing.
    """
    return tuple(2 * value + 3 for value in values)


@triton.jit
def half(value):
    """The integer that `odd` packed."""
    return (value >> 1) - 1


@triton.jit
def multiple(value, DIVISOR: tl.constexpr):
    """`value`, a multiple of DIVISOR, in a form from which the compiler sees that it is one.

    `tl.multiple_of` marks the operation that made the value, and a value chosen by a branch has none.
    """
    return value // DIVISOR * DIVISOR
