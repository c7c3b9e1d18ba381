"""Nothing in a checkpoint is executed: hostile pickles are read as data or refused."""

import builtins
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from conversion_cases import GOLDEN, Sources, golden_state_dict

from mgllava.conversion import ConversionError
from mgllava.conversion.pickles import read_pickle
from mgllava.conversion.tensors import LazyTensor

# A module that the hostile pickles name; it gives itself away when it is imported or used.
TRAP = """
from pathlib import Path

MARKER = Path({marker!r})
MARKER.touch()
value = 1


class Stateful:
    def __new__(cls, *args):
        MARKER.touch()
        return super().__new__(cls)

    def __setstate__(self, state):
        MARKER.touch()
"""


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduction = (function, arguments)

    def __reduce__(self):
        return self.reduction


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def hostile_programs(marker):
    """Pickle programs that create `marker` when an ordinary unpickler runs them."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": pickle.dumps(Call(os.system, touch), 2),
        "eval": pickle.dumps(Call(builtins.eval, code), 2),
        "exec, protocol 4": pickle.dumps(Call(builtins.exec, code), 4),
        "nested calls": pickle.dumps(Call(builtins.eval, Call(str, code)), 2),
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", str(marker)]), 2),
        "protocol 0": pickle.dumps(Call(os.system, touch), 0),
        "inst": b"(" + text(touch) + b"ios\nsystem\n.",
        "obj": b"\x80\x02(" + name("os", "system") + text(touch) + b"o.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(touch) + b"\x85R.",
        "dotted name": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(touch) + b"\x85R.",
        "import": name("trap", "value") + b".",
        "newobj": b"\x80\x02" + name("trap", "Stateful") + b")\x81.",
        "newobj_ex": b"\x80\x04" + name("trap", "Stateful") + b")}\x92.",
        "build": b"\x80\x02" + name("trap", "Stateful") + b")\x81}" + text("a") + text("b") + b"sb.",
    }


def write_archive(path, program, storages=()):
    """A file laid out as torch.save does, with any program for its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for number, content in enumerate(storages):
            archive.writestr(f"archive/data/{number}", content)
    return path


@pytest.fixture
def marker(tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    (tmp_path / "trap.py").write_text(TRAP.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    sys.modules.pop("trap", None)


PROGRAMS = sorted(hostile_programs("marker"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_hostile(marker, program):
    """The control: an ordinary unpickler does execute them (where it gets that far)."""
    try:
        pickle.loads(hostile_programs(marker)[program])
    except TypeError:
        assert program == "obj"  # a quirk of that opcode with functions
        return
    assert marker.exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_hostile_program_as_a_checkpoint(tmp_path, marker, program):
    path = write_archive(tmp_path / "checkpoint.pth", hostile_programs(marker)[program])
    with pytest.raises(ConversionError):
        Sources().with_checkpoint(path).convert(None, dry_run=True)
    assert not marker.exists()
    assert "trap" not in sys.modules


@pytest.mark.parametrize("program", PROGRAMS)
def test_hostile_program_in_the_older_format(tmp_path, marker, program):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(hostile_programs(marker)[program])
    with pytest.raises(ConversionError, match="never unpickled"):
        Sources().with_checkpoint(path).convert(None, dry_run=True)
    assert not marker.exists()


def test_tensors_beside_hostile_objects_are_read(tmp_path, marker):
    tensors = golden_state_dict()
    hooks = [Call(os.system, f"touch {marker}"), Call(builtins.eval, f"open({str(marker)!r}, 'w')")]
    torch.save({"hooks": hooks, "state_dict": tensors, "meta": hooks}, tmp_path / "checkpoint.pth")
    content = read_pickle(tmp_path / "checkpoint.pth")
    assert not marker.exists()
    assert content["hooks"] == [None, None]
    assert content["state_dict"].keys() == tensors.keys()
    assert all(torch.equal(content["state_dict"][key].read(), value) for key, value in tensors.items())
    torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert marker.exists()


def test_golden_checkpoint_needs_the_inert_reader():
    """Otherwise the tests of it would test PyTorch's reader."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(GOLDEN / "mg_llava.pth", weights_only=True)
    content = read_pickle(GOLDEN / "mg_llava.pth")
    assert content["message_hub"]["log_scalars"] == {"train/loss": None}
    assert content["meta"]["note"] == "mmengine-style metadata"
    expected = golden_state_dict()
    tensors = content["state_dict"]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key].read(), value) for key, value in expected.items())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
)
def test_dtypes_and_strides(tmp_path, marker, dtype):
    base = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "slice": base[1:3, 2:5],
        "scalar": base[2, 3],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base, requires_grad=False),
    }
    torch.save({"state_dict": tensors, "foreign": Call(os.system, f"touch {marker}")}, tmp_path / "a.pth")
    content = read_pickle(tmp_path / "a.pth")["state_dict"]
    for key, value in tensors.items():
        assert (content[key].shape, content[key].dtype) == (tuple(value.shape), dtype)
        assert torch.equal(content[key].read(), value)


def tensor_program(offset, shape, strides, key="0"):
    """A dict with one tensor over a FloatStorage, and a foreign name that makes PyTorch's reader refuse."""

    def number(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = (
        b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + number(4) + b"tQ"
    )
    tensor = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset)
    tensor += numbers(shape) + numbers(strides) + b"\x89" + name("collections", "OrderedDict") + b")RtR"
    foreign = name("foreign", "thing")
    return b"\x80\x02}(" + text("x") + tensor + text("y") + foreign + b"u."


def test_tensor_program_is_valid(tmp_path):
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    path = write_archive(tmp_path / "a.pth", tensor_program(1, (3,), (1,)), [values.numpy().tobytes()])
    assert read_pickle(path)["x"].read().tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (0, (2, 2), (3, 2)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (2**31 - 1, (1,), (1,)),
    ],
)
def test_tensor_outside_its_storage(tmp_path, offset, shape, strides):
    path = write_archive(tmp_path / "a.pth", tensor_program(offset, shape, strides), [bytes(16)])
    with pytest.raises(ConversionError, match=r"a\.pth"):
        read_pickle(path)


@pytest.mark.parametrize("key", ["1", "../data.pkl", "/etc/hostname"])
def test_storage_that_is_not_in_the_file(tmp_path, key):
    path = write_archive(tmp_path / "a.pth", tensor_program(0, (4,), (1,), key), [bytes(16)])
    with pytest.raises(ConversionError, match="missing from the file"):
        read_pickle(path)


def test_persistent_ids_of_another_kind(tmp_path, marker):
    for reference in (text("storage"), name("os", "system"), b"(" + text("module") + b"t"):
        program = b"\x80\x02" + name("foreign", "thing") + b"0" + reference + b"Q."
        path = write_archive(tmp_path / "a.pth", program)
        with pytest.raises(ConversionError, match="other than a storage"):
            read_pickle(path)


def test_allowed_functions_cannot_be_altered(tmp_path):
    """BUILD sets attributes on whatever lies on the stack; no function may change."""
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    state = b"}" + text("__defaults__") + b")s"  # dict state: lands in __dict__
    slots = b"(N" + state + b"t"  # (None, dict): lands in setattr
    for target in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("os", "system")):
        for change in (state, slots):
            program = b"\x80\x02" + name(*target) + change + b"b."
            path = write_archive(tmp_path / "a.pth", program)
            try:
                read_pickle(path)
            except ConversionError:
                continue
    assert vars(torch._utils._rebuild_tensor_v2) == before
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    tensors = read_pickle(GOLDEN / "mg_llava.pth")["state_dict"]
    assert isinstance(tensors["projector.model.0.bias"], LazyTensor)


def test_self_containing_and_repetitive_structures(tmp_path):
    inside = []
    inside.append(inside)
    wide = [Call(os.getpid)]
    for _ in range(40):
        wide = [wide, wide]
    torch.save({"loop": inside, "wide": wide, "x": torch.ones(2)}, tmp_path / "a.pth")
    assert read_pickle(tmp_path / "a.pth")["x"].read().tolist() == [1.0, 1.0]


def test_foreign_containers_are_emptied(tmp_path):
    """A subclass of dict or list pickles its items through opcodes that call methods of the object."""
    program = (
        b"\x80\x02}("
        + text("config")
        + (name("foreign", "ConfigDict") + b")\x81}" + text("a") + b"K\x01sb(" + text("k") + b"K\x02u")
        + text("list")
        + (name("foreign", "List") + b")\x81(K\x01K\x02e")
        + text("dtype")
        + name("torch", "float32")
        + b"u."
    )
    path = write_archive(tmp_path / "a.pth", program)
    assert read_pickle(path) == {"config": None, "list": None, "dtype": None}


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConversionError, match=r"not a torch\.save file"):
        read_pickle(tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    with pytest.raises(ConversionError, match=r"not one that torch\.save wrote"):
        read_pickle(tmp_path / "other.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ConversionError):
        read_pickle(tmp_path / "empty.pth")
