"""The paper's ablation in small: what high-resolution and object features add, and which fusion adds most.

    python -m benchmarks.ablation            # goes on where it stopped
    python -m benchmarks.ablation --report   # table and plot of what is there

Every arm starts from the towers and the language model of stage 0 that the embedded model was made of (both are
shipped), sees the same scenes and questions, and takes the same number of steps in stages 1 and 2. Arms differ in what
they are shown or in how they fuse; seeds differ in the neck's first weights and in the order of the data.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import rows as row_files

RESULT = row_files.RESULTS / "ablation.json"
PLOT = row_files.RESULTS / "ablation.png"
TABLE = row_files.RESULTS / "ablation.md"
RUNS = Path("runs/ablation")


@dataclass(frozen=True)
class Arm:
    """One setting: what the model is shown, and how it fuses."""

    name: str
    show: str = "all"
    variant: str = "gate_sum"
    label: str = ""


ARMS = (
    Arm("low_res", "low_res", label="low resolution only"),
    Arm("conv_gate", "no_objects", label="+ Conv-Gate fusion"),
    Arm("gate_sum", label="+ objects: the whole model"),
    Arm("gate_concat", variant="gate_concat", label="whole, [l ; g·h]"),
    Arm("concat_projected", variant="concat_projected", label="whole, [l ; h]"),
    Arm("concat_raw", variant="concat_raw", label="whole, [low ; high]"),
)
# The paper's claim: each of the first two adds; its choice of fusion: none of the others adds to it.
STEPS_SHOWN = (
    ("low_res", "conv_gate"),
    ("conv_gate", "gate_sum"),
    ("low_res", "gate_sum"),
    ("gate_sum", "gate_concat"),
    ("gate_sum", "concat_projected"),
    ("gate_sum", "concat_raw"),
)
SEEDS = (1, 2, 3)
# Of stages 1 and 2: six arms of three seeds in four hours on two cores. With 16 samples a step a scene is seen once in
# stage 1 and twice, with other questions, in stage 2.
STEPS = (300, 600)
SCENES = 4800
TEST_SCENES = 2000
PRECISION = "float32"  # which every CPU has, so that runs of several machines can be compared

TEXT = """# What each part of the model adds

Written by `python -m benchmarks.ablation`; do not edit. All arms begin with the same frozen towers and language model
of stage 0 (those of the embedded model) and see the same {scenes:,} scenes for {first:,} steps in stage 1 and
{second:,} in stage 2, fewer than the embedded model, in {precision}. They differ in what they are shown of a picture
and in how they fuse, seeds in the neck's first weights and in the order of the data.

Scores are shares of questions about {questions:,} test scenes that are answered exactly, in per cent; of several seeds
the mean (lowest to highest). The number of questions alone makes a score uncertain by ± {margin:.1f} (95%).

{steps}
By family of questions, and by the size of the smallest thing that the answer hangs on; `minutes` of training on two
CPU cores:

{table}"""


def parts(folder: Path) -> dict[str, str]:
    """Stage 0 of the embedded model, in the form of published parts.

    Args:
        folder: where the towers are written, if they are not there yet.
    """
    from mgllava.chat import load_model
    from mgllava.embedded import LANGUAGE_MODEL, MODEL
    from mgllava.pretraining.parts import write_high_res_tower, write_vision_tower

    towers = {name: folder / name for name in ("vision_tower", "high_res_tower")}
    if not all(path.is_dir() for path in towers.values()):
        model, _ = load_model(str(MODEL), "float32", "cpu")
        write_vision_tower(model.model.vision_tower, towers["vision_tower"])
        write_high_res_tower(model.model.high_res_tower, towers["high_res_tower"])
    return {name: str(path) for name, path in towers.items()} | {"language_model": str(LANGUAGE_MODEL)}


def recipes(arm: Arm, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stages 1 and 2 of an arm: the embedded model's recipes, shorter, with the arm's own settings."""
    from mgllava.training import load_recipe

    first, second = (load_recipe(f"embedded-stage-{stage}").to_dict() for stage in (1, 2))
    output = folder / f"{arm.name}-{seed}"
    shared = {
        "model": str(output / "base"),
        "features": str(folder / "features"),
        "show": arm.show,
        "seed": seed,
        "save_every": 200,
        "precision": PRECISION,
    }
    first |= shared | {"output": str(output / "stage-1"), "max_steps": STEPS[0]}
    first["parts"] |= parts(folder / "parts") | {"fusion_variant": arm.variant}
    second |= shared | {
        "output": str(output / "stage-2"),
        "neck": str(output / "stage-1" / "neck.safetensors"),
        "max_steps": STEPS[1],
    }
    for stage in (first, second):
        for source in stage["data"]:
            source["arguments"]["num_scenes"] = SCENES
    return first, second


def train(recipe: dict[str, Any]) -> Path:
    """Run a recipe, or go on with it, with as many processes as its batch and the cores allow; where its result is."""
    path = Path(recipe["output"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe))
    processes = min(os.cpu_count() or 1, recipe["global_batch"] // recipe["per_device_batch"])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command += ["-m", "mgllava", "train", str(path)]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    if run.returncode:
        raise RuntimeError(f"{path} cannot be run; what it says stands above")
    return Path(run.stdout.splitlines()[-1])


def measure(arm: Arm, seed: int) -> dict[str, Any]:
    """Train an arm, or go on training it, and score it on test scenes."""
    from mgllava.chat import load_model
    from mgllava.scenes.evaluate import evaluate_answers
    from mgllava.training.log import training_seconds

    stages = recipes(arm, seed, RUNS)
    for stage in stages:
        result = train(stage)
    seconds = sum(training_seconds(stage["output"]) for stage in stages)
    model, processor = load_model(str(result), "float32", "cpu")
    scores = evaluate_answers(model, processor, num_scenes=TEST_SCENES, show=arm.show, progress=True)
    return {
        "arm": arm.name,
        "seed": seed,
        "steps": list(STEPS),
        "scenes": SCENES,
        "precision": PRECISION,
        "minutes": seconds / 60,
        "scores": {score.group: [score.right, score.questions] for score in scores},
    }


def accuracies(results: Sequence[dict[str, Any]], arm: str, group: str) -> list[float]:
    """Shares of right answers of all seeds of an arm, in one group of questions."""
    found = [
        result["scores"][group] for result in results if result["arm"] == arm and group in result["scores"]
    ]
    return [right / questions for right, questions in found]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    groups = list(dict.fromkeys(group for result in results for group in result["scores"]))
    lines = [
        "| arm | seeds | minutes | " + " | ".join(group.replace("_", " ") for group in groups) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(groups),
    ]
    for arm in ARMS:
        runs = [result for result in results if result["arm"] == arm.name]
        if not runs:
            continue
        minutes = statistics.mean(result["minutes"] for result in runs)
        cells = [_spread(accuracies(results, arm.name, group)) for group in groups]
        lines.append(f"| {arm.label} | {len(runs)} | {minutes:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def step_table(results: Sequence[dict[str, Any]]) -> str:
    """What each step changes, in Markdown: of seeds that both arms have, the difference over all questions."""
    lines = ["| step | seeds | points |", "| --- | ---: | ---: |"]
    totals = {
        (result["arm"], result["seed"]): result["scores"]["all"][0] / result["scores"]["all"][1]
        for result in results
    }
    for before, after in STEPS_SHOWN:
        seeds = [seed for arm, seed in totals if arm == before and (after, seed) in totals]
        if seeds:
            changes = [totals[after, seed] - totals[before, seed] for seed in seeds]
            first, second = (next(arm.label for arm in ARMS if arm.name == name) for name in (before, after))
            lines.append(f"| {first} → {second} | {len(seeds)} | {_spread(changes, '+')} |")
    return "\n".join(lines) + "\n"


def document(results: Sequence[dict[str, Any]]) -> str:
    """Conditions and both tables."""
    (first, second), scenes = results[0]["steps"], results[0]["scenes"]
    right, questions = results[0]["scores"]["all"]
    margin = 196 * (right / questions * (1 - right / questions) / questions) ** 0.5
    return TEXT.format(
        first=first,
        second=second,
        scenes=scenes,
        precision=results[0]["precision"],
        questions=questions,
        margin=margin,
        steps=step_table(results),
        table=table(results),
    )


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several seeds, the lowest and the highest, in per cent."""
    mean, low, high = (
        f"{100 * value:{sign}.1f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of every arm over all questions, a dot for each seed."""
    from matplotlib.figure import Figure

    arms = [arm for arm in ARMS if any(result["arm"] == arm.name for result in results)]
    figure = Figure(figsize=(7.5, 0.45 * len(arms) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(arms):
        values = [100 * value for value in accuracies(results, arm.name, "all")]
        axes.barh(place, statistics.mean(values), height=0.6, color="#4c78a8" if place < 3 else "#b9c9de")
        axes.plot(values, [place] * len(values), "o", color="black", markersize=4)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel("questions about test scenes answered exactly, %; dots are seeds")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(
    arm: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(one.name for one in ARMS)}; default all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=len(SEEDS), help="How many seeds.")] = len(SEEDS),
    report: Annotated[bool, typer.Option("--report", help="Only table and plot of what is there.")] = False,
) -> None:
    """Train and score every arm, one seed of all arms after the other; what is finished is not done again."""
    console = Console(stderr=True)
    unknown = set(arm or ()) - {one.name for one in ARMS}
    if unknown:
        console.print(f"--arm must be one of {', '.join(one.name for one in ARMS)}; got {', '.join(unknown)}")
        raise typer.Exit(1)
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    settings = {"steps": list(STEPS), "scenes": SCENES, "precision": PRECISION}
    results = [one for one in found if settings.items() <= one.items()]
    if len(results) < len(found):
        console.print(f"left out, of other settings: {len(found) - len(results)} of {len(found)} results")
    for seed in () if report else SEEDS[:seeds]:
        for one in ARMS:
            is_done = any((result["arm"], result["seed"]) == (one.name, seed) for result in results)
            if is_done or (arm and one.name not in arm):
                continue
            console.print(f"{one.label}, seed {seed}")
            results.append(measure(one, seed))
            _write(RESULT, json.dumps(results, indent=1) + "\n")
    if results:
        _write(TABLE, document(results))
        plot(results, PLOT)
        console.print(f"wrote {TABLE} and {PLOT}", soft_wrap=True)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    typer.run(main)
