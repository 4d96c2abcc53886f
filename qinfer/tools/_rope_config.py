"""Rotary embeddings in a config.json, in the form of any version of transformers, as GGUF keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ._checkpoint import Config


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """What a file says about rotary embeddings.

    Attributes:
        keys: values by key, without the architecture's prefix.
        divisors: of each pair's frequency, float32 [n_rot / 2]; None when all are 1.
    """

    keys: dict[str, int | float | str] = field(default_factory=dict)
    divisors: NDArray[np.float32] | None = None


def read_rope(config: Config, *, n_rot: int, n_ctx: int) -> RopeConfig:
    """Base and scaling of `n_rot` rotated dimensions, trained for `n_ctx` positions.

    Raises FormatError for keys that are missing or wrong, UnsupportedError for a scaling or a
    partial rotation that files cannot say.
    """
    scaling = config.section("rope_parameters", "rope_scaling")
    base = config.number("rope_theta", default=10000.0)
    if scaling is not None:
        base = scaling.number("rope_theta", default=base)
    for place in filter(None, (config, scaling)):
        if place.number("partial_rotary_factor", default=1.0) != 1.0:
            raise place.unsupported("partial_rotary_factor", "all dimensions of a head must rotate")
    keys: dict[str, int | float | str] = {
        "rope.dimension_count": n_rot,
        "rope.freq_base": base,
    }
    kind = "default" if scaling is None else scaling.text("rope_type", "type", default="default")
    if scaling is None or kind == "default":
        return RopeConfig(keys)
    if kind == "llama3":
        return RopeConfig(keys, _llama3_divisors(scaling, base, n_rot))
    if kind not in ("linear", "yarn"):
        named = "rope_type" if "rope_type" in scaling else "type"
        raise scaling.unsupported(named, "supported are default, linear, yarn and llama3")
    factor = _positive(scaling, "factor")
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        keys |= _yarn(scaling, factor, n_ctx)
    return RopeConfig(keys)


def _yarn(scaling: Config, factor: float, n_ctx: int) -> dict[str, int | float | str]:
    if not scaling.flag("truncate", True):
        raise scaling.unsupported("truncate", "the ramp of yarn begins and ends at whole pairs")
    keys: dict[str, int | float | str] = {
        "rope.scaling.original_context_length": scaling.integer(
            "original_max_position_embeddings", default=n_ctx
        )
    }

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if "attention_factor" in scaling:
        wanted = _positive(scaling, "attention_factor")
    elif "mscale" in scaling and "mscale_all_dim" in scaling:
        wanted = magnitude(_positive(scaling, "mscale")) / magnitude(
            _positive(scaling, "mscale_all_dim")
        )
    else:
        wanted = magnitude(1.0)
    # Files give a factor to what the runtime computes itself: 1 + 0.1 ln(factor).
    if wanted != magnitude(1.0):
        keys["rope.scaling.attn_factor"] = wanted / (0.1 * math.log(factor) + 1.0)
    for name in ("beta_fast", "beta_slow"):
        if name in scaling:
            keys[f"rope.scaling.yarn_{name}"] = _positive(scaling, name)
    return keys


def _llama3_divisors(scaling: Config, base: float, n_rot: int) -> NDArray[np.float32]:
    """1 for pairs that turn often within the original context, `factor` for those that hardly do.

    Between `low_freq_factor` and `high_freq_factor` turns the frequencies are interpolated.
    """
    factor, low, high = (
        _positive(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if not low < high:
        raise FormatError(
            f"{scaling.path}: low_freq_factor {low:g} is not below high_freq_factor {high:g}"
        )
    n_ctx = scaling.integer("original_max_position_embeddings")
    frequency = base ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    turns = n_ctx * frequency / (2.0 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / factor + kept)).astype(np.float32)


def _positive(config: Config, key: str) -> float:
    value = config.number(key)
    if value <= 0.0:
        raise config.unsupported(key, "it must be above 0")
    return value
