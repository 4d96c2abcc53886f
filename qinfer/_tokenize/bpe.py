"""Encoder of byte-level BPE vocabularies: `tokenizers`, given the file's tokens and merges."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from ..errors import ArgumentError, FormatError
from .pretokenize import PRE_TOKENIZERS
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import models

logger = logging.getLogger("qinfer")


@cache
def byte_alphabet() -> dict[str, int]:
    """The character for each byte: itself where Latin-1 prints it, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


class BpeEncoder:
    """Splits a text into words, then merges each word's bytes by rank, best first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import tokenizers
        from tokenizers import normalizers, pre_tokenizers

        pre = PRE_TOKENIZERS.get(vocabulary.pre)
        if pre is None:
            logger.warning(
                "%s: unknown pre-tokenizer %r in tokenizer.ggml.pre; using the default, which may "
                "cut words differently from the model's own",
                *(vocabulary.source, vocabulary.pre),
            )
            pre = PRE_TOKENIZERS["default"]
        model = _model(vocabulary, pre.whole_words)
        self._tokenizer = tokenizers.Tokenizer(model)
        if pre.nfc:
            self._tokenizer.normalizer = normalizers.NFC()
        splits = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        present = vocabulary.ids.keys()
        self._missing = frozenset(
            byte for char, byte in byte_alphabet().items() if char not in present
        )
        self._source = vocabulary.source

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens.

        Bytes without a token in the vocabulary, control characters in some, are left out, which is
        logged once. Raises ArgumentError for a run of millions of spaces.
        """
        if self._missing and not self._missing.isdisjoint(text.encode()):
            logger.warning(
                "%s: the vocabulary has no token for the bytes %s; they are left out of the text",
                *(self._source, " ".join(f"{byte:02X}" for byte in sorted(self._missing))),
            )
            self._missing = frozenset()
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            # The regular-expression engine gives up after ten million steps, by a panic in Rust.
            if type(error).__name__ != "PanicException":
                raise
            raise ArgumentError(f"the text cannot be cut into words: {error}") from None
        return ids


def _model(vocabulary: Vocabulary, whole_words: bool) -> models.BPE:
    """The merging model; plain text cannot become a control token, so those are kept out of it."""
    from tokenizers import models

    plain = dict(vocabulary.ids)
    for token_id in vocabulary.hidden:
        plain.pop(vocabulary.texts[token_id], None)
    longest = max(map(len, map(str.encode, plain)), default=0)
    # Of equal merges the first counts, as elsewhere; `tokenizers` would take the last.
    pairs = vocabulary.merges.pairs()
    if pairs is not None and vocabulary.merges.longest <= longest + 1:  # else `tokenizers` panics
        try:
            return models.BPE(plain, pairs, ignore_merges=whole_words)
        except Exception as error:
            logger.debug("%s: %s; looking at each merge", vocabulary.source, error)
    # Only now, because checking 280,000 merges one by one takes as long as building with them.
    return models.BPE(plain, _checked_merges(vocabulary, plain), ignore_merges=whole_words)


def _checked_merges(vocabulary: Vocabulary, plain: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that make plain tokens.

    Raises FormatError at the first that is no merge of two tokens into a third.
    """

    def error(index: int, problem: str) -> FormatError:
        return FormatError(f"{vocabulary.source}: tokenizer.ggml.merges[{index}] {problem}")

    pairs: dict[tuple[str, str], int] = {}
    for index, merge in enumerate(vocabulary.merges):
        try:
            parts = merge.decode().split(" ")
        except UnicodeDecodeError:
            raise error(index, f"is {merge!r:.80}, which is not UTF-8") from None
        if len(parts) != 2 or not all(parts):
            raise error(index, f"is {merge!r:.80}, not two tokens with a space between")
        for text in (*parts, "".join(parts)):
            if text not in vocabulary.ids:
                raise error(index, f"is {merge!r:.80}, but {text!r:.80} is not in the vocabulary")
        if all(text in plain for text in (*parts, "".join(parts))):
            pairs.setdefault((parts[0], parts[1]), index)
    return list(pairs)
