"""What commands say of a GPU that computes; the stand-in is the GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cuda_standin
from terminal import Terminal
from test_cuda_model import DATA, STORIES, kernel_cache

MAIN = "import sys; sys.argv[0] = 'qinfer'; from qinfer.cli import main; main()"
SMALL = DATA / "stories260K.F32.gguf"
N_LAYER, N_NEURONS = 5, 5 * 172


def environment() -> dict[str, str]:
    return cuda_standin.environment() | {"QINFER_CACHE_DIR": kernel_cache()}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", MAIN, *map(str, words)],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little girl who loved to play in the park. " * 8)
    return path


def kept_whole(placement: dict[str, Any]) -> bool:
    counts = (placement["n_layers"], placement["n_neurons"], placement["has_head"])
    return counts == (N_LAYER, N_NEURONS, True)


def test_run_tells_what_the_gpu_kept() -> None:
    words = ("run", SMALL, "-p", "Once upon a time", "-n", 40, "--temp", 0, "--device", "cuda")
    whole = json.loads(run(*words, "--json").stdout)
    assert kept_whole(whole["placement"])
    assert 0 < whole["placement"]["used_bytes"] <= whole["placement"]["budget_bytes"]
    assert (whole["placement"]["n_moved"], whole["kv_host_shares"]) == (0, [0.0] * N_LAYER)
    host = json.loads(run(*words, "--kv-mode", "host", "--json").stdout)
    assert host["kv_host_shares"] == [1.0] * N_LAYER
    cpu = json.loads(run(*words[:-1], "cpu", "--json").stdout)
    assert (cpu["placement"], cpu["kv_host_shares"]) == (None, None)
    assert whole["text"] == host["text"] == cpu["text"]

    table = run(*words, "--kv-mode", "host", "--stats").stderr.splitlines()
    placed = (
        r"GPU Stand-in GPU 0 \(cuda:0\): 5 of 5 layers' attention, head, .*100 % of the neurons"
    )
    assert re.match(placed, table[1])
    assert table[2].endswith("KV CPU")
    assert [line.split()[-1] for line in table[3:]] == ["100.0%"] * (N_LAYER + 1)
    assert "KV CPU" not in run(*words, "--stats").stderr


def test_bench_tells_what_the_gpu_kept() -> None:
    words = ("bench", SMALL, "-p", 8, "-n", 2, "-r", 1, "--device", "cuda", "-c", 64)
    found = json.loads(run(*words, "--json").stdout)
    assert kept_whole(found["placement"])
    assert found["kv_host_shares"] == [0.0] * N_LAYER
    # Fewer positions take less of the card.
    larger = json.loads(run(*words[:-1], 512, "--json").stdout)
    assert found["placement"]["used_bytes"] < larger["placement"]["used_bytes"]


def test_perplexity_and_profile_tell_what_the_gpu_kept(text: Path, tmp_path: Path) -> None:
    placed = "\nGPU Stand-in GPU 0 (cuda:0): 6 of 6 layers' attention"
    words = (STORIES, "-f", text, "-c", 24, "--chunks", 1, "--device", "cuda")
    measured = run("perplexity", *words, "--sparsity", "predict").stdout
    assert placed in measured
    assert re.search(r"^Neurons: .* of those due missed$", measured, re.MULTILINE)
    assert placed in run("profile", *words, "--no-plot", "-o", tmp_path).stdout


@pytest.fixture
def watch() -> Iterator[Any]:
    """Runs code in a terminal, on the stand-in."""
    terminals: list[Terminal] = []

    def start(code: str, *words: object, **variables: object) -> Terminal:
        settings = {name: str(value) for name, value in variables.items()}
        terminals.append(
            Terminal(
                ["env", *(f"{k}={v}" for k, v in (environment() | settings).items()),
                 sys.executable, "-P", "-c", code, *map(str, words)], "xterm",
            )
        )  # fmt: skip
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.kill()


# The kernels' tests without their work, and a cache where nothing is noted yet.
FIRST_USE = """
from qinfer import _cuda, _cuda_check, _slow
import os, pathlib
_cuda.configure()
os.environ["QINFER_CACHE_DIR"] = os.environ["NOTED_IN"]
_cuda_check._cuda.self_tests = lambda number, numbers: iter(())
_slow._DELAY_SECONDS = 0
"""


def test_the_first_use_of_a_gpu_says_what_takes_long(watch: Any, tmp_path: Path) -> None:
    words = ("run", SMALL, "-p", "Once", "-n", 2)
    first = watch(FIRST_USE + MAIN, *words, NOTED_IN=tmp_path)
    checking = "info: compiling kernels for Stand-in GPU 0 and holding them against the processor's"
    first.wait_for(checking)
    first.wait_for("info: placing the model on Stand-in GPU 0 (cuda:0)")
    first.wait_for("(GPU Stand-in GPU 0 (cuda:0): 5 of 5 layers' attention")
    first.wait_for("written at")
    assert first.end() == 0
    again = watch(FIRST_USE + MAIN, *words, NOTED_IN=tmp_path).rest()
    assert "written at" in again
    assert "compiling kernels for" not in again
    # Without a terminal nothing is said.
    done = run(*words, "--device", "cuda")
    assert done.stderr == ""
