"""Sources for the converter's tests: copies of the golden files in every form the converter takes."""

import json
import math
import shutil
import sys
import types
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgllava.conversion import ConversionError, ConversionResult, convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "end_to_end"


@dataclass(frozen=True)
class Sources:
    """The four inputs of a conversion; by default the golden ones."""

    checkpoint: Path = GOLDEN / "mg_llava.pth"
    llm: Path = GOLDEN / "llm"
    clip: Path = GOLDEN / "clip"
    convnext: Path = GOLDEN / "convnext"

    def convert(self, output: Path | None, **options) -> ConversionResult:
        options = {"progress": False, **options}
        return convert_checkpoint(self.checkpoint, self.llm, self.clip, self.convnext, output, **options)

    def copied(self, part: str, to: Path) -> "Sources":
        """These sources with one folder copied, so that a test may change it."""
        shutil.copytree(getattr(self, part), to / part, copy_function=shutil.copyfile)
        (to / part).chmod(0o755)
        return replace(self, **{part: to / part})

    def with_checkpoint(self, path: Path) -> "Sources":
        return replace(self, checkpoint=path)


def failure(sources: Sources, output: Path | None = None, **options) -> str:
    """The message of the ConversionError that these sources must give; a dry run unless there is an output."""
    with pytest.raises(ConversionError) as caught:
        sources.convert(output, dry_run=output is None, **options)
    return str(caught.value)


def golden_state_dict() -> dict[str, torch.Tensor]:
    """The golden checkpoint's tensors, read from the zip by hand rather than by the code under test."""
    archive = zipfile.ZipFile(GOLDEN / "mg_llava.pth")
    names = _tensor_names()
    tensors = {}
    for number, (name, shape) in enumerate(names.items()):
        values = torch.frombuffer(bytearray(archive.read(f"mg_llava/data/{number}")), dtype=torch.float32)
        tensors[name] = values[: math.prod(shape)].view(shape).clone()
    return tensors


def _tensor_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the order in which the golden checkpoint stores them."""
    width, low, high, objects, hidden = 48, 32, 64, 168, 96
    shapes = {"llm.model.embed_tokens.weight": (96, width)}
    for layer in range(2):
        at = f"llm.model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (width, width),
            f"{at}self_attn.k_proj.weight": (24, width),
            f"{at}self_attn.v_proj.weight": (24, width),
            f"{at}self_attn.o_proj.weight": (width, width),
            f"{at}mlp.gate_proj.weight": (hidden, width),
            f"{at}mlp.up_proj.weight": (hidden, width),
            f"{at}mlp.down_proj.weight": (width, hidden),
            f"{at}input_layernorm.weight": (width,),
            f"{at}post_attention_layernorm.weight": (width,),
        }
    shapes |= {"llm.model.norm.weight": (width,), "llm.lm_head.weight": (96, width)}
    for name, inputs in (("projector", low), ("bbox_projector", objects)):
        shapes |= {
            f"{name}.model.0.weight": (width, inputs),
            f"{name}.model.0.bias": (width,),
            f"{name}.model.2.weight": (width, width),
            f"{name}.model.2.bias": (width,),
        }
    return shapes | {
        "fuse_module.slow_conv.weight": (high, high, 1, 1),
        "fuse_module.slow_conv.bias": (high,),
        "fuse_module.slow_proj.weight": (low, high, 1, 1),
        "fuse_module.slow_proj.bias": (low,),
        "fuse_module.fast_conv.weight": (low, 1, 7, 7),
        "fuse_module.fast_conv.bias": (low,),
        "fuse_module.fast_proj.weight": (low, low, 1, 1),
        "fuse_module.fast_proj.bias": (low,),
        "fuse_module.gate.0.weight": (low // 2, 2 * low),
        "fuse_module.gate.0.bias": (low // 2,),
        "fuse_module.gate.2.weight": (1, low // 2),
        "fuse_module.gate.2.bias": (1,),
    }


def edit_safetensors(path: Path, edit) -> None:
    """Rewrite a weight file with `edit(tensors)` applied in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, stem: str, suffix: str) -> None:
    """Two shards and an index, as `save_pretrained` writes them."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        shard = {name: tensors[name].contiguous() for name in part}
        if suffix == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


class _ForeignClass:
    """Builds objects of a class that can be found while saving and is gone when the file is read."""

    def __init__(self, module: str, name: str, bases: tuple[type, ...] = (object,)) -> None:
        self.module, self.name = module, name
        self.type = type(name, bases, {"__module__": module})

    def __enter__(self) -> type:
        parts = self.module.split(".")
        self.added = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for name in self.added:
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[self.module], self.name, self.type)
        return self.type

    def __exit__(self, *_) -> None:
        for name in self.added:
            del sys.modules[name]


def save_zero(
    tensors: dict[str, torch.Tensor],
    folder: Path,
    *,
    stage: int,
    ranks: int,
    frozen: tuple[str, ...] = (),
    shared: dict[str, str] | None = None,
) -> None:
    """A DeepSpeed ZeRO checkpoint of fp32 master weights, trained in bf16, in two parameter groups."""
    folder.mkdir()
    shared = shared or {}
    trained = [name for name in tensors if name not in frozen and name not in shared]
    groups = [trained[::2], trained[1::2]]
    shapes = [{name: tensors[name].shape for name in group} for group in groups]
    with _ForeignClass("deepspeed.runtime.zero.config", "ZeroStageEnum", (int,)) as stage_enum:
        for rank in range(ranks):
            torch.save(
                {
                    "optimizer_state_dict": {
                        "zero_stage": stage_enum(stage),
                        "partition_count": ranks if stage == 3 else [ranks, ranks],
                        **_flat_groups(tensors, groups, stage, rank, ranks),
                    }
                },
                folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
            if stage < 3 and rank > 0:
                continue
            state = {
                "module": {
                    name: torch.empty(0, dtype=torch.bfloat16) if stage == 3 else tensors[name].bfloat16()
                    for name in tensors
                },
                "buffer_names": [],
                "param_shapes": shapes,
                "frozen_param_shapes": {name: tensors[name].shape for name in frozen},
                "frozen_param_fragments": {
                    name: _fragment(tensors[name], rank, ranks) if stage == 3 else tensors[name]
                    for name in frozen
                },
                "shared_params": shared,
                "ds_version": "0.14.0",
                "ds_config": stage_enum(0),
            }
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(state, folder / f"{prefix}mp_rank_00_model_states.pt")


def _flat_groups(tensors, groups, stage: int, rank: int, ranks: int) -> dict[str, list[torch.Tensor]]:
    if stage == 3:
        flat = [torch.cat([_fragment(tensors[name], rank, ranks) for name in group]) for group in groups]
        return {"fp32_flat_groups": flat}
    vectors = [torch.cat([tensors[name].flatten() for name in group]) for group in groups]
    multiple = 2 * ranks
    padded = [torch.cat([v, torch.full((-len(v) % multiple,), float("nan"))]) for v in vectors]
    return {"single_partition_of_fp32_groups": [v.chunk(ranks)[rank].clone() for v in padded]}


def _fragment(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """One rank's equal part of a parameter; the last ones padded with a value that must never be read."""
    length = math.ceil(tensor.numel() / ranks)
    padding = torch.full((length * ranks - tensor.numel(),), float("nan"))
    return torch.cat([tensor.flatten(), padding])[rank * length : (rank + 1) * length].clone()
