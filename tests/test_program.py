"""Programs that signals end: with the status shells expect, and without half-written files."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qinfer._gguf import GGUF, Writer
from tool_program import run_tool

# The quantiser, which says when it has written some data, and then takes its time. How the test
# itself treats the signals is not inherited.
SLOW = """
import signal, sys, time

for name in ("SIGTERM", "SIGHUP"):
    signal.signal(signal.Signals[name], signal.SIG_IGN if name in sys.argv[4:] else signal.SIG_DFL)
del sys.argv[4:]

from qinfer._gguf import Writer
from qinfer._program import run
from qinfer.tools.quantize import command

write = Writer.write


def slow(self, data):
    write(self, data)
    print("writing", flush=True)
    time.sleep(1)


Writer.write = slow
run(command, "quantize")
"""


def start(source: Path, out: Path, *ignored: str) -> subprocess.Popen[bytes]:
    """A quantiser in the middle of its file; `ignored` are signals it was told to ignore."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW, source, out, "COPY", *ignored],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_leaves_nothing_behind(
    number: signal.Signals, status: int, stories260k: Path, tmp_path: Path
) -> None:
    with start(stories260k, tmp_path / "out.gguf") as process:
        (part,) = tmp_path.iterdir()
        assert part.name.startswith("out.gguf.")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    # Ctrl-C ends the line that shows it.
    assert errors.strip() == b""
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_keeps_away_stays_away(stories260k: Path, tmp_path: Path) -> None:
    with start(stories260k, tmp_path / "out.gguf", "SIGHUP") as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_what_a_killed_program_left_is_removed(stories260k: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with start(stories260k, out) as process:
        process.kill()
        process.communicate(timeout=60)
    (left,) = tmp_path.iterdir()
    others = [
        tmp_path / name
        for name in (
            "another.gguf.12-0.part",
            "out.gguf.12.part",
            "out.gguf.-0.part",
            "out.gguf.12-.part",
            "out.gguf.12-0.part.bak",
            "out.gguf..part",
        )
    ]
    for path in others:
        path.write_bytes(b"mine")
    (tmp_path / "out.gguf.13-0.part").mkdir()
    (tmp_path / "out.gguf.14-0.part").symlink_to(others[0])
    run_tool("quantize", stories260k, out, "COPY")
    assert not left.exists()
    assert len(GGUF(out).tensors) == len(GGUF(stories260k).tensors)
    assert all(path.read_bytes() == b"mine" for path in others)
    assert (tmp_path / "out.gguf.13-0.part").is_dir()
    assert (tmp_path / "out.gguf.14-0.part").is_symlink()


def test_what_another_program_is_writing_is_not_removed(stories260k: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with start(stories260k, out) as process:
        (part,) = tmp_path.iterdir()
        run_tool("quantize", stories260k, out, "COPY")
        assert sorted(tmp_path.iterdir()) == [out, part]
        process.terminate()
        process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == [out]


def test_writers_of_one_program_leave_each_other_alone(tmp_path: Path) -> None:
    first, second = (Writer(tmp_path / "x.gguf") for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 2
    for writer in (second, first):
        writer.add("general.architecture", "x")
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
