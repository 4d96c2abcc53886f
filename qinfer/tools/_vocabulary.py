"""The vocabulary of a Hugging Face checkpoint, as the keys that a GGUF file has for it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Literal

from .._files import StrPath
from .._tokenize.vocabulary import TokenType, byte_value
from .._tokenize.vocabulary import read_vocabulary as read_metadata
from ..errors import ArgumentError, FileError, FormatError
from ._vocabulary_added import ADDED_SCORE, AddedToken, add_tokens, read_added_tokens
from ._vocabulary_bpe import is_byte_level, read_bpe_files, read_bpe_json
from ._vocabulary_files import Folder, Pieces
from ._vocabulary_special import ROLES, SpecialTokens, config_ids
from ._vocabulary_spm import read_spm_json, read_spm_model

logger = logging.getLogger("qinfer")

Kind = Literal["auto", "spm", "bpe"]
_Metadata = list[tuple[str, object, str | None]]

# What readers take to be "no such token"; for SPM they would otherwise suppose ids 1, 2 and 0.
_NO_TOKEN = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary ready to be written.

    Attributes:
        model: "llama" (SPM) or "gpt2" (byte-level BPE).
        n_tokens: how many tokens there are, padding included.
        metadata: key, value and type, as `Writer.add` takes them.
    """

    model: str
    n_tokens: int
    metadata: tuple[tuple[str, object, str | None], ...]


def read_vocabulary(
    folder: StrPath, *, kind: Kind = "auto", n_vocab: int | None = None
) -> Vocabulary:
    """Reads the tokenizer of a checkpoint.

    The pieces come from the first that is there of tokenizer.model, tokenizer.json, and vocab.json
    with merges.txt. tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json
    and generation_config.json add what they say. What GGUF cannot express is logged.

    Args:
        folder: holds the files.
        kind: "spm" passes over vocab.json, "bpe" over tokenizer.model; "auto" takes what there is.
        n_vocab: rows of the model's embeddings; unused tokens fill up a smaller vocabulary.

    Raises:
        FileError: no such files are there, or one cannot be read.
        FormatError: a file is broken or contradicts another; the message names file and key.
        UnsupportedError: the tokenizer is of a kind that GGUF or this runtime does not have.
        ArgumentError: `kind` is not one of the three or not what the files hold, or `n_vocab` is
            not positive.
    """
    if kind not in ("auto", "spm", "bpe"):
        raise ArgumentError(f"kind is {kind!r}; it is 'auto', 'spm' or 'bpe'")
    if n_vocab is not None and n_vocab <= 0:
        raise ArgumentError(f"n_vocab is {n_vocab}, not a positive number of tokens")
    files = Folder(folder)
    pieces = _pieces(files, kind)
    special = SpecialTokens(files)
    added = read_added_tokens(files, special.texts)
    add_tokens(pieces, added)
    ids = _ids(pieces)
    special.mark(pieces, ids)
    n_tokens = _fill(files, pieces, added, n_vocab)
    if pieces.model == "llama":
        _check_bytes(pieces)
    metadata = [
        *_tokens(pieces, n_tokens),
        *_special(files, pieces, special, ids),
        *_chat_templates(files),
    ]
    _compare_ends(files, pieces, metadata)
    return Vocabulary(pieces.model, n_tokens, tuple(metadata))


def _compare_ends(files: Folder, pieces: Pieces, metadata: _Metadata) -> None:
    """Says which tokens end an answer for the model, but not for a reader of these keys."""
    values = {key: value for key, value, _ in metadata}
    known = read_metadata(values, None, str(files.path)).eog_ids
    for name in ("config.json", "generation_config.json"):
        ends = config_ids(files.json(name), "eos_token_id", len(pieces.texts))
        if others := [pieces.texts[token_id] for token_id in ends if token_id not in known]:
            logger.warning(
                "%s: answers also end at %s, which GGUF cannot express",
                *(files.path / name, ", ".join(map(repr, others))),
            )


def _pieces(files: Folder, kind: Kind) -> Pieces:
    """The tokens of the first source that is there."""
    if kind != "bpe" and files.has("tokenizer.model"):
        return read_spm_model(files)
    if files.has("tokenizer.json"):
        byte_level = is_byte_level(files.json("tokenizer.json"))
        if kind == ("spm" if byte_level else "bpe"):
            raise ArgumentError(
                f"kind is {kind!r}, but {files.path / 'tokenizer.json'} is "
                + ("a byte-level BPE" if byte_level else "not a byte-level BPE")
            )
        return read_bpe_json(files) if byte_level else read_spm_json(files)
    parts = ("vocab.json", "merges.txt")
    here = [name for name in parts if files.has(name)]
    if kind != "spm" and len(here) == 2:
        return read_bpe_files(files)
    wanted = {
        "spm": "tokenizer.model or tokenizer.json",
        "bpe": "tokenizer.json, or vocab.json and merges.txt",
        "auto": "tokenizer.model, tokenizer.json, or vocab.json and merges.txt",
    }[kind]
    alone = f"; of the last two only {here[0]} is there" if kind != "spm" and here else ""
    raise FileError(f"{files.path}: has no tokenizer: looked for {wanted}{alone}")


def _ids(pieces: Pieces) -> dict[str, int]:
    """Ids by text; checks that each text is one, is there once, and can be written."""
    ids: dict[str, int] = {}
    for token_id, text in pieces.texts.items():
        if not text:
            raise FormatError(f"{pieces.source}: token {token_id} has an empty text")
        if ids.setdefault(text, token_id) != token_id:
            raise FormatError(
                f"{pieces.source}: {text!r:.80} is there twice, as token {ids[text]} and as "
                f"token {token_id}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise FormatError(
                f"{pieces.source}: token {token_id} is {text!r:.80}, with half a surrogate pair"
            ) from None
    return ids


def _fill(files: Folder, pieces: Pieces, added: dict[int, AddedToken], n_vocab: int | None) -> int:
    """Puts unused tokens where an id has none, up to n_vocab; the number of tokens."""
    highest = max(pieces.texts, default=-1)
    if highest < 0:
        raise FormatError(f"{pieces.source}: the vocabulary has no tokens")
    if n_vocab is None and highest >= 2 * len(pieces.texts):
        raise FormatError(
            f"{pieces.source}: {pieces.texts[highest]!r:.80} has id {highest}, "
            f"which is out of range for {len(pieces.texts)} tokens"
        )
    n_tokens = highest + 1
    if n_vocab is not None and n_vocab < n_tokens:
        source = added[highest].source if highest in added else pieces.source
        raise FormatError(
            f"{files.path}: the tokenizer has {n_tokens} tokens, but the model only {n_vocab}: "
            f"{pieces.texts[highest]!r:.80} is token {highest} in {source}"
        )
    n_tokens = n_vocab or n_tokens
    texts = set(pieces.texts.values())
    for token_id in range(n_tokens):
        if token_id in pieces.texts:
            continue
        text = f"[PAD{token_id}]"
        if text in texts:
            raise FormatError(
                f"{pieces.source}: token {token_id} is missing, and {text!r}, which would fill its "
                "place, is the text of another token"
            )
        pieces.texts[token_id] = text
        pieces.types[token_id] = TokenType.UNUSED
        pieces.scores[token_id] = ADDED_SCORE
    return n_tokens


def _check_bytes(pieces: Pieces) -> None:
    """All 256 bytes need tokens, or none has one."""
    found = {
        byte_value(pieces.texts[token_id])
        for token_id, kind in pieces.types.items()
        if kind == TokenType.BYTE
    }
    missing = set(range(256)) - found if found else set()
    if missing or None in found:
        raise FormatError(
            f"{pieces.source}: has byte tokens, but "
            + (f"none for <0x{min(missing):02X}>" if missing else "one is not named <0xNN>")
        )
    if not found:
        logger.warning(
            "%s: has no byte tokens: PowerInfer, which needs <0x0A>, cannot load the file",
            pieces.source,
        )


def _tokens(pieces: Pieces, n_tokens: int) -> _Metadata:
    """The keys about each token."""
    order = range(n_tokens)
    metadata: _Metadata = [
        ("tokenizer.ggml.model", pieces.model, "string"),
        ("tokenizer.ggml.pre", pieces.pre, "string"),
        ("tokenizer.ggml.tokens", [pieces.texts[i] for i in order], "string"),
    ]
    if pieces.model == "llama":
        metadata.append(("tokenizer.ggml.scores", [pieces.scores[i] for i in order], "f32"))
    types = [int(pieces.types.get(i, TokenType.NORMAL)) for i in order]
    metadata.append(("tokenizer.ggml.token_type", types, "i32"))
    if pieces.model == "gpt2":
        metadata.append(("tokenizer.ggml.merges", pieces.merges, "string"))
    return metadata


def _special(
    files: Folder, pieces: Pieces, special: SpecialTokens, ids: dict[str, int]
) -> _Metadata:
    """The keys about special tokens and about what is put beside a text."""
    metadata: _Metadata = []
    found = special.ids(pieces, ids)
    for role, name in ROLES.items():
        token_id = found.get(role)
        if token_id is None and pieces.model == "llama" and role in ("bos", "eos", "unk"):
            token_id = _NO_TOKEN
        if token_id is not None:
            metadata.append((f"tokenizer.ggml.{name}_token_id", token_id, "u32"))
    for role in ("bos", "eos"):
        adds = special.adds(role, found.get(role), pieces, ids)
        if adds is not None:
            metadata.append((f"tokenizer.ggml.add_{role}_token", adds, "bool"))
    if pieces.model == "llama":
        flag = files.json("tokenizer_config.json").flag("add_prefix_space")
        prefix = pieces.add_space_prefix if flag is None else flag
        metadata.append(("tokenizer.ggml.add_space_prefix", prefix, "bool"))
    return metadata


def _chat_templates(files: Folder) -> _Metadata:
    """The chat template, and others by name where there are some."""
    templates: dict[str, str] = {}
    config = files.json("tokenizer_config.json")
    if isinstance(config.content.get("chat_template"), list):
        for entry in config.sections("chat_template"):
            name, template = entry.string("name"), entry.string("template")
            if name is None or template is None:
                raise entry.error("name" if name is None else "template", "is missing")
            templates[name] = template
    else:
        # Newer checkpoints have it in a file of its own.
        for section in (files.json("chat_template.json"), config):
            if (template := section.string("chat_template")) is not None:
                templates["default"] = template
    if files.has("chat_template.jinja"):
        templates["default"] = files.text("chat_template.jinja")
    default = templates.pop("default", None)
    named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    metadata: _Metadata = []
    if default is not None:
        metadata.append(("tokenizer.chat_template", default, "string"))
    if named:
        metadata.append(("tokenizer.chat_templates", [*named], "string"))
    for name, text in named.items():
        metadata.append((f"tokenizer.chat_template.{name}", text, "string"))
    return metadata
