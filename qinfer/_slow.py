"""Says, to the logger "qinfer.slow", what takes long; the command line shows it in a terminal."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("qinfer.slow")

_DELAY_SECONDS = 1.0


@contextmanager
def said_if_slow(message: str) -> Iterator[None]:
    """Logs the message when what is done in this block is not done soon."""
    timer = threading.Timer(_DELAY_SECONDS, logger.info, ["%s", message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
