"""What test_cuda_model.py runs on the stand-in, each function in a process of its own.

A function takes and returns what JSON can say.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qinfer import Cancelled, Model, QInferError, UnsupportedError

N_TOKENS = 24
TOKENS = np.random.default_rng(5).integers(0, 301, N_TOKENS).tolist()


def _cuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name in ("standin_calls", "standin_allocated", "standin_live_objects"):
        getattr(library, name).restype = ctypes.c_uint64
    library.standin_fail_at.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.standin_fail_at.restype = None
    library.standin_kill.restype = None
    return library


def _log() -> list[str]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("qinfer")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    return lines


def _keep_half(model: Model) -> None:
    """Every other run of neurons goes to the GPU: single ones, or blocks of an ordinary down."""
    info, share = model.info, model._weights.offload
    assert share is not None
    run = 1 if info.down_by_neuron else 32
    if not info.down_by_neuron and info.n_ff % 256 == 0:
        run = 256
    ids = np.arange(info.n_ff)
    ids = ids[ids // run % 2 == 0] if info.n_ff >= 2 * run else ids
    whole = ids[ids < info.n_ff // run * run]
    for layer in range(info.n_layer):
        share.choose_neurons(layer, whole)


def _logits(context: Any, step: int, tokens: list[int] = TOKENS) -> npt.NDArray[np.floating]:
    """Logits of tokens fed as generated ones, `step` at a time; 0: each a text of its own."""
    rows = []
    context.truncate(0)
    for begin in range(0, len(tokens), step or 1):
        if step == 0:
            context.truncate(0)
        context.feed(tokens[begin : begin + (step or 1)], logits="all", generated=True)
        rows.append(context.all_logits.copy())
    return np.concatenate(rows)


def _errors(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> list[float]:
    distance = np.linalg.norm(found - expected, axis=1)
    return [float(x) for x in distance / np.linalg.norm(expected, axis=1)]


def compare(
    path: str, shares: list[str], modes: list[str], steps: list[int], kv_type: str = "f16"
) -> dict[str, Any]:
    """The GPU's logits against the processor's: relative errors by share, mode and step.

    A step is how many tokens are fed together; with 0 each token is a text of its own.
    """
    options: dict[str, Any] = {"n_ctx": 64, "kv_type": kv_type, "sparsity": "off"}
    expected = {}
    with Model(path, device="cpu", **options) as cpu:
        for mode in modes:
            with cpu.context(sparsity=mode) as context:
                for step in steps:
                    expected[mode, step] = _logits(context, step)
    found: dict[str, Any] = {}
    for share in shares:
        split = "none" if share == "none" else "auto"
        with Model(path, device="cuda", vram_budget="900MiB", gpu_split=split, **options) as gpu:
            if share == "half":
                _keep_half(gpu)
            found[share] = {}
            for mode in modes:
                with gpu.context(sparsity=mode, n_batch=32) as context:
                    found[share][mode] = {
                        str(step): _errors(_logits(context, step), expected[mode, step])
                        for step in steps
                    }
            placement = gpu.placement
            assert placement is not None
            found[share] |= {
                "n_neurons": placement.n_neurons,
                "used": placement.used_bytes,
                "budget": placement.budget_bytes,
            }
    found["left"] = int(_cuda().standin_allocated())
    return found


def replayed(path: str, share: str) -> dict[str, Any]:
    """Steps that are computed, recorded and replayed: their logits, and the graphs there are."""
    counts = (ctypes.c_uint64 * 7)()
    with _shared(path, share) as model, model.context() as context:
        rows = []
        for _ in range(4):
            context.truncate(0)
            for token in TOKENS[:3]:
                context.feed([token], generated=True)
            rows.append([float(x) for x in context.logits])
        _cuda().standin_live_objects(counts)
        layers = [
            [layer.seconds, layer.device_seconds, layer.host_seconds, layer.wait_seconds]
            for layer in context.stats().layers
        ]
    return {"rows": rows, "n_graphs": int(counts[4]), "layers": layers}


def _shared(path: str, share: str, options: dict[str, Any] | None = None) -> Model:
    """A model with all ("whole"), half or none of its neurons on the GPU."""
    split = "none" if share == "none" else "auto"
    given: dict[str, Any] = {"n_ctx": 64, "sparsity": "off"} | (options or {})
    model = Model(path, device="cuda", gpu_split=split, **given)
    if share == "half":
        _keep_half(model)
    return model


def cancelled(path: str, share: str) -> dict[str, Any]:
    """Steps that another thread cancels, each later than the one before; then one that ends."""
    n_cancelled = 0
    with _shared(path, share) as model, model.context() as context:
        expected = _logits(context, 1, TOKENS[:4])
        for delay in range(12):
            context.truncate(0)
            timer = threading.Timer(delay * 0.003, context.cancel)
            timer.start()
            try:
                for token in TOKENS:
                    context.feed([token], generated=True)
                timer.join()
                context.clear_cancel()
            except Cancelled:
                n_cancelled += 1
        same = np.array_equal(_logits(context, 1, TOKENS[:4]), expected)
    return {
        "n_cancelled": n_cancelled,
        "same": bool(same),
        "left": int(_cuda().standin_allocated()),
    }


def counted(path: str) -> dict[str, list[Any]]:
    """What one context counts, on the processor, on the GPU, and on both together."""
    found: dict[str, list[Any]] = {}
    for name, device, budget in (
        ("cpu", "cpu", None),
        ("gpu", "cuda", None),
        ("both", "cuda", "12MiB"),
    ):
        with (
            Model(path, device=device, vram_budget=budget, n_ctx=64, sparsity="predict") as model,
            model.context(n_batch=32) as context,
        ):
            context.feed(TOKENS[:12])
            for token in TOKENS[12:]:
                context.feed([token], generated=True)
            if name != "cpu":
                for refused in (context.count_activations, lambda: context.check_predictions(2)):
                    try:
                        refused()
                    except UnsupportedError:
                        continue
                    raise AssertionError("what the GPU does not count was not refused")
            stats = context.stats()
            found[name] = [stats.weight_bytes_read] + [
                [layer.n_tokens, layer.n_active, layer.n_predicted, layer.n_bytes]
                for layer in stats.layers
            ]
    return found


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
    for size in sizes:
        before = int(_cuda().standin_allocated())
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
                    }
                )
        except QInferError as error:
            rows.append({"refused": type(error).__name__, "message": str(error)})
    return rows


def texts(path: str, prompt: str, n: int) -> list[str]:
    """The greedy continuation by the processor and by the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        with Model(path, device=device) as model:
            found.append(model.generate(prompt, max_tokens=n, temperature=0).text)
    return found


def states(path: str) -> list[float]:
    """A sequence begun on one device and continued on the other: errors of its next logits."""
    found = []
    with (
        Model(path, device="cpu", n_ctx=128, sparsity="off") as cpu,
        Model(path, device="cuda", n_ctx=128, sparsity="off", vram_budget="12MiB") as gpu,
    ):
        for one, other in ((cpu, gpu), (gpu, cpu)):
            with one.context(n_batch=32) as a, other.context(n_batch=32) as b:
                a.feed(TOKENS)
                _through_file(a, b)
                a.feed([7], logits="last")
                b.feed([7], logits="last")
                found += _errors(b.logits[None], a.logits[None])
    return found


def _through_file(a: Any, b: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        a.save_state(path)
        b.load_state(path)


def failures(
    path: str, share: str, code: int, every: int, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A failure injected into one driver call after the other, from opening a model to a step.

    Afterwards the same process opens the model and computes. `every` passes over calls, for time.
    """
    cuda = _cuda()

    def run() -> list[float]:
        with _shared(path, share, options) as model, model.context() as c:
            for token in TOKENS[:3]:
                c.feed([token], generated=True)
            return [float(x) for x in c.logits[:8]]

    expected = run()  # compiles what has to be
    start = int(cuda.standin_calls())
    run()
    n_calls = int(cuda.standin_calls()) - start
    kinds: dict[str, int] = {}
    for number in range(0, n_calls, every):
        cuda.standin_fail_at(number, code)
        try:
            run()
            kinds["none"] = kinds.get("none", 0) + 1
        except QInferError as error:
            kinds[type(error).__name__] = kinds.get(type(error).__name__, 0) + 1
            assert str(error)
        finally:
            cuda.standin_fail_at(-1, 0)
        if int(cuda.standin_allocated()) != 0:
            kinds["leaks"] = kinds.get("leaks", 0) + 1
    return {"n_calls": n_calls, "kinds": kinds, "same": run() == expected}


def lost(path: str, share: str) -> dict[str, str]:
    """The device is lost between two steps."""
    with _shared(path, share) as model:
        context = model.context()
        for token in TOKENS[:3]:
            context.feed([token], generated=True)
        _cuda().standin_kill()
        try:
            context.feed(TOKENS[:1], generated=True)
            return {"error": "none"}
        except QInferError as error:
            return {"error": type(error).__name__, "message": str(error)}


def together(path: str) -> list[list[float]]:
    """Two models on one GPU, and two contexts of one, taking turns."""
    with (
        Model(path, device="cpu", n_ctx=64, sparsity="off") as cpu,
        Model(path, device="cuda", vram_budget="200MiB", n_ctx=64, sparsity="off") as one,
        Model(path, device="cuda", vram_budget="200MiB", n_ctx=64, sparsity="off") as other,
        cpu.context() as expected,
        one.context() as a,
        one.context() as b,
        other.context() as c,
    ):
        rows = []
        for token in TOKENS[:5]:
            for context in (expected, a, b, c):
                context.feed([token])
            rows += [_errors(x.logits[None], expected.logits[None])[0] for x in (a, b, c)]
        return [rows]


def side_by_side(path: str) -> list[bool]:
    """Two threads, each with a context of a model that shares its layers with the processor."""
    same = []

    def run(model: Model) -> None:
        with model.context() as context:
            rows = [_logits(context, 1, TOKENS[:8]) for _ in range(3)]
        same.append(all(np.array_equal(row, rows[0]) for row in rows))

    with _shared(path, "half") as one, _shared(path, "half") as other:
        run(one)
        threads = [threading.Thread(target=run, args=(model,)) for model in (one, other, one)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return same


def automatic(path: str) -> dict[str, Any]:
    """What device="auto" does here."""
    lines = _log()
    with Model(path, n_ctx=64) as model:
        placement = model.placement
        return {"log": lines, "device": None if placement is None else placement.device}


def distrusted(path: str, cache: str) -> list[Any]:
    """What "auto" does with a GPU one of whose kernel tests fails, twice; and what "cuda" does."""
    import os

    from qinfer import _cuda, _cuda_check

    kernels = os.environ["QINFER_CACHE_DIR"]
    _cuda.configure()
    os.environ["QINFER_CACHE_DIR"] = cache
    true_tests = _cuda.self_tests

    def one_fails(number: int, numbers: list[int]) -> Any:
        for count, test in enumerate(true_tests(number, numbers)):
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
