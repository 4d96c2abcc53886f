"""Arrays of strings as a GGUF file holds them, read in bulk: vocabularies have 100,000s."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_SPACE = 0x20


@dataclass(frozen=True, slots=True, eq=False)
class StringTable:
    """Strings, not always UTF-8, as one run of bytes; `offsets` (n + 1) says where each begins."""

    data: bytes
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, items: Iterable[bytes]) -> StringTable:
        """A table of these strings."""
        items = list(items)
        offsets = np.zeros(len(items) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, items), np.int64, len(items)), out=offsets[1:])
        return cls(b"".join(items), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[bytes]:
        bounds = self.offsets.tolist()
        data = self.data
        return (data[begin:end] for begin, end in pairwise(bounds))

    @property
    def longest(self) -> int:
        """Bytes of the longest string."""
        return int(np.diff(self.offsets).max(initial=0))

    def pairs(self) -> list[tuple[str, str]] | None:
        """Each string as the two texts on both sides of its one space, without repetitions.

        None when a string is not made so, or not UTF-8.
        """
        if len(self) == 0:
            return []
        data = np.frombuffer(self.data, np.uint8)
        spaces = np.flatnonzero(data == _SPACE)
        begins, ends = self.offsets[:-1], self.offsets[1:]
        if len(spaces) != len(self) or not ((begins < spaces) & (spaces + 1 < ends)).all():
            return None
        try:
            texts = np.insert(data, ends[:-1], _SPACE).tobytes().decode().split(" ")
        except UnicodeDecodeError:
            return None
        with _no_collection():
            return list(dict.fromkeys(zip(texts[::2], texts[1::2], strict=True)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from looking through 280,000 new pairs: half of their cost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
