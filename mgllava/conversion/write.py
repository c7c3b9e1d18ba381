"""Writes the output folder: all of it or nothing, one shard of weights in memory at a time."""

import json
import os
import platform
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from .mapping import Assignment, WeightMapping
from .tensors import ConversionError, LazyTensor, listed

try:
    import fcntl
except ImportError:  # Windows; leftovers of killed conversions are named there instead of removed
    fcntl = None  # type: ignore[assignment]

MAX_SHARD_BYTES = 5 * 10**9
_OTHER_FILES_BYTES = 64 * 2**20  # tokenizer, configurations and card, generously
_LOCK = ".lock"
_KEYS_NAMED = 5
_COMPARED_ROWS = 4096


def resolve_output(output: str | Path) -> Path:
    """The folder meant, free of links, `~` and `..`, so that its parent and its file system are the true ones.

    Raises:
        ConversionError: if it is a link to nothing, or a path that cannot be followed.
    """
    path = Path(output)
    try:
        path = path.expanduser()
        if path.is_symlink() and not path.exists():
            raise ConversionError(f"--output {path}: a link to {os.readlink(path)}, which does not exist")
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, an unknown user's home
        raise ConversionError(f"--output {path}: {error}") from error


def check_output(output: Path) -> None:
    """Raises ConversionError if `output` (resolved) is taken or cannot be written."""
    if output.exists() and not output.is_dir():
        raise ConversionError(f"--output {output}: there is a file already; choose a new folder or remove it")
    existing = _existing_folder(output)
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise ConversionError(f"--output {output}: no permission to write in {existing}")
    if output.is_dir() and any(not _is_abandoned(entry, output) for entry in output.iterdir()):
        raise ConversionError(
            f"--output {output}: there is a folder that is not empty already; choose a new folder or remove it"
        )


def check_disk_space(output: Path, assignments: Sequence[Assignment], dtype: torch.dtype) -> None:
    """Raises ConversionError if the weights cannot fit beside what is on the disk."""
    needed = sum(stored_bytes(item, dtype) for item in assignments) + _OTHER_FILES_BYTES
    free = shutil.disk_usage(_existing_folder(output)).free
    if needed > free:
        raise ConversionError(
            f"--output {output}: the model needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        )


def _existing_folder(output: Path) -> Path:
    """`output` where it exists, which may be a file system of its own; else the folder it will be made in."""
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir():
        raise ConversionError(f"--output {output}: {existing} is a file, not a folder")
    return existing


def remove_abandoned(output: Path) -> list[str]:
    """Remove what killed conversions to `output` left; returns notes on that and on what must stay."""
    notes = []
    for home in (output, output.parent):
        for entry in _scratch_folders(home, output):
            if _is_abandoned(entry, output):
                shutil.rmtree(entry, ignore_errors=True)
                notes.append(f"removed {entry}, which a killed conversion had left")
            else:
                notes.append(f"{entry} is another conversion's; if none is running, remove it")
    return notes


@contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """A scratch folder whose content becomes that of `output` (resolved) when, and only when, the block ends well.

    A new `output` is the renamed scratch folder, a single step. An empty folder that exists is kept, as it may
    be a mount point or somebody's working directory: the scratch folder is made inside it, and its files move
    up at the end, config.json last, without which nothing loads.

    Where the block fails, is interrupted or the process is asked to terminate, the scratch folder is removed. A
    process killed outright leaves it behind under a hidden name; the next conversion removes it.

    Raises:
        ConversionError: if the complete model cannot be put in its place; it is kept where it is.
    """
    home = output if output.is_dir() else output.parent
    home.mkdir(parents=True, exist_ok=True)
    scratch = home / f"{_scratch_prefix(output)}{secrets.token_hex(4)}"
    with _termination_raises():
        try:
            scratch.mkdir()
            with _lock(scratch):
                yield scratch
            (scratch / _LOCK).unlink()  # from here on the folder is worth keeping
            _publish(scratch, output)
        except _PublishError as error:
            raise ConversionError(
                f"--output {output}: the model is complete, but cannot be put there ({error}); "
                f"it is kept as {scratch}"
            ) from error
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


class _PublishError(Exception):
    pass


def _publish(scratch: Path, output: Path) -> None:
    moved: list[Path] = []
    try:
        if not output.is_dir():
            scratch.rename(output)
            return
        if any(entry != scratch for entry in output.iterdir()):
            raise FileExistsError("the folder has been filled meanwhile")
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
            file.rename(output / file.name)
            moved.append(file)
        scratch.rmdir()
    except BaseException as error:
        for file in reversed(moved):
            (output / file.name).rename(file)
        if isinstance(error, OSError):
            raise _PublishError(str(error)) from error
        raise


def _scratch_folders(home: Path, output: Path) -> list[Path]:
    try:
        return sorted(entry for entry in home.iterdir() if entry.name.startswith(_scratch_prefix(output)))
    except OSError:  # not there yet, or a parent that may not be listed
        return []


def _scratch_prefix(output: Path) -> str:
    return f".{output.name}.incomplete-"


@contextmanager
def _lock(scratch: Path) -> Iterator[None]:
    """Marks the folder as in use; the system drops the lock with the process, however that ends."""
    with (scratch / _LOCK).open("w") as file:
        if _take(file):
            # Only now: without this name nobody takes the folder for abandoned.
            file.write(platform.node())
            file.flush()
        yield


def _take(file: IO[str]) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else's, or a file system without locks
        return False
    return True


def _is_abandoned(entry: Path, output: Path) -> bool:
    """Whether `entry` is a scratch folder for `output` whose process, on this machine, is gone."""
    if not entry.name.startswith(_scratch_prefix(output)) or entry.is_symlink():
        return False
    try:
        with (entry / _LOCK).open("r+") as file:
            # Locks do not always reach from one machine to another over a network's file system.
            return _take(file) and file.read() == platform.node()
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM raises, as Ctrl-C does, so that cleaning up happens; unless the program has its own handler."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, _) -> None:
        raise SystemExit(128 + number)  # the status that shells give for it

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check_tied(mapping: WeightMapping) -> None:
    """Raises ConversionError if a head that is left out, as the embedding is in its place, has other values."""
    if mapping.tied is None:
        return
    embedding, head = mapping.tied
    if not _same_values(embedding.tensor, head.tensor):
        raise ConversionError(
            f"{head.source}: {head.key} differs from {embedding.key}, yet the language model's config.json has "
            "tie_word_embeddings: true; set that to false there to keep the head"
        )


def _same_values(one: LazyTensor, other: LazyTensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    rows = zip(one.read().split(_COMPARED_ROWS), other.read().split(_COMPARED_ROWS), strict=True)
    return all(bool((a == b).all()) for a, b in rows)


def write_weights(
    folder: Path,
    assignments: Sequence[Assignment],
    dtype: torch.dtype,
    *,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or shards with their index, each tensor read only when its shard is due.

    Raises:
        ConversionError: at the first shard with values that are not finite, or are too large for `dtype`.
    """
    shards = _split(assignments, dtype, max_shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(len(shards))]
    total = sum(stored_bytes(item, dtype) for item in assignments)
    columns = (TextColumn("writing weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("weights", total=total)
        for name, shard in zip(names, shards, strict=True):
            tensors, not_finite = {}, []
            for item in shard:
                values = tensors[item.target] = _values(item, dtype)
                if not _is_finite(values):
                    not_finite.append(item)
                bar.advance(task, stored_bytes(item, dtype))
            _raise_if_not_finite(not_finite, dtype)
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {item.target: name for name, shard in zip(names, shards, strict=True) for item in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def stored_bytes(item: Assignment, dtype: torch.dtype) -> int:
    return item.numel * _stored_dtype(item, dtype).itemsize


def _stored_dtype(item: Assignment, dtype: torch.dtype) -> torch.dtype:
    return dtype if item.tensor.dtype.is_floating_point else item.tensor.dtype


def _values(item: Assignment, dtype: torch.dtype) -> torch.Tensor:
    """The parameter's values in memory of their own; rows added for placeholders are zero."""
    values = item.tensor.read()
    if item.added_rows:
        grown = torch.zeros(item.shape, dtype=_stored_dtype(item, dtype))
        grown[: values.shape[0]] = values
        return grown
    # Always a copy: a view of a memory map would be read only while it is saved, past the progress bar, and
    # safetensors refuses two names for one memory.
    return values.to(_stored_dtype(item, dtype), copy=True, memory_format=torch.contiguous_format)


def _is_finite(values: torch.Tensor) -> bool:
    """In one pass and without a copy: NaN is the extreme of whatever contains it."""
    if not values.dtype.is_floating_point or not values.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def _raise_if_not_finite(items: Sequence[Assignment], dtype: torch.dtype) -> None:
    if not items:
        return
    damaged = [item for item in items if not _is_finite(item.tensor.read())]
    named = listed(f"{item.source}: {item.key}" for item in (damaged or items)[:_KEYS_NAMED])
    if damaged:
        raise ConversionError(f"weights that are NaN or infinite; the file is damaged:\n{named}")
    name = str(dtype).removeprefix("torch.")
    raise ConversionError(f"weights too large for {name}; choose --dtype bfloat16 or float32:\n{named}")


def _split(assignments: Sequence[Assignment], dtype: torch.dtype, max_bytes: int) -> list[list[Assignment]]:
    shards: list[list[Assignment]] = [[]]
    filled = 0
    for item in assignments:
        size = stored_bytes(item, dtype)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
