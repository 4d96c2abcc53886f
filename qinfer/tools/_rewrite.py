"""Writes a GGUF file anew with other tensors: a piece at a time, on several threads."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._files import StrPath
from .._gguf import GGUF, TensorInfo, Writer
from .._types import convert, decode, tensor_type
from ..errors import ArgumentError, FormatError

# Makes the next bytes of a tensor; called on any thread.
Piece = Callable[[], NDArray[np.uint8]]

# Weights in a piece: so many that the interpreter's share is small, and few enough for every thread
# to have some to the end.
PIECE_WEIGHTS = 1 << 20

_HALF_MAX = 65504.0
_BF16_MAX = float(np.uint32(0x7F7F7FFF).view(np.float32))  # larger values round to infinity
_F32_MAX = float(np.finfo(np.float32).max)

_SPLIT_KEYS = {"split.no", "split.count", "split.tensors.count"}
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: `pieces()` makes its bytes in order; `shape` is NumPy's."""

    name: str
    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterator[Piece]]

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        kind = tensor_type(self.type)
        return prod(self.shape) // kind.block_size * kind.block_bytes


def copied(source: GGUF, tensor: TensorInfo, name: str | None = None) -> NewTensor:
    """A tensor as it is, perhaps under another name.

    The pieces raise FormatError, naming the tensor, at a value that is not finite. Types that the
    runtime cannot decode are not looked at.
    """
    if tensor_type(tensor.type).can_decode:
        return replace(encoded(source, tensor, tensor.type), name=name or tensor.name)

    def pieces() -> Iterator[Piece]:
        step = 4 * PIECE_WEIGHTS
        for begin in range(0, tensor.n_bytes, step):
            yield lambda begin=begin: tensor.data[begin : begin + step]  # type: ignore[misc]

    return NewTensor(name or tensor.name, tensor.shape, tensor.type, pieces)


def encoded(
    source: GGUF,
    tensor: TensorInfo,
    type: str,
    importance: NDArray[np.float32] | None = None,
) -> NewTensor:
    """A tensor's values in another type, or in its own after a look at each.

    `importance`, one weight per column, steers the types that can use it. The pieces raise
    FormatError, naming the tensor, at a value that the type cannot hold.
    """
    old = tensor_type(tensor.type)
    n_cols = tensor.shape[-1]
    n_rows = tensor.n_elements // n_cols
    rows_per_piece = max(1, PIECE_WEIGHTS // n_cols)

    def piece(first: int) -> NDArray[np.uint8]:
        last = min(first + rows_per_piece, n_rows)
        row_bytes = n_cols // old.block_size * old.block_bytes
        blocks = tensor.data[first * row_bytes : last * row_bytes]
        shape = (last - first, n_cols)
        try:
            return convert(blocks, old.name, type, shape, importance=importance)
        except ArgumentError:
            # Where in the tensor it is takes a second look.
            values = decode(blocks, old.name, shape)
            check_values(source.path, tensor.name, values, type, first_row=first)
            raise

    def pieces() -> Iterator[Piece]:
        for first in range(0, n_rows, rows_per_piece):
            yield lambda first=first: piece(first)  # type: ignore[misc]

    return NewTensor(tensor.name, tensor.shape, type, pieces)


def check_values(
    path: str,
    name: str,
    values: NDArray[np.float32],
    type: str,
    *,
    first_row: int = 0,
    first_col: int = 0,
) -> None:
    """Raises FormatError at a value that is not finite, or beyond what a type can hold.

    Types of blocks keep their scales as F16: what F16 holds is taken as their limit, which leaves
    each scale finite. `values` has two axes; its position in the tensor is for the message.
    """
    limit = {"F32": _F32_MAX, "BF16": _BF16_MAX}.get(type, _HALF_MAX)
    # Comparisons with NaN, which min and max pass on, are false.
    if values.size == 0 or (-limit <= values.min() and values.max() <= limit):
        return
    row, col = np.argwhere(~(np.abs(values) <= limit))[0]
    value = float(values[row, col])
    rule = f"{type} can store values up to {limit:g}" if np.isfinite(value) else "it must be finite"
    raise FormatError(
        f"{path}: tensor {name!r} holds {value:g} at row {first_row + row}, column "
        f"{first_col + col}; {rule}"
    )


def mib(n_bytes: int) -> str:
    """A size for people."""
    return f"{n_bytes / 2**20:.1f} MiB"


def refuse_own_source(source: GGUF, out: StrPath) -> None:
    """Raises ArgumentError when the output is the input, or a part of it."""
    paths = [Path(source.path)]
    if match := _PART.fullmatch(source.path):
        paths = [Path(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]
    target = Path(out)
    for path in paths:
        if target.exists() and path.exists() and target.samefile(path):
            raise ArgumentError(f"{target} is the file to read from; write to another one")


def rewrite(
    source: GGUF,
    out: StrPath,
    tensors: Sequence[NewTensor],
    *,
    metadata: Mapping[str, tuple[object, str]] | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a file with the magic, alignment and metadata of another, and with other tensors.

    Args:
        source: the file whose metadata it takes; parts become one file.
        out: appears when it is complete, or not at all.
        tensors: what it holds.
        metadata: keys to replace or to add, as value and type.
        threads: how many make pieces; the bytes do not depend on it.
        progress: called with the bytes written and all bytes.

    Raises:
        ArgumentError: `out` is the source.
        FileError: the operating system refuses.
        FormatError: of a piece.
    """
    refuse_own_source(source, out)
    info = source.info
    total = sum(tensor.n_bytes for tensor in tensors)
    done = 0
    with Writer(out, powerinfer=info.is_powerinfer, alignment=info.alignment) as writer:
        _write_metadata(source, writer, dict(metadata or {}))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.shape, tensor.type)
        pieces = (piece for tensor in tensors for piece in tensor.pieces())
        with closing(_in_order(pieces, threads)) as made:
            for data in made:
                writer.write(data)
                done += data.nbytes
                if progress is not None:
                    progress(done, total)


def _write_metadata(source: GGUF, writer: Writer, changes: dict[str, tuple[object, str]]) -> None:
    for key in source.keys:
        if key in _SPLIT_KEYS:
            continue
        if key in changes:
            writer.add(key, *changes.pop(key))
            continue
        kind = source.value_type(key)
        items = kind.removeprefix("array of ")
        value: object = source.metadata[key]
        if items == "string":
            strings = source.raw_strings(key)
            value = strings[0] if items == kind else strings
        writer.add(key, value, items)
    for key, (value, kind) in changes.items():
        writer.add(key, value, kind)


def _in_order(pieces: Iterable[Piece], threads: int) -> Generator[NDArray[np.uint8], None, None]:
    """The results of pieces in their order, few of them in memory at a time."""
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(threads, "qinfer rewrite") as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(piece))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
