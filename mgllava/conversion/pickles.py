"""Reads the tensors of a `torch.save` file without executing anything it says.

A pickle is a program: it names callables and has them called. PyTorch's own `weights_only` reader refuses
every callable it does not know, and with it the whole file. Training checkpoints need more: beside their
tensors they hold objects of the training framework (log buffers, enums, loss scalers) whose classes are
neither installed nor wanted. `read_pickle` therefore asks PyTorch first and, where that is refused, runs the
pickle over *inert* objects only:

- no global is ever imported or looked up: each name becomes one of the few stand-ins below or `_Inert`;
- `_Inert` swallows construction, state, items and attributes and keeps none of it;
- the stand-ins for PyTorch's rebuild functions return records (storage name, shape, strides), not tensors;
  like every object the pickle can reach they ignore any state it tries to set on them;
- storages are looked up by name among the members of the zip, and every shape, stride and offset is checked
  against the member's size before memory is touched.

So whatever a file contains, the worst it can do is to be rejected.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from .tensors import ConversionError, LazyTensor, refused_as

_LOCAL_HEADER_BYTES = 30  # fixed part of a zip member's local header; the lengths of the rest end it

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_pickle(path: Path) -> Any:
    """The content of a `torch.save` file, with a `LazyTensor` for each tensor.

    Returns:
        dicts, lists, strings, numbers, None and `LazyTensor`; anything else is replaced by None.

    Raises:
        ConversionError: if the file is truncated, is no `torch.save` file, or is one in the format from
            before PyTorch 1.6 that holds more than tensors.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(path):
        raise ConversionError(f"{path.name} is truncated: its table of contents is missing; copy it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        if not is_zip:
            raise ConversionError(
                f"{path.name} cannot be read: it is not a torch.save file, or one in the format from before "
                "PyTorch 1.6 with more than tensors in it, which is never unpickled; load it where it comes "
                "from and save its state_dict again"
            ) from error
        content = _read_inert(path)
    with refused_as(f"{path.name} cannot be read as a checkpoint"):  # nested too deeply
        return _plain(content, path.name, {})


def _read_inert(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ConversionError(f"{path.name} is a zip file but not one that torch.save wrote")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
                raise ConversionError(
                    f"{path.name} was written on a big-endian machine; save it again on another"
                )
            program = archive.read(pickles[0])
        storages = {
            name.removeprefix(f"{root}data/"): info
            for name, info in members.items()
            if name.startswith(f"{root}data/")
        }
        return _InertUnpickler(io.BytesIO(program), path, storages).load()
    except ConversionError:
        raise
    except Exception as error:  # a hostile or damaged program may fail in any way; all of them are refusals
        raise ConversionError(f"{path.name} cannot be read as a checkpoint: {error}") from error


class _Stateless:
    """Base of all objects a pickle can reach: state that it tries to set is dropped."""

    __slots__ = ()

    def __setstate__(*_) -> None:
        pass


class _Inert(_Stateless):
    """Stands for every foreign class, function and instance; takes anything, does and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__) -> None:
        pass

    def __call__(self, *_, **__) -> "_Inert":
        return self

    def append(*_) -> None:
        pass

    extend = add = update = __setitem__ = append


class _Dict(dict):
    """Stands for OrderedDict: a dict that cannot be given attributes."""

    __slots__ = ()

    def __setstate__(*_) -> None:
        pass


class _Function(_Stateless):
    """Wraps one function of this module so that the pickle can call it but not touch it."""

    __slots__ = ("_function",)

    def __init__(self, function) -> None:
        self._function = function

    def __call__(self, *args):
        return self._function(*args)


class _StorageType(_Stateless):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Stateless):
    __slots__ = ("dtype", "member", "path")

    def __init__(self, path: Path, member: zipfile.ZipInfo, dtype: torch.dtype) -> None:
        self.path, self.member, self.dtype = path, member, dtype


class _StoredTensor(_Stateless):
    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def lazy(self) -> LazyTensor:
        return LazyTensor(self.shape, self.storage.dtype, self.storage.path.name, self.read)

    def read(self) -> torch.Tensor:
        path, member = self.storage.path, self.storage.member
        with path.open("rb") as file:
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        start = member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        size = path.stat().st_size
        if start + member.file_size > size:
            raise ConversionError(f"{path.name} is truncated: {member.filename} ends after the file does")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        content = mapped[start : start + member.file_size]
        if start % self.storage.dtype.itemsize:  # torch.save aligns storages, zip tools that repack do not
            content = content.clone()
        values = content.view(self.storage.dtype)
        return values.as_strided(self.shape, self.strides, values.storage_offset() + self.offset)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _StoredTensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor refers to something that is no storage")
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor has an impossible shape or stride")
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    elements = storage.member.file_size // storage.dtype.itemsize
    if math.prod(shape) and last >= elements:
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} reaches beyond its storage of {elements} elements"
        )
    return _StoredTensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_) -> Any:
    return tensor


def _size(sides=()) -> tuple:
    return tuple(sides)


class _InertUnpickler(pickle.Unpickler):
    """Runs a pickle over the inert objects above; see the module's description."""

    _known: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): _Dict,
        ("torch", "Size"): _Function(_size),
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): _Function(_rebuild_parameter),
        **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    }

    def __init__(self, program: io.BytesIO, path: Path, storages: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(program, encoding="utf-8")
        self._path, self._storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        return self._known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a reference to something other than a storage")
        storage_type, key = pid[1], pid[2]
        if not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a storage of an unknown dtype")
        if not isinstance(key, str) or key not in self._storages:
            raise pickle.UnpicklingError(f"storage {key!r} is missing from the file")
        member = self._storages[key]
        if member.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("its storages are compressed, which torch.save never does")
        return _Storage(self._path, member, storage_type.dtype)


def _plain(value: Any, file: str, seen: dict[int, Any]) -> Any:
    """`value` with `LazyTensor`s for tensors; shared parts stay shared, so nesting cannot blow up."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in seen:
        return seen[id(value)]
    plain: Any = None
    if isinstance(value, torch.Tensor):
        plain = LazyTensor.of(value, file)
    elif isinstance(value, _StoredTensor):
        plain = value.lazy()
    elif isinstance(value, dict):
        plain = seen[id(value)] = {}
        plain.update(
            (key, _plain(item, file, seen)) for key, item in value.items() if isinstance(key, (str, int))
        )
    elif isinstance(value, (list, tuple)):
        plain = seen[id(value)] = []
        plain.extend(_plain(item, file, seen) for item in value)
    seen[id(value)] = plain
    return plain
