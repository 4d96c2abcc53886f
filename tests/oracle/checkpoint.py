"""A model as metadata and float64 arrays, read from and written to GGUF by PyPI's `gguf`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Checkpoint:
    """Metadata under GGUF's keys, and tensors under GGUF's names with rows first."""

    metadata: dict[str, Any]
    tensors: dict[str, Array]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def __getitem__(self, key: str) -> Any:
        return self.metadata[f"{self.architecture}.{key}"]


@dataclass(frozen=True)
class Quantised:
    """Blocks of a tensor as they lie in a file."""

    type: gguf.GGMLQuantizationType
    blocks: npt.NDArray[np.uint8]  # [n_rows, bytes per row]

    def decoded(self) -> Array:
        """The weights, [n_rows, n_cols]."""
        return gguf.quants.dequantize(self.blocks, self.type).astype(np.float64)


def read_gguf(path: Path) -> Checkpoint:
    """Reads a whole file, decoding every tensor."""
    reader = gguf.GGUFReader(path)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }
    return Checkpoint(metadata, tensors)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Array | Quantised]) -> Path:
    """Writes plain arrays as F32 and blocks as they are."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add_value(writer, key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantised):
            writer.add_tensor(name, tensor.blocks, raw_dtype=tensor.type)
        else:
            writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
