"""The order of the data."""

import numpy as np
import pytest

from mgllava.training.sampling import TrainingOrder


def lengths_of(pictured: int, text_only: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 900, pictured + text_only)
    lengths[generator.permutation(pictured + text_only)[:text_only]] *= -1
    return lengths


def batches_of(order: TrainingOrder) -> list[list[int]]:
    indices = list(order)
    assert len(indices) == len(order)
    return [indices[first : first + order.global_batch] for first in range(0, len(order), order.global_batch)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("pictured", "text_only"), [(64, 0), (0, 40), (70, 33), (3, 2), (500, 171)])
def test_an_epoch_holds_every_sample_once_and_fills_its_last_batch(grouped, pictured, text_only):
    order = TrainingOrder(lengths_of(pictured, text_only), 8, grouped=grouped, seed=3)
    indices = list(order)
    count = pictured + text_only
    assert len(indices) == len(order) == -(-count // 8) * 8
    assert sorted(indices[:count]) == list(range(count))
    assert indices[count:] == indices[: len(indices) - count]


@pytest.mark.parametrize("grouped", [False, True])
def test_seed_and_epoch_decide_the_order(grouped):
    def order(seed: int, epoch: int) -> list[int]:
        made = TrainingOrder(lengths_of(50, 20), 8, grouped=grouped, seed=seed)
        made.set_epoch(epoch)
        return list(made)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_grouped_batches_are_of_one_modality():
    lengths = lengths_of(500, 171)
    batches = batches_of(TrainingOrder(lengths, 8, grouped=True, seed=3))
    mixed = [batch for batch in batches if len({length > 0 for length in lengths[batch]}) == 2]
    # 500 and 171 leave 4 and 3 samples over, which make the last batch.
    assert mixed in ([], [batches[-1]])
    kinds = [lengths[batch[0]] > 0 for batch in batches[:-1]]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)


def test_grouped_batches_need_less_padding():
    lengths = lengths_of(2000, 500)

    def padding(grouped: bool) -> int:
        batches = batches_of(TrainingOrder(lengths, 8, grouped=grouped, seed=3))
        sizes = [np.abs(lengths[batch]) for batch in batches]
        return sum(int((size.max() - size).sum()) for size in sizes)

    assert padding(True) < 0.1 * padding(False)


def test_the_longest_sample_comes_in_the_first_batch():
    lengths = lengths_of(500, 171)
    first = batches_of(TrainingOrder(lengths, 8, grouped=True, seed=3))[0]
    whole = batches_of(TrainingOrder(lengths, 8, grouped=True, seed=3))[:-1]
    assert np.abs(lengths[first]).max() == max(np.abs(lengths[batch]).max() for batch in whole)
