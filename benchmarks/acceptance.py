"""What the rows of a GPU must show: each line with the number that is asked for and the one that was measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.comparison import Comparison, compare, median, places
from benchmarks.rows import Row

DTYPE = "bfloat16"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
HOW = {"graph": "in a CUDA graph", "eager": "launched by the host"}
# Torchvision's own detection shapes.
DETECTION = tuple(
    f"{boxes} boxes to {side}x{side}, ratio 2" for boxes in ("512", "1,000") for side in (7, 14)
)
TOKENS = {"1 picture": "576", "8 pictures": "4,608", "32 pictures": "18,432"}


@dataclass(frozen=True)
class Verdict:
    """One line of the acceptance."""

    text: str
    wanted: str
    found: str
    state: str

    def __str__(self) -> str:
        return f"{self.state.upper()}: {self.text}: {self.found} (wanted: {self.wanted})"


@dataclass(frozen=True)
class Line:
    """A bound on the worst of some comparisons.

    Args:
        text: what is judged.
        bound: the number asked for.
        op, cases, mode: which comparisons; all `cases` must have been measured.
        value: the number of a comparison, None if it has none.
        unit: how a number is shown.
        least: whether `bound` is the least value, else the most.
        launch: `graph`, or `eager` as the host launches it; the other's number is told as well, and is judged where
            the baseline could not be measured in a graph.
        dtypes: in which the line must hold.
    """

    text: str
    bound: float
    op: str
    cases: tuple[str, ...]
    mode: str
    value: Callable[[Comparison], float | None]
    unit: Callable[[float], str]
    least: bool = True
    launch: str = "graph"
    dtypes: tuple[str, ...] = (DTYPE,)

    def judge(self, comparisons: Sequence[Comparison]) -> Verdict:
        """Met, missed, or not measured with what is missing."""
        wanted = f"at {'least' if self.least else 'most'} {self.unit(self.bound)}"
        failed = [one.ours for one in comparisons if self._concerns(one) and _has_failed(one.ours)]
        if failed:
            reasons = dict.fromkeys(
                f"{row.provider}, {row.case}, {row.dtype}: {row.reason}" for row in failed
            )
            return Verdict(self.text, wanted, "; ".join(reasons), MISSED)
        launch, other = ("graph", "eager") if self.launch == "graph" else ("eager", "graph")
        found, missing = self._values(comparisons, launch)
        if not found:
            launch, other = other, launch
            found, missing = self._values(comparisons, launch)
        if not found:
            return Verdict(self.text, wanted, "nothing to compare", NOT_MEASURED)
        worst = (min if self.least else max)(found, key=found.__getitem__)
        met = found[worst] >= self.bound if self.least else found[worst] <= self.bound
        text = self.unit(found[worst])
        if len(found) > 1 or missing:
            text += f" at {worst}, the {'least' if self.least else 'most'} of {len(found)}"
        text += f" {HOW[launch]}"
        beside, _ = self._values(comparisons, other)
        if worst in beside:
            text += f", {self.unit(beside[worst])} {HOW[other]}"
        if missing:
            text += f"; not measured: {', '.join(missing)}"
        # What is missing may still miss the bound; a miss is one already.
        return Verdict(self.text, wanted, text, MISSED if not met else NOT_MEASURED if missing else MET)

    def _concerns(self, one: Comparison) -> bool:
        first = one.first
        return (first.op, first.mode) == (self.op, self.mode) and (
            first.case in self.cases and first.dtype in self.dtypes
        )

    def _values(self, comparisons: Sequence[Comparison], launch: str) -> tuple[dict[str, float], list[str]]:
        found: dict[str, float] = {}
        missing = []
        for case in self.cases:
            for dtype in self.dtypes:
                name = case if len(self.dtypes) == 1 else f"{case}, {dtype}"
                values = [
                    self.value(one)
                    for one in comparisons
                    if self._concerns(one)
                    and (one.first.case, one.first.dtype, one.first.launch) == (case, dtype, launch)
                ]
                value = next((value for value in values if value is not None), None)
                if value is None:
                    missing.append(name)
                else:
                    found[name] = value
        return found, missing


def _has_failed(row: Row | None) -> bool:
    """Whether this package was to run and could not, or was wrong."""
    return row is not None and row.milliseconds is None


def _times(value: float) -> str:
    return f"{value:.3g} times"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _microseconds(value: float) -> str:
    return f"{value:.3g} µs"


def _against(*names: str) -> Callable[[Comparison], float | None]:
    def value(one: Comparison) -> float | None:
        return next((one.speed_up(row) for name in names if (row := one.timed(name)) is not None), None)

    return value


def _against_best(one: Comparison) -> float | None:
    """Also of what only a GPU runs: without cuBLAS and torch.compile among the rivals there is no verdict."""
    compiled = one.timed("original compiled") or one.timed("original max-autotune")
    if compiled is None or one.timed("cuBLAS bias") is None:
        return None
    return one.speed_up(one.best_rival)


def _share(one: Comparison) -> float | None:
    return None if one.ours is None else one.ours.share


def _time(one: Comparison) -> float | None:
    return None if one.ours is None or one.ours.milliseconds is None else 1e3 * median(one.ours)


_original = _against("original")
_ALL_BOXES = "8 pictures, 100 boxes each"

LINES = (
    Line(
        "pooled RoIAlign, batch 8, 100 boxes each, against the original",
        *(200, "pooled_roi_align", (_ALL_BOXES,), "forward", _original, _times),
    ),
    Line(
        "pooled RoIAlign, batch 8, 100 boxes each, share of the measured bandwidth",
        *(0.6, "pooled_roi_align", (_ALL_BOXES,), "forward", _share, _percent),
    ),
    Line(
        "pooled RoIAlign, batch 1, 100 boxes, in a CUDA graph",
        *(40, "pooled_roi_align", ("1 picture, 100 boxes",), "forward", _time, _microseconds, False),
    ),
    Line(
        "pooled RoIAlign, batch 8, 100 boxes each, forward + backward against the original",
        *(100, "pooled_roi_align", (_ALL_BOXES,), "both", _original, _times),
    ),
    Line(
        "plain RoIAlign at detection shapes, forward against torchvision",
        *(1, "roi_align", DETECTION, "forward", _against("torchvision"), _times),
        dtypes=("float32", DTYPE),
    ),
    Line(
        "plain RoIAlign at detection shapes, backward against torchvision",
        *(1, "roi_align", DETECTION, "backward", _against("torchvision"), _times),
        dtypes=("float32", DTYPE),
    ),
    Line(
        "Conv-Gate, batch 1, forward against the original, both in CUDA graphs",
        *(2.5, "conv_gate", ("1 picture",), "forward", _original, _times),
    ),
    Line(
        "Conv-Gate, batch 32, forward against the original",
        *(1.5, "conv_gate", ("32 pictures",), "forward", _original, _times),
    ),
    Line(
        "Conv-Gate, batches 1 and 32, forward against torch.compile(mode='max-autotune')",
        *(1, "conv_gate", ("1 picture", "32 pictures"), "forward"),
        *(_against("original max-autotune"), _times),
    ),
    Line(
        "Conv-Gate, batches 1 and 32, forward + backward against the original",
        *(1.5, "conv_gate", ("1 picture", "32 pictures"), "both", _original, _times),
    ),
    Line(
        f"projectors, {', '.join(TOKENS.values())} tokens, forward against the best torch call",
        *(1, "projectors", tuple(TOKENS), "forward", _against_best, _times),
    ),
    Line(
        "projectors, 18,432 tokens, share of the matmul rate",
        *(0.7, "projectors", ("32 pictures",), "forward", _share, _percent),
    ),
    Line(
        "whole neck, batch 8, 100 boxes each, against the original",
        *(10, "neck", (_ALL_BOXES,), "forward", _original, _times),
    ),
    Line(
        "whole neck, batch 8, 100 boxes each, extra memory as a share of the original's",
        *(0.1, "neck", (_ALL_BOXES,), "forward", Comparison.memory_ratio, _percent, False),
        launch="eager",
    ),
)


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Every line, judged on the rows of the newest GPU."""
    gpus = [own for place, own in places(rows).items() if place.kind != "cpu"]
    comparisons = compare(gpus[0]) if gpus else []
    return [line.judge(comparisons) for line in LINES]
