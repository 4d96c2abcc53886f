"""Writes the neuron-major twin of a model: `ffn_down`, whose rows are outputs, by neuron.

Row j of `ffn_down_t` is what neuron j adds to the output, as in PowerInfer's files. A token then
reads the rows of its active neurons, where in an ordinary file it reads whole blocks of 32 or 256
neurons in every row, most of them for nothing.

Floats move exactly. Quantised blocks lie along the neurons before and along the outputs after, so
their values have to be quantised again. What that costs, on a trained ReLU model of 15 million
weights: the divergence (KL, nats per token) of the twin's predictions from its source's, that from
the F16 model's, which the source's own quantising began, and the bytes of all down projections.

    source  down     from source  from F16 (source)  down, KiB (source)
    Q4_0    Q4_0     0.0439       0.171 (0.119)       729  (729)
    Q4_0    Q8_0     0.0011       0.119 (0.119)      1377  (729)
    Q4_K    Q5_0     0.0125       0.065 (0.055)       891  (729)
    Q4_K    Q8_0     0.0012       0.055 (0.055)      1377  (729)
    Q8_0    Q8_0     0.0012       0.0017 (0.0016)    1377 (1377)

So Q8_0 is the default for quantised types: a twin is meant to be the same model, and of the rows
that grew only those of active neurons are read. Where there is an F16 file, make its twin and
quantise that; then nothing is quantised twice.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import numpy as np
from numpy.typing import NDArray

from .. import _machine
from .._files import StrPath
from .._gguf import GGUF, TensorInfo
from .._progress import Bar
from .._types import decode, encode, tensor_type
from .._weights import Weights
from ..errors import ArgumentError
from . import _rewrite
from ._quantize_rules import FLOATS, computed_type, fitting_type
from ._rewrite import NewTensor, Piece, check_values, copied, mib, rewrite

logger = logging.getLogger("qinfer")

SAME = "same"

_DOWN = re.compile(r"(blk\.\d+\.ffn_down)\.(weight|bias)")
_HIDDEN_ACT = "qinfer.hidden_act"


@dataclass(frozen=True, slots=True)
class Twin:
    """What was written.

    Attributes:
        old_types, new_types: of the down projections, layer by layer.
        old_down_bytes, new_down_bytes: of all of them together.
        old_bytes, new_bytes: of all tensors.
    """

    old_types: list[str]
    new_types: list[str]
    old_down_bytes: int
    new_down_bytes: int
    old_bytes: int
    new_bytes: int


def neuron_major(
    source: StrPath,
    out: StrPath,
    *,
    down: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Twin:
    """Writes a model with every `ffn_down` (n_embd, n_ff) as an `ffn_down_t` (n_ff, n_embd).

    Other tensors and the metadata stay as they are, and `qinfer.hidden_act` records the activation
    that the source is computed with. No other program than qinfer loads the result.

    Args:
        source: a GGUF file; of a split one, its first part.
        out: the file to write; it takes its name when it is complete.
        down: the type of `ffn_down_t`, or "same". None keeps F32, F16 and BF16, and takes Q8_0 in
            place of quantised types. Where n_embd is not whole blocks of the type, the nearest
            type that fits is taken, with a warning.
        threads: how many compute; None uses all cores this process may run on.
        progress: called with the bytes written and all bytes.

    Raises:
        ArgumentError: the type is unknown, `out` is the source, or the source is neuron-major.
        FormatError: the source is damaged or lacks a tensor, or a tensor holds a value that is not
            finite or too large for its type; the message names the tensor.
        UnsupportedError: an architecture or tensor type that is not known.
        FileError: a file cannot be read or written.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads={threads} is not a positive integer")
    if down is not None:
        down = SAME if down.lower() == SAME else computed_type(down, "down")
    weights = Weights(source, mmap=True, hidden_act=None)
    try:
        file = weights.file
        if weights.info.down_by_neuron:
            raise ArgumentError(f"{file.path} is neuron-major already: it has ffn_down_t tensors")
        if not weights.info.has_sparse_act:
            logger.warning(
                "%s: its activation is %s, which leaves no neuron at zero: a twin saves nothing, "
                "unless predictors choose neurons",
                file.path, weights.info.hidden_act,
            )  # fmt: skip
        new = [_new_tensor(file, tensor, down) for tensor in file.tensors]
        pairs = [
            (old, twin) for old, twin in zip(file.tensors, new, strict=True) if _is_matrix(old)
        ]
        _say_what_did_not_fit(file, pairs, down)
        recorded = file.metadata.get(_HIDDEN_ACT, weights.info.hidden_act)
        rewrite(
            file,
            out,
            new,
            metadata={_HIDDEN_ACT: (recorded, "string")},
            threads=threads or _machine.processor().n_usable_cores,
            progress=progress,
        )
        return Twin(
            old_types=[old.type for old, _ in pairs],
            new_types=[twin.type for _, twin in pairs],
            old_down_bytes=sum(old.n_bytes for old, _ in pairs),
            new_down_bytes=sum(twin.n_bytes for _, twin in pairs),
            old_bytes=sum(tensor.n_bytes for tensor in file.tensors),
            new_bytes=sum(tensor.n_bytes for tensor in new),
        )
    finally:
        weights.close()


def _is_matrix(tensor: TensorInfo) -> bool:
    match = _DOWN.fullmatch(tensor.name)
    return match is not None and match[2] == "weight"


def _new_tensor(file: GGUF, tensor: TensorInfo, down: str | None) -> NewTensor:
    match = _DOWN.fullmatch(tensor.name)
    if match is None:
        return copied(file, tensor)
    name = f"{match[1]}_t.{match[2]}"
    if match[2] == "bias":
        return copied(file, tensor, name)
    kind = fitting_type(_wanted(tensor, down), tensor.shape[0], tensor.type)
    return transposed(file, tensor, name, kind)


def _wanted(tensor: TensorInfo, down: str | None) -> str:
    if down is None:
        return tensor.type if tensor.type in FLOATS else "Q8_0"
    return tensor.type if down == SAME else down


def transposed(file: GGUF, tensor: TensorInfo, name: str, type: str) -> NewTensor:
    """A matrix, its axes exchanged, in another type."""
    old = tensor_type(tensor.type)
    n_rows, n_cols = tensor.shape
    rows = tensor.data.reshape(n_rows, -1)
    blocks_per_piece = max(1, _rewrite.PIECE_WEIGHTS // n_rows // old.block_size)
    width = blocks_per_piece * old.block_size

    def piece(first: int) -> NDArray[np.uint8]:
        last = min(first + width, n_cols)
        begin, end = (col // old.block_size * old.block_bytes for col in (first, last))
        values = decode(np.ascontiguousarray(rows[:, begin:end]), old.name, (n_rows, last - first))
        check_values(file.path, tensor.name, values, type, first_col=first)
        return encode(np.ascontiguousarray(values.T), type).reshape(-1)

    def pieces() -> Iterator[Piece]:
        for first in range(0, n_cols, width):
            yield lambda first=first: piece(first)  # type: ignore[misc]

    return NewTensor(name, (n_cols, n_rows), type, pieces)


def _say_what_did_not_fit(
    file: GGUF, pairs: list[tuple[TensorInfo, NewTensor]], down: str | None
) -> None:
    others = {
        (_wanted(old, down), twin.type): old.shape[0]
        for old, twin in pairs
        if _wanted(old, down) != twin.type
    }
    for (wanted, found), n_embd in others.items():
        logger.warning(
            "%s: rows of %d are not whole blocks of %s; ffn_down_t is %s instead",
            file.path, n_embd, wanted, found,
        )  # fmt: skip


# ---- command line ----


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--down",
    metavar="TYPE",
    help="Type of the down projections, or 'same'. Default: floats stay, the others are Q8_0.",
)
@click.option("-t", "--threads", type=click.IntRange(1), help="Default: all usable cores.")
def command(source: str, out: str, down: str | None, threads: int | None) -> None:
    """Write a model with its down projections stored by neuron, for sparse inference.

    Reads fewer bytes per token where few neurons are active. Floats are moved exactly; quantised
    blocks are quantised again, in Q8_0 with little loss and more bytes, in the same type the other
    way round; better quantise the twin of an F16 file. Only qinfer loads the result.

    Example: python -m qinfer.tools.neuron_major relu-7b.q4_0.gguf relu-7b.q4_0.neurons.gguf
    """
    begin = time.monotonic()
    with Bar("transposing", in_bytes=True) as bar:
        twin = neuron_major(source, out, down=down, threads=threads, progress=bar)
    old, new = (", ".join(dict.fromkeys(types)) for types in (twin.old_types, twin.new_types))
    click.echo(
        f"{out}: {len(twin.new_types)} layers, down {old} of {mib(twin.old_down_bytes)} to {new} "
        f"of {mib(twin.new_down_bytes)}; all tensors {mib(twin.old_bytes)} to "
        f"{mib(twin.new_bytes)}, in {time.monotonic() - begin:.1f} s"
    )


if __name__ == "__main__":
    from .._program import run

    run(command, "python -m qinfer.tools.neuron_major")
