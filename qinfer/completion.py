"""What generation gives back: `Completion`, the `Piece` of a stream, and the figures on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .offload import Placement
from .sparsity import LayerStats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts: of the prompt, of its beginning that an earlier call left, of the answer."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by the wall clock, of one prompt; in a batch, of the work that it shared with others.

    `prompt` runs from the start to the end of the prompt, `generation` from there to the end.
    """

    prompt: float
    generation: float
    prompt_tokens_per_second: float
    tokens_per_second: float

    @property
    def total(self) -> float:
        """All seconds."""
        return self.prompt + self.generation


@dataclass(frozen=True, slots=True)
class Stats:
    """The runtime's counters of a context.

    Attributes:
        n_prompt_tokens: fed several at once per sequence.
        n_generated_tokens: fed one by one.
        prompt_seconds: spent computing the former.
        generated_seconds: spent computing the latter.
        sample_seconds: spent drawing tokens.
        weight_bytes_read: by generated tokens.
        n_launches: of a GPU's kernels, by generated tokens before they are drawn.
        layers: what the feed-forward network of each layer did.
    """

    n_prompt_tokens: int = 0
    n_generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_seconds: float = 0.0
    sample_seconds: float = 0.0
    weight_bytes_read: int = 0
    n_launches: int = 0
    layers: tuple[LayerStats, ...] = ()

    def __sub__(self, earlier: Stats) -> Stats:
        layers = self.layers
        if earlier.layers:
            layers = tuple(a - b for a, b in zip(self.layers, earlier.layers, strict=True))
        names = [name for name in self.__slots__ if name != "layers"]
        counters = {name: getattr(self, name) - getattr(earlier, name) for name in names}
        return Stats(**counters, layers=layers)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log probability under the model's own logits, before any sampling.

    `top` holds the most likely tokens at its place, best first, as (token, log probability).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a stream.

    Attributes:
        text: what became certain with this step; empty while a character or a possible stop string
            is incomplete.
        token: the token drawn; None on a last piece that only carries text held back.
        logprob: its log probability, when `logprobs` was given.
        finish_reason: set on the last piece: "stop" (end of text, or a stop string), "length"
            (`max_tokens` or the context's end) or "cancelled".
    """

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer; `str()` of it is its text.

    Attributes:
        text: the answer without the prompt and without the stop string.
        tokens: the tokens drawn, without the one that ended the text.
        finish_reason: "stop" (end of text, or a stop string), "length" (`max_tokens` or the
            context's end) or "cancelled".
        usage: token counts.
        timings: seconds and tokens per second.
        stats: the runtime's counters; those of a batch are of the whole batch.
        seed: the seed that was used, to get the same text again.
        logprobs: of each token in `tokens`, when `logprobs` was given.
        placement: what of the model the GPU kept in the end, `n_moved` neurons moved so far
            included; None where the processor alone computed.
        kv_host_shares: by layer, the share of the positions that the processor attended to last, as
            of `Context.kv_host_shares`; None where the processor alone computed.
    """

    text: str
    tokens: list[int] = field(repr=False)
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    stats: Stats = field(repr=False)
    seed: int
    logprobs: list[TokenLogprob] | None = field(default=None, repr=False)
    placement: Placement | None = field(default=None, repr=False)
    kv_host_shares: list[float] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary of plain values, for JSON."""
        values = asdict(self)
        values["usage"]["total_tokens"] = self.usage.total_tokens
        return values


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        tokens: the n tokens of the text, a leading BOS included where the model wants one.
        logprobs: float32 of shape (n - 1,): `logprobs[i]` is the natural logarithm of
            p(tokens[i + 1] | tokens[: i + 1]).
    """

    tokens: list[int] = field(repr=False)
    logprobs: NDArray[np.float32] = field(repr=False)

    @property
    def logprob(self) -> float:
        """Sum of the log probabilities."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log probability per token."""
        return float(np.exp(-self.logprobs.mean(dtype=np.float64)))


def token_logprob(logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    """The log probability of a token and of the `n_top` best, from logits of shape (n_vocab,)."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    n_top = min(n_top, len(row))
    best = np.argpartition(-row, n_top - 1)[:n_top] if n_top else np.empty(0, np.intp)
    best = best[np.lexsort((best, -row[best]))]
    top = tuple((int(i), float(row[i])) for i in best)
    return TokenLogprob(token, float(row[token]), top)
