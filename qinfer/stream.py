"""Streams: an answer piece by piece, which can be stopped at any time."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from ._generate import Answer, run
from ._pool import ContextPool
from .completion import Completion, Piece
from .context import Context
from .errors import Busy, Cancelled, Closed


class Stream(Iterator[Piece]):
    """The pieces of one answer, computed as they are asked for.

    Made by `Model.stream` and `Model.stream_chat`. The last piece has a `finish_reason`. Closing
    the stream, leaving its `with` block or dropping it stops the work and gives the context back to
    the model. Iterating raises what `Context.feed` raises.
    """

    def __init__(self, answer: Answer, pool: ContextPool) -> None:
        self._answer = answer
        self._switch = _Switch()
        # The generator does not refer to the stream, so that dropping the stream ends it.
        self._pieces = _pieces(answer, pool, self._switch)
        self._lock = threading.Lock()

    def __next__(self) -> Piece:
        if self._lock.locked():
            raise Busy("this stream is in use by another thread; give each thread its own")
        with self._lock:
            return next(self._pieces)

    @property
    def completion(self) -> Completion | None:
        """The whole answer once its last piece has come, None before."""
        return None if self._answer.finish_reason is None else self._answer.completion()

    def cancel(self) -> None:
        """From any thread: ends the stream within milliseconds, its last piece "cancelled"."""
        self._switch.cancel()

    def close(self) -> None:
        """Stops the work; calling it again does nothing.

        While a piece is being computed, in another thread or below a `progress` callback, this only
        cancels: whoever waits for the piece gets one that says "cancelled".
        """
        if self._lock.locked():
            self.cancel()
            return
        with self._lock:
            self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Switch:
    """Cancels the context of a stream while the stream has one."""

    def __init__(self) -> None:
        self.cancelled = False
        self._context: Context | None = None
        self._lock = threading.Lock()

    def attach(self, context: Context) -> None:
        """From here on `cancel` reaches the context; one that came before does so now."""
        with self._lock:
            self._context = context
            if self.cancelled:
                context.cancel()

    def detach(self) -> None:
        """The context is no longer the stream's, and keeps nothing of its cancelling."""
        with self._lock:
            context, self._context = self._context, None
            if context is not None and not context.closed:
                context.clear_cancel()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._context is not None:
                with suppress(Closed):
                    self._context.cancel()


def _pieces(answer: Answer, pool: ContextPool, switch: _Switch) -> Generator[Piece, None, None]:
    context = pool.take(answer.prompt)
    try:
        before = context.stats()
        switch.attach(context)
        try:
            for _, piece in run(context, [answer]):
                if piece.finish_reason is not None:
                    answer.account(context, before)
                yield piece
        except Cancelled:
            if not switch.cancelled:
                raise
            answer.account(context, before)
            yield answer.finish("cancelled")
    finally:
        switch.detach()
        pool.give_back(context)


async def asynchronous(stream: Stream) -> AsyncGenerator[Piece, None]:
    """A stream's pieces, each computed in a thread, so that the event loop stays free."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    loop = asyncio.get_running_loop()
    # One thread: closing waits its turn behind a piece that is still being computed.
    executor = ThreadPoolExecutor(1, "qinfer stream")
    try:
        while (piece := await loop.run_in_executor(executor, next, stream, None)) is not None:
            yield piece
    finally:
        stream.cancel()
        await loop.run_in_executor(executor, stream.close)
        executor.shutdown(wait=False)
