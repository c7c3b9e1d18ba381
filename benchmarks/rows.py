"""The rows of benchmarks/results: one JSON object a line, one file per op and kind of device."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# How a note begins that doubts the floors of its row.
DRIFTED = "the device's own rates changed meanwhile"


@dataclass(frozen=True)
class Row:
    """One provider in one case.

    A row either has times, or a `reason` why it has none. Rows of one case, dtype and mode that share `run`
    were measured together, on a CPU in turns, on a GPU one after the other: only their ratios mean something.
    """

    op: str
    """Name of the benchmark, such as `pooled_roi_align`; with `kind` the name of the file."""
    kind: str
    """`cpu`, or the GPU's name."""
    device: str
    """The GPU's name, or the CPU's name and the number of threads."""
    case: str
    """What is computed, in words."""
    shape: dict[str, int]
    """Sizes of the case, from `shapes.py`."""
    dtype: str
    """`float32`, `bfloat16`, `float16`."""
    mode: str
    """`forward`, `backward` or `both`."""
    provider: str
    """`original` is the baseline; `torch` and `triton` are this package's paths."""
    launch: str
    """`eager`: each call launched by the host. `graph`: replayed from a CUDA graph."""
    versions: dict[str, str]
    """Of Python, torch, triton, torchvision, transformers and the GPU's driver, as far as there are any."""
    commit: str | None
    """The last commit that changed the code, `-dirty` if files differ from it; None outside a git checkout."""
    run: str
    """When this case was measured, UTC."""
    origin: str
    """Where the sizes come from."""
    tables: str | None = None
    """A short hash of the tuned tables of this GPU that were in force; None: there were none."""
    settings: str | None = None
    """Clocks, power limit and MIG of a GPU, or why they are not known (`gpu_settings.py`); None on a CPU."""
    milliseconds: dict[str, float] | None = None
    """Time of one call: `min`, `p20`, `median`, `p80`, `max`."""
    samples: int = 0
    """Times behind the quantiles."""
    extra_bytes: int | None = None
    """Peak memory of a call above its inputs: resident memory of a process of its own on a CPU, torch's
    allocations on a GPU. In mode `backward` what the forward pass kept counts as input."""
    reference: str | None = None
    """What the results were compared with."""
    error: float | None = None
    """‖actual − expected‖ / ‖expected‖ of the result that comes nearest to its tolerance."""
    tolerance: float | None = None
    """What that error may be: twice the baseline's in the same dtype, the dtype's own precision at least."""
    wrong: bool = False
    """The error is above the tolerance, so the provider was not timed."""
    floor_ms: float | None = None
    """What the device's own bandwidth and matmul rate allow (`roofline.py`)."""
    share: float | None = None
    """`floor_ms` / median. On a CPU, whose cache may hold the inputs, it can exceed 1."""
    bytes: int | None = None
    """What the case cannot do without moving (`roofline.py`)."""
    flops: int | None = None
    """What the case cannot do without computing."""
    bandwidth: float | None = None
    """Measured bytes per second, read or copied, whichever is more."""
    matmul_rate: float | None = None
    """Measured FLOP per second of a large matmul in this dtype."""
    reason: str | None = None
    """Why there are no times."""
    note: str | None = None
    """What the numbers should be read with."""
    details: dict[str, float] = field(default_factory=dict)
    """Further numbers of one benchmark, such as `tokens_per_second`."""

    @property
    def key(self) -> tuple[object, ...]:
        """What a re-run replaces; commit and tables do not belong to it, so a file holds the newest rows."""
        shape = tuple(sorted(self.shape.items()))
        versions = tuple(sorted(self.versions.items()))
        case = (self.op, self.case, shape, self.dtype, self.mode)
        return *case, self.provider, self.launch, self.device, versions


def path_of(op: str, kind: str, folder: Path = RESULTS) -> Path:
    """The file of an op's rows on one kind of device."""
    slug = "".join(letter if letter.isalnum() else "_" for letter in kind)
    return folder / f"{op}.{slug}.jsonl"


def read(path: Path) -> list[Row]:
    """The rows of a file, or none if it does not exist.

    Raises:
        ValueError: a line is no row of this format.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is no row of this format: {error}") from error
    return rows


def read_all(folder: Path = RESULTS) -> list[Row]:
    """The rows of every file in a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of rows at once: whoever reads it sees the old rows or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows]
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else measures into this folder meanwhile: times would disturb each other, and rows get lost.

    Raises:
        RuntimeError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{folder}: another run is writing here; wait for it, or stop it") from error
        yield
    finally:
        os.close(descriptor)


def add(new: Iterable[Row], folder: Path = RESULTS) -> None:
    """Put rows into their files in place of those of the same key."""
    by_path: dict[Path, list[Row]] = {}
    for row in new:
        by_path.setdefault(path_of(row.op, row.kind, folder), []).append(row)
    for path, rows in by_path.items():
        replaced = {row.key for row in rows}
        write(path, [row for row in read(path) if row.key not in replaced] + rows)
