"""Runs a command line as a program: errors are one line on standard error and a status."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import click

from .errors import ArgumentError, OutOfMemory, QInferError

# What shells report of a program that a signal ended is this and its number.
_SIGNALLED = 128
_INTERRUPTED = _SIGNALLED + signal.SIGINT


def run(
    command: click.Command, name: str, spoken: Callable[[str], str] = lambda message: message
) -> NoReturn:
    """Runs a command with the program's arguments; `name` is how it was called.

    `spoken` words the package's messages for whoever calls it by a command line.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end the program.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    _show_warnings(spoken)
    _end_orderly()
    try:
        command.main(sys.argv[1:] or ["--help"], prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        used = error.ctx.command_path if error.ctx is not None else name
        _fail(f"{error.format_message()} (see {used} --help)", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ArgumentError, OutOfMemory) as error:
        _fail(spoken(str(error)), 1)
    except (QInferError, OSError, UnicodeDecodeError) as error:
        _fail(str(error), 1)
    sys.exit(0)


def _end_orderly() -> None:
    """Makes SIGTERM and SIGHUP unwind as Ctrl-C does, so that no half-written file stays."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        # Only once, or another signal would interrupt the unwinding; SIGKILL is left for haste.
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(_SIGNALLED + number)

    # A program started by nohup ignores SIGHUP, and goes on doing so.
    signals = [
        each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL
    ]
    for each in signals:
        signal.signal(each, end)


class _Format(logging.Formatter):
    """ "warning: text", as errors look."""

    def __init__(self, spoken: Callable[[str], str]) -> None:
        super().__init__()
        self._spoken = spoken

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {self._spoken(record.getMessage())}"


def _show_warnings(spoken: Callable[[str], str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Format(spoken))
    logger = logging.getLogger("qinfer")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    if sys.stderr.isatty():  # as bars are
        logging.getLogger("qinfer.slow").setLevel(logging.INFO)


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
