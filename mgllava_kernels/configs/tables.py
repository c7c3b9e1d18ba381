"""Tuned tables on disk: one JSON file per kernel and device, `<folder>/<kernel>/<device>.json`.

    {"kernel": "pooled_roi_align", "device": "NVIDIA H200",
     "target": {"backend": "cuda", "arch": 90, "multiprocessors": 132, "shared_memory": 232448, ...},
     "runs": [{"date": ..., "torch": ..., "triton": ..., "driver": ..., "command": ...}],
     "entries": [{"dtype": "bfloat16", "sizes": {...}, "count": 100,
                  "config": {"blocks": {...}, "num_warps": 4, "num_stages": 3},
                  "microseconds": {...}, "heuristic_microseconds": {...}, "run": 0}]}

`target` says what the table is compiled for where the device is absent. An entry's times are those of a whole
call of the op by the name of the workload, with the entry's config and with the heuristic's; `run` is the
index of the conditions it was measured under.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mgllava_kernels.configs.space import Config

PACKAGE = Path(__file__).parent
ENVIRONMENT_VARIABLE = "MGLLAVA_KERNELS_CONFIGS"
TARGET_FIELDS = {
    "backend": str,
    "arch": (int, str),
    "multiprocessors": int,
    "shared_memory": int,
    "warp_size": int,
}

# The dtype and the sizes in alphabetical order: what a model fixes.
Key = tuple[torch.dtype, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class Entry:
    """The best config found for one dtype, sizes and count; times in microseconds by workload."""

    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    count: int
    config: Config
    microseconds: Mapping[str, float]
    heuristic_microseconds: Mapping[str, float]
    run: int

    @property
    def key(self) -> Key:
        return self.dtype, self.sizes

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes)
        return f"{dtype_name(self.dtype)}, {sizes}, count {self.count}"


@dataclass
class Table:
    """All entries of one kernel on one device."""

    kernel: str
    device: str
    target: dict[str, Any]
    runs: list[dict[str, str | None]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def folders() -> list[Path]:
    """Where tables are looked for, the user's own folder first."""
    own = os.environ.get(ENVIRONMENT_VARIABLE)
    return [Path(own), PACKAGE] if own else [PACKAGE]


def path_of(folder: Path, kernel: str, device: str) -> Path:
    """The file of a kernel's table for a device by its name: `NVIDIA H200` has NVIDIA_H200.json."""
    return folder / kernel / (re.sub(r"[^A-Za-z0-9.+-]+", "_", device) + ".json")


def find() -> list[Path]:
    """Every table there is, the user's own first."""
    return [path for folder in folders() for path in sorted(folder.glob("*/*.json"))]


def read(path: Path) -> Table:
    """The table in `path`.

    Raises:
        ValueError: it is no table; the message names the file, the entry and what was expected.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    where = str(path)
    table = Table(
        _value(content, "kernel", str, where),
        _value(content, "device", str, where),
        {
            name: _value(_value(content, "target", dict, where), name, kind, f"{where}: target")
            for name, kind in TARGET_FIELDS.items()
        },
        _value(content, "runs", list, where),
    )
    if path.parent.name != table.kernel or path != path_of(path.parents[1], table.kernel, table.device):
        raise ValueError(f"{path} holds the table of {table.kernel!r} for {table.device!r}")
    seen: set[tuple[Key, int]] = set()
    for index, record in enumerate(_value(content, "entries", list, where)):
        entry = _entry(record, f"{where}: entry {index}")
        if (entry.key, entry.count) in seen:
            raise ValueError(f"{where}: entry {index} ({entry}) is there twice")
        if entry.run not in range(len(table.runs)):
            raise ValueError(f"{where}: entry {index}: run {entry.run} is not one of {len(table.runs)} runs")
        seen.add((entry.key, entry.count))
        table.entries.append(entry)
    return table


def write(path: Path, table: Table) -> None:
    """Replace the file as a whole or leave it as it was; one entry a line."""
    entries = [
        {
            "dtype": dtype_name(entry.dtype),
            "sizes": dict(entry.sizes),
            "count": entry.count,
            "config": {
                "blocks": dict(entry.config.blocks),
                "num_warps": entry.config.num_warps,
                "num_stages": entry.config.num_stages,
            },
            "microseconds": dict(entry.microseconds),
            "heuristic_microseconds": dict(entry.heuristic_microseconds),
            "run": entry.run,
        }
        for entry in sorted(
            table.entries, key=lambda entry: (dtype_name(entry.dtype), entry.sizes, entry.count)
        )
    ]
    fields = {"kernel": table.kernel, "device": table.device, "target": table.target}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in fields.items()]
    lines += [f'  "runs": {_lines(table.runs)},', f'  "entries": {_lines(entries)}']
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("{\n" + "\n".join(lines) + "\n}\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _lines(records: list[Any]) -> str:
    return (
        "[\n" + ",\n".join(f"    {json.dumps(record)}" for record in records) + "\n  ]" if records else "[]"
    )


def _entry(record: Any, where: str) -> Entry:
    name = _value(record, "dtype", str, where)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: dtype must be one of torch's, got {name!r}")
    config = _value(record, "config", dict, where)
    count = _value(record, "count", int, where)
    if count < 1:
        raise ValueError(f"{where}: count must be at least 1, got {count}")
    return Entry(
        dtype,
        tuple(sorted(_numbers(record, "sizes", int, where).items())),
        count,
        Config(
            tuple(_numbers(config, "blocks", int, f"{where}: config").items()),
            _value(config, "num_warps", int, f"{where}: config"),
            _value(config, "num_stages", int, f"{where}: config"),
        ),
        _numbers(record, "microseconds", (int, float), where),
        _numbers(record, "heuristic_microseconds", (int, float), where),
        _value(record, "run", int, where),
    )


def _numbers(record: Any, name: str, kind: Any, where: str) -> dict[str, Any]:
    values = _value(record, name, dict, where)
    return {key: _value(values, key, kind, f"{where}: {name}") for key in values}


def _value(record: Any, name: str, kind: Any, where: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {record!r}")
    if name not in record:
        raise ValueError(f"{where} has no {name!r}")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: {name} must be {expected}, got {value!r}")
    return value
