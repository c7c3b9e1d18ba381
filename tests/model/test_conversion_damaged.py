"""Sources that are damaged or unsuitable: each gives a ConversionError that names the file and the problem."""

import json
import zipfile

import pytest
import torch
from conversion_cases import Sources, edit_safetensors, failure, golden_state_dict, save_zero
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mgllava.conversion import ConversionError
from mgllava.conversion.pickles import read_pickle

EMBEDDING, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"


def edited(part, file, tmp_path, **values):
    """The golden sources with values of one JSON file replaced."""
    sources = Sources().copied(part, tmp_path)
    path = getattr(sources, part) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return sources


def saved(tensors, tmp_path):
    torch.save({"state_dict": tensors}, tmp_path / "checkpoint.pth")
    return Sources().with_checkpoint(tmp_path / "checkpoint.pth")


# --- what would not load --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float64", "int8", "bool", "nn", "bananas", torch.float8_e5m2]
)
def test_dtypes_that_are_not_written(dtype):
    message = failure(Sources(), dtype=dtype)
    assert str(dtype) in message
    assert "float32, bfloat16, float16" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_dtypes_that_are_written(tmp_path, dtype):
    Sources().convert(tmp_path / "out", dtype=dtype)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_float64_becomes_float32(tmp_path):
    tensors = {name: value.double() for name, value in golden_state_dict().items()}
    plan = saved(tensors, tmp_path).convert(None, dry_run=True).plan
    assert plan.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_are_no_weights(tmp_path, dtype):
    tensors = golden_state_dict()
    for name in ("llm.model.layers.1.mlp.up_proj.weight", "fuse_module.gate.0.bias"):
        tensors[name] = tensors[name].to(dtype)
    message = failure(saved(tensors, tmp_path))
    assert "of a type that holds no weights; quantised ones are not converted (2):" in message
    name = str(dtype).removeprefix("torch.")
    assert f"checkpoint: llm.model.layers.1.mlp.up_proj.weight is {name}" in message
    assert f"checkpoint: fuse_module.gate.0.bias is {name}" in message
    assert "missing" not in message


@pytest.mark.parametrize("part", ["llm", "clip"])
def test_quantised_parts(tmp_path, part):
    sources = edited(part, "config.json", tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    message = failure(sources)
    assert f"--{part} {part}: config.json has a quantization_config" in message
    assert "unquantised" in message


def test_tied_head_of_other_values(tmp_path):
    sources = edited("llm", "config.json", tmp_path, tie_word_embeddings=True)
    message = failure(sources, tmp_path / "out")
    assert f"checkpoint: {HEAD} differs from {EMBEDDING}" in message
    assert "tie_word_embeddings" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["stage 1", "stage 2", "stage 2 without a head"])
def test_tied_head_of_the_same_values(tmp_path, case):
    """The head that counts is that of the source the embedding is from."""
    sources = edited("llm", "config.json", tmp_path, tie_word_embeddings=True)
    tensors = golden_state_dict()
    if case == "stage 1":
        tensors = {name: value for name, value in tensors.items() if not name.startswith("llm.")}

        def tie(weights):
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

        edit_safetensors(sources.llm / "model.safetensors", tie)
    elif case == "stage 2":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    else:
        del tensors[HEAD]
    torch.save(tensors, tmp_path / "checkpoint.pth")
    sources.with_checkpoint(tmp_path / "checkpoint.pth").convert(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EMBEDDING, "fuse_module.gate.0.bias"])
def test_weights_that_are_not_finite(tmp_path, name, value):
    tensors = golden_state_dict()
    tensors[name].flatten()[7] = value
    message = failure(saved(tensors, tmp_path), tmp_path / "out", dtype="float16")
    assert message == f"weights that are NaN or infinite; the file is damaged:\n    checkpoint: {name}"
    assert not (tmp_path / "out").exists()


def test_weights_too_large(tmp_path):
    tensors = golden_state_dict()
    tensors[EMBEDDING][3, 3] = -1e5
    tensors["fuse_module.gate.0.bias"][3] = 1e5
    sources = saved(tensors, tmp_path)
    message = failure(sources, tmp_path / "out", dtype="float16")
    assert "too large for float16; choose --dtype bfloat16 or float32" in message
    assert f"checkpoint: {EMBEDDING}" in message
    assert "checkpoint: fuse_module.gate.0.bias" in message
    assert not (tmp_path / "out").exists()
    sources.convert(tmp_path / "out", dtype="bfloat16")


# --- damaged descriptions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("llm", {"hidden_size": 50}),
        ("llm", {"hidden_size": None}),
        ("llm", {"vocab_size": "x"}),
        ("llm", {"vocab_size": None}),
        ("llm", {"num_hidden_layers": "2"}),
        ("llm", {"rope_scaling": {"type": "foo"}, "rope_parameters": None}),
        ("llm", {"dtype": "bananas"}),
        ("llm", {"model_type": 7}),
        ("llm", {"model_type": ["llama"]}),
        ("clip", {"hidden_size": 33}),
        ("clip", {"patch_size": "a"}),
        ("clip", {"patch_size": 0}),
        ("clip", {"patch_size": 1000}),
        ("clip", {"image_size": None}),
        ("clip", {"hidden_act": "bananas"}),
    ],
)
def test_config(tmp_path, part, values):
    message = failure(edited(part, "config.json", tmp_path, **values))
    assert message.startswith(f"--{part} {part}: ")
    assert "config.json" in message


@pytest.mark.parametrize(
    "model_cfg",
    [
        None,
        [],
        {"vision_cfg": None},
        {"vision_cfg": []},
        {"vision_cfg": {"timm_model_name": 3}},
        {"vision_cfg": {"timm_model_name": "resnet18"}},
        {"vision_cfg": {"timm_model_name": "test_vit"}},
    ],
)
def test_open_clip_config(tmp_path, model_cfg):
    message = failure(edited("convnext", "open_clip_config.json", tmp_path, model_cfg=model_cfg))
    assert "convnext" in message or "no MG-LLaVA model" in message


@pytest.mark.parametrize(
    "values",
    [
        {"image_mean": None},
        {"image_mean": "x"},
        {"image_mean": [0.5]},
        {"image_mean": [0.5, 0.5, 0.5, 0.5]},
        {"image_mean": [0.5, 0.5, None]},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_std": [0, 0, 0]},
        {"image_std": [0.5, 0.5, -0.5]},
    ],
)
def test_image_statistics(tmp_path, values):
    message = failure(edited("clip", "preprocessor_config.json", tmp_path, **values))
    assert "--clip clip: preprocessor_config.json" in message
    assert next(iter(values)) in message


@pytest.mark.parametrize("settings", [{"eos_token_id": [[2]]}, {"max_new_tokens": "x"}, {"eos_token_id": {}}])
def test_generation_settings(tmp_path, settings):
    """Refused, or left out with a note."""
    sources = edited("llm", "generation_config.json", tmp_path, **settings)
    try:
        told = sources.convert(tmp_path / "out").notes
    except ConversionError as error:
        told = [str(error)]
    assert any("generation settings" in text or "generation_config.json" in text for text in told)


@pytest.mark.parametrize(
    "content", ['{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"a": 3}', "[]", "null", "[" * 100_000]
)
def test_index(tmp_path, content):
    sources = Sources().copied("clip", tmp_path)
    (sources.clip / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json in clip is no index of weight files" in failure(sources)


def test_nested_description(tmp_path):
    sources = Sources().copied("clip", tmp_path)
    (sources.clip / "config.json").write_text("[" * 100_000)
    assert "--clip clip: config.json is no valid JSON" in failure(sources)


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"a\0b", b"absent"])
def test_latest(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    message = failure(Sources().with_checkpoint(tmp_path))
    assert f"--checkpoint {tmp_path.name}" in message


def test_damaged_zero_state(tmp_path):
    folder = tmp_path / "iter_100.pth"
    save_zero(golden_state_dict(), folder, stage=2, ranks=2)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": {}, "param_shapes": [{"a": "x"}, {"b": 7}]}, path)
    assert "--checkpoint iter_100.pth: a damaged DeepSpeed checkpoint" in failure(
        Sources().with_checkpoint(folder)
    )


@pytest.mark.parametrize("foreign", [False, True])
def test_deeply_nested_pickle(tmp_path, foreign):
    """Both readers: PyTorch's own, and the one for files with foreign names in them."""
    depth = 200_000
    name = b"cforeign\nthing\n0" if foreign else b""
    with zipfile.ZipFile(tmp_path / "deep.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + name + b"]" * depth + b"a" * (depth - 1) + b".")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ConversionError, match=r"deep\.pth cannot be read as a checkpoint"):
        read_pickle(tmp_path / "deep.pth")
