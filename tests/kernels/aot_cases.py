"""Kernels and ops to compile in a process of its own, where Triton's interpreter is off; see test_aot.py.

    python aot_cases.py ops|cases|keys OUTPUT

writes JSON to OUTPUT.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

from mgllava_kernels._triton import launch
from mgllava_kernels._workloads import OPS, PICTURE, STAGES, Op, Workload, random_boxes
from mgllava_kernels.aot import DEFAULT_TARGETS, TARGETS, Job, compile_jobs, driver_for, failures

PROCESSES = 2


@triton.jit(do_not_specialize=["size"])
def _copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + i, tl.load(x_ptr + i).to(tl.float32))


@triton.jit
def _matmul_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


@triton.jit
def _illegal_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 64, "too large for this kernel")


# By name: processes that compile cannot be sent a kernel.
def run(name: str, block: int, warps: int, x):
    kernel = globals()[f"_{name}_kernel"]
    out = torch.empty_like(x, dtype=torch.float32 if kernel is _atomic_kernel else x.dtype)
    launch.launch(kernel, 1, x.device, (x, out, x.numel()), BLOCK=block, num_warps=warps)


def raises(x):
    raise KeyError("a defect of the host function")


def dies(x):
    os.abort()


@dataclass(frozen=True)
class Local(Op):
    function: object = None

    def call(self, arguments):
        return self.function(*arguments)


def vector(dtype, layout, device):
    return (torch.empty(1 << 20, dtype=dtype, device=device),)


def local(name: str, function) -> Local:
    return Local(name, "", (Workload("a vector", vector),), ("contiguous",), function)


GOOD = (
    local("copies", partial(run, "copy", 4096, 4)),
    local("adds atomically", partial(run, "atomic", 128, 4)),
    local("multiplies", partial(run, "matmul", 64, 4)),
)
BAD = (
    local("spills", partial(run, "matmul", 128, 2)),
    local("does not compile", partial(run, "illegal", 64, 4)),
    local("raises", raises),
)
SMALL = replace(TARGETS["sm_90"], shared_memory=1024)
DEADLY = local("dies", dies)
SURVIVOR = replace(GOOD[0], name="survives")


def cases() -> list[dict]:
    """The good on an NVIDIA and an AMD target, the others on one; the last brings its process down."""
    jobs = [
        Job(op, TARGETS[name], torch.bfloat16, "contiguous") for name in ("sm_90", "gfx942") for op in GOOD
    ]
    jobs += [Job(op, TARGETS["sm_90"], torch.bfloat16, "contiguous") for op in BAD]
    jobs.append(Job(replace(GOOD[2], name="asks for too much"), SMALL, torch.bfloat16, "contiguous"))
    built = compile_jobs(jobs, PROCESSES)
    built += compile_jobs(
        [Job(op, TARGETS["sm_90"], torch.bfloat16, "contiguous") for op in (DEADLY, SURVIVOR)], 1
    )
    return [{**one.record(), "line": "\n".join(failures([one]))} for one in built]


def ops() -> list[dict]:
    """In bfloat16 all calls of all ops on sm_90 and the first of each elsewhere; fewer in other dtypes."""
    jobs = []
    for op in OPS:
        first = replace(op, workloads=op.workloads[:1])
        jobs += [
            Job(
                op if (name, layout) == ("sm_90", "contiguous") else first,
                TARGETS[name],
                torch.bfloat16,
                layout,
            )
            for layout in op.layouts
            for name in DEFAULT_TARGETS
        ]
        jobs += [Job(first, TARGETS[name], torch.float32, "contiguous") for name in ("sm_90", "gfx942")]
        jobs.append(Job(first, TARGETS["sm_90"], torch.float16, "contiguous"))
    return [one.record() for one in compile_jobs(jobs, PROCESSES)]


def files() -> set[str]:
    return {str(path) for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()}


def keys() -> dict:
    """Compile a call ahead of time, in a process of its own; then make another, on tensors in memory."""
    target = TARGETS["sm_90"]
    op = replace(OPS[0], workloads=OPS[0].workloads[:1])
    built = compile_jobs([Job(op, target, torch.bfloat16, "contiguous")], 1)
    before = files()
    launched = {}

    def warm(kernel, grid, args, options):
        launched[kernel.fn.__name__] = kernel.warmup(*args, grid=grid, **options).hash

    features = [torch.empty(3, channels, side, side, dtype=torch.bfloat16) for channels, side in STAGES]
    boxes = random_boxes(3, 90, PICTURE, PICTURE, torch.device("cpu"))
    with driver_for(target), launch.compile_only(target, warm):
        op.call((features, boxes, STAGES[0][1] / PICTURE, 56, 56, -1, False))
        inside = triton.runtime.driver.active.get_current_target()
    return {
        "ahead": {one.kernel: one.hash for one in built},
        "launched": launched,
        "new": sorted(files() - before),
        "inside": [inside.backend, inside.arch, inside.warp_size],
        "restored": triton.runtime.driver._active is None,
    }


if __name__ == "__main__":
    work = {"ops": ops, "cases": cases, "keys": keys}[sys.argv[1]]
    Path(sys.argv[2]).write_text(json.dumps(work()))
