"""A process of its own for a recipe: `python run_recipe.py RECIPE.json [KILLED_AT]`.

KILLED_AT kills the process without warning: `step 3` in the middle of step 3, `save 4` in the middle of writing the
checkpoint of step 4. `FSDP` in the environment shards the model as FSDP2 does on GPUs.
"""

import json
import os
import signal
import sys
from importlib import resources

import torch
import yaml
from accelerate.state import DistributedType, PartialState

from mgllava.training.recipe import recipe_from_dict
from mgllava.training.run import train
from mgllava.training.trainer import MGLlavaTrainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledTrainer(MGLlavaTrainer):
    what, at = sys.argv[2].split() if len(sys.argv) > 2 else ("nothing", 0)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.what == "step" and self.state.global_step + 1 == int(self.at):
            kill()
        return loss

    def _save_scaler(self, output_dir):  # weights and optimiser are written, the rest is not
        if self.what == "save" and self.state.global_step == int(self.at):
            kill()
        super()._save_scaler(output_dir)


def shard() -> None:
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


if __name__ == "__main__":
    import mgllava.training.run

    torch.set_num_threads(1)
    if "FSDP" in os.environ:
        shard()
    mgllava.training.run.MGLlavaTrainer = KilledTrainer
    with open(sys.argv[1]) as file:
        recipe = recipe_from_dict(json.load(file))
    train(recipe)
