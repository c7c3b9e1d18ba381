"""Which parts a quantisation config leaves alone: the vision flow, small beside the language model."""

import copy
from typing import Any

# The vision flow is 0.6 of the 7.3 billion parameters of MG-LLaVA-Vicuna-7B, and bitsandbytes' linear layers do
# not take timm's four-dimensional inputs on every device. The original's --bits spared it as well.
UNQUANTISED = (
    "model.vision_tower",
    "model.high_res_tower",
    "model.fusion",
    "model.image_projector",
    "model.object_projector",
    "lm_head",
)
SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")


def spare_vision(quantization_config: Any) -> Any:
    """A copy of a quantisation config that spares the vision flow, unless it already says what to spare.

    Args:
        quantization_config: as `from_pretrained` takes it (`BitsAndBytesConfig`, `TorchAoConfig`, ...); a
            config without such a field is returned as it is.
    """
    fields = [name for name in SKIP_FIELDS if hasattr(quantization_config, name)]
    if not fields or any(getattr(quantization_config, name) is not None for name in fields):
        return quantization_config
    spared = copy.deepcopy(quantization_config)
    setattr(spared, fields[0], list(UNQUANTISED))
    return spared
