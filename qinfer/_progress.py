"""Progress bars on standard error, when it is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


# What is done sooner needs no bar.
_DELAY_SECONDS = 0.3


class Bar:
    """A bar that appears when something takes a while, and goes at its end.

    An instance is a callable of (done, total), as `progress=` takes it. Unless standard error is a
    terminal nothing is ever shown.
    """

    def __init__(self, label: str, *, in_bytes: bool = False) -> None:
        self._label = label
        self._in_bytes = in_bytes
        self._start = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        waited = time.monotonic() - self._start > _DELAY_SECONDS
        if self._progress is None and done < total and waited and sys.stderr.isatty():
            self._show(total)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
            if done >= total:
                self.close()

    def _show(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            self._label,
            BarColumn(),
            DownloadColumn() if self._in_bytes else MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(self._label, total=total)
        self._progress.start()

    def close(self) -> None:
        """Takes the bar away; calling it again does nothing."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
