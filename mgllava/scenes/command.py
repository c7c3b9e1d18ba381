"""`mgllava scenes write | evaluate | blind | legibility | sheet`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["scenes_app"]

SPLIT_HELP = "train, validation or test; each has digits of its own."


def scenes_app(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> typer.Typer:
    """The group of commands, each wrapped by what turns its errors into messages.

    Hook it in as `app.add_typer(scenes_app(friendly_errors), name="scenes")`.
    """
    app = typer.Typer(
        help="Scenes of handwritten digits and coloured shapes, with questions: a small task to train and test on.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    for command in (write, evaluate, blind, legibility, sheet):
        app.command()(wrap(command))
    return app


def write(
    folder: Annotated[Path, typer.Argument(help="Folder to write; one folder for each split appears in it.")],
    split: Annotated[str, typer.Option(help=SPLIT_HELP)] = "train",
    scenes: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    first: Annotated[int, typer.Option(min=0, help="Number of the first scene.")] = 0,
    turns: Annotated[int, typer.Option(min=1, help="Questions to a conversation.")] = 6,
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="Family of questions, or of captions, to draw from; may be repeated. Default: all questions."
        ),
    ] = None,
    high_res_size: Annotated[
        int, typer.Option(min=1, help="Side of the model's canvas, on which boxes are selected for captions.")
    ] = 256,
) -> None:
    """Write pictures, LLaVA-format conversations and boxes. After an interruption, call it again."""
    from .files import write_split
    from .questions import FAMILIES

    families = family or list(FAMILIES)
    options: dict[str, Any] = {"turns": turns, "first": first, "high_res_size": high_res_size}
    print("wrote", write_split(folder, split, scenes, families=families, progress=True, **options))


def evaluate(
    model: Annotated[str, typer.Option(help="Folder of a model that was trained on scenes, or a hub id.")],
    split: Annotated[str, typer.Option(help=SPLIT_HELP)] = "test",
    scenes: Annotated[int, typer.Option(min=1, help="How many; each gets one question.")] = 2000,
    show: Annotated[
        str, typer.Option(help="all, proposals, no_objects, or low_res: what of each picture the model gets.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """How many questions a model answers exactly, by family and by the size of what is asked about."""
    from ..chat import load_model
    from .evaluate import evaluate_answers

    loaded, processor = load_model(model, "float32", device)
    rows = evaluate_answers(
        loaded, processor, split=split, num_scenes=scenes, show=show, batch_size=batch_size, progress=True
    )
    _print_table(
        ("questions about", "number", "right", "±", "chance"),
        [(row.group, row.questions, row.accuracy, row.margin, row.chance) for row in rows],
    )


def blind(
    train_scenes: Annotated[int, typer.Option(min=1, help="Scenes to fit on.")] = 10000,
    test_scenes: Annotated[int, typer.Option(min=1, help="Scenes to score on.")] = 4000,
) -> None:
    """What a model scores that sees the question and the number of boxes but no picture."""
    from .blind import measure_blind_scores

    rows = measure_blind_scores(train_scenes, test_scenes)
    _print_table(
        ("family", "questions", "texts", "answers", "chance", "constant", "classifier"),
        [
            (row.family, row.questions, row.texts, row.answers, row.chance, row.constant, row.classifier)
            for row in rows
        ],
    )


def legibility(
    train_scenes: Annotated[int, typer.Option(min=1, help="Scenes to fit on.")] = 3000,
    test_scenes: Annotated[int, typer.Option(min=1, help="Scenes to score on.")] = 1000,
    low_res_size: Annotated[int, typer.Option(min=14, help="Side of the low-resolution view.")] = 112,
) -> None:
    """How well a classifier tells digits and shapes apart, on the canvas and in the low-resolution view."""
    from .legibility import measure_legibility

    rows = measure_legibility(train_scenes, test_scenes, low_res_size=low_res_size)
    _print_table(
        ("what", "size", "things", "low-res pixels", "canvas", "low-res", "low-res patch"),
        [
            (row.what, row.size, row.count, row.low_res_pixels, row.high_res, row.low_res, row.low_res_patch)
            for row in rows
        ],
    )


def sheet(
    output: Annotated[Path, typer.Argument(help="Picture file to write.")],
    split: Annotated[str, typer.Option(help=SPLIT_HELP)] = "train",
    first: Annotated[int, typer.Option(min=0, help="Number of the first scene.")] = 0,
    columns: Annotated[int, typer.Option(min=1)] = 4,
    rows: Annotated[int, typer.Option(min=1)] = 3,
    scale: Annotated[int, typer.Option(min=1, help="Enlargement.")] = 2,
) -> None:
    """Draw scenes with the boxes the model gets, in the order of its object tokens; those on texture are grey."""
    from .sheet import draw_sheet

    draw_sheet(split, first=first, columns=columns, rows=rows, scale=scale).save(output)
    print("wrote", output)


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in header:
        table.add_column(name, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    Console().print(table)
