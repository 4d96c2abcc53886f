"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import ArgumentError

_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
# More digits than sizes have are no size.
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*([A-Za-z]*)\s*")


def parse_size(text: str, *, bare: str = "B") -> int:
    """Bytes of a size such as "6GiB", "1.5 GB" or "4096"; a fraction of a byte is dropped.

    `bare` is the unit of a number without one. Raises ArgumentError for anything else.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get((match[2] or bare).upper()) if match else None
    if match is None or unit is None:
        unit_name = "bytes" if bare == "B" else bare
        raise ArgumentError(
            f"{text!r} is not a size: write a number of {unit_name}, or one with KiB, MiB, GiB"
        )
    return int(Fraction(match[1]) * unit)
