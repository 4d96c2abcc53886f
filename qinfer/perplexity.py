"""Perplexity of a text under a model, by llama.cpp's method, so that values can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import ArgumentError
from .model import Model
from .offload import Placement
from .sparsity import Shares, SparsityMode


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of a text, and how it came about.

    Attributes:
        value: the perplexity.
        error: its standard error.
        n_scored: tokens it was taken over.
        neurons: which share of all neurons the tokens computed; None where that was all of them.
        placement: what of the model a GPU kept in the end; None where none computed.
    """

    value: float
    error: float
    n_scored: int
    neurons: Shares | None = None
    placement: Placement | None = None


def perplexity(
    model: Model,
    text: str,
    *,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    sparsity: SparsityMode | None = None,
    sparse_threshold: float | None = None,
    cross_layer_from: int | Literal[False] | None = None,
    on_chunk: Callable[[int, float], None] | None = None,
) -> Perplexity:
    """Perplexity over chunks of a text.

    The text is tokenised as a whole and cut into chunks of `n_ctx` tokens; what is left over is not
    looked at. Each chunk is read from an empty context, with BOS in place of its first token when
    the model begins texts so, and the predictions in its second half are scored.

    Args:
        model: the model.
        text: the text.
        n_ctx: tokens per chunk.
        n_chunks: how many chunks at most; None takes all.
        sparsity: the mode to measure, in which every token is computed with neurons of its own;
            None takes the model's.
        sparse_threshold: of predictions; None takes the model's.
        cross_layer_from: as of `Model.context`.
        on_chunk: called after each chunk with its number, from 1, and the perplexity so far.

    Raises:
        ArgumentError: the text is shorter than one chunk, or a number is out of range.
    """
    if n_ctx < 4:
        raise ArgumentError(f"n_ctx={n_ctx}: a chunk needs at least 4 tokens")
    if n_chunks is not None and n_chunks < 1:
        raise ArgumentError(f"n_chunks={n_chunks} is not a positive integer")
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text)
    if len(tokens) < n_ctx:
        raise ArgumentError(f"the text has {len(tokens)} tokens, a chunk takes {n_ctx}")
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    first = n_ctx // 2  # the first position whose prediction counts
    scores: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    with model.context(
        n_ctx=n_ctx,
        sparsity=sparsity,
        sparse_threshold=sparse_threshold,
        cross_layer_from=cross_layer_from,
    ) as context:
        context.check_predictions(1)
        for number in range(min(len(tokens) // n_ctx, n_chunks or len(tokens))):
            chunk = tokens[number * n_ctx : (number + 1) * n_ctx]
            targets = [-1] * first + chunk[first + 1 :] + [-1]
            if bos is not None:
                chunk[0] = bos
            context.truncate(0)
            scores.append(
                -context.score(chunk, targets, generated=True)[first:-1].astype(np.float64)
            )
            if on_chunk is not None:
                on_chunk(number + 1, math.exp(np.concatenate(scores).mean()))
        neurons = Shares.of(context.stats().layers, model.info.n_ff)
        placement = context.placement
    losses = np.concatenate(scores)
    value = math.exp(losses.mean())
    deviation = losses.std() / math.sqrt(len(losses) - 1)
    return Perplexity(value, value * float(deviation), len(losses), neurons, placement)


def render(neurons: Shares) -> str:
    """The shares of neurons as a line of text."""
    parts = [f"{neurons.active:.1%} active"]
    if neurons.predicted is not None:
        parts.append(f"{neurons.predicted:.1%} predicted")
    if neurons.missed is not None:
        parts.append(f"{neurons.missed:.1%} of those due missed")
    return f"Neurons: {', '.join(parts)}"
