"""How times are taken: rounds on a CPU, and on a GPU what a fake one can show."""

import pytest

from benchmarks import timing


class Clock:
    """Seconds that pass only in calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_calls_take_turns_and_every_other_round_goes_backwards():
    clock = Clock()
    calls = {"slow": clock.call("slow", 2.0), "fast": clock.call("fast", 0.5)}
    seconds, failures = timing.in_rounds(calls, budget=9.0, clock=clock)
    assert clock.calls == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert seconds == {"slow": [2.0] * 4, "fast": [0.5] * 4}
    assert failures == {}


def test_a_call_longer_than_the_budget_still_gets_the_smallest_number_of_rounds():
    clock = Clock()
    seconds, _ = timing.in_rounds({"slow": clock.call("slow", 15.0)}, budget=1.0, clock=clock)
    assert len(seconds["slow"]) == timing.MIN_ROUNDS


def test_a_call_of_more_than_twenty_seconds_gets_two_rounds_and_its_neighbours_all():
    clock = Clock()
    calls = {"slow": clock.call("slow", 21.0), "fast": clock.call("fast", 0.5)}
    seconds, _ = timing.in_rounds(calls, budget=1.0, clock=clock)
    assert seconds == {"slow": [21.0] * 2, "fast": [0.5] * 3}


def test_a_call_that_raises_has_no_times_and_the_others_do():
    clock = Clock()
    left = iter([None])

    def breaks():
        next(left)

    calls = {"breaks": breaks, "right": clock.call("right", 1.0)}
    seconds, failures = timing.in_rounds(calls, budget=3.0, clock=clock)
    assert seconds == {"right": [1.0] * 3}
    assert isinstance(failures["breaks"], StopIteration)


def test_noise_is_measured_again_and_the_calmest_attempt_counts():
    clock = Clock()
    attempts = iter([[1.0, 1.0, 2.0], [1.0, 1.0, 1.6], [1.0, 1.0, 1.9], [1.0]])
    assert timing.quietest(lambda: {"a": next(attempts)}, 1.0, clock) == {"a": [1.0, 1.0, 1.6]}
    assert next(attempts) == [1.0]
    calm = iter([[1.0, 1.1, 1.2], [1.0]])
    assert timing.quietest(lambda: {"a": next(calm)}, 1.0, clock) == {"a": [1.0, 1.1, 1.2]}

    def minutes():
        clock.now += 60
        return {"a": next(noisy)}

    noisy = iter([[1.0, 1.0, 9.0], [1.0]])
    assert timing.quietest(minutes, 1.0, clock) == {"a": [1.0, 1.0, 9.0]}


def test_a_fast_call_has_many_times_beside_a_slow_one():
    clock = Clock()
    first = iter([0.05] + [0.01] * 100)  # the slow one's data are in the caches

    def fast():
        clock.now += next(first)

    seconds, _ = timing.in_rounds({"slow": clock.call("slow", 3.0), "fast": fast}, budget=1.0, clock=clock)
    assert len(seconds["slow"]) == timing.MIN_ROUNDS
    assert len(seconds["fast"]) > 10 * timing.MIN_ROUNDS
    assert {round(one, 6) for one in seconds["fast"]} == {0.01}


def test_a_turn_ends_after_its_time_and_keeps_its_first_call_beside_fast_ones():
    clock = Clock()
    calls = {"a": clock.call("a", 0.0625), "b": clock.call("b", 0.125)}
    seconds, _ = timing.in_rounds(calls, budget=0.0, clock=clock)
    assert "".join(clock.calls) == "aaaabb" + "bbaaaa" + "aaaabb"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 12, "b": 6}


def test_a_short_call_gets_a_bounded_number_of_rounds():
    clock = Clock()
    seconds, _ = timing.in_rounds({"fast": clock.call("fast", 1e-6)}, budget=1e9, clock=clock)
    assert len(seconds["fast"]) == timing.MAX_ROUNDS * timing.TURN_CALLS


def test_quantiles_are_milliseconds():
    found = timing.quantiles([0.003, 0.001, 0.002, 0.004, 0.005, 0.006])
    expected = {"min": 1.0, "p20": 2.0, "median": 3.5, "p80": 5.0, "max": 6.0}
    assert found == pytest.approx(expected)
    assert timing.quantiles([0.002]) == pytest.approx(dict.fromkeys(expected, 2.0))


@pytest.mark.parametrize(
    ("nbytes", "sets"), [(1, 64), (25 << 20, 5), (50 << 20, 3), (99 << 20, 3), (100 << 20, 1), (1 << 34, 1)]
)
def test_sets_of_inputs_exceed_the_cache_twice(nbytes, sets):
    assert timing.number_of_sets(nbytes, cache=50 << 20) == sets


class FakeCuda:
    """`torch.cuda` with a clock instead of a GPU: calls take time when they run, graphs when they replay."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.captured: list[float] | None = None
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self) -> None:
                fake.clock.calls.append("replay")
                fake.clock.now += self.seconds

            def reset(self) -> None:
                pass

        class Stream:
            def wait_stream(self, other) -> None:
                pass

        class Using:
            def __init__(self, stream) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error) -> None:
                pass

        class Capture(Using):
            def __init__(self, graph, stream) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                self.before = fake.clock.now

            def __exit__(self, *error) -> None:
                self.graph.seconds = fake.clock.now - self.before

        self.Event, self.CUDAGraph, self.Stream = Event, Graph, Stream
        self.stream, self.graph = Using, Capture

    def current_stream(self):
        return self.Stream()

    def synchronize(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.torch, "cuda", FakeCuda(clock))
    return clock


def test_launched_calls_go_round_the_sets_of_inputs(clock):
    calls = [clock.call(name, 0.001) for name in "abc"]
    seconds = timing.launched(calls, budget=10.0)
    assert seconds == pytest.approx([0.001] * 200)  # 200 ms of calls
    assert "".join(clock.calls[-200:]) == ("abc" * 70)[:200]


def test_launched_calls_keep_to_the_budget(clock):
    assert len(timing.launched([clock.call("a", 0.5)], budget=2.0)) == 4
    assert len(timing.launched([clock.call("a", 60.0)], budget=2.0)) == timing.MIN_ROUNDS


def test_clocks_are_up_before_the_first_sample(clock):
    timing.launched([clock.call("a", 0.001)], budget=10.0)
    assert len(clock.calls) == 1 + timing.WARM_UP_MS + timing.EAGER_MS
    clock.calls.clear()
    timing.replayed(lambda: [clock.call("a", 2**-7)], budget=0.0)
    before_the_samples = clock.calls.count("replay") - timing.MIN_ROUNDS
    assert before_the_samples * 2**-7 * 1e3 >= 2 * timing.WARM_UP_MS


class Gap:
    """Calls take time, and so does what is between one replay and the next."""

    def __init__(self, clock: Clock, monkeypatch, seconds: float) -> None:
        replay = timing.torch.cuda.CUDAGraph.replay

        def with_gap(graph) -> None:
            clock.now += seconds
            replay(graph)

        monkeypatch.setattr(timing.torch.cuda.CUDAGraph, "replay", with_gap)


def test_a_graph_of_short_calls_holds_a_millisecond_of_them(clock, monkeypatch):
    Gap(clock, monkeypatch, 8e-6)
    seconds = timing.replayed(lambda: [clock.call("a", 100e-6)], budget=10.0)
    assert len(seconds) == timing.SAMPLES
    assert seconds == pytest.approx([100e-6] * timing.SAMPLES, rel=0.01)


def test_a_replayed_graph_counts_each_call_once(clock):
    calls = [clock.call(name, 2**-14) for name in "abcd"]
    seconds = timing.replayed(lambda: calls, budget=10.0)
    assert seconds == pytest.approx([2**-14] * timing.SAMPLES)
    # The last capture goes round all four five times: 1.2 milliseconds.
    assert "".join(clock.calls).partition("replay")[0] == "abcd" * 2
    assert "abcd" * 5 in "".join(clock.calls)


def test_what_a_graph_left_is_verified_before_it_is_timed(clock):
    given = []

    def first():
        clock.now += 0.0001
        return ["result"]

    def verify(results) -> None:
        given.append((results, clock.calls.count("replay")))
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        timing.replayed(lambda: [first, clock.call("b", 0.0001)], 10.0, verify)
    (((result,), replays),) = given
    assert result == "result"
    assert replays > 1  # those of the estimate and one of the graph that is timed


def test_what_is_replayed_is_made_on_the_stream_that_is_captured(clock, monkeypatch):
    entered = []
    using = timing.torch.cuda.stream

    class Watching(using):
        def __enter__(self) -> None:
            entered.append("enter")

        def __exit__(self, *error) -> None:
            entered.append("exit")

    monkeypatch.setattr(timing.torch.cuda, "stream", Watching)

    def make_calls():
        entered.append("made")
        return [clock.call("a", 0.001)]

    timing.replayed(make_calls, budget=0.1)
    assert entered == ["enter", "made", "exit"]
