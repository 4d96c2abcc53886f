"""Splits a sparse model's neurons between GPU and CPU by how often they are active.

Takes the place of PowerInfer's `export-gpu-split.py` and solver module and of Q-Infer's, with their
arguments, and writes the split files that those runtimes load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray

from .. import _fingerprint
from .._files import StrPath
from .._gguf import GGUF
from .._sizes import parse_size
from ..activation import check_model, read_activations
from ..errors import ArgumentError, FormatError
from ..gpu_index import GpuIndex
from ._counts_pickle import read_counts_pickle
from ._neuron_bytes import NeuronBytes, neuron_bytes
from ._placement import balance, exact, hottest

Method = Literal["exact", "balance"]
Form = Literal["powerinfer", "qinfer"]

# The solvers' block of neurons.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Split:
    """A split that was written.

    Attributes:
        index: the neurons on the GPU.
        counts: per layer, how many neurons are whole on the GPU.
        coverage: per layer, the share of its activations that those neurons had.
        total_coverage: the same of all layers together.
        n_bytes: what the rows on the GPU take; None when no model was named.
    """

    index: GpuIndex
    counts: list[int]
    coverage: list[float]
    total_coverage: float
    n_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Room:
    """A capacity, and what a neuron takes of it in each layer, in the same unit."""

    capacity: int
    cost_up: Sequence[int]
    cost_down: Sequence[int]


def export_gpu_split(
    activation: StrPath,
    out: StrPath,
    *,
    counts_pickle: StrPath | None = None,
    model: StrPath | None = None,
    vram_capacity: int | None = None,
    neurons: int | None = None,
    rows: int | None = None,
    method: Method = "exact",
    ratio_up: float | None = None,
    ratio_down: float | None = None,
    has_gate: bool | None = None,
    batch: int | None = None,
    threshold: int = 0,
    form: Form | None = None,
    n_ff: int | None = None,
    n_layers: int | None = None,
) -> Split:
    """Chooses the neurons that go to the GPU and writes them as a GPU split file.

    In each layer those most often active go first. How many of each layer is decided by exactly one
    of `counts_pickle`, `neurons`, `rows`, or `vram_capacity` with `model`.

    Args:
        activation: a folder of `activation_{i}.pt`.
        out: the file to write; it takes its name when it is complete.
        counts_pickle: a file with the number of each layer, as older solvers wrote.
        model: the model file, from which the bytes of a neuron are taken, and for which alone
            qinfer will use the split then.
        vram_capacity: bytes of GPU memory for neurons. Beside a number of neurons it is only
            recorded: PowerInfer uses the file as long as it may use so many bytes.
        neurons: how many, of all layers together.
        rows: how many rows of gate, up and down; for "balance".
        method: "exact" covers the most activations; "balance" lets GPU and CPU need equal time, as
            Q-Infer does. `_placement` has the reasons.
        ratio_up, ratio_down: for "balance", the speed of the GPU divided by the CPU's.
        has_gate: for "balance" without a model, whether there is a gate; None means that there is.
        batch: neurons are taken in multiples of this, which divides n_ff; None takes 256 or its
            largest divisor that does.
        threshold: for "exact", a layer takes none or at least so many neurons.
        form: "powerinfer" writes two tensors a layer, "qinfer" four, which place down apart; None
            takes that of the method.
        n_ff, n_layers: what the counts are expected to have; None accepts any.

    Raises:
        ArgumentError: arguments do not fit together, a number is out of range, `out` is a file to
            read from, or the counts say that they are of another model.
        FormatError: a file is not what it should be, or of another model.
        FileError: a file cannot be read or written.
    """
    if method not in ("exact", "balance"):
        raise ArgumentError(f"method={method!r} is neither 'exact' nor 'balance'")
    if form not in (None, "powerinfer", "qinfer"):
        raise ArgumentError(f"form={form!r} is neither 'powerinfer' nor 'qinfer'")
    _refuse_as_output(out, model, counts_pickle)
    cost = None if model is None else neuron_bytes(model)
    if cost is not None:
        _agree("neurons per layer", n_ff, model, cost.n_ff)
        _agree("layers", n_layers, model, cost.n_layers)
        n_ff, n_layers = cost.n_ff, cost.n_layers
    counts = read_activations(activation, n_layers=n_layers, n_ff=n_ff)
    fingerprint = b""
    if model is not None:
        with GGUF(model) as file:
            fingerprint = _fingerprint.of_file(file)
            check_model(activation, _fingerprint.of_model(file))
    if counts_pickle is not None:
        choices = (neurons, rows, ratio_up, ratio_down, batch, threshold or None)
        if method != "exact" or any(choice is not None for choice in choices):
            raise ArgumentError("the counts of a pickle leave no number of neurons to choose")
        up, down = _listed(counts_pickle, counts)
        form = form or ("powerinfer" if up == down else "qinfer")
    else:
        room = _room(method, len(counts), cost, vram_capacity, neurons, rows, has_gate)
        block = gcd(_BLOCK, len(counts[0])) if batch is None else batch
        if method == "exact":
            if ratio_up is not None or ratio_down is not None:
                raise ArgumentError("speed ratios are for the method 'balance'")
            each = [sum(pair) for pair in zip(room.cost_up, room.cost_down, strict=True)]
            up = exact(counts, room.capacity, cost=each, block=block, threshold=threshold)
            down = up
        else:
            up, down = _balanced(counts, room, ratio_up, ratio_down, block, threshold)
        form = form or ("powerinfer" if method == "exact" else "qinfer")
    if form == "powerinfer":
        # A neuron computes on one device; rows of a part of it would lie there unused.
        up = down = [min(pair) for pair in zip(up, down, strict=True)]
    split = _split(counts, up, down, form, vram_capacity, cost, fingerprint)
    split.index.write(out)
    return split


def _refuse_as_output(out: StrPath, *sources: StrPath | None) -> None:
    """Raises ArgumentError when the output is one of the files to read from."""
    target = Path(out)
    for source in [Path(path) for path in sources if path is not None]:
        if target.exists() and source.exists() and target.samefile(source):
            raise ArgumentError(f"{out} is a file to read from; write to another one")


def _agree(what: str, given: int | None, model: StrPath | None, found: int) -> None:
    if given not in (None, found):
        raise ArgumentError(f"{given} {what} are asked for, {model} has {found}")


def _listed(path: StrPath, counts: list[NDArray[Any]]) -> tuple[list[int], list[int]]:
    """The numbers of a counts pickle, checked against the activation counts."""
    pairs = read_counts_pickle(path)
    if len(pairs) != len(counts):
        raise FormatError(
            f"{path}: has counts of {len(pairs)} layers, the activations have {len(counts)} layers"
        )
    n_ff = len(counts[0])
    for layer, pair in enumerate(pairs):
        if max(pair) > n_ff:
            raise FormatError(f"{path}: layer {layer} has {max(pair)} of {n_ff} neurons")
    return [up for up, _ in pairs], [down for _, down in pairs]


def _room(
    method: Method,
    n_layers: int,
    cost: NeuronBytes | None,
    vram_capacity: int | None,
    neurons: int | None,
    rows: int | None,
    has_gate: bool | None,
) -> _Room:
    """How much fits, in neurons or rows when their number is given, in bytes otherwise."""
    if neurons is not None and rows is not None:
        raise ArgumentError("give a number of neurons or one of rows, not both")
    if method == "exact" and rows is not None:
        raise ArgumentError("a number of rows is for the method 'balance'")
    if cost is not None:
        if has_gate not in (None, cost.has_gate):
            raise ArgumentError(f"has_gate={has_gate}, but the model says otherwise")
        has_gate = cost.has_gate
    n_up = 1 if has_gate is False else 2
    if neurons is not None:
        rows = neurons * (n_up + 1)
    if rows is not None:
        return _Room(rows, [n_up] * n_layers, [1] * n_layers)
    if vram_capacity is None:
        raise ArgumentError(
            "say how much goes to the GPU: a number of neurons, or bytes together with the model"
        )
    if cost is None:
        raise ArgumentError("bytes alone do not say how many neurons fit: name the model, too")
    return _Room(vram_capacity, cost.gate_up, cost.down)


def _balanced(
    counts: list[NDArray[Any]],
    room: _Room,
    ratio_up: float | None,
    ratio_down: float | None,
    block: int,
    threshold: int,
) -> tuple[list[int], list[int]]:
    if ratio_up is None or ratio_down is None:
        raise ArgumentError("the method 'balance' needs the speed ratios of up and of down")
    if threshold:
        raise ArgumentError("a threshold is for the method 'exact'")
    return balance(
        counts,
        room.capacity,
        cost_up=room.cost_up,
        cost_down=room.cost_down,
        ratio_up=ratio_up,
        ratio_down=ratio_down,
        block=block,
    )


def _split(
    counts: list[NDArray[Any]],
    up: list[int],
    down: list[int],
    form: Form,
    vram_capacity: int | None,
    cost: NeuronBytes | None,
    fingerprint: bytes,
) -> Split:
    n_bytes = None
    if cost is not None:
        rows = zip(up, cost.gate_up, down, cost.down, strict=True)
        n_bytes = sum(n_up * row_up + n_down * row_down for n_up, row_up, n_down, row_down in rows)
        if vram_capacity is not None and n_bytes > vram_capacity:
            raise ArgumentError(
                f"these neurons take {n_bytes} bytes, more than vram_capacity={vram_capacity}: "
                "a runtime with that much memory would use the file and run out of it"
            )
    index = GpuIndex(
        n_ff=len(counts[0]),
        gate_up=tuple(hottest(layer, k) for layer, k in zip(counts, up, strict=True)),
        down=None
        if form == "powerinfer"
        else tuple(hottest(layer, k) for layer, k in zip(counts, down, strict=True)),
        vram_capacity=(n_bytes or 0) if vram_capacity is None else vram_capacity,
        fingerprint=fingerprint,
    )
    whole = [index.neurons(layer) for layer in range(index.n_layers)]
    totals = [float(layer.sum(dtype=np.float64)) for layer in counts]
    covered = [
        float(layer[ids].sum(dtype=np.float64)) for layer, ids in zip(counts, whole, strict=True)
    ]
    shares = [part / total if total else 0.0 for part, total in zip(covered, totals, strict=True)]
    return Split(
        index=index,
        counts=[len(ids) for ids in whole],
        coverage=shares,
        total_coverage=sum(covered) / sum(totals) if sum(totals) else 0.0,
        n_bytes=n_bytes,
    )


# ---- command line ----


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ArgumentError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def _refuse_moe(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None and value.lower() != "false":
        raise click.UsageError(
            "--moe: mixtures of experts have no split by neuron; leave it out for other models",
            ctx=context,
        )


def _one(name: str, *values: Any) -> Any:
    """The one value given under several names, or None."""
    given = [value for value in values if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{name} is given twice")
    return given[0] if given else None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("activation_dir", required=False)
@click.argument("out", required=False)
@click.argument("solver_pickle", required=False)
@click.option("--activation", metavar="DIR", help="ACTIVATION_DIR, as solvers call it.")
@click.option("--output", metavar="FILE", help="OUT, as solvers call it.")
@click.option(
    "--model",
    metavar="GGUF",
    help="The model file: gives the bytes of a neuron; qinfer uses the split for it alone.",
)
@click.option(
    "--vram-capacity",
    metavar="SIZE",
    callback=_size,
    help="GPU memory for neurons: bytes, or such as 6GiB.",
)
@click.option("--neurons", type=click.IntRange(0), help="Neurons on the GPU, of all layers.")
@click.option(
    "--capacity",
    type=click.IntRange(0),
    help="The same, as PowerInfer calls it; with balance, rows of weights, as Q-Infer.",
)
@click.option(
    "--method",
    type=click.Choice(["exact", "balance"]),
    help="Default: balance when speed ratios are given, else exact.",
)
@click.option(
    "--ratio-up",
    "--computility-ratio-up",
    "ratio_up",
    type=float,
    help="Speed of GPU / CPU in gate and up.",
)
@click.option(
    "--ratio-down",
    "--computility-ratio-down",
    "ratio_down",
    type=float,
    help="Speed of GPU / CPU in down.",
)
@click.option(
    "--has-gate",
    type=click.IntRange(0, 1),
    help="Without --model: whether there is a gate; default 1.",
)
@click.option(
    "--batch", type=click.IntRange(1), help="Neurons are taken in multiples of this; default 256."
)
@click.option(
    "--threshold",
    type=click.IntRange(0),
    default=0,
    help="A layer takes none or at least so many neurons; default 0.",
)
@click.option(
    "--form",
    type=click.Choice(["powerinfer", "qinfer"]),
    help="Two or four tensors a layer; default: as the method's runtime.",
)
@click.option("--neuron", "n_ff", type=click.IntRange(1), help="Neurons per layer, to be checked.")
@click.option("--layer", "n_layers", type=click.IntRange(1), help="Layers, to be checked.")
@click.option("--moe", hidden=True, expose_value=False, callback=_refuse_moe)
def command(
    activation_dir: str | None,
    out: str | None,
    solver_pickle: str | None,
    activation: str | None,
    output: str | None,
    model: str | None,
    vram_capacity: int | None,
    neurons: int | None,
    capacity: int | None,
    method: Method | None,
    ratio_up: float | None,
    ratio_down: float | None,
    has_gate: int | None,
    batch: int | None,
    threshold: int,
    form: Form | None,
    n_ff: int | None,
    n_layers: int | None,
) -> None:
    """Choose the neurons that go to the GPU, from a folder of activation_{i}.pt.

    OUT is a file that PowerInfer or Q-Infer loads; with --model its default is the name where they
    look for it, MODEL.generated.gpuidx. SOLVER_PICKLE holds the number of neurons of each layer, as
    older solvers wrote it; the other options find the best ones.

    Example: python -m qinfer.tools.export_gpu_split activation --model x.gguf --vram-capacity 6GiB
    """
    folder = _one("the folder of activations", activation_dir, activation)
    target = _one("the output", out, output)
    if folder is None:
        raise click.UsageError("name the folder with activation_0.pt, activation_1.pt, …")
    if target is None and model is None:
        raise click.UsageError("name the output: OUT, or the --model it is to lie beside")
    target = target or f"{model}.generated.gpuidx"
    if method is None:
        method = "exact" if ratio_up is None and ratio_down is None else "balance"
    rows = None
    if method == "balance":
        rows = capacity
    else:
        neurons = _one("the number of neurons", neurons, capacity)
    split = export_gpu_split(
        folder, target,
        counts_pickle=solver_pickle, model=model, vram_capacity=vram_capacity, neurons=neurons,
        rows=rows, method=method, ratio_up=ratio_up, ratio_down=ratio_down,
        has_gate=None if has_gate is None else bool(has_gate), batch=batch, threshold=threshold,
        form=form, n_ff=n_ff, n_layers=n_layers,
    )  # fmt: skip
    _report(target, split, from_pickle=solver_pickle is not None)


def _report(target: str, split: Split, *, from_pickle: bool) -> None:
    index = split.index
    if from_pickle:
        click.echo(
            "note: the output is a GPU split as PowerInfer loads it today; the form that "
            "export-gpu-split.py wrote before is no longer read by any release",
            err=True,
        )
    if index.vram_capacity == 0:
        click.echo(
            "note: the file records no need of GPU memory, so that a runtime will use it with any; "
            "--vram-capacity or --model gives it one",
            err=True,
        )
    if index.down is not None:
        click.echo(
            "note: gate and up are placed apart from down; neurons that are on the GPU with both "
            "are counted",
            err=True,
        )
    if not any(split.counts):
        click.echo(
            "note: no neurons are on the GPU; a size without a unit is bytes, --batch says how "
            "many neurons are taken at least",
            err=True,
        )
    for layer, (count, share) in enumerate(zip(split.counts, split.coverage, strict=True)):
        apart = ""
        if index.down is not None:
            n_up, n_down = len(index.gate_up[layer]), len(index.down[layer])
            apart = f" ({n_up} gate and up, {n_down} down)"
        click.echo(f"layer {layer:3d}: {count:6d} of {index.n_ff} neurons{apart}, "
                   f"{share:6.1%} of activations")  # fmt: skip
    size = "" if split.n_bytes is None else f", {split.n_bytes / 2**20:.1f} MiB"
    click.echo(
        f"{target}: {sum(split.counts)} of {index.n_ff * index.n_layers} neurons{size}, "
        f"{split.total_coverage:.1%} of activations"
    )


if __name__ == "__main__":
    from .._program import run

    run(command, "python -m qinfer.tools.export_gpu_split")
