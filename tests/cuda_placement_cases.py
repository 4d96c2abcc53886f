"""What test_cuda_placement.py runs on the stand-in, each function in a process of its own.

A function takes and returns what JSON can say.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cuda_cases import TOKENS, _cuda, _errors, _keep_half, _log, _logits
from qinfer import Model, QInferError


def split_by(path: str, neurons: list[list[int]]) -> list[str]:
    """What is said of lists of neurons for the first layer."""
    answers = []
    with Model(path, device="cuda", vram_budget="200MiB", n_ctx=64, sparsity="off") as model:
        share = model._weights.offload
        assert share is not None
        for ids in neurons:
            try:
                share.choose_neurons(0, np.array(ids, np.int32))
                answers.append("")
            except QInferError as error:
                answers.append(f"{type(error).__name__}: {error}")
        model.context().close()
        try:
            share.choose_neurons(0, np.array([0], np.int32))
            answers.append("")
        except QInferError as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def budgets(path: str, sizes: list[str]) -> list[dict[str, Any]]:
    """What is kept under each budget, and the error of the logits."""
    rows: list[dict[str, Any]] = []
    with Model(path, device="cpu", n_ctx=64, sparsity="off") as cpu, cpu.context() as context:
        expected = _logits(context, 7)
    lines = _log()
    for size in sizes:
        before = int(_cuda().standin_allocated())
        lines.clear()
        try:
            with Model(path, device="cuda", vram_budget=size, n_ctx=64, sparsity="off") as model:
                with model.context(n_batch=32) as context:
                    errors = _errors(_logits(context, 7), expected)
                    placement = model.placement
                    held = int(_cuda().standin_allocated()) - before
                assert placement is not None
                rows.append(
                    {
                        "error": float(np.median(errors)),
                        "n_layers": placement.n_layers,
                        "has_head": placement.has_head,
                        "n_neurons": placement.n_neurons,
                        "used": placement.used_bytes,
                        "budget": placement.budget_bytes,
                        "held": held,
                        "log": list(lines),
                    }
                )
        except QInferError as error:
            rows.append({"refused": type(error).__name__, "message": str(error)})
    return rows


def placed_again(path: str, cache: str) -> dict[str, Any]:
    """What is kept for contexts made one after the other, and for each as a model's first.

    `first` is of a model whose sparsity is timed before, `second` of one that finds the times.
    """
    import os

    from qinfer import sparsity
    from qinfer._cuda import configure

    configure()
    sparsity._STEPS = 8  # enough for neurons to move
    os.environ["QINFER_CACHE_DIR"] = cache  # of times alone: kernels stay where they are
    options: dict[str, Any] = {"device": "cuda", "vram_budget": "8MiB", "sparsity": "off"}

    def kept(model: Model, sizes: dict[str, Any]) -> list[Any]:
        with model.context(**sizes):
            share, placement = model._weights.offload, model.placement
            assert share is not None
            assert placement is not None
            ids = [share.neurons(layer).tolist() for layer in range(model.info.n_layer)]
            return [ids, placement.used_bytes, placement.summary, placement.n_moved]

    contexts: list[dict[str, Any]] = [
        {"n_ctx": 64, "n_batch": 32},
        {"n_ctx": 512, "n_batch": 32},
        {"n_ctx": 64, "n_batch": 32},
        {"n_ctx": 64, "n_batch": 128},
        {"n_ctx": 64, "n_batch": 32, "kv_mode": "host"},
    ]
    with Model(path, n_ctx=128, **options) as model:
        in_turn = [kept(model, sizes) for sizes in contexts]
    alone = []
    for sizes in contexts:
        with Model(path, n_ctx=128, **options) as model:
            alone.append(kept(model, sizes))
    found: dict[str, Any] = {"in_turn": in_turn, "alone": alone}
    for name in ("first", "second"):
        found[f"{name} has times"] = (Path(cache) / "sparsity.json").exists()
        options |= {"vram_budget": "18MiB", "sparsity": "auto", "neuron_cache": "frequency"}
        with Model(path, n_ctx=64, **options) as model:
            found[name] = kept(model, {})
    found["left"] = int(_cuda().standin_allocated())
    return found


def too_large(path: str) -> str:
    """The error of a list of neurons that no budget of this size holds."""
    with Model(path, device="cuda", vram_budget="8MiB", n_ctx=64, sparsity="off") as model:
        share = model._weights.offload
        assert share is not None
        for layer in range(model.info.n_layer):
            share.choose_neurons(layer, np.arange(model.info.n_ff))
        try:
            model.context(n_batch=32)
        except QInferError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def promised(path: str) -> list[list[int]]:
    """The budget that is measured, and what of it is there once contexts have computed.

    Prompts, single tokens recorded for several lengths, and keys and values of another type.
    """
    cuda = _cuda()
    parts = [1, 1, 1, 24, 1, 1, 1, 60, 1, 1, 1, 60, 1, 1, 1]
    found = []
    with Model(path, device="cuda:1", n_ctx=256, sparsity="off") as model:
        _keep_half(model)
        for kv_type in ("f16", "q8_0", "f16"):
            with model.context(n_batch=64, kv_type=kv_type) as context:
                for n in parts:
                    context.feed((TOKENS * 3)[:n], generated=n == 1)
                assert context.info.on_gpu
                free, total, primary = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
                assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(primary), 1) == 0
                assert cuda.cuCtxPushCurrent_v2(primary) == 0
                assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
                assert cuda.cuCtxPopCurrent_v2(ctypes.byref(primary)) == 0
                assert cuda.cuDevicePrimaryCtxRelease_v2(1) == 0
                assert model.placement is not None
                there = free.value + int(cuda.standin_allocated())
                found.append([model.placement.budget_bytes, there])
    return found


def contexts(path: str) -> dict[str, Any]:
    """Contexts beyond what the GPU has room for: where each is computed, and what of a model stays.

    Errors are those of logits, by context, against the processor's.
    """
    lines = _log()
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "off"}
    with Model(path, device="cpu", **options) as cpu, cpu.context() as context:
        expected = _logits(context, 24)
    found: dict[str, Any] = {"on_gpu": {}, "errors": {}, "kept": {}}
    with Model(path, device="cuda", vram_budget="8MiB", **options) as model:

        def look(name: str, context: Any) -> Any:
            found["on_gpu"][name] = context.info.on_gpu
            found["errors"][name] = float(np.median(_errors(_logits(context, 24), expected)))
            assert model.placement is not None
            assert model.placement.used_bytes <= model.placement.budget_bytes
            found["kept"][name] = model.placement.n_neurons
            return context

        first = look("first", model.context())
        second = look("second", model.context())
        look("another", model.context()).close()
        found["warnings"] = [line for line in lines if "processor alone" in line]
        generated = model.generate("Once", max_tokens=4, temperature=0)
        first.close()
        third = look("third", model.context())
        second.close()
        third.close()
        # A context kept for calls makes room; with none left, so do the neurons.
        again = model.generate("Once", max_tokens=4, temperature=0)
        assert again.tokens == generated.tokens
        assert model.placement is not None
        found["kept"]["generate"] = model.placement.n_neurons
        look("after a call", model.context()).close()
        look("larger", model.context(n_ctx=128)).close()
        look("last", model.context()).close()
        with model.context(n_ctx=256, n_seq=64) as context:  # not even with all neurons away
            found["on_gpu"]["huge"] = context.info.on_gpu
            found["why"] = lines[-1]
        look("at last", model.context()).close()
    found["left"] = int(_cuda().standin_allocated())
    return found


def automatic(path: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What device="auto" does here, with some of the self-tests: all are run by others."""
    from qinfer import _cuda_check

    true_tests = _cuda_check._cuda.self_tests
    _cuda_check._cuda.self_tests = lambda gpu, numbers: true_tests(gpu, list(numbers)[::9])  # type: ignore[assignment]
    lines = _log()
    with Model(path, n_ctx=64, **options or {}) as model:
        placement = model.placement
        found = {"log": list(lines), "device": None if placement is None else placement.device}
    if placement is not None:
        lines.clear()
        with Model(path, n_ctx=64, vram_budget="100KiB") as model, model.context() as context:
            context.feed(TOKENS[:1])
            found |= {"small": list(lines), "on_gpu": context.info.on_gpu}
    return found


def distrusted(path: str, cache: str) -> list[Any]:
    """What "auto" does with a GPU one of whose kernel tests fails, twice; and what "cuda" does."""
    import os

    from qinfer import _cuda, _cuda_check

    kernels = os.environ["QINFER_CACHE_DIR"]
    _cuda.configure()
    os.environ["QINFER_CACHE_DIR"] = cache
    true_tests = _cuda.self_tests

    def one_fails(number: int, numbers: list[int]) -> Any:
        # Some are enough: all of them are run where none is to fail.
        for count, test in enumerate(true_tests(number, numbers[:5])):
            yield test if count else replace(test, passed=False, error=7.0)

    _cuda_check._cuda.self_tests = one_fails  # type: ignore[assignment]
    lines = _log()
    found: list[Any] = []
    for _ in range(2):
        lines.clear()
        with Model(path, n_ctx=64) as model:
            placement = model.placement
            found.append(
                {"log": list(lines), "device": None if placement is None else placement.device}
            )
    with Model(path, n_ctx=64, device="cuda") as model:
        assert model.placement is not None
        found.append(model.placement.device)
    os.environ["QINFER_CACHE_DIR"] = kernels
    return found
