"""The mapping at published size, on the meta device: no weights, every name and shape of all five models."""

import pytest
import timm
import torch
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration
from mgllava.conversion import ConversionError
from mgllava.conversion.mapping import CHECKPOINT, CLIP, CONVNEXT, LLM, map_weights
from mgllava.conversion.tensors import LazyTensor
from mgllava.published import PUBLISHED

NAMES = sorted(PUBLISHED)
PARAMETERS = {
    "vicuna-7b": 7.3e9,
    "vicuna-13b": 13.6e9,
    "phi-3-mini": 4.4e9,
    "llama-3-8b": 8.6e9,
    "yi-1.5-34b": 35e9,
}


def described(shapes, file):
    return {
        name: LazyTensor(tuple(shape), torch.float32, file, lambda: pytest.fail("values were read"))
        for name, shape in shapes.items()
    }


def shapes_of(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def original_shapes(config):
    """Names and shapes of everything published beside and in a checkpoint, from the original classes."""
    text_config = type(config.text_config)(
        **{**config.text_config.to_dict(), "vocab_size": config.text_vocab_size}
    )
    clip_config = CLIPConfig(vision_config=config.vision_config.to_dict(), projection_dim=768)
    with torch.device("meta"):
        llm = shapes_of(AutoModelForCausalLM.from_config(text_config))
        clip = shapes_of(CLIPModel(clip_config))
        trunk = shapes_of(timm.create_model(config.high_res_config.architecture, num_classes=0))
    if not any(name.startswith("vision_model.encoder") for name in clip):
        pytest.fail("CLIPModel no longer has the names of the published file")
    clip |= {f"{half}_model.embeddings.position_ids": (1, 577) for half in ("vision", "text")}
    convnext = {f"visual.trunk.{name}": shape for name, shape in trunk.items()}
    convnext |= {
        "visual.trunk.head.norm.weight": (1536,),
        "visual.trunk.head.norm.bias": (1536,),
        "visual.head.mlp.fc1.weight": (1536, 1536),
        "visual.head.mlp.fc2.weight": (768, 1536),
        "positional_embedding": (77, 768),
        "text_projection": (768, 768),
        "logit_scale": (),
        "token_embedding.weight": (49408, 768),
        "transformer.resblocks.0.attn.in_proj_weight": (2304, 768),
        "ln_final.weight": (768,),
    }
    return llm, clip, convnext


def neck_shapes(width):
    """The trained parts of a checkpoint, as the original code defines them at published size."""
    shapes = {}
    for name, inputs in (("projector", 1024), ("bbox_projector", 2880)):
        shapes |= {
            f"{name}.model.0.weight": (width, inputs),
            f"{name}.model.0.bias": (width,),
            f"{name}.model.2.weight": (width, width),
            f"{name}.model.2.bias": (width,),
        }
    for name, weight in {
        "slow_conv": (1536, 1536, 1, 1),
        "slow_proj": (1024, 1536, 1, 1),
        "fast_conv": (1024, 1, 7, 7),
        "fast_proj": (1024, 1024, 1, 1),
        "gate.0": (512, 2048),
        "gate.2": (1, 512),
    }.items():
        shapes |= {f"fuse_module.{name}.weight": weight, f"fuse_module.{name}.bias": weight[:1]}
    return shapes


@pytest.fixture(scope="module", params=NAMES)
def published(request):
    config = MGLlavaConfig.published(request.param)
    return request.param, config, original_shapes(config)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_key_has_one_home_and_every_parameter_one_source(published, stage):
    name, config, (llm, clip, convnext) = published
    checkpoint = neck_shapes(config.text_config.hidden_size)
    if stage == 2:
        checkpoint |= {f"llm.{key}": shape for key, shape in llm.items()}
    originals = {CHECKPOINT: checkpoint, LLM: llm, CLIP: clip, CONVNEXT: convnext}
    mapping = map_weights(config, {source: described(shapes, source) for source, shapes in originals.items()})

    used = [(item.source, item.key) for item in mapping.assignments]
    unused = [(source, key) for source, key, _ in mapping.unused]
    every_key = {(source, key) for source, shapes in originals.items() for key in shapes}
    assert len(used + unused) == len(every_key)
    assert set(used + unused) == every_key

    with torch.device("meta"):
        parameters = shapes_of(MGLlavaForConditionalGeneration(config))
    assert {item.target: item.shape for item in mapping.assignments} == parameters
    assert len(mapping.assignments) == len(parameters)
    assert all(originals[item.source][item.key] == item.tensor.shape for item in mapping.assignments)
    grown = {item.target: item.added_rows for item in mapping.assignments if item.added_rows}
    added = config.text_config.vocab_size - config.text_vocab_size
    tables = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    assert grown == (dict.fromkeys(tables, added) if added else {})
    assert sum(item.numel for item in mapping.assignments) == pytest.approx(PARAMETERS[name], rel=0.04)

    replaced = {key for source, key in unused if source == LLM}
    assert replaced == (set(llm) if stage == 2 else set())
    left = {key for source, key in unused if source == CLIP}
    assert left == {
        key for key in clip if not key.startswith("vision_model.") or key.endswith("position_ids")
    }
    assert not any(".stem." in key or ".stages." in key for source, key in unused if source == CONVNEXT)


def test_one_lost_key_is_noticed(published):
    _, config, (llm, clip, convnext) = published
    checkpoint = neck_shapes(config.text_config.hidden_size)
    lost = [key for key in convnext if key.endswith("stages.2.blocks.26.gamma")]
    assert len(lost) == 1
    kept = {key: shape for key, shape in convnext.items() if key not in lost}
    originals = {CHECKPOINT: checkpoint, LLM: llm, CLIP: clip, CONVNEXT: kept}
    with pytest.raises(
        ConversionError, match=r"model\.high_res_tower\.stages\.2\.blocks\.26\.gamma \(768,\)"
    ):
        map_weights(config, {source: described(shapes, source) for source, shapes in originals.items()})


def test_tied_embeddings():
    """A language model without a head of its own: its embedding is the head, wherever a copy is stored."""
    config = MGLlavaConfig.published("phi-3-mini")
    text_config = type(config.text_config)(
        **{**config.text_config.to_dict(), "tie_word_embeddings": True, "num_hidden_layers": 1}
    )
    config = MGLlavaConfig(
        text_config=text_config,
        text_vocab_size=config.text_vocab_size,
        image_token_id=config.image_token_id,
        object_token_id=config.object_token_id,
    )
    llm, clip, convnext = original_shapes(config)
    originals = {CHECKPOINT: neck_shapes(3072), LLM: llm, CLIP: clip, CONVNEXT: convnext}
    mapping = map_weights(config, {source: described(shapes, source) for source, shapes in originals.items()})
    assert "lm_head.weight" not in {item.target for item in mapping.assignments}
    assert (LLM, "lm_head.weight", "tied to the input embedding") in mapping.unused
