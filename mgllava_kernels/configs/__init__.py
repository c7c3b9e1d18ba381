"""Launch parameters of the kernels: tuned tables where there are some for the device, else a heuristic."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mgllava_kernels._triton.launch import Target


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of the kernel's constexpr parameter, and Triton's options."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Space:
    """What may be chosen for one kernel.

    `heuristic` and `candidates` get the target, the dtype of the features, the sizes that are fixed by a model
    (they are the key of a table, together with the dtype) and the count that varies from call to call (boxes,
    tokens), for which the nearest entry is taken. `shared_memory` estimates the bytes a config needs.
    """

    kernel: str
    heuristic: Callable[["Target", torch.dtype, Sizes, int], Config]
    candidates: Callable[["Target", torch.dtype, Sizes, int], Iterable[Config]]
    shared_memory: Callable[[Config, torch.dtype], int]


def choose(space: Space, target: "Target", dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    """The config to launch `space.kernel` with."""
    return space.heuristic(target, dtype, sizes, count)
