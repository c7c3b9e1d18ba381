"""Plots of rows as PNG files: speed-ups, share of the floor, memory and cost against what grows."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.comparison import BASELINES, Comparison, Place, compare, median, places
from benchmarks.registry import BENCHMARKS
from benchmarks.report import NOISY, SLOWER, is_noisy, remarks, representatives, slug, torch_path
from benchmarks.rows import Row
from benchmarks.shapes import CURVES, TOGETHER

# Colours of Okabe and Ito, told apart by colour-blind readers too; markers tell them apart without colour.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
SKY = "#56B4E9"
OURS, ORIGINAL, RIVAL, TORCH = (BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (SKY, "^")
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
AXIS_NAMES = {
    "boxes": "boxes per picture",
    "images": "pictures",
    "canvas": "side of the picture, px",
    "width": "width of the map, cells",
}
GROWTH = {"boxes": "boxes", "images": "pictures", "canvas": "picture size", "width": "map size"}


@dataclass(frozen=True)
class Curve:
    """Comparisons of one op along one axis of `shapes.CURVES`, by the value on that axis."""

    op: str
    points: dict[int, Comparison]

    def values(self, of: Callable[[Comparison], float | None]) -> tuple[list[int], list[float]]:
        """x and y of the points that have a value."""
        pairs = [(x, y) for x, one in self.points.items() if (y := of(one)) is not None]
        return [x for x, _ in pairs], [y for _, y in pairs]


@dataclass(frozen=True)
class Picture:
    """A plot that was written: of which place, its description and its file's name."""

    place: Place
    text: str
    name: str


@mpl.rc_context(STYLE)
def draw_all(rows: Sequence[Row], folder: Path) -> list[Picture]:
    """Write every plot that the rows allow, of the newest place of each kind."""
    drawn: list[Picture] = []
    kinds = set()
    for place, own in places(rows).items():
        if place.kind in kinds:
            continue
        kinds.add(place.kind)
        comparisons = compare(own)
        figures = [
            ("speed_up", "Speed-up of each op", speed_ups(comparisons, place)),
            ("share_of_floor", "Share of the floor of each op", shares(comparisons, place)),
            *(
                (f"memory_against_{axis}", f"Extra memory against {text}", memory(comparisons, place, axis))
                for axis, text in GROWTH.items()
            ),
            *(
                (f"cost_against_{axis}", f"Cost against {text}", cost(comparisons, place, axis))
                for axis, text in GROWTH.items()
            ),
        ]
        for name, text, figure in figures:
            if figure is not None:
                path = folder / f"{name}.{slug(place.kind)}.png"
                save(figure, path)
                drawn.append(Picture(place, text, path.name))
    return drawn


def save(figure: Figure, path: Path) -> None:
    """Write a PNG at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Without matplotlib's version in it, the same rows make the same file.
    figure.savefig(partial, format="png", dpi=160, bbox_inches="tight", metadata={"Software": None})
    os.replace(partial, path)


def _figure(width: float, height: float, lines: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _times(value: float) -> str:
    return f"{value:,.0f}×" if value >= 10 else f"{value:.2f}×"


def _ordered(ops: Iterable[str]) -> list[str]:
    known = list(BENCHMARKS)
    return sorted(set(ops), key=lambda op: (known.index(op) if op in known else len(known), op))


def _label(one: Comparison, is_worst: bool) -> str:
    mode = {"both": "forward + backward"}.get(one.first.mode, one.first.mode)
    worst = ", the worst" if is_worst else ""
    return f"{one.first.op}: {mode}{worst}\n{one.first.case}, {one.first.dtype}"


def speed_ups(comparisons: Sequence[Comparison], place: Place) -> Figure | None:
    """Each op against the original and against its best rival, on a logarithmic axis.

    Whiskers are what the p20 to p80 of both times make of a ratio; a mark is hollow if either time is noisy.
    """
    chosen = representatives(comparisons)
    if not chosen:
        return None
    figure, (axes,) = _figure(8, 1.0 + 0.42 * len(chosen))
    axes.axvline(1, color=GREY, linewidth=1)
    values: list[float] = []
    for line, (one, _) in enumerate(chosen):
        marks = [(one.baseline, ORIGINAL, "against the original (plain RoIAlign: torchvision's faster)")]
        if one.best_rival is not one.baseline:
            marks.append((one.best_rival, RIVAL, "against the best rival"))
        if torch_path(one) is not None:
            marks.append((torch_path(one), TORCH, "against this package's torch path"))
        ends = sorted(value for rival, _, _ in marks if (value := one.speed_up(rival)) is not None)
        axes.plot([min(1, ends[0]), max(1, ends[-1])], [line, line], color="#bbbbbb", zorder=1)
        reach = [*ends]
        for rival, style, text in marks:
            if rival is not None:
                whisker = one.speed_up_range(rival)
                axes.plot(whisker, [line, line], color=style[0], linewidth=1, marker="|", zorder=2)
                _dot(axes, one.speed_up(rival), line, style, text, hollow=is_noisy(one.ours, rival))
                reach += whisker
        values += reach
        # The larger number right of its mark; the smaller, and every loss, left.
        if ends[-1] >= SLOWER:
            _value(axes, ends[-1], max(reach), line, right=True)
        if len(ends) > 1 or ends[0] < SLOWER:
            _value(axes, ends[0], min(1, *reach), line, right=False)
    axes.set_xscale("log")
    axes.set_xlim(0.3 * min(1, *values), 3 * max(1, *values))  # room for the numbers
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(chosen)), [_label(*each) for each in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("rival's time / this package's time   (left of 1: slower)")
    _title(figure, f"Speed-up on {place.device}")
    _legend(axes)
    caveats = [f"Whiskers: p20 to p80. Hollow: of one side p80 is more than {NOISY:g} times p20."]
    caveats += [
        text.replace("`", "'") for text in remarks([row for one, _ in chosen for row in one.rows.values()])
    ]
    figure.supxlabel("\n".join(caveats), x=0.01, ha="left", fontsize=7)
    return figure


def _value(axes: Axes, value: float, beside: float, line: int, right: bool) -> None:
    """A speed-up beside its mark and whiskers, losses in bold."""
    axes.annotate(
        _times(value),
        (beside, line),
        (7 if right else -7, 0),
        textcoords="offset points",
        va="center",
        ha="left" if right else "right",
        fontweight="bold" if value < SLOWER else "normal",
    )


def shares(comparisons: Sequence[Comparison], place: Place) -> Figure | None:
    """How near each op comes to the least time that the device allows."""
    chosen = [
        each for each in representatives(comparisons) if each[0].ours and each[0].ours.share is not None
    ]
    if not chosen:
        return None
    figure, (axes,) = _figure(8, 1.0 + 0.42 * len(chosen))
    for line, (one, _) in enumerate(chosen):
        marks = [
            (one.baseline, ORIGINAL, "original (plain RoIAlign: torchvision)"),
            (one.ours, OURS, "this package"),
        ]
        for row, style, text in marks:
            if row is not None and row.share is not None:
                _dot(axes, 100 * row.share, line, style, text)
        best = max(row.share for row, _, _ in marks if row is not None and row.share is not None)
        text = f"{100 * one.ours.share:.2g}%"
        # On white: the line at 100% would cross the number.
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        options = {"textcoords": "offset points", "va": "center", "color": BLUE, "bbox": white}
        axes.annotate(text, (100 * best, line), (8, 0), **options)
    axes.set_xscale("log")
    axes.set_xlim(right=300)
    axes.axvline(100, color=GREY, linewidth=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(chosen)), [_label(*each) for each in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the floor   (100%: as fast as the measured bandwidth or matmul rate allows)")
    _title(figure, f"Share of the floor on {place.device}")
    _legend(axes)
    return figure


def _dot(axes: Axes, x: float, y: float, style: tuple[str, str], text: str, hollow: bool = False) -> None:
    colour, marker = style
    seen = axes.get_legend_handles_labels()[1]
    axes.plot(
        *([x], [y]),
        color=colour,
        marker=marker,
        markersize=6,
        markerfacecolor="white" if hollow else colour,
        linestyle="none",
        label=text if text not in seen else "_",
        zorder=3,
    )


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def curves(comparisons: Sequence[Comparison], axis: str, launch: str = "eager") -> list[Curve]:
    """The forward passes that lie on one axis of `shapes.CURVES`, of each op that has three points or more."""
    found = []
    for op in _ordered(one.first.op for one in comparisons):
        own = [one for one in comparisons if one.first.op == op and one.first.mode == "forward"]
        own = [one for one in own if one.first.launch == launch and axis in one.first.shape]
        has_boxes = any(one.first.shape.get("boxes") for one in own)
        fixed = {name: value for name, value in CURVES[axis].items() if has_boxes or name != "boxes"}
        if axis == "boxes" and not has_boxes:
            continue
        # Only the value on the axis differs along a curve.
        alike: dict[tuple[object, ...], dict[int, Comparison]] = {}
        for one in own:
            shape = one.first.shape
            # Plain RoIAlign knows no canvas.
            if all(
                shape.get(name) == value for name, value in fixed.items() if name != "canvas" or name in shape
            ):
                others = sorted(item for item in shape.items() if item[0] not in (axis, TOGETHER.get(axis)))
                alike.setdefault((one.first.dtype, *others), {})[one.first.shape[axis]] = one
        points = max(alike.values(), key=len, default={})
        if len(points) >= 3:
            found.append(Curve(op, dict(sorted(points.items()))))
    return found


def memory(comparisons: Sequence[Comparison], place: Place, axis: str) -> Figure | None:
    """Peak memory above the inputs along one axis, this package and the original."""

    def megabytes(row: Row | None) -> float | None:
        return None if row is None or not row.extra_bytes else row.extra_bytes / 1e6

    def lines(curve: Curve) -> list[tuple[str, tuple[str, str], tuple[list[int], list[float]]]]:
        return [
            ("original", ORIGINAL, curve.values(lambda one: megabytes(one.baseline))),
            ("torch path", TORCH, curve.values(lambda one: megabytes(torch_path(one)))),
            ("this package", OURS, curve.values(lambda one: megabytes(one.ours))),
        ]

    found = curves(comparisons, axis)
    title = f"Extra memory against {GROWTH[axis]} on {place.device}"
    return _panels(found, axis, lines, "extra memory, MB", title)


def cost(comparisons: Sequence[Comparison], place: Place, axis: str) -> Figure | None:
    """Time of a forward pass along one axis: milliseconds on a GPU, on a CPU multiples of one of its times."""
    on_cpu = place.kind == "cpu"
    launch = "eager" if on_cpu else "graph"
    found = curves(comparisons, axis, launch) or curves(comparisons, axis)

    def lines(curve: Curve) -> list[tuple[str, tuple[str, str], tuple[list[int], list[float]]]]:
        unit = 1.0
        if on_cpu:
            own = [(x, median(one.ours)) for x, one in curve.points.items() if _is_timed(one.ours)]
            unit = next((value for x, value in own if x > 0), 1.0)

        def time(row: Row | None) -> float | None:
            return median(row) / unit if _is_timed(row) else None

        def rival(one: Comparison) -> float | None:
            return None if one.best_rival is one.baseline else time(one.best_rival)

        return [
            ("original", ORIGINAL, curve.values(lambda one: time(one.baseline))),
            ("best rival", RIVAL, curve.values(rival)),
            ("torch path", TORCH, curve.values(lambda one: time(torch_path(one)))),
            ("this package", OURS, curve.values(lambda one: time(one.ours))),
        ]

    unit = "time (this package's first = 1)" if on_cpu else "time, ms"
    where = "" if on_cpu else ", in CUDA graphs" if found and _launch(found[0]) == "graph" else ", launched"
    return _panels(found, axis, lines, unit, f"Cost against {GROWTH[axis]} on {place.device}{where}")


def _launch(curve: Curve) -> str:
    return next(iter(curve.points.values())).first.launch


def _is_timed(row: Row | None) -> bool:
    return row is not None and row.milliseconds is not None


Lines = Callable[[Curve], list[tuple[str, tuple[str, str], tuple[list[int], list[float]]]]]


def _panels(found: Sequence[Curve], axis: str, lines: Lines, unit: str, title: str) -> Figure | None:
    """One panel an op, both axes logarithmic (boxes linear below one), each line named at its end."""
    if not found:
        return None
    columns = min(2, len(found))
    lines_of_panels = math.ceil(len(found) / columns)
    figure, panels = _figure(4.4 * columns, 2.9 * lines_of_panels, lines_of_panels, columns)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, curve in zip(panels, found, strict=False):
        ends = []
        for text, (colour, marker), (xs, ys) in lines(curve):
            if xs:
                axes.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.6)
                if xs[-1] == max(curve.points):
                    ends.append((ys[-1], text, colour))
                else:
                    options = {"va": "center", "color": colour, "fontweight": "bold", "fontsize": 8}
                    axes.annotate(text, (xs[-1], ys[-1]), (7, 0), textcoords="offset points", **options)
        values = list(curve.points)
        if 0 in values:
            axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        else:
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [_number(value) for value in values], fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.margins(y=0.15)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=12))
        axes.minorticks_off()
        _name_lines(axes, ends)
        fixed = next(iter(curve.points.values())).first
        axes.set_title(f"{curve.op}, {fixed.dtype}")
        axes.set_xlabel(AXIS_NAMES[axis] + _others(curve, axis))
        axes.set_ylabel(unit)
    _title(figure, title)
    if refused := _refused(found):
        figure.supxlabel(refused, x=0.01, ha="left", fontsize=7)
    return figure


def _refused(found: Sequence[Curve]) -> str:
    """Where the original's line has no point, and why."""
    ops: dict[str, list[str]] = {}
    for curve in found:
        for value, one in curve.points.items():
            for row in one.rows.values():
                if one.baseline is None and row.provider in BASELINES and row.reason is not None:
                    ops.setdefault(f"no {row.provider} at {value:,}: {row.reason}", []).append(curve.op)
    return "\n".join(f"{', '.join(names)}: {text}" for text, names in ops.items())


def _name_lines(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each line's name in its colour right of the axes, at the height where it ends, no name on another."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    above = -math.inf
    for value, text, colour in sorted(ends):
        above = max((math.log(value) - low) / (high - low), above + 0.09)
        options = {"va": "center", "color": colour, "fontweight": "bold", "fontsize": 8}
        axes.text(1.01, above, text, transform=axes.transAxes, **options)


def _others(curve: Curve, axis: str) -> str:
    """What stays the same along a curve."""
    shape = next(iter(curve.points.values())).first.shape
    each = "" if shape.get("images") == 1 and axis != "images" else " each"
    words = {
        "images": lambda count: "1 picture" if count == 1 else f"{count} pictures",
        "boxes": lambda count: {0: "", 1: "1 box"}.get(count, f"{count} boxes") + (each if count else ""),
        "canvas": lambda side: f"{side} px",
        "width": lambda cells: f"{cells} cells wide",
    }
    fixed = [word(shape[name]) for name, word in words.items() if name != axis and name in shape]
    return "\n(" + ", ".join(filter(None, fixed)) + ")"
