"""SPM vocabularies: sentencepiece's tokenizer.model, or a tokenizer.json made from one."""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .._tokenize.spm import SPACE
from .._tokenize.vocabulary import TokenType, byte_value
from ..errors import FormatError, UnsupportedError
from ._vocabulary_bpe import read_model
from ._vocabulary_files import Folder, Pieces, Section, logger

# Fields of sentencepiece's messages by number.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX = 3, 24
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

_Value = int | bytes


def read_spm_model(files: Folder) -> Pieces:
    """The vocabulary in tokenizer.model.

    Raises FormatError when it is no sentencepiece model or broken, UnsupportedError when it is of
    another kind than BPE.
    """
    data = files.read("tokenizer.model")
    source = str(files.path / "tokenizer.model")
    if _TIKTOKEN.match(data):
        raise UnsupportedError(
            f"{source}: is a tiktoken vocabulary; supported is sentencepiece's form, "
            "or else a tokenizer.json in its place"
        )
    try:
        model = _message(data)
        pieces = [_piece(item) for item in model[_PIECES]]
        trainer = _last(_message(_joined(model[_TRAINER])))
        kind = _MODEL_TYPES.get(_number(trainer.get(_MODEL_TYPE, 1)), "unknown")
        space_as_suffix = _number(trainer.get(_SPACE_AS_SUFFIX, 0))
        normalizer = _last(_message(_joined(model[_NORMALIZER])))
        dummy_prefix, remove_spaces, escape_spaces = (
            _number(normalizer.get(field, 1))
            for field in (_DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES)
        )
    except ValueError as error:
        raise FormatError(f"{source}: is not a sentencepiece model: {error}") from None
    if not pieces:
        raise FormatError(f"{source}: is not a sentencepiece model: it has no pieces")
    if kind != "BPE":
        raise UnsupportedError(f"{source}: its model type is {kind}; supported is BPE")
    if space_as_suffix:
        raise UnsupportedError(f"{source}: puts spaces after words, which GGUF cannot express")
    if not escape_spaces:
        raise UnsupportedError(f"{source}: keeps spaces as they are; supported is {SPACE!r}")
    if remove_spaces:
        logger.warning(
            "%s: sentencepiece would remove superfluous spaces from a text; with GGUF they stay",
            source,
        )
    if normalizer.get(_CHARACTER_MAP):
        logger.warning(
            "%s: GGUF cannot express its character normalization; "
            "texts that it changes get other tokens",
            source,
        )
    result = Pieces(source, "llama", {}, add_space_prefix=bool(dummy_prefix))
    result.special = _special(data, source)
    for token_id, (text, score, number) in enumerate(pieces):
        if not math.isfinite(score):
            raise FormatError(f"{source}: piece {token_id}: its score is {score}, not finite")
        if number not in set(TokenType):
            raise FormatError(f"{source}: piece {token_id}: its type is {number}, not 1 to 6")
        result.texts[token_id] = text
        result.scores[token_id] = score
        if number != TokenType.NORMAL:
            result.types[token_id] = TokenType(number)
    return result


def _special(data: bytes, source: str) -> dict[str, int]:
    """The special ids as sentencepiece finds them, which also checks the model as a whole."""
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except (RuntimeError, OSError) as error:
        raise FormatError(f"{source}: sentencepiece refuses it: {error}") from None
    found = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
    return {name: token_id for name, token_id in found.items() if token_id >= 0}


def _piece(item: _Value) -> tuple[str, float, int]:
    """Text, score and type of a piece."""
    fields = _last(_message(item))
    score = fields.get(_SCORE, bytes(4))
    text = fields.get(_TEXT, b"")
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a piece has a field of a wrong type")
    return text.decode(), struct.unpack("<f", score)[0], _number(fields.get(_TYPE, 1))


def _message(data: _Value) -> defaultdict[int, list[_Value]]:
    """The values of a protobuf message by field, in order."""
    if not isinstance(data, bytes):
        raise ValueError("a message has a wrong type")
    fields: defaultdict[int, list[_Value]] = defaultdict(list)
    for number, value in _values(data):
        fields[number].append(value)
    return fields


def _values(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Field numbers and values: of a variable-length integer, an int, else the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"{length} bytes are announced where {len(data) - at} are left")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"an integer is cut off or too long at byte {at}")


def _last(fields: defaultdict[int, list[_Value]]) -> dict[int, _Value]:
    """The value of each field that is there once; of several, the last counts."""
    return {number: values[-1] for number, values in fields.items()}


def _joined(values: list[_Value]) -> bytes:
    """A message given in several parts, which are read one after another."""
    return b"".join(value for value in values if isinstance(value, bytes))


def _number(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a field that should be a number is none")
    return value


def read_spm_json(files: Folder) -> Pieces:
    """The vocabulary in a tokenizer.json that was made from a sentencepiece model.

    Its merges come best first; each piece's score is made from the place of its first merge. Raises
    FormatError or UnsupportedError, when it is no such file.
    """
    tokenizer = files.json("tokenizer.json")
    model, texts, merges = read_model(tokenizer)
    pieces = Pieces(tokenizer.source, "llama", texts, add_space_prefix=_spaces(tokenizer, texts))
    ids = {text: token_id for token_id, text in texts.items()}
    if model.flag("byte_fallback"):
        for token_id, text in texts.items():
            if byte_value(text) is not None:
                pieces.types[token_id] = TokenType.BYTE
    if unknown := model.string("unk_token"):
        if unknown not in ids:
            raise model.error("unk_token", f"is {unknown!r:.80}, which is not in the vocabulary")
        pieces.types[ids[unknown]] = TokenType.UNKNOWN
        pieces.special["unk"] = ids[unknown]
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    for token_id, text in texts.items():
        pieces.scores[token_id] = (
            0.0 if token_id in pieces.types else -float(rank.get(text, len(rank)))
        )
    _compare_merges(pieces, rank, merges)
    return pieces


def _spaces(tokenizer: Section, texts: dict[int, str]) -> bool:
    """Whether a text gets a space before it; checks that a space is U+2581 as in SPM."""
    replaced = prefix = False
    for step in tokenizer.steps("normalizer", "normalizers"):
        kind = step.string("type")
        if kind == "Prepend" and step.string("prepend") == SPACE:
            prefix = True
        elif (
            kind == "Replace"
            and step.content.get("pattern") == {"String": " "}
            and step.string("content") == SPACE
        ):
            replaced = True
        else:
            logger.warning(
                "%s: GGUF cannot express the normalizer %s; texts that it changes get other tokens",
                *(tokenizer.source, kind),
            )
    steps = tokenizer.steps("pre_tokenizer", "pretokenizers")
    for step in steps:
        kind = step.string("type")
        if kind == "Metaspace" and step.string("replacement") == SPACE:
            scheme = step.string("prepend_scheme")
            prefix = (
                step.flag("add_prefix_space") is not False
                if scheme is None
                else (scheme != "never")
            )
            inner = any(SPACE in text[1:] for text in texts.values())
            if inner and step.flag("split") is not False:
                logger.warning(
                    "%s: cuts texts at spaces first, which GGUF cannot express for SPM; "
                    "pieces with a space inside may be used where the model's own tokenizer would "
                    "not",
                    tokenizer.source,
                )
            replaced = True
        elif not (kind == "Split" and replaced and step.content.get("pattern") == {"String": " "}):
            raise tokenizer.unsupported(
                "pre_tokenizer",
                f"has the type {kind!r:.80}; supported are byte-level BPE and sentencepiece's",
            )
    if not replaced:
        raise tokenizer.unsupported(
            "normalizer",
            f"does not write spaces as {SPACE!r}, nor is pre_tokenizer byte-level: "
            "neither BPE nor SPM can express such a tokenizer",
        )
    return prefix


def _compare_merges(pieces: Pieces, rank: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Says where SPM, which knows pieces and scores, could not follow the list of merges.

    Marks pieces that no merge makes, but SPM would, as unused.
    """
    order = [rank[left + right] for left, right in merges]
    scattered = sum(now < before for before, now in pairwise(order))
    pairs = set(merges)
    reachable = {
        text
        for token_id, text in pieces.texts.items()
        if token_id not in pieces.types and (len(text) == 1 or text in rank)
    }
    surplus = 0
    for token_id, text in pieces.texts.items():
        if token_id in pieces.types:
            continue
        missing = sum(
            text[:cut] in reachable
            and text[cut:] in reachable
            and (text[:cut], text[cut:]) not in pairs
            for cut in range(1, len(text))
        )
        if missing and text not in rank:
            pieces.types[token_id] = TokenType.UNUSED
        elif missing:
            surplus += missing
    for number, what in ((scattered, "are out of order with"), (surplus, "are missing from")):
        if number:
            logger.warning(
                "%s: %d merges %s those that SPM makes of the same pieces; "
                "some texts may get other tokens",
                *(pieces.source, number, what),
            )
