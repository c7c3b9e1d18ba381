"""Stage 0: towers and a language model from nothing, for models that do not start from published ones.

The towers learn from regions: what each detected box shows, and what each cell of their grids holds. The language
model learns from scenes given as symbols in the place of image and object tokens. Both come out as folders in the
form of published parts, from which stage 1 begins.
"""

from .recipe import PretrainingRecipe
from .run import pretrain

__all__ = ["PretrainingRecipe", "pretrain"]
