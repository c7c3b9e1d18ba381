"""Times of calls: in rounds on a CPU; with rotating inputs, launched and inside a CUDA graph, on a GPU."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]

# Fewer than three times have no quantiles worth the name, more than a hundred no news.
MIN_ROUNDS, MAX_ROUNDS = 3, 100
# On a GPU: samples; milliseconds of one sample of graph replays, long beside the half microsecond that events
# resolve; milliseconds of all launched calls, and how many they may be.
SAMPLES, GRAPH_SAMPLE_MS, EAGER_MS, MAX_LAUNCHES = 31, 1.0, 200.0, 1000
# Sets of inputs for one call: as many as exceed the L2 cache twice, at most these.
MAX_SETS = 64


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """`min`, `p20`, `median`, `p80`, `max` in milliseconds."""
    values = sorted(seconds)

    def at(fraction: float) -> float:
        place = fraction * (len(values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (values[above] - values[below]) * (place - below)

    named = {"min": values[0], "p20": at(0.2), "median": statistics.median(values), "p80": at(0.8)}
    return {name: value * 1e3 for name, value in (named | {"max": values[-1]}).items()}


def in_rounds(
    calls: Mapping[str, Call],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call on a CPU, all calls in turn, until `budget` seconds are spent.

    Whatever else the machine does then falls on all of them, so their ratios hold. Every other round goes
    backwards, so that no call always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begin = clock()
    for round_number in range(MAX_ROUNDS):
        names = list(calls) if round_number % 2 == 0 else list(reversed(calls))
        for name in names:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
        if round_number + 1 >= MIN_ROUNDS and clock() - begin >= budget:
            break
    return seconds


def number_of_sets(nbytes: int, cache: int) -> int:
    """Sets of inputs of `nbytes` each that together exceed a cache twice, so that each is read from memory."""
    return 1 if nbytes >= 2 * cache else min(MAX_SETS, math.ceil(2 * cache / max(nbytes, 1)) + 1)


def launched(calls: Sequence[Call], budget: float) -> list[float]:
    """Seconds of a call on the current GPU as the host launches it, over sets of inputs in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = max(_elapsed(calls) / len(calls), 1e-3)
    wanted = min(MAX_LAUNCHES, max(SAMPLES, math.ceil(EAGER_MS / once)))
    samples = min(wanted, max(MIN_ROUNDS, math.ceil(budget * 1e3 / once)))
    events = []
    for index in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[index % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def replayed(make_calls: Callable[[], Sequence[Call]], budget: float) -> list[float]:
    """Seconds of a call inside a CUDA graph that makes all of them in turn: without what the host needs.

    `make_calls` is called on the stream that is captured, for a backward pass runs where its forward pass ran.

    Raises:
        RuntimeError: a call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = make_calls()
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    once = max(_elapsed([graph.replay]), 1e-3)
    replays = max(1, math.ceil(GRAPH_SAMPLE_MS / once))
    samples = min(SAMPLES, max(MIN_ROUNDS, math.ceil(budget * 1e3 / (replays * once))))
    times = [_elapsed([graph.replay] * replays) / 1e3 / (replays * len(calls)) for _ in range(samples)]
    graph.reset()
    return times


def _elapsed(calls: Sequence[Call]) -> float:
    """Milliseconds of the calls one after the other on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
