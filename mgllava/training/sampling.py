"""The order in which samples are trained on."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Generator
from torch.utils.data import Sampler

__all__ = ["TrainingOrder"]

# Batches that are sorted by length together: more of them need less padding, fewer mix lengths better.
GROUPED_BATCHES = 50


class TrainingOrder(Sampler[int]):
    """A fixed order of each epoch, cut into global batches; the same whatever processes share them.

    Positions `i * global_batch` to `(i + 1) * global_batch` are batch i. Its processes take consecutive pieces of
    it. The last batch is filled up with samples of the epoch's beginning.

    Args:
        lengths: (samples,) tokens of each sample, negative for text alone.
        global_batch: samples of one step of the optimiser, over all processes.
        grouped: batches of one modality and of like lengths (stage 2), the one with the longest sample first, so
            that memory that is too small shows at once. What is left of both modalities makes mixed batches.
        seed: with the epoch's number it decides the order.
    """

    def __init__(self, lengths: Sequence[int], global_batch: int, *, grouped: bool, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.global_batch = global_batch
        self.grouped = grouped
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        generator = Generator().manual_seed(self.seed + self.epoch)
        order = self._grouped_order(generator) if self.grouped else _shuffled(len(self.lengths), generator)
        return iter(np.resize(order, len(self)).tolist())

    def _grouped_order(self, generator: Generator) -> np.ndarray:
        batches: list[np.ndarray] = []
        leftovers: list[np.ndarray] = []
        for members in (np.flatnonzero(self.lengths >= 0), np.flatnonzero(self.lengths < 0)):
            members = members[_shuffled(len(members), generator)]
            whole = len(members) // self.global_batch * self.global_batch
            for first in range(0, whole, GROUPED_BATCHES * self.global_batch):
                group = self._by_length(
                    members[first : min(first + GROUPED_BATCHES * self.global_batch, whole)]
                )
                batches += np.split(group, len(group) // self.global_batch)
            leftovers.append(members[whole:])
        batches = [batches[index] for index in _shuffled(len(batches), generator)]
        if batches:
            longest = max(range(len(batches)), key=lambda index: np.abs(self.lengths[batches[index]]).max())
            batches[0], batches[longest] = batches[longest], batches[0]
        return np.concatenate([*batches, self._by_length(np.concatenate(leftovers))])

    def _by_length(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-np.abs(self.lengths[indices]), kind="stable")]


def _shuffled(count: int, generator: Generator) -> np.ndarray:
    return torch.randperm(count, generator=generator).numpy()
