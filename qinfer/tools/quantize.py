"""Quantises a model: writes a GGUF or PowerInfer file anew with smaller tensors.

Takes the place of llama.cpp's and PowerInfer's `quantize`, with their arguments.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from .. import _machine
from .._files import StrPath
from .._gguf import GGUF, TensorInfo
from .._progress import Bar
from .._types import tensor_type
from ..errors import ArgumentError, FormatError, UnsupportedError
from ._imatrix import ImportanceMatrix, read_imatrix
from ._quantize_rules import (
    FLOATS,
    TARGETS,
    Facts,
    Target,
    computed_type,
    find_target,
    fitting_type,
    is_head,
    read_facts,
    role_of,
    wanted_type,
)
from ._rewrite import NewTensor, copied, encoded, mib, refuse_own_source, rewrite

logger = logging.getLogger("qinfer")

# Of the block formats, as `general.quantization_version` numbers them.
_QUANTIZATION_VERSION = 2

# PowerInfer computes the rows of neurons in these types only; others load there, and give garbage.
_POWERINFER_TYPES = {"F16", "Q4_0"}
_NEURON_ROLES = {"ffn_gate", "ffn_up", "ffn_down_t"}


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor before and after; `shape` is NumPy's."""

    name: str
    shape: tuple[int, ...]
    old_type: str
    new_type: str
    old_bytes: int
    new_bytes: int


@dataclass(frozen=True, slots=True)
class Quantised:
    """What became, or would become, of each tensor."""

    changes: list[Change]

    @property
    def old_bytes(self) -> int:
        """Bytes of all tensors before."""
        return sum(change.old_bytes for change in self.changes)

    @property
    def new_bytes(self) -> int:
        """Bytes of all tensors after."""
        return sum(change.new_bytes for change in self.changes)

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, of all tensors after."""
        n_elements = sum(prod(change.shape) for change in self.changes)
        return 8 * self.new_bytes / n_elements if n_elements else 0.0


@dataclass(frozen=True, slots=True)
class _Options:
    pure: bool
    leave_output: bool
    output_type: str | None
    embedding_type: str | None
    tensor_types: list[tuple[re.Pattern[str], str]]
    allow_requantize: bool


def quantize(
    source: StrPath,
    out: StrPath | None,
    type: str,
    *,
    threads: int | None = None,
    pure: bool = False,
    leave_output_tensor: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: StrPath | None = None,
    allow_requantize: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Quantised:
    """Writes a model with its matrices in other types.

    Matrices get the type that `type` stands for, with the exceptions of `_quantize_rules`; norms
    and biases are F32; tensors of no known role stay as they are, with a warning. Where a row is
    not whole blocks of the type, the nearest type that fits is taken, with a warning. A PowerInfer
    file stays one.

    Args:
        source: a GGUF or PowerInfer file; of a split one, its first part.
        out: the file to write; it takes its name when it is complete. None only in a dry run.
        type: a name of `TARGETS` in any case, or llama.cpp's number of it.
        threads: how many compute; None uses all cores this process may run on. The bytes do not
            depend on it.
        pure: all matrices get the same type.
        leave_output_tensor: the head keeps its type.
        output_tensor_type: type of `output.weight`.
        token_embedding_type: type of `token_embd.weight`.
        tensor_types: pairs of a regular expression and the type of the matrices in whose names it
            is found; the first that is found decides, before everything above.
        imatrix: an importance matrix, as llama.cpp's imatrix writes it; it steers the K types.
        allow_requantize: accepts tensors that are quantised already, in another type.
        dry_run: computes sizes, writes nothing.
        progress: called with the bytes written and all bytes.

    Raises:
        ArgumentError: a type or number is unknown, `out` is the source, or a tensor is quantised
            already.
        UnsupportedError: a tensor to be converted is of a type that cannot be decoded.
        FormatError: the source is damaged, or holds a value that is not finite or too large for
            the type; the message names the tensor. Or the importance matrix is damaged, or of
            another model.
        FileError: a file cannot be read or written.
    """
    target = find_target(type)
    if target is None:
        raise ArgumentError(f"unknown type {type!r}; known are {', '.join(TARGETS)}")
    if out is None and not dry_run:
        raise ArgumentError("name the file to write")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads={threads} is not a positive integer")
    options = _Options(
        pure=pure,
        leave_output=leave_output_tensor,
        output_type=_checked_type(output_tensor_type, "output_tensor_type"),
        embedding_type=_checked_type(token_embedding_type, "token_embedding_type"),
        tensor_types=[_tensor_type(pattern, name) for pattern, name in tensor_types],
        allow_requantize=allow_requantize,
    )
    importance = None if imatrix is None else read_imatrix(imatrix)
    with GGUF(source) as file:
        if out is not None:
            refuse_own_source(file, out)
        changes = _plan(file, target, options)
        columns = {} if importance is None else _columns(file, changes, importance)
        if not dry_run and out is not None:
            tensors = [
                _new_tensor(file, tensor, change.new_type, columns.get(tensor.name))
                for tensor, change in zip(file.tensors, changes, strict=True)
            ]
            rewrite(
                file,
                out,
                tensors,
                metadata=_metadata(target, importance),
                threads=threads or _machine.processor().n_usable_cores,
                progress=progress,
            )
    return Quantised(changes)


def _checked_type(text: str | None, option: str) -> str | None:
    return None if text is None else computed_type(text, option)


def _tensor_type(pattern: str, name: str) -> tuple[re.Pattern[str], str]:
    try:
        return re.compile(pattern), computed_type(name, f"tensor type of {pattern!r}")
    except re.error as error:
        raise ArgumentError(f"tensor type: {pattern!r} is no regular expression: {error}") from None


def _metadata(target: Target, importance: ImportanceMatrix | None) -> dict[str, tuple[object, str]]:
    """The keys by which llama.cpp records how a file was quantised."""
    found: dict[str, tuple[object, str]] = {}
    if target.file_type is not None:
        found["general.file_type"] = target.file_type, "u32"
        found["general.quantization_version"] = _QUANTIZATION_VERSION, "u32"
    if importance is not None:
        found["quantize.imatrix.file"] = importance.path, "string"
        found["quantize.imatrix.entries_count"] = len(importance.columns), "u32"
        if importance.n_chunks is not None:
            found["quantize.imatrix.chunks_count"] = importance.n_chunks, "u32"
    return found


def _columns(
    file: GGUF, changes: list[Change], importance: ImportanceMatrix
) -> dict[str, NDArray[np.float32]]:
    """The importance of the columns of each K-type tensor; says which have none."""
    steered = [change for change in changes if change.new_type.endswith("_K")]
    found = {}
    for change in steered:
        columns = importance.columns.get(change.name)
        if columns is None:
            continue
        if len(columns) != change.shape[-1]:
            raise FormatError(
                f"{importance.path}: {change.name!r} has {len(columns)} columns there and "
                f"{change.shape[-1]} in {file.path}: it is of another model"
            )
        found[change.name] = columns
    if not steered:
        logger.warning("%s: no tensor is of a K type, and it steers only those", importance.path)
    elif len(found) < len(steered):
        logger.warning(
            "%s: has no entry for %s",
            importance.path, _some([c.name for c in steered if c.name not in found]),
        )  # fmt: skip
    return found


def _plan(file: GGUF, target: Target, options: _Options) -> list[Change]:
    """The types of all tensors; says what differs from what was asked for."""
    facts = read_facts(file)
    changes = []
    not_fitting: dict[tuple[str, str], list[str]] = {}
    unknown = []
    for tensor in file.tensors:
        if tensor.n_bytes == 0:
            raise UnsupportedError(
                f"{file.path}: tensor {tensor.name!r} is of {tensor.type}, whose size is not known"
            )
        wanted = _wanted(tensor, target, facts, options)
        if wanted is None and _is_unknown(tensor, target):
            unknown.append(tensor.name)
        new = tensor.type
        if wanted is not None:
            new = fitting_type(wanted, tensor.shape[-1], tensor.type)
            if new != wanted:
                not_fitting.setdefault((wanted, new), []).append(tensor.name)
            _check_source_type(file, tensor, new, options)
        new_bytes = tensor.n_bytes
        if new != tensor.type:
            kind = tensor_type(new)
            new_bytes = tensor.n_elements // kind.block_size * kind.block_bytes
        changes.append(
            Change(tensor.name, tensor.shape, tensor.type, new, tensor.n_bytes, new_bytes)
        )
    for (wanted, new), names in not_fitting.items():
        block_size = 32 if new in FLOATS else tensor_type(wanted).block_size
        logger.warning(
            "%s: rows that are not whole blocks of %d are %s instead of %s, in %s",
            file.path, block_size, new, wanted, _some(names),
        )  # fmt: skip
    if unknown:
        logger.warning("%s: of no known role, and left as they are: %s", file.path, _some(unknown))
    _say_what_powerinfer_runs(file, changes)
    return changes


def _wanted(tensor: TensorInfo, target: Target, facts: Facts, options: _Options) -> str | None:
    """The type asked for, whatever the row length; None leaves the tensor as it is."""
    if target.type is None:
        return None
    known = role_of(tensor.name)
    if known is None or len(tensor.shape) < 2:
        # Norms and biases: the runtime, like others, computes with them as floats.
        return "F32" if len(tensor.shape) == 1 and tensor.type in FLOATS else None
    role, layer = known
    for pattern, name in options.tensor_types:
        if pattern.search(tensor.name):
            return name
    if role == "output" and options.output_type:
        return options.output_type
    if role == "token_embd" and options.embedding_type:
        return options.embedding_type
    if is_head(role, facts) and options.leave_output:
        return None
    return wanted_type(target, role, layer, tensor.shape[-1], facts, pure=options.pure)


def _is_unknown(tensor: TensorInfo, target: Target) -> bool:
    return target.type is not None and len(tensor.shape) > 1 and role_of(tensor.name) is None


def _check_source_type(file: GGUF, tensor: TensorInfo, new: str, options: _Options) -> None:
    if tensor.type == new:
        return
    old = tensor_type(tensor.type)
    if not old.can_decode:
        raise UnsupportedError(
            f"{file.path}: tensor {tensor.name!r} is of type {tensor.type}, which cannot be decoded"
        )
    if old.name not in FLOATS and not options.allow_requantize:
        raise ArgumentError(
            f"{file.path}: tensor {tensor.name!r} is {old.name} already, and as {new} would lose "
            "twice; start from an F16 or F32 file, or allow requantising (--allow-requantize)"
        )


def _say_what_powerinfer_runs(file: GGUF, changes: list[Change]) -> None:
    if not file.info.is_powerinfer:
        return
    types = {
        change.new_type
        for change in changes
        if (role_of(change.name) or ("", 0))[0] in _NEURON_ROLES
    }
    if strange := sorted(types - _POWERINFER_TYPES):
        logger.warning(
            "%s: PowerInfer itself computes neurons in F16 and Q4_0 only; with %s it would print "
            "garbage. qinfer runs the file",
            file.path, ", ".join(strange),
        )  # fmt: skip


def _some(names: list[str]) -> str:
    """A count and the first few names."""
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {listed}"


def _new_tensor(
    file: GGUF, tensor: TensorInfo, new: str, columns: NDArray[np.float32] | None
) -> NewTensor:
    if new == tensor.type:
        return copied(file, tensor)
    return encoded(file, tensor, new, columns)


# ---- command line ----

# Flags of the tools this one follows that it does not have, and what to do instead.
_REFUSED = {
    "--include-weights": "all entries of the importance matrix are used",
    "--exclude-weights": "all entries of the importance matrix are used",
    "--tensor-type-file": "give each line as a --tensor-type of its own",
    "--prune-layers": "this tool changes types, not the model",
    "--override-kv": "this tool changes types only; gguf's gguf_set_metadata.py sets keys",
}  # fmt: skip
_REFUSED_SWITCHES = {
    "--keep-split": "the output is one file; leave it out",
}


def _refuse(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        option = parameter.opts[0]
        reason = (_REFUSED | _REFUSED_SWITCHES)[option]
        raise click.UsageError(f"{option} is not available: {reason}", context)


def _refused_options(command: Callable[..., None]) -> Callable[..., None]:
    for name in _REFUSED:
        command = click.option(name, multiple=True, hidden=True, expose_value=False,
                               callback=_refuse)(command)  # fmt: skip
    for name in _REFUSED_SWITCHES:
        command = click.option(name, is_flag=True, hidden=True, expose_value=False,
                               callback=_refuse)(command)  # fmt: skip
    return command


def _tensor_type_pair(text: str) -> tuple[str, str]:
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern:
        raise click.UsageError(f"--tensor-type {text!r} is not PATTERN=TYPE, such as attn_v=Q6_K")
    return pattern, name


def _arguments(words: Sequence[str]) -> tuple[str, str | None, str, int | None]:
    """IN [OUT] TYPE [THREADS] by place, as llama.cpp tells them apart."""
    source, *rest = words
    if rest and find_target(rest[0]) is not None:
        out, kind, rest = None, rest[0], rest[1:]
    elif len(rest) > 1:
        out, kind, rest = rest[0], rest[1], rest[2:]
    else:
        raise click.UsageError(f"name the type: one of {', '.join(TARGETS)}")
    if find_target(kind) is None:
        raise click.UsageError(f"unknown type {kind!r}: one of {', '.join(TARGETS)}")
    if len(rest) > 1:
        raise click.UsageError(f"{' '.join(rest)!r} comes after IN [OUT] TYPE [THREADS]")
    if rest and not (rest[0].isdecimal() and int(rest[0]) > 0):
        raise click.UsageError(f"THREADS is {rest[0]!r}, not a positive number")
    return source, out, kind, int(rest[0]) if rest else None


def _default_out(source: str, kind: str) -> str:
    """As llama.cpp names it, beside the source."""
    target = find_target(kind)
    return str(Path(source).with_name(f"ggml-model-{target.name if target else kind}.gguf"))


def _type_list() -> str:
    lines = []
    for target in TARGETS.values():
        number = "" if target.file_type is None else f"{target.file_type:2d}"
        lines.append(f"  {number:2s}  {target.name:7s} {target.summary}".rstrip())
    return "\n".join(lines)


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"""\b
TYPE, by number or name (Q3_K, Q4_K, Q5_K stand for their _M):
{_type_list()}

The head is output.weight, or token_embd.weight where there is none. Predictors (fc1, fc2) are Q5_0
instead of Q2_K to Q5_K, and Q8_0 instead of Q6_K. Norms, biases and positions keep their
precision. Where rows are not whole blocks of 256, Q2_K and Q3_K become Q4_0, Q4_K Q5_0, Q5_K Q5_1,
Q6_K Q8_0; where they are not whole blocks of 32 either, F16.""",
)
@click.argument("words", nargs=-1, required=True, metavar="IN [OUT] TYPE [THREADS]")
@click.option("-t", "--threads", type=click.IntRange(1), help="Default: all usable cores.")
@click.option("--pure", is_flag=True, help="All matrices get the same type.")
@click.option("--leave-output-tensor", is_flag=True, help="The head keeps its type.")
@click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
@click.option(
    "--tensor-type",
    metavar="PATTERN=TYPE",
    multiple=True,
    help="Type of matrices whose name matches a regular expression; may be repeated.",
)
@click.option(
    "--imatrix", metavar="FILE", help="llama.cpp's importance matrix; it steers the K types."
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Accept tensors that are quantised already; this loses twice.",
)
@click.option("--dry-run", is_flag=True, help="Print each tensor's size, write nothing.")
@_refused_options
def command(
    words: tuple[str, ...],
    threads: int | None,
    pure: bool,
    leave_output_tensor: bool,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    tensor_type: tuple[str, ...],
    imatrix: str | None,
    allow_requantize: bool,
    dry_run: bool,
) -> None:
    """Write a GGUF or PowerInfer file anew with its matrices in another TYPE.

    The default of OUT is ggml-model-TYPE.gguf beside IN.

    Example: python -m qinfer.tools.quantize model.f16.gguf model.q4_0.gguf Q4_0
    """
    source, out, kind, number = _arguments(words)
    if threads is not None and number is not None:
        raise click.UsageError("the number of threads is given twice")
    out = out or _default_out(source, kind)
    begin = time.monotonic()
    with Bar("quantising", in_bytes=True) as bar:
        result = quantize(
            source, out, kind,
            threads=threads or number, pure=pure, leave_output_tensor=leave_output_tensor,
            output_tensor_type=output_tensor_type, token_embedding_type=token_embedding_type,
            tensor_types=[_tensor_type_pair(text) for text in tensor_type],
            imatrix=imatrix, allow_requantize=allow_requantize, dry_run=dry_run, progress=bar,
        )  # fmt: skip
    if dry_run:
        _print_tensors(result)
    seconds = "" if dry_run else f", in {time.monotonic() - begin:.1f} s"
    click.echo(
        f"{out}{' (not written)' if dry_run else ''}: {mib(result.old_bytes)} to "
        f"{mib(result.new_bytes)}, {result.bits_per_weight:.2f} bits per weight{seconds}"
    )


def _print_tensors(result: Quantised) -> None:
    width = max((len(change.name) for change in result.changes), default=0)
    for change in result.changes:
        shape = " x ".join(map(str, change.shape))
        types = f"{change.old_type} to {change.new_type}"
        click.echo(f"{change.name:{width}}  {shape:>15}  {types:14}  "
                   f"{change.old_bytes:>12} to {change.new_bytes:>12} bytes")  # fmt: skip
    counts = Counter(change.new_type for change in result.changes)
    for name, n in counts.most_common():
        size = sum(change.new_bytes for change in result.changes if change.new_type == name)
        click.echo(f"{name}: {n} tensors, {mib(size)}")


if __name__ == "__main__":
    from .._program import run

    run(command, "python -m qinfer.tools.quantize")
