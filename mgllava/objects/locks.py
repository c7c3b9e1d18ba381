"""One run at a time on the same files."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["hold_lock", "lock_file"]


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an empty file, made where there is none, for this process alone until the block ends.

    The system lets go of it when the process ends, however it does.

    Raises:
        OSError: another process holds it, or it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        lock_file(file, path)
        yield


def lock_file(file: IO[bytes], path: Path) -> None:
    """Hold an open file until it is closed. Where the file system has no locks, nothing is held.

    Raises:
        OSError: another process holds it; says what to do.
    """
    try:
        # Unlike flock's, this lock ends with this process, whatever processes it has started. It also ends when this
        # process closes the file after opening it once more.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OSError(
            f"another process writes {path}; wait for it or name another output, and start several processes "
            "together by accelerate launch or torchrun"
        ) from error
    except OSError:  # a file system without locks
        pass
