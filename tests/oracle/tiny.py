"""Random tiny checkpoints: every architecture, any tensor type, odd shapes, as GGUF files."""

from __future__ import annotations

import string
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np

from .checkpoint import Array, Quantised, write_gguf

GPT2_PRE = {"qwen2": "qwen2", "falcon": "falcon", "opt": "gpt-2"}


def tiny_shape(arch: str, type_name: str = "f32", **sizes: Any) -> make_model.Shape:
    """A shape small enough for the oracle, with nothing a multiple of 64 that need not be one."""
    if type_name.endswith("_k"):
        defaults = {"n_embd": 256, "n_ff": 768, "n_head": 8}
    elif type_name in make_model.BLOCKS:
        defaults = {"n_embd": 96, "n_ff": 160, "n_head": 6}
    else:
        defaults = {"n_embd": 60, "n_ff": 101, "n_head": 6}
    defaults |= {"n_layer": 3, "n_head_kv": 2, "n_vocab": 301, "n_ctx": 256}
    return make_model.Shape(arch, **(defaults | {"tied_head": arch == "opt"} | sizes))


def write_tiny(
    path: Path,
    shape: make_model.Shape,
    type_name: str = "f32",
    *,
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, Array] | None = None,
    by_neuron: bool = False,
    rank: int = 0,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint whose norms and biases are random too; `extra` adds metadata.

    `by_neuron` stores the down projection as PowerInfer does; `rank` adds random predictors.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array | Quantised] = dict(extra_tensors or {})
    specs = list(make_model.tensors(shape))
    if by_neuron:
        specs = [_by_neuron(spec) for spec in specs]
    if rank:
        specs += _predictors(shape, rank)
    for spec in specs:
        if spec.constant is not None:
            tensors[spec.name] = spec.constant + 0.3 * rng.standard_normal(spec.shape)
        else:
            n_rows, n_cols = spec.shape
            blocks = make_model.random_rows(rng, type_name, n_rows, n_cols, spec.std)
            number = make_model.TYPES[type_name][0]
            tensors[spec.name] = Quantised(gguf.GGMLQuantizationType(number), blocks)
    if shape.arch in GPT2_PRE:
        words = gpt2_vocabulary(shape.n_vocab, GPT2_PRE[shape.arch])
    else:
        words = make_model.vocabulary(shape.n_vocab)
    metadata = make_model.metadata(shape, type_name) | words | (extra or {})
    return write_gguf(path, metadata, tensors)


def _by_neuron(spec: make_model.Tensor) -> make_model.Tensor:
    """`ffn_down` as `ffn_down_t`, a row per neuron."""
    name = spec.name.replace(".ffn_down.", ".ffn_down_t.")
    return replace(spec, name=name, shape=spec.shape if name == spec.name else spec.shape[::-1])


def _predictors(shape: make_model.Shape, rank: int) -> list[make_model.Tensor]:
    return [
        make_model.Tensor(f"blk.{layer}.{name}.weight", dims, 1.0)
        for layer in range(shape.n_layer)
        for name, dims in (("fc1", (rank, shape.n_embd)), ("fc2", (shape.n_ff, rank)))
    ]


def as_powerinfer(path: Path) -> Path:
    """Gives a file the magic of PowerInfer's."""
    with path.open("r+b") as file:
        file.write(b"PWRI")
    return path


def gpt2_vocabulary(n_vocab: int, pre: str) -> dict[str, Any]:
    """Metadata of a byte-level BPE vocabulary: all bytes, an end token, and pairs of letters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [symbols[byte] for byte in range(256)]
    pairs = list(product(string.ascii_lowercase, repeat=2))[: n_vocab - 257]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *(a + b for a, b in pairs), "<|endoftext|>"],
        "tokenizer.ggml.token_type": [1] * (n_vocab - 1) + [3],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.bos_token_id": n_vocab - 1,
        "tokenizer.ggml.eos_token_id": n_vocab - 1,
    }
