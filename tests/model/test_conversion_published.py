"""The mapping at published size, on the meta device: no weights, every name and shape of all five models."""

import re

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

# Written down from the published files, not from the classes and presets under test: rows of the vocabulary,
# width, rows of k_proj, width of the MLP, number of layers, width of an attention head. Phi-3 fuses its
# projections and is spelt out below.
LLAMA_FILES = {
    "vicuna-7b": (32000, 4096, 4096, 11008, 32, 128),
    "vicuna-13b": (32000, 5120, 5120, 13824, 40, 128),
    "llama-3-8b": (128256, 4096, 1024, 14336, 32, 128),
    "yi-1.5-34b": (64000, 7168, 1024, 20480, 60, 128),
}
PHI_3_FILE = {
    "model.embed_tokens.weight": (32064, 3072),
    "model.layers.31.self_attn.qkv_proj.weight": (9216, 3072),
    "model.layers.31.self_attn.o_proj.weight": (3072, 3072),
    "model.layers.31.mlp.gate_up_proj.weight": (16384, 3072),
    "model.layers.31.mlp.down_proj.weight": (3072, 8192),
    "lm_head.weight": (32064, 3072),
}
CLIP_FILE = {
    "vision_model.embeddings.class_embedding": (1024,),
    "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_model.embeddings.position_embedding.weight": (577, 1024),
    "vision_model.encoder.layers.23.self_attn.k_proj.weight": (1024, 1024),
    "vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    "vision_model.encoder.layers.23.mlp.fc2.weight": (1024, 4096),
}
CONVNEXT_FILE = {
    "visual.trunk.stem.0.weight": (192, 3, 4, 4),
    "visual.trunk.stages.0.blocks.2.conv_dw.weight": (192, 1, 7, 7),
    "visual.trunk.stages.1.blocks.2.gamma": (384,),
    "visual.trunk.stages.2.blocks.26.mlp.fc1.weight": (3072, 768),
    "visual.trunk.stages.3.downsample.1.weight": (1536, 768, 2, 2),
    "visual.trunk.stages.3.blocks.2.mlp.fc2.weight": (1536, 6144),
}


def llm_file(name):
    """Some tensors of a published language model, the number of its layers and the width of its heads."""
    if name == "phi-3-mini":
        return PHI_3_FILE, 32, 96
    vocabulary, width, keys, hidden, layers, head = LLAMA_FILES[name]
    last = f"model.layers.{layers - 1}."
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        f"{last}self_attn.q_proj.weight": (width, width),
        f"{last}self_attn.k_proj.weight": (keys, width),
        f"{last}self_attn.v_proj.weight": (keys, width),
        f"{last}mlp.gate_proj.weight": (hidden, width),
        f"{last}mlp.down_proj.weight": (width, hidden),
        "lm_head.weight": (vocabulary, width),
    }
    return shapes, layers, head


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


def blocks(shapes, pattern):
    """How many numbered blocks there are, and that they are numbered without a gap."""
    numbers = {int(found[1]) for key in shapes if (found := re.match(pattern, key))}
    assert numbers == set(range(len(numbers)))
    return len(numbers)


def test_sizes_are_those_of_the_published_files(published):
    """The other tests derive the original shapes from the presets; this one holds them against facts."""
    name, config, (llm, clip, convnext) = published
    expected, layers, head = llm_file(name)
    assert {key: tuple(llm.get(key, ())) for key in expected} == expected
    assert blocks(llm, r"model\.layers\.(\d+)\.") == layers
    assert config.text_config.hidden_size // config.text_config.num_attention_heads == head
    assert {key: tuple(clip.get(key, ())) for key in CLIP_FILE} == CLIP_FILE
    assert blocks(clip, r"vision_model\.encoder\.layers\.(\d+)\.") == 24
    assert config.vision_config.num_attention_heads == 16
    assert {key: tuple(convnext.get(key, ())) for key in CONVNEXT_FILE} == CONVNEXT_FILE
    depths = [blocks(convnext, rf"visual\.trunk\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    assert depths == [3, 3, 27, 3]


def test_placeholders_end_a_table_that_grows(published):
    """Added rows are untrained; the model hides those up to the last placeholder."""
    _, config, _ = published
    rows, own = config.text_config.vocab_size, config.text_vocab_size
    ids = (config.image_token_id, config.object_token_id)
    assert ids == (rows - 2, rows - 1) if rows > own else max(ids) < own


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
