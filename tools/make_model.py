"""Writes synthetic GGUF models for measuring speed: any architecture, shape and weight type.

Weights are random block bytes with scales chosen so that all layers together add about unit
variance, which keeps logits of ordinary size at any depth. The vocabulary is a SentencePiece one
of made-up words, complete enough for every engine to load.

With --sparse it writes a PowerInfer file whose tokens activate a share of the neurons, few of them
always and most of them rarely; its predictors say which. --dense-twin writes the same weights as
an ordinary file (only ffn_down, stored the other way, has random weights of its own).

\b
    python tools/make_model.py llama-1.1b.q4_0.gguf --arch llama --n-embd 2048 --n-ff 8192 \\
        --n-layer 16 --n-head 16 --n-vocab 32000 --type q4_0
    python tools/make_model.py sparse-1.3b.q4_0.gguf --sparse --active 0.1 --n-pred 512
"""

from __future__ import annotations

import itertools
import math
import string
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import sparse_weights
from sparse_weights import Sparsity

from qinfer import QInferError
from qinfer._gguf import Writer
from qinfer._types import encode

ARCHITECTURES = ("llama", "qwen2", "falcon", "opt", "bamboo")
SPARSE_ARCHITECTURES = ("llama", "falcon", "opt", "bamboo")

PIECE_WEIGHTS = 1 << 24  # weights made at a time

# GGUF's type number, general.file_type
TYPES = {
    "f32": (0, 0),
    "f16": (1, 1),
    "bf16": (30, 32),
    "q8_0": (8, 7),
    "q4_0": (2, 2),
    "q4_1": (3, 3),
    "q5_0": (6, 8),
    "q5_1": (7, 9),
    "q2_k": (10, 10),
    "q3_k": (11, 12),
    "q4_k": (12, 15),
    "q5_k": (13, 17),
    "q6_k": (14, 18),
}


@dataclass(frozen=True)
class Blocks:
    """How to fill blocks of one tensor type with random bytes."""

    size: int  # elements per block
    n_bytes: int  # per block
    scale_at: int  # byte offset of the f16 scale d
    unit_std: float  # standard deviation of a weight at d = 1 under uniformly random codes
    min_at: int = -1  # byte offset of the f16 minimum, -1 when there is none
    min_ratio: float = 0.0  # minimum / d that gives weights mean zero


# unit_std: sqrt(E[s²]E[q²] + r²E[m²] - 2rE[s]E[q]E[m]) over uniform codes q, sub-scales s,
# sub-minima m, and r = min_ratio.
BLOCKS = {
    "q8_0": Blocks(32, 34, 0, 73.61),
    "q4_0": Blocks(32, 18, 0, 4.637),
    "q4_1": Blocks(32, 20, 0, 4.610, 2, -7.5),
    "q5_0": Blocks(32, 22, 0, 9.247),
    "q5_1": Blocks(32, 24, 0, 9.233, 2, -15.5),
    "q2_k": Blocks(256, 84, 80, 13.87, 82, 1.5),
    "q3_k": Blocks(256, 110, 108, 43.34),
    "q4_k": Blocks(256, 144, 0, 258.3, 2, 7.5),
    "q5_k": Blocks(256, 176, 0, 526.9, 2, 15.5),
    "q6_k": Blocks(256, 210, 208, 1365.7),
}


def random_rows(
    rng: np.random.Generator, type_name: str, n_rows: int, n_cols: int, std: float
) -> npt.NDArray[np.uint8]:
    """Random weights of mean 0 and the given standard deviation, shape (n_rows, bytes per row)."""
    if type_name not in BLOCKS:
        return _random_floats(rng, type_name, n_rows, n_cols, std)
    blocks = BLOCKS[type_name]
    n_blocks = n_rows * n_cols // blocks.size
    data = _random_bytes(rng, n_blocks * blocks.n_bytes).reshape(n_blocks, blocks.n_bytes)
    if type_name == "q8_0":  # encoders never write -128
        codes = data[:, 2:].view(np.int8)
        np.maximum(codes, -127, out=codes)
    # Signs alternate at random because codes such as -8..7 have a mean, which layers would amplify.
    d = rng.choice(np.array([-1.0, 1.0], np.float32), n_blocks) * np.float32(std / blocks.unit_std)
    _put_f16(data, blocks.scale_at, d)
    if blocks.min_at >= 0:
        _put_f16(data, blocks.min_at, d * np.float32(blocks.min_ratio))
    return data.reshape(n_rows, -1)


def _random_bytes(rng: np.random.Generator, n: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 2**64, -(-n // 8), np.uint64, endpoint=False).view(np.uint8)[:n]


def _put_f16(blocks: npt.NDArray[np.uint8], offset: int, values: npt.NDArray[np.floating]) -> None:
    blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _random_floats(
    rng: np.random.Generator, type_name: str, n_rows: int, n_cols: int, std: float
) -> npt.NDArray[np.uint8]:
    # Drawing from 65536 normal values is ten times as fast as drawing normal values.
    normal = rng.standard_normal(65536, np.float32) * np.float32(std)
    table: npt.NDArray[Any] = normal
    if type_name == "bf16":
        table = (normal.view(np.uint32) >> 16).astype("<u2")
    elif type_name == "f16":
        table = normal.astype("<f2")
    picks = _random_bytes(rng, 2 * n_rows * n_cols).view(np.uint16)
    return table[picks].view(np.uint8).reshape(n_rows, -1)


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a model, with the names used everywhere."""

    arch: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    tied_head: bool
    sparsity: Sparsity | None = None

    @property
    def neuron_major(self) -> bool:
        """Whether the file is PowerInfer's: down matrices by neuron, predictors beside them."""
        return self.sparsity is not None and not self.sparsity.dense_twin

    @property
    def n_embd_kv(self) -> int:
        """Width of keys and values."""
        return self.n_embd // self.n_head * self.n_head_kv


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: random with a standard deviation, or constant and F32."""

    name: str
    shape: tuple[int, ...]  # rows first, as in NumPy
    std: float = 0.0
    constant: float | None = None
    first_rows: npt.NDArray[np.float32] | None = None  # chosen instead of random
    first_columns: npt.NDArray[np.float32] | None = None


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of one tensor, whichever others the file has."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


def tensors(shape: Shape, seed: int = 0) -> Iterator[Tensor]:
    """All tensors of a model in file order."""
    n_embd = shape.n_embd
    head_std = 2.0 / math.sqrt(n_embd)
    # A tied head must give logits of the size an untied one does, by small embeddings, or where
    # those tell neurons what to do, by a small norm.
    embd_std = head_std if shape.tied_head and not shape.sparsity else 1.0
    norm_weight = head_std if shape.tied_head and shape.sparsity else 1.0
    embeddings = [Tensor("token_embd.weight", (shape.n_vocab, n_embd), embd_std)]
    if shape.arch == "opt":  # two rows come before position 0
        embeddings += [Tensor("position_embd.weight", (shape.n_ctx + 2, n_embd), embd_std)]
    yield from sparse_embeddings(embeddings, seed) if shape.sparsity else embeddings
    for layer in range(shape.n_layer):
        specs = layer_tensors(shape)
        if shape.sparsity:
            specs = sparse_layer(specs, shape, shape.sparsity, generator(seed, f"neurons {layer}"))
        for spec in specs:
            yield replace(spec, name=f"blk.{layer}.{spec.name}")
    yield from norm("output_norm", shape, norm_weight)
    if not shape.tied_head:
        yield Tensor("output.weight", (shape.n_vocab, n_embd), head_std)


def norm(name: str, shape: Shape, weight: float = 1.0) -> Iterator[Tensor]:
    """Weight of a normalisation, and its bias where the architecture has one."""
    yield Tensor(f"{name}.weight", (shape.n_embd,), constant=weight)
    if shape.arch in ("falcon", "opt"):
        yield Tensor(f"{name}.bias", (shape.n_embd,), constant=0.0)


def layer_tensors(shape: Shape) -> Iterator[Tensor]:
    """Tensors of one layer, named without the layer's prefix."""
    n_embd, n_embd_kv, n_ff = shape.n_embd, shape.n_embd_kv, shape.n_ff
    into_residual = 1.0 / math.sqrt(2 * shape.n_layer)
    biases = ["attn_q", "attn_k", "attn_v"] if shape.arch in ("qwen2", "opt") else []
    if shape.arch == "opt":
        biases += ["attn_output", "ffn_up", "ffn_down"]

    def matrix(name: str, n_rows: int, n_cols: int, gain: float = 1.0) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (n_rows, n_cols), gain / math.sqrt(n_cols))
        if name in biases:
            yield Tensor(f"{name}.bias", (n_rows,), constant=0.0)

    yield from norm("attn_norm", shape)
    if shape.arch == "falcon":
        if shape.n_head_kv > 1:  # the 40B layout
            yield from norm("attn_norm_2", shape)
        yield from matrix("attn_qkv", n_embd + 2 * n_embd_kv, n_embd)
    else:
        yield from matrix("attn_q", n_embd, n_embd)
        yield from matrix("attn_k", n_embd_kv, n_embd)
        yield from matrix("attn_v", n_embd_kv, n_embd)
    yield from matrix("attn_output", n_embd, n_embd, into_residual)
    if shape.arch != "falcon":
        yield from norm("ffn_norm", shape)
    if shape.arch not in ("falcon", "opt"):
        yield from matrix("ffn_gate", n_ff, n_embd)
    yield from matrix("ffn_up", n_ff, n_embd)
    yield from matrix("ffn_down", n_embd, n_ff, into_residual)


def sparse_embeddings(specs: list[Tensor], seed: int) -> Iterator[Tensor]:
    """Embeddings that carry the tokens' codes, and nothing of the position in their place."""
    for spec in specs:
        columns = np.zeros((spec.shape[0], sparse_weights.N_COLUMNS), np.float32)
        if spec.name == "token_embd.weight":
            codes = sparse_weights.token_codes(generator(seed, "codes"), spec.shape[0])
            columns = sparse_weights.embedding_columns(codes)
        yield replace(spec, first_columns=columns)


def sparse_layer(
    specs: Iterator[Tensor], shape: Shape, how: Sparsity, rng: np.random.Generator
) -> Iterator[Tensor]:
    """The tensors of a layer whose neurons heed the tokens' codes and leave them alone."""
    n_embd, n_ff = shape.n_embd, shape.n_ff
    columns = sparse_weights.neuron_columns(sparse_weights.neuron_wishes(rng, n_ff, how.active))
    has_gate = shape.arch in ("llama", "bamboo")
    heeding = ["ffn_gate.weight"] if has_gate else ["ffn_up.weight"]
    if shape.arch == "bamboo":  # ReLU of both
        heeding.append("ffn_up.weight")
    down_std = 1.0 / math.sqrt(2 * shape.n_layer * how.active * n_ff)
    for spec in specs:
        if spec.name in heeding:
            yield replace(spec, std=sparse_weights.NOISE / math.sqrt(n_embd), first_columns=columns)
        elif spec.name == "attn_output.weight":
            yield replace(spec, first_rows=np.zeros((sparse_weights.N_COLUMNS, n_embd), np.float32))
        elif spec.name == "ffn_down.weight" and how.dense_twin:
            no_rows = np.zeros((sparse_weights.N_COLUMNS, n_ff), np.float32)
            yield replace(spec, std=down_std, first_rows=no_rows)
        elif spec.name == "ffn_down.weight":
            name = "ffn_down_t.weight"
            yield Tensor(name, (n_ff, n_embd), down_std, first_columns=np.zeros_like(columns))
        elif spec.name == "ffn_down.bias" and not how.dense_twin:
            yield replace(spec, name="ffn_down_t.bias")
        else:
            yield spec
    if not how.dense_twin:
        rows, n_pred = sparse_weights.predictor_rows(n_embd), how.n_pred
        yield Tensor("fc1.weight", (n_pred, n_embd), 1.0 / math.sqrt(n_embd), first_rows=rows)
        noise = sparse_weights.NOISE / math.sqrt(n_pred)
        yield Tensor("fc2.weight", (n_ff, n_pred), noise, first_columns=columns)


def metadata(shape: Shape, type_name: str) -> dict[str, Any]:
    """What engines need to know about the model, without the vocabulary."""
    sizes = {
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "vocab_size": shape.n_vocab,
    }
    if shape.arch in ("falcon", "opt"):
        facts: dict[str, Any] = {"attention.layer_norm_epsilon": 1e-5}
    else:
        facts = {"attention.layer_norm_rms_epsilon": 1e-5}
    if shape.arch != "opt":
        facts |= {
            "rope.dimension_count": shape.n_embd // shape.n_head,
            "rope.freq_base": 10000.0,
        }
    general = {
        "general.architecture": shape.arch,
        "general.name": f"synthetic {shape.arch} {type_name}",
        "general.file_type": TYPES[type_name][1],
    }
    if shape.neuron_major:
        general["powerinfer.sparse_threshold"] = 0.0
    elif shape.sparsity:
        general["qinfer.hidden_act"] = "relu_relu" if shape.arch == "bamboo" else "relu"
    return general | {f"{shape.arch}.{key}": value for key, value in (sizes | facts).items()}


def vocabulary(n_vocab: int) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary with byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    if n_vocab < len(pieces):
        raise click.ClickException(f"--n-vocab is {n_vocab}, expected {len(pieces)} or more")
    singles = [chr(code) for code in range(33, 127)]
    spaced = ["▁" + letter for letter in string.ascii_lowercase]
    words = (
        space + "".join(letters)
        for n in itertools.count(2)
        for space in ("", "▁")
        for letters in itertools.product(string.ascii_lowercase, repeat=n)
    )
    n_words = n_vocab - len(pieces)
    pieces += itertools.islice(itertools.chain(singles, spaced, words), n_words)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(n_vocab)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (n_words + 1),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def make_model(path: Path, shape: Shape, type_name: str, seed: int = 0) -> None:
    """Writes one model; the file appears under its name only when complete."""
    specs = list(tensors(shape, seed))
    with Writer(path, powerinfer=shape.neuron_major) as writer:
        for key, value in (metadata(shape, type_name) | vocabulary(shape.n_vocab)).items():
            writer.add(key, value, "i32" if key == "tokenizer.ggml.token_type" else None)
        for spec in specs:
            writer.add_tensor(
                spec.name, spec.shape, "F32" if spec.constant is not None else type_name.upper()
            )
        with click.progressbar(specs, label=path.name, file=sys.stderr) as bar:
            for spec in bar:
                for piece in tensor_data(generator(seed, spec.name), spec, type_name):
                    writer.write(piece)


def tensor_data(
    rng: np.random.Generator, spec: Tensor, type_name: str
) -> Iterator[npt.NDArray[Any]]:
    """A tensor's bytes, in pieces of whole rows that take little memory."""
    if spec.constant is not None:
        yield np.full(spec.shape, spec.constant, np.float32)
        return
    n_rows, n_cols = spec.shape
    step = max(sparse_weights.N_COLUMNS, PIECE_WEIGHTS // n_cols)
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        data = random_rows(rng, type_name, end - begin, n_cols, spec.std)
        if spec.first_columns is not None:
            put_columns(rng, data, spec.first_columns[begin:end], type_name, spec.std)
        if spec.first_rows is not None and begin == 0:
            data[: len(spec.first_rows)] = encode(spec.first_rows, type_name)
        yield data


def put_columns(
    rng: np.random.Generator,
    data: npt.NDArray[np.uint8],
    columns: npt.NDArray[np.float32],
    type_name: str,
    std: float,
) -> None:
    """Writes the first columns of rows, whose first block may hold random weights behind them."""
    width = columns.shape[1]
    if type_name in BLOCKS:
        width = max(width, BLOCKS[type_name].size)
    values = rng.standard_normal((len(columns), width), np.float32) * np.float32(std)
    values[:, : columns.shape[1]] = columns
    blocks = encode(values, type_name)
    data[:, : blocks.shape[1]] = blocks


def check_sparse(shape: Shape, how: Sparsity) -> None:
    """Refuses what cannot be made sparse."""
    if shape.arch not in SPARSE_ARCHITECTURES:
        names = ", ".join(SPARSE_ARCHITECTURES)
        raise click.ClickException(f"--arch is {shape.arch}, sparse models are {names}")
    if not sparse_weights.MIN_ACTIVE <= how.active <= 1.0:
        raise click.ClickException(f"--active is {how.active}, expected 0.01 to 1")
    if min(shape.n_embd, how.n_pred) < 2 * sparse_weights.N_COLUMNS:
        raise click.ClickException("--n-embd and --n-pred must be 64 or more")


@click.command(help=__doc__)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--arch", type=click.Choice(ARCHITECTURES), default="llama", show_default=True)
@click.option("--n-embd", type=int, default=2048, show_default=True)
@click.option("--n-ff", type=int, default=8192, show_default=True)
@click.option("--n-layer", type=int, default=16, show_default=True)
@click.option("--n-head", type=int, default=16, show_default=True)
@click.option("--n-head-kv", type=int, help="Key and value heads.  [default: --n-head]")
@click.option("--n-vocab", type=int, default=32000, show_default=True)
@click.option("--n-ctx", type=int, default=4096, show_default=True, help="Trained context.")
@click.option("--tied-head", is_flag=True, help="The head is token_embd (always so for opt).")
@click.option(
    "--type", "type_name", type=click.Choice(list(TYPES), False), default="q4_0", show_default=True
)
@click.option("--sparse", is_flag=True, help="A PowerInfer file with predictors.")
@click.option("--dense-twin", is_flag=True, help="The same without them, as an ordinary file.")
@click.option("--active", default=0.1, show_default=True, help="Share of active neurons.")
@click.option("--n-pred", type=int, default=512, show_default=True, help="Predictors' rank.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out: Path,
    n_head_kv: int | None,
    tied_head: bool,
    type_name: str,
    sparse: bool,
    dense_twin: bool,
    active: float,
    n_pred: int,
    seed: int,
    **sizes: Any,
) -> None:
    """Command line of make_model."""
    tied = tied_head or sizes["arch"] == "opt"
    how = Sparsity(active, n_pred, dense_twin) if sparse or dense_twin else None
    shape = Shape(n_head_kv=n_head_kv or sizes["n_head"], tied_head=tied, sparsity=how, **sizes)
    if shape.n_embd % shape.n_head or shape.n_head % shape.n_head_kv:
        raise click.ClickException("--n-embd must divide by --n-head, and that by --n-head-kv")
    if how:
        check_sparse(shape, how)
    try:
        make_model(out, shape, type_name, seed)
    except QInferError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
