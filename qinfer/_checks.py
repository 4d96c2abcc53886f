"""Checks of arguments: each returns the value in the type it is used in, or raises ArgumentError.

NumPy's scalars are numbers like Python's; True and False are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from .errors import ArgumentError

# The greatest size that the runtime takes.
INT32_MAX = 2**31 - 1


def one_of(name: str, value: object, choices: Iterable[str]) -> str:
    """A value that must be one of a few texts."""
    known = [repr(choice) for choice in choices]
    if not isinstance(value, str) or repr(value) not in known:
        raise ArgumentError(f"{name}={value!r:.80} is not {', '.join(known[:-1])} or {known[-1]}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether a value is of a type of integers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive(name: str, value: int | None) -> int:
    """A size for the runtime: 0 for None, else the value, which must be positive."""
    if value is None:
        return 0
    if not is_integer(value) or not 1 <= value <= INT32_MAX:
        raise ArgumentError(f"{name}={value!r} is not a positive integer")
    return int(value)


def flag(name: str, value: object) -> bool:
    """A value that must be True or False: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}={value!r:.80} is neither True nor False")
    return value
