"""Files of one sequence of a context: versioned, bound to one model, whole or not there.

Layout, little-endian: magic, version (u32), number of tokens (u32), number of state bytes (u64),
the model's fingerprint (32 bytes), sha256 of all that follows (32 bytes), tokens (i32 each), their
roles (a byte each), state.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ._files import StrPath, whole_file
from ._gguf import path_bytes
from ._history import History
from .errors import FileError, FormatError

_MAGIC = b"QINFSEQ\0"
_VERSION = 2
_HEADER = struct.Struct("<8sIIQ32s32s")


def write(path: StrPath, model: bytes, history: History, data: NDArray[np.uint8]) -> None:
    """Writes a sequence; the file takes its name when it is complete."""
    ids = np.array(history.tokens, "<i4")
    digest = hashlib.sha256(ids.data)
    digest.update(history.roles)
    digest.update(data.data)
    header = _HEADER.pack(_MAGIC, _VERSION, len(ids), data.nbytes, model, digest.digest())
    with whole_file(os.fsdecode(path_bytes(path))) as file:
        file.write(header)
        file.write(ids.data)
        file.write(history.roles)
        file.write(data.data)


def read(path: StrPath, model: bytes) -> tuple[History, NDArray[np.uint8]]:
    """The tokens and the state of a file; refuses a damaged one, or another model's."""
    name = os.fsdecode(path_bytes(path))
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise FileError(f"{name}: cannot read the state: {error.strerror}") from error
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise FormatError(f"{name} is not a file written by Context.save_state")
    _, version, n_tokens, n_bytes, found, digest = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise FormatError(f"{name} has version {version}, this qinfer reads version {_VERSION}")
    expected = _HEADER.size + 5 * n_tokens + n_bytes
    if len(content) != expected:
        raise FormatError(f"{name} has {len(content)} bytes, its header says {expected}")
    if hashlib.sha256(memoryview(content)[_HEADER.size :]).digest() != digest:
        raise FormatError(f"{name} is damaged: its checksum does not match")
    if found != model:
        raise FormatError(f"{name} was written with another model than the one loaded")
    tokens = np.frombuffer(content, "<i4", n_tokens, _HEADER.size).tolist()
    start = _HEADER.size + 4 * n_tokens
    roles = bytearray(content[start : start + n_tokens])
    return History(tokens, roles), np.frombuffer(content, np.uint8, n_bytes, start + n_tokens)
