"""How often each neuron of a model is active over a text: what GPU splits and plots are made from.

The files have the names and form that PowerInfer's solver reads, and our own tools do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import _fingerprint
from ._files import StrPath
from .activation import write_activations
from .errors import ArgumentError, UnsupportedError
from .model import Model
from .offload import Placement

Counts = NDArray[np.uint64]
ShareArray = NDArray[np.float64]

# The share of activations for which the table and the plots tell how many neurons it takes.
COVERED = 0.8
_CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Activations of a model's feed-forward neurons over a text.

    Attributes:
        model: the name of the model's file.
        counts: for how many tokens each neuron was active: shape (n_layer, n_ff).
        n_tokens: of the text; each count is at most that.
        fingerprint: what tells the model apart, the same for its files in all types; may be empty.
        placement: what of the model a GPU kept in the end; None where none computed.
    """

    model: str
    counts: Counts
    n_tokens: int
    fingerprint: bytes = b""
    placement: Placement | None = None

    @property
    def active(self) -> ShareArray:
        """Per layer, the share of its neurons that a token activates on average: (n_layer,)."""
        return np.asarray(self.counts.mean(axis=1) / self.n_tokens)

    @property
    def frequencies(self) -> ShareArray:
        """Per layer, shares of tokens that neurons were active for, descending: (n_layer, n_ff)."""
        return np.asarray(-np.sort(-self.counts.astype(np.float64)) / self.n_tokens)

    @property
    def curves(self) -> ShareArray:
        """Per layer, the share of its activations that its 0, 1, … n_ff most active neurons had.

        Shape (n_layer, n_ff + 1), ascending from 0 to 1; a layer that was never active stays at 0.
        """
        sums = np.cumsum(self.frequencies, axis=1)
        shares = sums / np.maximum(sums[:, -1:], np.finfo(np.float64).tiny)
        return np.pad(shares, ((0, 0), (1, 0)))

    def covering(self, share: float = COVERED) -> ShareArray:
        """Per layer, the smallest share of its neurons that had this share of its activations.

        0 for a layer that was never active.
        """
        # Less a rounding error, so that all activations are reached by a sum of parts.
        missing = (self.curves < share - 1e-12).sum(axis=1) * self.counts.any(axis=1)
        return np.asarray(missing / self.counts.shape[1])


def profile(
    model: Model,
    text: str,
    *,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Counts for how many tokens of a text each neuron is active.

    The text is tokenised as a whole and cut into chunks of `n_ctx` tokens, the last of which may be
    shorter. Each is read from an empty context, with BOS in place of its first token when the model
    begins texts so, and every token is computed as a generated one in the mode "exact". A neuron is
    active when its activation is not zero.

    Args:
        model: the model, of any architecture whose activation is zero for many inputs.
        text: the text.
        n_ctx: tokens per chunk; None takes 512, or what the model was trained for if that is less.
        n_chunks: how many chunks at most; None takes all.
        progress: called as `progress(done, total)`, in tokens.

    Raises:
        UnsupportedError: the model's activation is not zero for many inputs.
        ArgumentError: the text is empty, or a number is out of range.
    """
    info = model.info
    name = Path(model.path).name
    if not info.has_sparse_act:
        raise UnsupportedError(
            f"{name}: its activation is {info.hidden_act}, which is zero for almost no input, so "
            "that all neurons are always active; models with relu, relu_relu or fatrelu have a "
            "profile"
        )
    if n_ctx is None:
        n_ctx = min(_CHUNK, info.n_ctx_train)
    if n_ctx < 1:
        raise ArgumentError(f"n_ctx={n_ctx} is not a positive integer")
    if n_chunks is not None and n_chunks < 1:
        raise ArgumentError(f"n_chunks={n_chunks} is not a positive integer")
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    if len(tokens) <= (bos is not None):
        raise ArgumentError("the text is empty: there is nothing to count activations over")
    if n_chunks is not None:
        tokens = tokens[: n_chunks * n_ctx]

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(begin + done, len(tokens))

    with model.context(n_ctx=n_ctx, sparsity="exact") as context:
        context.count_activations()
        for begin in range(0, len(tokens), n_ctx):
            chunk = tokens[begin : begin + n_ctx]
            if bos is not None:
                chunk[0] = bos
            context.truncate(0)
            context.feed(chunk, logits="none", generated=True, progress=report)
        counts = np.stack([context.activation_counts(layer) for layer in range(info.n_layer)])
        placement = context.placement
    fingerprint = _fingerprint.of_model(model._weights.file)
    return Profile(name, counts, len(tokens), fingerprint, placement)


def check_plots() -> None:
    """Raises ArgumentError when plots cannot be drawn because matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ArgumentError(
            "plots need matplotlib, which is not installed: in the project's folder "
            'pip install ".[plot]", or do without them by --no-plot'
        ) from None


def write(result: Profile, folder: StrPath, *, plot: bool = True) -> list[Path]:
    """Writes a profile's files and returns where they are.

    `activation/activation_{i}.pt` hold the counts in the form of PowerInfer's; with `plot`,
    `power_law.png` shows what share of activations the most active neurons have, and
    `heat_map.png` how often each is active. The folder is made when it is not there.

    Raises:
        FileError: a file cannot be written.
        ArgumentError: plots are wanted and matplotlib is not installed.
    """
    target = Path(folder)
    if plot:
        check_plots()  # before anything is written
    write_activations(target / "activation", list(result.counts), result.fingerprint)
    written = [target / "activation"]
    if plot:
        from ._profile_plots import draw

        written += draw(result, target)
    return written


def render(result: Profile) -> str:
    """A table as text: per layer, how many neurons are active, and how few do most of the work."""
    rows = zip(result.active, result.covering(), (result.counts == 0).mean(axis=1), strict=True)
    lines = [
        f"{result.model}: {result.n_tokens:,} tokens, {result.counts.shape[1]:,} neurons a layer",
        *([f"GPU {result.placement}"] if result.placement is not None else []),
        f"{'layer':>5}{'active':>10}{f'{COVERED:.0%} of activations':>24}{'never active':>16}",
    ]
    means = []
    for layer, row in enumerate(rows):
        means.append(row)
        lines.append(_row(str(layer), row))
    lines.append(_row("mean", tuple(np.mean(means, axis=0))))
    return "\n".join(lines)


def _row(name: str, shares: tuple[float, ...]) -> str:
    active, covering, never = shares
    return f"{name:>5}{active:>10.1%}{f'{covering:.1%} of neurons':>24}{never:>16.1%}"
