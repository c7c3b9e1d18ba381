"""transformers' Trainer, with this model's data order and checkpoints that are whole or not there."""

import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from .errors import UNWRITABLE, CheckpointError, RecipeError
from .muon import MuonWithAdamW
from .neck import NECK_FILE, load_neck, save_neck
from .samples import TrainingSamples
from .sampling import TrainingOrder

__all__ = ["MGLlavaTrainer"]

SCRATCH = ".incomplete"

# transformers 5.17 goes on from a checkpoint on several CPU processes with the device "cpu:0", which torch.load does
# not know.
torch.serialization.register_package(
    15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class MGLlavaTrainer(Trainer):
    """A Trainer of MG-LLaVA.

    Args:
        order: the order of the data.
        keep_checkpoints: how many checkpoints stay.
        saves_model: whether checkpoints hold the model as `save_pretrained` writes it (stage 2, or its adapters).
        saves_neck: whether they hold the neck in a file of its own (stage 1, adapters).
        muon_learning_rate: of `MuonWithAdamW`; None: AdamW alone.
        kwargs: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        order: TrainingOrder,
        keep_checkpoints: int,
        saves_model: bool,
        saves_neck: bool,
        muon_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.order = order
        self.keep_checkpoints = keep_checkpoints
        self.saves_model = saves_model
        self.saves_neck = saves_neck
        self.muon_learning_rate = muon_learning_rate
        if muon_learning_rate is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise RecipeError(
                f"muon_learning_rate is {muon_learning_rate}; Muon needs whole matrices, which sharded models have not"
            )
        self._is_saving = False
        self._clock = _Clock()
        self.add_callback(self._clock)
        self.add_callback(_AsArguments(order))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.muon_learning_rate is None:
            return super().create_optimizer(*args, **kwargs)
        if self.optimizer is None:
            self.optimizer = MuonWithAdamW(self.model, self.args.learning_rate, self.muon_learning_rate)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return self.order

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(self.args.output_dir)
        return str(folder / SCRATCH if self._is_saving else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside the others and give it its name when it is complete.

        Raises:
            CheckpointError: it cannot be written; the one before is intact.
            DataError: as `_check_replaced`.
        """
        self._check_replaced()
        folder = Path(self.args.output_dir)
        scratch = folder / SCRATCH
        if self.args.should_save:
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed while it saved
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        except UNWRITABLE as error:
            if self.args.should_save:
                shutil.rmtree(scratch, ignore_errors=True)
            last = get_last_checkpoint(folder)
            intact = f"{last} is intact" if last else "there is none before it"
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} cannot be written: {error}; {intact}, and the "
                "same command goes on from there"
            ) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for checkpoint in scratch.iterdir():
                shutil.rmtree(folder / checkpoint.name, ignore_errors=True)
                checkpoint.rename(folder / checkpoint.name)
            scratch.rmdir()
            rotate_checkpoints(str(folder), save_total_limit=self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self._is_plain:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))
        elif self.saves_model:
            super()._save(str(folder), state_dict)
        if self.saves_neck and self.args.should_save:
            save_neck(self.model.state_dict() if state_dict is None else state_dict, folder / NECK_FILE)

    @property
    def _is_plain(self) -> bool:
        """Whether this is a module of stage 0, which knows no `save_pretrained`; its weights may be tied."""
        return self.saves_model and not hasattr(self.model, "save_pretrained")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_plain:
            load_model(self.model, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
            return
        # FSDP writes the state of the whole model into checkpoints, in its own form.
        if self.saves_model or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.saves_neck and not self.is_fsdp_enabled:
            load_neck(self.model, resume_from_checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps, seconds = self._clock.lap(self.state.global_step)
            logs["samples_per_second"] = steps * self.order.global_batch / seconds
            logs["memory_gib"] = _memory(self.args.device) / 2**30
            logs["records_replaced"] = self._check_replaced()
        super().log(logs, start_time)

    def _check_replaced(self) -> int:
        """How many records turned out to be bad since the start, in all processes.

        Raises:
            DataError: more than the recipe allows; each process by itself has noticed only its own.
        """
        if not isinstance(self.train_dataset, TrainingSamples):
            return 0
        replaced = torch.tensor(self.train_dataset.replaced, dtype=torch.int32, device=self.args.device)
        if not int(self.accelerator.reduce(replaced.sum())):
            return 0
        # Several processes may have met the same one, in other epochs.
        total = int((self.accelerator.reduce(replaced) > 0).sum())
        self.train_dataset.check_replaced(total)
        return total


class _Clock(TrainerCallback):
    """Steps and seconds between log lines."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step, self._time = state.global_step, time.perf_counter()

    def lap(self, step: int) -> tuple[int, float]:
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self._step, self._time = step, time.perf_counter()
        return steps, seconds


class _AsArguments(TrainerCallback):
    """What Trainer forgets when it goes on from a checkpoint.

    Among several processes it skips batches through wrappers that do not pass the epoch's number on, so that the rest
    of a later epoch would be that of the first; and intervals would stay those that the checkpoint was made with.
    """

    def __init__(self, order: TrainingOrder) -> None:
        self._order = order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.set_epoch(state.global_step * self._order.global_batch // len(self._order))


def _memory(device: torch.device) -> int:
    """Bytes: the most that the GPU held, or what this process holds now where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
