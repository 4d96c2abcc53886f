"""Where the engine deliberately keeps less than float64, so that the oracle can do the same.

By default nothing is rounded. With the roundings the engine documents (keys and values as stored
in the cache, activations of quantised weights as int8 blocks) only the order of sums remains.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import gguf
import numpy as np

from .checkpoint import Array


@dataclass(frozen=True)
class Numerics:
    """The roundings to apply."""

    kv_type: str | None = None  # None, "f16" or "q8_0"
    # Elements per int8 block of a tensor's input, by tensor name; absent: not rounded.
    activation_blocks: dict[str, int] = field(default_factory=dict)

    def store(self, x: Array) -> Array:
        """Keys or values [..., head_dim] after a round trip through the cache."""
        if self.kv_type is None:
            return x
        kv_type = gguf.GGMLQuantizationType[self.kv_type.upper()]
        if kv_type == gguf.GGMLQuantizationType.F16:
            return x.astype(np.float32).astype(np.float16).astype(np.float64)
        blocks = gguf.quants.quantize(x.astype(np.float32), kv_type)
        return gguf.quants.dequantize(blocks, kv_type).astype(np.float64)

    def activation(self, tensor: str, x: Array) -> Array:
        """The input [..., n_cols] of a weight as the engine multiplies it."""
        size = self.activation_blocks.get(tensor)
        if size is None:
            return x
        blocks = x.reshape(*x.shape[:-1], -1, size)
        scale = np.abs(blocks).max(-1, keepdims=True) / 127
        codes: Array = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
        return (codes * scale).reshape(x.shape)
