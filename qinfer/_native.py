"""The C library: its loading, its statuses as exceptions, its log. All use of cffi is here."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .errors import (
    ArgumentError,
    Busy,
    Cancelled,
    Closed,
    ContextFull,
    DeviceError,
    FileError,
    FormatError,
    InternalError,
    OutOfMemory,
    QInferError,
    UnsupportedError,
)

logger = logging.getLogger("qinfer")
logger.addHandler(logging.NullHandler())

LIBRARY_NAME = "libqinfer.so"
LOG_LINE_BYTES = 4096


def _load() -> tuple[Any, Any]:
    """The cffi module's `ffi` and the library beside it, found in agreement with each other."""
    try:
        definitions = importlib.import_module("qinfer._cdef")
    except ModuleNotFoundError as error:
        if error.name != "qinfer._cdef":
            raise
        raise ImportError(_only_sources(Path(__file__).parent)) from None
    ffi = definitions.ffi
    path = Path(str(definitions.__file__)).resolve().with_name(LIBRARY_NAME)
    try:
        # RTLD_LOCAL keeps our symbols from meeting those of another inference library in the
        # process.
        lib = ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_LOCAL)
    except OSError as error:
        raise ImportError(f"qinfer's library cannot be loaded: {error}; reinstall qinfer") from None
    _check_agreement(ffi, lib, path)
    return ffi, lib


def _only_sources(folder: Path) -> str:
    """What to do about sources that Python found without, or before, an installed package."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        installed = Path(str(distribution("qinfer").locate_file("qinfer")))
    except PackageNotFoundError:
        installed = folder
    # The package index has another project of this name.
    if installed.resolve() != folder.resolve() and (installed / "_cdef.py").is_file():
        return (
            f"Python looks at qinfer's sources in {folder} before the package installed in "
            f"{installed}: start it in another folder or as `python -P`, or run `pip install -e .` "
            "in the checkout"
        )
    return (
        f"qinfer is not installed, only its sources are here ({folder}): "
        "run `pip install -e .` in the checkout"
    )


def _check_agreement(ffi: Any, lib: Any, path: Path) -> None:
    """Compares the library's ABI version and struct sizes with those of the definitions."""
    found = lib.qi_abi_version()
    if found != lib.QI_ABI_VERSION:
        raise ImportError(
            f"{path} has ABI version {found}, this package needs {lib.QI_ABI_VERSION}: "
            "reinstall qinfer"
        )
    for name in ffi.list_types()[0]:
        if ffi.typeof(name).kind != "struct":
            continue
        try:
            expected = ffi.sizeof(name)
        except ffi.error:  # opaque; asking for its `fields` aborts in cffi 2.1
            continue
        size = lib.qi_struct_size(name.encode())
        if size != expected:
            raise ImportError(
                f"{path} has {size} bytes in struct {name}, this package expects "
                f"{expected}: reinstall qinfer"
            )


ffi, lib = _load()

_ERRORS: dict[int, type[QInferError]] = {
    lib.QI_FORMAT: FormatError,
    lib.QI_ARGUMENT: ArgumentError,
    lib.QI_IO: FileError,
    lib.QI_MEMORY: OutOfMemory,
    lib.QI_CONTEXT_FULL: ContextFull,
    lib.QI_CANCELLED: Cancelled,
    lib.QI_BUSY: Busy,
    lib.QI_UNSUPPORTED: UnsupportedError,
    lib.QI_DEVICE: DeviceError,
    lib.QI_INTERNAL: InternalError,
}

_OK: int = lib.QI_OK
_log_line = ffi.new("char[]", LOG_LINE_BYTES)
_log_lock = threading.Lock()


def new_error() -> Any:
    """A fresh qi_error for one call."""
    return ffi.new("qi_error *")


def check(status: int, error: Any = None) -> None:
    """Hands pending log lines to `logging`, then raises what `status` stands for unless QI_OK."""
    drain_log()
    if status != _OK:
        _raise(status, error)


def _raise(status: int, error: Any) -> NoReturn:
    message = ""
    if error is not None:
        message = ffi.string(error.message).decode("utf-8", "replace")
    raise _ERRORS.get(status, InternalError)(
        message or f"the runtime answered with status {status}"
    )


def drain_log() -> None:
    """Moves the runtime's pending log lines to the logger named "qinfer"."""
    # A second thread, or a handler that calls back into qinfer, leaves the lines to whoever is
    # draining already. `with` rather than a non-blocking acquire, because Ctrl-C cannot come
    # between taking the lock and the promise to free it.
    if _log_lock.locked():
        return
    with _log_lock:
        while level := lib.qi_log_next(_log_line, LOG_LINE_BYTES):
            logger.log(level, "%s", text(_log_line))


def text(field: Any) -> str:
    """A char array or NUL-terminated string as str."""
    return str(ffi.string(field).decode("utf-8", "replace"))


class Handle:
    """An owned C object, closed once its last user lets go of it.

    `close()` gives up this object's own reference; a call still running in another thread, or an
    array that looks into the object's memory, holds one of its own, so nothing is freed under its
    feet.
    """

    __slots__ = ("_pointer", "_process", "_what")

    def __init__(self, pointer: Any, close: Callable[[Any], None], what: str) -> None:
        self._process = os.getpid()
        self._what = what
        self._pointer = ffi.gc(pointer, partial(_close_in, self._process, os.getpid, close, lib))

    @property
    def pointer(self) -> Any:
        """The C pointer; keep it in a local variable for as long as it is used.

        Raises Closed after `close()` and in a forked child, where the runtime's threads do not
        exist.
        """
        pointer = self._pointer
        if pointer is None:
            raise Closed(f"{self._what} is closed")
        if os.getpid() != self._process:
            raise Closed(
                f"{self._what} belongs to process {self._process}, of which this one is a fork: "
                "open it again here, or use the `spawn` start method"
            )
        return pointer

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._pointer is None

    def close(self) -> None:
        """Gives up the object; calling it again does nothing."""
        self._pointer = None


def _close_in(
    process: int,
    getpid: Callable[[], int],
    close: Callable[[Any], None],
    library: Any,
    pointer: Any,
) -> None:
    """Closes a pointer in the process that made it; `library` is held to keep it loaded."""
    if getpid() == process:
        close(pointer)


def view(owner: Any, address: Any, n_bytes: int) -> Any:
    """Read access to `n_bytes` of an owner's memory; the buffer keeps the owner alive."""
    if n_bytes == 0:
        return b""
    held = ffi.gc(ffi.cast("char *", address), partial(_let_go, owner))
    return ffi.buffer(held, n_bytes)


def _let_go(owner: Any, address: Any) -> None:
    """The destructor of a view: what it holds is released with it."""
