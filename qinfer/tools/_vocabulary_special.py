"""Which tokens have a role, such as beginning a text, and which are put beside each text."""

from __future__ import annotations

from typing import Any

from .._tokenize.vocabulary import TokenType
from ._vocabulary_files import Folder, Pieces, Section, logger

# The roles by their names in Hugging Face's files and in GGUF's keys, where one is misspelled.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
_OTHER_ROLES = ("cls", "mask")


class SpecialTokens:
    """What the files of a folder say of special tokens.

    Attributes:
        named: the texts of tokens by role.
        texts: those, and the texts of all other special tokens.
    """

    def __init__(self, files: Folder) -> None:
        """Raises FormatError when a token is something else than a text."""
        self._files = files
        self._config = files.json("tokenizer_config.json")
        self.named: dict[str, str] = {}
        self.texts: set[str] = set()
        for section in (files.json("special_tokens_map.json"), self._config):
            for role in (*ROLES, *_OTHER_ROLES):
                if text := section.token_text(f"{role}_token"):
                    self.texts.add(text)
                    if role in ROLES:
                        self.named[role] = text
            for index, token in enumerate(section.values("additional_special_tokens")):
                place = f"additional_special_tokens[{index}]"
                if text := Section({place: token}, section.source).token_text(place):
                    self.texts.add(text)
        self._first, self._last = self._template()

    def mark(self, pieces: Pieces, ids: dict[str, int]) -> None:
        """Makes them control tokens, which text from a stranger cannot spell."""
        for text in self.texts:
            token_id = ids.get(text)
            if token_id is None:
                continue
            if pieces.types.get(token_id) in (None, TokenType.USER_DEFINED):
                pieces.types[token_id] = TokenType.CONTROL

    def ids(self, pieces: Pieces, ids: dict[str, int]) -> dict[str, int]:
        """The ids of tokens by role: as the tokenizer's files name them, else the model's.

        Raises FormatError when the model's files give something else than ids in the vocabulary.
        """
        found: dict[str, int] = {}
        for role, text in self.named.items():
            if text in ids:
                found[role] = ids[text]
            else:
                logger.warning(
                    "%s: %s_token is %r, which is not in the vocabulary; ignored",
                    *(self._files.path, role, text),
                )
        for name in ("config.json", "generation_config.json"):
            for role in ROLES:
                if role not in found:
                    section = self._files.json(name)
                    for token_id in config_ids(section, f"{role}_token_id", len(pieces.texts)):
                        found.setdefault(role, token_id)
        found = pieces.special | found
        for role, end in (("bos", self._first), ("eos", self._last)):
            if end is not None and end in ids:
                found.setdefault(role, ids[end])
        return found

    def adds(
        self, role: str, token_id: int | None, pieces: Pieces, ids: dict[str, int]
    ) -> bool | None:
        """Whether "bos" or "eos", whose id is given, is put beside each text; None: nobody says."""
        adds = self._config.flag(f"add_{role}_token")
        end = self._first if role == "bos" else self._last
        if adds is None and end is not None:
            adds = end in ids and ids[end] == token_id
            if not adds:
                logger.warning(
                    "%s: tokenizer.json puts %r beside each text, which is not the %s token and "
                    "cannot be expressed in GGUF",
                    *(self._files.path, end, role),
                )
        if adds is None and pieces.model == "llama":
            return role == "bos" and token_id is not None  # as sentencepiece's models are used
        if adds and token_id is None:
            logger.warning(
                "%s: add_%s_token is true, but there is no such token; written as false",
                *(self._config.source, role),
            )
            return False
        return adds

    def _template(self) -> tuple[str | None, str | None]:
        """The special tokens that tokenizer.json puts before and after each text."""
        before: list[str] = []
        after: list[str] = []
        for step in self._files.json("tokenizer.json").steps("post_processor", "processors"):
            if step.string("type") != "TemplateProcessing":
                continue
            side = before
            for item in step.sections("single"):
                token = item.section("SpecialToken")
                if token is None:
                    side = after
                elif text := token.string("id"):
                    side.append(text)
        for texts in (before, after):
            if len(texts) > 1:
                logger.warning(
                    "%s: tokenizer.json puts %s on one side of each text; GGUF can express one",
                    *(self._files.path, " and ".join(texts)),
                )
        return next(iter(before), None), next(reversed(after), None)


def config_ids(section: Section, key: str, n_tokens: int) -> list[int]:
    """The token ids under a key of a model's configuration; negative ones mean none.

    Raises FormatError when they are something else than ids of `n_tokens` tokens.
    """
    value: Any = section.content.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool):
            raise section.error(key, f"is {value!r:.80}, not a token id")
        if item >= n_tokens:
            raise section.error(key, f"is {value!r:.80}, outside the vocabulary of {n_tokens}")
    return [item for item in values if item >= 0]
