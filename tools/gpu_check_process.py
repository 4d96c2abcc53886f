"""A part of gpu_check.py in a process of its own, which may crash or hang, and is ended in time."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from gpu_check_parts import FAILED, Result

ALL_OF_IT = "all of it"  # the name of a result that is about the process itself
TOO_LONG = "took longer than"  # how it says that time was up
# A process that the driver holds fast does not even die; it is left behind.
_SECONDS_TO_DIE = 10.0


def own_status(status: int) -> str:
    """What is wrong with the status of a part's process."""
    return f"ended with status {status}" if status else ""


def results_of(
    part: str,
    command: list[str],
    seconds: float,
    status_is: Callable[[int], str] = own_status,
    silence: float | None = None,
) -> Iterator[Result]:
    """What a process prints, as it prints it; it is ended, with its children, when time is up.

    Args:
        part: whose results they are.
        command: the program and its arguments; it prints results as lines of JSON.
        seconds: how long it may take.
        status_is: tells what is wrong with an exit status, if anything.
        silence: how many seconds may pass without a result; None: as many as there are.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        problem, others = "", list[str]()
        quiet_until = deadline if silence is None else min(deadline, time.monotonic() + silence)
        try:
            while line := lines.get(timeout=max(0, quiet_until - time.monotonic())):
                try:
                    result = Result(**json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    others.append(line)  # as a sanitizer prints
                    continue
                yield result
                if silence is not None:
                    quiet_until = min(deadline, time.monotonic() + silence)
            problem = status_is(process.wait(max(0, deadline - time.monotonic())))
        except (queue.Empty, subprocess.TimeoutExpired):
            problem = f"{TOO_LONG} {seconds:.0f} s"
            if silence is not None and time.monotonic() < deadline:
                problem = f"hangs: silent for {silence:.0f} s"
        finally:
            _end(process)
        if problem:
            said.seek(0)
            words = ["".join(others)[-2000:].strip(), said.read()[-2000:].strip()]
            last = "\n".join(filter(None, words))
            yield Result(part, ALL_OF_IT, FAILED, problem + (f": {last}" if last else ""))


def _pass_on(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout
    try:
        for line in process.stdout:
            lines.put(line)
    finally:
        lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and its children, if it has not ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_DIE)
