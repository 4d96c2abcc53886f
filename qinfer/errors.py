"""The exceptions qinfer raises: one root, one leaf per cause, each also a fitting built-in."""

from __future__ import annotations


class QInferError(Exception):
    """Root of every exception that qinfer raises on purpose."""


class FormatError(QInferError, ValueError):
    """A file is not what it should be; the message names the file and the key, tensor or offset."""


class ArgumentError(QInferError, ValueError):
    """A parameter is out of range or inconsistent; the message names it and its legal range."""


class UnsupportedError(QInferError, ValueError):
    """A file is well-formed but asks for something this runtime does not do."""


class ContextFull(QInferError, ValueError):
    """Tokens do not fit in the context; the message states how many there are and how many fit."""


class DeviceError(QInferError, RuntimeError):
    """A device asked for by name is missing or failed."""


class Busy(QInferError, RuntimeError):
    """Another thread is inside this context; give each thread a context of its own."""


class Closed(QInferError, RuntimeError):
    """The object was closed, or belongs to the process this one was forked from."""


class InternalError(QInferError, RuntimeError):
    """A defect of qinfer itself; please report it with its message."""


class OutOfMemory(QInferError, MemoryError):
    """An allocation failed; the message says of what and how large."""


class FileError(QInferError, OSError):
    """The operating system refused to open, read, write or map a file."""


class Cancelled(QInferError):
    """The computation was cancelled by `Context.cancel`; the context is as it was before."""
