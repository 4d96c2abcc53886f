"""What test_cuda_moving.py runs on the stand-in, as cuda_cases is run by test_cuda_model.py."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from cuda_cases import N_TOKENS, TOKENS, _cuda, _errors, _log, _logits
from qinfer import Model, QInferError


def _keep_some(model: Model, share: float) -> None:
    """Random neurons go to the GPU."""
    offload = model._weights.offload
    assert offload is not None
    rng = np.random.default_rng(3)
    for layer in range(model.info.n_layer):
        n = int(share * model.info.n_ff)
        offload.choose_neurons(layer, np.sort(rng.permutation(model.info.n_ff)[:n]))


def _kept(model: Model) -> list[list[int]]:
    offload = model._weights.offload
    assert offload is not None
    return [offload.neurons(layer).tolist() for layer in range(model.info.n_layer)]


def _active(context: Any) -> list[int]:
    return [layer.n_active for layer in context.stats().layers]


def moving(path: str, policy: str, steps: list[int], mode: str = "predict") -> dict[str, Any]:
    """A text computed again and again while neurons move, `steps` tokens at a time.

    Errors of logits and the neurons computed, step by step, against the processor's.
    """
    lines = _log()
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": mode}
    found: dict[str, Any] = {"errors": [], "active": [], "n_kept": [], "sets": [], "moved": []}
    with (
        Model(path, device="cpu", **options) as cpu,
        Model(path, device="cuda", vram_budget="8MiB", neuron_cache=policy, **options) as gpu,
    ):
        _keep_some(gpu, 0.4)
        placement = gpu.placement
        with cpu.context(prefill="sparse") as a, gpu.context(n_batch=32, prefill="sparse") as b:
            for index, step in enumerate(steps):
                for c in (a, b):
                    c.truncate(0)
                    if index == 2:
                        c.count_activations()
                    c.reset_stats()
                expected, logits = [], []
                for begin in range(0, N_TOKENS, step):
                    for c, rows in ((a, expected), (b, logits)):
                        c.feed(TOKENS[begin : begin + step], logits="all", generated=True)
                        rows.append(c.all_logits.copy())
                    found["active"].append([_active(a), _active(b)])
                    time.sleep(0.01)  # neurons arrive
                found["errors"].append(_errors(np.concatenate(logits), np.concatenate(expected)))
                kept = _kept(gpu)
                found["n_kept"].append([len(set(ids)) for ids in kept])
                found["sets"].append(kept)
                placement = gpu.placement
                assert placement is not None
                found["moved"].append(placement.n_moved)
                assert int(_cuda().standin_allocated()) <= placement.budget_bytes
            counts = [[c.activation_counts(i) for i in range(gpu.info.n_layer)] for c in (a, b)]
        found["same_counts"] = bool(np.array_equal(*counts)) and int(np.sum(counts[0])) > 0
        found |= {"used": placement.used_bytes, "budget": placement.budget_bytes}
    found["left"] = int(_cuda().standin_allocated())
    found["log"] = lines
    return found


def moving_in_threads(path: str) -> dict[str, Any]:
    """Two contexts of one model in two threads, while neurons move: the largest errors."""
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "predict", "threads": 1}
    with Model(path, device="cpu", **options) as cpu, cpu.context() as context:
        expected = _logits(context, 1)
    found: dict[str, Any] = {"errors": []}

    def compute(model: Model) -> None:
        with model.context(n_batch=32) as context:
            for _ in range(3):
                found["errors"].append(max(_errors(_logits(context, 1), expected)))

    with Model(
        path, device="cuda", vram_budget="16MiB", neuron_cache="frequency", **options
    ) as gpu:
        _keep_some(gpu, 0.4)
        threads = [threading.Thread(target=compute, args=(gpu,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gpu.placement is not None
        found["moved"] = gpu.placement.n_moved
    found["left"] = int(_cuda().standin_allocated())
    return found


def moving_failures(path: str, code: int, every: int) -> dict[str, Any]:
    """Failures injected into one driver call after the other, while neurons move.

    A run ends in an error, or its logits are right; neurons then stay where they are or move on.
    """
    cuda = _cuda()
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "predict"}
    with Model(path, device="cpu", **options) as cpu, cpu.context() as context:
        expected = _logits(context, 1)
    options |= {"device": "cuda", "vram_budget": "8MiB", "neuron_cache": "frequency"}

    def run(fail_at: int) -> tuple[float, int, int]:
        """The error, neurons that moved, and calls of the driver."""
        with Model(path, **options) as m:
            _keep_some(m, 0.4)
            with m.context(n_batch=32) as context:
                start = int(cuda.standin_calls())
                cuda.standin_fail_at(fail_at, code)
                error = max(_errors(_logits(context, 1), expected))
                n_calls = int(cuda.standin_calls()) - start
            assert m.placement is not None
            return error, m.placement.n_moved, n_calls

    lines = _log()
    error, moved, n_calls = run(-1)
    found: dict[str, Any] = {"n_calls": n_calls, "moved": moved, "errors": [error], "leaks": 0}
    found["raised"] = 0
    for number in range(1, n_calls, every):
        try:
            found["errors"].append(run(number)[0])
        except QInferError:
            found["raised"] += 1
        finally:
            cuda.standin_fail_at(-1, 0)
        found["leaks"] += int(cuda.standin_allocated()) != 0
    found["errors"].append(run(-1)[0])
    found["stayed"] = sum("neurons stay where they are" in line for line in lines)
    return found


def lost(path: str) -> dict[str, Any]:
    """The device is lost while neurons move."""
    options: dict[str, Any] = {"device": "cuda", "vram_budget": "8MiB", "n_ctx": 64}
    with Model(path, sparsity="predict", neuron_cache="frequency", **options) as model:
        _keep_some(model, 0.4)
        context = model.context(n_batch=32)
        for token in TOKENS[:8]:
            context.feed([token], generated=True)
        _cuda().standin_kill()
        found = []
        for token in TOKENS[:3]:
            try:
                context.feed([token], generated=True)
                found.append("none")
            except QInferError as error:
                found.append(type(error).__name__)
        context.close()
    return {"errors": found}


def no_room(path: str, budget: str) -> list[str]:
    """What is said where a budget leaves no room for neurons that are to move."""
    lines = _log()
    with Model(path, device="cuda", vram_budget=budget, neuron_cache="balance", n_ctx=64) as model:
        model.context(n_batch=32).close()
    return lines


def refused(path: str) -> list[str]:
    """What is said of moving and of balancing neurons whose down is not stored by neuron."""
    answers = []
    for options in ({"neuron_cache": "frequency"}, {"gpu_split": "balance"}):
        try:
            Model(path, device="cuda", vram_budget="8MiB", **options)  # type: ignore[arg-type]
        except QInferError as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def counted(path: str, budget: str, mode: str) -> dict[str, Any]:
    """What is kept before and after the first tokens have been counted, and how often it is used.

    The uses are shares of all neurons active for these tokens, by layer; `best` could be had.
    """
    lines = _log()
    options: dict[str, Any] = {"n_ctx": 256, "sparsity": mode}
    with (
        Model(path, device="cpu", n_ctx=256, sparsity="off") as cpu,
        Model(path, device="cuda", vram_budget=budget, **options) as gpu,
    ):
        text = "Once upon a time there was a little girl who loved dogs. "
        tokens = cpu.tokenizer.encode(text * 8)[:64]
        with cpu.context() as context:
            context.count_activations()
            context.feed(tokens)
            counts = [context.activation_counts(i) for i in range(cpu.info.n_layer)]
        shares, kept, placements = [], [], []

        def look() -> None:
            kept.append(_kept(gpu))
            shares.append(
                [float(c[ids].sum() / c.sum()) for c, ids in zip(counts, kept[-1], strict=True)]
            )
            assert gpu.placement is not None
            placements.append(gpu.placement)

        with gpu.context(n_batch=32, prefill="sparse") as context:
            look()
            context.feed(tokens)
            for _ in range(60):  # neurons arrive
                if any("chosen anew" in line for line in lines):
                    break
                context.truncate(0)
                context.feed(tokens[:1], generated=True)
                time.sleep(0.01)
            look()
    return {
        "shares": shares,
        "best": [
            float(np.sort(c)[::-1][: len(ids)].sum() / c.sum())
            for c, ids in zip(counts, kept[-1], strict=True)
        ],
        "sizes": [[len(ids) for ids in each] for each in kept],
        "moved": placements[-1].n_moved,
        "used": [each.used_bytes for each in placements],
        "log": lines,
        "left": int(_cuda().standin_allocated()),
    }


def balanced(path: str) -> dict[str, Any]:
    """How many neurons of each layer are kept with gpu_split="balance", and its errors."""
    lines = _log()
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "predict"}
    with (
        Model(path, device="cpu", **options) as cpu,
        Model(path, device="cuda", vram_budget="16MiB", gpu_split="balance", **options) as gpu,
        cpu.context() as a,
        gpu.context(n_batch=32) as b,
    ):
        errors = _errors(_logits(b, 1), _logits(a, 1))
        kept = _kept(gpu)
    return {"kept": kept, "errors": errors, "log": lines, "left": int(_cuda().standin_allocated())}
