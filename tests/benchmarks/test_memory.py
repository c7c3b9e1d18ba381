"""Peak memory of a provider in a process of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import memory
from benchmarks.registry import BENCHMARKS

MEGABYTE = 1 << 20

# Blocks of a megabyte, which an allocator would keep for later, all of them at once and then freed; before the
# measurement as many, so that kept ones would hide them.
HUNGRY = """
import sys, torch
from benchmarks import memory
from benchmarks.benchmark import Provider
from benchmarks.registry import BENCHMARKS

def call(maps, **_):
    blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(megabytes)]
    return (maps,)

megabytes, benchmark = int(sys.argv[1]), BENCHMARKS["roi_align"]
print(memory.in_this_process(benchmark, Provider("hungry", call), benchmark.tiny, torch.float32, "forward"))
"""


@pytest.mark.parametrize("megabytes", [0, 100])
def test_the_peak_counts_what_is_freed_again(megabytes):
    environment = os.environ | memory.RETURN_FREED_MEMORY | {"PYTHONPATH": str(memory.ROOT)}
    command = [sys.executable, "-c", HUNGRY, str(megabytes)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    if output.strip() == "None":
        pytest.skip("the system does not tell")
    assert megabytes * 0.9 <= int(output) / MEGABYTE <= megabytes + 8


WATCHED = """
import torch
from benchmarks import memory

def call():
    blocks = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(25)]
    return blocks[0]

kept = [torch.ones(1 << 18, dtype=torch.uint8) for _ in range(2000)]
kept = kept[::2]  # an allocator that serves small blocks from its heap keeps the others
watched = memory.Watched(call)
watched(), watched()
print(watched.extra_bytes)
"""


def test_a_slow_call_is_watched_where_it_is_timed():
    """Without the settings of a process of its own: what is freed is kept there."""
    command = [sys.executable, "-c", WATCHED]
    output = subprocess.run(command, cwd=memory.ROOT, check=True, capture_output=True, text=True).stdout
    if output.strip() == "None":
        pytest.skip("the system does not tell")
    assert 200 * 0.95 <= int(output) / MEGABYTE <= 200 * 1.05 + 8


def test_a_process_of_its_own_answers():
    """The estimate, which refuses before the system does, holds what is used, and is not far above it."""
    original = BENCHMARKS["pooled_roi_align"].providers[0]
    sizes = {"images": 1, "boxes": 20, "canvas": 384, "divisor": 4}
    extra = memory.apart("pooled_roi_align", original.name, sizes, "float32", "forward")
    if extra is None:
        pytest.skip("the system does not tell")
    estimate = original.extra_bytes(sizes, torch.float32, "forward")
    assert estimate / 2 <= extra <= estimate + 16 * MEGABYTE


def test_a_process_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="measuring the memory of nobody"):
        memory.apart("projectors", "nobody", BENCHMARKS["projectors"].tiny, "float32", "both")


def test_a_process_that_is_killed_for_memory_says_so(monkeypatch):
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, stdout="")
    monkeypatch.setattr(memory.subprocess, "run", lambda *arguments, **options: killed)
    with pytest.raises(RuntimeError, match="status -9 .killed, it seems for want of memory."):
        memory.apart("projectors", "torch", BENCHMARKS["projectors"].tiny, "float32", "both")


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own order")
def test_where_memory_runs_out_the_measured_process_goes_first(tmp_path):
    program = (
        "import io, json, sys; from pathlib import Path; from benchmarks import memory\n"
        "memory.in_this_process = lambda *_: int(Path('/proc/self/oom_score_adj').read_text())\n"
        "memory.main()"
    )
    request = {
        "benchmark": "projectors",
        "provider": "torch",
        "sizes": {},
        "dtype": "float32",
        "mode": "forward",
    }
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(request | {"threads": 1}),
        cwd=memory.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == {"extra_bytes": 1000}
