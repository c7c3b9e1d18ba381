"""Tensors that stay in their files until they are wanted."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class ConversionError(ValueError):
    """Something about the files handed to the converter is wrong; the message says what and where."""


@contextmanager
def refused_as(problem: str) -> Iterator[None]:
    """Any error of the block becomes a ConversionError: `problem`, which names the file, and the cause.

    For what other libraries do with a file's content: which errors a wrong value gives there is up to them.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(f"{problem}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype whose values are read when asked for.

    Attributes:
        shape: its shape.
        dtype: the dtype it is stored in.
        file: name of the file it lies in, for messages.
        read: returns the values; a view of a memory map where the format allows it, so do not write to it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor, file: str) -> "LazyTensor":
        tensor = tensor.detach()
        return cls(tuple(tensor.shape), tensor.dtype, file, lambda: tensor)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def listed(items: Iterable[str], indent: str = "    ") -> str:
    """One item per line, indented: the form in which errors and the dry run list keys."""
    return "\n".join(indent + item for item in items)
