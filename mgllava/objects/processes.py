"""The processes that `accelerate launch` or torchrun started together."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

__all__ = ["Processes", "join_processes"]

# One process may finish long before another: the wait at the end must not be cut short.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among its kind.

    Attributes:
        index: its number.
        count: of all.
        local_index: its number on this machine.
        local_count: of those on this machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def device(self, name: str = "auto") -> str:
        """The device for this process: GPUs are dealt out in turn, unless the name has a number."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and torch.cuda.is_available():
            name = f"cuda:{self.local_index % torch.cuda.device_count()}"
        return name

    def wait(self) -> None:
        """Until all are here.

        Raises:
            ConnectionError: one of them has ended.
        """
        if self.count == 1:
            return
        try:
            # accelerate's own wait names a GPU for each process, of which there may be fewer.
            torch.distributed.barrier()
        except RuntimeError as error:
            raise ConnectionError(
                "another process ended before its share was done; run the same command again, it goes on where this "
                f"one stopped ({error})"
            ) from error


def join_processes() -> Processes:
    """This process, joined with the others if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    # On the CPU, whatever the detector runs on: nothing but a wait is ever exchanged.
    state = PartialState(cpu=True, timeout=LONGEST_WAIT)
    return Processes(
        state.process_index,
        state.num_processes,
        state.local_process_index,
        int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)),
    )
