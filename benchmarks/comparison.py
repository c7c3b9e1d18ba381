"""Rows that were measured together, and the ratios that they allow."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row

# What `auto` takes on a device (`mgllava` is what has no backends), and what it replaces: plain RoIAlign has no
# composition of MG-LLaVA's behind it, but torchvision's, on a CPU on one thread or on all of them.
PACKAGE = {"cpu": ("torch", "mgllava"), "gpu": ("triton", "mgllava")}
BASELINES = ("original", "torchvision", "torchvision, all threads")
# Providers of this package; the others are rivals.
OURS = ("torch", "triton", "mgllava")


@dataclass(frozen=True)
class Comparison:
    """Rows of one device, case, dtype, mode and launch, by provider.

    All are of one `run`, save rows without times: a reason needs no neighbour.
    """

    rows: dict[str, Row]

    @property
    def first(self) -> Row:
        """Any row, for what all of them share."""
        return next(iter(self.rows.values()))

    @property
    def ours(self) -> Row | None:
        """This package's row: timed or with the reason why not."""
        names = PACKAGE["cpu" if self.first.kind == "cpu" else "gpu"]
        return next((self.rows[name] for name in names if name in self.rows), None)

    @property
    def baseline(self) -> Row | None:
        """The original composition if it was timed, for plain RoIAlign the faster of torchvision's two."""
        timed = [row for name in BASELINES if (row := self.timed(name)) is not None]
        return self.timed("original") or min(timed, key=median, default=None)

    @property
    def best_rival(self) -> Row | None:
        """The fastest of all that are not of this package, the baseline among them."""
        rivals = [row for name, row in self.rows.items() if name not in OURS and row.milliseconds]
        return min(rivals, key=median, default=None)

    def timed(self, provider: str) -> Row | None:
        """A provider's row if it has times."""
        row = self.rows.get(provider)
        return row if row is not None and row.milliseconds is not None else None

    def speed_up(self, rival: Row | None) -> float | None:
        """How often this package's time goes into the rival's; below 1 this package is slower."""
        if self.ours is None or self.ours.milliseconds is None or rival is None:
            return None
        return median(rival) / median(self.ours)

    def speed_up_range(self, rival: Row) -> tuple[float, float] | None:
        """The least and the most that 20% and 80% quantiles of both make of `speed_up`."""
        if self.ours is None or self.ours.milliseconds is None or rival.milliseconds is None:
            return None
        own, other = self.ours.milliseconds, rival.milliseconds
        return other["p20"] / own["p80"], other["p80"] / own["p20"]

    def memory_ratio(self) -> float | None:
        """This package's extra memory as a fraction of the baseline's."""
        ours, baseline = self.ours, self.baseline
        if ours is None or baseline is None or ours.extra_bytes is None or not baseline.extra_bytes:
            return None
        return ours.extra_bytes / baseline.extra_bytes


def median(row: Row) -> float:
    """Milliseconds of a timed row."""
    if row.milliseconds is None:
        raise ValueError(f"{row.op}, {row.case}, {row.provider} was not timed: {row.reason}")
    return row.milliseconds["median"]


@dataclass(frozen=True)
class Place:
    """A device with one set of versions: what belongs into one table."""

    kind: str
    device: str
    versions: tuple[tuple[str, str], ...]


def places(rows: Iterable[Row]) -> dict[Place, list[Row]]:
    """Rows by place: GPUs before CPUs, the newest first."""
    found: dict[Place, list[Row]] = {}
    for row in rows:
        found.setdefault(Place(row.kind, row.device, tuple(sorted(row.versions.items()))), []).append(row)
    newest_first = sorted(
        found, key=lambda place: (max(row.run for row in found[place]), place.device), reverse=True
    )
    return {place: found[place] for place in sorted(newest_first, key=lambda place: place.kind == "cpu")}


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """The comparisons of one place's rows, in the order of the rows.

    Where the rows of a case come from several runs, the newest run counts in which this package was timed beside
    a rival; a time of another run is left out, for a ratio across runs means nothing.
    """
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        shape = tuple(sorted(row.shape.items()))
        cases.setdefault((row.op, row.case, shape, row.dtype, row.mode, row.launch), []).append(row)
    return [_of_one_run(own) for own in cases.values()]


def _of_one_run(rows: Sequence[Row]) -> Comparison:
    def rank(run: str) -> tuple[bool, str]:
        of_run = Comparison({row.provider: row for row in rows if row.run == run})
        return of_run.speed_up(of_run.best_rival) is not None, run

    chosen = max({row.run for row in rows}, key=rank)
    kept: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.run == chosen, row.run)):
        if row.run == chosen or row.milliseconds is None:
            kept[row.provider] = row
    order = {row.provider: number for number, row in reversed(list(enumerate(rows)))}
    return Comparison({name: kept[name] for name in sorted(kept, key=order.__getitem__)})
