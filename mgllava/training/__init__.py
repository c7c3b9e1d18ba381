"""Training of MG-LLaVA in two stages (paper, section 4.1; settings of its code).

    mgllava train vicuna-7b-stage-1     # a shipped recipe, or a YAML file
    accelerate launch --config_file fsdp2.yaml -m mgllava train vicuna-7b-stage-2

The same command goes on after an interruption, from the last whole checkpoint. One thing to a file: `recipe` says what
to run, `records` where conversations come from, `encode` and `collate` make tensors of them, `sampling` orders them,
`stages` chooses what learns, `trainer` adapts transformers' Trainer, `run` puts all of it together.
"""

from .recipe import Recipe, load_recipe
from .records import Record, RecordSource
from .run import train

__all__ = ["Recipe", "Record", "RecordSource", "load_recipe", "train"]
