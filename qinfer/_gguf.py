"""GGUF files: a reader that copies nothing, and a writer that leaves whole files or none."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ._files import StrPath
from ._interrupt import run_interruptibly
from ._native import Handle, check, ffi, lib, new_error, view
from ._strings import StringTable
from ._types import tensor_type, type_name
from .errors import ArgumentError, FormatError

Progress = Callable[[int, int], None]

# GGUF's value types by number: name, and the letter that `struct` and NumPy both use for those
# stored as packed items.
_VALUE_TYPES: dict[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    8: ("string", ""),
    9: ("array", ""),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_NUMBERS = {name: number for number, (name, _) in _VALUE_TYPES.items()}
_STRING = _NUMBERS["string"]
_ARRAY = _NUMBERS["array"]


def path_bytes(path: StrPath) -> bytes:
    """A path as the bytes the operating system sees."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ArgumentError(f"the path {os.fsdecode(path)!r} contains a NUL character")
    return encoded


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Facts about a GGUF file; `n_bytes` counts all parts of a split file."""

    version: int
    is_powerinfer: bool
    alignment: int
    n_files: int
    n_kv: int
    n_tensors: int
    n_bytes: int
    header_bytes: int


class TensorInfo:
    """A tensor of a file.

    `shape` is in NumPy's order, the last axis contiguous. `n_bytes` is 0 when the type is unknown.
    """

    def __init__(self, owner: Any, description: Any) -> None:
        self._owner = owner
        self._address = description.data
        self.name: str = ffi.buffer(description.name, description.name_length)[:].decode(
            "utf-8", "replace"
        )
        dims = description.dims
        self.shape: tuple[int, ...] = tuple(dims[i] for i in reversed(range(description.n_dims)))
        self.type: str = type_name(description.type)
        self.n_bytes: int = description.n_bytes
        self.file_index: int = description.file_index
        self.file_offset: int = description.file_offset

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def data(self) -> NDArray[np.uint8]:
        """The tensor's bytes as they stand in the file: read-only, shape (n_bytes,).

        The array stays valid after the file is closed. Raises ArgumentError when the file was
        opened with `tensors=False`.
        """
        if self._address == ffi.NULL:
            raise ArgumentError(f"tensor {self.name!r}: the file was opened without its tensors")
        array = np.frombuffer(view(self._owner, self._address, self.n_bytes), np.uint8)
        array.flags.writeable = False
        return array

    def __repr__(self) -> str:
        return f"TensorInfo(name={self.name!r}, shape={self.shape}, type={self.type!r})"


class Metadata(Mapping[str, object]):
    """A file's key-value pairs: str, int, float, bool or a list of them.

    A value is read when it is asked for. Strings that are not UTF-8 come with replacement
    characters; `GGUF.raw_strings` has their bytes.
    """

    def __init__(self, file: GGUF, values: dict[str, object]) -> None:
        self._file = file
        self._values = values  # those read so far

    def __len__(self) -> int:
        return self._file.info.n_kv

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._file.find(key) >= 0

    def __getitem__(self, key: str) -> object:
        if key not in self._values:
            index = self._file.find(key)
            if index < 0:
                raise KeyError(key)
            self._values[key] = self._file.value(index)
        return self._values[key]


class GGUF:
    """A GGUF or PowerInfer file, validated when it is opened; split parts count as one file.

    `mmap=False` reads the file into private memory, for files that others may truncate meanwhile;
    that takes a while, can be stopped by Ctrl-C, and calls `progress(done, total)`, in bytes, about
    twenty times a second. `tensors=False` reads metadata and descriptions only and accepts files
    without tensor data.
    Raises FileError when the file cannot be read, and FormatError, naming the key, tensor or
    offset, when it is not a well-formed GGUF file.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        mmap: bool = True,
        tensors: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.path = os.fsdecode(path)
        name = path_bytes(path)
        out = ffi.new("qi_gguf **")
        error = new_error()
        if mmap or not tensors:
            flags = 0 if tensors else lib.QI_GGUF_NO_TENSORS
            check(lib.qi_gguf_open(name, len(name), flags, ffi.NULL, out, error), error)
        else:
            check(_read(name, out, error, progress), error)
        self._handle = Handle(out[0], lib.qi_gguf_close, f"the file {self.path}")
        self._values: dict[str, object] = {}

    @property
    def metadata(self) -> Metadata:
        """The key-value pairs."""
        # Not kept: the two would hold each other, and with them the mapped file, until a collection
        # of garbage.
        return Metadata(self, self._values)

    @property
    def pointer(self) -> Any:
        """The C file."""
        return self._handle.pointer

    @cached_property
    def info(self) -> FileInfo:
        """Version, alignment, counts and sizes."""
        out = ffi.new("qi_gguf_info *")
        check(lib.qi_gguf_get_info(self.pointer, out))
        return FileInfo(
            version=out.version,
            is_powerinfer=bool(out.is_powerinfer),
            alignment=out.alignment,
            n_files=out.n_files,
            n_kv=out.n_kv,
            n_tensors=out.n_tensors,
            n_bytes=out.n_bytes,
            header_bytes=out.header_bytes,
        )

    @cached_property
    def keys(self) -> list[str]:
        """The keys of the metadata in file order."""
        return [self._key(self._kv(index)) for index in range(self.info.n_kv)]

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """The tensors in file order."""
        pointer = self.pointer
        out = ffi.new("qi_gguf_tensor *")
        error = new_error()
        tensors = []
        for index in range(self.info.n_tensors):
            check(lib.qi_gguf_get_tensor(pointer, index, out, error), error)
            tensors.append(TensorInfo(pointer, out))
        return tensors

    @property
    def header(self) -> bytes:
        """The bytes of the first file up to the end of its tensor descriptions."""
        pointer = self.pointer
        return bytes(ffi.buffer(lib.qi_gguf_header(pointer), self.info.header_bytes))

    def raw_strings(self, key: str) -> list[bytes]:
        """The bytes of a string or array of strings, which need not be UTF-8.

        Raises KeyError when the key is absent and FormatError when it holds something else.
        """
        index = self.find(key)
        if index < 0:
            raise KeyError(key)
        return list(self._strings(index, self._kv(index).n_items))

    def string_array(self, key: str) -> StringTable:
        """An array of strings as it is stored.

        Raises KeyError when the key is absent and FormatError when it holds something else.
        """
        kind = self.value_type(key)
        if kind != "array of string":
            raise FormatError(f"{self.path}: {key} is of type {kind}; wanted an array of string")
        index = self.find(key)
        return self._strings(index, self._kv(index).n_items)

    def find(self, key: str) -> int:
        """Index of a key, or -1."""
        name = key.encode("utf-8", "surrogateescape")
        return int(lib.qi_gguf_find_kv(self.pointer, name, len(name)))

    def value(self, index: int) -> object:
        """The value of the key at an index."""
        kv = self._kv(index)
        if kv.item_type == _STRING:
            table = self._strings(index, kv.n_items)
            strings = [item.decode("utf-8", "replace") for item in table]
            return strings if kv.type == _ARRAY else strings[0]
        name, letter = _VALUE_TYPES[kv.item_type]
        if not letter:
            raise FormatError(f"{self.path}: key {self._key(kv)!r} is an array of {name}s")
        dtype = np.dtype(letter)
        data = ffi.buffer(kv.data, kv.n_items * dtype.itemsize) if kv.n_items else b""
        items: list[object] = np.frombuffer(data, dtype).tolist()
        return items if kv.type == _ARRAY else items[0]

    def value_type(self, key: str) -> str:
        """The stored type of a key: "u32", "array of string"… Raises KeyError when it is absent."""
        index = self.find(key)
        if index < 0:
            raise KeyError(key)
        kv = self._kv(index)
        name, _ = _VALUE_TYPES[kv.type]
        if kv.type != _ARRAY:
            return name
        return f"array of {_VALUE_TYPES[kv.item_type][0]}"

    def _kv(self, index: int) -> Any:
        out = ffi.new("qi_gguf_kv *")
        error = new_error()
        check(lib.qi_gguf_get_kv(self.pointer, index, out, error), error)
        return out

    @staticmethod
    def _key(kv: Any) -> str:
        return str(ffi.buffer(kv.key, kv.key_length)[:].decode("utf-8", "surrogateescape"))

    def _strings(self, index: int, n_items: int) -> StringTable:
        pointer = self.pointer
        text = ffi.new("char **")
        offsets = ffi.new("uint64_t **")
        error = new_error()
        check(lib.qi_gguf_kv_strings(pointer, index, text, offsets, error), error)
        # Copies: the table outlives the file.
        bounds = np.frombuffer(ffi.buffer(offsets[0], 8 * (n_items + 1)), np.int64).copy()
        return StringTable(bytes(ffi.buffer(text[0], int(bounds[-1]))), bounds)

    def close(self) -> None:
        """Closes the file; calling it again does nothing. Arrays taken from it stay valid."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUF({self.path!r})"


def _read(name: bytes, out: Any, error: Any, progress: Progress | None) -> int:
    """Opens a file by reading it into memory; gives the status."""
    state = ffi.new("qi_read_progress *")

    def poll() -> None:
        if progress is not None and state.n_bytes:
            progress(state.n_read, state.n_bytes)

    def cancel() -> None:
        state.cancel = 1

    try:
        status = run_interruptibly(
            lambda: int(lib.qi_gguf_open(name, len(name), lib.QI_GGUF_NO_MMAP, state, out, error)),
            cancel,
            poll,
        )
        poll()
    except BaseException:
        lib.qi_gguf_close(out[0])  # it may have come to its end all the same; NULL is fine
        raise
    return status


class Writer:
    """Writes a GGUF (or, with `powerinfer`, a PWRI) file.

    Add every key first, then describe every tensor, then write their data in the same order.

    The file appears under its name when `finish()` is called; closing before that, as leaving a
    `with` block by an exception does, leaves nothing behind. Leaving the block normally finishes
    the file.
    """

    def __init__(self, path: StrPath, *, powerinfer: bool = False, alignment: int = 32) -> None:
        self.path = os.fsdecode(path)
        name = path_bytes(path)
        out = ffi.new("qi_gguf_writer **")
        error = new_error()
        if not 0 < alignment < 2**32:
            raise ArgumentError(f"alignment {alignment} is not a positive number of bytes")
        check(
            lib.qi_gguf_writer_create(name, len(name), int(powerinfer), alignment, out, error),
            error,
        )
        self._handle = Handle(out[0], lib.qi_gguf_writer_close, f"the writer of {self.path}")

    def add(self, key: str, value: object, type: str | None = None) -> None:
        """Adds a key.

        Without `type` ("u8" … "f64", "bool", "string"; of the items, for a list), bool is stored as
        bool, int as the first of u32, i32, u64, i64 that holds it, float as f32, str or bytes as
        string, an array by its dtype.
        """
        items: Sequence[object] | NDArray[Any]
        is_array = isinstance(value, (list, tuple, np.ndarray))
        items = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        kind = type or _infer_type(key, items)
        if kind not in _NUMBERS or kind == "array":
            raise ArgumentError(f"key {key!r}: unknown type {kind!r}")
        if kind == "string":
            self._add_strings(key, items, is_array)
        else:
            self._add_numbers(key, items, is_array, kind)

    def _add_strings(self, key: str, items: Any, is_array: bool) -> None:
        encoded = []
        for item in items:
            if not isinstance(item, (str, bytes)):
                raise ArgumentError(f"key {key!r}: {item!r} is not a string")
            encoded.append(item.encode() if isinstance(item, str) else item)
        lengths = [0, *map(len, encoded)]
        offsets = np.cumsum(np.array(lengths, np.uint64), dtype=np.uint64)
        name = key.encode()
        error = new_error()
        check(
            lib.qi_gguf_writer_add_strings(
                self._handle.pointer,
                name,
                len(name),
                int(is_array),
                b"".join(encoded),
                ffi.from_buffer("uint64_t[]", offsets),
                len(encoded),
                error,
            ),
            error,
        )

    def _add_numbers(self, key: str, items: Any, is_array: bool, kind: str) -> None:
        data = _pack(key, items, kind)
        name = key.encode()
        number = _NUMBERS[kind]
        error = new_error()
        check(
            lib.qi_gguf_writer_add_kv(
                self._handle.pointer,
                name,
                len(name),
                _ARRAY if is_array else number,
                number,
                len(items),
                data,
                len(data),
                error,
            ),
            error,
        )

    def add_tensor(self, name: str, shape: Sequence[int], type: str) -> None:
        """Describes the next tensor: `shape` in NumPy's order, `type` a name such as "Q4_0"."""
        encoded = name.encode()
        dims = [int(n) for n in reversed(shape)]
        if any(n < 0 for n in dims):
            raise ArgumentError(f"tensor {name!r}: shape {tuple(shape)} has a negative axis")
        error = new_error()
        check(
            lib.qi_gguf_writer_add_tensor(
                self._handle.pointer,
                encoded,
                len(encoded),
                tensor_type(type).number,
                len(dims),
                ffi.new("uint64_t[]", dims),
                error,
            ),
            error,
        )

    def write(self, data: NDArray[Any] | bytes) -> None:
        """Writes the next piece, of any size, of tensor data: bytes, or those of an array."""
        buffer = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data
        source = ffi.from_buffer(buffer)
        error = new_error()
        check(lib.qi_gguf_writer_write(self._handle.pointer, source, len(source), error), error)

    def finish(self) -> None:
        """Completes the file and gives it its name; raises ArgumentError when data is missing."""
        error = new_error()
        check(lib.qi_gguf_writer_finish(self._handle.pointer, error), error)
        self._handle.close()

    def close(self) -> None:
        """Discards an unfinished file; calling it again, or after `finish()`, does nothing."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and not self._handle.closed:
            self.finish()
        self.close()


def _infer_type(key: str, items: Any) -> str:
    """The type a value is stored in when none was named."""
    if isinstance(items, np.ndarray):
        for name, letter in _VALUE_TYPES.values():
            if letter and items.dtype == np.dtype(letter):
                return name
        raise ArgumentError(f"key {key!r}: an array of {items.dtype} has no GGUF type")
    if not items:
        raise ArgumentError(f"key {key!r}: an empty list needs a type")
    if all(isinstance(item, bool) for item in items):
        return "bool"
    if all(isinstance(item, (str, bytes)) for item in items):
        return "string"
    if all(isinstance(item, int) for item in items):
        for name, low, high in (
            ("u32", 0, 2**32),
            ("i32", -(2**31), 2**31),
            ("u64", 0, 2**64),
            ("i64", -(2**63), 2**63),
        ):
            if all(low <= item < high for item in items):
                return name
    elif all(isinstance(item, (int, float)) for item in items):
        return "f32"
    raise ArgumentError(f"key {key!r}: {items[0]!r} has no GGUF type")


def _pack(key: str, items: Any, kind: str) -> bytes:
    """Numbers as the packed bytes of a type; refuses what the type cannot hold."""
    letter = _VALUE_TYPES[_NUMBERS[kind]][1]
    values = items.tolist() if isinstance(items, np.ndarray) else items
    try:
        return struct.pack(f"<{len(values)}{letter}", *values)
    except (struct.error, OverflowError) as problem:
        raise ArgumentError(f"key {key!r}: the value does not fit in {kind} ({problem})") from None
