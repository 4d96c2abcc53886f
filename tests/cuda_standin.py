"""The stand-in for NVIDIA's libraries (tests/standin/cuda): builds it and runs programs on it."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "standin" / "cuda"
FOLDER = ROOT / "build" / "cuda-standin"


def _run(*words: str | Path) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words[0]} failed:\n{done.stdout}{done.stderr}"


def _program(name: str) -> str:
    """cmake and ninja, the system's or those that pip put beside this Python."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=path)
    assert found, f"the stand-in is built with {name}, which is not there"
    return found


@functools.cache
def libraries() -> Path:
    """The folder of libcuda.so.1, libnvrtc.so and libcublas.so (.12 and .13), built if need be.

    Compiled kernels are kept there too, in kernels/.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it
        _run(
            _program("cmake"),
            *("-S", SOURCES, "-B", FOLDER, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}",
        )
        _run(_program("cmake"), "--build", FOLDER)
    return FOLDER / "lib"


def environment(**settings: object) -> dict[str, str]:
    """The environment of a program that finds the stand-in where it looks for NVIDIA's libraries.

    Settings by their names in lower case: capability=75, devices, driver_version, memory (bytes),
    multiprocessors, delay_us, seed, watchdog_ms.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("STANDIN_") and name != "CUDA_VISIBLE_DEVICES"
    }
    path = [str(libraries()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    kept["LD_LIBRARY_PATH"] = os.pathsep.join(path)
    # Loaded from the start, so that they come before real ones that pip may have put beside Python.
    major = int(str(settings.get("driver_version", 13000))) // 1000
    preloaded = [str(libraries() / f"lib{name}.so.{major}") for name in ("nvrtc", "cublas")]
    kept["LD_PRELOAD"] = " ".join([*preloaded, *filter(None, [os.environ.get("LD_PRELOAD")])])
    return kept | {f"STANDIN_{name.upper()}": str(value) for name, value in settings.items()}


def run_program(
    code: str, *, timeout: float = 60, variables: dict[str, str] | None = None, **settings: object
) -> subprocess.CompletedProcess[str]:
    """A run of Python code in a process of its own, on the stand-in with the given settings."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment(**settings) | {"PYTHONPATH": str(SOURCES)} | (variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def on_standin(**settings: object) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """The test runs in a process of its own: a driver is started once, and a crash is for good.

    Its code is reached as `program`.
    """

    def decorate(program: Callable[[], None]) -> Callable[[], None]:
        module = Path(program.__code__.co_filename)

        @functools.wraps(program)
        def test() -> None:
            done = run_program(
                f"import {module.stem} as t; t.{program.__name__}.program()",
                variables={"PYTHONPATH": os.pathsep.join([str(module.parent), str(SOURCES)])},
                **settings,
            )
            assert done.returncode == 0, done.stdout + done.stderr

        test.program = program  # type: ignore[attr-defined]
        return test

    return decorate
