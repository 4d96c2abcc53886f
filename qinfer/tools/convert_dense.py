"""Makes an ordinary GGUF file of a checkpoint, with the names and orders of llama.cpp.

Takes the place of PowerInfer's `convert-dense.py`, with its arguments.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

import click

from .._file_tensor import FileTensor
from .._files import StrPath
from ._checkpoint import Checkpoint
from ._families import Plan, Value, architecture_of, plan
from ._hidden_act import default_act
from ._hidden_act import hidden_act as activation
from ._model_output import (
    VocabType,
    converting,
    did_something_else,
    read_vocabulary_of,
    shared_options,
    write_model,
)
from ._tensor_stream import Progress

logger = logging.getLogger("qinfer")

OutType = Literal["f32", "f16", "bf16", "q8_0"]

_IN_LLAMA_CPP = ("llama", "qwen2", "falcon")


def convert_dense(
    model: StrPath,
    outfile: StrPath | None = None,
    *,
    outtype: OutType | None = None,
    vocab_dir: StrPath | None = None,
    vocab_type: VocabType = "auto",
    n_ctx: int | None = None,
    hidden_act: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Converts a checkpoint to a GGUF file, and returns its path.

    The file appears when it is complete. Vectors are written as F32, a tied head is left out. An
    activation other than the architecture's own is written as `qinfer.hidden_act`, which llama.cpp
    does not read, as it ignores the sliding window of these architectures: warnings say so.

    Args:
        model: a folder as transformers saves it, of the types llama, mistral, qwen2, falcon, opt
            and bamboo, or a file in it.
        outfile: the file to write; None is `ggml-model-TYPE.gguf` beside the model.
        outtype: type of the matrices; None takes that which most of the checkpoint's weights have.
            Rows that make no whole blocks of "q8_0" are written as F16.
        vocab_dir, vocab_type, n_ctx, threads, progress: as of `qinfer.tools.convert.convert`.
        hidden_act: the activation, in place of the configuration's, as `qinfer.hidden_act` names
            it: "silu", "relu", "gelu", "gelu_tanh", "relu_relu" or "fatrelu:0.01".

    Raises:
        FileError: a file is missing, cannot be read, or cannot be written.
        FormatError: a file is not what it should be, or tensors and configuration do not agree, or
            a weight is not finite.
        UnsupportedError: the model is of a type, or does something, that the runtime does not know.
        ArgumentError: an argument is out of range, or `outtype` does not reach a weight.
    """
    checkpoint = Checkpoint(model)
    architecture = architecture_of(checkpoint.config)
    act = activation(checkpoint.config, architecture, hidden_act)
    planned, _ = plan(checkpoint, sparse=False, n_ctx=n_ctx)
    others: dict[str, Value] = {}
    usual = default_act(architecture, sparse=False)
    if act != usual:
        others["qinfer.hidden_act"] = act
    source = checkpoint.folder if vocab_dir is None else Path(vocab_dir)
    vocabulary = read_vocabulary_of(source, vocab_type, planned.n_vocab)
    type_name = outtype or _input_type(planned)
    path = checkpoint.folder / f"ggml-model-{type_name}.gguf" if outfile is None else Path(outfile)
    if architecture in _IN_LLAMA_CPP:
        for difference in _differences(planned, act, usual):
            logger.warning("%s: llama.cpp would %s; use qinfer", path, difference)
    write_model(
        path, architecture=architecture, name=checkpoint.folder.resolve().name, keys=planned.keys,
        others=others, vocabulary=vocabulary, tensors=planned.tensors, outtype=type_name.upper(),
        powerinfer=False, threads=threads, progress=progress,
    )  # fmt: skip
    return path


def _differences(planned: Plan, act: str, usual: str) -> list[str]:
    """What llama.cpp does otherwise than the file says, as an infinitive without "to"."""
    found = []
    if act != usual:
        found.append(f"apply {usual} instead of {act}")
    if "attention.sliding_window" in planned.keys:
        found.append("let tokens attend beyond their sliding window")
    return found


def _input_type(planned: Plan) -> OutType:
    """The type that most weights have; there is no F64 in files."""
    weights: Counter[str] = Counter()
    for tensor in planned.tensors:
        if isinstance(tensor.source, FileTensor):
            weights[tensor.source.dtype] += tensor.source.n_elements
    known: dict[str, OutType] = {"F16": "f16", "BF16": "bf16"}
    return known.get(weights.most_common(1)[0][0], "f32")


# ---- command line ----


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@shared_options("the checkpoint's", ["f32", "f16", "bf16", "q8_0"])
def command(
    model: str,
    outfile: str | None,
    outtype: OutType | None,
    vocab_dir: str | None,
    vocab_type: VocabType,
    n_ctx: int | None,
    hidden_act: str | None,
    threads: int | None,
    vocab_only: bool,
    dump: bool,
    dump_single: bool,
    bigendian: bool,
) -> None:
    """Convert a checkpoint to a GGUF file.

    MODEL is a folder with config.json, safetensors or pytorch_model.bin, and a tokenizer: a llama,
    mistral, qwen2, falcon, opt or bamboo.

    Example: python -m qinfer.tools.convert_dense SmolLM2-135M --outtype q8_0 --outfile smol.gguf
    """
    if did_something_else(
        model, dump=dump, dump_single=dump_single, vocab_only=vocab_only, bigendian=bigendian,
        outfile=outfile, vocab_dir=vocab_dir, vocab_type=vocab_type, n_ctx=n_ctx,
    ):  # fmt: skip
        return
    converting(
        lambda progress: convert_dense(
            model, outfile,
            outtype=outtype, vocab_dir=vocab_dir, vocab_type=vocab_type, n_ctx=n_ctx,
            hidden_act=hidden_act, threads=threads, progress=progress,
        )
    )  # fmt: skip


if __name__ == "__main__":
    from .._program import run

    run(command, "python -m qinfer.tools.convert_dense")
