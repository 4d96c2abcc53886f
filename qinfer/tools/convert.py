"""Makes a PowerInfer file of a checkpoint and the activation predictors of its layers.

Takes the place of PowerInfer's `convert.py` and `convert-hf-to-powerinfer-gguf.py`, with their
arguments.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import click

from .._files import StrPath
from ..errors import UnsupportedError
from ._checkpoint import Checkpoint, Config
from ._families import SPARSE_MODEL_TYPES, Plan, Value, architecture_of, plan
from ._hidden_act import default_act, hidden_act, is_sparse
from ._model_output import (
    VocabType,
    converting,
    did_something_else,
    read_vocabulary_of,
    shared_options,
    write_model,
)
from ._predictor_folder import read_predictors
from ._tensor_stream import Progress

logger = logging.getLogger("qinfer")

OutType = Literal["f32", "f16", "q8_0"]

# What PowerInfer takes for granted of OPT.
_OPT_POSITIONS = 2050


def convert(
    model: StrPath,
    predictor: StrPath,
    outfile: StrPath | None = None,
    *,
    outtype: OutType = "f16",
    vocab_dir: StrPath | None = None,
    vocab_type: VocabType = "auto",
    n_ctx: int | None = None,
    hidden_act: str | None = None,
    tied_head: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Converts a checkpoint with predictors to a PowerInfer file, and returns its path.

    The file appears when it is complete. Vectors are written as F32. A tied head is written as a
    copy of the embedding, because PowerInfer does not run models without one; OPT's alone is not,
    nor is any with `tied_head`.

    Args:
        model: a folder as transformers saves it, of the types llama (also as mistral, sparsellama),
            bamboo, falcon and opt, or a file in it.
        predictor: a folder of `model_0.pt`, `model_1.pt`, …, each with `fc1.weight` [rank, n_embd]
            and `fc2.weight` [n_ff, rank], and optionally config.json with `sparse_threshold`.
        outfile: the file to write; None is `ggml-model-TYPE.gguf` beside the model.
        outtype: type of the matrices. PowerInfer itself runs "f16" alone; rows that make no whole
            blocks of "q8_0" are written as F16.
        vocab_dir: the folder of the tokenizer, where it is not the model's.
        vocab_type: which tokenizer to read where there are several.
        n_ctx: positions the model was trained for, in place of the configuration's.
        hidden_act: the activation, in place of the configuration's, as `qinfer.hidden_act` names
            it: "relu", "relu_relu" or "fatrelu:0.01".
        tied_head: leaves the copy of a tied head out, for a file that qinfer alone runs.
        threads: that convert; None takes one per core, at most 8.
        progress: called as `progress(done, total)`, in bytes written.

    Raises:
        FileError: a file is missing, cannot be read, or cannot be written.
        FormatError: a file is not what it should be, or tensors and configuration do not agree, or
            a weight is not finite.
        UnsupportedError: the model is of a type or an activation that has no sparse form.
        ArgumentError: an argument is out of range, or `outtype` does not reach a weight; or
            `tied_head` is asked for, and the head is not the embedding.
    """
    checkpoint = Checkpoint(model)
    act = _sparse_act(checkpoint.config, hidden_act)
    planned, predictors = plan(
        checkpoint,
        sparse=True,
        predictors=lambda n_layer, n_embd, n_ff: read_predictors(
            predictor, n_layer=n_layer, n_embd=n_embd, n_ff=n_ff
        ),
        n_ctx=n_ctx,
        tied_head=tied_head,
    )
    others: dict[str, Value] = {}
    if predictors is not None and predictors.threshold is not None:
        others["powerinfer.sparse_threshold"] = predictors.threshold
    if act != default_act(planned.architecture, sparse=True):
        others["qinfer.hidden_act"] = act
    source = checkpoint.folder if vocab_dir is None else Path(vocab_dir)
    vocabulary = read_vocabulary_of(source, vocab_type, planned.n_vocab)
    path = checkpoint.folder / f"ggml-model-{outtype}.gguf" if outfile is None else Path(outfile)
    for obstacle in _obstacles(planned, act, outtype):
        logger.warning("%s: %s", path, obstacle)
    write_model(
        path, architecture=planned.architecture, name=checkpoint.folder.resolve().name,
        keys=planned.keys, others=others, vocabulary=vocabulary, tensors=planned.tensors,
        outtype=outtype.upper(), powerinfer=True, threads=threads, progress=progress,
    )  # fmt: skip
    return path


def _sparse_act(config: Config, override: str | None) -> str:
    """The activation, which has to be one that leaves neurons out."""
    architecture = architecture_of(config, SPARSE_MODEL_TYPES)
    act = hidden_act(config, architecture, override)
    if not is_sparse(act):
        raise UnsupportedError(
            f"{config.path}: the activation is {act}, which is hardly ever zero, so that no neuron "
            "can be left out; supported are relu and fatrelu, as ReLULLaMA, ProSparse, Bamboo, "
            "ReLUFalcon and OPT have it (--hidden-act, where config.json does not say so); for "
            "this model there is python -m qinfer.tools.convert_dense"
        )
    if act == "relu_relu" and architecture in ("falcon", "opt"):
        raise UnsupportedError(f"{config.path}: relu_relu needs a gate, {architecture} has none")
    return act


def _obstacles(planned: Plan, act: str, outtype: OutType) -> list[str]:
    """What keeps PowerInfer itself, which qinfer goes beyond, from running a file as meant."""
    arch = planned.architecture
    names = {tensor.name: tensor for tensor in planned.tensors}
    found = []
    if outtype != "f16":
        found.append(f"PowerInfer computes {outtype} wrongly; it is for qinfer")
    if act != default_act(arch, sparse=True):
        found.append(f"PowerInfer will apply {default_act(arch, sparse=True)} instead of {act}")
    if arch != "opt" and "output.weight" not in names:
        found.append("PowerInfer will refuse the file for want of output.weight")
    extra = [name for name in names if name == "rope_freqs.weight"]
    if arch == "opt":
        extra += [name for name in names if name == "output.weight"]
        n_positions = names["position_embd.weight"].shape[0]
        if n_positions != _OPT_POSITIONS:
            found.append(
                f"PowerInfer will refuse position_embd.weight, of {n_positions} rows instead of "
                f"{_OPT_POSITIONS}"
            )
    elif arch in ("llama", "bamboo"):
        extra += [name for name in names if name.endswith(".bias")]
        if "attention.key_length" in planned.keys:
            found.append("PowerInfer will refuse attn_q.weight: its heads are n_embd / n_head wide")
    if extra:
        found.append(f"PowerInfer will refuse the file for {extra[0]}, which it does not know")
    if "attention.sliding_window" in planned.keys:
        found.append("PowerInfer will not apply the sliding window")
    return found


# ---- command line ----


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@click.argument("predictor", required=False)
@shared_options("f16", ["f32", "f16", "q8_0"])
@click.option(
    "--tied-head", is_flag=True, help="Write a tied head once only. PowerInfer needs the copy."
)
def command(
    model: str,
    predictor: str | None,
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
    tied_head: bool,
) -> None:
    """Convert a checkpoint and its activation predictors to a PowerInfer file.

    MODEL is a folder with config.json, safetensors or pytorch_model.bin, and a tokenizer: a llama,
    bamboo, falcon or opt with a ReLU. PREDICTOR is a folder of model_0.pt, model_1.pt, …

    Example: python -m qinfer.tools.convert ReluLLaMA-7B ReluLLaMA-7B-Predictor --outfile relu.gguf
    """
    if did_something_else(
        model, dump=dump, dump_single=dump_single, vocab_only=vocab_only, bigendian=bigendian,
        outfile=outfile, vocab_dir=vocab_dir, vocab_type=vocab_type, n_ctx=n_ctx,
    ):  # fmt: skip
        return
    if predictor is None:
        raise click.UsageError(
            "name the folder of predictors; without any, use python -m qinfer.tools.convert_dense"
        )
    converting(
        lambda progress: convert(
            model, predictor, outfile,
            outtype=outtype or "f16", vocab_dir=vocab_dir, vocab_type=vocab_type, n_ctx=n_ctx,
            hidden_act=hidden_act, tied_head=tied_head, threads=threads, progress=progress,
        )
    )  # fmt: skip


if __name__ == "__main__":
    from .._program import run

    run(command, "python -m qinfer.tools.convert")
