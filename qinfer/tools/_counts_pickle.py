"""The pickle in which the first split solvers left their result, read without running it."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path

from .._files import StrPath
from ..errors import FileError, FormatError

# What a list of numbers, or of lists of them, is pickled with, by any protocol. None of these
# imports, calls or builds anything.
_ALLOWED = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT",
    "GET", "BINGET", "LONG_BINGET",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT",
    "LIST", "EMPTY_LIST", "APPEND", "APPENDS",
    "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}

# The counts of a thousand layers take a few kilobytes.
_MAX_BYTES = 1 << 20


def read_counts_pickle(path: StrPath) -> list[tuple[int, int]]:
    """Neurons on the GPU per layer: those of gate and up, and those of down.

    The file holds a list with a number per layer, as of PowerInfer's solver, or with a pair of
    them, as of Q-Infer's; numbers may be floats. A file that holds or does anything else is refused
    before it is unpickled.

    Raises:
        FileError: the file cannot be read.
        FormatError: it is not such a file; the message says what was found.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise FormatError(f"{path}: over {_MAX_BYTES} bytes are no list of counts")
    try:
        _check_opcodes(path, content)
        counts = pickle.loads(content)
    except FormatError:
        raise
    # The modules do not say what they raise on damaged input; it is many things.
    except Exception as error:
        raise FormatError(f"{path}: is not a pickle, or a damaged one: {error}") from error
    if not isinstance(counts, (list, tuple)) or not counts:
        raise FormatError(f"{path}: holds {_short(counts)}, not a list with a count per layer")
    return [_layer(path, layer, value) for layer, value in enumerate(counts)]


def _check_opcodes(path: StrPath, content: bytes) -> None:
    """Refuses a pickle that does anything but list numbers."""
    for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
        if opcode.name not in _ALLOWED:
            what = f" ({_short(argument)})" if argument is not None else ""
            raise FormatError(
                f"{path}: refused: a list of counts needs no {opcode.name}{what} in its pickle"
            )
        # The unpickler makes its memo as large as the largest index.
        if opcode.name in _PUTS and isinstance(argument, int) and argument > len(content):
            raise FormatError(f"{path}: refused: memo index {argument} in a short pickle")


def _layer(path: StrPath, layer: int, value: object) -> tuple[int, int]:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise FormatError(f"{path}: layer {layer} has {len(pair)} counts; one, or one for down too")
    for count in pair:
        if isinstance(count, bool) or not isinstance(count, (int, float)):
            raise FormatError(f"{path}: layer {layer} has {_short(count)}, which is not a count")
        if not 0 <= count < 2**31 or count != int(count):
            raise FormatError(f"{path}: layer {layer} has {_short(count)}, which is not a count")
    return int(pair[0]), int(pair[1])


def _short(value: object) -> str:
    if not isinstance(value, (int, float, str)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
