"""Runs a tool as the program it is."""

from __future__ import annotations

import os
import subprocess
import sys


def run_tool(name: str, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A run of `python -m qinfer.tools.NAME` that ends with a status."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"qinfer.tools.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == status, done.stderr
    return done
