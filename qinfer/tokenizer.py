"""Text to token ids and back, by the vocabulary in the GGUF file itself."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import index as as_int
from typing import TYPE_CHECKING

from ._tokenize.bpe import BpeEncoder, byte_alphabet
from ._tokenize.spm import SPACE, SpmEncoder
from ._tokenize.vocabulary import HIDDEN, StringArrays, TokenType, byte_value, read_vocabulary
from .errors import ArgumentError

if TYPE_CHECKING:
    from ._gguf import GGUF


class Tokenizer:
    """The tokenizer of a model, immutable and safe to share between threads.

    Attributes: `n_vocab`; the ids `bos_id`, `eos_id`, `eot_id` (end of a turn), `unk_id`, `pad_id`,
    each None when the model has none; `eog_ids`, all ids after which nothing belongs to the answer;
    `add_bos`, `add_eos`, whether `encode` adds them; `add_space_prefix`, whether it puts a space
    before a text; `chat_template`, the file's own.
    """

    def __init__(
        self,
        metadata: Mapping[str, object],
        *,
        string_arrays: StringArrays | None = None,
        source: str = "metadata",
    ) -> None:
        """A tokenizer from the `tokenizer.*` keys of `metadata`; `source` names them in messages.

        `string_arrays(key)` gives the bytes of an array of strings; without it they are taken from
        `metadata`. Raises FormatError naming the key and index of what is wrong, UnsupportedError
        for another kind of vocabulary.
        """
        vocabulary = read_vocabulary(metadata, string_arrays, source)
        self._vocabulary = vocabulary
        self.source = source
        self.n_vocab = vocabulary.n_vocab
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eot_id = vocabulary.eot_id
        self.unk_id = vocabulary.unk_id
        self.pad_id = vocabulary.pad_id
        self.eog_ids = vocabulary.eog_ids
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.add_space_prefix = vocabulary.add_space_prefix
        self.chat_template = vocabulary.chat_template
        self._bytes: list[bytes | None] = [None] * self.n_vocab
        self._hidden = vocabulary.hidden

    @classmethod
    def from_gguf(cls, file: str | os.PathLike[str] | GGUF) -> Tokenizer:
        """The tokenizer of a GGUF file, given by its path or opened; it needs no tensors."""
        from ._gguf import GGUF

        if isinstance(file, GGUF):
            return cls(file.metadata, string_arrays=file.string_array, source=file.path)
        with GGUF(file, tensors=False) as opened:
            return cls(opened.metadata, string_arrays=opened.string_array, source=opened.path)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        `add_special` adds BOS and EOS where the model wants them. `parse_special` reads control
        tokens spelled in the text, such as "<|im_start|>", as those tokens; otherwise they are
        plain text, which makes text from strangers safe. Tokens the vocabulary calls user-defined
        are always read whole. Raises ArgumentError when `text` is not a str of whole characters,
        FormatError when the vocabulary turns out to be broken.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text to encode is a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"text to encode has half a surrogate pair at index {error.start}"
            ) from None
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after_special = True
        for part in self._split_special(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if self.add_space_prefix and after_special:
                part = " " + part
            ids += self._encoder.encode(part)
            after_special = False
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of a whole sequence: what `encode` was given, without the spaces it added.

        `skip_special` leaves out control tokens. Bytes that are no UTF-8 become U+FFFD. For tokens
        that continue a text, use `decoder`, which leaves the first space alone. Raises
        ArgumentError naming an id outside the vocabulary.
        """
        pieces = []
        at_start = True
        for token_id in ids:
            piece = self.token_bytes(token_id)
            special = self._is_special(token_id)
            if at_start and not special:
                piece = self._without_prefix(piece)
            at_start = special
            if not (skip_special and token_id in self._hidden):
                pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens one after another; of control tokens, their names."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, not always whole characters; of a control token, its name."""
        token_id = self._check_id(token_id)
        known = self._bytes[token_id]
        if known is None:
            known = self._bytes[token_id] = self._token_bytes(token_id)
        return known

    def decoder(self, *, skip_special: bool = True, at_start: bool = False) -> IncrementalDecoder:
        """A decoder for tokens that come one by one; `at_start` when no text is before them."""
        return IncrementalDecoder(self, skip_special=skip_special, at_start=at_start)

    def token(self, token_id: int) -> str:
        """The text of a token as the vocabulary spells it, with "▁" or "Ġ" for a space."""
        return self._vocabulary.texts[self._check_id(token_id)]

    def id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells so, or None."""
        return self._vocabulary.ids.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether a token is a control (or unknown) token, which `skip_special` leaves out."""
        return self._check_id(token_id) in self._hidden

    def __repr__(self) -> str:
        kind = "SPM" if self._vocabulary.model == "llama" else f"BPE, {self._vocabulary.pre}"
        return f"Tokenizer({self._vocabulary.source!r}: {kind}, n_vocab={self.n_vocab})"

    @cached_property
    def _encoder(self) -> SpmEncoder | BpeEncoder:
        # Built when first asked for: a model is often opened only to be looked at.
        if self._vocabulary.model == "llama":
            return SpmEncoder(self._vocabulary)
        return BpeEncoder(self._vocabulary)

    @cached_property
    def _special(self) -> list[tuple[str, int, bool]]:
        """Each token that is read whole, longest first: text, id, and whether only when parsing."""
        texts = self._vocabulary.texts
        whole = self._vocabulary.of_types(*HIDDEN, TokenType.USER_DEFINED)
        found = [(texts[i], i, i in self._hidden) for i in whole if texts[i]]
        return sorted(found, key=lambda item: -len(item[0].encode()))

    def _split_special(self, text: str, parse_special: bool) -> list[str | int]:
        """Text cut at the tokens read whole: longer ones first, wherever they are (llama.cpp)."""
        parts: list[str | int] = [text] if text else []
        for spelling, token_id, only_parsed in self._special:
            if (only_parsed and not parse_special) or spelling not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                for number, piece in enumerate(part.split(spelling)):
                    cut += [token_id] * (number > 0)
                    cut += [piece] * (piece != "")
            parts = cut
        return parts

    def _is_special(self, token_id: int) -> bool:
        """Whether `encode` puts a space before a text that follows this token."""
        return (
            token_id in self._hidden or self._vocabulary.types[token_id] == TokenType.USER_DEFINED
        )

    def _without_prefix(self, piece: bytes) -> bytes:
        return piece.removeprefix(b" ") if self.add_space_prefix else piece

    def _token_bytes(self, token_id: int) -> bytes:
        text = self._vocabulary.texts[token_id]
        kind = self._vocabulary.types[token_id]
        if token_id in self._hidden or kind == TokenType.USER_DEFINED:
            return text.encode()
        if kind == TokenType.BYTE and (value := byte_value(text)) is not None:
            return bytes((value,))
        if self._vocabulary.model == "llama":
            return text.replace(SPACE, " ").encode()
        alphabet = byte_alphabet()
        # Some files call added tokens normal although they are not spelled in the byte alphabet.
        return b"".join(
            bytes((alphabet[char],)) if char in alphabet else char.encode() for char in text
        )

    def _check_id(self, token_id: int) -> int:
        try:
            token_id = as_int(token_id)
        except TypeError:
            raise ArgumentError(f"token id {token_id!r:.80} is not an integer") from None
        if not 0 <= token_id < self.n_vocab:
            raise ArgumentError(f"token id {token_id} is outside 0 to {self.n_vocab - 1}")
        return token_id


class IncrementalDecoder:
    """Turns tokens into text one at a time; a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; ArgumentError names an id outside the vocabulary."""
        tokenizer = self._tokenizer
        piece = tokenizer.token_bytes(token_id)
        if tokenizer.is_control(token_id):
            if self._skip_special:
                return ""
        elif self._at_start:
            self._at_start = False
            piece = tokenizer._without_prefix(piece)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The rest: U+FFFD when the last character is incomplete. The decoder can be used anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
