"""Makes what is shipped out of the runs that trained it: `python -m mgllava.embedded.build runs/embedded`."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..chat import load_model
from ..files import replace_folder
from ..scenes import CHANCE, ask, detect, render, sample_scene
from ..scenes.blind import measure_blind_scores
from ..scenes.evaluate import SHOWN, FamilyScore, evaluate_answers
from ..training.log import training_seconds
from . import LANGUAGE_MODEL, MODEL, PICTURE

__all__ = ["build"]

RUNS = ("towers", "language-model", "language-model-cells", "stage-1", "stage-2")
TEST_SCENES = 1000
DEMO_SCENE, DEMO_TURNS = 9, 6


def build(runs: Path, scenes: int = TEST_SCENES) -> None:
    """Write model, card, language model of stage 0, picture and conversation into this package.

    Weights are stored in bfloat16, half the size; the card's figures are those of what is stored, computed in float32.

    Args:
        runs: the folder that the recipes `embedded-*` write to.
        scenes: test scenes to score on, each with one question.
    """
    model, processor = load_model(str(runs / "stage-2" / "model"), "float32", "cpu")
    with replace_folder(MODEL) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        processor.save_pretrained(scratch)
        model, processor = load_model(str(scratch), "float32", "cpu")
        scores = {
            show: evaluate_answers(model, processor, num_scenes=scenes, show=show, progress=True)
            for show in SHOWN
        }
        size = sum(value.numel() for value in model.parameters())
        (scratch / "README.md").write_text(_card(runs, size, scores), encoding="utf-8")

    folder = str(runs / "language-model-cells" / "language_model")
    with replace_folder(LANGUAGE_MODEL) as scratch:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)

    scene = sample_scene("test", DEMO_SCENE)
    render(scene).save(PICTURE)
    turns = [{"question": turn.question, "answer": turn.answer} for turn in ask(scene, DEMO_TURNS)]
    conversation = {"detections": detect(scene).as_dict(), "turns": turns}
    PICTURE.with_name("conversation.json").write_text(
        json.dumps(conversation, indent=1) + "\n", encoding="utf-8"
    )


def _card(runs: Path, parameters: int, scores: dict[str, list[FamilyScore]]) -> str:
    reports = {run: json.loads((runs / run / "report.json").read_text()) for run in RUNS[:3]}
    recipes = {run: json.loads((runs / run / "recipe.json").read_text()) for run in RUNS}
    steps = "\n".join(
        f"| `mgllava train embedded-{run}` | {recipes[run]['seed']} | {recipes[run]['precision']} | "
        f"{training_seconds(runs / run) / 60:.0f} |"
        for run in RUNS
    )
    regions = ", ".join(f"{name} {100 * value:.1f}%" for name, value in reports["towers"]["regions"].items())
    blind = {row.family: max(row.constant, row.classifier) for row in measure_blind_scores()}
    rows = "\n".join(_row(score.group, scores, blind) for score in scores["all"])
    total = scores["all"][0]
    return _CARD.format(
        parameters=parameters / 1e6,
        accuracy=100 * total.accuracy,
        margin=100 * total.margin,
        questions=total.questions,
        steps=steps,
        regions=regions,
        answers=100 * reports["language-model-cells"]["answers"],
        rows=rows,
    )


def _row(group: str, scores: dict[str, list[FamilyScore]], blind: dict[str, float]) -> str:
    found = {show: next((score for score in scores[show] if score.group == group), None) for show in SHOWN}
    shares = [f"{100 * score.accuracy:.1f}" if score else "-" for score in found.values()]
    shares += [f"{100 * known[group]:.0f}" if group in known else "-" for known in (blind, CHANCE)]
    return f"| {group.replace('_', ' ')} | {found['all'].questions} | {' | '.join(shares)} |"


_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags:
- mgllava
---

# The embedded MG-LLaVA

{parameters:.1f} million parameters: CLIP ViT (112 px), ConvNeXt (256 px), Conv-Gate fusion, pooled RoIAlign, two
projectors and a Llama, all trained from nothing on scenes of handwritten digits and coloured shapes. It answers
questions about such scenes, in their words, and knows nothing else of the world. It is there so that everything in
this package runs on a real model on any machine.

On {questions:,} test scenes, whose handwriting it has never seen, it answers {accuracy:.1f}% (± {margin:.1f}) of the
questions exactly. Two thirds of the things in them are 9 to 13 of 256 pixels tall, 4 to 6 in the low-resolution view.

```python
import mgllava
from mgllava.embedded import MODEL, PICTURE, load_conversation
from mgllava.chat import ChatSession, load_model

model, processor = load_model(str(MODEL), "float32", "cpu")
session = ChatSession(model, processor, [str(PICTURE)], [load_conversation()["detections"]], do_sample=False)
print(session.ask("how many digits are there?"))
```

## Training

On two CPU cores; data are made by `mgllava.scenes`, no scene or handwriting of the test split among them.

| command | seed | precision | minutes |
| --- | ---: | --- | ---: |
{steps}

- Stage 0, towers: both learn what each detected box shows and what each cell of their grids holds. On validation
  scenes a linear layer then tells of a box: {regions}.
- Stage 0, language model, in two runs: it reads scenes given as symbols in place of object tokens, then of image tokens
  too, and answers {answers:.1f}% of validation questions about them.
- Stage 1: towers and language model frozen, fusion and projectors learn from captions.
- Stage 2: neck and language model learn from questions.

## Test scenes

Share of questions answered exactly, in per cent: with the boxes of a simulated detector, as in training; with those
that the detector without weights finds; without boxes; and with a blank high-resolution view too. The last two are
this model deprived of what it was trained with; models trained without are compared in the repository's ablation.
`blind` is what was scored without looking, by the better of the commonest answer to a text and a random forest on its
words and the number of boxes; `chance` what is possible so by construction. The last rows are the questions by the size
of the smallest thing that the answer hangs on.

| questions about | number | all | found boxes | no boxes | low resolution alone | blind | chance |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/embedded"))
