"""`mgllava detect`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_detect_command"]


def add_detect_command(app: typer.Typer, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Add `detect` to the command line, wrapped by what turns its errors into messages."""
    app.command()(wrap(detect))


def detect(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="PICTURES",
            help="Pictures, folders of them, or records in LLaVA's form (.json, .jsonl), whose ids the boxes get.",
        ),
    ],
    detector: Annotated[
        str,
        typer.Option(
            help="owlv2 (the paper's), grounding-dino, mm-grounding-dino, llmdet, florence-2, florence-2-captions, "
            "detr, rt-detr, or proposals, which needs no weights."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Box file to write.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The detector's weights: folder or hub id. Default: the published ones."),
    ] = None,
    tags: Annotated[
        str | None,
        typer.Option(
            help="The names to look for, where the detector wants them: 'cat, traffic light', a text file (.txt), a "
            "vocabulary (coco, open-images, lvis), or what names them for each picture (florence-2, ram++)."
        ),
    ] = None,
    tags_checkpoint: Annotated[
        str | None, typer.Option(help="Weights of florence-2 or ram++, where they make the tags.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least score of a detection. Default: the detector's own.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder that the records' pictures are relative to.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Folder for drawings of what the model gets and of what was dropped, and why."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures to a call of the detector.")] = 8,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; auto and cuda: one GPU for each process.")
    ] = "auto",
) -> None:
    """Detect the objects of pictures: what `chat`, `train` and `evaluate` take as boxes.

    After an interruption the same command goes on where it stopped. On several GPUs: accelerate launch
    -m mgllava detect ..., or torchrun --nproc-per-node 8 -m mgllava detect ...
    """
    from ..chat import check_device
    from .annotate import annotate
    from .detectors import load_detector
    from .pictures import find_pictures
    from .processes import join_processes
    from .tags import load_tagger

    settings = _settings(detector, checkpoint, threshold, tags, tags_checkpoint)
    found = find_pictures(sources, pictures)
    processes = join_processes()

    def load():
        place = check_device(processes.device(device))
        # Tags first: they are sooner wrong.
        tagger = None if tags is None else load_tagger(tags, checkpoint=tags_checkpoint, device=place)
        return load_detector(detector, checkpoint=checkpoint, device=place, threshold=threshold), tagger

    done = annotate(found, load, output, settings=settings, batch_size=batch_size, draw=draw, progress=True)
    if done is None:
        return
    print(f"wrote {done.output}: {done.num_boxes} boxes of {done.num_pictures} pictures")
    if done.num_failed:
        print(f"pictures that could not be used: {done.num_failed}; {done.errors} says why")


def _settings(
    detector: str,
    checkpoint: str | None,
    threshold: float | None,
    tags: str | None,
    tags_checkpoint: str | None,
) -> dict[str, object]:
    """What the detections depend on, checked as far as it can be before any weights load."""
    from .detect import check_detector
    from .detectors import DETECTORS
    from .tags import TAGGERS, VOCABULARIES, FixedTags, load_tagger

    check_detector(detector, tags is not None)
    if tags == "question":
        raise ValueError(
            "tags are 'question', but pictures alone ask none; expected names, a file or a vocabulary"
        )
    names: object = tags
    if tags is not None and (tags in VOCABULARIES or tags not in TAGGERS):
        tagger = load_tagger(tags, checkpoint=tags_checkpoint)
        names = tagger.tags if isinstance(tagger, FixedTags) else tags
    return {
        "detector": detector,
        "checkpoint": checkpoint or DETECTORS[detector].checkpoint,
        "threshold": threshold,
        "tags": names,
        "tags_checkpoint": tags_checkpoint,
    }
