"""What the converters share: writing a converted model as a file, and their command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from .._files import StrPath
from .._gguf import Writer
from .._progress import Bar
from ..errors import ArgumentError
from ._checkpoint import Checkpoint, checkpoint_folder, listing, read_config, tensors_of
from ._families import Value, keys_of
from ._tensor_stream import Planned, Progress, write_tensors

VocabType = Literal["auto", "spm", "bpe"]

# `general.file_type` of each type.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


def write_model(
    path: Path,
    *,
    architecture: str,
    name: str,
    keys: Mapping[str, Value],
    others: Mapping[str, Value],
    vocabulary: Sequence[tuple[str, Any, str | None]],
    tensors: Sequence[Planned],
    outtype: str | None,
    powerinfer: bool,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Writes a file: `keys` are given the architecture's prefix, `others` have their own.

    `outtype` is None for a file without tensors. Raises ArgumentError when the file would replace
    one that it is made from, and what `Writer` and `write_tensors` raise.
    """
    for planned in tensors:
        source = getattr(planned.source, "path", None)
        if source is not None and path.exists() and path.samefile(source):
            raise ArgumentError(f"{path}: is a file of the checkpoint; write to another")
    with Writer(path, powerinfer=powerinfer) as writer:
        writer.add("general.architecture", architecture)
        writer.add("general.name", name)
        for key, value in keys.items():
            writer.add(f"{architecture}.{key}", value)
        if outtype is not None:
            writer.add("general.file_type", _FILE_TYPES[outtype])
            if outtype == "Q8_0":
                writer.add("general.quantization_version", 2)
        for key, value in others.items():
            writer.add(key, value)
        for key, entry, kind in vocabulary:
            writer.add(key, entry, kind)
        if outtype is not None:
            write_tensors(writer, tensors, outtype, threads=threads, progress=progress)


def read_vocabulary_of(
    folder: Path, kind: VocabType, n_vocab: int
) -> Sequence[tuple[str, Any, str | None]]:
    """The keys of the vocabulary in a folder."""
    from ._vocabulary import read_vocabulary

    return read_vocabulary(folder, kind=kind, n_vocab=n_vocab).metadata


def convert_vocabulary(
    model: StrPath,
    outfile: StrPath,
    *,
    vocab_dir: StrPath | None = None,
    vocab_type: VocabType = "auto",
    n_ctx: int | None = None,
) -> Path:
    """Writes a file of the vocabulary alone, with the model's sizes and no tensors.

    Arguments and errors are those of the converters.
    """
    folder = checkpoint_folder(model)
    architecture, n_vocab, keys = keys_of(read_config(folder), n_ctx)
    source = folder if vocab_dir is None else Path(vocab_dir)
    write_model(
        Path(outfile), architecture=architecture, name=folder.resolve().name, keys=keys, others={},
        vocabulary=read_vocabulary_of(source, vocab_type, n_vocab), tensors=(), outtype=None,
        powerinfer=False, threads=None, progress=None,
    )  # fmt: skip
    return Path(outfile)


# ---- command line ----


def shared_options(default_type: str, types: Sequence[str]) -> Callable[[Any], Any]:
    """The options of both converters: those of PowerInfer's."""
    options = (
        click.option("--outfile", metavar="FILE",
                     help="Default: ggml-model-TYPE.gguf beside the model."),
        click.option("--outtype", type=click.Choice(types),
                     help=f"Type of the matrices; default: {default_type}."),
        click.option("--vocab-dir", metavar="DIR", help="Where the tokenizer is; default: MODEL."),
        click.option("--vocabtype", "vocab_type", type=click.Choice(["auto", "spm", "bpe"]),
                     default="auto", help="Which tokenizer to read where there are several."),
        click.option("--ctx", "n_ctx", type=click.IntRange(1),
                     help="Positions the model was trained for; default: as config.json says."),
        click.option("--hidden-act", metavar="NAME",
                     help="Activation, in place of config.json's: relu, fatrelu:0.01, …"),
        click.option("--concurrency", "threads", type=click.IntRange(1),
                     help="Threads that convert; default: one per core, at most 8."),
        click.option("--vocab-only", is_flag=True, help="Write the vocabulary alone."),
        click.option("--dump", is_flag=True, help="List the tensors of MODEL and write nothing."),
        click.option("--dump-single", is_flag=True, help="The same of MODEL, one file."),
        click.option("--bigendian", is_flag=True, hidden=True),
    )  # fmt: skip

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def did_something_else(
    model: str,
    *,
    dump: bool,
    dump_single: bool,
    vocab_only: bool,
    bigendian: bool,
    outfile: str | None,
    vocab_dir: str | None,
    vocab_type: VocabType,
    n_ctx: int | None,
) -> bool:
    """Does what the flags ask for instead of a conversion; False when they ask for none of it."""
    if bigendian:
        raise click.UsageError(
            "--bigendian: files are little-endian; for a big-endian machine turn a dense one round "
            "with gguf-convert-endian of PyPI's gguf"
        )
    if dump or dump_single:
        path = Path(model)
        tensors = tensors_of(path) if dump_single else Checkpoint(path).tensors
        for line in listing(tensors):
            click.echo(line)
        return True
    if vocab_only:
        if outfile is None:
            raise click.UsageError("--vocab-only needs --outfile FILE")
        path = convert_vocabulary(
            model, outfile, vocab_dir=vocab_dir, vocab_type=vocab_type, n_ctx=n_ctx
        )
        click.echo(f"{path}: the vocabulary alone")
        return True
    return False


def converting(convert: Callable[[Progress], Path]) -> None:
    """Converts with a progress bar, and says what was written."""
    with Bar("converting", in_bytes=True) as bar:
        path = convert(bar)
    click.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
