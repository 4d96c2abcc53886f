"""Files of torch (`.pt`, `.bin`) without torch: tensors read lazily, pickles that can do nothing.

A pickle is a program that may call whatever it names. Here it may name the types tensors are made
of, and nothing else.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from ._file_tensor import DTYPES, FileTensor
from ._files import StrPath, whole_file
from .errors import ArgumentError, FileError, FormatError

# torch's storage classes, and its names of element types.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_ELEMENTS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# torch aligns the data of its archives so, for files that are mapped.
_ALIGNMENT = 64
# An entry of ours, and the most that it holds.
_NOTE = "qinfer/note"
_MAX_NOTE = 1024


def load(path: StrPath) -> Any:
    """What a torch file holds, with a `FileTensor` for each tensor.

    Ordered dicts come as dict; otherwise there are dict, list, tuple, str, int, float, bool and
    None. Reads the formats of torch 1.6 and later and of those before. Raises FileError when the
    file cannot be read, FormatError when it is no such file, is cut short, or when its pickle names
    anything that is not part of a tensor.
    """
    source = os.fsdecode(path)
    with _readable(source) as file:
        start = file.read(4)
        file.seek(0)
        if start[:2] == b"PK":
            return _load_zip(source, file)
        if start[:1] == b"\x80":
            return _load_legacy(source, file)
        raise FormatError(f"{source}: is not a file of torch: neither a zip archive nor a pickle")


def load_tensors(path: StrPath) -> dict[str, FileTensor]:
    """A state dict: the tensors by name.

    Raises as `load` does, and FormatError when the file holds something else.
    """
    state = load(path)
    if not isinstance(state, dict):
        raise FormatError(
            f"{os.fsdecode(path)}: holds a {_kind(state)}, expected a dict of tensors by name"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, FileTensor):
            raise FormatError(
                f"{os.fsdecode(path)}: entry {name!r:.80} is a {_kind(value)}, expected a tensor"
            )
    return state


def load_tensor(path: StrPath) -> FileTensor:
    """A file that holds one bare tensor.

    Raises as `load` does, and FormatError when the file holds something else.
    """
    tensor = load(path)
    if not isinstance(tensor, FileTensor):
        raise FormatError(f"{os.fsdecode(path)}: holds a {_kind(tensor)}, expected a bare tensor")
    return tensor


def load_note(path: StrPath) -> bytes:
    """What `save_tensor` noted in a file beside its tensor; empty where nothing is.

    Raises FileError when the file cannot be read, FormatError when it is a damaged archive.
    """
    source = os.fsdecode(path)
    with _readable(source) as file:
        if not zipfile.is_zipfile(file):
            return b""
        with _well_formed(source), zipfile.ZipFile(file) as archive:
            notes = [e for e in archive.infolist() if e.filename.partition("/")[2] == _NOTE]
            if not notes or notes[0].file_size > _MAX_NOTE:
                return b""
            return archive.read(notes[0])


def save_tensor(path: StrPath, values: ArrayLike, note: bytes = b"") -> None:
    """Writes one bare tensor, of any shape, as a file that `torch.load` reads.

    A note is kept in an entry of its own, which torch does not look at. The file appears under its
    name when complete. Raises ArgumentError for an element type that torch has not, FileError when
    the file cannot be written.
    """
    array = np.asarray(values, order="C")
    names = {DTYPES[dtype]: name for name, dtype in _STORAGES.items() if dtype != "BF16"}
    names[np.dtype("u1")] = "ByteStorage"
    storage = names.get(array.dtype.newbyteorder("<"))
    if storage is None:
        known = ", ".join(sorted(map(str, names)))
        raise ArgumentError(f"an array of {array.dtype} has no torch file; known are {known}")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    name = Path(path).stem or "archive"
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        _store(archive, f"{name}/data.pkl", _tensor_pickle(storage, array.shape))
        _store(archive, f"{name}/byteorder", b"little")
        _store(archive, f"{name}/data/0", array.tobytes())
        _store(archive, f"{name}/version", b"3\n")
        if note:
            _store(archive, f"{name}/{_NOTE}", note)


# ---- reading ----


class _Storage:
    """A run of elements in the file; `offset` is known once the file has been walked."""

    __slots__ = ("dtype", "n_bytes", "offset")

    def __init__(self, dtype: str, n_bytes: int, offset: int | None) -> None:
        self.dtype = dtype
        self.n_bytes = n_bytes
        self.offset = offset


class _Name:
    """A storage class or element type: a name for a pickle to carry, which calls nothing."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class _Draft:
    """A tensor whose storage may not have been found yet."""

    __slots__ = ("dtype", "first", "shape", "storage", "strides")

    def __init__(
        self,
        storage: object,
        first: object,
        shape: object,
        strides: object,
        *,
        dtype: str | None = None,
    ) -> None:
        if not isinstance(storage, _Storage):
            raise _Broken("a tensor without a storage")
        self.storage = storage
        self.dtype = dtype or storage.dtype
        self.first = _naturals((first,))[0]
        self.shape = _naturals(shape)
        self.strides = _naturals(strides)
        if len(self.shape) != len(self.strides):
            raise _Broken(f"a tensor of shape {self.shape} with strides {self.strides}")

    def place(self, path: str) -> FileTensor:
        """The tensor, checked to lie inside its storage."""
        itemsize = DTYPES[self.dtype].itemsize
        n_elements = prod(self.shape)
        storage = self.storage
        if storage.offset is None:
            raise _Broken("a storage that the file does not hold")
        last = self.first + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        # A tensor larger than its storage repeats elements; nobody saves weights so.
        if n_elements and (
            (last + 1) * itemsize > storage.n_bytes or n_elements * itemsize > storage.n_bytes
        ):
            raise _Broken(
                f"a tensor of shape {self.shape} outside its storage of {storage.n_bytes} bytes"
            )
        return FileTensor(
            path, self.dtype, self.shape, self.strides, storage.offset + self.first * itemsize
        )


class _Dict(dict[Any, Any]):
    """Stands for OrderedDict; the attributes a pickle may give it are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Call:
    """What a pickle may call. It keeps nothing a pickle could change for the next one."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any) -> Any:
        if self._name == "OrderedDict":
            return _Dict(*args)
        if self._name == "Size":
            return tuple(*args)
        if self._name == "_rebuild_parameter":
            return args[0]
        if self._name == "_rebuild_tensor_v3":
            element = args[6]
            if not isinstance(element, _Name):
                raise _Broken("a tensor without an element type")
            return _Draft(*args[:4], dtype=element.dtype)
        return _Draft(*args[:4])


_CALLS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Broken(Exception):  # noqa: N818
    """What is wrong with a pickle; `load` adds the file's name."""


class _Unpickler(pickle.Unpickler):
    """Runs a pickle that may name the parts of tensors only."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _CALLS:
            return _Call(name)
        if module in ("torch", "torch.storage"):
            dtype = _STORAGES.get(name) or _ELEMENTS.get(name)
            if dtype is not None:
                return _Name(dtype)
        raise FormatError(
            f"{self._path}: its pickle asks for {module}.{name}, which is not part of a tensor; "
            "refused, as such a file could run any program"
        )

    def storage(self, key: str, dtype: str, n_elements: int) -> _Storage:
        """The storage of a key."""
        raise NotImplementedError

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise _Broken("a reference that is not to a storage")
        _, element, key, _, n_elements = pid[:5]
        if not isinstance(element, _Name) or not isinstance(key, str):
            raise _Broken("a storage without a type")
        if len(pid) > 5 and pid[5] is not None:
            raise _Broken("a storage that is part of another")
        return self.storage(key, element.dtype, _naturals((n_elements,))[0])


class _ZipUnpickler(_Unpickler):
    """The pickle of an archive, whose storages are entries of it."""

    def __init__(
        self, file: IO[bytes], path: str, data: IO[bytes], entries: dict[str, zipfile.ZipInfo]
    ) -> None:
        super().__init__(file, path)
        self._data = data
        self._entries = entries

    def storage(self, key: str, dtype: str, n_elements: int) -> _Storage:
        entry = self._entries.get(key)
        if entry is None:
            raise _Broken(f"storage {key!r}, which the archive does not hold")
        n_bytes = n_elements * DTYPES[dtype].itemsize
        if n_bytes > entry.file_size:
            raise _Broken(f"storage {key!r} of {n_bytes} bytes with {entry.file_size} of data")
        return _Storage(dtype, n_bytes, _data_offset(self._data, entry))


class _LegacyUnpickler(_Unpickler):
    """The pickle of an older file, whose storages follow it."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__(file, path)
        self.storages: dict[str, _Storage] = {}

    def storage(self, key: str, dtype: str, n_elements: int) -> _Storage:
        known = self.storages.get(key)
        if known is None:
            n_bytes = n_elements * DTYPES[dtype].itemsize
            known = self.storages[key] = _Storage(dtype, n_bytes, None)
        return known


def _load_zip(path: str, file: IO[bytes]) -> Any:
    with _well_formed(path), zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Broken(f"a zip archive with {len(pickles)} entries called data.pkl, not one")
        folder = pickles[0].removesuffix("data.pkl")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise _Broken(
                    f"entry {entry.filename!r} compressed or encrypted, as torch does not"
                )
        order = entries.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise _Broken("the bytes of another machine's order; save it again on this one")
        prefix = f"{folder}data/"
        data = {
            name.removeprefix(prefix): entry
            for name, entry in entries.items()
            if name.startswith(prefix)
        }
        with archive.open(pickles[0]) as program:
            root = _ZipUnpickler(program, path, file, data).load()
        return _place(root, path, {})


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the data of a stored entry begins: after its local header."""
    # The archive reads through the same file, each time from a position of its own.
    position = file.tell()
    file.seek(entry.header_offset)
    header = file.read(30)
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(position)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _Broken(f"no entry {entry.filename!r} where its archive says it is")
    n_name, n_extra = struct.unpack_from("<HH", header, 26)
    offset: int = entry.header_offset + 30 + n_name + n_extra
    if offset + entry.file_size > size:
        raise _Broken(f"entry {entry.filename!r} cut short")
    return offset


def _load_legacy(path: str, file: IO[bytes]) -> Any:
    with _well_formed(path):
        if _Unpickler(file, path).load() != _LEGACY_MAGIC:
            raise _Broken("a pickle that does not begin as a file of torch")
        if _Unpickler(file, path).load() != _LEGACY_PROTOCOL:
            raise _Broken("an unknown version of torch's older format")
        machine = _Unpickler(file, path).load()
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise _Broken("the bytes of another machine's order; save it again on this one")
        program = _LegacyUnpickler(file, path)
        root = program.load()
        keys = _Unpickler(file, path).load()
        size = os.fstat(file.fileno()).st_size
        for key in keys:
            storage = program.storages[key]
            offset = file.tell() + 8
            (n_elements,) = struct.unpack("<q", file.read(8))
            itemsize = DTYPES[storage.dtype].itemsize
            if n_elements < 0 or n_elements * itemsize < storage.n_bytes:
                raise _Broken(f"storage {key!r} of {n_elements} elements, too few for its tensors")
            if offset + n_elements * itemsize > size:
                raise _Broken(f"storage {key!r} cut short")
            storage.offset = offset
            file.seek(offset + n_elements * itemsize)
        return _place(root, path, {})


def _place(value: Any, path: str, placed: dict[int, Any]) -> Any:
    """The value with its tensors placed in the file, in plain containers.

    `placed` has what was met before, by `id`: containers that share others would take forever.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if id(value) not in placed:
        if isinstance(value, _Draft):
            new: Any = value.place(path)
        elif isinstance(value, dict):
            new = {
                _place(key, path, placed): _place(item, path, placed) for key, item in value.items()
            }
        elif isinstance(value, (list, tuple)):
            new = type(value)(_place(item, path, placed) for item in value)
        else:
            raise _Broken(f"a {_kind(value)}")
        placed[id(value)] = new
    return placed[id(value)]


def _naturals(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        isinstance(value, int) and 0 <= value < 2**62 for value in values
    ):
        raise _Broken(f"{values!r:.80} where sizes of a tensor belong")
    return tuple(values)


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, FileTensor) else type(value).__name__.strip("_").lower()


@contextmanager
def _readable(path: str) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            yield file
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _well_formed(path: str) -> Iterator[None]:
    """Turns whatever a malformed file provokes into a FormatError."""
    try:
        yield
    except (FormatError, OSError):
        raise
    except _Broken as problem:
        raise FormatError(f"{path}: is not a torch file of tensors: it holds {problem}") from None
    except zipfile.BadZipFile:
        raise FormatError(f"{path}: is not a whole zip archive; is it cut short?") from None
    # A pickle can end in any exception at all, one of nesting or of memory included.
    except Exception as problem:
        raise FormatError(
            f"{path}: its pickle is malformed or cut short ({type(problem).__name__}: {problem})"
        ) from None


# ---- writing ----


def _tensor_pickle(storage: str, shape: tuple[int, ...]) -> bytes:
    """A pickle that rebuilds one tensor from storage "0"."""
    n_elements = prod(shape)
    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))

    def globally(module: str, name: str) -> bytes:
        return b"c" + f"{module}\n{name}\n".encode()

    def plain(value: object) -> bytes:
        # Without its protocol and stop marks, a pickle is a piece of another.
        return pickle.dumps(value, 2)[2:-1]

    reference = b"(" + plain("storage") + globally("torch", storage)
    reference += plain("0") + plain("cpu") + plain(n_elements) + b"tQ"
    arguments = reference + plain(0) + plain(shape) + plain(strides) + plain(False)
    arguments += globally("collections", "OrderedDict") + b")R"
    return b"\x80\x02" + globally("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR."


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Adds an entry, uncompressed and aligned."""
    entry = zipfile.ZipInfo(name)  # of 1980, so that equal tensors make equal files
    padding = -(archive.start_dir + 30 + len(name.encode()) + 4) % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(entry, data)
