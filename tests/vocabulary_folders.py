"""Folders with the tokenizers of checkpoints, made by tests, and what is read from them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

import vocabularies as made
from qinfer import Tokenizer
from qinfer._gguf import Writer
from qinfer.tools._vocabulary import Vocabulary

SPACE = "▁"
TEXTS = made.llama_cpp()["texts"]


def keys(vocabulary: Vocabulary) -> dict[str, Any]:
    """The metadata without the prefix that most keys share."""
    assert len({key for key, _, _ in vocabulary.metadata}) == len(vocabulary.metadata)
    return {key.removeprefix("tokenizer.ggml."): value for key, value, _ in vocabulary.metadata}


def written(vocabulary: Vocabulary, folder: Path) -> Tokenizer:
    """The tokenizer of a vocabulary-only file with these keys."""
    path = folder / "written.gguf"
    with Writer(path) as writer:
        writer.add("general.architecture", "llama")
        for key, value, kind in vocabulary.metadata:
            writer.add(key, value, kind)
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.n_vocab == vocabulary.n_tokens
    return tokenizer


def put(folder: Path, **files: Any) -> Path:
    """Writes files by their names without ending: bytes, text, or what becomes JSON."""
    endings = {bytes: ".model", str: ".txt"}
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        path = folder / (name + endings.get(type(content), ".json"))
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8", newline="")
    return folder


def spm_model(**options: Any) -> bytes:
    """A sentencepiece model trained on the spot, of 450 pieces."""
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 450,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in TEXTS for text in text.split("\n") if text.strip()),
        model_writer=model,
        **defaults | options,
    )
    return model.getvalue()


@cache
def small_spm() -> bytes:
    """The model with no options."""
    return spm_model()


@cache
def small_processor() -> Any:
    """sentencepiece itself on that model."""
    return sentencepiece.SentencePieceProcessor(model_proto=small_spm())


def template(*before: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
    """A post-processor that puts special tokens beside a text; their ids are made up."""

    def special(text: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*map(special, before), sequence, *map(special, after)],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            text: {"id": text, "ids": [1], "tokens": [text]} for text in (*before, *after)
        },
    }


def spm_json(tokens: list[str], scores: list[float], **changes: Any) -> dict[str, Any]:
    """A tokenizer.json as converters make one: all pairs of pieces, the best score first."""
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    merges = [
        (-scores[token_id], len(text[:cut]), [text[:cut], text[cut:]])
        for text, token_id in ids.items()
        if token_id >= 259
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    merges.sort(key=lambda item: item[0])
    special = [
        {"id": i, "content": tokens[i], "special": True, "normalized": False, "lstrip": False}
        | {"rstrip": False, "single_word": False}
        for i in range(3)
    ]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": template("<s>"),
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [pair for _, _, pair in merges],
        },
    } | changes


@cache
def stories_json() -> dict[str, Any]:
    """That of stories260K."""
    metadata = made.metadata_of(made.STORIES)
    return spm_json(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"])


SMALL_VOCAB = {"a": 0, "b": 1, "c": 2, "d": 3, "Ġ": 4, "ab": 5, "abc": 6}
SMALL_MERGES = ["a b", "ab c"]


MODEL_KEYS = (
    *("type", "vocab", "merges", "ignore_merges", "continuing_subword_prefix"),
    "end_of_word_suffix",
)


def small_json(**changes: Any) -> dict[str, Any]:
    """A small byte-level tokenizer.json; changes of the model and of the rest by their keys."""
    model = {"type": "BPE", "vocab": SMALL_VOCAB, "merges": SMALL_MERGES}
    content: dict[str, Any] = {
        "added_tokens": [{"id": 7, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": model | {key: changes.pop(key) for key in [*changes] if key in MODEL_KEYS},
    }
    return content | changes
