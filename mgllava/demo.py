"""`mgllava demo`: the whole way from a published-style checkpoint and a picture file to an answer, offline."""

import json
import tempfile
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from .chat import ChatSession, check_backend, load_model, stdout_streamer
from .conversion import convert_checkpoint

# The miniature checkpoint that the tests hold against the original implementation's values.
FILES = Path(__file__).parent / "demo_files"
QUESTION = "what is in the image ?"


def run_demo(console: Console) -> str:
    """Convert the miniature checkpoint, show it its picture and stream its answer to standard output.

    Args:
        console: where progress and explanations go.

    Returns:
        The answer.
    """
    logging.disable_progress_bar()
    check_backend("cpu")
    detections = json.loads((FILES / "detections.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "miniature"
        convert_checkpoint(
            FILES / "mg_llava.pth",
            llm=FILES / "llm",
            clip=FILES / "clip",
            convnext=FILES / "convnext",
            output=converted,
            template="vicuna",
        )
        model, processor = load_model(str(converted), device="cpu")
        console.print(
            "This miniature has every part of MG-LLaVA but is [bold]untrained[/]: it shows that the whole way works, "
            "and its words mean nothing."
        )
        console.print(
            f"picture:  {FILES / 'image.png'} with {len(detections['boxes'])} detections", markup=False
        )
        console.print(f"question: {QUESTION}", markup=False)
        console.print("answer:", end=" ")
        session = ChatSession(
            model, processor, [str(FILES / "image.png")], [detections], max_new_tokens=12, do_sample=False
        )
        return session.ask(QUESTION, stdout_streamer(processor))
