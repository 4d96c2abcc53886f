"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import FileError

StrPath = str | os.PathLike[str]


@contextmanager
def whole_file(path: StrPath) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends; an exception leaves nothing behind.

    Raises FileError, naming the path, when the operating system refuses, and where there is a
    device or pipe, which would be replaced instead of written to.
    """
    import tempfile  # slow to import, and only needed here

    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            raise FileError(f"{target}: cannot write: it exists and is not a regular file")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                # On the disk before it has its name, or a power cut could leave the name alone.
                file.flush()
                os.fsync(file.fileno())
            # mkstemp keeps a file private; this one gets the mode that open() would have given it.
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(target)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{target}: cannot write: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
