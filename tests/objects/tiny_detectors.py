"""Tiny detectors of every family, made on the spot with random weights and saved as a checkpoint folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTokenizer,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    ResNetConfig,
    RobertaTokenizer,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    SwinConfig,
)

NAMES = ("zebra", "kite", "traffic light")  # the closed vocabularies
WORDS = ("cat", "kite", "light", "st", "bernard", "traffic", "zebra", *"bcdefghijklm")
MAX_TEXT_LENGTH = 12  # of Grounding DINO's text, in tokens
SIDE = 64
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def save(name: str, folder: Path) -> Path:
    """Write a checkpoint for the detector of that name into the folder."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _owlv2():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pieces = ["!", *BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    pieces = list(dict.fromkeys(pieces))  # "!", a byte itself, only takes id 0, which would mean "no prompt"
    tokenizer = CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        pad_token="!",
        model_max_length=16,
    )
    config = Owlv2Config(
        text_config={**tower, "vocab_size": len(pieces), "max_position_embeddings": 16},
        vision_config={**tower, "image_size": SIDE, "patch_size": 16},
        projection_dim=16,
    )
    image_processor = Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE})
    return Owlv2ForObjectDetection(config), Owlv2Processor(image_processor, tokenizer)


def _grounding_dino(
    config_class: type = GroundingDinoConfig, model_class: type = GroundingDinoForObjectDetection
):
    # The model knows these four by number: they part the tags of a text.
    numbers = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    numbers |= {word: 2000 + number for number, word in enumerate(WORDS)}
    taken = set(numbers.values())
    for number in range(max(taken)):
        if number not in taken:
            numbers[f"[unused{number}]"] = number
    tokenizer = BertTokenizer(vocab=dict(sorted(numbers.items(), key=lambda item: item[1])))
    config = config_class(
        backbone_config=SwinConfig(
            image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_indices=[2, 3, 4]
        ),
        text_config={
            "model_type": "bert",
            "vocab_size": len(numbers),
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=6,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=MAX_TEXT_LENGTH,
    )
    size = {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    return model_class(config), GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer)


def _mm_grounding_dino():
    return _grounding_dino(MMGroundingDinoConfig, MMGroundingDinoForObjectDetection)


def _florence2():
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *BYTES, "<mask>"]
    tokenizer = RobertaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens([f"<loc_{number}>" for number in range(1000)])
    config = Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": len(tokenizer),
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        vision_config={
            "depths": (1, 1, 1, 1),
            "embed_dim": (8, 8, 8, 16),
            "num_heads": (1, 1, 1, 1),
            "num_groups": (1, 1, 1, 1),
            "window_size": 4,
            "projection_dim": 16,
            "drop_path_rate": 0.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    image_processor = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False
    )
    # As in the published processor: SIDE / 32 tokens along each side, and their mean.
    image_processor.image_seq_length = (SIDE // 32) ** 2 + 1
    processor = Florence2Processor(
        image_processor, tokenizer, post_processor_config={"description_with_bboxes": {}, "pure_text": {}}
    )
    return Florence2ForConditionalGeneration(config), processor


def _detr(
    config_class: type = DetrConfig,
    model_class: type = DetrForObjectDetection,
    processor_class: type = DetrImageProcessor,
    **more: int,
):
    config = config_class(
        use_timm_backbone=False,
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=6,
        id2label=dict(enumerate(NAMES)),
        **more,
    )
    size = {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    return model_class(config), processor_class(size=size)


def _conditional_detr():
    return _detr(ConditionalDetrConfig, ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor)


def _deformable_detr():
    return _detr(
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        DeformableDetrImageProcessor,
        num_feature_levels=1,
    )


def _rt_detr_v2():
    return _rt_detr(RTDetrV2Config, RTDetrV2ForObjectDetection)


def _rt_detr(config_class: type = RTDetrConfig, model_class: type = RTDetrForObjectDetection):
    config = config_class(
        backbone_config=RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_indices=[2, 3, 4],
        ),
        encoder_in_channels=[8, 8, 8],
        decoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=16,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=6,
        num_denoising=0,
        id2label=dict(enumerate(NAMES)),
    )
    return model_class(config), RTDetrImageProcessor(size={"height": SIDE, "width": SIDE})


BUILDERS: dict[str, Callable[[], tuple]] = {
    "owlv2": _owlv2,
    "grounding-dino": _grounding_dino,
    "mm-grounding-dino": _mm_grounding_dino,
    "llmdet": _mm_grounding_dino,
    "florence-2": _florence2,
    "florence-2-captions": _florence2,
    "detr": _detr,
    "rt-detr": _rt_detr,
    "conditional-detr": _conditional_detr,
    "deformable-detr": _deformable_detr,
    "rt-detr-v2": _rt_detr_v2,
}
