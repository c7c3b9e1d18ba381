"""MG-LLaVA (arXiv 2406.17770) as transformers model classes.

One picture's way through this file: `get_image_features` encodes it at low and high resolution, fuses the two
(`fusion`), pools every box over the ConvNeXt stages, and projects both token sets; `merge_image_features` puts
the tokens where the placeholders stand; then the language model reads on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from mgllava_kernels import ConvGateFusion, Projector, pooled_roi_align, project_groups, vision_neck

from .cache_name import CACHE_NAME
from .configuration_mgllava import MGLlavaConfig
from .high_res_tower import MGLlavaHighResTower
from .language_model_head import language_model_head, scale_logits
from .quantization import spare_vision

IGNORE_INDEX = -100
PICTURE_INPUTS = ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")


@dataclass
class MGLlavaImageFeatures(ModelOutput):
    """What `get_image_features` returns.

    Attributes:
        pooler_output: one tensor (N + K_max, T) per picture: N image tokens, then its object tokens. Rows from
            N + num_objects on are padding.
        num_objects: (images,), how many object tokens of each picture are real. It stays on the device; None
            means all of them.
    """

    pooler_output: list[Tensor] | None = None
    num_objects: Tensor | None = None


@dataclass
class MGLlavaTowerFeatures(ModelOutput):
    """What `encode_towers` returns: all that the neck reads of pictures, so frozen towers need to run only once.

    Attributes:
        low_res: (images, N, D), the ViT's tokens.
        high_res: (images, C, H, W), the last ConvNeXt stage.
        objects: (images, K_max, ΣC_l), every box pooled over all stages; rows from `num_objects` on are padding.
            None: no object tokens.
        num_objects: (images,). None: all K_max.
    """

    low_res: Tensor | None = None
    high_res: Tensor | None = None
    objects: Tensor | None = None
    num_objects: Tensor | None = None


@dataclass
class MGLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `MGLlavaModel`.

    Attributes:
        image_hidden_states: (images, N + K_max, T), the projected image and object tokens.
    """

    image_hidden_states: Tensor | None = None


@dataclass
class MGLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `MGLlavaForConditionalGeneration`.

    Attributes:
        loss: scalar, next-token cross entropy over the labels that are not -100.
        logits: (B, L, vocabulary).
        image_hidden_states: (images, N + K_max, T), the projected image and object tokens.
    """

    image_hidden_states: Tensor | None = None


class MGLlavaPreTrainedModel(PreTrainedModel):
    config_class = MGLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The fused ops read weights straight from these modules, so a device map must not cut through them.
    _no_split_modules = ("MGLlavaHighResTower", "ConvGateFusion", "Projector")
    _skip_keys_device_placement = ("past_key_values", "cache")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self) -> None:
        super().post_init()
        # CLIP's vision half also names modules of its text half; FSDP's wrapping looks up every name.
        self._no_split_modules = self._no_split_modules & {type(module).__name__ for module in self.modules()}

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any):
        """As `transformers.PreTrainedModel.from_pretrained`; quantisation spares the vision flow by default."""
        if quantization_config is not None:
            kwargs["quantization_config"] = spare_vision(quantization_config)
        return super().from_pretrained(*args, **kwargs)


class MGLlavaModel(MGLlavaPreTrainedModel):
    """Both vision towers, their fusion, the projectors and the language model without its head."""

    def __init__(self, config: MGLlavaConfig):
        super().__init__(config)
        text_width = config.get_text_config().hidden_size
        stage_widths = config.high_res_config.stage_widths

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.high_res_tower = MGLlavaHighResTower(config.high_res_config)
        self.fusion = ConvGateFusion(
            config.vision_config.hidden_size, stage_widths[-1], variant=config.fusion_variant
        )
        self.image_projector = Projector(self.fusion.out_features, text_width)
        self.object_projector = Projector(sum(stage_widths), text_width)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for layers that hold parameters, never for what contains them. Parameters that
        # were loaded are flagged, and the initialisers leave them alone.
        for part in (self.high_res_tower, self.fusion, self.image_projector, self.object_projector):
            if any(module is own for own in part.modules()):
                if not getattr(part, "_is_hf_initialized", False):
                    part.reset_parameters()
                    part._is_hf_initialized = True
                return
        super()._init_weights(module)

    def train(self, mode: bool = True) -> "MGLlavaModel":
        """As `nn.Module.train`, but towers and a language model that are frozen whole stay in eval mode."""
        super().train(mode)
        for part in (self.vision_tower, self.high_res_tower, self.language_model):
            if mode and not _learns(part):
                part.eval()
        # Gradients flow through a frozen language model to the neck, and its layers are recomputed in training
        # mode only. The flag is theirs alone: their dropout stays off.
        for layer in self.language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = mode
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode_low_res(self, pixel_values: Tensor) -> Tensor:
        """Pictures (images, 3, S_l, S_l) to ViT tokens (images, N, D): one hidden state, CLS dropped."""
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), output_hidden_states=True)
        return outputs.hidden_states[self.config.vision_feature_layer][:, 1:]

    def _box_rows(self, boxes: Tensor, num_boxes: Tensor | None, device: torch.device) -> Tensor:
        """Boxes (images, K_max, 4) as rows (images · K_max, 5) with their image index; padding becomes zeros."""
        # A device map may have put the tower on another GPU than the inputs.
        boxes = boxes.to(device)
        images, max_boxes, _ = boxes.shape
        if num_boxes is not None:
            row = torch.arange(max_boxes, device=device)
            boxes = boxes.where((row < num_boxes.to(device)[:, None])[..., None], 0)
        index = torch.arange(images, device=device, dtype=torch.float32)
        index = index[:, None, None].expand(images, max_boxes, 1)
        # Coordinates stay in float32: bfloat16 cannot tell pixel 513 from 514.
        return torch.cat([index, boxes.float()], dim=-1).reshape(images * max_boxes, 5)

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_values_high_res: Tensor | None = None,
        boxes: Tensor | None = None,
        num_boxes: Tensor | None = None,
        **kwargs: Any,
    ) -> MGLlavaImageFeatures:
        """The whole vision flow: pictures and boxes to image and object tokens.

        Nothing here waits for the device or depends on a value in it, so it compiles as one graph.

        Args:
            pixel_values: (images, 3, S_l, S_l), the low-resolution views.
            pixel_values_high_res: (images, 3, S_h, S_h), the high-resolution views.
            boxes: (images, K_max, 4) xyxy in high-resolution pixels, any dtype; rows from `num_boxes` on are
                padding. None: no object tokens.
            num_boxes: (images,) boxes of each picture. None: all K_max.

        Returns:
            `MGLlavaImageFeatures`.

        Raises:
            ValueError: if a shape differs from the above.
        """
        self._check_picture_inputs(pixel_values, pixel_values_high_res, boxes, num_boxes)
        low_res = self.encode_low_res(pixel_values)
        stages = self.high_res_tower(pixel_values_high_res.to(self.high_res_tower.dtype))
        if boxes is None:
            tokens = self.image_projector(self.fusion(low_res, stages[-1]))
        else:
            image_tokens, object_tokens = vision_neck(
                low_res,
                stages,
                self._box_rows(boxes, num_boxes, stages[0].device),
                fusion=self.fusion,
                image_projector=self.image_projector,
                object_projector=self.object_projector,
                **self._roi_arguments(stages),
            )
            object_tokens = object_tokens.to(image_tokens.device).unflatten(0, boxes.shape[:2])
            tokens = torch.cat([image_tokens, object_tokens], dim=1)
        return MGLlavaImageFeatures(pooler_output=list(tokens), num_objects=num_boxes)

    def encode_towers(
        self,
        pixel_values: Tensor,
        pixel_values_high_res: Tensor | None = None,
        boxes: Tensor | None = None,
        num_boxes: Tensor | None = None,
    ) -> MGLlavaTowerFeatures:
        """The first half of `get_image_features`, up to where the neck's parameters begin; arguments are the same.

        Its result goes to `project_towers`, or to the model as `mm_encoder_outputs={"towers": ...}`. Both halves
        in one, with fewer launches, are `get_image_features`.
        """
        self._check_picture_inputs(pixel_values, pixel_values_high_res, boxes, num_boxes)
        low_res = self.encode_low_res(pixel_values)
        stages = self.high_res_tower(pixel_values_high_res.to(self.high_res_tower.dtype))
        objects = None
        if boxes is not None:
            rows = self._box_rows(boxes, num_boxes, stages[0].device)
            objects = pooled_roi_align(stages, rows, **self._roi_arguments(stages))
            objects = objects.unflatten(0, boxes.shape[:2])
        return MGLlavaTowerFeatures(
            low_res=low_res, high_res=stages[-1], objects=objects, num_objects=num_boxes
        )

    def project_towers(self, towers: MGLlavaTowerFeatures | dict[str, Tensor]) -> MGLlavaImageFeatures:
        """The second half of `get_image_features`: fusion and projectors.

        Args:
            towers: from `encode_towers`, or a dictionary with the same entries.
        """
        objects = towers.get("objects")
        fused = self.fusion(towers["low_res"], towers["high_res"])
        if objects is None:
            tokens = self.image_projector(fused)
        else:
            image_tokens, object_tokens = project_groups(
                [self.image_projector, self.object_projector], [fused, objects.flatten(0, 1)]
            )
            object_tokens = object_tokens.to(image_tokens.device).unflatten(0, objects.shape[:2])
            tokens = torch.cat([image_tokens, object_tokens], dim=1)
        return MGLlavaImageFeatures(pooler_output=list(tokens), num_objects=towers.get("num_objects"))

    def _roi_arguments(self, stages: list[Tensor]) -> dict[str, Any]:
        return {
            "spatial_scale": stages[0].shape[-1] / self.config.high_res_config.image_size,
            "output_size": self.config.roi_output_size,
            "sampling_ratio": self.config.roi_sampling_ratio,
            "aligned": self.config.roi_aligned,
        }

    def _check_picture_inputs(
        self,
        pixel_values: Tensor,
        pixel_values_high_res: Tensor | None,
        boxes: Tensor | None,
        num_boxes: Tensor | None,
    ) -> None:
        if pixel_values_high_res is None:
            raise ValueError("pixel_values came without pixel_values_high_res; the processor returns both")
        images = pixel_values.shape[0]
        if images == 0:
            raise ValueError("pixel_values holds no pictures; leave the picture inputs out for text alone")
        for name, value, size in (
            ("pixel_values", pixel_values, self.config.vision_config.image_size),
            ("pixel_values_high_res", pixel_values_high_res, self.config.high_res_config.image_size),
        ):
            if tuple(value.shape) != (images, 3, size, size):
                raise ValueError(f"{name} is {tuple(value.shape)}; expected {(images, 3, size, size)}")
        if boxes is None:
            if num_boxes is not None:
                raise ValueError("num_boxes came without boxes")
            return
        if boxes.dim() != 3 or boxes.shape[0] != images or boxes.shape[2] != 4:
            raise ValueError(
                f"boxes is {tuple(boxes.shape)}; expected ({images}, K_max, 4), a row per picture"
            )
        if num_boxes is not None and tuple(num_boxes.shape) != (images,):
            raise ValueError(f"num_boxes is {tuple(num_boxes.shape)}; expected ({images},)")

    def _vision_learns(self) -> bool:
        return any(
            _learns(part)
            for part in (
                self.fusion,
                self.image_projector,
                self.object_projector,
                self.vision_tower,
                self.high_res_tower,
            )
        )

    def _no_tokens(self, device: torch.device) -> Tensor:
        """A scalar zero that hangs on the whole vision flow, so that a batch of text alone trains like any other.

        One blank picture passes through and none of its tokens are used: every parameter gets a gradient of zeros
        rather than none, and every process of a sharded run calls the same modules whatever its batch holds.
        """
        low_res, high_res = self.config.vision_config.image_size, self.config.high_res_config.image_size
        features = self.get_image_features(
            torch.zeros(1, 3, low_res, low_res, device=device),
            torch.zeros(1, 3, high_res, high_res, device=device),
            torch.zeros(1, 1, 4, device=device),
        )
        return features.pooler_output[0][:0].sum()

    def merge_image_features(
        self, input_ids: Tensor, inputs_embeds: Tensor, features: MGLlavaImageFeatures
    ) -> tuple[Tensor, Tensor]:
        """Put image and object tokens where their placeholders stand (paper section 3.1; the splice).

        Args:
            input_ids: (B, L); every picture is N image placeholders and then its object placeholders.
            inputs_embeds: (B, L, T).
            features: of all pictures, in the order in which they appear.

        Returns:
            The embeddings (B, L, T), and the tokens as (images, N + K_max, T).

        Raises:
            ValueError: if placeholders and features differ in number or order.
        """
        tokens = torch.stack(features.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
        images, length, width = tokens.shape
        num_image_tokens = self.config.num_image_tokens
        position = torch.arange(length, device=tokens.device)
        if features.num_objects is None:
            real = torch.ones(images, length, dtype=torch.bool, device=tokens.device)
        else:
            real = position < num_image_tokens + features.num_objects.to(tokens.device)[:, None]

        # Real tokens first, in order: their number is known to the device alone.
        order = torch.argsort(~real.flatten(), stable=True)
        is_object = (position >= num_image_tokens).expand(images, length).flatten()[order]
        image_mask = input_ids == self.config.image_token_id
        object_mask = input_ids == self.config.object_token_id
        placeholder = (image_mask | object_mask).to(inputs_embeds.device)
        self._check_placeholders(image_mask, object_mask, real, is_object)
        merged = inputs_embeds.masked_scatter(
            placeholder[..., None], tokens.reshape(images * length, width)[order]
        )
        return merged, tokens

    def _check_no_placeholders(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> None:
        if attention_mask is None:
            first_pass = cache is None
        else:
            first_pass = isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape
        # Later passes may see placeholders as text: prompt-lookup decoding proposes pieces of the prompt.
        if not first_pass or _is_captured(input_ids):
            return
        placeholders = (input_ids == self.config.image_token_id) | (input_ids == self.config.object_token_id)
        if count := placeholders.sum().item():
            raise ValueError(
                f"placeholders and features do not match: the text has {count} placeholders, but no pictures came "
                "with it (0 features)"
            )

    def _check_placeholders(
        self, image_mask: Tensor, object_mask: Tensor, real: Tensor, is_object: Tensor
    ) -> None:
        if _is_captured(image_mask):
            return
        num_image_tokens = self.config.num_image_tokens
        counts = (
            ("image", "pictures", image_mask.sum(), real[:, :num_image_tokens].sum()),
            ("object", "boxes", object_mask.sum(), real[:, num_image_tokens:].sum()),
        )
        for kind, source, placeholders, features in counts:
            if (given := placeholders.item()) != (wanted := features.item()):
                raise ValueError(
                    f"{kind} placeholders and features do not match: the text has {given} {kind} placeholders, "
                    f"the {source} give {wanted} {kind} features"
                )
        kinds = object_mask[image_mask | object_mask]
        if not torch.equal(kinds, is_object[: kinds.numel()].to(kinds.device)):
            raise ValueError(
                f"image and object placeholders are out of order: expected {num_image_tokens} image placeholders "
                "and then that picture's object placeholders, picture after picture"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_high_res: Tensor | None = None,
        boxes: Tensor | None = None,
        num_boxes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MGLlavaModelOutputWithPast:
        """Hidden states of the language model; arguments as in `MGLlavaForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        cache = past_key_values if cache is None else cache
        encoded = mm_encoder_outputs or {}
        features = encoded.get("image")
        if features is None and "towers" in encoded:
            features = self.project_towers(encoded["towers"])
        if pixel_values is not None:
            if features is not None:
                raise ValueError("expected pixel_values or mm_encoder_outputs, got both")
            features = self.get_image_features(pixel_values, pixel_values_high_res, boxes, num_boxes)
        if features is not None and input_ids is None:
            raise ValueError(
                "pictures came with inputs_embeds; expected input_ids, where the placeholders are"
            )
        zero = None
        if features is None and self.training and torch.is_grad_enabled() and self._vision_learns():
            # Ahead of the embeddings, as pictures are: the processes of a sharded run must agree in the order too.
            zero = self._no_tokens((input_ids if inputs_embeds is None else inputs_embeds).device)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        tokens = None
        if features is not None:
            inputs_embeds, tokens = self.merge_image_features(input_ids, inputs_embeds, features)
        elif input_ids is not None:
            self._check_no_placeholders(input_ids, attention_mask, cache)
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return MGLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=tokens,
        )


class MGLlavaForConditionalGeneration(MGLlavaPreTrainedModel, GenerationMixin):
    """MG-LLaVA with its language-model head.

    The two placeholder ids, and every row that the conversion added to the vocabulary, have the lowest logit there
    is: they are never generated and weigh nothing in the loss. Rows that `resize_token_embeddings` adds later are
    ordinary ones.

    Raises:
        ValueError: if the language model changes its logits in a way that is not known (see `scale_logits`).
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 - transformers reads a class attribute
    # Names of the embedding differ between language models; __init__ narrows this to the one at hand.
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }

    def __init__(self, config: MGLlavaConfig):
        super().__init__(config)
        self.model = MGLlavaModel(config)
        self.lm_head = language_model_head(config.text_config)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_values_high_res: Tensor | None = None,
        boxes: Tensor | None = None,
        num_boxes: Tensor | None = None,
        **kwargs: Any,
    ) -> MGLlavaImageFeatures:
        """See `MGLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_values_high_res, boxes, num_boxes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_high_res: Tensor | None = None,
        boxes: Tensor | None = None,
        num_boxes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MGLlavaCausalLMOutputWithPast:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: (B, L). Each picture stands as N `image_token_id` and then its boxes' `object_token_id`;
                rows without pictures are plain text.
            pixel_values: (images, 3, S_l, S_l); the pictures of all rows in order.
            pixel_values_high_res: (images, 3, S_h, S_h).
            boxes: (images, K_max, 4) xyxy in high-resolution pixels, rows from `num_boxes` on padding.
            num_boxes: (images,).
            attention_mask: (B, L), padding on either side.
            labels: (B, L), -100 where nothing is to be learned; placeholders are ignored as well.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for given indices.
            mm_encoder_outputs: in place of the pictures `{"image": features}` from `get_image_features`, or
                `{"towers": features}` from `MGLlavaModel.encode_towers`.
            past_key_values, cache: keys and values of what was read before, under transformers' older or newer name.
            mm_token_type_ids: accepted for serving engines; the placeholders' ids already say what it says.

        Raises:
            ValueError: if placeholders and picture features do not match, naming both numbers.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_high_res=pixel_values_high_res,
            boxes=boxes,
            num_boxes=num_boxes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = scale_logits(self.config.text_config, self.lm_head(hidden_states))
        self._hide_placeholders(logits)

        loss = None
        if labels is not None:
            placeholder = (labels == self.config.image_token_id) | (labels == self.config.object_token_id)
            loss = self.loss_function(
                logits=logits,
                labels=labels.masked_fill(placeholder, IGNORE_INDEX),
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        return MGLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _hide_placeholders(self, logits: Tensor) -> None:
        # In place, on the head's own output: a masked copy of (B, L, 128,256) float32 logits is 1 GB per 2,048
        # tokens. The dtype's minimum rather than -inf keeps p·log p of a preference loss at 0 instead of NaN.
        lowest = torch.finfo(logits.dtype).min
        logits[..., self.config.image_token_id] = lowest
        logits[..., self.config.object_token_id] = lowest
        last = max(self.config.image_token_id, self.config.object_token_id)
        logits[..., self.config.text_vocab_size : last + 1] = lowest

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = past_key_values if cache is None else cache
        # Cached decode steps hold the pictures in their keys and values; without a cache every step needs the
        # features again, but never the towers.
        if not is_first_iteration and kwargs.get("use_cache", True) and not _is_empty(cache):
            for name in (*PICTURE_INPUTS, "mm_encoder_outputs"):
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE_NAME: cache},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Encode the pictures once, before beams multiply the rows, and give every beam its own row's pictures."""
        pictures = {name: model_kwargs.pop(name, None) for name in PICTURE_INPUTS}
        encoded = dict(model_kwargs.pop("mm_encoder_outputs", None) or {})
        if pictures["pixel_values"] is not None:
            encoded["image"] = self.get_image_features(**pictures)
        elif "towers" in encoded:
            encoded["image"] = self.model.project_towers(encoded.pop("towers"))
        if (features := encoded.get("image")) is not None and expand_size > 1:
            if input_ids is None:
                raise ValueError("pictures came with inputs_embeds; expected input_ids")
            encoded["image"] = self._expand_features(features, input_ids, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if encoded:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _expand_features(
        self, features: MGLlavaImageFeatures, input_ids: Tensor, expand_size: int
    ) -> MGLlavaImageFeatures:
        placeholders = (input_ids == self.config.image_token_id).sum(dim=1)
        pictures_of_row = (placeholders // self.config.num_image_tokens).tolist()
        order: list[int] = []
        first = 0
        for pictures in pictures_of_row:
            order += list(range(first, first + pictures)) * expand_size
            first += pictures
        if first != len(features.pooler_output):
            raise ValueError(f"the prompts hold {first} pictures, {len(features.pooler_output)} were given")
        num_objects = features.num_objects
        return MGLlavaImageFeatures(
            pooler_output=[features.pooler_output[i] for i in order],
            num_objects=None if num_objects is None else num_objects[order],
        )


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _is_empty(cache: Cache | None) -> bool:
    """Whether a pass with this cache is the first over its prompt; an assistant model's is not flagged as such."""
    if cache is None:
        return True
    # Static caches are never handed to assistants, and count their tokens on the device.
    if getattr(cache, "is_compileable", False):
        return False
    try:
        return cache.get_seq_length() == 0
    except ValueError:  # state-space models keep no count
        return False


def _is_captured(tensor: Tensor) -> bool:
    """Whether values cannot be read now: inside torch.compile or a CUDA-graph capture."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
