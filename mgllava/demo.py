"""`mgllava demo`: the embedded model looks at a shipped picture, offline and on the CPU."""

from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from .chat import ChatSession, check_backend, load_model, stdout_streamer
from .embedded import MODEL, PICTURE, load_conversation
from .files import replace_file
from .image_processing_mgllava import load_picture
from .objects.detect import check_detector, gather_detections
from .objects.draw import explain_selection

__all__ = ["run_demo"]


def run_demo(console: Console, drawing: Path, detector: str | None = None) -> list[tuple[str, str, str]]:
    """Ask the embedded model about its picture; questions and answers go to standard output as they come.

    Args:
        console: where explanations go.
        drawing: PNG file to write, the picture with the boxes the model gets.
        detector: name of a detector that finds the boxes and needs no tags; None: those shipped with the picture.

    Returns:
        Question, answer and the right answer, of every turn.

    Raises:
        ValueError: an unknown detector, or a drawing that is no PNG file.
        OSError: the drawing cannot be written, or the detector's weights are not there.
    """
    if drawing.suffix.lower() != ".png" or drawing.is_dir():
        raise ValueError(f"--output is {drawing}; expected a file that ends in .png")
    if detector is not None:
        check_detector(detector, has_tags=False)
    check_backend("cpu")
    logging.disable_progress_bar()

    conversation = load_conversation()
    picture = load_picture(str(PICTURE))
    found = gather_detections([picture], [PICTURE.name], detector=detector)
    detections = conversation["detections"] if found is None else found[0]
    model, processor = load_model(str(MODEL), "float32", "cpu")
    with replace_file(drawing) as scratch:
        explain_selection(picture, **detections, **processor.image_processor.selection).save(scratch, "png")

    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(
        f"This is MG-LLaVA in {parameters:.1f} million parameters, trained on scenes of digits and shapes alone: "
        f"{MODEL / 'README.md'}",
        markup=False,
        soft_wrap=True,
    )
    source = "shipped" if detector is None else f"found by {detector}"
    console.print(
        f"picture: {PICTURE} with {len(detections['boxes'])} boxes {source}, drawn in {drawing}",
        markup=False,
        soft_wrap=True,
    )
    session = ChatSession(model, processor, [picture], [detections], max_new_tokens=12, do_sample=False)
    streamer = stdout_streamer(processor)
    turns = []
    for turn in conversation["turns"]:
        session.reset()
        print(f"\n> {turn['question']}", flush=True)
        answer = session.ask(turn["question"], streamer)
        turns.append((turn["question"], answer, turn["answer"]))
        if answer != turn["answer"]:
            console.print(f"  (it is {turn['answer']})", style="dim", markup=False)
    right = sum(answer == expected for _, answer, expected in turns)
    console.print(
        f"\n{right} of {len(turns)} answers are right. Ask more: mgllava chat --image {PICTURE}",
        markup=False,
        soft_wrap=True,
    )
    return turns
