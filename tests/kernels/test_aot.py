"""Compilation ahead of time: what the kernels become on each target, and what is reported of it.

Kernels are compiled in processes of their own: in this one Triton's interpreter may be on. That no candidate
of the tuner spills takes too long for a test: `python -m mgllava_kernels.aot --candidates`. What is compiled here
on each target, and how to compile everything, says `aot_cases.covered`.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from aot_cases import KEYS, ODD, ODD_CALLS, covered
from typer.testing import CliRunner

from mgllava_kernels import _machine_code, aot, configs
from mgllava_kernels._triton.launch import Target, target_of
from mgllava_kernels._workloads import CONV_GATE, OPS, Op, Workload
from mgllava_kernels.aot import DEFAULT_TARGETS, TARGETS
from mgllava_kernels.configs import Config, Space, choose, tables

ROOT = Path(__file__).parents[2]


def compiled(work: str, folder: Path, cache: Path):
    """The result of `aot_cases.py WORK`; what is in Triton's `cache` is not compiled again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop(tables.ENVIRONMENT_VARIABLE, None)
    command = [sys.executable, str(Path(__file__).parent / "aot_cases.py"), work, str(folder / "result.json")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def everything(tmp_path_factory, cache) -> list[dict]:
    """Every kernel of the package; compiles for some minutes."""
    return compiled("ops", tmp_path_factory.mktemp("ops"), cache)


@pytest.fixture(scope="session")
def built(everything) -> list[dict]:
    """The kernels of published widths."""
    return [one for one in everything if one["workload"] != ODD]


@pytest.fixture(scope="session")
def cases(tmp_path_factory, cache) -> dict[tuple[str, str], list[dict]]:
    results = compiled("cases", tmp_path_factory.mktemp("cases"), cache)
    found: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        found.setdefault((result["op"], result["target"]), []).append(result)
    return found


each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_target = pytest.mark.parametrize("target", DEFAULT_TARGETS)


def of(built: list[dict], op: Op, target: str, **fields: str) -> list[dict]:
    wanted = {"op": op.name, "target": target, **fields}
    found = [one for one in built if all(one[name] == value for name, value in wanted.items())]
    assert found
    return found


@each_target
@each_op
def test_every_kernel_compiles_and_keeps_its_registers(built, op, target):
    failures = [
        f"{one['kernel']} {one['dtype']} {one['layout']} {one['options']}: {one['failure']}"
        for one in of(built, op, target)
        if one["failure"] is not None
    ]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("op", "target"),
    [(name, target) for name, (targets, _) in ODD_CALLS.items() for target in targets],
)
def test_kernels_of_odd_widths_keep_their_registers(everything, op, target):
    """But for some scalar registers of products on AMD, where every element has a mask of its own: they are kept in
    lanes of vector registers.
    """
    found = [one for one in everything if (one["op"], one["target"], one["workload"]) == (op, target, ODD)]
    assert found
    for one in found:
        assert one["error"] is None, described(one)
        assert one["shared_memory"] <= one["limit"], described(one)
        usage = one["usage"]
        scalar = 16 if target == "gfx942" and one["kernel"] == "_product_kernel" else 0
        assert usage["stack_bytes"] == usage["spilled_registers"] == 0, f"{described(one)}: {usage}"
        assert usage["scalar_spills"] <= scalar, f"{described(one)}: {usage}"
        assert one["instructions"]["atomics"] == 0, described(one)


@each_target
@each_op
def test_no_kernel_has_an_atomic_instruction(built, op, target):
    for one in of(built, op, target):
        assert one["instructions"]["atomics"] == 0, one["kernel"]


# The kernels of an op that read its maps or tokens, or the gradients of its output, and do not do it by
# `matmul.add_product`. That of roi_align_backward is not among them: of a row of 7 or 14 bins it reads those that
# touch a tile, which begin anywhere.
READERS = {
    "pooled_roi_align": ("_product_kernel",),
    "pooled_roi_align_backward": ("_transposed_product_kernel",),
    "roi_align": ("_roi_align_kernel",),
    "conv_gate_fusion": ("_convolution_kernel",),
    "conv_gate_fusion_backward": ("_transposed_convolution_kernel", "_weight_gradient_kernel"),
    "depthwise_conv_gelu": ("_convolution_kernel",),
    "depthwise_conv_gelu_backward": ("_transposed_convolution_kernel", "_weight_gradient_kernel"),
}
# Ops whose kernels that multiply matrices are made of `matmul.add_product`, and the names of some of these.
LAYERS = {
    **dict.fromkeys(
        ("grouped_mlp_projector", "grouped_mlp_projector_backward", "linear_gelu", "linear_gelu_backward"),
        ("_product_kernel",),
    ),
    "conv_gate_fusion": ("_product_kernel", "_dual_product_kernel"),
    "conv_gate_fusion_backward": ("_product_kernel",),
}
MULTIPLIERS = {
    "pooled_roi_align": ("_product_kernel",),
    "pooled_roi_align_backward": ("_transposed_product_kernel",),
    "roi_align": ("_roi_align_kernel",),
    "roi_align_backward": ("_roi_align_backward_kernel",),
}
UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
ELEMENTS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def variants(built: list[dict], op: Op, target: str, kernel: str) -> list[dict]:
    """All of one kernel of `op`, which must be there in every dtype and layout that is compiled."""
    found = [one for one in of(built, op, target) if one["kernel"] == kernel]
    assert {(one["dtype"], one["layout"]) for one in found} == expected(op, target)
    return found


def layers(built: list[dict], op: Op, target: str) -> list[dict]:
    """All kernels of `op` that are made of `matmul.add_product`, in every dtype and layout that is compiled."""
    found = [one for one in of(built, op, target) if "USE_DESCRIPTORS" in one["options"]]
    for name in LAYERS[op.name]:
        there = {(one["dtype"], one["layout"]) for one in found if one["kernel"] == name}
        assert there == expected(op, target), name
    return found


def expected(op: Op, target: str) -> set[tuple[str, str]]:
    return {(tables.dtype_name(dtype), layout) for dtype, layout in covered(op, target)}


def each_kernel(kernels: dict[str, tuple[str, ...]]):
    return pytest.mark.parametrize(
        ("op", "kernel"),
        [
            pytest.param(op, kernel, id=f"{op.name} {kernel}")
            for op in OPS
            for kernel in kernels.get(op.name, ())
        ],
    )


def assert_wide(one: dict, read: dict) -> None:
    """Sixteen bytes at a time, or what a thread has to load of the tile if that is less."""
    threads = one["options"]["num_warps"] * TARGETS[one["target"]].warp_size
    share = math.prod(read["shape"]) * getattr(torch, one["dtype"]).itemsize // threads
    assert read["widths"], f"{described(one)}: {read} is nowhere in the machine code"
    assert min(map(int, read["widths"])) >= min(16, share), f"{described(one)}: {read}"


def described(one: dict) -> str:
    options = " ".join(f"{name}={value}" for name, value in one["options"].items())
    return f"{one['kernel']} {one['dtype']} {one['layout']} {options}"


@each_target
@each_kernel(READERS)
def test_maps_are_read_sixteen_bytes_at_a_time(built, op, kernel, target):
    """Every load of a map by every variant."""
    kernels = variants(built, op, target, kernel)
    # RoIAlign's weights are float32, a convolution's taps are less than a thread's share: other matrices of 16 bits
    # are maps. In float32 these are what the same lines load.
    places = {
        read["place"]
        for one in kernels
        for read in one["reads"]
        if one["dtype"] != "float32" and read["element"] == ELEMENTS[one["dtype"]]
    }
    assert places
    for one in kernels:
        found = [read for read in one["reads"] if read["place"] in places]
        assert found, described(one)
        for read in found:
            assert read["element"] == ELEMENTS[one["dtype"]]
            assert_wide(one, read)


@each_target
@each_kernel(MULTIPLIERS)
def test_products_are_those_of_the_targets_matrix_units(built, op, kernel, target):
    for one in variants(built, op, target, kernel):
        assert one["instructions"]["matrix"].keys() == {UNITS[target]}, described(one)


each_layer = pytest.mark.parametrize("op", [op for op in OPS if op.name in LAYERS], ids=lambda op: op.name)


@each_target
@each_layer
def test_layers_use_the_targets_matrix_units(built, op, target):
    """In float32 they are IEEE unless the user allows tf32, and NVIDIA's matrix units are not."""
    for one in layers(built, op, target):
        ieee = one["dtype"] == "float32" and UNITS[target] != "v_mfma"
        assert one["instructions"]["matrix"].keys() == (set() if ieee else {UNITS[target]}), described(one)


@each_target
@each_layer
def test_layers_read_whole_tiles_or_sixteen_bytes_at_a_time(built, op, target):
    """Through tensor descriptors where a config asks for them; these leave no loads in the product."""
    for one in layers(built, op, target):
        operands = [read for read in one["reads"] if read["place"].startswith("matmul.py")]
        assert bool(operands) != one["options"]["USE_DESCRIPTORS"], described(one)
        for read in operands:
            assert_wide(one, read)


@each_target
@each_layer
def test_layers_use_descriptors_where_there_are_some(built, op, target):
    for one in layers(built, op, target):
        assert one["options"]["USE_DESCRIPTORS"] == (TARGETS[target].capability >= 90)


@each_target
@each_op
def test_dtypes_and_layouts_are_compiled(built, op, target):
    there = {(one["dtype"], one["layout"]) for one in of(built, op, target)}
    assert there == expected(op, target)
    assert {layout for dtype, layout in there if dtype == "bfloat16"} == set(op.layouts)
    half = target == "sm_90" and (op.module != CONV_GATE or op.name == "conv_gate_fusion")
    assert {dtype for dtype, _ in there} >= {"bfloat16", "float32", *(("float16",) if half else ())}


@pytest.fixture(scope="session")
def keys(tmp_path_factory, cache) -> dict[tuple[str, str], dict]:
    results = compiled("keys", tmp_path_factory.mktemp("keys"), cache)
    return {(result["op"], result["target"]): result for result in results}


@pytest.mark.parametrize(
    ("target", "inside"), [("sm_90", ["cuda", 90, 32]), ("gfx942", ["hip", "gfx942", 64])]
)
@pytest.mark.parametrize("op", KEYS)
def test_a_launch_finds_what_was_compiled_ahead(keys, op, target, inside):
    """Other box counts, other batch, other tensors: the same keys in Triton's cache.

    Holds Triton to what it is used for: `driver.set_active`, kernels kept by device, `warmup`.
    """
    result = keys[op, target]
    ahead, launched = (set(map(tuple, result[which])) for which in ("ahead", "launched"))
    assert launched <= ahead
    assert len({kernel for kernel, _ in launched}) > 1
    assert result["new"] == []
    assert result["inside"] == inside
    assert result["restored"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_a_kernel_uses_is_reported(cases, target):
    (copies,), (adds,), (multiplies,) = (
        cases[name, target] for name in ("copies", "adds atomically", "multiplies")
    )
    for one in (copies, adds, multiplies):
        assert one["failure"] is None
        assert one["line"] == ""
        assert 0 < one["usage"]["registers"] <= 255
        assert one["usage"]["stack_bytes"] == 0
        assert one["options"]["BLOCK"] in (4096, 128, 64)
        assert one["workload"] == "a vector"
    assert copies["kernel"] == "_copy_kernel"
    assert copies["instructions"]["loads"].keys() == {"16"}
    assert copies["instructions"]["atomics"] == 0
    assert copies["instructions"]["matrix"] == {}
    assert adds["instructions"]["atomics"] > 0
    assert multiplies["shared_memory"] > 0
    kinds = {"sm_90": {"wgmma.mma_async"}, "gfx942": {"v_mfma"}}
    assert multiplies["instructions"]["matrix"].keys() == kinds[target]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("spills", "spills: "),
        ("asks for too much", "bytes of shared memory, sm_90 has 1024"),
        ("does not compile", "too large for this kernel"),
        ("raises", "KeyError: 'a defect of the host function'"),
        ("dies", "the compiler brought its process down"),
    ],
)
def test_what_fails_is_reported_with_the_reason(cases, name, reason):
    (failed,) = cases[name, "sm_90"]
    assert reason in failed["failure"]
    assert f"on sm_90 ({name} bfloat16 contiguous): " in failed["line"]
    assert reason in failed["line"]


def test_a_process_that_dies_costs_no_other_job(cases):
    assert [one["failure"] for one in cases["survives", "sm_90"]] == [None]


def test_instructions_are_counted_in_ptx():
    text = """
    @%p7 ld.global.b32 { %r115 }, [ %rd22 + 0 ];
    @%p7 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd22 + 0 ];
    ld.global.v2.b64 { %rd1, %rd2 }, [ %rd22 + 0 ];
    ld.volatile.global.b16 %rs1, [ %rd22 ];
    ld.global.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd22 + 0 ];
    ld.param.b64 %rd15, [k_param_21];
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [global_smem];
    cp.async.cg.shared.global [ %r57 + 0 ], [ %rd2 + 0 ], 0x10, %r58;
    cp.async.ca.shared.global [ %r57 + 0 ], [ %rd2 + 0 ], 0x4;
    cp.async.wait_group 0;
    @%p1 atom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 + 0 ], %r2;
    red.global.add.f32 [%rd1], %f1;
    redux.sync.add.s32 %r1, %r2, 0xffffffff;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {}, {}, {}, {};
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {}, %rd1, %rd2, 1, 1, 1, 0, 0;
    tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
    """
    found = _machine_code.ptx_instructions(text)
    assert found.loads == {2: 1, 4: 2, 16: 3, 32: 1}
    assert found.atomics == 2
    assert found.matrix == {"mma.sync": 1, "tcgen05.mma": 1, "wgmma.mma_async": 1}


def test_instructions_and_registers_are_read_from_amd_assembly():
    text = """
    buffer_load_dword v63, v18, s[20:23], 0 offen
    global_load_dwordx4 v[18:21], v[18:19], off
    buffer_load_dwordx4 v[18:21], v18, s[20:23], 0 offen
    global_load_ushort v1, v[2:3], off
    buffer_load_ubyte v1, v2, s[20:23], 0 offen
    global_load_lds_dwordx4 v[2:3], off
    s_load_dwordx4 s[0:3], s[4:5], 0x0
    v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
    global_atomic_add_f32 v[0:1], v2, off
  - .agpr_count:     0
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 5
    .vgpr_count:     114
    .vgpr_spill_count: 3
    """
    found = _machine_code.amd_instructions(text)
    assert found.loads == {1: 1, 2: 1, 4: 1, 16: 3}
    assert (found.atomics, found.matrix) == (1, {"v_mfma": 1})
    assert _machine_code.amd_usage(text) == _machine_code.Usage(114, 12, 3, 5)
    with pytest.raises(ValueError, match="no .vgpr_spill_count"):
        _machine_code.amd_usage(text.replace("vgpr_spill", "other"))


def config(block: int) -> Config:
    return Config((("BLOCK", block),), 4, 1)


SPACE = Space(
    "asked",
    lambda *_: config(16),
    lambda *_: [config(16), config(32), config(64), config(48)],
    lambda config, dtype: 1024 * dict(config.blocks)["BLOCK"],
)


class Asking(Op):
    """An op that chooses a config and launches nothing."""

    def call(self, arguments):
        (x,) = arguments
        choose(SPACE, target_of(x.device), x.dtype, {"columns": 8}, len(x))


def asking(*counts: int) -> Asking:
    def rows(count):
        return Workload(
            f"{count} rows", lambda dtype, layout, device: (torch.empty(count, 8, device=device),)
        )

    return Asking("asks", "", tuple(rows(count) for count in counts), ("contiguous",))


def planned(target: Target, candidates: bool = False, dtypes=(torch.float32,)):
    jobs = aot.plan([asking(3, 4, 4)], [target], dtypes, candidates)
    return [(job.target.name, len(job.op.workloads), job.forced) for job in jobs]


def test_without_tables_every_call_is_compiled_as_it_is_launched():
    assert planned(TARGETS["sm_90"]) == [("sm_90", 3, None)]


def test_candidates_are_compiled_for_each_request_once():
    jobs = planned(TARGETS["sm_90"], candidates=True)
    assert jobs[0] == ("sm_90", 3, None)
    forced = [(job.count, job.config, job.sizes, workloads) for _, workloads, job in jobs[1:]]
    sizes = (("columns", 8),)
    assert forced == [(count, config(block), sizes, 1) for count in (3, 4) for block in (32, 64)]
    assert len(planned(TARGETS["gfx942"], candidates=True)) == 1 + 2 * 2
    small = Target("cuda", 75, "small", 40, 32768, 32)
    assert [job.config for _, _, job in planned(small, candidates=True)[1:]] == [config(32)] * 2


def test_tuned_tables_are_compiled_for_their_device(tmp_path, monkeypatch):
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path))
    configs.reload()
    device = Target("cuda", 90, "NVIDIA H200", 132, 232448, 32)
    record = {name: getattr(device, name) for name in tables.TARGET_FIELDS}
    entries = [
        tables.Entry(dtype, (("columns", 8),), count, config(block), {}, {}, 0)
        for dtype, count, block in (
            (torch.float32, 3, 32),
            (torch.float32, 100, 64),
            (torch.float32, 1000, 64),
            (torch.float16, 3, 16),
        )
    ]
    table = tables.Table("asked", device.name, record, [{}], entries)
    tables.write(tables.path_of(tmp_path, "asked", device.name), table)
    tuned = [("NVIDIA H200", 1, aot.Forced("asked", config(block))) for block in (32, 64)]
    assert planned(TARGETS["sm_90"]) == [("sm_90", 3, None), *tuned]
    assert planned(device) == [("NVIDIA H200", 3, None), *tuned]
    for other in (TARGETS["sm_80"], Target("cuda", 90, "NVIDIA H100", 132, 232448, 32)):
        assert planned(other) == [(other.name, 3, None)]
    configs.reload()


def test_kernels_of_the_interpreter_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    output = tmp_path / "kernels.json"
    result = CliRunner().invoke(aot.app, ["--target", "sm_90", "--op", OPS[0].name, "--json", str(output)])
    assert result.exit_code == 1
    assert "cannot be compiled while TRITON_INTERPRET is set" in result.output
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/nowhere/kernels.json"], "--json /nowhere/kernels.json: /nowhere is no folder"),
        (
            ["--target", "sm_75"],
            "target must be native or one of sm_80, sm_89, sm_90, sm_100, gfx942; got 'sm_75'",
        ),
        (["--op", "roi"], "op must be one of pooled_roi_align"),
        (["--dtype", "float64"], "dtype must be one of bfloat16, float16, float32; got 'float64'"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(arguments, message):
    result = CliRunner().invoke(aot.app, arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_native_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(aot.app, ["--target", "native"])
    assert result.exit_code == 1
    assert "the target native needs a GPU" in result.output


def test_the_command_lists_what_it_compiled_and_fails_on_failures(monkeypatch, tmp_path):
    usage = _machine_code.Usage(40, 8, 0, 2)
    instructions = _machine_code.Instructions(1, {4: 2, 16: 3}, {"mma.sync": 5})
    fine = aot.Built("op", "bfloat16", "contiguous", "sm_90", "call", "_kernel", {"BLOCK": 16}, 2048, 0.5)
    spilling = dataclasses.replace(fine, hash="a", shared_memory=1024, usage=usage, instructions=instructions)
    again = dataclasses.replace(spilling, layout="channels_last")
    monkeypatch.setattr(aot, "compile_jobs", lambda *_: [spilling, again])
    monkeypatch.setattr(aot, "OPS", [asking(3)])
    output = tmp_path / "kernels.json"
    result = CliRunner().invoke(aot.app, ["--target", "sm_90", "--json", str(output)])
    assert result.exit_code == 1
    (row,) = [line for line in result.output.splitlines() if "│ _kernel" in line]
    for cell in ("contiguous, channels_last", "8 B, 2 scalar", "mma.sync 5", "3 of 5"):
        assert cell in row
    assert result.output.count("failed:") == 1
    assert "spills: 8 bytes of stack; 0 vector and 2 scalar registers" in result.output
    kernels = json.loads(output.read_text())["kernels"]
    assert [one["layout"] for one in kernels] == ["contiguous", "channels_last"]
    assert kernels[0]["failure"].startswith("spills")


@pytest.mark.parametrize("spilled", [(8, 0, 0), (0, 3, 0), (0, 0, 2)])
def test_each_kind_of_spill_is_a_failure(spilled):
    fine = aot.Built("op", "bfloat16", "contiguous", "gfx942", "call", "_kernel", {}, 2048, 0.5)
    assert dataclasses.replace(fine, usage=_machine_code.Usage(40, 0, 0, 0)).failure is None
    assert "spills: " in dataclasses.replace(fine, usage=_machine_code.Usage(40, *spilled)).failure


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_native_loads_what_it_compiled_onto_the_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "mgllava_kernels.aot",
        "--target",
        "native",
        "--op",
        OPS[0].name,
        "--dtype",
        "bfloat16",
    ]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
