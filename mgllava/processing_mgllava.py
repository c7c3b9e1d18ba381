"""Text, pictures and detections become the model's inputs (paper, section 3; training layout of its code)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from jinja2 import TemplateError
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_templates import PIECE_SEPARATOR, TEMPLATES, load_chat_template
from .image_processing_mgllava import (
    DETECTION_KEYS,
    MGLlavaBatchFeature,
    MGLlavaImagesKwargs,
    flatten_detections,
    flatten_images,
    load_picture,
)
from .objects.boxes import detections_to_boxes
from .objects.detect import detect_missing
from .objects.detector import Detector

__all__ = ["MGLlavaProcessor"]

Spans = Sequence[tuple[int, int]]

IMAGE_KEYS = ("image", "url", "path", "base64")
TEXT_OPTIONS = {
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_tensors",
    "truncation",
    "verbose",
}
CALL_OPTIONS = {"common_kwargs", "detections", "detector", "images", "images_kwargs", "tags", "text_kwargs"}


class MGLlavaProcessorKwargs(ProcessingKwargs, total=False):
    """Options of one call, by modality."""

    _defaults = {}  # noqa: RUF012  transformers before 5.23 reads it
    images_kwargs: MGLlavaImagesKwargs


class MGLlavaProcessor(ProcessorMixin):
    """Joins the image processor and the language model's tokenizer.

    Each `<image>` in the text stands for one picture and becomes, here and nowhere else, `num_image_tokens`
    image tokens followed by one object token for each of the picture's boxes (at least one).

    Text is tokenised in pieces, as the published models were trained: what lies between two piece separators
    (the chat templates of `mgllava.chat_templates` put them in) and `<image>` placeholders is tokenised on
    its own, without special tokens, and the ids are joined. Text that did not come from such a template gets
    a leading beginning-of-sequence token where the tokenizer itself would add one.

    Args:
        image_processor: a `MGLlavaImageProcessor`.
        tokenizer: the language model's tokenizer, knowing both placeholder tokens.
        chat_template: Jinja source, or several by name.
        num_image_tokens: image tokens of one picture, N = (low_res_size / patch size)².
        image_token: placeholder of an image token, and of a picture in the text.
        object_token: placeholder of an object token; never written by a user.

    Raises:
        ValueError: the tokenizer lacks a placeholder token.
    """

    valid_processor_kwargs = MGLlavaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        num_image_tokens: int = 576,
        image_token: str = "<image>",
        object_token: str = "<object>",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (image_token, object_token) if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {' and '.join(missing)}; add them before: "
                f"tokenizer.add_tokens({missing}, special_tokens=True)"
            )
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.object_token = object_token
        self.image_token_id = vocabulary[image_token]
        self.object_token_id = vocabulary[object_token]
        # Both kinds of placeholder hold features of a picture, which is what the token types tell.
        self.image_token_ids = [self.image_token_id, self.object_token_id]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        detections: Any = None,
        detector: Detector | None = None,
        tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
        assistant_spans: Sequence[Spans] | None = None,
        **kwargs: Any,
    ) -> MGLlavaBatchFeature:
        """Prepare inputs of the model.

        Args:
            images: pictures in the order of the `<image>` placeholders, flat or one list for each text; see
                `MGLlavaImageProcessor.preprocess` for what a picture may be.
            text: one text or several. Texts without a picture may stand beside others.
            detections: for each picture `{"boxes", "labels", "scores"}` or `None`, nested like `images`.
            detector: finds the objects of pictures that come without detections; see
                `mgllava.objects.load_detector`.
            tags: names the detector shall look for, where it wants some: a list for all pictures or one for each.
            assistant_spans: for each text the (start, end) character ranges the assistant wrote; adds
                `assistant_masks`.
            kwargs: `padding`, `truncation`, `max_length`, `padding_side`, `pad_to_multiple_of`,
                `add_special_tokens`, `return_tensors`, `return_mm_token_type_ids`, and the image
                processor's own (`iou_threshold`, `best_per_label`, ...), flat or in `text_kwargs` and
                `images_kwargs`.

        Returns:
            With text: `input_ids`, `attention_mask` and, where asked for, `mm_token_type_ids` (1 at image and
            object tokens) and `assistant_masks`, each (texts, length). With pictures: `pixel_values`,
            `pixel_values_high_res`, `boxes`, `num_boxes` as the image processor returns them, pictures of
            all texts one after the other.

        Raises:
            ValueError: unequal numbers of pictures, placeholders or detections, an object token in the
                text, a truncation that would cut placeholders, or what the image processor refuses.
        """
        if videos is not None or audio is not None:
            raise ValueError("MG-LLaVA takes pictures and text, neither videos nor audio")
        # transformers only warns of unknown options; these would lose every object of the picture.
        if lost := [
            key
            for key in kwargs
            if key in DETECTION_KEYS
            or get_close_matches(key, ["detections", "detector", "tags"], cutoff=0.85)
        ]:
            raise ValueError(
                f"unknown option {lost[0]}; a picture's detections come as "
                'detections=[{"boxes": ..., "labels": ..., "scores": ...}], or by detector= and its tags='
            )
        pictures = [] if images is None else flatten_images(images)
        if text is None and not pictures:
            raise ValueError("give a text, pictures or both")
        texts = _as_texts(text)
        if texts is not None:
            self._check_placeholders(texts, images, len(pictures))
        if detections is not None:
            detections = flatten_detections(detections, len(pictures))
        if detector is None and tags is not None:
            raise ValueError("tags are for a detector; give one, or leave them out")

        options = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_options, image_options = options["text_kwargs"], options["images_kwargs"]
        # Before 5.23 this one is a text option, from then on one of the processor.
        return_types = text_options.pop(
            "return_mm_token_type_ids", options.get("return_mm_token_type_ids", False)
        )

        data: dict[str, Any] = {}
        num_boxes: list[int] = []
        if pictures:
            found = detections or [None] * len(pictures)
            if detector is not None:
                array_format = image_options.get("input_data_format")
                pictures = [
                    load_picture(picture, name=f"images[{index}]", input_data_format=array_format)
                    for index, picture in enumerate(pictures)
                ]
                found = detect_missing(pictures, found, detector, tags)
            image_inputs = self.image_processor(pictures, found, **image_options)
            num_boxes = image_inputs["num_boxes"].tolist()
            data.update(image_inputs)
        if texts is not None:
            text_inputs = self._tokenize(texts, num_boxes, assistant_spans, **text_options)
            if return_types:
                text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
            data = {**text_inputs, **data}
        return MGLlavaBatchFeature(data, tensor_type=text_options.get("return_tensors"))

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or a list of them, and optionally tokenise it.

        A picture stands in a user's message as `{"type": "image", "image": ...}` (or `url`, `path`,
        `base64`), and its detections may ride along as `boxes`, `labels` and `scores` of the same block.

        Args:
            conversation: messages with `role` and `content`, or a list of conversations.
            chat_template: instead of the processor's own: Jinja source, or the name of one of its own or of
                `mgllava.chat_templates.TEMPLATES`.
            tools, documents: handed to the template.
            add_generation_prompt: end with the header of an answer.
            continue_final_message: leave the last answer open for the model to go on.
            return_assistant_tokens_mask: add `assistant_masks`, 1 at the tokens of answers and of what ends
                them: the labels of training.
            tokenize: return ids instead of text.
            return_tensors: `"pt"` or `"np"`.
            return_dict: return everything the model takes instead of the ids alone.
            load_audio_from_video: without effect.
            processor_kwargs: options for `__call__`, among them `detections` in place of those in the blocks.
            sanitize_control_tokens: not supported.
            kwargs: variables of the template; options of `__call__` are recognised among them.

        Returns:
            Text (a list of texts for a list of conversations); ids; or the dictionary of `__call__`.

        Raises:
            ValueError: options that exclude each other, a template without marked answers where their mask is
                wanted, and whatever `__call__` refuses.
        """
        if sanitize_control_tokens:
            raise ValueError("sanitize_control_tokens is not supported: text is tokenised in pieces")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message excludes add_generation_prompt and return_assistant_tokens_mask"
            )
        source = self._chat_template_source(chat_template)
        if return_assistant_tokens_mask:
            if not (tokenize and return_dict):
                raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
            if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
                raise ValueError("the chat template does not mark answers with {% generation %}")
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
            raise ValueError(
                f"conversation is {conversation!r}; expected a list of messages with role and content, or a list "
                "of such lists"
            )
        is_batched = isinstance(conversation[0], (list, tuple))
        conversations = list(conversation) if is_batched else [conversation]
        options = set(TextKwargs.__annotations__) | set(MGLlavaImagesKwargs.__annotations__) | CALL_OPTIONS
        call_options = {key: kwargs.pop(key) for key in list(kwargs) if key in options} | (
            processor_kwargs or {}
        )

        variables = {
            **self.tokenizer.special_tokens_map,
            "image_token": self.image_token,
            "piece_separator": PIECE_SEPARATOR,
            **kwargs,
        }
        try:
            rendered, spans = render_jinja_template(
                conversations=conversations,
                tools=tools,
                documents=documents,
                chat_template=source,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateError as error:
            raise ValueError(f"the conversation does not fit the chat template: {error}") from error
        if not tokenize:
            return rendered if is_batched else rendered[0]

        images, detections = _pictures_of(conversations)
        images = call_options.pop("images", images)
        if any(found is not None for row in detections for found in row):
            if call_options.get("detections") is not None:
                raise ValueError(
                    "detections stand in the conversation and in processor_kwargs; give them once"
                )
            call_options["detections"] = detections
        if return_tensors not in (None, "auto"):
            call_options["return_tensors"] = return_tensors
        if return_assistant_tokens_mask:
            call_options["assistant_spans"] = spans
        inputs = self(images=images, text=rendered, **call_options)
        return inputs if return_dict else inputs["input_ids"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Iterable[Sequence[int]] | None = None, detections: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """How many placeholder tokens pictures of these (height, width) sizes take, for serving engines.

        Without `detections` each picture has its one all-zero box.
        """
        if image_sizes is None:
            return MultiModalData()
        sizes = [tuple(size) for size in image_sizes]
        found = [None] * len(sizes) if detections is None else flatten_detections(detections, len(sizes))
        settings = {
            key: kwargs.get(key, getattr(self.image_processor, key))
            for key in ("high_res_size", "iou_threshold", "max_objects", "max_per_category")
        }
        num_boxes = [
            len(detections_to_boxes(**(entry or {"boxes": []}), image_size=size, **settings)[0])
            for entry, size in zip(found, sizes, strict=True)
        ]
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens + count for count in num_boxes],
            num_image_patches=[1] * len(sizes),
        )

    def _chat_template_source(self, chat_template: str | None) -> str:
        own = self.chat_template
        if isinstance(own, dict):
            name = "default" if chat_template is None else chat_template
            if name in own:
                return own[name]
            if chat_template is None:
                raise ValueError(f"no chat template is named default; choose one of {', '.join(own)}")
        if chat_template in TEMPLATES:
            return load_chat_template(chat_template).source
        source = own if chat_template is None else chat_template
        if source is None:
            raise ValueError("this processor has no chat template; mgllava.chat_templates holds some")
        return source

    def _check_placeholders(self, texts: list[str], images: Any, num_pictures: int) -> None:
        for index, text in enumerate(texts):
            if self.object_token in text:
                raise ValueError(
                    f"text[{index}] holds {self.object_token}, which only the processor puts in, one per box"
                )
        counts = [text.count(self.image_token) for text in texts]
        if sum(counts) != num_pictures:
            raise ValueError(
                f"{num_pictures} pictures were given but the text holds {sum(counts)} {self.image_token}; "
                "each picture needs one placeholder"
            )
        nested = isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in images)
        if nested and len(images) == len(texts):
            for index, (row, count) in enumerate(zip(images, counts, strict=True)):
                pictures = len(flatten_images(row))
                if pictures != count:
                    raise ValueError(
                        f"{pictures} pictures are given for text[{index}], it has {count} {self.image_token}"
                    )

    def _tokenize(
        self,
        texts: list[str],
        num_boxes: list[int],
        assistant_spans: Sequence[Spans] | None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **others: Any,
    ) -> dict[str, list[list[int]]]:
        refused = [key for key, value in others.items() if value and key not in TEXT_OPTIONS]
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot be met: text is tokenised in pieces")
        if assistant_spans is not None and len(assistant_spans) != len(texts):
            raise ValueError(f"{len(assistant_spans)} assistant_spans for {len(texts)} texts")
        bos = self._bos_ids() if add_special_tokens else []
        counts = iter(num_boxes)
        rows, masks = [], []
        for index, text in enumerate(texts):
            ids, mask = self._tokenize_pieces(text, counts, assistant_spans[index] if assistant_spans else ())
            if bos and PIECE_SEPARATOR not in text and ids[:1] != bos:
                ids, mask = bos + ids, [0] * len(bos) + mask
            if truncation not in (None, False, "do_not_truncate"):
                limit = self.tokenizer.model_max_length if max_length is None else max_length
                kept = self._kept_by_truncation(ids, limit, index)
                ids, mask = ids[kept], mask[kept]
            if not ids:
                raise ValueError(f"text[{index}] is {text!r}, which has no tokens")
            rows.append(ids)
            masks.append(mask)

        padded = self.tokenizer.pad(
            {"input_ids": rows},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=True,
        )
        inputs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        if assistant_spans is not None:
            left = (padding_side or self.tokenizer.padding_side) == "left"
            inputs["assistant_masks"] = [
                _pad_mask(mask, len(ids), left) for mask, ids in zip(masks, inputs["input_ids"], strict=True)
            ]
        return inputs

    def _tokenize_pieces(
        self, text: str, num_boxes: Iterable[int], spans: Spans
    ) -> tuple[list[int], list[int]]:
        """Ids of one text, and 1 for each of them that lies in `spans`."""
        ids: list[int] = []
        mask: list[int] = []
        start = 0
        for match in re.finditer(f"{PIECE_SEPARATOR}|{re.escape(self.image_token)}|\\Z", text):
            piece_ids, piece_mask = self._tokenize_piece(text[start : match.start()], start, spans)
            if match.group() == self.image_token:
                placeholders = [self.image_token_id] * self.num_image_tokens
                placeholders += [self.object_token_id] * next(num_boxes)
                piece_ids, piece_mask = piece_ids + placeholders, piece_mask + [0] * len(placeholders)
            ids += piece_ids
            mask += piece_mask
            start = match.end()
        return ids, mask

    def _tokenize_piece(self, piece: str, start: int, spans: Spans) -> tuple[list[int], list[int]]:
        if not piece:
            return [], []
        end = start + len(piece)
        touching = [(first, last) for first, last in spans if first < end and last > start]
        whole = any(first <= start and end <= last for first, last in touching)
        # In the training layout these two are single ids, even where the tokenizer would split their text.
        for token, token_id in self._edge_tokens().items():
            if piece == token:
                return [token_id], [int(whole)]
        if whole or not touching:
            ids = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            return ids, [int(whole)] * len(ids)
        if not self.tokenizer.is_fast:
            raise ValueError(
                "this chat template's answers are no pieces of their own; their mask needs a fast tokenizer"
            )
        encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(first < start + token_end and start + token_start < last for first, last in touching))
            for token_start, token_end in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], mask

    def _edge_tokens(self) -> dict[str, int]:
        tokenizer = self.tokenizer
        pairs = ((tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id))
        return {token: token_id for token, token_id in pairs if token is not None}

    def _bos_ids(self) -> list[int]:
        """The beginning-of-sequence id if the tokenizer would lead a text with it, else nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []

    def _kept_by_truncation(self, ids: list[int], limit: int, index: int) -> slice:
        excess = max(len(ids) - limit, 0)
        kept = slice(0, len(ids) - excess)
        if self.tokenizer.truncation_side == "left":
            kept = slice(excess, len(ids))
        if any(ids.count(token) != ids[kept].count(token) for token in self.image_token_ids):
            raise ValueError(
                f"truncating text[{index}] from {len(ids)} to {limit} tokens would cut a picture's tokens; "
                "raise max_length or shorten the text"
            )
        return kept


def _as_texts(text: Any) -> list[str] | None:
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else list(text)
    for index, entry in enumerate(texts):
        if not isinstance(entry, str):
            raise ValueError(f"text[{index}] is a {type(entry).__name__}, expected a string")
    return texts


def _pad_mask(mask: list[int], length: int, left: bool) -> list[int]:
    filling = [0] * (length - len(mask))
    return filling + mask if left else mask + filling


def _pictures_of(
    conversations: Iterable[Iterable[Mapping[str, Any]]],
) -> tuple[list[list[Any]], list[list[dict[str, Any] | None]]]:
    """For each conversation its pictures, and detections or `None` of each block that stands for a picture.

    A block may come without its picture, which is handed over beside the conversation then.
    """
    images, detections = [], []
    for conversation in conversations:
        blocks = [
            block
            for message in conversation
            if isinstance(message.get("content"), (list, tuple))
            for block in message["content"]
            if block.get("type") in ("image", "image_url")
        ]
        pictures = [_picture_of(block) for block in blocks]
        images.append([picture for picture in pictures if picture is not None])
        detections.append([_detections_of(block) for block in blocks])
    return images, detections


def _picture_of(block: Mapping[str, Any]) -> Any:
    if block["type"] == "image_url":
        target = block.get("image_url")
        return target.get("url") if isinstance(target, Mapping) else target
    return next((block[key] for key in IMAGE_KEYS if block.get(key) is not None), None)


def _detections_of(block: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {key: block[key] for key in sorted(DETECTION_KEYS) if block.get(key) is not None}
    if found and "boxes" not in found:
        raise ValueError(f"an image block holds {', '.join(found)} but no boxes")
    return found or None
