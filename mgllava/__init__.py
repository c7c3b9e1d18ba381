"""MG-LLaVA: a vision-language model that looks at low resolution, high resolution and objects.

Importing the package registers its classes with transformers' Auto classes.
"""

import warnings

from ._version import __version__

__all__ = [
    "MGLlavaConfig",
    "MGLlavaForConditionalGeneration",
    "MGLlavaHighResConfig",
    "MGLlavaImageProcessor",
    "MGLlavaModel",
    "MGLlavaProcessor",
    "__version__",
]

try:
    from .auto import (
        MGLlavaConfig,
        MGLlavaForConditionalGeneration,
        MGLlavaHighResConfig,
        MGLlavaImageProcessor,
        MGLlavaModel,
        MGLlavaProcessor,
    )
except (ImportError, RuntimeError) as error:
    # A torchvision built for another torch breaks transformers with a RuntimeError. `mgllava doctor` has to run
    # all the same, to say so; whoever asks for a class gets the reason.
    _REASON = f"mgllava's classes cannot be imported here ({error}); `mgllava doctor` says what does not fit"
    _CAUSE = error
    warnings.warn(_REASON, stacklevel=2)

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(_REASON) from _CAUSE
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
