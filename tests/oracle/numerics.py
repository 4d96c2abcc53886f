"""Where the engine deliberately keeps less than float64, and how far it may then be off.

By default nothing is rounded. With the roundings the engine documents (keys and values as stored
in the cache, activations of quantised weights as int8 blocks) only the order of sums remains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .checkpoint import Array


def errors(found: npt.ArrayLike, expected: Array) -> Array:
    """Per token, root mean square difference in units of the standard deviation of all logits."""
    difference = np.asarray(found, np.float64) - expected
    return np.sqrt((difference**2).mean(-1)) / expected.std()


def as_f16(x: Array) -> Array:
    """Rounded to F16."""
    return x.astype(np.float16).astype(np.float64)


def as_int8(x: Array, round_scale: Callable[[Array], Array]) -> Array:
    """Rounded to codes of -127 to 127 times the scale of a block of 32 along the last axis."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = round_scale(np.abs(blocks).max(-1, keepdims=True) / 127)
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes.clip(-127, 127) * scale).reshape(x.shape)


@dataclass(frozen=True)
class Numerics:
    """The roundings to apply."""

    kv_type: str | None = None  # None, "f16" or "q8_0"
    int8_inputs: frozenset[str] = frozenset()  # weights whose input is put into int8 blocks of 32

    def store(self, x: Array) -> Array:
        """Keys or values [..., head_dim] after a round trip through the cache."""
        if self.kv_type is None:
            return x
        return as_f16(x) if self.kv_type == "f16" else as_int8(x, as_f16)

    def activation(self, tensor: str, x: Array) -> Array:
        """The input [..., n_cols] of a weight as the engine multiplies it."""
        if tensor not in self.int8_inputs:
            return x
        return as_int8(x, lambda scale: scale)
