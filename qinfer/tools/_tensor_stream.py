"""Streams tensors from checkpoints into a GGUF file: pieces are read, converted and written.

Only a tensor that is transposed is ever in memory as a whole.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._file_tensor import DTYPES, FLOATS, FileTensor, as_float32
from .._gguf import Writer
from .._types import encode, tensor_type
from ..errors import ArgumentError, FormatError, UnsupportedError

logger = logging.getLogger("qinfer")

Progress = Callable[[int, int], None]
Stored = NDArray[Any]

# Large enough that Python costs nothing beside the work, small enough for a core's cache.
_PIECE_BYTES = 1 << 20
# Two tiles of it, four bytes an element, fit a first-level cache of 32 KiB.
_TILE = 64

# Values from here on become infinite in a type: half a step beyond its largest, and for Q8_0 those
# whose scale, a 127th, does.
_LIMITS = {
    "F32": float(2**128 - 2**103),
    "BF16": float(2**128 - 2**119),
    "F16": 65520.0,
    "Q8_0": 127 * 65504.0,
}
# The bits of an element's magnitude, as a number of its size: those of NaN come after infinity's,
# which come after the finite ones.
_MAGNITUDES: dict[str, np.uint16 | np.uint32] = {
    "F16": np.uint16(0x7FFF),
    "BF16": np.uint16(0x7FFF),
    "F32": np.uint32(0x7FFFFFFF),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the output and where it comes from.

    Attributes:
        name: in the output.
        shape: in the output, rows first.
        source: a tensor of a file, or float32 values.
        source_name: what the source is called in its file.
        rows: ranges of the source's rows in the order of the output; None takes all as they are.
        head_dim: of q and k whose rotated pairs (i, i + head_dim / 2) become (2i, 2i + 1); else 0.
        transposed: whether the output's rows are the source's columns.
    """

    name: str
    shape: tuple[int, ...]
    source: FileTensor | NDArray[np.float32]
    source_name: str
    rows: tuple[tuple[int, int], ...] | None = None
    head_dim: int = 0
    transposed: bool = False


def output_type(planned: Planned, outtype: str) -> str:
    """The type a tensor is written in: vectors stay F32, rows that make no blocks become F16."""
    if len(planned.shape) == 1:
        return "F32"
    if planned.shape[-1] % tensor_type(outtype).block_size:
        return "F16"
    return outtype


def write_tensors(
    writer: Writer,
    tensors: Sequence[Planned],
    outtype: str,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Describes tensors and writes their data.

    Args:
        writer: a file whose keys have been added.
        tensors: in the order of the file.
        outtype: "F32", "F16", "BF16" or "Q8_0".
        threads: that convert; None takes one per core, at most 8.
        progress: called as `progress(done, total)`, in bytes written.

    Raises:
        FormatError: a source holds a value that is not finite.
        ArgumentError: a source holds a value that `outtype` does not reach.
        UnsupportedError: a source is not of floating point.
        FileError: a file cannot be read or written.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, expected 1 or more")
    n_threads = threads or min(8, os.cpu_count() or 1)
    types = [output_type(planned, outtype) for planned in tensors]
    odd = [p.name for p, t in zip(tensors, types, strict=True) if t != outtype and len(p.shape) > 1]
    if odd:
        logger.warning(
            "%d tensors are written as F16, because their rows make no whole blocks of %s: %s%s",
            len(odd), outtype, ", ".join(odd[:3]), ", …" if odd[3:] else "",
        )  # fmt: skip
    for planned, type_name in zip(tensors, types, strict=True):
        if isinstance(planned.source, FileTensor) and planned.source.dtype not in FLOATS:
            raise UnsupportedError(
                f"{planned.source.path}: tensor {planned.source_name} is of type "
                f"{planned.source.dtype}, which is no floating point"
            )
        writer.add_tensor(planned.name, planned.shape, type_name)
    total = sum(_n_bytes(p.shape, t) for p, t in zip(tensors, types, strict=True))
    done = 0
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[Stored]] = deque()
        try:
            for planned, type_name in zip(tensors, types, strict=True):
                for job in _jobs(planned, type_name, pool):
                    waiting.append(pool.submit(job))
                    if len(waiting) > 2 * n_threads:
                        done += _write(writer, waiting.popleft())
                        if progress:
                            progress(done, total)
                while planned.transposed and waiting:
                    # Before the next tensor is read, what refers to this one goes.
                    done += _write(writer, waiting.popleft())
            while waiting:
                done += _write(writer, waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()
    if progress:
        progress(total, total)


def _write(writer: Writer, future: Future[Stored]) -> int:
    piece = future.result()
    writer.write(piece)
    return piece.nbytes


def _n_bytes(shape: tuple[int, ...], type_name: str) -> int:
    kind = tensor_type(type_name)
    return prod(shape) // kind.block_size * kind.block_bytes


# ---- pieces ----

Job = Callable[[], Stored]


def _jobs(planned: Planned, type_name: str, pool: ThreadPoolExecutor) -> Iterator[Job]:
    """Functions whose results, one after the other, are the tensor's data."""
    source = planned.source
    if not isinstance(source, FileTensor):
        yield lambda: source
    elif planned.transposed:
        yield from _transposed_jobs(planned, source, type_name, pool)
    else:
        step = _rows_per_piece(source.shape, planned.head_dim or 1)
        for first, last in planned.rows or ((0, source.shape[0] if source.shape else 1),):
            for begin in range(first, last, step):
                yield _Rows(planned, source, type_name, begin, min(begin + step, last))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Reads and converts the source's rows `begin` to `end`."""

    planned: Planned
    source: FileTensor
    type_name: str
    begin: int
    end: int

    def __call__(self) -> Stored:
        stored = self.source.stored(self.begin, self.end)
        _check(stored, self.planned, self.source, self.type_name, self.begin)
        if self.planned.head_dim:
            heads = stored.reshape(-1, 2, self.planned.head_dim // 2, *stored.shape[1:])
            stored = heads.swapaxes(1, 2).reshape(stored.shape)
        return _converted(stored, self.source.dtype, self.type_name)


def _transposed_jobs(
    planned: Planned, source: FileTensor, type_name: str, pool: ThreadPoolExecutor
) -> Iterator[Job]:
    n_rows, n_cols = source.shape
    whole = np.empty(source.shape, DTYPES[source.dtype])

    def read(begin: int, end: int) -> None:
        stored = source.stored(begin, end)
        _check(stored, planned, source, type_name, begin)
        whole[begin:end] = stored

    def columns(begin: int, end: int) -> Stored:
        piece = np.empty((end - begin, n_rows), whole.dtype)
        for column in range(begin, end, _TILE):
            upto = min(column + _TILE, end)
            for row in range(0, n_rows, _TILE):
                tile = whole[row : row + _TILE, column:upto]
                piece[column - begin : upto - begin, row : row + _TILE] = tile.T
        return _converted(piece, source.dtype, type_name)

    step = _rows_per_piece(source.shape, 1)
    list(pool.map(lambda begin: read(begin, min(begin + step, n_rows)), range(0, n_rows, step)))
    step = _rows_per_piece((n_cols, n_rows), _TILE)
    for begin in range(0, n_cols, step):
        yield partial(columns, begin, min(begin + step, n_cols))


def _rows_per_piece(shape: tuple[int, ...], multiple: int) -> int:
    row_bytes = 4 * prod(shape[1:])
    return max(1, _PIECE_BYTES // max(1, row_bytes) // multiple) * multiple


# ---- values ----


def _converted(stored: Stored, dtype: str, type_name: str) -> Stored:
    if dtype == type_name:
        return stored
    values = as_float32(stored, dtype)
    return values if type_name == "F32" else encode(values, type_name)


def _check(
    stored: Stored, planned: Planned, source: FileTensor, type_name: str, first_row: int
) -> None:
    """Refuses values that are not finite, or would not be in the output's type."""
    limit = _LIMITS["F32" if source.dtype == type_name else type_name]
    if stored.size == 0 or _largest(stored, source.dtype) < limit:
        return
    values = stored if source.dtype == "F64" else as_float32(stored, source.dtype).astype("f8")
    place = np.argwhere(~(np.abs(values) < limit))[0]
    value = values[tuple(place)]
    where = f"{source.path}: tensor {planned.source_name} holds {value:g} at "
    if stored.ndim == 2:
        where += f"row {first_row + place[0]}, column {place[1]}"
    else:
        where += f"element {first_row + place[0]}" if place.size else "its one element"
    if not np.isfinite(value):
        raise FormatError(f"{where}; weights are finite numbers")
    raise ArgumentError(
        f"{where}, which {type_name} does not reach; choose an outtype that does, such as f32"
    )


def _largest(stored: Stored, dtype: str) -> float:
    """The largest magnitude; NaN when there is one. Several times faster than `isfinite`."""
    if dtype == "F64":
        return float(np.abs(stored).max())
    mask = _MAGNITUDES[dtype]
    top = (stored.view(mask.dtype) & mask).max(keepdims=True)
    return float(as_float32(top.view(DTYPES[dtype]), dtype).item())
