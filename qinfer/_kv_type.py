"""How keys and values are kept: the types there are for them, and what these take and need."""

from __future__ import annotations

from ._types import TensorType, tensor_type
from ._weights import ModelInfo
from .errors import ArgumentError


def kv_tensor_type(name: str) -> TensorType:
    """The tensor type that `kv_type` names; raises ArgumentError for one that is not for it."""
    if not isinstance(name, str) or name.lower() not in ("f16", "q8_0"):
        raise ArgumentError(f"kv_type={name!r} is neither 'f16' nor 'q8_0'")
    return tensor_type(name)


def check_heads(kv_type: str, info: ModelInfo) -> None:
    """Raises ArgumentError where the model's heads are no whole blocks of the type."""
    block_size = kv_tensor_type(kv_type).block_size
    if info.head_dim % block_size:
        raise ArgumentError(
            f"kv_type={kv_type!r} needs heads of a multiple of {block_size} dimensions; this "
            f"model's have {info.head_dim}"
        )


def kv_bytes_per_token(kv_type: str, info: ModelInfo) -> float:
    """Bytes of keys and values per token."""
    kind = kv_tensor_type(kv_type)
    n_values = info.kv_bytes_per_token_f16 / tensor_type("F16").block_bytes
    return n_values / kind.block_size * kind.block_bytes
