"""The command line: `mgllava demo | chat | detect | convert | train | scenes | doctor`."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console

from .objects.command import add_detect_command
from .scenes.command import scenes_app

app = typer.Typer(
    help="MG-LLaVA: ask about pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console(stderr=True)


def show_error(error: Exception) -> None:
    console.print("[bold red]error:[/]", end=" ")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


def friendly_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends a command with one line that says what was expected, not with a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            # The reader has what it wanted, as `head` does; Python would complain once more when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError, ImportError, StrictDataclassError) as error:
            show_error(error)
            raise typer.Exit(1) from error

    return wrapped


@app.command()
@friendly_errors
def demo(
    output: Annotated[
        Path, typer.Option(help="PNG file to write: the picture with the boxes the model gets.")
    ] = Path("mgllava-demo.png"),
    detector: Annotated[
        str | None,
        typer.Option(
            help="Find the boxes, for example with proposals. Default: those that came with the picture."
        ),
    ] = None,
) -> None:
    """Ask the embedded model about a picture, offline and on the CPU."""
    from .demo import run_demo

    run_demo(console, output, detector)


@app.command()
@friendly_errors
def chat(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder that `mgllava convert` wrote, or a hub id. Default: the embedded model, which knows scenes of "
            "digits and shapes alone."
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Picture to talk about: path or URL; may be repeated.")
    ] = None,
    boxes: Annotated[
        list[Path] | None,
        typer.Option(
            help='JSON with the picture\'s {"boxes", "labels", "scores"}; one per picture, in order.'
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Find the boxes with this detector; `mgllava detect --help` lists them."),
    ] = None,
    tags: Annotated[
        str | None,
        typer.Option(
            help="What the detector looks for, if it wants names: as for `mgllava detect`, or question: what --prompt "
            "names."
        ),
    ] = None,
    detector_checkpoint: Annotated[
        str | None,
        typer.Option(help="The detector's weights: folder or hub id. Default: the published ones."),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures with the boxes the model gets, and those it does not."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask once, print the answer and end. Without it: a conversation.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token always.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Ask about a picture. In a conversation, RESET forgets it and EXIT ends it."""
    from transformers.utils import logging

    from .chat import (
        ChatSession,
        check_device,
        check_dtype,
        check_model_folder,
        default_device,
        load_model,
        stdout_streamer,
    )
    from .embedded import MODEL
    from .image_processing_mgllava import load_picture
    from .objects.detect import check_sources, draw_selections, gather_detections
    from .objects.pictures import Picture, check_drawings

    logging.disable_progress_bar()
    images = image or []
    if model is None:
        model, dtype = str(MODEL), "float32" if dtype == "auto" else dtype
        console.print(
            f"no --model: the embedded one answers, which knows scenes of digits and shapes alone ({MODEL})",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
        if images and not boxes and detector is None:
            detector = "proposals"
            console.print(
                "no --boxes, no --detector: the detector without weights finds objects", style="dim"
            )
    check_sources(len(images), boxes, detector, tags, detector_checkpoint, prompt)
    check_dtype(dtype)
    if draw is not None:
        check_drawings(
            draw, [], [Picture(name, os.path.abspath(name)) for name in images if os.path.exists(name)]
        )
    check_model_folder(model)
    # Everything that can be wrong with the input shows before the weights load.
    pictures = [load_picture(name) for name in images]
    place = default_device() if device == "auto" else str(check_device(device))
    detections = gather_detections(
        pictures, images, boxes, detector, tags, detector_checkpoint, device=place, question=prompt
    )
    if images and detections is None:
        console.print("no --boxes, no --detector: the picture is read without objects", style="dim")
    loaded, processor = load_model(model, dtype, device)
    if draw is not None:
        for path in draw_selections(
            pictures,
            detections or [None] * len(pictures),
            [Path(name).stem for name in images],
            draw,
            **processor.image_processor.selection,
        ):
            console.print("wrote", str(path), markup=False, highlight=False)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    session = ChatSession(loaded, processor, pictures, detections, max_new_tokens=max_new_tokens, **sampling)
    streamer = stdout_streamer(processor)
    if prompt is not None:
        session.ask(prompt, streamer)
        return
    console.print("RESET forgets the conversation, EXIT ends it.", style="dim")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question == "EXIT":
            return
        if question == "RESET":
            session.reset()
        elif question:
            try:
                session.ask(question, streamer)
            except KeyboardInterrupt:
                print()
            except ValueError as error:  # a turn that cannot be asked leaves the conversation as it was
                show_error(error)


@app.command()
@friendly_errors
def convert(
    checkpoint: Annotated[
        str, typer.Option(help="xtuner .pth file, DeepSpeed folder of it, or safetensors file or folder.")
    ],
    llm: Annotated[str, typer.Option(help="Language model: folder or hub id.")],
    clip: Annotated[str, typer.Option(help="CLIP ViT, vision half or whole: folder or hub id.")],
    convnext: Annotated[str, typer.Option(help="open_clip ConvNeXt: folder or hub id.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; must not exist yet. Not needed with --dry-run.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Chat template: vicuna, llama-3, phi-3 or chatml; the layout the checkpoint was trained with. "
            "Default: the language model's own, vicuna where it has none."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: as the language model is stored."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print where every tensor goes; write nothing.")
    ] = False,
) -> None:
    """Convert a published checkpoint to one folder that from_pretrained loads."""
    from .conversion import convert_checkpoint

    result = convert_checkpoint(
        checkpoint, llm, clip, convnext, output, template=template, dtype=dtype, dry_run=dry_run
    )
    if dry_run:
        for line in result.plan.lines():
            print(line)
    for note in result.notes:
        console.print("note:", note, markup=False, highlight=False)
    if result.output is not None:
        console.print("wrote", str(result.output), markup=False, highlight=False)


@app.command()
@friendly_errors
def train(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped recipe, such as vicuna-7b-stage-1.")
    ],
) -> None:
    """Train as a recipe says, or go on where an interrupted run of it stopped.

    On several GPUs: accelerate launch --config_file CONFIG -m mgllava train RECIPE; the package's folder
    training/launch holds configurations for DDP, FSDP2 and DeepSpeed.
    """
    from .pretraining import PretrainingRecipe, pretrain
    from .training import load_recipe
    from .training import train as run

    settings = load_recipe(recipe)
    result = pretrain(settings) if isinstance(settings, PretrainingRecipe) else run(settings)
    if os.environ.get("RANK", "0") == "0":
        print(result)


@app.command()
@friendly_errors
def doctor() -> None:
    """Report versions, devices, the path each op takes and why, and what does not fit together."""
    from rich.table import Table

    from .doctor import examine

    report = examine()
    out = Console()
    for title, rows in report.sections.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        out.print(table)
    for problem in report.problems:
        out.print("!", problem, style="yellow", markup=False, highlight=False)
    if not report.problems:
        out.print("nothing amiss", style="green")


add_detect_command(app, friendly_errors)
app.add_typer(scenes_app(friendly_errors), name="scenes")


def main() -> None:
    app(prog_name="mgllava")
