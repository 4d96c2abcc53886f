"""A tensor that lies in a file and is read when asked for, whole or some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FileError, FormatError

# NumPy's type for each element type; NumPy has no bfloat16, which travels as its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file.

    `dtype` is a key of `DTYPES`; `strides` are in elements, none negative; `offset` is that of the
    first element in bytes. All elements lie inside the file as it was when this was made.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of all elements."""
        return self.n_elements * DTYPES[self.dtype].itemsize

    def stored(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """The elements as stored, BF16 as uint16: shape (rows, …), of the rows `begin` to `end`.

        The array is C-contiguous and the caller's own. Raises FileError when the file cannot be
        read, FormatError when it has become shorter.
        """
        shape, first = self.shape, 0
        if shape:
            end = shape[0] if end is None else min(end, shape[0])
            begin = min(begin, end)
            shape, first = (end - begin, *shape[1:]), begin * self.strides[0]
        elsewhere = [
            (n - 1) * stride for n, stride in zip(shape, self.strides, strict=True) if n > 1
        ]
        dtype = DTYPES[self.dtype]
        if not prod(shape):
            return np.empty(shape, dtype)
        span = np.empty(sum(elsewhere) + 1, dtype)
        self._read(span.data.cast("B"), self.offset + first * dtype.itemsize)
        steps = tuple(stride * dtype.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(span, shape, steps)
        return np.asarray(view, order="C")

    def _read(self, buffer: memoryview, offset: int) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:  # noqa: PTH123
                file.seek(offset)
                n_read = 0
                while n_read < len(buffer):
                    n = file.readinto(buffer[n_read:])
                    if not n:
                        raise FormatError(
                            f"{self.path}: ends at byte {offset + n_read}, inside a tensor; it was "
                            "longer when it was opened"
                        )
                    n_read += n
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read: {os.strerror(error.errno or 0)}") from (
                error
            )

    def numpy(self) -> NDArray[Any]:
        """All elements, BF16 as float32: shape `shape`."""
        return self.float32() if self.dtype == "BF16" else self.stored()

    def float32(self, begin: int = 0, end: int | None = None) -> NDArray[np.float32]:
        """The elements of some rows as float32."""
        return as_float32(self.stored(begin, end), self.dtype)

    def pieces(self, n_bytes: int) -> Iterator[NDArray[Any]]:
        """The elements as stored, a few rows at a time: about `n_bytes` per piece."""
        n_rows = self.shape[0] if self.shape else 1
        step = max(1, n_bytes * n_rows // max(1, self.n_bytes))
        for begin in range(0, n_rows, step):
            yield self.stored(begin, begin + step)


def as_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored elements as float32, of the same shape; those of BF16 are bits in uint16."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)
