"""Peak memory of a provider in a process of its own."""

import os
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
