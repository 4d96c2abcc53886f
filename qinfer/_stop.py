"""Stop strings: text passes through, except what is, or may still become, one of them."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through piece by piece and ends it before the first stop string.

    A stop string may span pieces: the end of the text that could be its beginning is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that is certain now; sets `stopped` when a stop string was completed."""
        held = self._held + text
        found = [at for at in map(held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        certain = len(held) - max((_beginning(held, stop) for stop in self._stops), default=0)
        self._held = held[certain:]
        return held[:certain]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
