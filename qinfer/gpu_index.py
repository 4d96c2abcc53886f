"""GPU split files (`.generated.gpuidx`): which feed-forward neurons of a model go to the GPU.

The container is that of GGUF version 3 with the magic PWRI. A layer whose neurons all stay on the
CPU has an empty tensor, which model files never have, so these files have a reader of their own.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ._files import StrPath, whole_file
from .errors import ArgumentError, FileError, FormatError

Ids = NDArray[np.int32]

_MAGIC = b"PWRI"
_VERSION = 3
_ALIGNMENT = 32
_ARCHITECTURE = "generic.gpu_index"
_KEY_ARCHITECTURE = "general.architecture"
_KEY_LAYERS = f"{_ARCHITECTURE}.block_count"
_KEY_CAPACITY = "split.vram_capacity"
_KEY_ALIGNMENT = "general.alignment"
# Ours: the fingerprint of the model file it was made for, 64 hexadecimal digits. PowerInfer's
# loader looks for its own keys alone.
_KEY_FILE = "qinfer.model_fingerprint"
_FINGERPRINT = re.compile("[0-9a-f]{64}")

# GGUF's numbers of value types.
_U32, _STRING, _U64 = 4, 8, 10
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
# The number of the tensor type I32: PowerInfer's, which left GGUF when it was that, and what GGUF's
# own writers put there today. PowerInfer's loader crashes on the latter.
_I32 = 18
_I32_NUMBERS = (_I32, 26)

# Splits of the largest models take tens of megabytes. Models have the same magic and are easily
# named by mistake; they are not read into memory to find that out.
_MAX_BYTES = 1 << 30

# Holds the few keys of a split.
_BEGINNING = 1024

# The tensors of a layer in file order: of PowerInfer, and what Q-Infer adds.
_GATE_UP = ("gpu_idx", "gpu_bucket")
_DOWN = ("gpu_idx_down", "gpu_bucket_down")


@dataclass(frozen=True, slots=True, eq=False)
class GpuIndex:
    """Which neurons of each layer are on the GPU.

    Attributes:
        n_ff: neurons of a layer.
        gate_up: per layer, the neurons whose rows of gate and up are on the GPU: ascending ids,
            int32, shape (k,) with 0 <= k <= n_ff.
        down: the same of the rows of down, where a file places them apart, as Q-Infer's do; None
            when they go with gate and up, as in PowerInfer's.
        vram_capacity: bytes of GPU memory the split was made for. PowerInfer uses a file as long
            as it may use at least as many.
        path: the file it was read from, for messages; empty when it was made otherwise.
        fingerprint: 32 bytes that tell which model file it was made for; empty where nothing does,
            as in files of other programs.

    Raises:
        ArgumentError: a layer's ids are not ascending, or not ids of its neurons.
    """

    n_ff: int
    gate_up: tuple[Ids, ...]
    down: tuple[Ids, ...] | None = None
    vram_capacity: int = 0
    path: str = ""
    fingerprint: bytes = b""

    def __post_init__(self) -> None:
        if not 1 <= self.n_ff < 2**31:
            raise ArgumentError(f"n_ff={self.n_ff} is not a number of neurons")
        if not 0 <= self.vram_capacity < 2**64:
            raise ArgumentError(f"vram_capacity={self.vram_capacity} is not a number of bytes")
        if not self.gate_up:
            raise ArgumentError("a GPU split needs at least one layer")
        object.__setattr__(self, "gate_up", _checked(self.gate_up, self.n_ff))
        if self.down is not None:
            object.__setattr__(self, "down", _checked(self.down, self.n_ff))
            if len(self.down) != self.n_layers:
                raise ArgumentError(
                    f"gate and up are placed for {self.n_layers} layers, down for {len(self.down)}"
                )

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.gate_up)

    def neurons(self, layer: int) -> Ids:
        """Ids, ascending, of the neurons that are on the GPU whole: in gate, up and down."""
        if self.down is None:
            return self.gate_up[layer]
        return np.intersect1d(self.gate_up[layer], self.down[layer], assume_unique=True)

    def check(
        self, n_layers: int, n_ff: int, fingerprint: bytes = b"", *, name: str | None = None
    ) -> None:
        """Refuses the split of another model, or of another file.

        Args:
            n_layers, n_ff: of the model it is to be used with.
            fingerprint: of its file; compared where both sides have one.
            name: what to call this split in the message; None takes its path, if it has one.

        Raises:
            ArgumentError: they differ; the message names the tensor or the key.
        """
        name = name or self.path or "the GPU split"
        if self.n_layers != n_layers:
            raise ArgumentError(
                f"{name} is for another model: it has {self.n_layers} layers, up to tensor "
                f"'blk.{self.n_layers - 1}.{_GATE_UP[0]}', this model has {n_layers}"
            )
        if self.n_ff != n_ff:
            raise ArgumentError(
                f"{name} is for another model: tensor 'blk.0.{_GATE_UP[0]}' is of {self.n_ff} "
                f"neurons, a layer of this model has {n_ff}"
            )
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise ArgumentError(
                f"{name} is for another model or another file of it: its key {_KEY_FILE!r} is not "
                "that of this file; qinfer.tools.export_gpu_split --model makes one for it"
            )

    # ---- files ----

    def write(self, path: StrPath) -> None:
        """Writes a file: PowerInfer's two tensors a layer, or Q-Infer's four when `down` is given.

        The fingerprint is a key of its own, which they do not look at.

        The file takes its name when it is complete. Raises FileError when it cannot be written.
        """
        tensors: list[tuple[str, Ids]] = []
        for layer in range(self.n_layers):
            tensors += self._tensors(layer, _GATE_UP, self.gate_up[layer])
            if self.down is not None:
                tensors += self._tensors(layer, _DOWN, self.down[layer])
        head = [
            struct.pack("<4sIQQ", _MAGIC, _VERSION, len(tensors), 4 if self.fingerprint else 3),
            _text(_KEY_ARCHITECTURE) + struct.pack("<I", _STRING) + _text(_ARCHITECTURE),
            _text(_KEY_LAYERS) + struct.pack("<II", _U32, self.n_layers),
            _text(_KEY_CAPACITY) + struct.pack("<IQ", _U64, self.vram_capacity),
        ]
        if self.fingerprint:
            value = _text(self.fingerprint.hex())
            head.append(_text(_KEY_FILE) + struct.pack("<I", _STRING) + value)
        offset = 0
        for name, values in tensors:
            head.append(_text(name) + struct.pack("<IQIQ", 1, len(values), _I32, offset))
            offset += values.nbytes + _padding(values.nbytes)
        header = b"".join(head)
        with whole_file(path) as file:
            file.write(header + bytes(_padding(len(header))))
            for _, values in tensors:
                file.write(values.astype("<i4").tobytes() + bytes(_padding(values.nbytes)))

    def _tensors(self, layer: int, names: tuple[str, str], ids: Ids) -> list[tuple[str, Ids]]:
        on_gpu = np.zeros(self.n_ff, np.int32)
        on_gpu[ids] = 1
        return [(f"blk.{layer}.{names[0]}", on_gpu), (f"blk.{layer}.{names[1]}", ids)]

    @classmethod
    def read(cls, path: StrPath) -> Self:
        """Reads a file of either form.

        Raises:
            FileError: the file cannot be read.
            FormatError: it is not a GPU split, or a damaged one; the message names the file and
                the key or tensor.
        """
        try:
            n_bytes = Path(path).stat().st_size
            if n_bytes > _MAX_BYTES:
                raise FormatError(
                    f"{path}: not a GPU split: it has {n_bytes} bytes, a split a few megabytes"
                )
            content = Path(path).read_bytes()
        except OSError as error:
            raise FileError(f"{path}: cannot read: {error.strerror}") from error
        return cls._parse(str(path), content)

    @classmethod
    def _parse(cls, path: str, content: bytes) -> Self:
        reader = _Reader(path, content)
        keys, tensors = reader.header()
        if _KEY_ARCHITECTURE not in keys:
            raise reader.error(f"key {_KEY_ARCHITECTURE!r} is missing")
        n_layers = reader.number(keys, _KEY_LAYERS)
        capacity = reader.number(keys, _KEY_CAPACITY)
        if n_layers < 1 or len(tensors) not in (2 * n_layers, 4 * n_layers):
            raise reader.error(
                f"{len(tensors)} tensors for {n_layers} layers; "
                "PowerInfer's have two a layer, Q-Infer's four"
            )
        names = _GATE_UP if len(tensors) == 2 * n_layers else (*_GATE_UP, *_DOWN)
        expected = [f"blk.{layer}.{name}" for layer in range(n_layers) for name in names]
        for (name, _), wanted in zip(tensors, expected, strict=True):
            if name != wanted:
                raise reader.error(f"tensor {name!r} stands where {wanted!r} should")
        fingerprint = keys.get(_KEY_FILE, "")
        known = isinstance(fingerprint, str) and _FINGERPRINT.fullmatch(fingerprint)
        if _KEY_FILE in keys and not known:
            raise reader.error(
                f"key {_KEY_FILE!r} is {fingerprint!r:.80}, it should be 64 hexadecimal digits"
            )
        made_for = bytes.fromhex(str(fingerprint))
        n_ff = len(tensors[0][1])
        if n_ff == 0:
            raise reader.error(f"tensor {expected[0]!r} is empty")
        sets = [
            _ids(reader, n_ff, tensors[first], tensors[first + 1])
            for first in range(0, len(tensors), 2)
        ]
        if names == _GATE_UP:
            return cls(n_ff, tuple(sets), None, capacity, path, made_for)
        return cls(n_ff, tuple(sets[0::2]), tuple(sets[1::2]), capacity, path, made_for)


def is_gpu_index(path: StrPath) -> bool:
    """Whether a file says that it is a GPU split, sound or not; False when it cannot be read."""
    says = _text(_KEY_ARCHITECTURE) + struct.pack("<I", _STRING) + _text(_ARCHITECTURE)
    try:
        with Path(path).open("rb") as file:
            beginning = file.read(_BEGINNING)
    except OSError:
        return False
    return beginning.startswith(_MAGIC) and says in beginning


def _ids(reader: _Reader, n_ff: int, index: tuple[str, Ids], bucket: tuple[str, Ids]) -> Ids:
    """The ascending ids that a pair of tensors names; both must name the same."""
    name, on_gpu = index
    if len(on_gpu) != n_ff:
        raise reader.error(
            f"tensor {name!r} has {len(on_gpu)} neurons, that of the first layer has {n_ff}"
        )
    wrong = on_gpu[(on_gpu != 0) & (on_gpu != 1)]
    if len(wrong):
        raise reader.error(f"tensor {name!r} has the value {wrong[0]}; it holds 0 and 1 only")
    ids = np.flatnonzero(on_gpu).astype(np.int32)
    if not np.array_equal(np.sort(bucket[1]), ids):
        raise reader.error(
            f"tensor {bucket[0]!r} does not list the {len(ids)} neurons that {name!r} marks"
        )
    return ids


def _checked(layers: Iterable[Ids], n_ff: int) -> tuple[Ids, ...]:
    """Ids of each layer as int32."""
    checked = []
    for layer, given in enumerate(layers):
        ids = np.asarray(given)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ArgumentError(
                f"layer {layer}: neuron ids are a flat array of integers, "
                f"not {ids.dtype} of shape {ids.shape}"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= n_ff):
            raise ArgumentError(f"layer {layer}: neuron ids go from 0 to {n_ff - 1}")
        ids = ids.astype(np.int32)
        if np.any(np.diff(ids) <= 0):
            raise ArgumentError(f"layer {layer}: neuron ids are not ascending")
        checked.append(ids)
    return tuple(checked)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padding(length: int, alignment: int = _ALIGNMENT) -> int:
    """Bytes from a length to the next multiple of the alignment."""
    return -length % alignment


class _Reader:
    """Reads the container, and distrusts every number in it."""

    def __init__(self, path: str, content: bytes) -> None:
        self._path = path
        self._content = content
        self._at = 0

    def error(self, text: str) -> FormatError:
        """An error that names the file."""
        return FormatError(f"{self._path}: {text}")

    def number(self, keys: dict[str, object], key: str) -> int:
        """The value of a key that must be a non-negative integer."""
        value = keys.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"key {key!r} is {value!r}, it should be a number")
        return value

    def header(self) -> tuple[dict[str, object], list[tuple[str, Ids]]]:
        """The keys, and the tensors in file order: each one's name and values."""
        magic, version = self._take("<4sI", "the magic")
        if magic != _MAGIC:
            raise self.error(f"not a GPU split: it begins with {magic!r}, not {_MAGIC!r}")
        if version not in (2, 3):
            raise self.error(f"version {version}; versions 2 and 3 are known")
        n_tensors, n_keys = self._take("<QQ", "the counts")
        keys: dict[str, object] = {}
        for _ in range(n_keys):
            key = self._string("a key")
            if key in keys:
                raise self.error(f"key {key!r} appears twice")
            keys[key] = self._value(key)
            # At once, because the keys of a model, which may follow, are harder to explain.
            if key == _KEY_ARCHITECTURE and keys[key] != _ARCHITECTURE:
                raise self.error(
                    f"not a GPU split: {key} is {keys[key]!r}, that of a split is {_ARCHITECTURE!r}"
                )
        described = [self._description() for _ in range(n_tensors)]
        alignment = self.number(keys, _KEY_ALIGNMENT) if _KEY_ALIGNMENT in keys else _ALIGNMENT
        if alignment < 1:
            raise self.error(f"key {_KEY_ALIGNMENT!r} is {alignment}")
        start = self._at + _padding(self._at, alignment)
        tensors = [
            (name, self._tensor(name, length, start + offset)) for name, length, offset in described
        ]
        return keys, tensors

    def _take(self, layout: str, what: str) -> Sequence[Any]:
        end = self._at + struct.calcsize(layout)
        if end > len(self._content):
            raise self.error(f"ends at {len(self._content)} bytes, in the middle of {what}")
        values = struct.unpack_from(layout, self._content, self._at)
        self._at = end
        return values

    def _string(self, what: str) -> str:
        (length,) = self._take("<Q", what)
        end = self._at + length
        if end > len(self._content):
            raise self.error(f"ends at {len(self._content)} bytes, in the middle of {what}")
        text = self._content[self._at : end].decode("utf-8", "replace")
        self._at = end
        return text

    def _value(self, key: str) -> object:
        what = f"key {key!r}"
        (kind,) = self._take("<I", what)
        if kind == _STRING:
            return self._string(what)
        if kind not in _SCALARS:
            raise self.error(f"{what} has the type {kind}; a GPU split has numbers and texts only")
        value: object = self._take(_SCALARS[kind], what)[0]
        return value

    def _description(self) -> tuple[str, int, int]:
        """Name, length and offset of the next tensor."""
        name = self._string("a tensor's name")
        what = f"tensor {name!r}"
        (n_dims,) = self._take("<I", what)
        if not 1 <= n_dims <= 4:
            raise self.error(f"{what} has {n_dims} dimensions; it should have one")
        dims = self._take(f"<{n_dims}Q", what)
        kind, offset = self._take("<IQ", what)
        if kind not in _I32_NUMBERS:
            raise self.error(
                f"{what} has the type {kind}; it should be I32, which is {_I32}, or 26 in newer "
                "files"
            )
        if any(n != 1 for n in dims[1:]):
            raise self.error(f"{what} has the dimensions {dims}; it should have one")
        return name, prod(dims), offset

    def _tensor(self, name: str, length: int, start: int) -> Ids:
        if start + 4 * length > len(self._content):
            raise self.error(
                f"tensor {name!r} of {length} numbers goes beyond the end of the file, "
                f"which has {len(self._content)} bytes"
            )
        if length == 0:
            return np.empty(0, np.int32)
        return np.frombuffer(self._content, "<i4", length, start).astype(np.int32)
