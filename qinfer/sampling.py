"""How the next token is drawn: the `Sampling` settings and the `Sampler` that applies them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import INT32_MAX
from ._keywords import unknown_keyword
from ._native import Handle, check, ffi, lib, new_error
from .errors import ArgumentError

_FLOAT32_MAX = float(np.finfo(np.float32).max)

# Legal range of each number, both ends included, and what the ends mean where that is not plain.
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1e9, "0 is greedy"),
    "top_k": (0, INT32_MAX, "0 keeps all"),
    "top_p": (0, 1, "1 keeps all"),
    "min_p": (0, 1, "0 keeps all"),
    "typical_p": (0, 1, "1 keeps all"),
    "repeat_penalty": (1e-9, 1e9, "1 is off"),
    "presence_penalty": (-1e9, 1e9, "0 is off"),
    "frequency_penalty": (-1e9, 1e9, "0 is off"),
    "penalty_window": (-1, INT32_MAX, "-1 looks at all tokens"),
    "dynatemp_range": (0, 1e9, "0 is off"),
    "dynatemp_exponent": (1e-9, 1e9, "1 is linear"),
    "mirostat": (0, 2, "0 is off"),
    "mirostat_tau": (0, 1e9, "in bits"),
    "mirostat_eta": (0, 1e9, "a learning rate"),
    "min_keep": (1, INT32_MAX, "a number of tokens"),
    "seed": (0, 2**64 - 1, "None draws one"),
}
_INTEGERS = {"top_k", "penalty_window", "mirostat", "min_keep", "seed"}
_INTEGER_TYPES = (int, np.integer)
_NUMBER_TYPES = (int, float, np.integer, np.floating)


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_window: int
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    min_keep: int
    logit_bias: Mapping[int, float]
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Penalties and bias change the logits first; top-k, typical, top-p and min-p then narrow the
    candidates, and temperature shapes what is left. Raises ArgumentError for a value out of range.

    Attributes:
        temperature: 0 takes the most likely token (the lowest id of equals), whatever else is set.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the most likely tokens that reach this probability together (nucleus sampling,
            Holtzman et al. 2019); 1 keeps all.
        min_p: keeps tokens at least this fraction as likely as the best (Nguyen et al. 2024).
        typical_p: keeps tokens of typical surprise up to this probability (Meister et al. 2022).
        repeat_penalty: divides positive and multiplies negative logits of recent tokens (Keskar et
            al. 2019); 1 is off.
        presence_penalty: subtracted once from logits of recent tokens.
        frequency_penalty: subtracted from logits of recent tokens once per occurrence.
        penalty_window: how many last tokens, prompt included, the penalties look at; -1 is all.
        dynatemp_range: lets the temperature follow the entropy within temperature ± this; 0 is off.
        dynatemp_exponent: bends that dependence.
        mirostat: 1 or 2 steers surprise to a target (Basu et al. 2020) instead of top-k, top-p,
            min-p and typical; 0 is off.
        mirostat_tau: the target surprise in bits.
        mirostat_eta: how fast the target is approached.
        min_keep: top-p, min-p and typical leave at least this many tokens.
        logit_bias: added to the logits of token ids; -inf bans a token.
        seed: of the random draws; None takes a fresh one, which the result reports.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, meaning) in _RANGES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kinds = _INTEGER_TYPES if name in _INTEGERS else _NUMBER_TYPES
            if not _is_a(value, kinds) or not low <= value <= high:
                what = "an integer" if name in _INTEGERS else "a number"
                raise ArgumentError(
                    f"{name}={value!r} is not {what} from {low:g} to {high:g} ({meaning})"
                )
        if not isinstance(self.logit_bias, Mapping):
            raise ArgumentError(
                f"logit_bias={self.logit_bias!r:.80} is not a mapping of token ids to numbers"
            )
        for token, bias in self.logit_bias.items():
            if (
                not _is_a(token, _INTEGER_TYPES)
                or not _is_a(bias, _NUMBER_TYPES)
                or math.isnan(bias)
                or bias > _FLOAT32_MAX
            ):
                raise ArgumentError(
                    f"logit_bias maps token ids to numbers (-inf bans), not {token!r} to {bias!r}"
                )

    def changed(self, options: Mapping[str, Any]) -> Sampling:
        """A copy with some fields changed; raises TypeError for a name that is not a field."""
        if not options:
            return self
        names = [item.name for item in fields(self)]
        for name in options:
            if name not in names:
                raise TypeError(unknown_keyword(name, names))
        return replace(self, **options)

    def seeded(self) -> Sampling:
        """A copy whose seed is set: this one's, or a fresh one of 32 bits."""
        return self if self.seed is not None else replace(self, seed=int.from_bytes(os.urandom(4)))


def _is_a(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value is of one of these types; True and False are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def token_array(tokens: ArrayLike, n_vocab: int, name: str = "token") -> NDArray[np.int32]:
    """Token ids as int32, each checked against the vocabulary."""
    try:
        ids = np.asarray(tokens)
    except ValueError:  # sequences of several lengths
        raise ArgumentError(f"{name}s are a flat sequence of integers, not nested ones") from None
    if ids.size == 0:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ArgumentError(
            f"{name}s are a flat sequence of integers, not {ids.dtype} of shape {ids.shape}"
        )
    wrong = np.flatnonzero((ids < 0) | (ids >= n_vocab))
    if len(wrong):
        raise ArgumentError(
            f"{name} {ids[wrong[0]]} at position {wrong[0]} is not in the vocabulary, "
            f"which has ids 0 to {n_vocab - 1}"
        )
    return np.ascontiguousarray(ids, np.int32)


class Sampler:
    """Draws tokens under one `Sampling`; keeps its random state and its window of recent tokens.

    A sampler belongs to one sequence and one thread at a time.
    """

    def __init__(self, n_vocab: int, sampling: Sampling | None = None) -> None:
        """Prepares to draw from `n_vocab` logits; a `sampling` without a seed gets a fresh one.

        Raises ArgumentError when a biased token id is outside the vocabulary.
        """
        if not _is_a(n_vocab, _INTEGER_TYPES) or not 1 <= n_vocab <= INT32_MAX:
            raise ArgumentError(f"n_vocab={n_vocab!r} is not a positive integer")
        self.sampling = (sampling or Sampling()).seeded()
        self.n_vocab = n_vocab
        params = ffi.new("qi_sampling_params *")
        for name in _RANGES:
            setattr(params, name, getattr(self.sampling, name))
        bias = self.sampling.logit_bias
        for token in bias:
            if not 0 <= token < n_vocab:
                raise ArgumentError(f"logit_bias: token {token} is not in [0, {n_vocab})")
        tokens = ffi.new("int32_t[]", [int(token) for token in bias])
        values = ffi.new("float[]", [float(value) for value in bias.values()])
        params.n_bias, params.bias_tokens, params.bias_values = len(bias), tokens, values
        out = ffi.new("qi_sampler **")
        error = new_error()
        check(lib.qi_sampler_create(params, n_vocab, out, error), error)
        self._handle = Handle(out[0], lib.qi_sampler_close, "this sampler")

    @property
    def seed(self) -> int:
        """The seed in use."""
        assert self.sampling.seed is not None
        return self.sampling.seed

    @property
    def pointer(self) -> Any:
        """The C sampler."""
        return self._handle.pointer

    def accept(self, tokens: Iterable[int]) -> None:
        """Puts tokens, such as the prompt's, into the penalty window without drawing them.

        Raises ArgumentError when one is outside the vocabulary.
        """
        ids = token_array(list(tokens), self.n_vocab)
        error = new_error()
        check(
            lib.qi_sampler_accept(self.pointer, ffi.from_buffer("int32_t[]", ids), len(ids), error),
            error,
        )

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draws a token from logits of shape (n_vocab,), which stay unchanged, and accepts it.

        Raises ArgumentError when the shape is another or a logit is NaN.
        """
        row = np.ascontiguousarray(logits, np.float32)
        if row.shape != (self.n_vocab,):
            raise ArgumentError(f"logits have shape {row.shape}, not {(self.n_vocab,)}")
        token = ffi.new("int32_t *")
        error = new_error()
        check(
            lib.qi_sampler_sample(self.pointer, ffi.from_buffer("float[]", row), token, error),
            error,
        )
        return int(token[0])

    def close(self) -> None:
        """Frees the sampler; calling it again does nothing."""
        self._handle.close()
