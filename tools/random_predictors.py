"""Replaces the predictors of a PowerInfer file by ones that know nothing about the token.

They are a control for measurements of quality: in each layer they name as many neurons as the true
predictors do on average over a text, but the same ones for every token, drawn at random, or with
--frequent those that are active most often over the text.

\b
    python tools/random_predictors.py relu.gguf random.gguf -f text.txt
    qinfer perplexity random.gguf -f text.txt --sparsity predict
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from qinfer import Model, QInferError
from qinfer._gguf import GGUF, TensorInfo
from qinfer._types import encode
from qinfer.tools._rewrite import NewTensor, copied, rewrite

Bools = NDArray[np.bool_]
_PREDICTOR = re.compile(r"blk\.(\d+)\.(fc[12])\.weight")


def count(
    model: Model, text: str, n_ctx: int, n_chunks: int | None, threshold: float | None
) -> tuple[list[float], list[NDArray[np.uint64]]]:
    """Per layer, the mean number of neurons predicted, and how often each one is active."""
    tokens = model.tokenizer.encode(text)
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    begins = range(0, len(tokens) - n_ctx + 1, n_ctx)[:n_chunks]
    if not begins:
        raise click.ClickException(f"the text has {len(tokens)} tokens, fewer than -c {n_ctx}")
    layers = range(model.info.n_layer)
    with (
        model.context(n_ctx, sparsity="predict", sparse_threshold=threshold) as predicting,
        model.context(n_ctx, sparsity="exact") as exact,
    ):
        exact.count_activations()
        for begin in begins:
            chunk = tokens[begin : begin + n_ctx]
            if bos is not None:
                chunk[0] = bos  # as `qinfer perplexity` reads the chunks
            for context in (predicting, exact):
                context.truncate(0)
                context.feed(chunk, logits="none", generated=True)
        stats = predicting.stats().layers
        counts = [exact.activation_counts(layer) for layer in layers]
    return [layer.n_predicted / layer.n_tokens for layer in stats], counts


def write(source: Path, out: Path, named: list[Bools], rng: np.random.Generator) -> None:
    """Writes a file whose predictors name, for every token, the neurons of `named` per layer.

    With random rows in fc1, some of relu(fc1·z) are above zero for any z. The rows of fc2 are +1
    for neurons that are named and -1 for the others, so that scores are their sum, or minus that.
    """

    def replaced(file: GGUF, tensor: TensorInfo) -> NewTensor:
        match = _PREDICTOR.fullmatch(tensor.name)
        if match is None:
            return copied(file, tensor)
        if match[2] == "fc1":
            values = rng.standard_normal(tensor.shape, np.float32)
        else:
            signs = np.where(named[int(match[1])], np.float32(1), np.float32(-1))
            values = np.repeat(signs[:, None], tensor.shape[1], axis=1)
        return made(tensor, encode(values, tensor.type).reshape(-1))

    with GGUF(source) as file:
        tensors = [replaced(file, tensor) for tensor in file.tensors]
        rewrite(file, out, tensors, metadata={"powerinfer.sparse_threshold": (0.0, "f32")})


def made(tensor: TensorInfo, data: NDArray[np.uint8]) -> NewTensor:
    """A tensor of the same name, shape and type with other bytes."""
    piece: Callable[[], NDArray[np.uint8]] = lambda: data  # noqa: E731
    return NewTensor(tensor.name, tensor.shape, tensor.type, lambda: iter([piece]))


@click.command(help=__doc__)
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-f", "--file", "text", type=click.File(encoding="utf-8"), required=True)
@click.option("-c", "--ctx-size", type=click.IntRange(1), default=512, show_default=True)
@click.option("--chunks", type=click.IntRange(1), help="Chunks of the text at most.")
@click.option("--sparse-threshold", type=float, help="Of the predictors to be replaced.")
@click.option("--frequent", is_flag=True, help="Name the most active neurons, not random ones.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    source: Path,
    out: Path,
    text: click.utils.LazyFile,
    ctx_size: int,
    chunks: int | None,
    sparse_threshold: float | None,
    frequent: bool,
    seed: int,
) -> None:
    """Command line of random_predictors."""
    rng = np.random.default_rng(seed)
    try:
        with Model(source, sparsity="off") as model:
            sizes, counts = count(model, text.read(), ctx_size, chunks, sparse_threshold)
        named = []
        for size, active in zip(sizes, counts, strict=True):
            # Of neurons that are as active as one another, and of all of them, chance decides.
            order = rng.permutation(len(active))
            if frequent:
                order = order[np.argsort(-active[order].astype(np.int64), kind="stable")]
            chosen = np.zeros(len(active), np.bool_)
            chosen[order[: round(size)]] = True
            named.append(chosen)
        write(source, out, named, rng)
    except QInferError as error:
        raise click.ClickException(str(error)) from error
    shares = ", ".join(f"{chosen.mean():.1%}" for chosen in named)
    click.echo(f"{out}: names {shares} of the neurons, layer by layer")


if __name__ == "__main__":
    main()
