"""A list of JSON values in one block of memory."""

import json
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["PackedList"]


class PackedList:
    """A list that keeps its JSON values as bytes and decodes them when asked.

    A million records as Python objects take several times the memory, and every worker process that only counts
    references to them gets a copy of its own; bytes stay shared.
    """

    def __init__(self, values: Iterable[Any]):
        packed, ends = bytearray(), array("q")
        for value in values:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            packed += text.encode(errors="surrogatepass")  # of halves of characters, which JSON can hold
            ends.append(len(packed))
        self._bytes = np.frombuffer(bytes(packed), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[start : self._ends[index]].tobytes().decode(errors="surrogatepass"))
