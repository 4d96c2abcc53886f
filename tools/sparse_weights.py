"""Sparsity by construction: which neurons a token switches on, and the weights that see to it.

Each token has a code of seven bits, +1 or -1 in dimensions of the residual that no layer writes to.
A neuron asks for values of some of the bits, and is active iff the token has them all: always when
it asks for none, for one code in 2^n when it asks for n. How many neurons ask for how many follows
a power law, and their wishes are spread so evenly that every code activates the same number.

The residual's first dimensions, the columns here, are seven bits and six ones, then the negatives
of those thirteen: reading differences, a neuron sees twice the value and nothing of the mean that
layer norm takes away. The last of them is always zero. Its weight gives the blocks of quantised
types a scale in which -1, 0 and 1 are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Signs = npt.NDArray[np.int8]

N_BITS = 7
N_ONES = N_BITS - 1
N_SIGNALS = N_BITS + N_ONES
N_COLUMNS = 32  # a block of the smaller quantised types
MIN_ACTIVE = 0.01  # a little more than one code in 2^N_BITS

# Standard deviation of what random weights add to the +1 or at most -1 of a neuron. Normalisation
# shrinks those to 0.7 in the last layers, still more than five deviations from 0.
NOISE = 1 / 8


@dataclass(frozen=True)
class Sparsity:
    """How sparse a model is; a dense twin has the same neurons and no predictors."""

    active: float = 0.1  # share of neurons that a token activates
    n_pred: int = 512  # rank of the predictors
    dense_twin: bool = False


def token_codes(rng: np.random.Generator, n_vocab: int) -> Signs:
    """Each token's bits [n_vocab, N_BITS] as +1 and -1."""
    return (2 * rng.integers(0, 2, (n_vocab, N_BITS), np.int8) - 1).astype(np.int8)


def neuron_wishes(rng: np.random.Generator, n_ff: int, active: float) -> Signs:
    """The bits that a layer's neurons ask for [n_ff, N_BITS]: +1, -1, or 0 where they ask none.

    Of the neurons ranked by how often they are active, those that ask for at most n bits are the
    first share growth^(n - N_BITS): frequency falls as a power of the rank.
    """
    ends = np.rint(n_ff * _cumulative_shares(_growth(active))).astype(np.int64)
    rank = np.arange(n_ff)
    n_asked = np.searchsorted(ends, rank, side="right")
    # Neurons that ask for as many bits take turns at all the values those can have.
    turn = rank - np.concatenate([[0], ends])[n_asked]
    bit = np.arange(N_BITS)
    values = 2 * (turn[:, None] >> bit & 1) - 1
    wishes = np.where(bit < n_asked[:, None], values, 0).astype(np.int8)
    return rng.permutation(wishes[:, rng.permutation(N_BITS)])


def _cumulative_shares(growth: float) -> npt.NDArray[np.float64]:
    """Shares of neurons that ask for at most 0, 1, … N_BITS bits."""
    return np.float64(growth) ** np.arange(-N_BITS, 1)


def _growth(active: float) -> float:
    """The growth of those shares at which this share of neurons is active, by bisection."""
    low, high = 1.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        shares = np.diff(_cumulative_shares(middle), prepend=0)
        if shares @ 0.5 ** np.arange(N_BITS + 1) > active:
            low = middle
        else:
            high = middle
    return low


def embedding_columns(codes: Signs) -> Floats:
    """What tokens put into the first dimensions of the residual, [n_vocab, N_COLUMNS]."""
    columns = np.zeros((len(codes), N_COLUMNS), np.float32)
    columns[:, :N_BITS] = codes
    columns[:, N_BITS:N_SIGNALS] = 1
    columns[:, N_SIGNALS : 2 * N_SIGNALS] = -columns[:, :N_SIGNALS]
    return columns


def neuron_columns(wishes: Signs) -> Floats:
    """Weights that turn those dimensions into 1 for active neurons and at most -1 for others.

    Also the weights [n_ff, N_COLUMNS] of a predictor's second matrix, behind `predictor_rows`.
    """
    n_asked = np.abs(wishes).sum(1, keepdims=True)
    columns = np.zeros((len(wishes), N_COLUMNS), np.float32)
    columns[:, :N_BITS] = wishes
    columns[:, N_BITS:N_SIGNALS] = -(np.arange(N_ONES) < n_asked - 1).astype(np.float32)
    columns[:, N_BITS] += n_asked[:, 0] == 0
    columns[:, N_SIGNALS : 2 * N_SIGNALS] = -columns[:, :N_SIGNALS]
    columns[:, -1] = -2
    return columns * np.float32(0.5)


def predictor_rows(n_embd: int) -> Floats:
    """First rows of a predictor's first matrix [N_COLUMNS, n_embd].

    Behind ReLU they are twice the first dimensions where those are positive, and 0 elsewhere.
    """
    rows = np.zeros((N_COLUMNS, n_embd), np.float32)
    signal = np.arange(N_SIGNALS)
    rows[signal, signal] = rows[signal + N_SIGNALS, signal + N_SIGNALS] = 1
    rows[signal, signal + N_SIGNALS] = rows[signal + N_SIGNALS, signal] = -1
    rows[:, N_COLUMNS - 1] = -2
    return rows
