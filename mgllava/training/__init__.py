"""Training of MG-LLaVA in two stages (paper, section 4.1; settings of its code)."""

from .recipe import Recipe, load_recipe
from .records import Record, RecordSource
from .run import train

__all__ = ["Recipe", "Record", "RecordSource", "load_recipe", "train"]
