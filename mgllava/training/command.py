"""`mgllava train`."""

import os
from typing import Annotated

import typer

__all__ = ["train"]


def train(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped recipe, such as vicuna-7b-stage-1.")
    ],
) -> None:
    """Train as a recipe says, or go on where an interrupted run of it stopped.

    On several GPUs: accelerate launch --config_file CONFIG -m mgllava train RECIPE; the package's folder
    training/launch holds configurations for DDP, FSDP2 and DeepSpeed.
    """
    from .recipe import load_recipe
    from .run import train as run

    result = run(load_recipe(recipe))
    if os.environ.get("RANK", "0") == "0":
        print(result)
