"""`mgllava train`."""

from typing import Annotated

import typer

__all__ = ["train"]


def train(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped recipe, such as vicuna-7b-stage-1.")
    ],
) -> None:
    """Train as a recipe says, or go on where an interrupted run of it stopped.

    On several GPUs: accelerate launch -m mgllava train RECIPE, with one of the configurations that
    `mgllava.training.launch` holds.
    """
    from .recipe import load_recipe
    from .run import train as run

    print(run(load_recipe(recipe)))
