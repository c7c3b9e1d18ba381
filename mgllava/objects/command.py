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
            help="owlv2 (the paper's), grounding-dino, mm-grounding-dino, llmdet, florence-2, florence-2-captions "
            "(dense region captioning), detr, rt-detr, or proposals, which needs no weights."
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
            help="The names to look for, where the detector wants them: 'cat, traffic light', a text file, a "
            "vocabulary (coco, open-images, lvis), or what names them for each picture: florence-2, ram++, or, for "
            "records, question."
        ),
    ] = None,
    tags_checkpoint: Annotated[
        str | None, typer.Option(help="Weights of florence-2 or ram++, where they make the tags.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Detections scored at or below it are left out. Default: the detector's own."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder that the records' pictures are relative to.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            help="Folder for drawings of what the model gets and of what was dropped, and why; not below PICTURES."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures to a call of the detector.")] = 8,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; auto and cuda: one GPU for each process.")
    ] = "auto",
) -> None:
    """Detect the objects of pictures: what `chat` and `train` take as boxes.

    After an interruption the same command goes on where it stopped, by what is in OUTPUT.parts. On several GPUs:
    accelerate launch -m mgllava detect ..., or torchrun --nproc-per-node 8 -m mgllava detect ...
    """
    from ..chat import check_device
    from .annotate import annotate
    from .detectors import load_detector
    from .pictures import check_box_file, check_drawings, find_pictures
    from .processes import join_processes
    from .tags import load_tagger

    settings = _settings(detector, checkpoint, threshold, tags, tags_checkpoint)
    asks = settings["tags"] == "question"
    found = find_pictures(sources, pictures, questions=asks)
    mute = next((picture for picture in found if asks and not picture.question), None)
    if mute is not None:
        raise ValueError(
            f"tags are 'question', but {mute.path} comes without one; expected records, names, a file or a vocabulary"
        )
    check_box_file(output, sources, found)
    if draw is not None:
        check_drawings(draw, sources, found)
    processes = join_processes()
    names = settings["tags"]
    if isinstance(names, list) and processes.is_main:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        print(f"looking for {len(names)} names: {shown}")

    def load():
        place = check_device(processes.device(device))
        # Tags first: they are sooner wrong.
        tagger = None if tags is None else load_tagger(tags, checkpoint=tags_checkpoint, device=place)
        return load_detector(detector, checkpoint=checkpoint, device=place, threshold=threshold), tagger

    done = annotate(found, load, output, settings=settings, batch_size=batch_size, draw=draw, progress=True)
    if done is None:
        return
    print(f"wrote {done.output}: {done.num_boxes} boxes of {done.num_pictures} pictures")
    if not done.num_boxes:
        print("no objects were found; other tags or a lower --threshold may find some")
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
    from .detectors import DETECTORS, default_threshold
    from .tags import TAGGERS, VOCABULARIES, FixedTags, load_tagger, tagger_name

    check_detector(detector, tags is not None)
    source = None if tags is None else tagger_name(tags)
    names: object = source
    if source is not None and (source in VOCABULARIES or source not in TAGGERS):
        tagger = load_tagger(source, checkpoint=tags_checkpoint)
        names = tagger.tags if isinstance(tagger, FixedTags) else source
    return {
        "detector": detector,
        "checkpoint": checkpoint or DETECTORS[detector].checkpoint,
        "threshold": default_threshold(detector) if threshold is None else threshold,
        "tags": names,
        "tags_checkpoint": tags_checkpoint,
    }
