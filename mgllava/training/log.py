"""What a run's own log says of it."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

__all__ = ["training_seconds"]


def training_seconds(output: str | Path) -> float:
    """How long a run trained, over all its starts; what a killed start did after its last checkpoint not counted.

    Args:
        output: the recipe's.

    Raises:
        FileNotFoundError: there is no checkpoint in it.
    """
    last = get_last_checkpoint(str(output)) if Path(output).is_dir() else None
    if last is None:
        raise FileNotFoundError(f"there is no checkpoint in {output}")
    history = json.loads((Path(last) / "trainer_state.json").read_text())["log_history"]
    batch = json.loads((Path(output) / "recipe.json").read_text())["global_batch"]
    seconds, before = 0.0, 0
    for log in history:
        if "samples_per_second" in log:
            seconds += (log["step"] - before) * batch / log["samples_per_second"]
            before = log["step"]
    return seconds
