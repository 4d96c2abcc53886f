"""The files of a tokenizer's folder, read with checks, and what their readers hand on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import StrPath
from .._tokenize.vocabulary import TokenType
from ..errors import FileError, FormatError, UnsupportedError

logger = logging.getLogger("qinfer")


@dataclass(slots=True)
class Pieces:
    """The tokens of a vocabulary by id, before others are added to them.

    Attributes:
        source: the file they come from.
        model: "llama" (SPM) or "gpt2" (byte-level BPE).
        texts: id to text; there may be ids without one.
        types: of the tokens that are not normal.
        scores: of SPM tokens; the highest is merged first.
        merges: of BPE tokens, "left right", first come first.
        pre: how a text is cut into words before, by the name that GGUF files use.
        special: the ids of "bos", "eos", "unk" and "pad" as far as the file itself names them.
        add_space_prefix: whether a text gets a space before it.
    """

    source: str
    model: str
    texts: dict[int, str]
    types: dict[int, TokenType] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    special: dict[str, int] = field(default_factory=dict)
    add_space_prefix: bool = False


class Section:
    """A JSON object; its values are checked to be of the type they should have.

    A value that is null counts as absent. `at` is where in the file `source` the object stands.
    """

    def __init__(self, content: Mapping[str, Any], source: str, at: str = "") -> None:
        self.content = content
        self.source = source
        self._at = at

    def error(self, key: str, problem: str) -> FormatError:
        """A FormatError about the value of a key."""
        return FormatError(f"{self.source}: {self._at}{key} {problem}")

    def unsupported(self, key: str, problem: str) -> UnsupportedError:
        """An UnsupportedError about the value of a key."""
        return UnsupportedError(f"{self.source}: {self._at}{key} {problem}")

    def string(self, key: str) -> str | None:
        """A string."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is {value!r:.80}, not a string")
        return value

    def flag(self, key: str) -> bool | None:
        """A bool."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"is {value!r:.80}, not true or false")
        return value

    def token_id(self, key: str) -> int | None:
        """A token id, which is not negative."""
        value = self.content.get(key)
        return None if value is None else self._token_id(key, value)

    def values(self, key: str) -> list[Any]:
        """A list; empty when it is absent."""
        value = self.content.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, f"is {value!r:.80}, not a list")
        return value

    def section(self, key: str) -> Section | None:
        """An object inside this one."""
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r:.80}, not an object")
        return Section(value, self.source, f"{self._at}{key}.")

    def sections(self, key: str) -> list[Section]:
        """The objects of a list."""
        found = []
        for index, value in enumerate(self.values(key)):
            if not isinstance(value, dict):
                raise self.error(f"{key}[{index}]", f"is {value!r:.80}, not an object")
            found.append(Section(value, self.source, f"{self._at}{key}[{index}]."))
        return found

    def steps(self, key: str, items: str) -> list[Section]:
        """The object under a key, or those of the sequence it is, whose list is named `items`."""
        first = self.section(key)
        pending = [] if first is None else [first]
        found = []
        while pending:
            step = pending.pop()
            if step.string("type") == "Sequence":
                pending += reversed(step.sections(items))
            else:
                found.append(step)
        return found

    def texts_by_id(self) -> dict[int, str]:
        """The tokens of an object that maps each text to an id."""
        texts: dict[int, str] = {}
        for text, value in self.content.items():
            token_id = self._token_id(f"{text!r:.80}", value)
            if token_id in texts:
                raise self.error(
                    f"{text!r:.80}", f"has id {token_id}, which {texts[token_id]!r:.80} has, too"
                )
            texts[token_id] = text
        return texts

    def token_text(self, key: str) -> str | None:
        """The text of a token, which is a string or an object with `content`; None when empty."""
        if isinstance(self.content.get(key), dict):
            token = self.section(key)
            return (token and token.string("content")) or None
        return self.string(key) or None

    def _token_id(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise self.error(key, f"is {value!r:.80}, not a token id")
        return value


class Folder:
    """A folder with a tokenizer's files, each of which is read once."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._sections: dict[str, Section | None] = {}
        if not self.path.is_dir():
            raise FileError(f"{self.path}: is not a folder with a tokenizer's files")

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.path / name).exists()

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises FileError when it cannot be read."""
        path = self.path / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise FileError(f"{path}: cannot read: {error.strerror or error}") from error

    def text(self, name: str) -> str:
        """The text of a file; raises FormatError when it is not UTF-8."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path / name}: is not UTF-8: {error}") from None

    def json(self, name: str) -> Section:
        """The object in a JSON file; an empty one when the file is not there."""
        section = self.find_json(name)
        return Section({}, str(self.path / name)) if section is None else section

    def find_json(self, name: str) -> Section | None:
        """The object in a JSON file; None when the file is not there.

        Raises FormatError when it is not JSON, not an object, or has a key twice, of which a
        reader would see only one.
        """
        if name not in self._sections:
            self._sections[name] = self._read_json(name) if self.has(name) else None
        return self._sections[name]

    def _read_json(self, name: str) -> Section:
        path = self.path / name
        try:
            content = json.loads(self.text(name), object_pairs_hook=_without_twins)
        except FormatError:
            raise
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: is not a JSON file that can be read: {error}") from None
        if not isinstance(content, dict):
            raise FormatError(f"{path}: holds {content!r:.80}, not a JSON object")
        return Section(content, str(path))


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twin!r:.80} is there twice")
    return content
