"""Jinja templates from strangers: rendered in a sandbox, with a budget for the work they may make.

A chat template comes with a model file, so it is untrusted code. Jinja's sandbox keeps it away from
Python's internals but lets it allocate terabytes in one expression. Here every operation that makes
text or containers pays for their size, beforehand where it could multiply what it is given.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from itertools import chain
from types import NoneType, TracebackType
from typing import Any, NoReturn

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from markupsafe import Markup

from .errors import ArgumentError, FormatError

_MAX_SOURCE = 1 << 18  # characters
_MAX_SECONDS = 10.0
# Characters and items that may be made: so many, and some more for each one passed in.
_BASE_WORK = 1 << 25
_WORK_PER_INPUT = 64
_WORK_PER_ITERATION = 16
_REFERENCE = 8  # bytes of an item in a list
_PIECE = 64  # bytes of a short string
_NODE = 16  # of walking over one value
_MAX_INT_BITS = 4096
_MAX_INDENT = 16
_MAX_PLACES = 30


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Methods that make no more text than they are called on, but for `join` and `replace`.
_TEXT_METHODS = _names(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper"""
)
_METHODS: dict[type, frozenset[str]] = {
    str: _TEXT_METHODS,
    Markup: _TEXT_METHODS,
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    float: frozenset(("is_integer",)),
    int: frozenset(),
    bool: frozenset(),
    range: frozenset(),
}
# Jinja's own filters, by how often they read the whole of what they are given: not at all, once to
# change its text, or many times to compare its items.
_SHALLOW_FILTERS = _names(
    """abs attr count d default first items last length map reject rejectattr reverse select
    selectattr"""
)
_TEXT_FILTERS = _names("capitalize e escape float int lower safe title trim truncate upper")
_SORTING_FILTERS = _names("dictsort groupby max min sort unique")
_COMPARING_TESTS = _names("eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in")
_SEQUENCES = (str, list, tuple)
_GLOBALS = _names("range dict namespace cycler joiner")
# Widths in "%999999d" make text out of nothing.
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\*|[0-9]{3})")
_TIME_FORMAT = re.compile(r"(?:[^%\0]|%[-_0^#]?[A-Za-z%]){0,200}")


class _RefusalError(TemplateError):
    """What a template says by `raise_exception`: the messages are not such as it renders."""


class _Budget:
    """The work that is left, and the time at which rendering must be over."""

    def __init__(self, work: int) -> None:
        self._work = work
        self._end = time.monotonic() + _MAX_SECONDS

    def spend(self, amount: int) -> None:
        self._work -= amount
        if self._work < 0:
            raise SecurityError("it makes too much text or goes round too often")

    def check_time(self) -> None:
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes longer than {_MAX_SECONDS:.0f} seconds")


_budget: ContextVar[_Budget] = ContextVar("budget")


def _spend(amount: int) -> None:
    _budget.get().spend(amount)


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return _REFERENCE * len(value) if isinstance(value, (list, tuple, dict)) else 1


def _measure(value: object, *, as_text: bool = True) -> tuple[int, int]:
    """Pays for a value's text: an upper bound on its characters, and how deep it is nested.

    Raises SecurityError, unless `as_text` is false, for objects that have no business in a text.
    Paying while walking stops early at a structure that holds itself many times over.
    """
    total = deepest = 0
    levels: list[Iterator[object]] = [iter((value,))]
    while levels:
        deepest = max(deepest, len(levels))
        for item in levels[-1]:
            size = _NODE
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length() // 3
            elif as_text and not isinstance(
                item, (float, Undefined, dict, list, tuple, range, NoneType)
            ):
                raise SecurityError(f"it uses a {type(item).__name__} as text")
            _spend(size)
            total += size
            if isinstance(item, dict):
                levels.append(chain.from_iterable(item.items()))
                break
            if isinstance(item, (list, tuple, range)):
                levels.append(iter(item))
                break
        else:
            levels.pop()
    return total, deepest


def _check_indent(indent: object) -> None:
    width = len(indent) if isinstance(indent, str) else indent
    if isinstance(width, int) and width > _MAX_INDENT:
        raise SecurityError(f"it indents by {width}, more than {_MAX_INDENT}")


def _check_format(template: str, values: object) -> None:
    if _WIDE_FORMAT.search(template):
        raise SecurityError(f"it formats with widths or precisions, by {template!r:.80}")
    size, _ = _measure(values)
    _spend(template.count("%") * size)


def _pay_replace(text: str, old: str, new: str) -> None:
    _spend(len(text) + text.count(old) * len(new))


# ---- filters and functions that Jinja has not, or that could multiply what they are given ----


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [*map(make_attrgetter(context.environment, attribute), items)]
    _measure(items)
    _spend(len(items) * _length(d))
    return str(d).join(map(str, items))


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = _string(s), _string(old), _string(new)
    _pay_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    template = _string(value)
    _check_format(template, [*args, kwargs])
    return template % (kwargs or args)


def _indent(s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    _check_indent(width)
    text = _string(s)
    _spend((text.count("\n") + 1) * _MAX_INDENT)
    return FILTERS["indent"](text, width, first, blank)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: Jinja's own filter escapes it for HTML."""
    _check_indent(indent)
    size, depth = _measure(value)
    _spend(size * (6 + (0 if indent is None else _MAX_INDENT * depth)))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _string(value: Any) -> str:
    _measure(value)
    return str(value)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > _MAX_PLACES:
        raise SecurityError(f"it rounds to {precision} places, more than {_MAX_PLACES}")
    return FILTERS["round"](value, precision, method)


def _strftime_now(format: str) -> str:
    if not _TIME_FORMAT.fullmatch(format):
        raise SecurityError(f"it asks for the time as {format!r:.80}")
    return datetime.now().strftime(format)


def _raise_exception(message: object) -> NoReturn:
    raise _RefusalError(_string(message))


def _paid(function: Callable[..., Any], reads: int, *, items: bool = False) -> Callable[..., Any]:
    """A filter or test that pays for the text of what it is given, read `reads` times.

    `items` says that it makes a list of what it is given.
    """
    place = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _spend(sum(map(_length, args)))
        value = args[place]
        if items:
            _spend(_PIECE * len(value) if isinstance(value, str) else 0)
            value = value if isinstance(value, (str, dict)) else list(value)
        if reads:
            _spend(reads * _measure([value, *args[place + 1 :]], as_text=False)[0])
        result = function(*args[:place], value, *args[place + 1 :], **kwargs)
        _spend(_length(result))
        return result

    return run


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; its text is what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    # Taking the context keeps Jinja from evaluating constants while it compiles, without a budget.
    _measure(value)
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with its budget; what begins with `paid` is called by rewritten nodes."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.filters = {
            **{name: _paid(FILTERS[name], 0) for name in _SHALLOW_FILTERS},
            **{name: _paid(FILTERS[name], 1) for name in _TEXT_FILTERS},
            **{name: _paid(FILTERS[name], 16, items=True) for name in _SORTING_FILTERS},
            "list": _paid(FILTERS["list"], 0, items=True),
            "format": _format,
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "round": _round,
            "string": _string,
            "tojson": _to_json,
        }
        tests: dict[str, Any] = {**TESTS}
        self.tests = tests | {name: _paid(tests[name], 1) for name in _COMPARING_TESTS}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def paid_iteration(self, n_characters: int) -> None:
        _spend(_WORK_PER_ITERATION + n_characters)
        _budget.get().check_time()

    def paid_concat(self, *parts: Any) -> str:
        _measure(parts)
        return "".join(map(str, parts))

    def paid_value(self, value: Any) -> Any:
        _measure(value, as_text=False)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "*" and isinstance(left, _SEQUENCES) and isinstance(right, int):
            _spend(max(right, 0) * _measure(left)[0])
        elif operator == "*" and isinstance(right, _SEQUENCES) and isinstance(left, int):
            _spend(max(left, 0) * _measure(right)[0])
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}
            if bits.get(operator, 0) > _MAX_INT_BITS:
                raise SecurityError(f"it computes a number of more than {_MAX_INT_BITS} bits")
        else:
            _spend(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if owner is self:
            return obj(*args)
        if isinstance(owner, str):
            args = _pay_method(owner, obj.__name__, args)
        elif isinstance(owner, (list, tuple)):
            _measure([owner, args], as_text=False)
        result = super().call(context, obj, *args, **kwargs)
        if obj is dict:
            _measure(result, as_text=False)
        _spend(_length(result))
        return result

    # `format` of a str is refused before Jinja wraps it: its widths, too, make text out of nothing.

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str) and not self.is_safe_attribute(obj, attribute, None):
            return self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and isinstance(argument, str):
            return self.getattr(obj, argument)
        result = super().getitem(obj, argument)
        if isinstance(argument, slice):
            _spend(_length(result))
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = _METHODS.get(type(obj))
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)


def _pay_method(owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pays for a method of a string; returns its arguments, with an iterator's items as a list."""
    _spend(len(owner))
    if name == "replace":
        _pay_replace(owner, args[0], args[1])
    elif name == "join":
        items = list(args[0])
        _measure(items)
        _spend(len(items) * len(owner))
        return (items,)
    elif name in ("split", "rsplit", "splitlines"):
        known = bool(args) and isinstance(args[0], str) and args[0] != ""
        _spend(_PIECE * (owner.count(args[0]) if known else len(owner) // 2))
    return args


def _rewrite(node: nodes.Node, environment: _Environment) -> None:
    """Puts the calls that pay into a template's tree: at each iteration, literal and comparison."""

    def paid(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name, lineno=lineno)
        call = nodes.Call(function, args, [], None, None, lineno=lineno)
        call.set_environment(environment)
        return call

    def rewritten(child: Any) -> Any:
        if not isinstance(child, nodes.Node):
            return child
        _rewrite(child, environment)
        if isinstance(child, nodes.Concat):
            return paid("paid_concat", child.nodes, child.lineno)
        is_target = isinstance(child, nodes.Tuple) and child.ctx != "load"
        if isinstance(child, (nodes.List, nodes.Tuple, nodes.Dict)) and not is_target:
            return paid("paid_value", [child], child.lineno)
        return child

    for name, value in list(node.iter_fields()):
        is_list = isinstance(value, list)
        setattr(node, name, [*map(rewritten, value)] if is_list else rewritten(value))
    if isinstance(node, (nodes.Compare, nodes.Operand)):
        node.expr = paid("paid_value", [node.expr], node.lineno)
    elif isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
        fixed = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        cost = paid("paid_iteration", [nodes.Const(fixed)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(cost, lineno=node.lineno))


class Template:
    """A compiled template; `name` stands for it in messages. Threads may share it.

    Raises FormatError when it is no valid Jinja template.
    """

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        if len(source) > _MAX_SOURCE:
            raise FormatError(f"{name} has {len(source)} characters, more than {_MAX_SOURCE}")
        environment = _Environment()
        try:
            tree = environment.parse(source)
            _rewrite(tree, environment)
            self._template: JinjaTemplate = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise FormatError(f"{name}, line {error.lineno}: {error.message}") from None
        except Exception as error:
            raise FormatError(f"{name} cannot be compiled: {error}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables: str, int, float, bool, None, and lists and dicts of them.

        Raises ArgumentError when the template refuses them by `raise_exception`, FormatError when
        it fails, reaches for what is not its business, or takes too much time or memory.
        """
        # Measuring the variables themselves must not fail.
        token = _budget.set(_Budget(1 << 62))
        try:
            size, _ = _measure(dict(variables))
            _budget.set(_Budget(_BASE_WORK + _WORK_PER_INPUT * size))
            chunks = []
            for chunk in self._template.generate(**variables):
                _spend(len(chunk))
                chunks.append(chunk)
            return "".join(chunks)
        except _RefusalError as refusal:
            raise ArgumentError(f"{self._name} refuses the messages: {refusal}") from None
        except Exception as error:
            line = _line(error.__traceback__)
            where = f"{self._name}, line {line}" if line else self._name
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise FormatError(f"{where}: {kind}{error}") from None
        finally:
            _budget.reset(token)


def _line(traceback: TracebackType | None) -> int | None:
    """The line of the template that failed."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
