"""Encoder of SPM vocabularies: sentencepiece, given the file's pieces and scores."""

from __future__ import annotations

import logging
import struct
from typing import Any

from ..errors import FormatError
from .vocabulary import TokenType, Vocabulary, byte_value

logger = logging.getLogger("qinfer")

SPACE = "▁"  # U+2581 stands for a space in a piece


class SpmEncoder:
    """Merges pieces by score, best first; what no piece covers becomes bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import sentencepiece

        _check_bytes(vocabulary)
        self._n_vocab = vocabulary.n_vocab
        self._source = vocabulary.source
        self._warned = False
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_model_proto(vocabulary))
        except (RuntimeError, OSError) as error:
            raise FormatError(
                f"{vocabulary.source}: sentencepiece refuses the vocabulary: {error}"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens; no space is put before it.

        Where the vocabulary has neither byte tokens nor an unknown token, characters that it does
        not cover are left out, which is logged once.
        """
        ids: list[int] = self._processor.EncodeAsIds(text)
        if self._n_vocab in ids:
            if not self._warned:
                logger.warning(
                    "%s: the vocabulary has no token for some characters; they are left out",
                    self._source,
                )
                self._warned = True
            ids = [token_id for token_id in ids if token_id != self._n_vocab]
        return ids


def _check_bytes(vocabulary: Vocabulary) -> None:
    """Either all 256 bytes have a token or none has: with some, some texts have no encoding."""
    found = {
        byte_value(text)
        for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True)
        if kind == TokenType.BYTE
    }
    missing = set(range(256)) - found if found else set()
    if None in found or missing:
        raise FormatError(
            f"{vocabulary.source}: tokenizer.ggml.tokens has byte tokens, but "
            + (f"none for <0x{min(missing):02X}>" if missing else "one that is not named <0xNN>")
        )


def _model_proto(vocabulary: Vocabulary) -> bytes:
    """A sentencepiece ModelProto (protobuf wire format): pieces, BPE, no normalisation at all."""
    texts, scores, types = [*vocabulary.texts], [*vocabulary.scores], [*vocabulary.types]
    # sentencepiece wants exactly one unknown piece: one more, if need be, after the last token.
    unknown = vocabulary.unk_id
    if TokenType.UNKNOWN in types:
        unknown = types.index(TokenType.UNKNOWN)
        types = [TokenType.CONTROL if kind == TokenType.UNKNOWN else kind for kind in types]
    if unknown is None or types[unknown] != TokenType.CONTROL:
        unknown = len(texts)
        texts, scores, types = [*texts, ""], [*scores, 0.0], [*types, 0]
    types[unknown] = TokenType.UNKNOWN
    pieces = []
    for index, (text, score, kind) in enumerate(zip(texts, scores, types, strict=True)):
        if not text or "\0" in text:
            # What sentencepiece refuses gets a name that no text spells.
            text = f"\U0010ffff{index}"
            kind = kind if kind == TokenType.UNKNOWN else TokenType.CONTROL
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes((0x18, kind))
        pieces.append(_field(1, piece))
    byte_fallback = TokenType.BYTE in types
    # model_type BPE, byte_fallback
    trainer = bytes((3 << 3, 2)) + _varint(35 << 3) + bytes((byte_fallback,))
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, b"identity") + bytes((3 << 3, 0, 4 << 3, 0, 5 << 3, 1))
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, payload: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
