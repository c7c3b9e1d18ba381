"""Launch parameters: tables before heuristics, nearest counts, errors that name file and entry."""

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mgllava_kernels import configs
from mgllava_kernels._triton.launch import INTERPRETER, Target
from mgllava_kernels._workloads import OPS, requests_of
from mgllava_kernels.aot import TARGETS
from mgllava_kernels.configs import Config, Space, choose, force, legal, observe, tables

DEVICE = Target("cuda", 90, "NVIDIA H200", 132, 232448, 32)
SIZES = {"C": 64, "H": 32}


def config(block: int = 64, warps: int = 4, stages: int = 2) -> Config:
    return Config((("BLOCK", block), ("WAVES", 3)), warps, stages)


HEURISTIC = config()
SPACE = Space(
    "example",
    heuristic=lambda target, dtype, sizes, count: HEURISTIC,
    candidates=lambda target, dtype, sizes, count: [config(block) for block in (32, 64, 128, 100)],
    shared_memory=lambda config, dtype: (
        config.num_stages * dict(config.blocks)["BLOCK"] * dtype.itemsize * 64
    ),
)


def entry(count: int, block: int, dtype: torch.dtype = torch.bfloat16, **changes) -> tables.Entry:
    fields = tables.Entry(
        dtype, tuple(sorted(SIZES.items())), count, config(block), {"call": 2.0}, {"call": 3.0}, 0
    )
    return replace(fields, **changes)


def write(folder, *entries: tables.Entry, kernel: str = "example", device: str = DEVICE.name):
    target = {name: getattr(DEVICE, name) for name in tables.TARGET_FIELDS}
    path = tables.path_of(folder, kernel, device)
    tables.write(path, tables.Table(kernel, device, target, [{"date": "today"}], list(entries)))
    return path


def ask(count: int = 100, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Config:
    return choose(SPACE, DEVICE, dtype, sizes or SIZES, count)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A folder of the user's own, and nothing remembered from other tests."""
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path))
    configs.reload()
    yield tmp_path
    configs.reload()


def test_without_a_table_the_heuristic_is_taken():
    assert ask() == HEURISTIC


def test_the_nearest_count_on_a_logarithmic_scale_is_taken(own):
    write(own, entry(10, 16), entry(100, 32), entry(1000, 128))
    blocks = {count: dict(ask(count).blocks)["BLOCK"] for count in (0, 1, 10, 31, 32, 100, 316, 317, 10**6)}
    assert blocks == {0: 16, 1: 16, 10: 16, 31: 16, 32: 32, 100: 32, 316: 32, 317: 128, 10**6: 128}


def test_entries_are_for_their_dtype_and_sizes_alone(own):
    write(own, entry(100, 32))
    assert ask() == config(32)
    assert ask(H=32, C=64) == config(32), "the order of sizes means nothing"
    assert ask(dtype=torch.float16) == HEURISTIC
    assert ask(C=64, H=33) == HEURISTIC
    assert choose(SPACE, replace(DEVICE, name="NVIDIA H100"), torch.bfloat16, SIZES, 100) == HEURISTIC


def test_the_users_own_tables_hide_those_of_the_package(own, tmp_path_factory, monkeypatch):
    package = tmp_path_factory.mktemp("package")
    monkeypatch.setattr(tables, "PACKAGE", package)
    write(package, entry(1, 16), entry(100, 32), entry(100, 128, torch.float16))
    write(own, entry(100, 256))
    assert ask(1) == config(256), "the package's entries for the same dtype and sizes are hidden"
    assert ask(dtype=torch.float16) == config(128)
    assert tables.find() == [tables.path_of(folder, "example", DEVICE.name) for folder in (own, package)]
    monkeypatch.delenv(tables.ENVIRONMENT_VARIABLE)
    configs.reload()
    assert ask(1) == config(16)


def test_tables_are_read_once(own, monkeypatch):
    write(own, entry(100, 32))
    ask()
    monkeypatch.setattr(tables, "read", lambda path: pytest.fail("read again"))
    assert ask() == config(32)
    assert ask(7) == config(32)


def test_a_choice_costs_no_more_than_a_few_microseconds():
    ask()
    start = time.process_time()
    for _ in range(2000):
        ask()
    assert (time.process_time() - start) / 2000 < 50e-6


def test_what_is_written_is_read(own):
    path = write(own, entry(100, 32), entry(5, 16, torch.float32))
    table = tables.read(path)
    assert sorted(table.entries, key=lambda e: e.count) == [entry(5, 16, torch.float32), entry(100, 32)]
    assert (table.kernel, table.device, table.runs) == ("example", DEVICE.name, [{"date": "today"}])
    assert Target(name=table.device, **table.target) == DEVICE
    assert path.name == "NVIDIA_H200.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_table_as_it_was(own):
    path = write(own, entry(100, 32))
    before = path.read_text()
    with pytest.raises(TypeError):
        write(own, entry(100, 64, microseconds={"call": object()}))
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def change_entry(**changes):
    def edit(content):
        content["entries"][1].update(changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change_entry(dtype="bfloat61"), "entry 1: dtype must be one of torch's, got 'bfloat61'"),
        (change_entry(count=0), "entry 1: count must be at least 1, got 0"),
        (change_entry(count=True), "entry 1: count must be int, got True"),
        (change_entry(sizes={"C": "64"}), "entry 1: sizes: C must be int, got '64'"),
        (change_entry(sizes=[]), "entry 1: sizes must be dict, got []"),
        (change_entry(microseconds={"call": None}), "entry 1: microseconds: call must be int or float"),
        (change_entry(run=1), "entry 1: run 1 is not one of 1 runs"),
        (change_entry(count=100), "entry 1 (bfloat16, C=64 H=32, count 100) is there twice"),
        (lambda content: content["entries"][1].pop("config"), "entry 1 has no 'config'"),
        (
            lambda content: content["entries"][1]["config"].pop("num_warps"),
            "entry 1: config has no 'num_warps'",
        ),
        (lambda content: content.pop("target"), "has no 'target'"),
        (lambda content: content.update(entries=[3]), "entry 0 must be an object, got 3"),
        (lambda content: content.update(device="another"), "holds the table of 'example' for 'another'"),
    ],
)
def test_a_malformed_table_is_an_error_that_names_file_and_entry(own, edit, message):
    path = write(own, entry(100, 32), entry(1000, 64))
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    for _ in range(2):
        with pytest.raises(ValueError, match="example") as error:
            ask()
        assert str(path) in str(error.value)
        assert message in str(error.value)


def test_a_file_that_is_no_json_is_named(own):
    path = write(own, entry(100, 32))
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match="is not JSON") as error:
        ask()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": config(100)}, "BLOCK must be a power of two, got 100"),
        ({"config": config(1 << 20)}, "bytes of shared memory, NVIDIA H200 has 232448 per program"),
        (
            {"config": Config((("BLOCK_OF_OLD", 64),), 4, 2)},
            "the kernel takes BLOCK, WAVES; got BLOCK_OF_OLD",
        ),
    ],
)
def test_an_illegal_entry_is_an_error_though_another_would_be_taken(own, changes, message):
    path = write(own, entry(100, 32), entry(1000, 64, **changes))
    with pytest.raises(ValueError, match="entry 1") as error:
        ask(100)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_an_entry_without_a_size_that_the_heuristic_needs_is_an_error(own):
    space = replace(SPACE, heuristic=lambda target, dtype, sizes, count: config(sizes["C"]))
    write(own, entry(100, 32, sizes=(("H", 32),)))
    with pytest.raises(ValueError, match="entry 0.*the kernel needs the size 'C'"):
        choose(space, DEVICE, torch.bfloat16, SIZES, 100)


@pytest.mark.parametrize(
    ("changed", "target", "reason"),
    [
        (config(), DEVICE, None),
        (config(96), DEVICE, "BLOCK must be a power of two, got 96"),
        (config(0), DEVICE, "BLOCK must be at least 1, got 0"),
        (Config((("WAVES", -1),), 4, 1), DEVICE, "WAVES must be at least 1, got -1"),
        (config(warps=3), DEVICE, "num_warps must be a power of two, got 3"),
        (config(warps=0), DEVICE, "num_warps must be a power of two, got 0"),
        (config(warps=32), DEVICE, None),
        (config(warps=64), DEVICE, "64 warps of 32 are 2048 threads, at most 1024"),
        (config(warps=16), TARGETS["gfx942"], None),
        (config(warps=32), TARGETS["gfx942"], "32 warps of 64 are 2048 threads, at most 1024"),
        (config(stages=0), DEVICE, "num_stages must be at least 1, got 0"),
        (
            config(512, stages=3),
            TARGETS["sm_80"],
            "needs 196608 bytes of shared memory, sm_80 has 166912 per program",
        ),
        (config(512, stages=3), TARGETS["sm_90"], None),
        (config(512, stages=1), TARGETS["gfx942"], None),
        (
            config(512, stages=2),
            TARGETS["gfx942"],
            "needs 131072 bytes of shared memory, gfx942 has 65536 per program",
        ),
        (config(), INTERPRETER, None),
    ],
)
def test_legal_says_why_not(changed, target, reason):
    assert legal(changed, SPACE, target, torch.bfloat16) == reason


def test_force_holds_inside_its_block_and_the_innermost_wins():
    with force("example", config(16)):
        assert ask() == config(16)
        with force("example", config(32), count=100), force("another", config(128)):
            assert ask(100) == config(32)
            assert ask(101) == config(16)
        with force("example", config(32), dtype=torch.float32, sizes={"H": 32, "C": 64}):
            assert ask(dtype=torch.float32) == config(32)
            assert ask(dtype=torch.float16) == config(16)
            assert ask(dtype=torch.float32, C=1) == config(16)
        assert ask() == config(16)
    assert ask() == HEURISTIC


def test_force_holds_in_the_threads_of_autograd():
    chosen = []
    with force("example", config(16)):
        thread = threading.Thread(target=lambda: chosen.append(ask()))
        thread.start()
        thread.join()
    assert chosen == [config(16)]


def test_an_illegal_config_cannot_be_forced():
    with (
        force("example", config(100)),
        pytest.raises(ValueError, match="BLOCK must be a power of two, got 100"),
    ):
        ask()


def test_observe_collects_what_was_asked():
    with observe() as requests:
        assert ask(7) == HEURISTIC
        with force("example", config(16)):
            assert ask(8) == config(16)
    ask(9)
    assert [request.count for request in requests] == [7, 8]
    assert requests[0].key == (torch.bfloat16, (("C", 64), ("H", 32)))
    assert requests[0].candidates() == [config(32), config(128)], "neither the heuristic's nor illegal ones"


# Tables of the package, `<kernel>/<device>.json`: whoever adds one names it here.
SHIPPED: list[str] = []


def files_of(folder: Path) -> list[str]:
    """Whatever lies in a folder of tables beside the package's modules."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found if path.suffix not in (".py", ".pyc"))


def space_of(kernel: str) -> Space | None:
    """The space of a kernel that some op of the package launches."""
    for op in OPS:
        for layout in op.layouts:
            for _, requests in requests_of(op, DEVICE, torch.bfloat16, layout):
                for request in requests:
                    if request.space.kernel == kernel:
                        return request.space
    return None


def check(path: Path) -> int:
    """The number of a table's entries, each of which can be launched on the table's device."""
    table = tables.read(path)
    space = space_of(table.kernel)
    if space is None:
        raise ValueError(f"{path}: no op launches {table.kernel}")
    if not table.entries:
        raise ValueError(f"{path} has no entries")
    device = Target(name=table.device, **table.target)
    for entry in table.entries:
        reason = configs._unusable(entry, space, device)
        if reason is not None:
            raise ValueError(f"{path}: {entry}: {reason}")
    return len(table.entries)


def test_the_shipped_tables_are_those_known_and_sound():
    found = files_of(tables.PACKAGE)
    assert found == SHIPPED
    entries = [check(tables.PACKAGE / name) for name in found]
    print(f"{len(entries)} tables with {sum(entries)} entries")


def real_table(folder: Path, **changes: int) -> Path:
    """A table of a kernel of the package, as the tuner writes it; some blocks changed."""
    (_, (request, *_)), *_ = requests_of(OPS[0], DEVICE, torch.bfloat16, "contiguous")
    chosen = request.heuristic()
    blocks = tuple({**dict(chosen.blocks), **changes}.items())
    made = tables.Entry(
        *request.key, request.count, replace(chosen, blocks=blocks), {"call": 2.0}, {"call": 3.0}, 0
    )
    return write(folder, made, kernel=request.space.kernel)


def test_a_sound_table_passes_the_check_of_those_shipped(own):
    path = real_table(own)
    assert check(path) == 1
    assert files_of(own) == [str(path.relative_to(own))]
    (own / "stray.json.partial").write_text("")
    assert len(files_of(own)) == 2, "whatever is left over is found as well"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: real_table(folder, BLOCK_K=100), "BLOCK_K must be a power of two, got 100"),
        (lambda folder: real_table(folder, BLOCK_X=4096), "bytes of shared memory"),
        (lambda folder: real_table(folder, BLOCK_Q=16), "the kernel takes BLOCK_K"),
        (lambda folder: write(folder, entry(100, 32)), "no op launches example"),
        (lambda folder: write(folder, kernel="pooled_roi_align"), "has no entries"),
        (lambda folder: real_table(folder).rename(folder / "moved.json"), "holds the table of"),
    ],
    ids=["illegal", "too large", "other blocks", "other kernel", "empty", "moved"],
)
def test_a_broken_table_fails_the_check_of_those_shipped(own, spoil, message):
    path = spoil(own)
    with pytest.raises(ValueError, match=message):
        check(path)


def advice(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mgllava_kernels"]


def test_a_heuristic_is_announced_once_for_a_kernel_and_device(own, caplog):
    caplog.set_level(logging.INFO, "mgllava_kernels")
    space = replace(SPACE, kernel="announced")

    def launched(target: Target, count: int, of: Space = space):
        return choose(of, target, torch.bfloat16, SIZES, count)

    launched(INTERPRETER, 1)
    with observe():
        launched(DEVICE, 1)
    assert not advice(caplog), "neither the interpreter nor a tool that watches is advised"
    for count in (2, 2, 3):
        launched(DEVICE, count)
    (said,) = advice(caplog)
    for part in ("announced", "NVIDIA H200", "python -m mgllava_kernels.tune"):
        assert part in said
    assert caplog.records[-1].levelno == logging.INFO
    launched(replace(DEVICE, name="NVIDIA H100"), 2)
    launched(DEVICE, 2, replace(SPACE, kernel="announced as well"))
    assert len(advice(caplog)) == 3


def test_a_tuned_kernel_is_not_announced(own, caplog):
    caplog.set_level(logging.INFO, "mgllava_kernels")
    write(own, entry(100, 32), kernel="tuned")
    assert choose(replace(SPACE, kernel="tuned"), DEVICE, torch.bfloat16, SIZES, 100) == config(32)
    assert not advice(caplog)
