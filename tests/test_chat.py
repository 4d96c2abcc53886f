"""Chat templates: what they render, exactly one BOS, messages refused, hostile templates."""

from __future__ import annotations

import json
import resource
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import vocabularies as made
from qinfer import ArgumentError, FormatError, Tokenizer, chat

STORIES = Tokenizer.from_gguf(made.STORIES)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": 'é <b>"1 & 2"</b> 漢\n  two'},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": {"x": [1, 2.5, None, True]}}}],
    },
    {"role": "tool", "content": '{"sum": 3.5}', "name": "add"},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"é": "<number>"}}}]


def parts(*content: Any) -> list[dict[str, Any]]:
    """A conversation of one message made of parts."""
    return [{"role": "user", "content": list(content)}]


def render(template: str, messages: Any = HELLO, **options: Any) -> str:
    return chat.render(STORIES, messages, chat_template=template, **options)


# ---- what templates render ----


def test_chatml() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert render(CHATML, messages) == expected + "<|im_start|>assistant\n"
    assert render(CHATML, messages, add_generation_prompt=False) == expected


def test_llama2() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": " x "}]
    assert render(LLAMA2, messages) == "<s>[INST] Hello [/INST] Hi </s><s>[INST] x [/INST]"


def plainly(template: str, variables: dict[str, Any]) -> str:
    """What Jinja itself makes of a template, set up the way `transformers` does."""

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template).render(variables)


FEATURES = [
    CHATML.replace("message.content", "message.content|string"),
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n    U\n  {% else %}\n{{ m.role }}\n"
    "  {% endif %}\n{% endfor %}\nend\n",
    "{%- for m in messages -%} {{- loop.index0 ~ m.role -}} {%- if loop.last %}.{% endif %}"
    "{%- endfor -%}\n\n",
    "{{ messages|tojson }}{{ tools|tojson(indent=2) }}{{ tools[0]|tojson(sort_keys=true) }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages if m.content is string %}"
    "{% set ns.n = ns.n + m.content|length %}{% set ns.seen = ns.seen + [m.role] %}"
    "{% endfor %}{{ ns.n }} {{ ns.seen|join(', ') }} {{ ns.seen }}",
    "{% macro show(m, mark='-') %}{{ mark * 3 }}{{ m.role|upper }}{% endmacro %}"
    "{% for m in messages[1:3] %}{{ show(m) }}{{ show(m, mark='=') }}{% endfor %}",
    "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='role')|list }}"
    "{{ messages|rejectattr('content', 'none')|list|length }}",
    "{% for key, value in messages[2].tool_calls[0].function.arguments.items() %}"
    "{{ key }}={{ value }}{% endfor %}{{ messages[3].content.split(':')[0] }}",
    "{{ '%s is %.2f' % ('x', 1.5) }}{{ '%d'|format(3) }}{{ 2 ** 10 }}{{ 1.5 * 1000000000 }}"
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ [1] * 3 }}{{ 'ab' in 'cab' }}{{ 3 not in [1, 2] }}",
    "{{ 'a-b-c'.replace('-', '+') }}{{ 'a b'.title() }}{{ ' x '|trim }}{{ 'ab'[::-1] }}"
    "{{ 'x' ~ 1 ~ none ~ 2.5 }}{{ ['b', 'a']|sort|first }}{{ {'b': 1, 'a': 2}|dictsort }}",
    "{{ messages[0].content|indent(2, true) }}{{ 'a\nb'|indent }}{{ -1.55|round(1)|abs }}",
    "{{ nothing }}{{ nothing is defined }}{{ messages[0].name is defined }}{{ tools is not none }}"
    "{{ nothing|default('d') }}{{ ''|default('e', true) }}{{ messages[0]['role'] }}",
    "{% set text %}a {{ 1 + 1 }}{% endset %}{{ text|length }}{{ dict(a=1, b=[2])|tojson }}",
    "{% for i in range(3) %}{{ i }}{{ cycle }}{% else %}none{% endfor %}"
    "{% for i in [] %}{% else %}none{% endfor %}{{ range(5)|list|last }}",
    "{{ strftime_now('%Y-%m') }}{{ bos_token }}{{ eos_token }}{# none #}{{ 'x' if 0 else 'y' }}",
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{{ rest|length }}{{ (1, 2) == (1, 2) }}{{ 1 < 2 <= 2 }}",
]


@pytest.mark.parametrize("template", FEATURES)
def test_templates_render_as_jinja_does(template: str) -> None:
    variables = {
        "messages": [*CONVERSATION[:-1], {"role": "user", "content": "And now?"}],
        "tools": TOOLS,
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert render(template, CONVERSATION, tools=TOOLS) == plainly(template, variables)


def test_parts_of_text_become_one() -> None:
    two = [{"type": "text", "text": "Hello"}, {"type": "text", "text": ""}]
    for count, text in enumerate(("", "Hello", "Hello\n")):
        messages = parts(*two[:count])
        assert render(CHATML, messages) == render(CHATML, [{"role": "user", "content": text}])
        assert messages == parts(*two[:count])


def test_marks_for_training_are_transparent() -> None:
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    assert render(template) == "Hello!"


def test_more_variables() -> None:
    template = "{{ enable_thinking }}{{ tools }}{{ documents }}{{ custom.a[0] }}"
    variables = {"enable_thinking": False, "custom": {"a": (1,)}}
    assert render(template, variables=variables) == "FalseNoneNone1"


def test_smollm2(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_gguf(smollm2)
    text = chat.render(tokenizer, HELLO)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = chat.encode(tokenizer, HELLO)
    assert ids[:3] == [1, *tokenizer.encode("system\n")]
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids.count(1) == 3 and ids.count(2) == 2


# ---- tokens ----


def test_bos_comes_once() -> None:
    emitted = chat.encode(STORIES, HELLO, chat_template=LLAMA2)
    assert emitted == STORIES.encode("[INST] Hello [/INST]")
    missing = chat.encode(STORIES, HELLO, chat_template="[INST] {{ messages[0].content }} [/INST]")
    assert missing == emitted


def test_bos_only_where_the_model_wants_it() -> None:
    metadata = made.metadata_of(made.STORIES) | {"tokenizer.ggml.add_bos_token": False}
    tokenizer = Tokenizer(metadata)
    ids = chat.encode(tokenizer, HELLO, chat_template="{{ messages[0].content }}")
    assert ids == tokenizer.encode("Hello") and ids[0] != 1


def test_the_template_of_the_file_is_used() -> None:
    metadata = made.metadata_of(made.STORIES) | {"tokenizer.chat_template": "from the file"}
    assert chat.render(Tokenizer(metadata), HELLO) == "from the file"


def test_no_template() -> None:
    with pytest.raises(FormatError, match=r"stories260K.* has no chat template.*chat_template="):
        chat.encode(STORIES, HELLO)


# ---- messages ----


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hello", "messages is a str, not a list"),
        (HELLO[0], "messages is a dict, not a list"),
        (None, "messages is a NoneType, not a list"),
        (["Hello"], r"messages\[0\] is a str, not a mapping"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] is None, not a str"),
        ([*HELLO, {"role": 1, "content": "x"}], r"messages\[1\]\['role'\] is 1, not a str"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] is None, not a str"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\] is 5, not a str"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\['content'\] is b'x', not a str"),
        (parts("x"), r"messages\[0\]\['content'\]\[0\] is a str, not a mapping"),
        (
            parts({"type": "image_url", "image_url": {"url": "x"}}),
            r"'\]\[0\] is of type 'image_url'",
        ),
        (parts({"type": "text", "text": "x"}, {"text": "x"}), r"'content'\]\[1\] is of type None"),
        (parts({"type": "text", "content": "x"}), r"'content'\]\[0\]\['text'\] is None, not a str"),
        ([{"role": "u", "content": "", "x": {1: 2}}], r"messages\[0\]\['x'\] has the key 1"),
        ([{"role": "u", "content": "", "x": [object()]}], r"\['x'\]\[0\] is a object"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        render(CHATML, messages)


def test_messages_that_hold_themselves() -> None:
    message: dict[str, Any] = {"role": "user", "content": "x"}
    message["self"] = message
    with pytest.raises(ArgumentError, match="nested deeper than 64"):
        render(CHATML, [message])


def test_templates_may_refuse_messages() -> None:
    with pytest.raises(ArgumentError, match="refuses the messages: Only user and assistant roles"):
        render(LLAMA2, [{"role": "system", "content": "x"}])


def test_templates_cannot_change_messages() -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(FormatError, match="'append' of 'list' object is unsafe"):
        render("{{ messages.append(1) }}", messages)
    with pytest.raises(FormatError, match="unsafe"):
        render("{{ messages[0].update({'role': 'x'}) }}", messages)
    assert messages == HELLO


# ---- templates that are wrong or hostile ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", r"^chat_template, line 2: "),
        ("{{ messages", r"^chat_template, line 1: "),
        ("a\nb\n{{ messages[0].content.x.y }}", r"^chat_template, line 3: "),
        ("{{ 1 / 0 }}", "line 1: ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "line 1: TypeError"),
        ("{{ 'x'|nofilter }}", "No filter named 'nofilter'"),
        ("{% include 'other' %}", "no loader"),
        ("x" * 300_000, "has 300000 characters"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "recursion"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        render(template)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ messages['__class__'].__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''.format.__self__.x }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ namespace().__init__.__globals__ }}",
    "{{ messages.pop() }}",
    "{{ lipsum.__globals__ }}",
    "{{ range }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_cannot_reach_python(template: str) -> None:
    with pytest.raises(FormatError):
        render(template)


def growing(first: str, step: str) -> str:
    loop = "{% for i in range(99) %}{% set ns.x = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + first + ") %}" + loop


WIDE = "{% set a = 'ab ' * 1000000 %}"
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'text' }}{% endfor %}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}" + "text" * 1000 + "{% endfor %}{% endset %}",
    "{% for a in range(999999999) %}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) }}{% endmacro %}{{ m(1) }}",
    "{{ 'a' * 1000000000000 }}",
    "{{ 1000000000000 * ['a'] }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ (1).to_bytes(1000000000000, 'big') }}",
    "{{ 'a'.ljust(1000000000000) }}",
    "{{ 'a'.zfill(1000000000000) }}",
    "{{ 'a'.expandtabs(1000000000000) }}",
    "{{ 'a'|center(1000000000000) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '%*d' % (1000000000000, 1) }}",
    "{{ '%.1000000000000f'|format(1) }}",
    "{{ '{:>1000000000000}'.format(1) }}",
    "{{ ''['format'](1) }}",
    "{{ strftime_now('%01000000000000d') }}",
    "{{ 1.5|round(1000000000000, 'ceil') }}",
    "{{ messages|tojson(indent=1000000000000) }}",
    "{{ 'a\n' |indent(1000000000000) }}",
    growing("'aaaaaaaa'", "ns.x + ns.x"),
    growing("'aaaaaaaa'", "ns.x ~ ns.x"),
    growing("'aaaaaaaa'", "'%s%s' % (ns.x, ns.x)"),
    growing("'aaaaaaaa'", "ns.x.join([ns.x, ns.x, ns.x])"),
    growing("[1]", "[ns.x, ns.x]"),
    growing("[1]", "(ns.x, ns.x)"),
    growing("[1]", "{'a': ns.x, 'b': ns.x}"),
    growing("[1]", "dict(a=ns.x, b=ns.x)"),
    growing("[1]", "ns.x + ns.x"),
    growing("2", "ns.x * ns.x"),
    WIDE + "{{ a|replace('b', a) }}",
    WIDE + "{{ a.replace('b', a) }}",
    WIDE + "{{ a.join(range(99999)|map('string')) }}",
    WIDE + "{{ range(99999)|join(a) }}",
    WIDE + "{{ [a] * 100000 }}",
    WIDE + "{{ range(99999)|map('replace', '1', a)|list|length }}",
    WIDE + "{{ range(99999)|map('default', a)|map('string')|list|length }}",
    WIDE + WIDE.replace("set a", "set b") + "{{ ([a] * 50000)|sort }}",
    WIDE + "{% for i in range(99999) %}{% if a + 'x' in [a] %}{% endif %}{% endfor %}",
    WIDE + "{% for i in range(99999) %}{{ a.split(' ')|length }}{% endfor %}",
]


@pytest.mark.parametrize("template", BOMBS)
def test_templates_cannot_take_all_memory_or_time(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(FormatError):
        render(template)
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qinfer._template._MAX_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    with pytest.raises(FormatError, match="takes longer than"):
        render(loop)


def test_long_conversations_are_no_bomb() -> None:
    messages = [
        {"role": role, "content": "word " * 2000}
        for _ in range(200)
        for role in ("user", "assistant")
    ]
    text = render(CHATML.replace("message.content", "message.content.strip()|trim"), messages)
    assert text.count("word") == 400 * 2000
