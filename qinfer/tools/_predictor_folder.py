"""Folders of activation predictors: `model_0.pt`, `model_1.pt`, …, one file for each layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .._file_tensor import FLOATS, FileTensor
from .._files import StrPath
from .._torch_file import load_tensors
from ..errors import FileError, FormatError
from ._checkpoint import Config, read_json

_FILE = re.compile(r"model_(0|[1-9]\d*)\.pt")
_NAMES = ("fc1.weight", "fc2.weight")
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class Predictors:
    """The predictors of all layers.

    Attributes:
        layers: per layer fc1 [rank, n_embd] and fc2 [n_ff, rank]; the rank is each layer's own.
        threshold: predictions below it count as inactive; None when the folder does not say.
    """

    layers: list[tuple[FileTensor, FileTensor]]
    threshold: float | None


def read_predictors(folder: StrPath, *, n_layer: int, n_embd: int, n_ff: int) -> Predictors:
    """The predictors in a folder, checked against the sizes of their model.

    Raises FileError when the folder or a layer's file is missing or cannot be read, FormatError
    when a file holds something else than a predictor of such a model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileError(f"{path}: there is no such folder")
    found = {int(match[1]) for item in path.iterdir() if (match := _FILE.fullmatch(item.name))}
    absent = [layer for layer in range(n_layer) if layer not in found]
    if absent:
        names = ", ".join(f"model_{layer}.pt" for layer in absent[:_MOST_NAMED])
        more = f" and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
        raise FileError(
            f"{path}: lacks {names}{more}; the model has {n_layer} layers, and each needs its "
            "predictor"
        )
    if max(found) >= n_layer:
        raise FormatError(
            f"{path}: has model_{max(found)}.pt, but the model has {n_layer} layers; are these the "
            "predictors of another model?"
        )
    layers = [_layer(path / f"model_{i}.pt", n_embd, n_ff) for i in range(n_layer)]
    config = path / "config.json"
    threshold = None
    if config.exists():
        values = Config(config, read_json(config))
        if "sparse_threshold" in values:
            threshold = values.number("sparse_threshold")
    return Predictors(layers, threshold)


def _layer(path: Path, n_embd: int, n_ff: int) -> tuple[FileTensor, FileTensor]:
    tensors = load_tensors(path)
    if set(tensors) != set(_NAMES):
        listed = ", ".join(sorted(tensors)[:_MOST_NAMED]) or "nothing"
        raise FormatError(f"{path}: holds {listed}, expected exactly {' and '.join(_NAMES)}")
    fc1, fc2 = (tensors[name] for name in _NAMES)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise FormatError(
                f"{path}: tensor {name} is of type {tensor.dtype}, expected one of "
                f"{', '.join(FLOATS)}"
            )
    if len(fc1.shape) != 2 or fc1.shape[1] != n_embd or fc1.shape[0] < 1:
        raise FormatError(
            f"{path}: tensor fc1.weight has shape {fc1.shape}, expected (rank, {n_embd})"
        )
    if fc2.shape != (n_ff, fc1.shape[0]):
        raise FormatError(
            f"{path}: tensor fc2.weight has shape {fc2.shape}, expected "
            f"{(n_ff, fc1.shape[0])}: the neurons of the model, and the rank of fc1.weight"
        )
    return fc1, fc2
