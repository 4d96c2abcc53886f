"""The contexts a model keeps between calls, so that the next prompt need not start from nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from .context import Context

# There are only ever as many as callers at one time; beyond these, memory is worth more.
_MAX_IDLE = 4


class ContextPool:
    """Gives each caller a context of its own: the idle one that holds most of the prompt."""

    def __init__(self, make: Callable[[], Context]) -> None:
        self._make = make
        self._idle: list[Context] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self, prompt: Sequence[int]) -> Context:
        """A context that nobody else uses until it is given back."""
        with self._lock:
            if self._idle:
                best = max(self._idle, key=lambda context: _most_shared(context, prompt))
                self._idle.remove(best)
                return best
        return self._make()

    def give_back(self, context: Context) -> None:
        """Keeps a context for the next caller."""
        with self._lock:
            # One that found no room on the GPU may find it when it is made again.
            if not self._closed and len(self._idle) < _MAX_IDLE and not context.lacks_gpu:
                self._idle.append(context)
                return
        context.close()

    def free_idle(self) -> bool:
        """Closes the idle contexts, whose memory somebody needs; whether there were any."""
        with self._lock:
            idle, self._idle = self._idle, []
        for context in idle:
            context.close()
        return bool(idle)

    def close(self) -> None:
        """Closes the idle contexts, and those given back later."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for context in idle:
            context.close()


def _most_shared(context: Context, prompt: Sequence[int]) -> int:
    return max(context.n_shared(prompt, seq) for seq in range(context.n_seq))
