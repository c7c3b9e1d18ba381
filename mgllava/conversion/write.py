"""Writes the output folder: all of it or nothing, one shard of weights in memory at a time."""

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from .mapping import Assignment
from .tensors import ConversionError

MAX_SHARD_BYTES = 5 * 10**9
_OTHER_FILES_BYTES = 64 * 2**20  # tokenizer, configurations and card, generously


def check_output(output: Path) -> None:
    """Raises ConversionError if `output` is taken."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        kind = "a folder that is not empty" if output.is_dir() else "a file"
        raise ConversionError(f"--output {output}: there is {kind} already; choose a new folder or remove it")


def check_disk_space(output: Path, assignments: Sequence[Assignment], dtype: torch.dtype) -> None:
    """Raises ConversionError if the weights cannot fit beside what is on the disk."""
    existing = next(folder for folder in output.absolute().parents if folder.is_dir())
    needed = sum(stored_bytes(item, dtype) for item in assignments) + _OTHER_FILES_BYTES
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConversionError(
            f"--output {output}: the model needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        )


@contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """A scratch folder beside `output` that takes its name when, and only when, the block ends well.

    A rename within one file system is a single step, so `output` is never seen half-written. Where the block
    fails or is interrupted the scratch folder is removed; a process killed outright leaves it behind under a
    hidden name of its own.
    """
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = output.absolute().parent / f".{output.name}.incomplete-{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        yield scratch
        if output.is_dir():
            output.rmdir()  # empty, or this fails
        scratch.rename(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_weights(
    folder: Path,
    assignments: Sequence[Assignment],
    dtype: torch.dtype,
    *,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or shards with their index, each tensor read only when its shard is due."""
    shards = _split(assignments, dtype, max_shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(len(shards))]
    total = sum(stored_bytes(item, dtype) for item in assignments)
    columns = (TextColumn("writing weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("weights", total=total)
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for item in shard:
                tensors[item.target] = _values(item, dtype)
                bar.advance(task, stored_bytes(item, dtype))
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
