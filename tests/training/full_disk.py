"""A disk that is full while one checkpoint is written."""

import resource

import pytest

from mgllava.training.trainer import MGLlavaTrainer


def fill_disk(patch: pytest.MonkeyPatch, *, step: int, room: int) -> None:
    """No file may grow over `room` bytes while the checkpoint of `step` is written."""
    save = MGLlavaTrainer._save_checkpoint

    def save_with_little_room(self, *args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(MGLlavaTrainer, "_save_checkpoint", save_with_little_room)
