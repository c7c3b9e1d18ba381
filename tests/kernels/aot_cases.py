"""Kernels and ops to compile in a process of its own, where Triton's interpreter is off; see test_aot.py.

    python aot_cases.py ops|cases|keys OUTPUT

writes JSON to OUTPUT.
"""

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime.cache import get_cache_manager

from mgllava_kernels import _machine_code
from mgllava_kernels._triton import launch
from mgllava_kernels._workloads import (
    CONV_GATE,
    DTYPES,
    OPS,
    PICTURE,
    STAGES,
    Op,
    Workload,
    fusion_arguments,
    fusion_backward_arguments,
    projector_arguments,
    random_boxes,
)
from mgllava_kernels.aot import (
    DEFAULT_TARGETS,
    TARGETS,
    Built,
    Job,
    compile_jobs,
    driver_for,
    failures,
    plan,
)

PROCESSES = 2
EVERYTHING = "MGLLAVA_KERNELS_TEST_EVERYTHING"


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


def covered(op: Op, target: str) -> dict[tuple[torch.dtype, str], Op]:
    """By dtype and layout the calls of `op` to compile for a target.

    All calls in bfloat16 in the first layout; of the other layouts, of float32 and, on sm_90, of float16 the
    first call. Conv-Gate launches three times as many kernels as any other op: all its calls are compiled for sm_90
    alone, for the other targets the first and the forward call of "gate_concat", whose result has two parts side by
    side; in float16 the fusion alone. Everything takes three times as long: set EVERYTHING, or run
    `python -m mgllava_kernels.aot`, which fails on what these tests fail on, but for the instructions that they
    expect.
    """
    first = replace(op, workloads=op.workloads[:1])
    found = {}
    for dtype, layout in product(DTYPES, op.layouts):
        main = layout == op.layouts[0]
        if EVERYTHING in os.environ:
            found[dtype, layout] = op
        elif dtype == torch.bfloat16 and not main:
            found[dtype, layout] = first
        elif dtype == torch.bfloat16:
            whole = op.module != CONV_GATE or target == "sm_90"
            found[dtype, layout] = op if whole else replace(op, workloads=first_and_side_by_side(op))
        elif main and target in targets_of(op, dtype):
            found[dtype, layout] = first
    return found


def first_and_side_by_side(op: Op) -> tuple[Workload, ...]:
    others = op.workloads[1:] if op.name == "conv_gate_fusion" else ()
    return (op.workloads[0], *(call for call in others if "gate_concat" in call.name))


def targets_of(op: Op, dtype: torch.dtype) -> tuple[str, ...]:
    """The targets that the first call of `op` is compiled for in another dtype than bfloat16."""
    if dtype == torch.float16:
        return ("sm_90",) if op.module != CONV_GATE or op.name == "conv_gate_fusion" else ()
    return DEFAULT_TARGETS


ODD = "odd widths"
# Calls whose matrices have rows that are no multiples of 16 bytes, in bfloat16, and the targets to compile them for.
# The projectors' image tokens are aligned, their objects are not.
ODD_CALLS = {
    "grouped_mlp_projector": (("sm_90",), partial(projector_arguments, 32, 100, object_width=2881)),
    "conv_gate_fusion": (
        DEFAULT_TARGETS,
        partial(fusion_arguments, 8, "gate_sum", True, widths=(1001, 1501)),
    ),
    "conv_gate_fusion_backward": (
        ("sm_90", "gfx942"),
        partial(fusion_backward_arguments, 8, "gate_sum", widths=(1001, 1501)),
    ),
}


def ops() -> list[dict]:
    """What `covered` says of every op on every target, the calls of odd widths, and the shipped configs."""
    targets = [TARGETS[name] for name in DEFAULT_TARGETS]
    # Neighbours run at the same time: of different targets, they do not compile the same kernel twice.
    jobs = [
        Job(covered(op, target.name)[which], target, *which)
        for op in OPS
        for which in product(DTYPES, op.layouts)
        for target in targets
        if which in covered(op, target.name)
    ]
    jobs += [
        Job(replace(op, workloads=(Workload(ODD, arguments),)), TARGETS[name], torch.bfloat16, op.layouts[0])
        for op in OPS
        if op.name in ODD_CALLS
        for names, arguments in [ODD_CALLS[op.name]]
        for name in names
    ]
    jobs += [job for job in plan(OPS, targets, DTYPES) if job.forced is not None]
    return [
        {**one.record(), "reads": [] if one.hash is None else reads(one.kernel, one.hash)}
        for one in compile_jobs(jobs, PROCESSES)
    ]


# A load of a matrix in Triton's first representation, with the place in the source that it comes from.
MATRIX_LOAD = re.compile(r"= tt\.load .*: tensor<((?:\d+x){2,})!tt\.ptr<(\w+)>> loc\(#(\w+)\)")
PLACES = re.compile(r"^#(\w+) = loc\((.*)\)$", re.MULTILINE)
# The same in what is assembled: files by number, and the place that the next lines come from.
FILES = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', re.MULTILINE)
PLACE = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)")


@cache
def reads(kernel: str, key: str) -> list[dict]:
    """The loads of matrices in a compiled kernel: place, shape, element, and the machine's loads by bytes."""
    files = get_cache_manager(key).get_group(f"{kernel}.json")
    text = {Path(name).suffix: Path(path).read_text() for name, path in files.items() if is_text(name)}
    places = dict(PLACES.findall(text[".ttir"]))

    def place(name: str) -> str:
        """Of a call inlined into another the place in the callee."""
        written = re.search(r'"([^"]+)":(\d+):(\d+)', places[name])
        if written is None:
            return place(re.search(r"#(\w+)", places[name])[1])
        return f"{Path(written[1]).name}:{written[2]}:{written[3]}"

    if ".ptx" in text:
        widths = widths_by_place(text[".ptx"], _machine_code.ptx_instructions)
    else:
        widths = widths_by_place(text[".amdgcn"], _machine_code.amd_instructions)
    return [
        {
            "place": place(name),
            "shape": [int(size) for size in shape.split("x")[:-1]],
            "element": element,
            "widths": widths.get(place(name), {}),
        }
        for shape, element, name in MATRIX_LOAD.findall(text[".ttir"])
    ]


def is_text(name: str) -> bool:
    return name.endswith((".ttir", ".ptx", ".amdgcn"))


def widths_by_place(text: str, instructions) -> dict[str, dict[int, int]]:
    names = {number: Path(name).name for number, name in FILES.findall(text)}
    widths: dict[str, dict[int, int]] = {}
    here, counted = "", False
    for line in text.splitlines():
        if place := PLACE.match(line):
            # Inside inline assembly LLVM numbers the lines of the assembly, from the place it comes from on.
            if not counted:
                here = f"{names[place[1]]}:{place[2]}:{place[3]}"
        elif "inline asm" in line:
            counted = "begin" in line
        elif "ld." in line or "cp.async" in line or "_load" in line:
            of_place = widths.setdefault(here, {})
            for width, number in instructions(line).loads.items():
                of_place[width] = of_place.get(width, 0) + number
    return widths


def files() -> set[str]:
    return {str(path) for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()}


def pooled(device: torch.device):
    features = [torch.empty(3, channels, side, side, dtype=torch.bfloat16) for channels, side in STAGES]
    boxes = random_boxes(3, 90, PICTURE, PICTURE, device)[1:]  # not aligned to 16 bytes
    return features, boxes, STAGES[0][1] / PICTURE, 56, 56, -1, False


# A call on tensors in memory, by op: of other sizes than `mgllava_kernels.aot` compiles for.
KEYS = {
    "pooled_roi_align": pooled,
    "conv_gate_fusion": partial(fusion_arguments, 9, "gate_sum", True, torch.bfloat16, "contiguous"),
    "conv_gate_fusion_backward": partial(
        fusion_backward_arguments, 9, "gate_sum", torch.bfloat16, "contiguous"
    ),
}


def keys() -> list[dict]:
    """Compile calls ahead of time, in other processes; then make others, on tensors in memory."""
    which = torch.bfloat16, "contiguous"
    jobs = [
        Job(covered(op, name)[which], TARGETS[name], *which)
        for op in OPS
        if op.name in KEYS
        for name in ("sm_90", "gfx942")
    ]
    built = compile_jobs(jobs, PROCESSES)
    return [launched(job, [one for one in built if is_of(one, job)]) for job in jobs]


def is_of(one: Built, job: Job) -> bool:
    return (one.op, one.target) == (job.op.name, job.target.name)


def launched(job: Job, built: list[Built]) -> dict:
    before = files()
    found = set()

    def warm(kernel, grid, args, options):
        found.add((kernel.fn.__name__, kernel.warmup(*args, grid=grid, **options).hash))

    with driver_for(job.target), launch.compile_only(job.target, warm):
        job.op.call(KEYS[job.op.name](torch.device("cpu")))
        inside = triton.runtime.driver.active.get_current_target()
    return {
        "op": job.op.name,
        "target": job.target.name,
        "ahead": [(one.kernel, one.hash) for one in built],
        "launched": sorted(found),
        "new": sorted(files() - before),
        "inside": [inside.backend, inside.arch, inside.warp_size],
        "restored": triton.runtime.driver._active is None,
    }


if __name__ == "__main__":
    work = {"ops": ops, "cases": cases, "keys": keys}[sys.argv[1]]
    Path(sys.argv[2]).write_text(json.dumps(work()))
