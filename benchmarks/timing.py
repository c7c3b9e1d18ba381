"""Times of calls: in rounds on a CPU; with rotating inputs, launched and inside a CUDA graph, on a GPU.

On a GPU this is what `triton.testing.do_bench` and `do_bench_cudagraph` do (events, a warm-up by time, medians), but
over several sets of inputs: do_bench empties the L2 cache by writing to it, which a graph cannot do between its
calls, and a call would find the cache full of lines to be written back.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], object]
# Seconds of each call by name.
Times = dict[str, list[float]]

# Fewer than three rounds have no quantiles worth the name, more than a hundred no news.
MIN_ROUNDS, MAX_ROUNDS = 3, 100
# Calls longer than this many seconds get two rounds: whatever else the machine does averages out in them.
SLOW_SECONDS, SLOW_ROUNDS = 20.0, 2
# A turn of a fast call goes on for this many seconds, or calls: one call a round would have few times where a rival is
# slow, and all of them taken with the caches full of that rival's data.
TURN_SECONDS, TURN_CALLS = 0.2, 200
# Times with p80 / p20 above this are noise; how often is tried to get better ones.
NOISY, ATTEMPTS = 1.3, 3
# On a GPU: samples; milliseconds of a graph, long beside the gap between two; of calls before the first sample, for
# clocks take their time; of all launched calls, and how many they may be.
SAMPLES, GRAPH_MS, WARM_UP_MS, EAGER_MS, MAX_LAUNCHES = 31, 1.0, 50.0, 200.0, 1000
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


def spread(seconds: Sequence[float]) -> float:
    """p80 / p20: 1 on a quiet machine."""
    found = quantiles(seconds)
    return found["p80"] / found["p20"] if found["p20"] else 1.0


def quietest(
    measure: Callable[[], Times], budget: float, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """What `measure` returns; if that spreads too far, the calmest of up to three attempts.

    An attempt that took more than twice the budget is not repeated: it is minutes of slow calls.
    """
    attempts: list[Times] = []
    for _ in range(ATTEMPTS):
        begin = clock()
        attempts.append(measure())
        if _widest(attempts[-1]) <= NOISY or clock() - begin > 2 * budget:
            break
    return min(attempts, key=_widest)


def _widest(times: Times) -> float:
    return max((spread(seconds) for seconds in times.values()), default=1.0)


def in_rounds(
    calls: Mapping[str, Call],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Times, dict[str, Exception]]:
    """Seconds of each call on a CPU, all calls in turn, until `budget` seconds are spent; and what calls raised.

    A turn is one slow call or several fast ones, of which the first does not count after a slow neighbour. Whatever
    else the machine does then falls on all of them, so their ratios hold. Every other round goes backwards, so that
    no call always follows the same one. A call that raises has no times and gets no more turns.
    """
    seconds: Times = {name: [] for name in calls}
    failures: dict[str, Exception] = {}
    begin, last = clock(), 0.0
    for round_number in range(MAX_ROUNDS):
        names = [name for name in seconds if not _is_done(seconds[name])]
        for name in names if round_number % 2 == 0 else reversed(names):
            try:
                times = _turn(calls[name], clock)
            except Exception as error:
                failures[name] = error
                del seconds[name]
            else:
                seconds[name] += times[1:] if len(times) > 1 and last > TURN_SECONDS else times
                last = times[-1]
        if round_number + 1 >= MIN_ROUNDS and clock() - begin >= budget:
            break
    return seconds, failures


def _turn(call: Call, clock: Callable[[], float]) -> list[float]:
    """Seconds of the calls of one turn."""
    times: list[float] = []
    while not times or (sum(times) < TURN_SECONDS and len(times) < TURN_CALLS):
        start = clock()
        call()
        times.append(clock() - start)
    return times


def _is_done(seconds: Sequence[float]) -> bool:
    return len(seconds) >= SLOW_ROUNDS and seconds[0] > SLOW_SECONDS


def number_of_sets(nbytes: int, cache: int) -> int:
    """Sets of inputs of `nbytes` each that together exceed a cache twice, so that each is read from memory."""
    return 1 if nbytes >= 2 * cache else min(MAX_SETS, math.ceil(2 * cache / max(nbytes, 1)) + 1)


def launched(calls: Sequence[Call], budget: float) -> list[float]:
    """Seconds of a call on the current GPU as the host launches it, over sets of inputs in turn."""
    once = warm_up(calls)
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


def replayed(
    make_calls: Callable[[], Sequence[Call]], budget: float, verify: Callable[[Any], object] = lambda _: None
) -> list[float]:
    """Seconds of a call inside a CUDA graph that makes all of them in turn: without what the host needs.

    The graph goes round the sets of inputs for a millisecond at least: of a graph of one short call the gap before
    it would be a tenth.

    Args:
        make_calls: called on the stream that is captured, for a backward pass runs where its forward pass ran.
        budget: seconds, about.
        verify: gets the results of the first call as the graph left them, and raises if they are wrong.

    Raises:
        Exception: a call cannot be captured, or what `verify` raises.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = make_calls()
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph, results = _captured(calls, 1, stream)
    rounds = math.ceil(GRAPH_MS / warm_up([graph.replay]))
    if rounds > 1:
        graph.reset()
        graph, results = _captured(calls, rounds, stream)
    graph.replay()
    torch.cuda.synchronize()
    verify(results)
    del results
    once = warm_up([graph.replay])
    samples = min(SAMPLES, max(MIN_ROUNDS, math.ceil(budget * 1e3 / once)))
    times = [_elapsed([graph.replay]) / 1e3 / (rounds * len(calls)) for _ in range(samples)]
    graph.reset()
    return times


def _captured(calls: Sequence[Call], rounds: int, stream: torch.cuda.Stream) -> tuple[Any, Any]:
    """A graph of all calls, `rounds` times, and the results of its first one, whose memory it leaves alone."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = calls[0]()
        for call in [*calls[1:], *list(calls) * (rounds - 1)]:
            call()
    return graph, results


def warm_up(calls: Sequence[Call]) -> float:
    """Milliseconds of one call on the current GPU, after enough of them that its clocks are up."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    spent = once = 0.0
    while spent < WARM_UP_MS:
        once = max(_elapsed(calls), 1e-3)
        spent += once
    return once / len(calls)


def _elapsed(calls: Sequence[Call]) -> float:
    """Milliseconds of the calls one after the other on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
