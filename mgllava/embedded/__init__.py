"""The embedded model: every part of MG-LLaVA in a few million parameters, trained on `mgllava.scenes`.

`model` is a folder as any other that `from_pretrained` loads; its README.md says how it was made and what it can do.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["LANGUAGE_MODEL", "MODEL", "PICTURE", "load_conversation"]

_HERE = Path(__file__).parent
MODEL = _HERE / "model"
PICTURE = _HERE / "picture.png"
# As it was after stage 0, for other models of the same beginnings.
LANGUAGE_MODEL = _HERE / "language_model"


def load_conversation() -> dict[str, Any]:
    """What belongs to `PICTURE`: `detections`, and `turns` of a `question` and the right `answer` each."""
    return json.loads((_HERE / "conversation.json").read_text(encoding="utf-8"))
