"""Conversion: golden values through the Auto classes, every form of input, every error, safe output."""

import fnmatch
import json
import re
import shutil
import sys

import pytest
import torch
from conversion_cases import (
    GOLDEN,
    Sources,
    edit_safetensors,
    failure,
    golden_state_dict,
    save_sharded,
    save_zero,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from mgllava import MGLlavaForConditionalGeneration
from mgllava.conversion import ConversionError, convert, parts, tokenizer, write

GAMMA = "visual.trunk.stages.1.blocks.0.gamma"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden checkpoint, converted once: the folder and its weights."""
    output = tmp_path_factory.mktemp("converted") / "model"
    Sources().convert(output)
    return output, load_file(output / "model.safetensors")


def assert_same_weights(output, expected):
    actual = {}
    for file in output.glob("*.safetensors"):
        actual |= load_file(file)
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not different


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# --- the golden model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_run(converted):
    """Model, its inputs for the golden picture, and the expected values."""
    output, _ = converted
    model, loading = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(output)
    expected = load_file(GOLDEN / "expected.safetensors")
    detections = json.loads((GOLDEN / "detections.json").read_text())
    pixels = processor.image_processor(
        str(GOLDEN / "image.png"), detections=[detections], return_tensors="pt"
    )
    placeholders = [model.config.image_token_id] * model.config.num_image_tokens
    placeholders += [model.config.object_token_id] * len(expected["boxes"])
    ids = []
    for token in expected["input_ids"][0].tolist():
        ids += placeholders if token == -200 else [token]
    return model.eval(), {"input_ids": torch.tensor([ids]), **pixels}, expected


def test_golden_boxes(golden_run):
    _, inputs, expected = golden_run
    assert torch.equal(inputs["boxes"][0], expected["boxes"])


@torch.no_grad()
def test_golden_tokens(golden_run):
    model, inputs, expected = golden_run
    pictures = {
        name: inputs[name] for name in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")
    }
    tokens = model.get_image_features(**pictures).pooler_output[0]
    count = model.config.num_image_tokens
    assert relative_error(tokens[:count], expected["image_tokens"][0]) < 1e-4
    assert relative_error(tokens[count:], expected["object_tokens"]) < 1e-4


@torch.no_grad()
def test_golden_logits(golden_run):
    model, inputs, expected = golden_run
    logits = model(**inputs).logits[..., : model.config.text_vocab_size]
    assert relative_error(logits, expected["logits"]) < 1e-3


@torch.no_grad()
def test_golden_greedy_tokens(golden_run):
    model, inputs, expected = golden_run
    output = model.generate(**inputs, max_new_tokens=len(expected["greedy"]), do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected["greedy"].tolist()


def test_weights_are_the_originals(converted):
    _, weights = converted
    original = golden_state_dict()
    head = weights["lm_head.weight"]
    assert head.shape[0] == 98
    assert torch.equal(head[:96], original["llm.lm_head.weight"])
    assert torch.equal(weights["model.fusion.gate_in.weight"], original["fuse_module.gate.0.weight"])
    assert torch.equal(
        weights["model.object_projector.linear_2.bias"], original["bbox_projector.model.2.bias"]
    )
    clip = load_file(GOLDEN / "clip" / "model.safetensors")
    assert torch.equal(weights["model.vision_tower.pre_layrnorm.bias"], clip["pre_layrnorm.bias"])
    convnext = load_file(GOLDEN / "convnext" / "open_clip_model.safetensors")
    assert torch.equal(weights["model.high_res_tower.stages.1.blocks.0.gamma"], convnext[GAMMA])
    assert not any(torch.isnan(value).any() for value in weights.values())


def test_every_parameter_is_written(converted):
    output, weights = converted
    model = MGLlavaForConditionalGeneration.from_pretrained(output, device_map="meta")
    assert weights.keys() == model.state_dict().keys()


# --- the forms of input ---------------------------------------------------------------------------


def test_checkpoint_as_safetensors(converted, tmp_path):
    save_file(golden_state_dict(), tmp_path / "checkpoint.safetensors")
    Sources().with_checkpoint(tmp_path / "checkpoint.safetensors").convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_checkpoint_in_shards(converted, tmp_path, stem, suffix):
    save_sharded(golden_state_dict(), tmp_path / "checkpoint", stem, suffix)
    Sources().with_checkpoint(tmp_path / "checkpoint").convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


@pytest.mark.parametrize("nest", [("state_dict",), ("module",), ("state_dict", "model"), ()])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_nested_and_prefixed_checkpoint(converted, tmp_path, nest, prefix):
    content = {prefix + name: value for name, value in golden_state_dict().items()}
    for key in nest:
        content = {key: content, "epoch": 1, "step": torch.tensor(7)}
    torch.save(content, tmp_path / "checkpoint.pth")
    Sources().with_checkpoint(tmp_path / "checkpoint.pth").convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


def test_legacy_checkpoint(converted, tmp_path):
    torch.save(golden_state_dict(), tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=False)
    Sources().with_checkpoint(tmp_path / "checkpoint.pth").convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 3, 11])
def test_zero_shards_are_merged(converted, tmp_path, stage, ranks):
    save_zero(golden_state_dict(), tmp_path / "iter_100.pth", stage=stage, ranks=ranks)
    Sources().with_checkpoint(tmp_path / "iter_100.pth").convert(tmp_path / "out", dtype="float32")
    assert_same_weights(tmp_path / "out", converted[1])


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_frozen_and_shared_parameters(converted, tmp_path, stage):
    tensors = golden_state_dict()
    tensors["llm.lm_head.weight"] = tensors["llm.model.embed_tokens.weight"]
    save_zero(
        tensors,
        tmp_path / "iter_100.pth",
        stage=stage,
        ranks=3,
        frozen=("llm.model.norm.weight", "fuse_module.gate.0.bias"),
        shared={"llm.lm_head.weight": "llm.model.embed_tokens.weight"},
    )
    Sources().with_checkpoint(tmp_path / "iter_100.pth").convert(tmp_path / "out", dtype="float32")
    expected = dict(converted[1])
    expected["lm_head.weight"] = expected["model.language_model.embed_tokens.weight"]
    assert_same_weights(tmp_path / "out", expected)


def test_zero_folder_found_through_latest(converted, tmp_path):
    save_zero(golden_state_dict(), tmp_path / "iter_100", stage=2, ranks=2)
    (tmp_path / "latest").write_text("iter_100\n")
    Sources().with_checkpoint(tmp_path).convert(tmp_path / "out", dtype="float32")
    assert_same_weights(tmp_path / "out", converted[1])


def test_zero_default_dtype_is_the_one_trained_in(tmp_path):
    save_zero(golden_state_dict(), tmp_path / "iter_100.pth", stage=2, ranks=2)
    plan = Sources().with_checkpoint(tmp_path / "iter_100.pth").convert(None, dry_run=True).plan
    assert plan.dtype == torch.bfloat16


def test_zero_2_without_optimizer_shards_uses_the_model_state(converted, tmp_path):
    folder = tmp_path / "iter_100.pth"
    save_zero(golden_state_dict(), folder, stage=2, ranks=2)
    for file in folder.glob("*_optim_states.pt"):
        file.unlink()
    Sources().with_checkpoint(folder).convert(tmp_path / "out")
    expected = {name: value.bfloat16() for name, value in converted[1].items()}
    assert_same_weights(tmp_path / "out", expected)


def test_stage_1_checkpoint_takes_the_language_model_from_its_folder(converted, tmp_path):
    tensors = {name: value for name, value in golden_state_dict().items() if not name.startswith("llm.")}
    # A buffer that came along does not make the language model the checkpoint's.
    tensors["llm.model.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save({"state_dict": tensors}, tmp_path / "stage_1.pth")
    Sources().with_checkpoint(tmp_path / "stage_1.pth").convert(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    folder = load_file(GOLDEN / "llm" / "model.safetensors")
    norm = "model.language_model.norm.weight"
    assert torch.equal(weights[norm], folder["model.norm.weight"])
    projector = "model.image_projector.linear_1.weight"
    assert torch.equal(weights[projector], converted[1][projector])


def test_language_model_folder_may_lack_weights_the_checkpoint_has(converted, tmp_path):
    sources = Sources().copied("llm", tmp_path)
    (sources.llm / "model.safetensors").unlink()
    sources.convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


def test_language_model_as_bin_with_old_rotary_buffers(tmp_path):
    tensors = {name: value for name, value in golden_state_dict().items() if not name.startswith("llm.")}
    torch.save(tensors, tmp_path / "stage_1.pth")
    sources = Sources().copied("llm", tmp_path).with_checkpoint(tmp_path / "stage_1.pth")
    weights = load_file(sources.llm / "model.safetensors")
    (sources.llm / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(weights, sources.llm / "pytorch_model.bin")
    result = sources.convert(tmp_path / "out")
    assert "llm: model.layers.0.self_attn.rotary_emb.inv_freq -> not used" in str(result.plan)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        converted["model.language_model.embed_tokens.weight"][:96], weights["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_whole_clip_model(converted, tmp_path, suffix):
    sources = Sources().copied("clip", tmp_path)
    vision = json.loads((sources.clip / "config.json").read_text())
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    tensors = {name: value.contiguous() for name, value in CLIPModel(config).state_dict().items()}
    tower = load_file(sources.clip / "model.safetensors")
    tensors |= {f"vision_model.{name}": value for name, value in tower.items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (sources.clip / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(tensors, sources.clip / "pytorch_model.bin")
    else:
        save_sharded(tensors, sources.clip, "model", "safetensors")
    config.save_pretrained(sources.clip)
    sources.convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


def test_clip_in_the_older_layout_of_its_vision_half(converted, tmp_path):
    sources = Sources().copied("clip", tmp_path)
    tower = load_file(sources.clip / "model.safetensors")
    save_file(
        {f"vision_model.{name}": value for name, value in tower.items()}, sources.clip / "model.safetensors"
    )
    sources.convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])


def test_convnext_as_bin_with_its_text_tower(converted, tmp_path):
    sources = Sources().copied("convnext", tmp_path)
    tensors = load_file(sources.convnext / "open_clip_model.safetensors")
    extra = [
        "positional_embedding",
        "text_projection",
        "logit_scale",
        "logit_bias",
        "token_embedding.weight",
        "ln_final.bias",
        "transformer.resblocks.0.attn.in_proj_weight",
        "text.transformer.resblocks.0.ln_1.weight",
        "visual.trunk.norm_pre.weight",
        "visual.head.mlp.fc1.weight",
    ]
    torch.save(
        tensors | dict.fromkeys(extra, torch.ones(2)), sources.convnext / "open_clip_pytorch_model.bin"
    )
    (sources.convnext / "open_clip_model.safetensors").unlink()
    result = sources.convert(tmp_path / "out")
    assert_same_weights(tmp_path / "out", converted[1])
    assert {key for source, key, _ in result.plan.mapping.unused if source == "convnext"} >= set(extra)


def test_towers_in_the_checkpoint_replace_their_folders(converted, tmp_path):
    tensors = golden_state_dict()
    tower = load_file(GOLDEN / "clip" / "model.safetensors")
    tensors |= {f"visual_encoder.vision_model.{name}": value + 1 for name, value in tower.items()}
    torch.save(tensors, tmp_path / "checkpoint.pth")
    Sources().with_checkpoint(tmp_path / "checkpoint.pth").convert(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = "post_layernorm.weight"
    assert torch.equal(weights[f"model.vision_tower.{name}"], tower[name] + 1)


def test_fusion_variant_is_detected(tmp_path):
    cases = {
        "gate_concat": (64, lambda name: True),
        "concat_projected": (64, lambda name: not name.startswith("fuse_module.gate.")),
        "concat_raw": (96, lambda name: not name.startswith("fuse_module.")),
    }
    for variant, (width, keep) in cases.items():
        tensors = {name: value for name, value in golden_state_dict().items() if keep(name)}
        tensors["projector.model.0.weight"] = torch.randn(48, width)
        torch.save(tensors, tmp_path / "checkpoint.pth")
        plan = Sources().with_checkpoint(tmp_path / "checkpoint.pth").convert(None, dry_run=True).plan
        assert plan.config.fusion_variant == variant


# --- what is written ------------------------------------------------------------------------------


def test_dtype(tmp_path):
    Sources().convert(tmp_path / "out", dtype="bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ConversionError, match="dtype"):
        Sources().convert(None, dtype="int8", dry_run=True)


def test_output_shards(converted, tmp_path):
    Sources().convert(tmp_path / "out", max_shard_bytes=300_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all((tmp_path / "out" / file).stat().st_size < 350_000 for file in files)
    assert_same_weights(tmp_path / "out", converted[1])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, converted[1]["lm_head.weight"])


def test_two_parameters_that_shared_memory(converted, tmp_path):
    """Where the checkpoint stores one memory under two names and no row is added, both are written."""
    tensors = golden_state_dict()
    shared = "fuse_module.slow_proj.bias", "fuse_module.fast_conv.bias"
    tensors[shared[1]] = tensors[shared[0]]
    torch.save(tensors, tmp_path / "checkpoint.pth")
    Sources().with_checkpoint(tmp_path / "checkpoint.pth").convert(tmp_path / "out")
    expected = dict(converted[1])
    expected["model.fusion.low_res_conv.bias"] = expected["model.fusion.high_res_proj.bias"]
    assert_same_weights(tmp_path / "out", expected)


def test_progress_is_shown_on_stderr(tmp_path, capsys):
    Sources().convert(tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    Sources().convert(tmp_path / "out", progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "writing weights" in err
    done, total = re.search(r"([\d.]+)/([\d.]+) [kM]B", err).groups()
    assert done == total


def test_progress_moves(tmp_path, monkeypatch):
    """It advances tensor by tensor, by as many bytes as are written in the end."""
    steps = []
    monkeypatch.setattr(write.Progress, "advance", lambda bar, task, size: steps.append(size))
    Sources().convert(tmp_path / "out", progress=True)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(steps) == sorted(value.nbytes for value in weights.values())


def test_output_is_self_contained_and_anonymous(converted):
    output, _ = converted
    text = {file.name: file.read_text() for file in output.iterdir() if file.suffix != ".safetensors"}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json"} <= text.keys()
    assert {"chat_template.jinja", "processor_config.json"} <= text.keys()
    assert not {"is_local", "local_files_only"} & json.loads(text["tokenizer_config.json"]).keys()
    assert not [name for name, content in text.items() if str(GOLDEN.parent) in content]
    assert not [name for name, content in text.items() if str(output.parent) in content]
    assert text["README.md"].startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "| MG-LLaVA checkpoint | mg_llava.pth |" in text["README.md"]
    processor = AutoProcessor.from_pretrained(output)
    assert processor.num_image_tokens == 576
    assert processor.image_processor.high_res_size == 768
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<object>"]) == [96, 97]


def test_generation_settings(converted):
    settings = json.loads((converted[0] / "generation_config.json").read_text())
    assert settings["eos_token_id"] in (2, [2])
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (1, 0)


def test_generation_settings_of_the_language_model(tmp_path):
    sources = Sources().copied("llm", tmp_path)

    def written(name, **settings):
        (sources.llm / "generation_config.json").write_text(json.dumps(settings))
        result = sources.convert(tmp_path / name, template="vicuna")
        return json.loads((tmp_path / name / "generation_config.json").read_text()), result.notes

    sampling, notes = written("sampling", do_sample=True, temperature=0.6, eos_token_id=[5, 7])
    assert (sampling["temperature"], sampling["eos_token_id"], notes) == (0.6, [5, 7, 2], [])
    # Vicuna's own: sampling values without sampling, which saving refuses.
    greedy, notes = written("greedy", temperature=0.9, top_p=0.6, repetition_penalty=1.1)
    assert greedy.get("temperature") in (None, 1.0)
    assert (greedy["repetition_penalty"], notes) == (1.1, [])
    contrary, notes = written("contrary", num_return_sequences=4, repetition_penalty=1.1)
    assert contrary["eos_token_id"] == [2]
    assert contrary.get("num_return_sequences") in (None, 1)
    assert "contradict themselves" in notes[0]


def test_image_statistics_come_from_clip(tmp_path):
    sources = Sources().copied("clip", tmp_path)
    (sources.clip / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    processor = sources.convert(None, dry_run=True).plan.image_processor
    assert processor.image_mean == [0.5, 0.5, 0.5]
    assert processor.image_std[0] == pytest.approx(0.26862954)


def test_dry_run_lists_every_tensor_and_writes_nothing(tmp_path):
    plan = Sources().convert(tmp_path / "out", dry_run=True).plan
    assert not list(tmp_path.iterdir())
    lines = plan.lines()
    assert "checkpoint: fuse_module.slow_conv.bias -> model.fusion.high_res_conv.bias (64,)" in lines
    assert "checkpoint: llm.lm_head.weight -> lm_head.weight (98, 48), 2 rows added" in lines
    assert "convnext: visual.trunk.head.norm.bias -> not used (classification head)" in lines
    keys = {line.split(" -> ")[0] for line in lines}
    assert {f"checkpoint: {name}" for name in golden_state_dict()} <= keys
    clip, convnext = (load_file(next((GOLDEN / part).glob("*.safetensors"))) for part in ("clip", "convnext"))
    assert {f"clip: {name}" for name in clip} | {f"convnext: {name}" for name in convnext} <= keys
    assert len(keys) == len(lines)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, interruption):
    written = []

    def save_then_stop(tensors, path, metadata):
        if len(written) == 2:
            raise interruption
        written.append(path)
        assert not (path.parent / "config.json").exists()
        assert not (tmp_path / "out").exists()

    monkeypatch.setattr(write, "save_file", save_then_stop)
    with pytest.raises(interruption):
        Sources().convert(tmp_path / "out", max_shard_bytes=300_000)
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


def test_run_interrupted_at_the_last_file_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_config", stop)
    with pytest.raises(KeyboardInterrupt):
        Sources().convert(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_output_may_be_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    Sources().convert(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- tokenizer and chat template ------------------------------------------------------------------


def test_spare_rows_take_the_placeholders(tmp_path):
    sources = Sources().copied("llm", tmp_path)
    tokenizer = json.loads((sources.llm / "tokenizer.json").read_text())
    for token in ("w94", "w95"):
        del tokenizer["model"]["vocab"][token]
    (sources.llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    plan = sources.convert(None, dry_run=True).plan
    config = plan.config
    assert (config.image_token_id, config.object_token_id) == (94, 95)
    assert (config.text_config.vocab_size, config.text_vocab_size) == (96, 96)
    assert not any(item.added_rows for item in plan.mapping.assignments)


def test_holes_in_the_vocabulary(tmp_path):
    """A vocabulary that skips an id makes the tokenizers library hand out the last id a second time."""
    sources = Sources().copied("llm", tmp_path)
    tokenizer = json.loads((sources.llm / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["w90"]
    (sources.llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConversionError, match="cannot take <image>: it gives it the id 95 of 'w95'"):
        sources.convert(None, dry_run=True)


def test_tokens_beyond_the_table(tmp_path):
    """A tokenizer larger than the embedding table: the table grows to cover it."""
    sources = Sources().copied("llm", tmp_path)
    tokenizer = json.loads((sources.llm / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"w96": 96, "w97": 97}
    (sources.llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = sources.convert(None, dry_run=True).plan.config
    # The placeholders are its last rows: the model hides what was added up to them.
    assert (config.image_token_id, config.object_token_id) == (98, 99)
    assert (config.text_config.vocab_size, config.text_vocab_size) == (100, 96)


@pytest.mark.parametrize("present", [False, True])
def test_tokens_beyond_the_table_and_the_placeholders(tmp_path, present):
    """Their rows would be untrained and could be generated."""
    sources = Sources().copied("llm", tmp_path)
    tokenizer = json.loads((sources.llm / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    if present:  # placeholders of its own, with tokens after them
        vocabulary |= {"<image>": 96, "<object>": 97, "w98": 98}
    else:  # a hole, which the placeholders fill
        del vocabulary["w95"]
        vocabulary["w98"] = 98
    (sources.llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "gives 'w98' the id 98, the language model has only 96 rows" in failure(sources)


def test_default_template_is_said(converted, tmp_path):
    result = Sources().convert(None, dry_run=True)
    assert [note for note in result.notes if "no chat template" in note and "vicuna" in note]
    assert not Sources().convert(None, dry_run=True, template="vicuna").notes


def test_language_models_own_template(tmp_path):
    sources = Sources().copied("llm", tmp_path)
    own = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (sources.llm / "chat_template.jinja").write_text(own)
    result = sources.convert(tmp_path / "out")
    assert result.notes == ["uses the language model's own chat template"]
    assert own in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert own not in sources.convert(None, dry_run=True, template="vicuna").plan.language.chat_template


@pytest.mark.parametrize(
    ("tokens", "family"),
    [
        (["<|eot_id|>"], "llama-3"),
        (["<|end|>"], "phi-3"),
        (["<|im_end|>"], "chatml"),
        (["<|eot_id|>", "<|im_end|>"], "chatml"),  # both known; the template decides
    ],
)
def test_own_template_names_the_one_trained_with(tmp_path, tokens, family):
    sources = Sources().copied("llm", tmp_path)
    tokenizer = (sources.llm / "tokenizer.json").read_text()
    for number, token in enumerate(tokens):
        tokenizer = tokenizer.replace(f'"w{number + 90}"', f'"{token}"')
    (sources.llm / "tokenizer.json").write_text(tokenizer)
    (sources.llm / "chat_template.jinja").write_text("{{ messages[0]['content'] }}" + tokens[-1])
    assert sources.convert(None, dry_run=True).notes == [
        "uses the language model's own chat template; published MG-LLaVA checkpoints of this family were "
        f"trained with --template {family}"
    ]
    assert not sources.convert(None, dry_run=True, template=family).notes


def test_stop_token_of_the_template_ends_generation(tmp_path):
    sources = Sources().copied("llm", tmp_path)
    tokenizer = (sources.llm / "tokenizer.json").read_text()
    (sources.llm / "tokenizer.json").write_text(tokenizer.replace('"w95"', '"<|eot_id|>"'))
    plan = sources.convert(None, dry_run=True, template="llama-3").plan
    assert plan.language.generation.eos_token_id == [2, 95]
    (sources.llm / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>")
    plan = sources.convert(None, dry_run=True).plan
    assert plan.language.generation.eos_token_id == [2, 95]


def test_template_that_does_not_fit(tmp_path):
    with pytest.raises(ConversionError, match=r"<\|end\|>"):
        Sources().convert(None, dry_run=True, template="phi-3")
    with pytest.raises(ConversionError, match="expected one of vicuna"):
        Sources().convert(None, dry_run=True, template="vicunya")


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "GemmaTokenizer"])
def test_byte_level_vocabulary_behind_a_sentencepiece_class(tmp_path, tokenizer_class):
    """transformers 5 rebuilds such classes with SentencePiece rules whatever tokenizer.json says."""
    sources = Sources().copied("llm", tmp_path)
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet())[:90]:
        vocab[character] = len(vocab)
    vocab["Ġ"] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(sources.llm / "tokenizer.json"))
    settings = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    (sources.llm / "tokenizer_config.json").write_text(json.dumps(settings))
    (sources.llm / "chat_template.jinja").write_text("the model's own")
    result = sources.convert(tmp_path / "out")
    assert "the model's own" in result.plan.language.chat_template
    loaded = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    text = "what is in the image"
    assert loaded.encode(text, add_special_tokens=False) == raw.encode(text).ids
    assert loaded.eos_token_id == 2
    # Some releases see through LlamaTokenizer themselves; none does for Gemma's.
    disagreed = not tokenizer._agrees(
        AutoTokenizer.from_pretrained(sources.llm), sources.llm / "tokenizer.json"
    )
    assert disagreed or tokenizer_class == "LlamaTokenizer"
    assert disagreed == any("splits text differently" in note for note in result.notes)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_file_alone(tmp_path, legacy):
    """Vicuna is published without tokenizer.json: ids are those of SentencePiece, leading spaces included."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sources = Sources().copied("llm", tmp_path)
    for file in ("tokenizer.json", "model.safetensors"):
        (sources.llm / file).unlink()
    lines = [f"what is in the image number {number} ? two cats and {number} dogs" for number in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(sources.llm / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (sources.llm / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((sources.llm / "config.json").read_text())
    (sources.llm / "config.json").write_text(json.dumps(config | {"vocab_size": 320}))
    tensors = golden_state_dict()
    tensors |= {
        name: torch.randn(320, 48) for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight")
    }
    torch.save(tensors, tmp_path / "checkpoint.pth")
    result = sources.with_checkpoint(tmp_path / "checkpoint.pth").convert(tmp_path / "out", template="vicuna")
    assert not result.notes
    original = sentencepiece.SentencePieceProcessor(model_file=str(sources.llm / "tokenizer.model"))
    loaded = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    for text in ("what is in the image ?", "  two  cats", " dogs\n", "naïve 猫"):
        assert loaded.encode(text, add_special_tokens=False) == original.encode(text)
        assert loaded.decode(original.encode(text)) == text
    assert loaded.encode("two cats")[0] == loaded.bos_token_id
    assert loaded.encode("two<image>cats")[1:] == [*original.encode("two"), 320, *original.encode("cats")]
    assert loaded.pad_token == "<unk>"


def test_sentencepiece_missing(tmp_path, monkeypatch):
    sources = Sources().copied("llm", tmp_path)
    (sources.llm / "tokenizer.json").rename(sources.llm / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece" in failure(sources)


# --- errors ---------------------------------------------------------------------------------------


def test_missing_gamma_is_an_error(tmp_path):
    sources = Sources().copied("convnext", tmp_path)
    edit_safetensors(sources.convnext / "open_clip_model.safetensors", lambda tensors: tensors.pop(GAMMA))
    message = failure(sources)
    assert "missing" in message
    assert "convnext: model.high_res_tower.stages.1.blocks.0.gamma (32,)" in message


def test_all_wrong_keys_are_listed(tmp_path):
    sources = Sources().copied("clip", tmp_path)

    def damage(tensors):
        tensors["encoder.layers.7.mlp.fc1.bias"] = torch.ones(3)
        tensors["pre_layrnorm.weight"] = torch.ones(31)
        del tensors["pre_layrnorm.bias"], tensors["post_layernorm.bias"]

    edit_safetensors(sources.clip / "model.safetensors", damage)
    tensors = golden_state_dict()
    tensors["fuse_module.gate.4.weight"] = torch.ones(1)
    tensors["multi_level_linear.0.weight"] = torch.ones(1)
    torch.save(tensors, tmp_path / "checkpoint.pth")
    message = failure(sources.with_checkpoint(tmp_path / "checkpoint.pth"))
    assert "missing: parameters no source gives values for (2):" in message
    assert "clip: model.vision_tower.pre_layrnorm.bias (32,)" in message
    assert "clip: model.vision_tower.post_layernorm.bias (32,)" in message
    assert "left over: keys without a home in the model (3):" in message
    assert "checkpoint: fuse_module.gate.4.weight (1,)" in message
    assert "checkpoint: multi_level_linear.0.weight (1,)" in message
    assert "clip: encoder.layers.7.mlp.fc1.bias (3,)" in message
    assert "clip: pre_layrnorm.weight is (31,), expected (32,)" in message


def test_key_given_twice(tmp_path):
    sources = Sources().copied("clip", tmp_path)
    edit_safetensors(
        sources.clip / "model.safetensors",
        lambda tensors: tensors.update({"vision_model.pre_layrnorm.bias": torch.ones(32)}),
    )
    assert "given twice (1)" in failure(sources)


def test_incomplete_language_model_in_the_checkpoint_is_not_patched_from_the_folder(tmp_path):
    tensors = golden_state_dict()
    del tensors["llm.model.layers.1.mlp.up_proj.weight"]
    torch.save(tensors, tmp_path / "checkpoint.pth")
    message = failure(Sources().with_checkpoint(tmp_path / "checkpoint.pth"))
    assert "checkpoint: model.language_model.layers.1.mlp.up_proj.weight (96, 48)" in message


@pytest.mark.parametrize(
    "keys",
    [
        ["bert.encoder.layer.0.output.dense.weight", "cls.predictions.bias"],
        ["model.embed_tokens.weight", "model.mm_projector.0.weight", "lm_head.weight"],
        ["llm.model.embed_tokens.weight"],
    ],
)
def test_checkpoint_of_another_model(tmp_path, keys):
    save_file({key: torch.ones(2) for key in keys}, tmp_path / "model.safetensors")
    message = failure(Sources().with_checkpoint(tmp_path / "model.safetensors"))
    assert "not an MG-LLaVA checkpoint" in message
    assert "bbox_projector.model.0.weight" in message
    assert keys[0] in message


def test_converted_checkpoint(converted):
    assert "converted already" in failure(Sources().with_checkpoint(converted[0]))


def test_lora_adapters_are_named(tmp_path):
    tensors = golden_state_dict()
    adapter = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[adapter] = torch.ones(8, 48)
    torch.save(tensors, tmp_path / "checkpoint.pth")
    message = failure(Sources().with_checkpoint(tmp_path / "checkpoint.pth"))
    assert "LoRA" in message
    assert adapter in message


def test_wrong_vocabulary_size(tmp_path):
    tensors = golden_state_dict()
    tensors["llm.lm_head.weight"] = torch.ones(100, 48)
    torch.save(tensors, tmp_path / "checkpoint.pth")
    message = failure(Sources().with_checkpoint(tmp_path / "checkpoint.pth"))
    assert "checkpoint: llm.lm_head.weight is (100, 48), expected (96, 48)" in message


def test_missing_shard(tmp_path):
    sources = Sources().copied("clip", tmp_path)
    save_sharded(load_file(sources.clip / "model.safetensors"), sources.clip, "model", "safetensors")
    (sources.clip / "model-00002-of-00002.safetensors").unlink()
    message = failure(sources)
    assert "clip is incomplete" in message
    assert "model-00002-of-00002.safetensors" in message


def test_tensor_missing_from_its_shard(tmp_path):
    sources = Sources().copied("clip", tmp_path)
    save_sharded(load_file(sources.clip / "model.safetensors"), sources.clip, "model", "safetensors")
    edit_safetensors(
        sources.clip / "model-00001-of-00002.safetensors",
        lambda tensors: tensors.pop("embeddings.class_embedding"),
    )
    assert "embeddings.class_embedding" in failure(sources)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("llm", "model.safetensors"),
        ("clip", "model.safetensors"),
        ("convnext", "open_clip_model.safetensors"),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.9])
def test_truncated_safetensors(tmp_path, part, file, kept):
    sources = Sources().copied(part, tmp_path)
    path = getattr(sources, part) / file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert f"{file} is truncated" in failure(sources)


@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_truncated_checkpoint(tmp_path, kept):
    content = (GOLDEN / "mg_llava.pth").read_bytes()
    (tmp_path / "mg_llava.pth").write_bytes(content[: int(len(content) * kept)])
    message = failure(Sources().with_checkpoint(tmp_path / "mg_llava.pth"))
    assert "mg_llava.pth is truncated" in message


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("llm", "config.json"),
        ("llm", "tokenizer.json"),
        ("clip", "config.json"),
        ("clip", "model.safetensors"),
        ("convnext", "open_clip_config.json"),
        ("convnext", "open_clip_model.safetensors"),
    ],
)
def test_half_written_folder(tmp_path, part, file):
    sources = Sources().copied(part, tmp_path)
    (getattr(sources, part) / file).unlink()
    message = failure(sources)
    assert f"--{part} {part}" in message
    assert file in message


@pytest.mark.parametrize("stage", [2, 3])
def test_missing_zero_shard(tmp_path, stage):
    folder = tmp_path / "iter_100.pth"
    save_zero(golden_state_dict(), folder, stage=stage, ranks=3)
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    message = failure(Sources().with_checkpoint(folder))
    assert "3 ranks" in message
    assert "2 files" in message


def test_zero_3_without_optimizer_shards(tmp_path):
    folder = tmp_path / "iter_100.pth"
    save_zero(golden_state_dict(), folder, stage=3, ranks=2)
    for file in folder.glob("*_optim_states.pt"):
        file.unlink()
    assert "_optim_states.pt" in failure(Sources().with_checkpoint(folder))


def test_tensor_parallel_checkpoint(tmp_path):
    folder = tmp_path / "iter_100.pth"
    save_zero(golden_state_dict(), folder, stage=2, ranks=2)
    shutil.copyfile(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    assert "tensor parallelism" in failure(Sources().with_checkpoint(folder))


def test_wrong_folders(tmp_path):
    golden = Sources()
    assert "no such file" in failure(golden.with_checkpoint(tmp_path / "none.pth"))
    assert "holds no checkpoint" in failure(golden.with_checkpoint(tmp_path))
    assert "no such folder" in failure(Sources(llm=tmp_path / "none"))
    assert "expected a CLIP model" in failure(Sources(clip=GOLDEN / "llm"))
    assert "expected a causal language model" in failure(Sources(llm=GOLDEN / "clip"))
    assert "open_clip_config.json" in failure(Sources(convnext=GOLDEN / "clip"))


def test_hub_id_offline():
    message = failure(Sources(clip="nobody-here/no-such-model"))
    assert "--clip nobody-here/no-such-model" in message
    assert "Offline" in message


class FakeHub:
    """Serves folders under hub ids and remembers which files were fetched."""

    def __init__(self, cache, **folders):
        self.cache, self.folders, self.fetched = cache, folders, []

    def snapshot_download(self, repo_id, allow_patterns, ignore_patterns):
        folder = self.cache / repo_id.replace("/", "--")
        folder.mkdir(exist_ok=True)
        for file in self.folders[repo_id.split("/")[1]].iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, folder / file.name)
                self.fetched.append(f"{repo_id}/{file.name}")
        return str(folder)


@pytest.mark.parametrize("stage", [1, 2])
def test_hub_ids(converted, tmp_path, monkeypatch, stage):
    tensors = golden_state_dict()
    if stage == 1:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("llm.")}
    torch.save(tensors, tmp_path / "checkpoint.pth")
    llm_folder = Sources().copied("llm", tmp_path).llm
    (llm_folder / "model.safetensors").unlink()
    weights = load_file(GOLDEN / "llm" / "model.safetensors")
    save_sharded(weights, llm_folder, "model", "safetensors")
    save_sharded(weights, llm_folder, "pytorch_model", "bin")
    hub = FakeHub(tmp_path, llm=llm_folder, clip=GOLDEN / "clip", convnext=GOLDEN / "convnext")
    monkeypatch.setattr(parts, "snapshot_download", hub.snapshot_download)
    Sources(tmp_path / "checkpoint.pth", "owner/llm", "owner/clip", "owner/convnext").convert(
        tmp_path / "out"
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == converted[1].keys()
    source = weights["model.embed_tokens.weight"] if stage == 1 else tensors["llm.model.embed_tokens.weight"]
    assert torch.equal(written["model.language_model.embed_tokens.weight"][:96], source)
    # One format only, and nothing that the checkpoint has.
    assert not [file for file in hub.fetched if file.endswith(".bin")]
    shards = [file for file in hub.fetched if file.startswith("owner/llm/") and file.endswith("safetensors")]
    assert len(shards) == (2 if stage == 1 else 0)
    assert "| language model | owner/llm |" in (tmp_path / "out" / "README.md").read_text()


def test_unknown_convnext(tmp_path):
    sources = Sources().copied("convnext", tmp_path)
    path = sources.convnext / "open_clip_config.json"
    path.write_text(path.read_text().replace("test_convnext", "convnext_enormous"))
    assert "convnext_enormous" in failure(sources)


def test_output_taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConversionError, match="not empty"):
        Sources().convert(tmp_path / "out")
    with pytest.raises(ConversionError, match="a file"):
        Sources().convert(tmp_path / "out" / "thesis.txt")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_disk_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(ConversionError, match="GB free"):
        Sources().convert(tmp_path / "out")
    assert not list(tmp_path.iterdir())
