"""Tensor types: their names and block sizes, and conversion between float32 and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._native import check, ffi, lib, new_error, text
from .errors import ArgumentError

# Types that GGUF numbers and the runtime does not compute with, so that they can be named when a
# file holds them.
_OTHER_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor type the runtime knows: `block_size` elements are stored in `block_bytes` bytes."""

    number: int
    name: str
    block_size: int
    block_bytes: int
    can_decode: bool
    can_encode: bool


@cache
def known_types() -> dict[str, TensorType]:
    """The types the runtime knows, by upper-case name."""
    types = {}
    out = ffi.new("qi_type_info *")
    index = 0
    while lib.qi_type_by_index(index, out) == lib.QI_OK:
        name = text(out.name)
        types[name] = TensorType(
            number=out.type,
            name=name,
            block_size=out.block_size,
            block_bytes=out.block_bytes,
            can_decode=bool(out.can_decode),
            can_encode=bool(out.can_encode),
        )
        index += 1
    return types


@cache
def type_name(number: int) -> str:
    """The name of a GGUF type number; "type 99" for one that GGUF does not define."""
    for known in known_types().values():
        if known.number == number:
            return known.name
    return _OTHER_NAMES.get(number, f"type {number}")


def tensor_type(name: str) -> TensorType:
    """The type of a name in any case; raises ArgumentError with the names there are."""
    found = known_types().get(name.upper())
    if found is None:
        raise ArgumentError(
            f"unknown tensor type {name!r}; known are {', '.join(sorted(known_types()))}"
        )
    return found


def encode(
    values: ArrayLike, type: str, *, importance: ArrayLike | None = None
) -> NDArray[np.uint8]:
    """Values as blocks of a type.

    `values` is converted to float32; its last axis, a multiple of the block size, is the row.
    `importance`, one weight per column, steers the types that can use it. Returns uint8 of the same
    shape, the last axis in bytes.
    """
    kind = tensor_type(type)
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim == 0 or array.shape[-1] % kind.block_size:
        raise ArgumentError(
            f"rows of {kind.name} are multiples of {kind.block_size} elements, "
            f"this array has shape {array.shape}"
        )
    n_per_row = array.shape[-1]
    row_bytes = n_per_row // kind.block_size * kind.block_bytes
    blocks = np.empty((*array.shape[:-1], row_bytes), np.uint8)
    if array.size:
        error = new_error()
        check(
            lib.qi_type_encode(
                kind.number,
                ffi.from_buffer("float[]", array),
                array.size,
                n_per_row,
                _weights(importance, n_per_row),
                ffi.from_buffer(blocks),
                error,
            ),
            error,
        )
    return blocks


def convert(
    blocks: NDArray[np.uint8],
    old: str,
    new: str,
    shape: tuple[int, ...],
    *,
    importance: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """Blocks of one type as blocks of another; those of the same type after a look at each value.

    `shape` is that of the values, the last axis the row, and `importance` as in `encode`. Returns
    uint8 of one axis. Raises ArgumentError at a value that is not finite or too large for the type.
    """
    source, target = tensor_type(old), tensor_type(new)
    data = np.ascontiguousarray(blocks)
    n_elements, n_per_row = prod(shape), shape[-1]
    _check_size(data, source, shape)
    out, out_pointer = data, ffi.NULL
    if target != source:
        out = np.empty(n_elements // target.block_size * target.block_bytes, np.uint8)
        out_pointer = ffi.from_buffer(out)
    if n_elements:
        error = new_error()
        check(
            lib.qi_type_convert(
                source.number,
                ffi.from_buffer(data),
                n_elements,
                n_per_row,
                _weights(importance, n_per_row),
                target.number,
                out_pointer,
                error,
            ),
            error,
        )
    return out


def decode(
    blocks: NDArray[np.uint8] | bytes, type: str, shape: tuple[int, ...] | None = None
) -> NDArray[np.float32]:
    """Blocks of a type as float32.

    `shape` is that of the values (the last axis is the row); without it, the shape of `blocks` with
    its last axis counted in elements instead of bytes.
    """
    kind = tensor_type(type)
    data = np.ascontiguousarray(
        np.frombuffer(blocks, np.uint8) if isinstance(blocks, bytes) else blocks
    )
    if data.dtype != np.uint8 or data.ndim == 0:
        raise ArgumentError(f"blocks are an array of uint8, not {data.dtype} of shape {data.shape}")
    if shape is None:
        shape = (*data.shape[:-1], data.shape[-1] // kind.block_bytes * kind.block_size)
    n_elements = prod(shape)
    _check_size(data, kind, shape)
    values = np.empty(shape, np.float32)
    if n_elements:
        error = new_error()
        check(
            lib.qi_type_decode(
                kind.number,
                ffi.from_buffer(data),
                n_elements,
                ffi.from_buffer("float[]", values),
                error,
            ),
            error,
        )
    return values


def _weights(importance: ArrayLike | None, n_per_row: int) -> Any:
    """Importance as the library takes it."""
    if importance is None:
        return ffi.NULL
    weights = np.ascontiguousarray(importance, dtype=np.float32)
    if weights.shape != (n_per_row,):
        raise ArgumentError(f"importance has shape {weights.shape}, not {(n_per_row,)}")
    return ffi.from_buffer("float[]", weights)


def _check_size(data: NDArray[np.uint8], kind: TensorType, shape: tuple[int, ...]) -> None:
    n_elements = prod(shape)
    if (
        n_elements % kind.block_size
        or n_elements // kind.block_size * kind.block_bytes != data.nbytes
    ):
        raise ArgumentError(
            f"{data.nbytes} bytes are not the blocks of {shape} elements of {kind.name} "
            f"({kind.block_bytes} bytes per {kind.block_size} elements)"
        )
