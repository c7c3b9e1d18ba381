"""Tables and plots of all rows: `python -m benchmarks.report`.

Writes README.md and PNG files beside the rows. The same rows give the same text; plots need matplotlib and are
left out, with their links, where it is missing.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import roofline
from benchmarks.comparison import BASELINES, Comparison, Place, compare, places
from benchmarks.registry import BENCHMARKS, OPS
from benchmarks.rows import RESULTS, Row, read_all

if TYPE_CHECKING:
    from benchmarks.plots import Picture

TITLE = """# Benchmark results

Written by `python -m benchmarks.report` from the rows beside it (`*.jsonl`, one JSON object a line); do not edit.

- Every provider's results were compared with float64 before it was timed. **× original** is the original's time
  divided by this package's (for `roi_align` torchvision's), **× best rival** the same for the fastest of everything
  else that ran, the original among them. Below 1 this package is slower, and the cell says so.
- Both times of a ratio come from one run, side by side. Medians; p20 to p80 says how far they spread.
- **of floor** is the least time that the device allows (bytes / copy bandwidth or FLOPs / matmul rate, both measured
  on it in the same run) divided by this package's time: 100% is as fast as the device can be.
- **extra** is peak memory above the inputs.
"""

CPU_NOTE = (
    "Only ratios: absolute times of a CPU depend on the machine and on what else it does, and are not to be "
    "compared between machines. They are in the rows."
)
# The device of the prediction where nothing was measured.
PREDICTED = "H100"


def ratio(value: float | None) -> str:
    """A speed-up; one below 1 in words, too."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"**{text}, slower**" if value < 1 else text


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 100 else f"{value:.4f}"[:6]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table; the first `left` columns are text."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def markdown(
    rows: Sequence[Row], pictures: Sequence[tuple[str, str]] = (), predicted: str = PREDICTED
) -> str:
    """The whole text.

    Args:
        rows: of any devices.
        pictures: the plots to show.
        predicted: key of `roofline.VENDOR` for the prediction where there are no rows of a GPU.
    """
    lines = [TITLE]
    by_place = places(rows)
    if all(place.kind == "cpu" for place in by_place):
        lines += _prediction(predicted)
    for place, own in by_place.items():
        lines += _section(place, own, [picture for picture in pictures if picture.place == place])
    return "\n".join(lines).rstrip() + "\n"


def _prediction(name: str) -> list[str]:
    ceilings = roofline.VENDOR[name]
    dtype, mode = "bfloat16", "forward"
    lines = ["## GPUs: not yet measured", ""]
    lines += [
        "No run on a GPU is recorded. `python benchmarks/gpu_suite.py` makes one. Until then only a **prediction**: "
        f"the least times that {ceilings.device} could reach, {dtype}, {mode}, from {ceilings.bandwidth / 1e12:.3g} "
        f"TB/s and {ceilings.matmul[dtype] / 1e12:.0f} TFLOP/s ({ceilings.source}). Nothing ran at these times, and "
        "no implementation can be faster.",
        "",
    ]
    cells = []
    for benchmark in OPS.values():
        for case in benchmark.cases:
            if mode in case.modes and benchmark.cost is not None:
                cost = benchmark.cost(case.sizes, getattr(torch, dtype), mode)
                by_bytes = cost.bytes / ceilings.bandwidth >= cost.flops / ceilings.matmul[dtype]
                cells.append(
                    (
                        *(benchmark.name, case.name, f"{cost.bytes / 1e6:,.1f}", f"{cost.flops / 1e9:,.2f}"),
                        f"{ceilings.floor_ms(cost, dtype) * 1e3:,.1f}",
                        "bytes" if by_bytes else "FLOPs",
                    )
                )
    return [*lines, *table(("op", "case", "MB", "GFLOP", "predicted floor, µs", "bound by"), cells, 2), ""]


def _section(place: Place, rows: Sequence[Row], pictures: Sequence["Picture"]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in place.versions)
    lines = [f"## {place.device}", "", f"{versions}.", ""]
    if place.kind == "cpu":
        lines += [CPU_NOTE, ""]
    lines += [line for picture in pictures for line in (f"![{picture.text}]({picture.name})", "")]
    for op in _ops(rows):
        own = [row for row in rows if row.op == op]
        lines += [f"### {op}", "", conditions(own), ""]
        comparisons = [one for one in compare(own) if _is_listed(one)]
        lines += (_cpu_table if place.kind == "cpu" else _gpu_table)(comparisons)
        lines += _origins(own)
        lines += _not_timed(own)
    return lines


def _ops(rows: Iterable[Row]) -> list[str]:
    """Names in the order of the registry, unknown ones last."""
    known = list(BENCHMARKS)
    names = {row.op for row in rows}
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def conditions(rows: Sequence[Row]) -> str:
    """Where, with which code and when rows were measured."""
    commits = sorted({row.commit or "no git checkout" for row in rows})
    first, last = (choose(row.run for row in rows).replace("T", " ")[:16] for choose in (min, max))
    when = first if first == last else f"{first} to {last}"
    return f"{rows[0].device}; commit {', '.join(commits)}; {when} UTC."


def _is_listed(comparison: Comparison) -> bool:
    """Reasons alone have a list of their own."""
    return any(row.milliseconds is not None for row in comparison.rows.values())


def _mode(comparison: Comparison) -> str:
    return {"both": "forward + backward"}.get(comparison.first.mode, comparison.first.mode)


def _against_baseline(comparison: Comparison) -> str:
    """The ratio; where the baseline was not timed, a word that sends to the list below."""
    refused = comparison.baseline is None and any(name in comparison.rows for name in BASELINES)
    return "not timed" if refused else ratio(comparison.speed_up(comparison.baseline))


def _ours(comparison: Comparison, value: str) -> str:
    """A cell of this package, or why it has none."""
    ours = comparison.ours
    if ours is None:
        return "not run"
    return value if ours.milliseconds is not None else f"**{'wrong' if ours.wrong else 'not timed'}**"


def _error(comparison: Comparison) -> str:
    ours = comparison.ours
    return "-" if ours is None or ours.error is None else f"{ours.error:.0e}"


def _share(comparison: Comparison) -> str:
    return _percent(None if comparison.ours is None else comparison.ours.share)


def _ours_memory(comparison: Comparison) -> str:
    return _megabytes(None if comparison.ours is None else comparison.ours.extra_bytes)


def _cpu_table(comparisons: Sequence[Comparison]) -> list[str]:
    several = any(
        one.best_rival is not None and one.best_rival is not one.baseline and one.baseline is not None
        for one in comparisons
    )
    header = ["case", "mode", "dtype", "× original", "p20 to p80"]
    header += ["× best rival"] if several else []
    header += ["of floor", "extra MB", "original's", "error", *_detail_names(comparisons)]
    cells = []
    for one in comparisons:
        baseline, rival = one.baseline, one.best_rival
        spread = one.speed_up_range(baseline) if baseline is not None else None
        row = [one.first.case, _mode(one), one.first.dtype, _ours(one, _against_baseline(one))]
        row.append("-" if spread is None else f"{ratio_text(spread[0])} to {ratio_text(spread[1])}")
        if several:
            name = "" if rival is None else f" ({rival.provider})"
            row.append(ratio(one.speed_up(rival)) + name)
        original = _megabytes(None if baseline is None else baseline.extra_bytes)
        row += [_share(one), _ours_memory(one), original, _error(one)]
        cells.append([*row, *_details(one, comparisons, absolute=False)])
    return [*table(header, cells, 3), ""]


def ratio_text(value: float) -> str:
    """A bare ratio."""
    return ratio(value).strip("*").removesuffix(", slower")


def _gpu_table(comparisons: Sequence[Comparison]) -> list[str]:
    header = [
        "case",
        "mode",
        "dtype",
        "launch",
        "ms",
        "p20 to p80",
        "original, ms",
        "× original",
        "best rival, ms",
    ]
    header += ["× best rival", "of floor", "extra MB", "original's", "error", *_detail_names(comparisons)]
    cells = []
    for one in comparisons:
        ours, baseline, rival = one.ours, one.baseline, one.best_rival
        times = ours.milliseconds if ours is not None else None
        first = one.first
        row = [first.case, _mode(one), first.dtype, first.launch]
        row.append(_ours(one, "" if times is None else _milliseconds(times["median"])))
        row.append(
            "-" if times is None else f"{_milliseconds(times['p20'])} to {_milliseconds(times['p80'])}"
        )
        row.append("-" if baseline is None else _milliseconds(baseline.milliseconds["median"]))
        row.append(_against_baseline(one))
        row.append(
            "-" if rival is None else f"{_milliseconds(rival.milliseconds['median'])} ({rival.provider})"
        )
        original = _megabytes(None if baseline is None else baseline.extra_bytes)
        row += [ratio(one.speed_up(rival)), _share(one), _ours_memory(one), original, _error(one)]
        cells.append([*row, *_details(one, comparisons, absolute=True)])
    return [*table(header, cells, 4), ""]


def _detail_names(comparisons: Sequence[Comparison]) -> list[str]:
    names = [name for one in comparisons for row in one.rows.values() for name in row.details]
    return list(dict.fromkeys(names))


def _details(comparison: Comparison, all_of_them: Sequence[Comparison], absolute: bool) -> list[str]:
    """Further numbers of this package: as they are, or on a CPU as multiples of the baseline's, if there is one."""
    ours, baseline, cells = comparison.ours, comparison.baseline, []
    for name in _detail_names(all_of_them):
        value = None if ours is None else ours.details.get(name)
        other = None if baseline is None else baseline.details.get(name)
        if value is None:
            cells.append("-")
        elif absolute:
            cells.append(f"{value:,.4g}")
        elif other:
            cells.append(f"{value / other:.2f} times the original's")
        else:
            cells.append(
                "-" if any(name in comparison.rows for name in BASELINES) else f"{value:,.4g} on this machine"
            )
    return cells


def _origins(rows: Sequence[Row]) -> list[str]:
    return [f"Sizes: {'; '.join(dict.fromkeys(row.origin for row in rows))}.", ""]


def _not_timed(rows: Sequence[Row]) -> list[str]:
    """Providers without times, with the reason and its cases; wrong results first."""
    reasons: dict[tuple[bool, str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            where = f"{row.case}, {row.dtype}, {row.mode}" + (
                ", in a CUDA graph" if row.launch == "graph" else ""
            )
            reasons.setdefault((not row.wrong, row.provider, row.reason), []).append(where)
    if not reasons:
        return []
    lines = ["Not timed:", ""]
    for (right, provider, reason), cases in sorted(reasons.items()):
        where = "; ".join(cases) if len(cases) <= 3 else f"{len(cases)} measurements"
        reason = " ".join(reason.replace("|", "\\|").split())
        lines.append(f"- {'' if right else '**wrong**: '}`{provider}`: {reason} ({where})")
    return [*lines, ""]


def write(folder: Path = RESULTS, predicted: str = PREDICTED) -> list[Path]:
    """Write the tables, and where matplotlib is there the plots, of the rows in `folder`; the files written."""
    rows = read_all(folder)
    pictures: list[Picture] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks import plots

        pictures = plots.draw_all(rows, folder)
    path = folder / "README.md"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(markdown(rows, pictures, predicted), encoding="utf-8")
    os.replace(partial, path)
    return [path, *(folder / picture.name for picture in pictures)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the rows; default %(default)s"
    )
    parser.add_argument(
        *("--device",),
        default=PREDICTED,
        choices=roofline.VENDOR,
        help="of the prediction where no GPU was measured; default %(default)s",
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    for path in write(options.results, options.device):
        print(path)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    main()
