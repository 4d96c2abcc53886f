"""Runs a tool's command line: errors are one line on standard error and a status."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import click

from ..errors import QInferError

_INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


def run(command: click.Command, name: str) -> NoReturn:
    """Runs a command with the program's arguments; `name` is how it was called."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        command.main(sys.argv[1:] or ["--help"], prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        _fail(f"{error.format_message()} (see {name} --help)", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except (QInferError, OSError) as error:
        _fail(str(error), 1)
    sys.exit(0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
