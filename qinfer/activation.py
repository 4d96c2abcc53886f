"""Folders of activation counts, PowerInfer's `activation/activation_{i}.pt`: one file per layer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._files import StrPath
from ._torch_file import load_note, load_tensor, save_tensor
from .errors import ArgumentError, FileError, FormatError

_NAME = re.compile(r"activation_(\d+)\.pt")


def read_activations(
    folder: StrPath, *, n_layers: int | None = None, n_ff: int | None = None
) -> list[NDArray[Any]]:
    """How often each neuron of each layer was active.

    Args:
        folder: holds `activation_0.pt`, `activation_1.pt` and so on, each a bare 1-D tensor of
            numbers. Other files are ignored.
        n_layers, n_ff: layers and neurons per layer that are expected; None accepts any.

    Returns:
        Per layer, in the order of their numbers, an array of shape (n_ff,) in the type stored.

    Raises:
        FileError: the folder or a file cannot be read.
        FormatError: a layer is missing, or a file holds something else than a number that is
            neither negative nor NaN for each of the neurons; the message names the file.
    """
    paths = _paths(Path(folder))
    if n_layers is not None and len(paths) != n_layers:
        raise FormatError(
            f"{folder}: holds activation counts of {len(paths)} layers, {n_layers} are expected"
        )
    counts = []
    for path in paths:
        counts.append(_read(path))
        expected = len(counts[0]) if n_ff is None else n_ff
        if len(counts[-1]) != expected:
            origin = f"{paths[0].name} has" if n_ff is None else "a layer should have"
            raise FormatError(f"{path}: has {len(counts[-1])} neurons, {origin} {expected}")
    return counts


def _paths(folder: Path) -> list[Path]:
    """The files of the layers, ordered by number: as text, 10 would come before 2."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise FileError(f"{folder}: cannot read the folder: {error.strerror}") from error
    by_layer: dict[int, str] = {}
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        layer = int(match[1])
        if layer in by_layer:
            raise FormatError(f"{folder / name}: {by_layer[layer]} is there for that layer, too")
        by_layer[layer] = name
    if not by_layer:
        raise FormatError(f"{folder}: holds no activation_0.pt")
    for layer in range(len(by_layer)):
        if layer not in by_layer:
            raise FormatError(
                f"{folder / f'activation_{layer}.pt'}: is missing; "
                f"the last layer there is {max(by_layer)}"
            )
    return [folder / by_layer[layer] for layer in range(len(by_layer))]


def _read(path: Path) -> NDArray[Any]:
    counts = load_tensor(path).numpy()
    if counts.ndim != 1 or counts.size == 0 or counts.dtype.kind not in "iuf":
        raise FormatError(
            f"{path}: holds {counts.dtype} of shape {counts.shape}, "
            "activation counts are one number per neuron"
        )
    wrong = np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)))
    if len(wrong):
        raise FormatError(
            f"{path}: neuron {wrong[0]} was active {counts[wrong[0]]} times, which is not a count"
        )
    return counts


def check_model(folder: StrPath, model: bytes) -> bool:
    """Refuses the counts of another model; whether the folder says which model they are of.

    Args:
        folder: as of `read_activations`.
        model: what tells the model apart, the same for its files in all types.

    Raises:
        FileError, FormatError: the folder or its first file cannot be read.
        ArgumentError: the counts are those of another model.
    """
    first = _paths(Path(folder))[0]
    found = load_note(first)
    if found and found != model:
        raise ArgumentError(
            f"{first}: holds activation counts of another model; qinfer profile MODEL counts those "
            "of this one"
        )
    return bool(found)


def write_activations(folder: StrPath, counts: Sequence[NDArray[Any]], model: bytes = b"") -> None:
    """Writes one file per layer, in the form that `read_activations` and `torch.load` read.

    The folder is made when it is not there. Files of layers that these counts do not have are
    removed, as they would belong to another model. Files appear when all are complete.

    Args:
        folder: where to.
        counts: per layer, how often each neuron was active: shape (n_ff,), any type of number that
            torch has; unsigned integers are written as int64.
        model: what tells the model apart that they are of; kept in the files, where neither torch
            nor PowerInfer looks at it.

    Raises:
        ArgumentError: the arrays are not counts of layers of one length.
        FileError: the files cannot be written.
    """
    layers = [_storable(layer, array) for layer, array in enumerate(counts)]
    if not layers or any(len(each) != len(layers[0]) for each in layers):
        raise ArgumentError("activation counts are one array per layer, all of one length")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".activation.", dir=target) as temporary:
            names = [f"activation_{layer}.pt" for layer in range(len(layers))]
            for name, array in zip(names, layers, strict=True):
                hidden = Path(temporary) / name
                try:
                    save_tensor(hidden, array, model)
                except FileError as error:
                    reason = str(error).removeprefix(f"{hidden}: ")
                    raise FileError(f"{target / name}: {reason}") from error
            for path in target.iterdir():
                if _NAME.fullmatch(path.name) and path.name not in names:
                    path.unlink()
            for name in names:
                (Path(temporary) / name).replace(target / name)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{target}: cannot write: {error.strerror or error}") from error


def _storable(layer: int, counts: NDArray[Any]) -> NDArray[Any]:
    """The counts of a layer as a type of torch."""
    array = np.asarray(counts)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iuf":
        raise ArgumentError(
            f"layer {layer}: {array.dtype} of shape {array.shape} is not one number per neuron"
        )
    if not np.all(np.isfinite(array) & (array >= 0)) or (
        array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max
    ):
        raise ArgumentError(f"layer {layer}: counts are neither negative nor beyond 63 bits")
    return array.astype(np.int64) if array.dtype.kind == "u" else array
