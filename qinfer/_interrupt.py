"""Long C calls that Ctrl-C can stop: they run in a thread of their own while the caller waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

POLL_SECONDS = 0.05


def run_interruptibly(
    call: Callable[[], int],
    cancel: Callable[[], None],
    poll: Callable[[], None] | None = None,
) -> int:
    """Runs `call` in another thread and returns its result.

    Whatever interrupts the wait (KeyboardInterrupt, an exception of a signal handler or of `poll`,
    which is called about twenty times a second) cancels the call, waits for its end, and is raised.
    """
    gate = threading.Lock()
    done = threading.Event()
    results: list[int] = []
    running = abandoned = False

    def work() -> None:
        nonlocal running
        with gate:
            if abandoned:
                return
            running = True
        try:
            results.append(call())
        finally:
            done.set()

    try:
        threading.Thread(target=work, name="qinfer call", daemon=True).start()
        # Not one long wait: a signal that another thread received does not end it.
        while not done.wait(POLL_SECONDS):
            if poll is not None:
                poll()
    except BaseException:
        while True:
            # Whatever happens meanwhile: the caller's memory is in use until the call has ended.
            with suppress(BaseException):
                # The thread may not have come as far as the call; then the gate stops it there.
                with gate:
                    abandoned = True
                if running:
                    cancel()
                    done.wait()
                break
        raise
    return results[0]
