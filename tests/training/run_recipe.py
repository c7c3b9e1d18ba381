"""A recipe in processes of its own, which may be killed.

They are forked off a process that has everything imported and has started no thread.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from importlib import resources
from pathlib import Path
from unittest import mock

import torch
import yaml
from accelerate.state import DistributedType, PartialState

import mgllava.training.run
from mgllava.training.recipe import Recipe, recipe_from_dict
from mgllava.training.trainer import MGLlavaTrainer

TIMEOUT = 300


def run_in_processes(
    recipe: Recipe, *, killed_at: str = "", processes: int = 1, sharded: bool = False
) -> list[int | None]:
    """Run a recipe and return the processes' exit codes.

    Args:
        recipe: what to run.
        killed_at: `step 3` kills every process without warning in the middle of step 3, `save 4` in the middle of
            writing the checkpoint of step 4.
        processes: how many share the global batch.
        sharded: by FSDP2 as shipped, rather than with the whole model in each.
    """
    path = Path(recipe.output).with_suffix(".json")
    path.write_text(json.dumps(recipe.to_dict()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = []
    for rank in range(processes):
        environment = {"FSDP": str(int(sharded))}
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
        started.append(context.Process(target=_run, args=(str(path), killed_at, environment)))
        # Python 3.11 preloads from this path alone.
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
            started[-1].start()
    for process in started:
        process.join(TIMEOUT)
        process.kill()  # does nothing to those that have ended
    return [process.exitcode for process in started]


def _run(path: str, killed_at: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if environment["FSDP"] == "1":
        _shard()
    if killed_at:
        KilledTrainer.what, at = killed_at.split()
        KilledTrainer.at = int(at)
        mgllava.training.run.MGLlavaTrainer = KilledTrainer
    try:
        mgllava.training.run.train(recipe_from_dict(json.loads(Path(path).read_text())))
    except Exception as error:
        Path(path).with_suffix(f".{environment.get('RANK', 0)}.error").write_text(str(error))
        raise


class KilledTrainer(MGLlavaTrainer):
    what: str
    at: int

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.what == "step" and self.state.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def _save_scaler(self, output_dir):  # weights and optimiser are written, the rest is not
        if self.what == "save" and self.state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_scaler(output_dir)


def _shard() -> None:
    """Set what `accelerate launch` sets of the shipped configuration.

    accelerate shards on GPUs only; gloo and FSDP2 themselves run on CPUs as well.
    """
    with resources.files("mgllava.training").joinpath("launch", "fsdp2.yaml").open() as file:
        settings = yaml.safe_load(file)["fsdp_config"]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for name, value in settings.items():
        os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    initialise = PartialState.__init__

    def as_on_gpus(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus
