"""Checkpoints of the Hugging Face kind: a folder with config.json and tensors, read lazily."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._file_tensor import DTYPES, FileTensor
from .._files import StrPath
from .._torch_file import load_tensors
from ..errors import ArgumentError, FileError, FormatError, UnsupportedError

# What transformers calls its files, in the order it prefers them.
_STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_SINGLE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_MOST_NAMED = 4


class Config:
    """A config.json; a value that is absent or of the wrong type is an error naming its key."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def integer(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The value of the first key that is there; without a default one has to be."""
        value = self._first(keys, f"an integer of {least} or more", default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            self._refuse(keys, value, f"an integer of {least} or more")
        return int(value)

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._first(keys, "a number", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(keys, value, "a number")
        if not math.isfinite(value):
            self._refuse(keys, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._first((key,), "true or false", default)
        if not isinstance(value, bool):
            self._refuse((key,), value, "true or false")
        return bool(value)

    def text(self, *keys: str, default: str | None = None) -> str:
        """A string."""
        value = self._first(keys, "a string", default)
        if not isinstance(value, str):
            self._refuse(keys, value, "a string")
        return str(value)

    def section(self, *keys: str) -> Config | None:
        """An object inside the file; None when it is absent."""
        for key in keys:
            if key in self:
                value = self._values[key]
                if not isinstance(value, dict):
                    self._refuse((key,), value, "an object")
                return Config(self.path, value, f"{self._prefix}{key}.")
        return None

    def unsupported(self, key: str, what: str) -> UnsupportedError:
        """The error for a value that means something this package does not do."""
        return UnsupportedError(
            f"{self.path}: {self._prefix}{key} is {self._values.get(key)!r:.60}; {what}"
        )

    def _first(self, keys: tuple[str, ...], expected: str, default: Any) -> Any:
        for key in keys:
            if key in self:
                return self._values[key]
        if default is None:
            names = " or ".join(f"{self._prefix}{key}" for key in keys)
            raise FormatError(f"{self.path}: key {names} is missing, expected {expected}")
        return default

    def _refuse(self, keys: tuple[str, ...], value: Any, expected: str) -> None:
        key = next(key for key in keys if key in self)
        raise FormatError(
            f"{self.path}: key {self._prefix}{key} is {value!r:.60}, expected {expected}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds; raises FileError or FormatError, naming the file."""
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not JSON: its bytes are not UTF-8") from None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"{path}: is not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


class Checkpoint:
    """A folder with a model as transformers saves it, or one of the files in it.

    Attributes:
        folder: where it lies.
        config: its config.json.
        tensors: by name, read when asked for.

    Raises:
        FileError: the folder or a file is missing or cannot be read.
        FormatError: a file is not what it should be.
        UnsupportedError: the folder has Meta's layout.
    """

    def __init__(self, model: StrPath) -> None:
        self.folder = checkpoint_folder(model)
        self.config = read_config(self.folder)
        files, index = _tensor_files(self.folder)
        self.tensors = _read_tensors(files)
        if index is not None:
            _check_places(index, self.tensors)


def checkpoint_folder(model: StrPath) -> Path:
    """The folder of a model that is named by its folder or by a file in it."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    raise FileError(f"{path}: there is no such folder")


def read_config(folder: Path) -> Config:
    """The config.json of a folder."""
    path = folder / "config.json"
    if not path.is_file() and (folder / "params.json").is_file():
        raise UnsupportedError(
            f"{folder}: is in Meta's layout (params.json); convert it with transformers' "
            "convert_llama_weights_to_hf.py first"
        )
    return Config(path, read_json(path))


def tensors_of(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file, safetensors or torch's, by name."""
    if path.suffix not in _SINGLE_SUFFIXES:
        raise ArgumentError(f"{path}: is not one of {', '.join(_SINGLE_SUFFIXES)}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)


def listing(tensors: Mapping[str, FileTensor]) -> Iterator[str]:
    """A line for each tensor: its name, type and shape."""
    width = max(map(len, tensors), default=0)
    for name, tensor in tensors.items():
        yield f"{name:{width}}  {tensor.dtype:4}  {list(tensor.shape)}"


# ---- files ----


def _tensor_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The files with tensors, and the index that names them if there is one."""
    for stem, suffix in _STEMS:
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(index), index
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return [single], None
        shards = _unindexed_shards(folder, stem, suffix)
        if shards:
            return shards, None
    names = " or ".join(f"{stem}{suffix}" for stem, suffix in _STEMS)
    raise FileError(f"{folder}: holds no {names}, whole or in numbered parts")


def _weight_map(index: Path) -> dict[str, str]:
    """The name of the file of each tensor."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(place, str) and Path(place).name == place for place in places.values()
    ):
        raise FormatError(f"{index}: weight_map is not an object of file names by tensor")
    return places


def _indexed(index: Path) -> list[Path]:
    files = [index.parent / name for name in dict.fromkeys(_weight_map(index).values())]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise FileError(f"{index}: names {_some(absent)}, which {index.parent} does not hold")
    return files


def _check_places(index: Path, tensors: Mapping[str, FileTensor]) -> None:
    for name, place in _weight_map(index).items():
        path = index.parent / place
        if name not in tensors or Path(tensors[name].path) != path:
            raise FormatError(f"{path}: tensor {name} is missing; {index.name} has it there")


def _read_tensors(files: Iterable[Path]) -> dict[str, FileTensor]:
    tensors: dict[str, FileTensor] = {}
    for path in files:
        for name, tensor in tensors_of(path).items():
            if name in tensors:
                raise FormatError(f"{path}: tensor {name} is also in {tensors[name].path}")
            tensors[name] = tensor
    return tensors


def _unindexed_shards(folder: Path, stem: str, suffix: str) -> list[Path]:
    pattern = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
    found = {
        path.name: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))
    }
    if not found:
        return []
    counts = {match[2] for match in found.values()}
    if len(counts) > 1:
        raise FormatError(f"{folder}: holds parts of several models, {_some(sorted(found))}")
    (count,) = counts
    wanted = [f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
    absent = [name for name in wanted if name not in found]
    if absent:
        raise FileError(f"{folder}: lacks {_some(absent)}")
    return [folder / name for name in wanted]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The library checks the header; what it does not tell is where each tensor lies."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(n_bytes))
    except safetensors.SafetensorError as problem:
        raise FormatError(f"{path}: is not a whole file of safetensors: {problem}") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in DTYPES:
            raise UnsupportedError(
                f"{path}: tensor {name} is of type {dtype}; convert the checkpoint it was made from"
            )
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        offset = 8 + n_bytes + entry["data_offsets"][0]
        tensors[name] = FileTensor(str(path), dtype, shape, strides, offset)
    return tensors
