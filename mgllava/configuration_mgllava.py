"""Configuration of MG-LLaVA: two vision towers, their fusion, the object flow and any causal language model."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .published import PUBLISHED, VICUNA_7B

FusionVariant = Literal["gate_sum", "gate_concat", "concat_projected", "concat_raw"]


@strict
class MGLlavaHighResConfig(PreTrainedConfig):
    """The high-resolution tower: stem and stages of a timm ConvNeXt.

    Args:
        architecture: timm model name; any member of timm's ConvNeXt family.
        model_kwargs: arguments for the timm constructor beyond the name (for example `depths` and `dims`).
        image_size: side S_h of the square canvas in pixels.
        stage_widths: channels C_l of the stages, finest first; must be what the architecture gives.
        stride: pixels of the canvas per cell of the last stage.
        layer_scale_init: initial value of the blocks' layer scale when nothing is loaded.
    """

    model_type = "mgllava_high_res"
    base_config_key = "high_res_config"

    architecture: str = "convnext_large"
    model_kwargs: dict[str, Any] | None = None
    image_size: int = 768
    stage_widths: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    stride: int = 32
    layer_scale_init: float = 1e-6
    initializer_range: float = 0.02

    def validate_canvas(self) -> None:
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(
                f"high_res_config.image_size is {self.image_size}; expected a positive multiple of the "
                f"stride {self.stride}"
            )


@strict
class MGLlavaConfig(PreTrainedConfig):
    """Everything the arithmetic of MG-LLaVA (arXiv 2406.17770) depends on.

    Args:
        vision_config: the low-resolution tower, a CLIP ViT.
        high_res_config: the high-resolution tower, see `MGLlavaHighResConfig`.
        text_config: any causal language model of transformers.
        image_token_id: id of `<image>`; stands N times for the N fused image tokens.
        object_token_id: id of `<object>`; stands K times for the K object tokens that follow.
        text_vocab_size: size of the language model's own vocabulary; rows from here on were added for
            placeholders and are never generated. None: nothing was added.
        vision_feature_layer: hidden state of the ViT that is used; its CLS token is dropped.
        fusion_variant: `gate_sum` (the paper's model) or one of its ablations.
        roi_output_size, roi_sampling_ratio, roi_aligned: RoIAlign of the object flow, as torchvision means
            them; every box's bins are averaged to one vector.

    Raises:
        StrictDataclassError: (huggingface_hub) if a field has the wrong type, the grids of the two towers
            differ, or a placeholder lies outside the vocabulary.
    """

    model_type = "mgllava"
    sub_configs: ClassVar[dict[str, type]] = {
        "vision_config": AutoConfig,
        "high_res_config": MGLlavaHighResConfig,
        "text_config": AutoConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    high_res_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = VICUNA_7B.image_token_id
    object_token_id: int = VICUNA_7B.object_token_id
    text_vocab_size: int | None = None
    vision_feature_layer: int = -2
    fusion_variant: FusionVariant = "gate_sum"
    roi_output_size: int = 56
    roi_sampling_ratio: int = -1
    roi_aligned: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = VICUNA_7B.text_config()
            self.text_vocab_size = self.text_vocab_size or VICUNA_7B.text_vocab_size
        self.vision_config = _sub_config(self.vision_config or PUBLISHED_CLIP, "clip_vision_model")
        self.high_res_config = _sub_config(self.high_res_config or {}, MGLlavaHighResConfig.model_type)
        self.text_config = _sub_config(self.text_config, "llama")
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.text_vocab_size is None:
            self.text_vocab_size = self.text_config.vocab_size
        super().__post_init__(**kwargs)

    def validate_grids(self) -> None:
        high_res_grid = self.high_res_config.image_size // self.high_res_config.stride
        if high_res_grid != self.grid_size:
            raise ValueError(
                f"the towers' grids differ: the high-resolution tower gives {high_res_grid}x{high_res_grid} "
                f"({self.high_res_config.image_size} px / {self.high_res_config.stride}), the ViT "
                f"{self.grid_size}x{self.grid_size} ({self.vision_config.image_size} px / "
                f"{self.vision_config.patch_size}); Conv-Gate fusion needs equal ones"
            )

    def validate_placeholders(self) -> None:
        rows = self.text_config.vocab_size
        for name in ("image_token_id", "object_token_id"):
            if not 0 <= getattr(self, name) < rows:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected an id inside the embedding table of {rows} rows"
                )
        if self.image_token_id == self.object_token_id:
            raise ValueError(
                f"image_token_id and object_token_id are both {self.image_token_id}; expected two ids"
            )
        if not 0 < self.text_vocab_size <= rows:
            raise ValueError(f"text_vocab_size is {self.text_vocab_size}; expected 1 to {rows}")

    def validate_vision_flow(self) -> None:
        if self.roi_output_size < 1:
            raise ValueError(f"roi_output_size is {self.roi_output_size}; expected at least 1")
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(
                f"vision_feature_layer is {self.vision_feature_layer}; the ViT has hidden states "
                f"{-layers - 1} to {layers}"
            )

    @property
    def grid_size(self) -> int:
        """Side of the ViT's token grid, and of the last ConvNeXt stage."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_image_tokens(self) -> int:
        """N, the image tokens of one picture."""
        return self.grid_size**2

    @classmethod
    def published(cls, name: str) -> "MGLlavaConfig":
        """The configuration of a published checkpoint.

        Args:
            name: `vicuna-7b`, `vicuna-13b`, `phi-3-mini`, `llama-3-8b` or `yi-1.5-34b`.

        Raises:
            ValueError: for any other name.
        """
        if name not in PUBLISHED:
            raise ValueError(f"no published model {name!r}; expected one of {', '.join(PUBLISHED)}")
        preset = PUBLISHED[name]
        return cls(
            text_config=preset.text_config(),
            text_vocab_size=preset.text_vocab_size,
            image_token_id=preset.image_token_id,
            object_token_id=preset.object_token_id,
        )


# openai/clip-vit-large-patch14-336, the tower of every published model.
PUBLISHED_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _sub_config(value: dict | PreTrainedConfig, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    model_type = value.get("model_type", default_type)
    if model_type == MGLlavaHighResConfig.model_type:
        return MGLlavaHighResConfig(**value)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {model_type!r}; transformers knows no such model")
    return CONFIG_MAPPING[model_type](**value)
