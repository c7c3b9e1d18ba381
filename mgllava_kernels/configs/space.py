"""What may be chosen for a kernel, and what is legal on a target."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mgllava_kernels._triton.launch import Target

# Threads of a program, on NVIDIA and on AMD; an AMD warp has 64 of them.
MAX_THREADS = 1024


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of the kernel's constexpr parameter, and Triton's options.

    A name that begins with BLOCK is the length of a tensor's axis and so a power of two; other parameters are
    any integers from 1 on.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items())


Sizes = Mapping[str, int]


# Compared and hashed by identity: a space is looked up at every launch.
@dataclass(frozen=True, eq=False)
class Space:
    """What may be chosen for one kernel.

    `heuristic` and `candidates` get the target, the dtype of the features, the sizes that are fixed by a model
    (they are the key of a table, together with the dtype) and the count that varies from call to call (boxes,
    tokens), for which the nearest entry is taken. `shared_memory` estimates the bytes a config needs. All
    configs of one space name the same parameters.
    """

    kernel: str
    heuristic: Callable[["Target", torch.dtype, Sizes, int], Config]
    candidates: Callable[["Target", torch.dtype, Sizes, int], Iterable[Config]]
    shared_memory: Callable[[Config, torch.dtype], int]


def legal(config: Config, space: Space, target: "Target", dtype: torch.dtype) -> str | None:
    """Why `config` cannot be launched on `target` for features of `dtype`, or None if it can."""
    for name, value in config.blocks:
        if value < 1:
            return f"{name} must be at least 1, got {value}"
        if name.startswith("BLOCK") and value & (value - 1):
            return f"{name} must be a power of two, got {value}"
    if config.num_warps < 1 or config.num_warps & (config.num_warps - 1):
        return f"num_warps must be a power of two, got {config.num_warps}"
    threads = config.num_warps * target.warp_size
    if threads > MAX_THREADS:
        return f"{config.num_warps} warps of {target.warp_size} are {threads} threads, at most {MAX_THREADS}"
    if config.num_stages < 1:
        return f"num_stages must be at least 1, got {config.num_stages}"
    needed = space.shared_memory(config, dtype)
    if needed > target.shared_memory:
        return f"needs {needed} bytes of shared memory, {target.name} has {target.shared_memory} per program"
    return None
