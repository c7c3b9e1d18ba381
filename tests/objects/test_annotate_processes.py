"""Annotation in several processes: killed, resumed, resumed with another number of them."""

import os
import random
import signal
import time

import pytest
from annotate_cases import assert_complete, lines_of, looked_at, start, stop, write_pictures

COUNT = 200
BATCH = 4


def _finish(processes, seconds=60):
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    stop(processes)
    assert codes == [0] * len(processes)


def _wait_for_lines(folder, count, processes):
    end = time.monotonic() + 60
    while len(lines_of(folder)) < count and any(process.is_alive() for process in processes):
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(6))
def test_processes_killed_at_random_annotate_every_picture_once(tmp_path, seed):
    write_pictures(tmp_path / "pictures", COUNT)
    rng = random.Random(seed)
    kills = 0
    while kills < 5 and len(lines_of(tmp_path)) < COUNT - 50:  # a slow machine gets further between two kills
        processes = start(tmp_path, 2, seconds=0.008)
        _wait_for_lines(tmp_path, len(lines_of(tmp_path)) + rng.randrange(1, 25), processes)
        time.sleep(rng.uniform(0, 0.02))
        for victim in rng.choice([processes, processes[:1], processes[1:]]):
            kills += victim.is_alive()
            victim.kill()
        time.sleep(rng.uniform(0, 0.05))  # the other works on until it, too, is killed
        stop(processes)
    assert kills >= 2
    _finish(start(tmp_path, 2, seconds=0))
    assert_complete(tmp_path, COUNT)
    # Beyond what was under way in a process when it died, nothing is done twice.
    assert set(looked_at(tmp_path)) == set(range(COUNT))
    assert len(looked_at(tmp_path)) <= COUNT + 2 * kills * BATCH


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_during_the_merge_leaves_nothing_by_halves(tmp_path, seed):
    write_pictures(tmp_path / "pictures", 40)
    processes = start(tmp_path, 2, seconds=0, merge_seconds=0.05)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".boxes.json.*")):
        assert time.monotonic() < end
        assert processes[0].is_alive()
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 1))
    stop(processes)
    assert not (tmp_path / "boxes.json").exists()
    assert list(tmp_path.glob(".boxes.json.*"))
    before = looked_at(tmp_path)
    _finish(start(tmp_path, 2, seconds=0))
    assert_complete(tmp_path, 40)
    assert looked_at(tmp_path) == before
    assert not list(tmp_path.glob(".boxes.json.*"))


@pytest.mark.parametrize("later", [1, 3])
def test_another_number_of_processes_goes_on(tmp_path, later):
    write_pictures(tmp_path / "pictures", 60)
    processes = start(tmp_path, 2)
    _wait_for_lines(tmp_path, 20, processes)
    stop(processes)
    assert 0 < len(lines_of(tmp_path)) < 60
    _finish(start(tmp_path, later, seconds=0))
    assert_complete(tmp_path, 60)
    assert len(looked_at(tmp_path)) <= 60 + 2 * BATCH


def test_the_death_of_one_process_ends_the_others_with_an_error(tmp_path):
    write_pictures(tmp_path / "pictures", 40)
    processes = start(tmp_path, 2, seconds=0.05)
    _wait_for_lines(tmp_path, 4, processes)
    processes[1].kill()
    processes[0].join(30)
    code = processes[0].exitcode
    stop(processes)
    assert code == 1
    assert not (tmp_path / "boxes.json").exists()
    _finish(start(tmp_path, 2, seconds=0))
    assert_complete(tmp_path, 40)


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_run_leaves_the_first_alone_while_it_merges(tmp_path, count):
    write_pictures(tmp_path / "pictures", 10)
    first = start(tmp_path, 1, seconds=0, merge_seconds=0.5)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".boxes.json.*")):
        assert time.monotonic() < end
        assert first[0].is_alive()
        time.sleep(0.005)
    os.kill(first[0].pid, signal.SIGSTOP)  # however long the second takes to start
    second = start(tmp_path, count, seconds=0)
    for process in second:
        process.join(120)
    codes = [process.exitcode for process in second]
    os.kill(first[0].pid, signal.SIGCONT)
    stop(second)
    assert codes == [1] * count
    _finish(first)
    assert_complete(tmp_path, 10)
    assert sorted(looked_at(tmp_path)) == list(range(10))
