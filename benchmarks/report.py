"""Tables and plots of all rows: `python -m benchmarks.report`.

Writes README.md and PNG files beside the rows, and of the rows of this repository the table of its README. The same
rows give the same text; plots need matplotlib and are left out, with their links, where it is missing.
"""

import argparse
import datetime
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import roofline
from benchmarks.comparison import BASELINES, Comparison, Place, compare, median, places
from benchmarks.registry import BENCHMARKS, OPS
from benchmarks.rows import DRIFTED, RESULTS, Row, add, locked, read_all
from benchmarks.shapes import PUBLISHED_MODEL

if TYPE_CHECKING:
    from benchmarks.plots import Picture

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- benchmarks: what follows is written by `python -m benchmarks.report`; do not edit -->"
END = "<!-- benchmarks: end -->"

TITLE = """# Benchmark results

Written by `python -m benchmarks.report` from the rows beside it (`*.jsonl`, one JSON object a line); do not edit.

- Every provider's results were compared with a reference before it was timed; each table names it. **× original** is
  the original composition's time divided by this package's (of plain RoIAlign **× torchvision**, of one thread and of
  all threads the faster, which the cell names), **× best rival** the same for the fastest of everything else that ran,
  the original among them. Below 1.00 this package is slower, and the cell says so.
- Both times of a ratio come from one run: on a CPU providers take turns, on a GPU one runs after the other. Medians of
  n calls or, in a CUDA graph, of n samples, and of how many of the original's where these are fewer. p20 to p80 says
  how far ratios spread, or this package's time around its median where there is no ratio; *noisy*, that of one side
  p80 is more than {noisy:g} times p20. A loss is in bold unless a side is noisy or has fewer than {few} times.
- **of floor** is the least time that the device allows (bytes / bandwidth or FLOPs / matmul rate, both measured on it
  in the same run and named with each table) divided by this package's time.
- **extra** is peak memory above the inputs.
- A file holds the newest row of each case with its commit; rows of earlier commits are in git's history.
"""
# p80 / p20 of times that something else on the machine disturbed; a ratio of fewer than so many times is not sure.
NOISY, FEW = 1.3, 5
# Extra memory, as a multiple of the baseline's, from which on the tables call it more.
MORE = 1.05
# What a time leaves out or holds, by benchmark.
NOTES = {
    "neck": "Backward computes the gradients of the neck's weights, as training with frozen towers does: those of the "
    "stage maps are not among them.",
    "pooled_roi_align": "Backward computes the gradients of the stage maps; MG-LLaVA's own training, with frozen "
    "towers, does not need them.",
    "first_token": "Pixel tensors and token ids to logits: without preprocessing and tokenising.",
    "generation": "A whole answer: its rate counts the first token, so pictures and prompt too.",
    "training_step": "Loss and gradients of stage 1, without the optimiser's update.",
}
SHALLOW = "shallow model"
PUBLISHED_NOTE = (
    f"The published model has {PUBLISHED_MODEL['vit_layers']} ViT layers, {PUBLISHED_MODEL['blocks']} blocks in "
    f"ConvNeXt's third stage and {PUBLISHED_MODEL['layers']} language layers; in the shallow one the neck's share of "
    "the time is larger, and with it the ratio."
)
NONE = ", 0 boxes"
NO_BOXES = (
    "0 boxes is where the curves begin, not a case of the model: it gives such a picture one all-zero box."
)

CPU_NOTE = (
    "Only ratios, save the rates of preprocessing and conversion, which are a CPU's own work: absolute times of a CPU "
    "depend on the machine and on what else it does, and are not to be compared between machines. They are in the rows."
)
# A speed-up below it is a loss; above, it reads as 1.00.
SLOWER = 0.995
# The device of the prediction where nothing was measured.
PREDICTED = "H100"


def ratio(value: float | None, sure: bool = True) -> str:
    """A speed-up; one below 1 in words, too, and in bold if it is sure."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return _bold(f"{text}, slower", sure) if value < SLOWER else text


def _bold(text: str, sure: bool = True) -> str:
    return f"**{text}**" if sure else text


def speed_up(one: Comparison, rival: Row | None) -> str:
    """A cell: the ratio of a rival's time and this package's."""
    return ratio(one.speed_up(rival), is_sure(one.ours, rival))


def is_sure(*rows: Row | None) -> bool:
    """Whether the times of all rows are calm and many enough for a ratio in bold."""
    return not is_noisy(*rows) and all(row is None or row.samples >= FEW for row in rows)


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
    rows: Sequence[Row],
    pictures: Sequence["Picture"] = (),
    predicted: str = PREDICTED,
    ablation: Sequence[str] = (),
) -> str:
    """The whole text.

    Args:
        rows: of any devices.
        pictures: the plots to show.
        predicted: key of `roofline.VENDOR` for the prediction where there are no rows of a GPU.
        ablation: names of its files, a table and a plot, as far as there are any.
    """
    lines = [TITLE.format(noisy=NOISY, few=FEW)]
    by_place = places(rows)
    no_gpu = all(place.kind == "cpu" for place in by_place)
    if no_gpu:
        lines += ["**GPUs: not yet measured**; a [prediction](#gpus-not-yet-measured) is at the end.", ""]
    for name in ablation:
        shown = name.endswith(".png")
        lines += [f"![What each part of the model adds]({name})" if shown else f"[Ablation]({name})", ""]
    for place, own in by_place.items():
        lines += _section(place, own, [picture for picture in pictures if picture.place == place])
    if no_gpu:
        lines += _prediction(predicted)
    return "\n".join(lines).rstrip() + "\n"


def _prediction(name: str) -> list[str]:
    ceilings = roofline.VENDOR[name]
    dtype, mode = "bfloat16", "forward"
    lines = ["## GPUs: not yet measured", ""]
    lines += [
        "No run on a GPU is recorded. `python benchmarks/gpu_suite.py` makes one. Until then only a **prediction**: "
        f"the least times that {ceilings.device} could reach, {dtype}, {mode}, from {ceilings.bandwidth / 1e12:.3g} "
        f"TB/s and {ceilings.matmul[dtype] / 1e12:.0f} TFLOP/s ({ceilings.source}). Nothing ran at these times. "
        f"`python -m benchmarks roofline --device {name}` prints every case.",
        "",
    ]
    cells = []
    for benchmark in OPS.values():
        by_name = {case.name: case for case in benchmark.cases}
        case = by_name[_representative(list(by_name))]
        if benchmark.cost is not None:
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


# The case that stands for an op, the first of these that there is; failing that, the last one.
REPRESENTATIVE = (
    *("8 pictures, 100 boxes each", "1 picture, 100 boxes", "8 pictures", "1 picture"),
    "512 boxes to 7x7, ratio 2",
)


def _representative(cases: Sequence[str]) -> str:
    return next((name for name in REPRESENTATIVE if name in cases), cases[-1])


def representatives(comparisons: Sequence[Comparison]) -> list[tuple[Comparison, bool]]:
    """One case of each op in every mode in which it was timed beside a rival, and the op's worst comparison.

    Inside a CUDA graph where there is one, in the first of its dtypes. Each with whether it stands there only as
    the worst.
    """
    timed = [one for one in comparisons if one.speed_up(one.best_rival) is not None]
    chosen: list[tuple[Comparison, bool]] = []
    for op in _ops(one.first for one in timed):
        own = [one for one in timed if one.first.op == op]
        if any(one.first.launch == "graph" for one in own):
            own = [one for one in own if one.first.launch == "graph"]
        case = _representative([one.first.case for one in own])
        dtype = next(one.first.dtype for one in own if one.first.case == case)
        picked = [one for one in own if (one.first.case, one.first.dtype) == (case, dtype)]
        # A picture without any box is no case of the model (`NO_BOXES`).
        of_model = [one for one in own if NONE not in one.first.case]
        worst = min(of_model or own, key=lambda one: one.speed_up(one.best_rival) or 0.0)
        chosen += [(one, False) for one in sorted(picked, key=lambda one: _MODES.index(one.first.mode))]
        if not any(one is worst for one in picked):
            chosen.append((worst, True))
    return chosen


_MODES = ("forward", "backward", "both")


def _section(place: Place, rows: Sequence[Row], pictures: Sequence["Picture"]) -> list[str]:
    lines = [f"## {place.device}", "", f"{_versions(place)}.", ""]
    if place.kind == "cpu":
        lines += [CPU_NOTE, ""]
    # The memory of a graph is that of the call it holds.
    lost = [
        f"- `{one.first.op}`, {_where(one.first)}: {loss}"
        for one in compare(rows)
        for loss in losses(one)
        if not (loss.in_memory and one.first.launch == "graph")
    ]
    if lost:
        lines += ["Where it is slower or takes more memory:", "", *lost, ""]
    lines += [line for picture in pictures for line in (f"![{picture.text}]({picture.name})", "")]
    for op in _ops(rows):
        own = [row for row in rows if row.op == op]
        lines += [f"### {op}", "", conditions(own), ""]
        comparisons = [one for one in compare(own) if _is_listed(one)]
        lines += (_cpu_table if place.kind == "cpu" else _gpu_table)(comparisons)
        lines += _notes(op, own)
        lines += _not_timed(own)
    return lines


def _versions(place: Place) -> str:
    return ", ".join(f"{name} {version}" for name, version in place.versions)


@dataclass(frozen=True)
class Loss:
    """Something in which this package lost: `factor` times as slow as another, or with so many times its memory."""

    comparison: Comparison
    against: str
    factor: float
    in_memory: bool = False
    sure: bool = True

    def __str__(self) -> str:
        if self.in_memory:
            return f"**{_short(self.factor)} times the memory** of {self.against}"
        text = _bold(f"{1 / self.factor:.2f} times as fast", self.sure)
        return f"{text} as {self.against}{'' if self.sure else ' (noisy, or of few times)'}"


def losses(one: Comparison) -> Iterator[Loss]:
    """Against the baseline, the best rival and this package's own torch path; in memory against the baseline."""
    rivals = {
        id(rival): rival for rival in (one.baseline, one.best_rival, torch_path(one)) if rival is not None
    }
    for rival in rivals.values():
        value = one.speed_up(rival)
        if value is not None and value < SLOWER:
            own = rival is torch_path(one)
            against = "this package's torch path" if own else f"`{rival.provider}`"
            yield Loss(one, against, 1 / value, sure=is_sure(one.ours, rival))
    more = one.memory_ratio()
    if more is not None and more >= MORE:
        yield Loss(one, f"`{one.baseline.provider}`", more, in_memory=True)


def _worst_losses(lost: Sequence[Loss]) -> list[str]:
    """The worst of each op against each rival, and how many there are of it."""
    groups: dict[tuple[str, str, bool], list[Loss]] = {}
    for loss in lost:
        groups.setdefault((loss.comparison.first.op, loss.against, loss.in_memory), []).append(loss)
    texts = []
    for (op, *_), own in groups.items():
        worst = max(own, key=lambda loss: loss.factor)
        first = worst.comparison.first
        others = f"; the worst of {len(own)}" if len(own) > 1 else ""
        texts.append(f"`{op}` {worst} ({first.case}, {first.dtype}, {first.mode}{others})")
    return texts


def torch_path(one: Comparison) -> Row | None:
    """This package without Triton, where Triton was timed too."""
    row = one.timed("torch")
    return None if row is one.ours else row


def _where(row: Row) -> str:
    return f"{row.case}, {row.dtype}, {row.mode}" + (", in a CUDA graph" if row.launch == "graph" else "")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _ops(rows: Iterable[Row]) -> list[str]:
    """Names in the order of the registry, unknown ones last."""
    known = list(BENCHMARKS)
    names = {row.op for row in rows}
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def conditions(rows: Sequence[Row]) -> str:
    """Where, with which code, when, and beside which rates of the device rows were measured."""
    commits = sorted({row.commit or "no git checkout" for row in rows})
    first, last = (choose(row.run for row in rows).replace("T", " ")[:16] for choose in (min, max))
    when = first if first == last else f"{first} to {last}"
    pieces = [rows[0].device, f"commit {', '.join(commits)}", f"{when} UTC"]
    if rows[0].kind != "cpu":
        found = sorted({row.tables or "none" for row in rows if row.provider == "triton"})
        pieces.append(f"tuned tables: {', '.join(found) or 'none'}")
        pieces += sorted({row.settings for row in rows if row.settings is not None})
    bandwidths = [row.bandwidth for row in rows if row.bandwidth is not None]
    if bandwidths:
        pieces.append(f"memory {_rates(bandwidths, 'B/s')}")
    for dtype in dict.fromkeys(row.dtype for row in rows):
        rates = [row.matmul_rate for row in rows if row.dtype == dtype and row.matmul_rate is not None]
        if rates:
            pieces.append(f"{dtype} matmul {_rates(rates, 'FLOP/s')}")
    return "; ".join(pieces) + "."


def _rates(values: Sequence[float], unit: str) -> str:
    """The rate, or the least and the most; in G or T of the unit."""
    scale, prefix = (1e12, "T") if max(values) >= 1e12 else (1e9, "G")
    texts = dict.fromkeys(f"{value / scale:.3g}" for value in (min(values), max(values)))
    return f"{' to '.join(texts)} {prefix}{unit}"


def _is_listed(comparison: Comparison) -> bool:
    """Reasons alone have a list of their own."""
    return any(row.milliseconds is not None for row in comparison.rows.values())


def _mode(comparison: Comparison) -> str:
    return {"both": "forward + backward"}.get(comparison.first.mode, comparison.first.mode)


def _against_baseline(comparison: Comparison) -> str:
    """The ratio; where the baseline was not timed, a word that sends to the list below."""
    refused = comparison.baseline is None and any(name in comparison.rows for name in BASELINES)
    text = speed_up(comparison, comparison.baseline) + _chosen(comparison)
    return "not timed" if refused else text


def _chosen(comparison: Comparison) -> str:
    """Which baseline a ratio is against, where two were timed."""
    several = sum(comparison.timed(name) is not None for name in BASELINES) > 1
    return f" ({comparison.baseline.provider})" if several else ""


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
    """Megabytes; in bold with the ratio if the baseline needs less."""
    text = _megabytes(None if comparison.ours is None else comparison.ours.extra_bytes)
    more = comparison.memory_ratio()
    return text if more is None or more < MORE else f"**{text}, {_short(more)} times as much**"


def _baseline_name(comparisons: Sequence[Comparison]) -> str:
    """Of an op: the first of BASELINES that is in its rows."""
    names = {name for one in comparisons for name in one.rows}
    return next((name for name in BASELINES if name in names), BASELINES[0])


def is_noisy(*rows: Row | None) -> bool:
    """Whether the times of any row spread too far."""
    times = [row.milliseconds for row in rows if row is not None and row.milliseconds is not None]
    return any(one["p80"] > NOISY * one["p20"] for one in times)


def _spread(comparison: Comparison, text: str) -> str:
    return text + _noise(comparison.ours, comparison.baseline)


def _noise(*rows: Row | None) -> str:
    return ", *noisy*" if is_noisy(*rows) else ""


def _samples(comparison: Comparison) -> str:
    """How many times are behind this package's median, and behind the baseline's where these are fewer."""
    ours, baseline = comparison.ours, comparison.baseline
    if ours is None or not ours.samples:
        return "-"
    fewer = baseline is not None and baseline.samples < ours.samples
    return f"{ours.samples}, {baseline.provider}'s {baseline.samples}" if fewer else str(ours.samples)


def _ratio_spread(comparison: Comparison) -> str:
    """How far the ratio spreads; without one, this package's time around its median."""
    if comparison.ours is None or comparison.ours.milliseconds is None:
        return "-"
    times = comparison.ours.milliseconds
    spread = comparison.speed_up_range(comparison.baseline) if comparison.baseline is not None else None
    ends = [
        ratio_text(value) for value in spread or (times[name] / times["median"] for name in ("p20", "p80"))
    ]
    return _spread(comparison, " to ".join(ends) + ("" if spread else " of its median"))


def _cpu_table(comparisons: Sequence[Comparison]) -> list[str]:
    several = any(
        one.best_rival is not None and one.best_rival is not one.baseline and one.baseline is not None
        for one in comparisons
    )
    name = _baseline_name(comparisons)
    header = ["case", "mode", "dtype", f"× {name}", "p20 to p80", "n"]
    header += ["× best rival"] if several else []
    header += ["of floor", "extra MB", f"{name}'s", "error", *_detail_names(comparisons)]
    cells = []
    for one in comparisons:
        rival = one.best_rival
        row = [one.first.case, _mode(one), one.first.dtype, _ours(one, _against_baseline(one))]
        row += [_ratio_spread(one), _samples(one)]
        if several:
            row.append(speed_up(one, rival) + ("" if rival is None else f" ({rival.provider})"))
        row += [_share(one), _ours_memory(one), _baseline_memory(one), _error(one)]
        cells.append([*row, *_details(one, comparisons, absolute=False)])
    return [*table(header, cells, 3), ""]


def _baseline_memory(comparison: Comparison) -> str:
    return _megabytes(None if comparison.baseline is None else comparison.baseline.extra_bytes)


def ratio_text(value: float) -> str:
    """A bare ratio."""
    return ratio(value).strip("*").removesuffix(", slower")


def _gpu_table(comparisons: Sequence[Comparison]) -> list[str]:
    name = _baseline_name(comparisons)
    header = ["case", "mode", "dtype", "launch", "ms", "p20 to p80", "n", f"{name}, ms", f"× {name}"]
    header += ["best rival, ms", "× best rival", "torch path, ms", "× torch path"]
    header += ["of floor", "extra MB", f"{name}'s", "error", *_detail_names(comparisons)]
    cells = []
    for one in comparisons:
        rival, own_torch = one.best_rival, torch_path(one)
        times = one.ours.milliseconds if one.ours is not None else None
        first = one.first
        row = [first.case, _mode(one), first.dtype, first.launch]
        row.append(_ours(one, "" if times is None else _milliseconds(times["median"])))
        row.append(
            "-"
            if times is None
            else _spread(one, f"{_milliseconds(times['p20'])} to {_milliseconds(times['p80'])}")
        )
        row += [_samples(one), _median(one.baseline), _against_baseline(one)]
        row.append(_median(rival) + ("" if rival is None else f" ({rival.provider})"))
        row += [speed_up(one, rival), _median(own_torch), speed_up(one, own_torch)]
        row += [_share(one), _ours_memory(one), _baseline_memory(one), _error(one)]
        cells.append([*row, *_details(one, comparisons, absolute=True)])
    return [*table(header, cells, 4), ""]


def _median(row: Row | None) -> str:
    return "-" if row is None else _milliseconds(median(row))


def _detail_names(comparisons: Sequence[Comparison]) -> list[str]:
    names = [name for one in comparisons for row in one.rows.values() for name in row.details]
    return list(dict.fromkeys(names))


def _details(comparison: Comparison, all_of_them: Sequence[Comparison], absolute: bool) -> list[str]:
    """Further numbers of this package: as they are, or on a CPU, save of its own work, as multiples of a baseline's."""
    ours, baseline, cells = comparison.ours, comparison.baseline, []
    op = BENCHMARKS.get(comparison.first.op)
    for name in _detail_names(all_of_them):
        value = None if ours is None else ours.details.get(name)
        other = None if baseline is None else baseline.details.get(name)
        if value is None:
            cells.append("-")
        elif absolute:
            cells.append(f"{value:,.4g}")
        elif op is not None and op.on_cpu:
            cells.append(f"{value:,.4g} on this machine")
        else:
            cells.append(f"{value / other:.2f} times the original's" if other else "-")
    return cells


def _notes(op: str, rows: Sequence[Row]) -> list[str]:
    """What one has to know to read a table: origin of the sizes, reference, what a time leaves out."""
    references = dict.fromkeys(row.reference for row in rows if row.reference is not None)
    pieces = [f"Sizes: {'; '.join(dict.fromkeys(row.origin for row in rows))}."]
    pieces += [f"Compared with: {'; '.join(references)}."] if references else []
    pieces += [NOTES[op]] if op in NOTES else []
    pieces += [PUBLISHED_NOTE] if any(row.case.startswith(SHALLOW) for row in rows) else []
    if any(NONE in row.case for row in rows):
        pieces.append(NO_BOXES)
    pieces += remarks(rows) + drifts(rows)
    return [" ".join(pieces), ""]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the rows say that they should be read with; what is noisy says so in its cell."""
    notes = [(row.provider, note) for row in rows for note in _notes_of(row)]
    by_note = _grouped((note, name) for name, note in notes if not note.startswith(("noisy", DRIFTED)))
    return [f"{_code(names)}: {note}." for note, names in by_note.items()]


def drifts(rows: Sequence[Row]) -> list[str]:
    """By how much the device's rates changed while the rows were measured."""
    notes = dict.fromkeys(note for row in rows for note in _notes_of(row) if note.startswith(DRIFTED))
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def _notes_of(row: Row) -> list[str]:
    return row.note.split("; ") if row.note else []


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The second of each pair by the first, each once, in the order of their first appearance."""
    groups: dict[str, list[str]] = {}
    for key, value in dict.fromkeys(pairs):
        groups.setdefault(key, []).append(value)
    return groups


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _not_timed(rows: Sequence[Row]) -> list[str]:
    """Providers without times, with the reason and its cases; wrong results first."""
    reasons: dict[tuple[bool, str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault((not row.wrong, row.provider, row.reason), []).append(_where(row))
    if not reasons:
        return []
    lines = ["Not timed:", ""]
    for (right, provider, reason), cases in sorted(reasons.items()):
        where = "; ".join(cases) if len(cases) <= 3 else f"{len(cases)} measurements"
        lines.append(f"- {'' if right else '**wrong**: '}`{provider}`: {_plain(reason)} ({where})")
    return [*lines, ""]


def _plain(reason: str) -> str:
    """On one line, safe in a table."""
    return " ".join(reason.replace("|", "\\|").split())


def _never_timed(rows: Sequence[Row]) -> list[str]:
    """One sentence on the providers that no row has timed, and why."""
    timed = {row.provider for row in rows if row.milliseconds is not None}
    untimed = [row for row in rows if row.provider not in timed and row.reason is not None]
    reasons = _grouped((row.provider, _plain(row.reason or "")) for row in untimed)
    by_reason = _grouped(("; ".join(texts), provider) for provider, texts in reasons.items())
    listed = "; ".join(f"{_code(names)} ({reason})" for reason, names in by_reason.items())
    return [f"In no row timed here: {listed}."] if listed else []


# What the repository's README shows of the neck; of other ops their representatives.
README_CASES = (
    *("1 picture, 1 box", "1 picture, 10 boxes", "1 picture, 100 boxes"),
    *("8 pictures, 100 boxes each", "32 pictures, 100 boxes each"),
)
README_PLOTS = {"speed_up": "Speed-up of each op", "cost_against_boxes": "Cost against boxes"}


def readme(rows: Sequence[Row], folder: Path = RESULTS) -> str:
    """What the repository's README shows between its marks: of the newest GPU and the newest CPU, a table and plots."""
    newest: dict[bool, tuple[Place, list[Row]]] = {}
    for place, own in places(rows).items():
        newest.setdefault(place.kind == "cpu", (place, own))
    lines: list[str] = []
    if False not in newest:
        lines += ["**No run on a GPU is recorded yet.**", ""]
    for place, own in newest.values():
        lines += _summary(place, own)
        for name, text in README_PLOTS.items():
            path = folder / f"{name}.{slug(place.kind)}.png"
            if path.is_file():
                lines += [f"![{text}](benchmarks/results/{path.name})", ""]
    return "\n".join(lines)


def slug(kind: str) -> str:
    """The kind of a device in the names of files."""
    return "".join(letter if letter.isalnum() else "_" for letter in kind)


def _summary(place: Place, rows: Sequence[Row]) -> list[str]:
    comparisons = [one for one in compare(rows) if one.speed_up(one.baseline) is not None]
    if any(one.first.launch == "graph" for one in comparisons):
        comparisons = [
            one for one in comparisons if one.first.launch == "graph" or not _has_graph(one, comparisons)
        ]
    fast, small = "times as fast", "times less memory"
    header = ("op", "case", "dtype", f"forward, {fast}", f"forward + backward, {fast}", f"forward, {small}")
    shown = _summary_cells(comparisons)
    return [
        f"{conditions(rows)} {_versions(place)}. Median time of the original composition, of plain RoIAlign "
        "torchvision's faster one, divided by this package's, both from one run; the same of peak memory above the "
        "inputs. "
        f"*noisy*: of one side p80 is more than {NOISY:g} times p20.",
        "",
        *table(header, shown, 3),
        "",
        _losses_in_short(comparisons),
        "",
        *(
            f"- {note}"
            for note in _summary_notes(rows, dict.fromkeys(cells[0].strip("`") for cells in shown))
        ),
        "",
        f"Measuring all of it took about {_minutes(rows):.0f} minutes.",
        "",
    ]


def _summary_cells(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """The table's lines: of the neck `README_CASES`, of each op its representative and its worst case."""
    key = attrgetter("first.op", "first.case", "first.dtype")
    worst: dict[tuple[str, str, str], str] = {}
    for one, is_worst in representatives(comparisons):
        worst[key(one)] = f" (worst: {_mode(one)})" if is_worst else ""
    shown: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for one in comparisons:
        if key(one) in worst or (one.first.op == "neck" and one.first.case in README_CASES):
            shown.setdefault(key(one), {})[one.first.mode] = one
    cells = []
    for op in _ops(one.first for one in comparisons):
        for (name, case, dtype), by_mode in shown.items():
            if name == op:
                forward, both = by_mode.get("forward"), by_mode.get("both")
                case += worst.get((name, case, dtype), "")
                cells.append([f"`{op}`", case, dtype, _speed(forward), _speed(both), _times_less(forward)])
    return cells


def _speed(one: Comparison | None) -> str:
    """Against the baseline and a best rival that is another, with what makes it less certain."""
    if one is None:
        return "-"
    text = speed_up(one, one.baseline) + _chosen(one) + _noise(one.ours, one.baseline)
    if "," in _samples(one):
        text += f" (n = {_samples(one)})"
    if one.best_rival is not one.baseline:
        rival = f"`{one.best_rival.provider}`: {speed_up(one, one.best_rival)}"
        text += f" (best rival {rival}{_noise(one.ours, one.best_rival)})"
    return text


def _losses_in_short(comparisons: Sequence[Comparison]) -> str:
    lost = [loss for one in comparisons for loss in losses(one)]
    concerned = len({id(loss.comparison) for loss in lost})
    return (
        f"Slower than something, or with more memory than the original, in {concerned} of {len(comparisons)} "
        f"comparisons: {'; '.join(_worst_losses(lost))}."
        if lost
        else f"Neither slower nor with more memory in any of {len(comparisons)} comparisons."
    )


def _summary_notes(rows: Sequence[Row], ops: Iterable[str]) -> list[str]:
    """What one has to know to read the table of `ops`: what was not timed, what a time leaves out or holds."""
    notes = _never_timed(rows)
    origins = dict.fromkeys(row.origin for row in rows if row.case.startswith(SHALLOW))
    notes += [f"{SHALLOW.capitalize()}: {'; '.join(origins)}. {PUBLISHED_NOTE}"] if origins else []
    notes += [f"`{op}`: {NOTES[op]}" for op in ops if op in NOTES]
    changed = [op for op in ops if drifts([row for row in rows if row.op == op])]
    if changed:
        notes.append(
            f"{_code(changed)}: {DRIFTED}, by as much as the tables say; shares of floors hang on them."
        )
    return notes + remarks(rows)


def _has_graph(one: Comparison, comparisons: Sequence[Comparison]) -> bool:
    first = one.first
    key = (first.op, first.case, first.dtype, first.mode)
    return any(
        (other.first.op, other.first.case, other.first.dtype, other.first.mode) == key
        for other in comparisons
        if other.first.launch == "graph"
    )


def _times_less(one: Comparison | None) -> str:
    share = None if one is None else one.memory_ratio()
    if not share:
        return "-"
    return ratio(1 / share).replace("slower", "more")


# A measurement that takes longer, in seconds, was followed by a break.
LONGEST = 900.0


def _minutes(rows: Sequence[Row]) -> float:
    """About how long it took to measure rows: from the beginning of each measurement to that of the next."""
    stamps = sorted({datetime.datetime.fromisoformat(row.run) for row in rows})
    steps = [(later - first).total_seconds() for first, later in itertools.pairwise(stamps)]
    return sum(step for step in steps if step <= LONGEST) / 60


def update_readme(rows: Sequence[Row], path: Path = README) -> None:
    """Write `readme` between the marks of a file.

    Raises:
        ValueError: it has no marks.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}")
    _replace(path, f"{before}{BEGIN}\n\n{readme(rows)}\n{END}{after}")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write(folder: Path = RESULTS, predicted: str = PREDICTED) -> list[Path]:
    """Write the tables, and where matplotlib is there the plots, of the rows in `folder`; the files written."""
    rows = read_all(folder)
    pictures: list[Picture] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks import plots

        pictures = plots.draw_all(rows, folder)
    path = folder / "README.md"
    ablation = [name for name in ("ablation.md", "ablation.png") if (folder / name).is_file()]
    _replace(path, markdown(rows, pictures, predicted, ablation))
    written = [path, *(folder / picture.name for picture in pictures)]
    if folder.resolve() == RESULTS.resolve():
        update_readme(rows)
        written.append(README)
    return written


def merge(source: Path, folder: Path) -> None:
    """Add the rows of one folder to those of another.

    Raises:
        ValueError: `source` has no rows, or a line is none.
        RuntimeError: a run is writing into `folder`.
    """
    more = read_all(source)
    if not more:
        raise ValueError(f"--merge {source}: no rows there")
    with locked(folder):
        add(more, folder)


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
    parser.add_argument(
        "--merge",
        type=Path,
        metavar="FOLDER",
        help="first add the rows of another folder, such as a GPU suite's",
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    try:
        if options.merge is not None:
            merge(options.merge, options.results)
        written = write(options.results, options.device)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"{error}\n")
    for path in written:
        print(path)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    main()
