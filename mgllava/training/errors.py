"""What stops a training run."""

from safetensors import SafetensorError

__all__ = ["UNWRITABLE", "BadRecord", "CheckpointError", "DataError", "RecipeError"]


# What a full disk raises depends on who was writing: Python, torch.save or safetensors.
UNWRITABLE = (OSError, RuntimeError, SafetensorError)


class RecipeError(ValueError):
    """A recipe that cannot be run; names the key, its value and what was expected."""


class DataError(ValueError):
    """Training data that cannot be used, or more bad records than the recipe allows."""


class BadRecord(ValueError):
    """One record that cannot be trained on.

    Attributes:
        reason: what is wrong, the same text for every record of the kind.
        detail: what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; says what is intact."""
