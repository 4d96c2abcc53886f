"""A program in a terminal of its own, for tests that look at what a person would see."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import time


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: list[str], kind: str = "dumb") -> None:
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], command, {**os.environ, "TERM": kind, "COLUMNS": "100"})
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Reads until `text` comes; gives what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._file], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                data = os.read(self._file, 4096)
            except OSError:  # how Linux says that the program is gone
                data = b""
            assert data, f"ended before {text!r}: {self.seen!r}"
            self.seen += data.decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def rest(self) -> str:
        """Reads until the program ends."""
        with contextlib.suppress(OSError):
            while data := os.read(self._file, 4096):
                self.seen += data.decode("utf-8", "replace")
        return self.seen

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def end(self) -> int:
        """The status the program ends with."""
        with contextlib.suppress(OSError):
            while os.read(self._file, 4096):
                pass
        _, status = os.waitpid(self._pid, 0)
        os.close(self._file)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.end()
