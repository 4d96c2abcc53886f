"""Conversations as the text, and the tokens, that a model was trained to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, FormatError

if TYPE_CHECKING:
    from ._template import Template
    from .tokenizer import Tokenizer

Message = Mapping[str, Any]

_MAX_DEPTH = 64


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, beginning with exactly one BOS where the model wants one.

    Arguments and errors as in `render`. What the messages say is part of the text: control tokens
    spelled in them are read as such, as they are by the template's author.
    """
    text = render(
        tokenizer,
        messages,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        variables=variables,
    )
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    bos_id = tokenizer.bos_id
    if tokenizer.add_bos and bos_id is not None and ids[:1] != [bos_id]:
        ids.insert(0, bos_id)
    return ids


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation by the model's template.

    Args:
        tokenizer: the model's, which has the template and the names of its tokens.
        messages: each a mapping with a "role", and "content": a str, or a list of parts such as
            `{"type": "text", "text": "Hello"}`, which become one text of as many paragraphs.
        chat_template: Jinja source that replaces the file's own template.
        add_generation_prompt: ends the text where the answer begins.
        tools: JSON schemas of the functions the model may call.
        variables: more names that the template may know, such as `{"enable_thinking": False}`.

    Raises:
        FormatError: there is no template, it is faulty, or takes too much time or memory.
        ArgumentError: the messages are not such as described, or the template refuses them.
    """
    checked = _messages(messages)
    source = tokenizer.chat_template if chat_template is None else chat_template
    if source is None:
        raise FormatError(f"{tokenizer.source} has no chat template: give one with chat_template=")
    name = f"chat template of {tokenizer.source}" if chat_template is None else "chat_template"
    names = {
        f"{kind}_token": "" if token_id is None else tokenizer.token(token_id)
        for kind, token_id in (
            ("bos", tokenizer.bos_id),
            ("eos", tokenizer.eos_id),
            ("unk", tokenizer.unk_id),
            ("pad", tokenizer.pad_id),
        )
    }
    return _compiled(source, name).render(
        {
            "tools": None if tools is None else _json(list(tools), "tools"),
            "documents": None,
            **names,
            **_json(dict(variables or {}), "variables"),
            "messages": checked,
            "add_generation_prompt": add_generation_prompt,
        }
    )


@lru_cache(maxsize=8)
def _compiled(source: str, name: str) -> Template:
    from ._template import Template

    return Template(source, name)


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ArgumentError(f"messages is a {type(messages).__name__}, not a list of messages")
    if not messages:
        raise ArgumentError("messages is empty: there is nothing to answer")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ArgumentError(f"{where} is a {type(message).__name__}, not a mapping")
        if not isinstance(message.get("role"), str):
            raise ArgumentError(f"{where}['role'] is {message.get('role')!r:.80}, not a str")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            # Templates for text alone fail at a list, and those that take one take a text as well.
            content = "\n".join(_texts(content, f"{where}['content']"))
            message = {**message, "content": content}
        elif not isinstance(content, str) and (content is not None or "tool_calls" not in message):
            raise ArgumentError(
                f"{where}['content'] is {content!r:.80}, not a str or a list of parts"
            )
        checked.append(_json(message, where))
    return checked


def _texts(parts: Sequence[Any], where: str) -> Iterator[str]:
    """The texts of a content's parts."""
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        if not isinstance(part, Mapping):
            raise ArgumentError(f"{place} is a {type(part).__name__}, not a mapping")
        if part.get("type") != "text":
            raise ArgumentError(
                f"{place} is of type {part.get('type')!r:.80}; the only type of parts that models "
                "read here is 'text'"
            )
        if not isinstance(part.get("text"), str):
            raise ArgumentError(f"{place}['text'] is {part.get('text')!r:.80}, not a str")
        yield part["text"]


def _json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain dicts, lists and numbers: a template is given no other objects."""
    if depth > _MAX_DEPTH:
        raise ArgumentError(f"{where} is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ArgumentError(f"{where} has the key {key!r:.80}, which is not a str")
        return {key: _json(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise ArgumentError(f"{where} is a {type(value).__name__}, which has no place in JSON")
