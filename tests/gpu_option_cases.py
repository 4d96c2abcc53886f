"""What test_gpu_options.py and others run on the stand-in: choices about a GPU, and its absence.

A function takes and returns what JSON can say.
"""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

from click.testing import CliRunner

from cuda_cases import TOKENS, _cuda, _log
from qinfer import Model, QInferError, _cuda_check
from qinfer.cli import cli


def files_called(path: str, names: list[str]) -> dict[str, str]:
    """What the command line says where --gpu-index names such a file, which is not there."""
    answers = {}
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        for name in names:
            words = ["run", path, "-p", "a", "--device", "cuda", "--gpu-index", name]
            error = CliRunner().invoke(cli, words).exception
            answers[name] = f"{type(error).__name__}: {error}"
        os.chdir("/")
    return answers


def splits(path: str, choices: list[str]) -> list[str]:
    """The error of each choice of neurons, or what is said of its being checked or left out."""
    lines = _log()
    answers = []
    for choice in choices:
        lines.clear()
        try:
            Model(path, device="cuda", gpu_split=choice, n_ctx=64, sparsity="off").close()
        except QInferError as error:
            answers.append(f"{type(error).__name__}: {error}")
        else:
            words = ("does not say", "are chosen without")
            answers.append("".join(line for line in lines if any(word in line for word in words)))
    return answers


def without_gpu(path: str, options: dict[str, Any]) -> list[Any]:
    """What "auto" logs without and with options for GPUs, by level, and what contexts say."""
    lines: list[list[Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append([record.levelno, record.getMessage()])

    logger = logging.getLogger("qinfer")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    Model(path, n_ctx=64).close()
    plain = list(lines)
    lines.clear()
    with Model(path, **options) as model:
        with model.context() as context:
            context.feed(TOKENS)
        try:
            model.context(kv_mode="host")
        except QInferError as error:
            return [plain, lines, str(error)]
    raise AssertionError("nothing was refused")


def caches(path: str) -> list[list[str]]:
    """What is said of neurons that are to move in models that leave none out and that do."""
    lines = _log()
    found = []
    for mode in ("off", "predict"):
        lines.clear()
        with Model(path, device="cuda", n_ctx=64, sparsity=mode, neuron_cache="frequency"):  # type: ignore[arg-type]
            found.append(list(lines))
    return found


def kept_without_room(path: str) -> dict[str, str]:
    """The error of a context whose keys and values are to be where there is no room."""
    options: dict[str, Any] = {"vram_budget": "6MiB", "n_ctx": 64, "sparsity": "off"}
    with Model(path, device="cuda", **options) as model, model.context():
        try:
            model.context(kv_mode="device", n_ctx=16384)
        except QInferError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


def automatic_in_want(path: str, notes: str) -> list[Any]:
    """What "auto" does where a test of a kernel finds no memory, and where contexts fail.

    With what is noted of the tests.
    """
    kernels = os.environ["QINFER_CACHE_DIR"]
    cuda = _cuda()
    lines = _log()
    found: list[Any] = []
    with Model(path, device="cuda", n_ctx=64, sparsity="off") as model:
        model.context().close()  # the kernels are compiled, where "auto" will look for them
        true_tests = _cuda_check._cuda.self_tests

        def in_want(number: int, numbers: list[int]) -> Any:
            cuda.standin_fail_at(1, 2)
            yield from true_tests(number, numbers)

        _cuda_check._cuda.self_tests = in_want  # type: ignore[assignment]
        os.environ["QINFER_CACHE_DIR"] = notes
        lines.clear()
        with Model(path, n_ctx=64, sparsity="off") as other:
            found.append({"used": other.placement is not None, "log": list(lines)})
        cuda.standin_fail_at(0, 0)
        found.append(_cuda_check.notes().exists())
        _cuda_check._cuda.self_tests = true_tests
        os.environ["QINFER_CACHE_DIR"] = kernels
    lines.clear()
    with Model(path, n_ctx=64, sparsity="off") as model:
        cuda.standin_fail_at(20, 999)
        with model.context() as context:
            cuda.standin_fail_at(0, 0)
            context.feed(TOKENS)
            found.append({"on_gpu": context.info.on_gpu, "log": list(lines)})
        with model.context() as context:
            found.append(context.info.on_gpu)
    lines.clear()
    with Model(path, n_ctx=64, sparsity="off") as model:
        cuda.standin_kill()
        with model.context() as context:
            context.feed(TOKENS)
            found.append({"on_gpu": context.info.on_gpu, "log": list(lines)})
    return found
