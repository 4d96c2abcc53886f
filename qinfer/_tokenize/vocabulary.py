"""The vocabulary in a file's metadata, checked once: texts, types, scores, merges, special ids."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

from .._strings import StringTable
from ..errors import FormatError, UnsupportedError

logger = logging.getLogger("qinfer")

StringArrays = Callable[[str], StringTable]


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that a reader of the text does not see, and that plain text cannot spell.
HIDDEN = (TokenType.CONTROL, TokenType.UNKNOWN)

_BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Ends of a turn in order of preference: files that name none are searched for these.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<end_of_utterance>",
)
# Tokens after which nothing belongs to the answer; the last row starts another file in code models.
_END_OF_GENERATION = frozenset(_END_OF_TURN) | {
    *("</s>", "<eos>", "[EOS]", "<|eom_id|>", "<|return|>", "<|call|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<reponame>", "<|file_sep|>"),
}
_SPECIAL_KEYS = ("bos", "eos", "eot", "eom", "unknown", "padding")
# Files older than `tokenizer.ggml.pre` are told apart by architecture.
_PRE_BY_ARCHITECTURE = {"falcon": "falcon", "opt": "gpt-2", "gpt2": "gpt-2"}
# Pre-tokenisers whose models begin with BOS although their files may not say so.
_PRE_WITH_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
) | {"tekken"}


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A vocabulary; an id that does not exist is None."""

    source: str
    model: str  # "llama": pieces with scores (SPM); "gpt2": byte-level pairs with ranks (BPE)
    pre: str  # which pre-tokeniser a BPE vocabulary was trained with
    texts: list[str]  # [n_vocab]
    types: list[int]  # [n_vocab], a TokenType each
    scores: list[float]  # [n_vocab]
    merges: StringTable  # [n_merges] "left right", best first
    ids: dict[str, int]  # text to id
    hidden: frozenset[int]  # ids of the types in HIDDEN
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    unk_id: int | None
    pad_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        return len(self.texts)

    def of_types(self, *kinds: TokenType) -> list[int]:
        """The ids of tokens of these types."""
        return _of_types(self.types, kinds)


class _Reader:
    """Values of a metadata mapping, each checked to be of the type it should have."""

    def __init__(
        self, metadata: Mapping[str, object], string_arrays: StringArrays | None, source: str
    ) -> None:
        self.source = source
        self._metadata = metadata
        self._string_arrays = string_arrays

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def error(self, key: str, problem: str) -> FormatError:
        return FormatError(f"{self.source}: {key} {problem}")

    def string(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is {value!r:.80}, not a string")
        return value

    def flag(self, key: str) -> bool | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"is {value!r:.80}, not a bool")
        return value

    def token_id(self, key: str, n_vocab: int, default: int | None) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return default if default is not None and default < n_vocab else None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"is {value!r:.80}, not a token id")
        if 0 <= value < n_vocab:
            return value
        # -1 stored as unsigned is how some converters write "none".
        if value not in (-1, 2**32 - 1):
            logger.warning(
                "%s: %s is %d, outside the vocabulary of %d; ignored",
                *(self.source, key, value, n_vocab),
            )
        return None

    def strings(self, key: str) -> StringTable:
        if key not in self._metadata:
            return StringTable.of(())
        if self._string_arrays is not None:
            return self._string_arrays(key)
        value = self._metadata[key]
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise self.error(key, "is not an array of strings")
        items = []
        for index, item in enumerate(value):
            if not isinstance(item, (str, bytes)):
                raise self.error(f"{key}[{index}]", f"is {item!r:.80}, not a string")
            items.append(item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item)
        return StringTable.of(items)

    def numbers(self, key: str, n_vocab: int, *kinds: type) -> list[float] | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise self.error(key, "is not an array of numbers")
        if len(value) != n_vocab:
            raise self.error(key, f"has {len(value)} items for {n_vocab} tokens")
        items = list(value)
        if not set(map(type, items)) <= set(kinds):
            raise self.error(key, f"is not an array of {' or '.join(k.__name__ for k in kinds)}")
        return items


def read_vocabulary(
    metadata: Mapping[str, object], string_arrays: StringArrays | None, source: str
) -> Vocabulary:
    """The vocabulary of a file.

    `string_arrays` gives the bytes of an array of strings by key; without it, `metadata` holds str
    or bytes. Raises FormatError naming the key and the index of what is wrong, UnsupportedError for
    another kind of tokenizer.
    """
    reader = _Reader(metadata, string_arrays, source)
    model = reader.string("tokenizer.ggml.model")
    if model is None:
        raise reader.error("tokenizer.ggml.model", "is missing: the file has no vocabulary")
    if model not in ("llama", "gpt2"):
        raise UnsupportedError(
            f"{source}: tokenizer.ggml.model is {model!r}; supported are 'llama' and 'gpt2'"
        )
    texts = _texts(reader)
    ids = _ids(reader, texts)
    special = _special_ids(reader, model, texts, ids)
    types = _types(reader, model, texts, ids, special)
    pre = reader.string("tokenizer.ggml.pre") or _PRE_BY_ARCHITECTURE.get(
        reader.string("general.architecture") or "", ""
    )
    if special["eot"] is None:
        special["eot"] = _end_of_turn(ids, types)
    return Vocabulary(
        source=source,
        model=model,
        pre=pre,
        texts=texts,
        types=types,
        scores=_scores(reader, len(texts)),
        merges=_merges(reader, model),
        ids=ids,
        hidden=frozenset(_of_types(types, HIDDEN)),
        bos_id=special["bos"],
        eos_id=special["eos"],
        eot_id=special["eot"],
        unk_id=special["unknown"],
        pad_id=special["padding"],
        eog_ids=_end_of_generation(special, ids, types),
        add_bos=_adds(reader, "bos", special, model == "llama" or pre in _PRE_WITH_BOS),
        add_eos=_adds(reader, "eos", special, False),
        add_space_prefix=model == "llama"
        and reader.flag("tokenizer.ggml.add_space_prefix") is not False,
        chat_template=reader.string("tokenizer.chat_template"),
    )


def _texts(reader: _Reader) -> list[str]:
    key = "tokenizer.ggml.tokens"
    raw = reader.strings(key)
    if not len(raw):
        raise reader.error(key, "is missing or empty: the file has no vocabulary")
    try:
        return list(map(bytes.decode, raw))
    except UnicodeDecodeError:
        for index, text in enumerate(raw):
            try:
                text.decode()
            except UnicodeDecodeError as problem:
                raise reader.error(
                    f"{key}[{index}]", f"is {text!r:.80}, which is not UTF-8 ({problem.reason})"
                ) from None
        raise


def _ids(reader: _Reader, texts: list[str]) -> dict[str, int]:
    ids = dict(zip(texts, range(len(texts)), strict=True))
    # Empty texts are placeholders: there may be any number of them, and none is ever encoded.
    ids.pop("", None)
    if len(ids) + texts.count("") != len(texts):
        first: dict[str, int] = {}
        for index, text in enumerate(texts):
            if text and first.setdefault(text, index) != index:
                raise reader.error(
                    "tokenizer.ggml.tokens",
                    f"has {text!r:.80} twice, as token {first[text]} and as token {index}",
                )
    return ids


def _special_ids(
    reader: _Reader, model: str, texts: list[str], ids: dict[str, int]
) -> dict[str, int | None]:
    end_of_text = ids.get("<|endoftext|>")
    defaults: dict[str, int | None] = (
        {"bos": 1, "eos": 2, "unknown": 0}
        if model == "llama"
        else {"bos": end_of_text, "eos": end_of_text}
    )
    return {
        name: reader.token_id(f"tokenizer.ggml.{name}_token_id", len(texts), defaults.get(name))
        for name in _SPECIAL_KEYS
    }


def _types(
    reader: _Reader,
    model: str,
    texts: list[str],
    ids: dict[str, int],
    special: dict[str, int | None],
) -> list[int]:
    key = "tokenizer.ggml.token_type"
    given = reader.numbers(key, len(texts), int)
    if given is not None:
        types = cast("list[int]", given)
        if not set(types) <= {0, *TokenType}:
            index = next(i for i, kind in enumerate(types) if kind not in {0, *TokenType})
            raise reader.error(f"{key}[{index}]", f"is {types[index]}, not one of 0 to 6")
        if 0 in types:
            types = [kind or TokenType.NORMAL for kind in types]
        # Text from a stranger must not end a turn, whatever the converter called the token.
        for end in _known(ids, _END_OF_GENERATION):
            if types[end] == TokenType.USER_DEFINED:
                types[end] = TokenType.CONTROL
        return types
    types = [int(TokenType.NORMAL)] * len(texts)
    if model == "llama":
        for index, text in enumerate(texts):
            if byte_value(text) is not None:
                types[index] = TokenType.BYTE
    for end in _known(ids, _END_OF_GENERATION):
        types[end] = TokenType.CONTROL
    for name, token_id in special.items():
        if token_id is not None:
            types[token_id] = TokenType.UNKNOWN if name == "unknown" else TokenType.CONTROL
    return types


def _of_types(types: list[int], kinds: Sequence[TokenType]) -> list[int]:
    """The positions of these types, with a quick look at the one type that nearly all have."""
    normal = int(TokenType.NORMAL)
    return [i for i, kind in enumerate(types) if kind != normal and kind in kinds]


def _known(ids: dict[str, int], texts: Iterable[str]) -> list[int]:
    """The ids of those texts that are tokens."""
    return [ids[text] for text in texts if text in ids]


def byte_value(text: str) -> int | None:
    """The byte that a text such as "<0x0A>" stands for."""
    match = _BYTE_TEXT.fullmatch(text)
    return int(match[1], 16) if match else None


def _scores(reader: _Reader, n_vocab: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    scores = reader.numbers(key, n_vocab, float, int)
    if scores is None:
        return [0.0] * n_vocab
    if not all(map(math.isfinite, scores)):
        index = next(i for i, score in enumerate(scores) if not math.isfinite(score))
        raise reader.error(f"{key}[{index}]", f"is {scores[index]}, not a finite number")
    return scores


def _merges(reader: _Reader, model: str) -> StringTable:
    key = "tokenizer.ggml.merges"
    if model != "gpt2":
        return StringTable.of(())
    if key not in reader:
        raise reader.error(key, "is missing, which a BPE vocabulary needs")
    return reader.strings(key)


def _end_of_turn(ids: dict[str, int], types: list[int]) -> int | None:
    known = _known(ids, _END_OF_TURN)
    return next((i for i in known if types[i] == TokenType.CONTROL), None)


def _end_of_generation(
    special: dict[str, int | None], ids: dict[str, int], types: list[int]
) -> frozenset[int]:
    found = {i for i in _known(ids, _END_OF_GENERATION) if types[i] == TokenType.CONTROL}
    return frozenset(
        found | {i for name in ("eos", "eot", "eom") if (i := special[name]) is not None}
    )


def _adds(reader: _Reader, name: str, special: dict[str, int | None], default: bool) -> bool:
    key = f"tokenizer.ggml.add_{name}_token"
    flag = reader.flag(key)
    if flag and special[name] is None:
        raise reader.error(key, f"is true, but no token is named by tokenizer.ggml.{name}_token_id")
    return (default if flag is None else flag) and special[name] is not None
