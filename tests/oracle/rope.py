"""Rotary position embedding: angles, how they are scaled, and the two ways to pair dimensions."""

from __future__ import annotations

import math

import numpy as np

from .checkpoint import Array, Checkpoint


def angles(model: Checkpoint, n_rot: int, positions: Array) -> tuple[Array, float]:
    """Angles [n_tokens, n_rot / 2], and the factor that sines and cosines are multiplied with."""
    base = model.get("rope.freq_base", 10000.0)
    pair = np.arange(n_rot // 2, dtype=np.float64)
    unscaled = base ** (-2.0 * pair / n_rot)
    if "rope_freqs.weight" in model.tensors:  # Llama 3: one divisor per pair
        unscaled = unscaled / model.tensors["rope_freqs.weight"]
    magnitude = model.get("rope.scaling.attn_factor", 1.0)
    scaling = model.get("rope.scaling.type", "linear")
    if scaling == "none":
        return np.outer(positions, unscaled), magnitude
    factor = model.get("rope.scaling.factor", 1.0)
    stretched = unscaled / factor
    if scaling == "linear":
        return np.outer(positions, stretched), magnitude
    assert scaling == "yarn", scaling
    share = _yarn_unscaled_share(model, n_rot, base)
    frequencies = stretched * (1.0 - share) + unscaled * share
    return np.outer(positions, frequencies), magnitude * (1.0 + 0.1 * math.log(factor))


def _yarn_unscaled_share(model: Checkpoint, n_rot: int, base: float) -> Array:
    """How much of each frequency is kept: 1 for pairs that turn often, 0 for slow ones."""
    n_ctx = model.get("rope.scaling.original_context_length", model["context_length"])

    def pair_turning(times: float) -> float:
        return n_rot * math.log(n_ctx / (times * 2.0 * math.pi)) / (2.0 * math.log(base))

    first = math.floor(pair_turning(model.get("rope.scaling.yarn_beta_fast", 32.0)))
    last = math.ceil(pair_turning(model.get("rope.scaling.yarn_beta_slow", 1.0)))
    first, last = max(first, 0), min(last, n_rot - 1)
    ramp = (np.arange(n_rot // 2) - first) / max(last - first, 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rotate(x: Array, angle: Array, magnitude: float, neox: bool) -> Array:
    """Rotates heads x [n_tokens, n_heads, head_dim] by angle [n_tokens, n_rot / 2].

    NeoX pairs dimension i with i + n_rot / 2, the other way 2i with 2i + 1. The rest stays.
    """
    n_pairs = angle.shape[1]
    cosine = (np.cos(angle) * magnitude)[:, None, :]
    sine = (np.sin(angle) * magnitude)[:, None, :]
    if neox:
        first, second = slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)
    else:
        first, second = slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    out = x.copy()
    out[..., first] = x[..., first] * cosine - x[..., second] * sine
    out[..., second] = x[..., first] * sine + x[..., second] * cosine
    return out
