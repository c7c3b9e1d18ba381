"""The neck as two processes train it, against one process with the whole batch; see test_training.py.

    python training_cases.py RANK STORE RESULTS

runs every case as process RANK of two that meet at the file STORE, and writes what it measured to RESULTS.
"""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from kernel_cases import random_boxes, relative_error
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mgllava_kernels import ConvGateFusion, Projector, backend, use_backend, vision_neck

PROCESSES = 2
SHARDINGS = ("whole", "modules", "layers")

# Pictures of each process, by their numbers of boxes.
SPLITS = {
    "alike": ((3, 1), (2, 4)),
    "a process without boxes": ((0, 0), (2, 4)),
    "a process without pictures": ((), (2, 4)),
}

Batch = tuple[Tensor, list[Tensor], list[Tensor]]


class Neck(nn.Module):
    """All that learns in the first stage of training."""

    def __init__(self, variant: str = "gate_sum") -> None:
        super().__init__()
        self.fusion = ConvGateFusion(6, 5, variant)
        self.image_projector = Projector(self.fusion.out_features, 8)
        self.object_projector = Projector(8, 8)

    def forward(self, low_res: Tensor, stages: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        return vision_neck(
            low_res,
            stages,
            boxes,
            fusion=self.fusion,
            image_projector=self.image_projector,
            object_projector=self.object_projector,
            spatial_scale=0.25,
            output_size=3,
        )


def neck(variant: str = "gate_sum") -> Neck:
    """The same neck at every call, with parameters that let gradients through all of it."""
    generator = torch.Generator().manual_seed(1)
    module = Neck(variant)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def batch(seed: int, boxes: tuple[int, ...]) -> Batch:
    """Tokens, stage maps and boxes of one picture for each number of boxes."""
    generator = torch.Generator().manual_seed(seed)
    low_res, fine, coarse = (
        torch.randn(len(boxes), *shape, generator=generator) for shape in ((16, 6), (3, 8, 8), (5, 4, 4))
    )
    rows = [random_boxes(count, 32, seed=seed + image)[:, 1:] for image, count in enumerate(boxes)]
    return low_res, [fine, coarse], rows


def loss_of(tokens: tuple[Tensor, Tensor]) -> Tensor:
    """A sum, so that the losses of parts of a batch add up to that of the batch."""
    image_tokens, object_tokens = tokens
    return image_tokens.float().square().sum() + object_tokens.float().sin().sum()


def trained(
    module: nn.Module, batch_of: Callable[[int], Batch], path: str, steps: int, scale: float = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the first step and what all steps add to each parameter."""
    before = {name: _full(parameter).clone() for name, parameter in module.named_parameters()}
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        optimiser.zero_grad()
        with use_backend(path):
            loss = loss_of(module(*batch_of(step)))
        (scale * loss).backward()
        if step == 0:
            gradients = {name: _full(value.grad).clone() for name, value in module.named_parameters()}
        optimiser.step()
    return gradients, {name: _full(value) - before[name] for name, value in module.named_parameters()}


def _full(value: Tensor) -> Tensor:
    """The whole of a parameter or gradient that may be sharded."""
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _whole_batch(split: str, step: int) -> Batch:
    parts = [batch(PROCESSES * step + rank, SPLITS[split][rank]) for rank in range(PROCESSES)]
    low_res, stages, boxes = zip(*parts, strict=True)
    joined = [torch.cat(maps) for maps in zip(*stages, strict=True)]
    return torch.cat(low_res), joined, [rows for part in boxes for rows in part]


def _part(split: str, rank: int, step: int) -> Batch:
    return batch(PROCESSES * step + rank, SPLITS[split][rank])


def _compared(
    wrapped: nn.Module, rank: int, split: str = "alike", path: str = "torch", variant: str = "gate_sum"
) -> dict[str, object]:
    """The largest relative errors of `wrapped`, trained by all processes, and the ops that it called."""
    # Triton's interpreter takes seconds for a step.
    steps, path_of_one = (1, "torch") if path == "triton" else (3, path)
    expected = trained(neck(variant), partial(_whole_batch, split), path_of_one, steps)
    called = set()

    def call(op, *args, run=backend.call):
        called.add(op)
        return run(op, *args)

    with mock.patch.object(backend, "call", call):
        # Gradients are averaged over the processes.
        actual = trained(wrapped, partial(_part, split, rank), path, steps, scale=PROCESSES)
    errors = [
        max(relative_error(value, right[name.split("module.")[-1]]) for name, value in values.items())
        for values, right in zip(actual, expected, strict=True)
    ]
    return {"gradients": errors[0], "updates": errors[1], "ops": sorted(called)}


def _sharded(sharding: str, **options: object) -> nn.Module:
    module = neck()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    parts: list[nn.Module] = []
    if sharding == "modules":
        parts = [module.fusion, module.image_projector, module.object_projector]
    if sharding == "layers":
        parts = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    for part in parts:
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def _state_of_the_whole(rank: int) -> dict[str, object]:
    """Whether a plain neck loads the full state of a sharded one."""
    module = _sharded("modules")
    trained(module, partial(_part, "alike", rank), "torch", steps=1)
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    loaded = Neck()
    loaded.load_state_dict(state)
    return {
        "equal": all(torch.equal(_full(module.get_parameter(n)), p) for n, p in loaded.named_parameters())
    }


def _refusal(rank: int) -> dict[str, object]:
    """What an explicit Triton says to layers that are sharded one by one."""
    try:
        with use_backend("triton"):
            _sharded("layers")(*_part("alike", rank, 0))
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def cases(rank: int) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """By name everything to be measured."""

    def ddp(options: dict[str, bool], **of: str) -> dict[str, object]:
        wrapped = DistributedDataParallel(neck(of.get("variant", "gate_sum")), **options)
        return _compared(wrapped, rank, **of)

    def compiled_ddp() -> dict[str, object]:
        # Graphs break at the collectives.
        return _compared(torch.compile(DistributedDataParallel(neck()), backend="aot_eager"), rank)

    def fsdp(sharding: str, options: dict[str, object], **of: str) -> dict[str, object]:
        return _compared(_sharded(sharding, **options), rank, **of)

    for split in SPLITS:
        for option in (None, "static_graph", "gradient_as_bucket_view"):
            options = {option: True} if option else {}
            yield f"ddp, {option}, {split}", partial(ddp, options, split=split)
        for sharding in SHARDINGS:
            yield f"fsdp, {sharding}, {split}", partial(fsdp, sharding, {}, split=split)
    half = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)}
    for sharding in SHARDINGS:
        kept = {"reshard_after_forward": False}
        yield f"fsdp, {sharding}, kept after the forward pass", partial(fsdp, sharding, kept)
        yield f"fsdp, {sharding}, half precision", partial(fsdp, sharding, half)
    for variant in ("gate_concat", "concat_projected", "concat_raw"):
        yield f"ddp, {variant}", partial(ddp, {}, variant=variant)
    yield "ddp, reference", partial(ddp, {}, path="reference")
    yield "ddp, triton", partial(ddp, {}, split="a process without boxes", path="triton")
    yield "fsdp, triton", partial(fsdp, "modules", half, split="a process without pictures", path="triton")
    yield "fsdp, layers, triton", partial(_refusal, rank)
    yield "fsdp, full state", partial(_state_of_the_whole, rank)
    yield "ddp, compiled", compiled_ddp


def main(rank: int, store: Path, results: Path) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(store), PROCESSES)
    dist.init_process_group(
        "gloo", timeout=timedelta(seconds=300), store=meeting, rank=rank, world_size=PROCESSES
    )
    results.write_text(json.dumps({name: measure() for name, measure in cases(rank)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
