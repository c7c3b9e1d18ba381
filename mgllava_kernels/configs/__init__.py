"""Launch parameters of the kernels: tuned tables where there are some for the device, else a heuristic.

Tables are JSON files, `<kernel>/<device>.json`, written by `python -m mgllava_kernels.tune`. They are looked
for in the folder that the environment variable MGLLAVA_KERNELS_CONFIGS names, if it is set, and then in this
package; an entry of the former hides those of the latter for the same dtype and sizes. Both are read when a
kernel is first launched on a device, and kept. That a heuristic chooses is logged, at level INFO, once for each
kernel and device.
"""

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mgllava_kernels.configs import tables
from mgllava_kernels.configs.space import Config, Sizes, Space, legal

if TYPE_CHECKING:
    from mgllava_kernels._triton.launch import Target

logger = logging.getLogger("mgllava_kernels")

__all__ = ["Config", "Request", "Sizes", "Space", "choose", "force", "legal", "observe", "reload"]


@dataclass(frozen=True)
class Request:
    """One question to `choose`, its sizes in the order of the kernel's author."""

    space: Space
    target: "Target"
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    count: int

    @property
    def key(self) -> tables.Key:
        """What an entry of a table is found by, with the count."""
        return self.dtype, tuple(sorted(self.sizes))

    def heuristic(self) -> Config:
        return self.space.heuristic(self.target, self.dtype, dict(self.sizes), self.count)

    def candidates(self) -> list[Config]:
        """Every legal candidate of the space beside the heuristic's config."""
        found = self.space.candidates(self.target, self.dtype, dict(self.sizes), self.count)
        heuristic = self.heuristic()
        return [
            config
            for config in dict.fromkeys(found)
            if config != heuristic and legal(config, self.space, self.target, self.dtype) is None
        ]


@dataclass(frozen=True)
class _Forced:
    kernel: str
    config: Config
    dtype: torch.dtype | None
    sizes: Sizes | None
    count: int | None

    def fits(self, request: Request) -> bool:
        return (
            self.kernel == request.space.kernel
            and self.dtype in (None, request.dtype)
            and self.sizes in (None, dict(request.sizes))
            and self.count in (None, request.count)
        )


@dataclass(frozen=True)
class _Intervention:
    forced: tuple[_Forced, ...] = ()
    observed: list[Request] | None = None


# Of the process, not of the thread: autograd runs a backward pass on a GPU in threads of its own.
_intervention: _Intervention | None = None


def choose(space: Space, target: "Target", dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    """The config to launch `space.kernel` with.

    Args:
        space: what may be chosen.
        target: what the kernel is launched on or compiled for.
        dtype: of the features.
        sizes: the sizes that are fixed by a model, by name; always the same names for one kernel.
        count: the size that varies from call to call. Of several entries for the same dtype and sizes, the one
            with the nearest count on a logarithmic scale is taken.

    Raises:
        ValueError: a table for the device is malformed or has an entry that is illegal there; the message
            names file and entry.
    """
    if _intervention is not None:
        return _intervened(_intervention, Request(space, target, dtype, tuple(sizes.items()), count))
    return _chosen(space, target, dtype, tuple(sizes.items()), count)


@contextmanager
def force(
    kernel: str,
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
    count: int | None = None,
) -> Iterator[None]:
    """Make `choose` return `config` for a kernel by its name inside the block, in all threads.

    With `dtype`, `sizes` or `count` only requests for just these are answered so. Of nested blocks the
    innermost that fits is taken. `choose` raises ValueError with the reason where the config is illegal.
    """
    now = _intervention or _Intervention()
    forced = (_Forced(kernel, config, dtype, sizes, count), *now.forced)
    with _intervene(_Intervention(forced, now.observed)):
        yield


@contextmanager
def observe() -> Iterator[list[Request]]:
    """A list that gets every request made inside the block, in all threads."""
    observed: list[Request] = []
    now = _intervention or _Intervention()
    with _intervene(_Intervention(now.forced, observed)):
        yield observed


def reload() -> None:
    """Forget what was read: the next launch of each kernel reads its tables anew."""
    _chosen.cache_clear()
    _entries.cache_clear()


@contextmanager
def _intervene(intervention: _Intervention) -> Iterator[None]:
    global _intervention
    before = _intervention
    _intervention = intervention
    try:
        yield
    finally:
        _intervention = before


def _intervened(intervention: _Intervention, request: Request) -> Config:
    if intervention.observed is not None:
        intervention.observed.append(request)
    for forced in intervention.forced:
        if forced.fits(request):
            reason = legal(forced.config, request.space, request.target, request.dtype)
            if reason is not None:
                raise ValueError(f"{forced.kernel} cannot take {forced.config}: {reason}")
            return forced.config
    return _chosen(request.space, request.target, request.dtype, request.sizes, request.count)


# Counts vary from call to call; a long run on many of them must not fill the memory.
@functools.lru_cache(maxsize=4096)
def _chosen(
    space: Space, target: "Target", dtype: torch.dtype, sizes: tuple[tuple[str, int], ...], count: int
) -> Config:
    entries = _entries(space, target).get((dtype, tuple(sorted(sizes))))
    if entries is None:
        # The tuner and compilation ahead of time intervene; theirs are no launches of a user's.
        if _intervention is None and target.backend != "interpreter":
            _advise(space.kernel, target.name)
        return space.heuristic(target, dtype, dict(sizes), count)
    wanted = math.log(max(count, 1))
    return min(entries, key=lambda entry: abs(math.log(entry.count) - wanted)).config


@functools.cache
def _advise(kernel: str, device: str) -> None:
    """Said once for a kernel on a device: later launches, of other sizes too, find nothing to do here."""
    logger.info(
        "no tuned launch parameters of %s for these sizes on %s: a heuristic chooses them; "
        "`python -m mgllava_kernels.tune` measures and writes them for published sizes",
        kernel,
        device,
    )


@functools.cache
def _entries(space: Space, target: "Target") -> Mapping[tables.Key, list[tables.Entry]]:
    """The entries for a kernel on a device, by dtype and sizes, smallest count first."""
    found: dict[tables.Key, list[tables.Entry]] = {}
    for folder in reversed(tables.folders()):
        path = tables.path_of(folder, space.kernel, target.name)
        if not path.is_file():
            continue
        of_folder: dict[tables.Key, list[tables.Entry]] = {}
        for index, entry in enumerate(tables.read(path).entries):
            reason = _unusable(entry, space, target)
            if reason is not None:
                raise ValueError(f"{path}: entry {index} ({entry}): {reason}")
            of_folder.setdefault(entry.key, []).append(entry)
        found.update(of_folder)
    return {key: sorted(entries, key=lambda entry: entry.count) for key, entries in found.items()}


def _unusable(entry: tables.Entry, space: Space, target: "Target") -> str | None:
    try:
        heuristic = space.heuristic(target, entry.dtype, dict(entry.sizes), entry.count)
    except KeyError as error:
        return f"the kernel needs the size {error}"
    taken = [name for name, _ in heuristic.blocks]
    given = [name for name, _ in entry.config.blocks]
    if sorted(taken) != sorted(given):
        return f"the kernel takes {', '.join(taken)}; got {', '.join(given)}"
    return legal(entry.config, space, target, entry.dtype)
