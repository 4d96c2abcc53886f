"""What a feed-forward neuron of a model file takes: the bytes of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from .._files import StrPath
from .._gguf import GGUF, TensorInfo
from ..errors import FormatError


@dataclass(frozen=True, slots=True)
class NeuronBytes:
    """Bytes of one neuron in each layer, in the types its rows are stored in.

    Attributes:
        n_ff: neurons per layer.
        gate_up: per layer, of its rows of gate (where there is one) and up.
        down: per layer, of its row of the transposed down.
        has_gate: whether there is a gate.
    """

    n_ff: int
    gate_up: tuple[int, ...]
    down: tuple[int, ...]
    has_gate: bool

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.down)


def neuron_bytes(path: StrPath) -> NeuronBytes:
    """The bytes of a model's neurons, from the descriptions of its tensors.

    Raises:
        FileError: the file cannot be read.
        FormatError: it is not a GGUF file, or not one that stores down by neuron.
    """
    with GGUF(path, tensors=False) as file:
        tensors = {tensor.name: tensor for tensor in file.tensors}
    n_layers = 0
    while f"blk.{n_layers}.ffn_up.weight" in tensors:
        n_layers += 1
    if n_layers == 0:
        raise FormatError(f"{path}: holds no blk.0.ffn_up.weight")
    n_ff = tensors["blk.0.ffn_up.weight"].shape[0]
    gate_up, down = [], []
    for layer in range(n_layers):
        rows = {
            name: _row_bytes(path, tensors, f"blk.{layer}.{name}.weight", n_ff)
            for name in ("ffn_gate", "ffn_up", "ffn_down_t")
        }
        if f"blk.{layer}.ffn_down_t.weight" not in tensors:
            raise FormatError(
                f"{path}: holds no blk.{layer}.ffn_down_t.weight: only files that store down by "
                "neuron can be split"
            )
        gate_up.append(rows["ffn_gate"] + rows["ffn_up"])
        down.append(rows["ffn_down_t"])
    has_gate = "blk.0.ffn_gate.weight" in tensors
    return NeuronBytes(n_ff, tuple(gate_up), tuple(down), has_gate)


def _row_bytes(path: StrPath, tensors: dict[str, TensorInfo], name: str, n_ff: int) -> int:
    """Bytes of a row of a matrix; 0 when it is absent."""
    tensor = tensors.get(name)
    if tensor is None:
        return 0
    if len(tensor.shape) != 2 or tensor.shape[0] != n_ff:
        raise FormatError(
            f"{path}: tensor {name!r} has shape {tensor.shape}, a row for each of {n_ff} neurons "
            "is expected"
        )
    if tensor.n_bytes == 0:
        raise FormatError(f"{path}: tensor {name!r} is of a type that is not known: {tensor.type}")
    return tensor.n_bytes // n_ff
