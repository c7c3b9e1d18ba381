"""Published files to one folder: the miniature checkpoint of the tests, its language model widened to size."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Inputs, Provider, code_of
from benchmarks.shapes import CONVERSION, TINY_CHECKPOINT, Sizes

MINIATURE = Path(__file__).resolve().parents[1] / "tests" / "golden" / "end_to_end"
LAYERS, WIDTH, HIGH = 2, 48, 64
MLP = ("gate_proj", "up_proj", "down_proj")


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """A checkpoint of `wide` rows in each of its MLPs; the folder goes when nobody holds it any more."""
    from safetensors.torch import load_file, save_file

    from mgllava.conversion.checkpoint import open_checkpoint

    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name) / "sources"
    shutil.copytree(MINIATURE, folder, copy_function=shutil.copyfile)
    wide = {}
    for layer in range(LAYERS):
        for name in MLP:
            shape = (WIDTH, sizes["wide"]) if name == "down_proj" else (sizes["wide"], WIDTH)
            wide[f"model.layers.{layer}.mlp.{name}.weight"] = torch.randn(shape, generator=generator)
    opened = open_checkpoint(folder / "mg_llava.pth")
    tensors = {name: lazy.read().clone() for name, lazy in opened.tensors.items()}
    tensors |= {f"llm.{name}": weight for name, weight in wide.items()}
    torch.save({"state_dict": tensors}, folder / "mg_llava.pth")
    weights = folder / "llm" / "model.safetensors"
    save_file(load_file(weights) | wide, weights, metadata={"format": "pt"})
    description = folder / "llm" / "config.json"
    config = json.loads(description.read_text()) | {"intermediate_size": sizes["wide"]}
    description.write_text(json.dumps(config))
    return {"folder": folder, "holder": holder}


def _convert(folder: Path, holder: tempfile.TemporaryDirectory) -> Sequence[Tensor]:
    """Two weights of the converted model: one that was widened and one of the fusion."""
    from safetensors import safe_open

    from mgllava.conversion import convert_checkpoint

    output = folder.parent / "converted"
    parts = {name: folder / name for name in ("llm", "clip", "convnext")}
    convert_checkpoint(
        folder / "mg_llava.pth", **parts, output=output, template="vicuna", dtype="float32", progress=False
    )
    found = {}
    for file in output.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                if name.endswith(("layers.1.mlp.down_proj.weight", "fusion.high_res_conv.weight")):
                    found[name.rpartition("model.")[2]] = tensors.get_tensor(name)
    shutil.rmtree(output)
    return found["layers.1.mlp.down_proj.weight"], found["fusion.high_res_conv.weight"]


def _stored(folder: Path, holder: tempfile.TemporaryDirectory) -> Sequence[Tensor]:
    """The same two as the checkpoint has them."""
    state = torch.load(folder / "mg_llava.pth", map_location="cpu", weights_only=True)["state_dict"]
    return state["llm.model.layers.1.mlp.down_proj.weight"], state["fuse_module.slow_conv.weight"]


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(WIDTH, sizes["wide"]), (HIGH, HIGH, 1, 1)]


def _megabytes(sizes: Sizes) -> int:
    """Of float32 weights in the widened part, which is nearly everything."""
    return LAYERS * len(MLP) * WIDTH * sizes["wide"] * 4 // 10**6


BENCHMARK = Benchmark(
    name="conversion",
    cases=CONVERSION,
    tiny=TINY_CHECKPOINT,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(Provider("mgllava", _convert),),
    function=_convert,
    code=code_of("conversion", model=True),
    dtypes=("float32",),
    reference=_stored,
    source="what the files hold",
    on_cpu=True,
    graph=False,
    rate=("megabytes_per_second", _megabytes),
)
