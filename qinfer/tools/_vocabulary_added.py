"""Tokens that files add to a vocabulary's pieces, and that are read whole where a text has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .._tokenize.spm import SPACE
from .._tokenize.vocabulary import TokenType
from ..errors import FormatError
from ._vocabulary_files import Folder, Pieces, Section, logger

# PowerInfer's score of added SPM tokens.
ADDED_SCORE = -1000.0


@dataclass(frozen=True, slots=True)
class AddedToken:
    """An added token; one that is `special` is no text. `source` is the file that adds it."""

    text: str
    special: bool
    source: str


def read_added_tokens(files: Folder, special: set[str]) -> dict[int, AddedToken]:
    """The added tokens by id; `special` are texts that the configuration calls so.

    Raises FormatError when files, or parts of one, contradict each other.
    """
    added: dict[int, AddedToken] = {}
    ids: dict[str, int] = {}
    for token_id, token in _found(files, special):
        before = added.get(token_id)
        if before is not None and before.text != token.text:
            raise FormatError(
                f"{token.source}: adds {token.text!r:.80} as token {token_id}, which is "
                f"{before.text!r:.80} in {before.source}"
            )
        if ids.setdefault(token.text, token_id) != token_id:
            raise FormatError(
                f"{token.source}: adds {token.text!r:.80} as token {token_id}; "
                f"it is token {ids[token.text]} in {added[ids[token.text]].source}"
            )
        added[token_id] = token
    return added


def add_tokens(pieces: Pieces, added: dict[int, AddedToken]) -> None:
    """Puts tokens among the pieces and sets their types."""
    fixed = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
    for token_id, token in sorted(added.items()):
        before = pieces.texts.get(token_id)
        if before is not None and before != token.text:
            logger.warning(
                "%s: %r takes the place of %r as token %d",
                *(token.source, token.text, before, token_id),
            )
        if before != token.text:
            pieces.texts[token_id] = token.text
            pieces.scores[token_id] = ADDED_SCORE
            pieces.types.pop(token_id, None)
        if pieces.types.get(token_id) not in fixed:
            kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
            pieces.types[token_id] = kind
    if pieces.model == "llama":
        # Such tokens are looked for in the text itself, where spaces are spaces.
        texts = set(pieces.texts.values())
        for token_id, kind in pieces.types.items():
            text = pieces.texts[token_id].replace(SPACE, " ")
            if kind == TokenType.USER_DEFINED and text not in texts:
                pieces.texts[token_id] = text
                texts.add(text)


def _found(files: Folder, special: set[str]) -> Iterator[tuple[int, AddedToken]]:
    """What each file adds; the last that describes a token decides whether it is special."""
    known: dict[str, bool] = {}
    for token_id, section in _described(files):
        text = section.string("content")
        if not text:
            raise section.error("content", "is missing or empty")
        known[text] = bool(section.flag("special"))
        yield token_id, AddedToken(text, known[text], section.source)
    names = files.json("added_tokens.json")
    for token_id, text in names.texts_by_id().items():
        yield token_id, AddedToken(text, known.get(text, text in special), names.source)


def _described(files: Folder) -> Iterator[tuple[int, Section]]:
    """The objects that describe added tokens, with the ids."""
    stripping = {}
    for section in files.json("tokenizer.json").sections("added_tokens"):
        token_id = section.token_id("id")
        if token_id is None:
            raise section.error("id", "is missing")
        stripping[token_id] = section.flag("lstrip") or section.flag("rstrip")
        yield token_id, section
    decoder = files.json("tokenizer_config.json").section("added_tokens_decoder")
    for key in () if decoder is None else decoder.content:
        assert decoder is not None
        described = decoder.section(key)
        if described is None or not re.fullmatch("[0-9]{1,9}", key, re.ASCII):
            raise decoder.error(f"{key!r:.80}", "does not describe a token by its id")
        stripping[int(key)] = described.flag("lstrip") or described.flag("rstrip")
        yield int(key), described
    if n_stripping := sum(map(bool, stripping.values())):
        logger.warning(
            "%s: %d added tokens take the spaces beside them away, which GGUF cannot express",
            *(files.path, n_stripping),
        )
