"""Importance matrices: how much each column of a matrix matters, measured by llama.cpp's imatrix.

A column's importance is the mean square of the activations it is multiplied with. Two formats hold
it. GGUF, with `general.type` "imatrix": for each matrix `NAME.in_sum2`, sums of squares, and
`NAME.counts`, how many they are of. And the older one, all little-endian: the number of entries;
for each the length of its name, the name, a count, the number of values and the values as f32;
then, perhaps, the number of chunks.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._files import StrPath
from .._gguf import GGUF, TensorInfo
from .._types import decode
from ..errors import FileError, FormatError

_SUMS, _COUNTS = ".in_sum2", ".counts"

_INT = struct.Struct("<i")


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Importance by tensor name, each of shape (columns,); `n_chunks` None means not recorded."""

    path: str
    columns: dict[str, NDArray[np.float32]]
    n_chunks: int | None


def read_imatrix(path: StrPath) -> ImportanceMatrix:
    """Reads an importance matrix of either format.

    Entries of several matrices in one tensor, as of experts, are left out: no matrix that the
    quantiser changes has them. Raises FileError when it cannot be read, and FormatError, naming the
    entry, when it is neither.
    """
    name = os.fsdecode(path)
    try:
        with Path(path).open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                return _Old(name, magic + file.read()).read()
    except OSError as error:
        raise FileError(f"{name}: cannot read: {error.strerror or error}") from error
    return _read_gguf(name)


def _read_gguf(path: str) -> ImportanceMatrix:
    with GGUF(path) as file:
        kind = file.metadata.get("general.type")
        if kind != "imatrix":
            raise FormatError(f"{path}: general.type is {kind!r}, not 'imatrix'")
        tensors = {tensor.name: tensor for tensor in file.tensors}
        columns = {}
        for name, sums in tensors.items():
            if not name.endswith(_SUMS):
                continue
            entry = name.removesuffix(_SUMS)
            counts = tensors.get(entry + _COUNTS)
            if counts is None:
                raise FormatError(f"{path}: tensor {entry + _COUNTS!r} is missing")
            count = _floats(path, counts)
            if count.size == 1:
                columns[entry] = _mean(path, entry, _floats(path, sums), float(count[0]))
        n_chunks = file.metadata.get("imatrix.chunk_count")
    return _checked(path, columns, n_chunks if isinstance(n_chunks, int) else None)


def _floats(path: str, tensor: TensorInfo) -> NDArray[np.float32]:
    if tensor.type != "F32":
        raise FormatError(f"{path}: tensor {tensor.name!r} is {tensor.type}, not F32")
    return decode(tensor.data, "F32")


class _Old:
    """Reads the format before GGUF's."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def read(self) -> ImportanceMatrix:
        columns = {}
        for index in range(self._count("the number of entries")):
            length = self._count(f"the length of name {index}")
            name = self._take(length, f"name {index}").decode("utf-8", "replace")
            n_calls = self._integer(f"the count of {name!r}")
            n_values = self._count(f"the number of values of {name!r}")
            values = np.frombuffer(self._take(4 * n_values, f"the values of {name!r}"), "<f4")
            columns[name] = _mean(self._path, name, values.astype(np.float32), float(n_calls))
        n_chunks = self._integer("the number of chunks") if self._at < len(self._data) else None
        return _checked(self._path, columns, n_chunks)

    def _take(self, n: int, what: str) -> bytes:
        if n > len(self._data) - self._at:
            raise FormatError(
                f"{self._path}: is no importance matrix: it ends at byte {len(self._data)}, within "
                f"{what}"
            )
        self._at += n
        return self._data[self._at - n : self._at]

    def _integer(self, what: str) -> int:
        return int(_INT.unpack(self._take(_INT.size, what))[0])

    def _count(self, what: str) -> int:
        n = self._integer(what)
        if n < 1:
            raise FormatError(f"{self._path}: is no importance matrix: {what} is {n}")
        return n


def _mean(path: str, name: str, sums: NDArray[np.float32], count: float) -> NDArray[np.float32]:
    """Importance of columns; all alike where nothing was counted."""
    if not count >= 0:
        raise FormatError(f"{path}: the count of {name!r} is {count:g}")
    if count == 0:
        return np.ones_like(sums)
    found: NDArray[np.float32] = sums / np.float32(count)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        column = int(np.argwhere(~(np.isfinite(found) & (found >= 0)))[0][0])
        raise FormatError(
            f"{path}: the importance of column {column} of {name!r} is {found[column]:g}; it must "
            "be finite and not negative"
        )
    return found


def _checked(
    path: str, columns: dict[str, NDArray[np.float32]], n_chunks: int | None
) -> ImportanceMatrix:
    if not columns:
        raise FormatError(f"{path}: the importance matrix has no entries")
    return ImportanceMatrix(path, columns, n_chunks)
