"""What test_cuda_model.py runs on the stand-in, each function in a process of its own.

A function takes and returns what JSON can say.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qinfer import Cancelled, Model, QInferError, Sampling
from qinfer.perplexity import perplexity
from qinfer.sampling import Sampler

N_TOKENS = 24
TOKENS = np.random.default_rng(5).integers(0, 301, N_TOKENS).tolist()


def _cuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    counted = ("copied_to_host", "copies_to_device", "launches", "lone_launches", "graph_launches")
    for name in ("calls", "allocated", "live_objects", *counted):
        getattr(library, f"standin_{name}").restype = ctypes.c_uint64
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


def changing_steps(path: str, steps: list[int]) -> list[float]:
    """Relative errors of the GPU's logits where steps of several lengths follow one another."""
    tokens = np.random.default_rng(6).integers(0, 301, sum(steps)).tolist()
    found = []
    for device in ("cpu", "cuda"):
        with Model(path, device=device, n_ctx=len(tokens), sparsity="off") as model:
            context, rows, begin = model.context(), [], 0
            for step in steps:
                context.feed(tokens[begin : begin + step], logits="all", generated=True)
                rows.append(context.all_logits.copy())
                begin += step
            found.append(np.concatenate(rows))
    return _errors(found[1], found[0])


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


def launches(paths: list[str], share: str, mode: str) -> list[tuple[int, int]]:
    """Kernels that a replayed step launches and copies that it makes to the GPU, by model."""
    cuda = _cuda()

    def now() -> tuple[int, int]:
        return int(cuda.standin_launches()), int(cuda.standin_copies_to_device())

    counts = []
    for path in paths:
        with _shared(path, share, {"sparsity": mode}) as model, model.context() as context:
            first = now()
            for token in TOKENS[:5]:  # by the third they are replayed
                before = now()
                context.feed([token], generated=True)
            counts.append((now()[0] - before[0], now()[1] - before[1]))
            assert context.stats().n_launches == now()[0] - first[0]
    return counts


def steps(path: str, share: str, n_seq: int, temperature: float) -> list[dict[str, int]]:
    """What the GPU is asked for in each step of some sequences."""
    names = ("lone_launches", "graph_launches", "copies_to_device", "copied_to_host")
    cuda, found = _cuda(), []

    def now() -> dict[str, int]:
        return {name: int(getattr(cuda, f"standin_{name}")()) for name in names}

    sampling = Sampling(temperature=temperature, top_k=10)
    seqs = range(n_seq)
    with _shared(path, share) as model, model.context(n_seq=n_seq) as context:
        samplers = [Sampler(model.info.n_vocab, sampling) for _ in seqs]
        tokens = TOKENS[:n_seq]
        for _ in range(5):
            before = now()
            tokens = context.step(tokens, samplers, seqs=seqs)
            found.append({name: count - before[name] for name, count in now().items()})
    return found


def _shared(path: str, share: str, options: dict[str, Any] | None = None) -> Model:
    """A model with all ("whole"), half or none of its neurons on the GPU."""
    split = "none" if share == "none" else "auto"
    given: dict[str, Any] = {"n_ctx": 64, "sparsity": "off"} | (options or {})
    model = Model(path, device="cuda", gpu_split=split, **given)
    if share == "half":
        _keep_half(model)
    return model


def cancelled(path: str, share: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Steps that another thread cancels, each later than the one before; then one that ends."""
    n_cancelled = 0
    with _shared(path, share, options) as model, model.context() as context:
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


def waits_in_vain(path: str) -> dict[str, Any]:
    """Steps of a model whose neurons are the processor's, while a minute is a microsecond.

    What the first that failed says, and whether the others' logits are right; before, and after.
    """
    cuda = _cuda()
    cuda.standin_set.restype = ctypes.c_bool
    found: dict[str, Any] = {"said": []}
    with _shared(path, "none") as model, model.context() as context:
        expected = _logits(context, 1)
        found["before"] = max(_errors(_logits(context, 1), expected))
        length = context.length()
        assert cuda.standin_set(b"clock_rate", ctypes.c_uint64(60_000_000))
        for token in TOKENS:
            try:
                context.feed([token], generated=True)
                length += 1
            except QInferError as error:
                found["said"].append(f"{type(error).__name__}: {error}")
                assert context.length() == length
        assert cuda.standin_set(b"clock_rate", ctypes.c_uint64(1))
        found["after"] = max(_errors(_logits(context, 1), expected))
    found["left"] = int(cuda.standin_allocated())
    return found


def counted(path: str) -> dict[str, list[Any]]:
    """What one context counts: on the processor, on the GPU, on both, and where it only predicts.

    The first item is the number of predictors on the GPU.
    """
    found: dict[str, list[Any]] = {}
    for name, device, budget in (
        ("cpu", "cpu", None),
        ("gpu", "cuda", None),
        ("both", "cuda", "8MiB"),
        ("predictors", "cuda", "5MiB"),
    ):
        with (
            Model(path, device=device, vram_budget=budget, n_ctx=64, sparsity="predict") as model,
            model.context(n_batch=32) as context,
        ):
            context.feed(TOKENS[:12])
            for token in TOKENS[12:]:
                context.feed([token], generated=True)
            stats = context.stats()
            placement = context.placement
            n_predictors = placement.n_predictors if placement else 0
            found[name] = [n_predictors, stats.weight_bytes_read] + [
                [layer.n_tokens, layer.n_active, layer.n_predicted, layer.n_bytes]
                for layer in stats.layers
            ]
    return found


def neurons_counted(path: str, mode: str, shares: list[str]) -> dict[str, Any]:
    """Tokens by neuron, and predictions held against the gates, on the processor and by share."""

    def count(model: Model) -> dict[str, Any]:
        info = model.info
        with model.context(n_batch=32) as context:
            context.feed(TOKENS[:3])
            context.count_activations()
            context.check_predictions(2)
            context.reset_stats()
            context.feed(TOKENS[:12])
            for token in TOKENS[12:-1]:  # by the fourth they are replayed; the last is checked
                context.feed([token], generated=True)
            first = [context.activation_counts(layer).tolist() for layer in range(info.n_layer)]
            checks = [[x.n_checked, x.n_due, x.n_missed] for x in context.stats().layers]
            # Anew from 0, and in steps that count nothing no more.
            context.check_predictions(0)
            context.count_activations()
            for token in TOKENS[:4]:
                context.feed([token], generated=True)
            second = [context.activation_counts(layer).tolist() for layer in range(info.n_layer)]
            context.count_activations(False)
            for token in TOKENS[:4]:
                context.feed([token], generated=True)
            after = [[x.n_checked, x.n_due, x.n_missed] for x in context.stats().layers]
            assert checks == after
        return {"first": first, "second": second, "checks": checks}

    options: dict[str, Any] = {"n_ctx": 64, "sparsity": mode}
    found = {}
    with Model(path, device="cpu", **options) as model:
        found["cpu"] = count(model)
    for share in shares:
        with Model(path, device="cuda", vram_budget="900MiB", **options) as model:
            if share == "half":
                _keep_half(model)
            found[share] = count(model)
    return found


def perplexities(path: str) -> dict[str, Any]:
    """What a text costs a model that predicts, on the processor and by share of the neurons."""
    text = "Once upon a time there was a little girl who loved to play in the park. " * 5
    found = {}
    for share in ("cpu", "whole", "half"):
        device = "cpu" if share == "cpu" else "cuda"
        with Model(path, device=device, n_ctx=64, sparsity="predict") as model:
            if share == "half":
                _keep_half(model)
            result = perplexity(model, text, n_ctx=70)
            assert result.neurons is not None
            found[share] = asdict(result.neurons) | {"value": result.value}
    return found


def profiled(path: str, folder: str) -> dict[str, Any]:
    """What `qinfer profile` counts with and without a GPU: the differences, and the sum."""
    from click.testing import CliRunner

    from qinfer.activation import read_activations
    from qinfer.cli import cli

    text = Path(folder) / "text"
    text.write_text("Once upon a time there was a little girl who liked to play. " * 3)
    counts = {}
    for device, options in (("cpu", []), ("cuda", ["--vram-budget", "8MiB"])):
        into = Path(folder) / device
        words = ["profile", path, "-f", str(text), "-o", str(into), "-c", "32", "--no-plot"]
        done = CliRunner().invoke(cli, [*words, "--device", device, *options])
        assert done.exit_code == 0, (done.output, done.exception)
        counted = read_activations(into / "activation", n_layers=6, n_ff=768)
        counts[device] = np.stack(list(counted))
    difference = np.abs(counts["cuda"] - counts["cpu"])
    return {"different": float(difference.sum()), "sum": float(counts["cpu"].sum())}


def early(path: str, sizes: list[str]) -> list[dict[str, Any]]:
    """Errors of logits whose predictions are made one layer early, by what a budget keeps."""
    rows = []
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "predict", "cross_layer_from": 1}
    with Model(path, device="cpu", **options) as cpu, cpu.context() as context:
        expected = _logits(context, 7)
    for size in sizes:
        # Keys and values that may be shared would make room for the attention of all layers.
        with Model(path, device="cuda", vram_budget=size, kv_mode="device", **options) as model:
            with model.context(n_batch=32) as context:
                errors = _errors(_logits(context, 7), expected)
            assert model.placement is not None
            rows.append({"error": float(np.median(errors)), "n_layers": model.placement.n_layers})
    return rows


def texts(path: str, prompt: str, n: int) -> list[str]:
    """The greedy continuation by the processor and by the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        with Model(path, device=device) as model:
            found.append(model.generate(prompt, max_tokens=n, temperature=0).text)
    return found


def not_a_number(path: str) -> dict[str, str]:
    """What a step says of a logit that is NaN, by device and by what its sampler looks at."""
    found = {}
    for device in ("cpu", "cuda"):
        with Model(path, device=device, n_ctx=64, sparsity="off") as model:
            for top_k in (1, 20, 0):
                sampler = Sampler(model.info.n_vocab, Sampling(temperature=0.5, top_k=top_k))
                with model.context() as context:
                    try:
                        context.step([5], [sampler])
                    except QInferError as error:
                        found[f"{device} {top_k}"] = f"{type(error).__name__}: {error}"
                    assert context.length() == 0
    return found


# Settings whose draws need the best logit, the best few, all of them, or all in the end.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-k": {"temperature": 0.9, "top_k": 20, "top_p": 1.0, "min_p": 0.0},
    "top-k and top-p": {"temperature": 1.2, "top_k": 40, "top_p": 0.8, "typical_p": 0.9},
    "most": {"temperature": 0.9, "top_k": 511, "dynatemp_range": 0.5, "min_p": 0.01},
    "all": {"temperature": 0.9, "top_k": 512, "top_p": 1.0},
    "top-p": {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
    "penalties": {"temperature": 0, "repeat_penalty": 1.3, "penalty_window": -1},
    "bias": {"temperature": 0.8, "top_k": 5, "logit_bias": {13: 2.5, 400: -float("inf")}},
    "mirostat": {"temperature": 1.0, "mirostat": 2},
}


def sampled(path: str, n_steps: int) -> dict[str, Any]:
    """Tokens by settings on both devices; on the GPU also those drawn from all its logits.

    Sequences of several settings are computed in one step.
    """
    found: dict[str, Any] = {"bytes": {}}
    for device in ("cpu", "cuda"):
        with (
            Model(path, device=device, n_ctx=128, sparsity="off") as model,
            model.context(n_seq=len(SAMPLINGS)) as context,
        ):
            prompt = model.tokenizer.encode("Once upon a time")
            chosen = [Sampling(seed=3, **settings) for settings in SAMPLINGS.values()]
            ours, twins = ([Sampler(model.info.n_vocab, s) for s in chosen] for _ in range(2))
            context.feed_batch(dict.fromkeys(range(len(chosen)), prompt))
            tokens = [[s.sample(row)] for s, row in zip(ours, context.all_logits, strict=True)]
            again = [[s.sample(row)] for s, row in zip(twins, context.all_logits, strict=True)]
            for _ in range(n_steps):
                drawn = context.step([t[-1] for t in tokens], ours, seqs=list(range(len(chosen))))
                for mine, token in zip(tokens, drawn, strict=True):
                    mine.append(token)
                for other, s, row in zip(again, twins, context.all_logits, strict=True):
                    other.append(s.sample(row))
            found[device] = dict(zip(SAMPLINGS, tokens, strict=True))
            assert again == tokens
            if device == "cpu":
                continue
            # One sequence alone, to see what crosses.
            for seq, (name, sampler) in enumerate(zip(SAMPLINGS, ours, strict=True)):
                before = int(_cuda().standin_copied_to_host())
                context.step(tokens[seq][-1:], [sampler], seqs=[seq])
                found["bytes"][name] = int(_cuda().standin_copied_to_host()) - before
            found["n_vocab"] = model.info.n_vocab
    return found


def polled(path: str) -> dict[str, Any]:
    """A thread looks at the counters while another generates on a GPU and the processor."""
    import threading

    seen: list[tuple[int, int]] = []
    failures: list[BaseException] = []
    with (
        Model(path, device="cuda", vram_budget="8MiB", n_ctx=64, sparsity="exact") as model,
        model.context() as context,
    ):
        done = threading.Event()

        def look() -> None:
            try:
                while not done.is_set():
                    stats = context.stats()
                    seen.append((stats.n_generated_tokens, stats.layers[0].n_active))
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=look)
        context.feed(TOKENS[:8])
        thread.start()
        for token in TOKENS[8:]:
            context.feed([token], generated=True)
        done.set()
        thread.join()
        stats = context.stats()
        last = [stats.n_generated_tokens, stats.layers[0].n_active]
        context.truncate(8)
        context.reset_stats()
        for token in TOKENS[8:]:
            context.feed([token], generated=True)
        alone = context.stats()
    return {
        "seen": seen,
        "failures": [repr(failure) for failure in failures],
        "last": last,
        "alone": [alone.n_generated_tokens, alone.layers[0].n_active],
    }


def states(path: str) -> list[float]:
    """A sequence begun on one device and continued on the other: errors of its next logits."""
    found = []
    with (
        Model(path, device="cpu", n_ctx=128, sparsity="off") as cpu,
        Model(path, device="cuda", n_ctx=128, sparsity="off") as gpu,
    ):
        _keep_half(gpu)
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


def disturbed(path: str, share: str) -> dict[str, Any]:
    """Steps beside a thread that waits for the whole device, which ends what others record."""
    cuda, stop, waits = _cuda(), threading.Event(), []

    def wait() -> None:
        context = ctypes.c_void_p()
        assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert cuda.cuCtxSetCurrent(context) == 0
        while not stop.is_set():
            waits.append(cuda.cuCtxSynchronize())
        assert cuda.cuDevicePrimaryCtxRelease_v2(0) == 0

    lines = _log()
    with _shared(path, share) as model:
        with model.context() as context:
            expected = [_logits(context, step) for step in (1, 2, 3, 4, 6, 8)]
        thread = threading.Thread(target=wait)
        thread.start()
        same = []
        while not any(waits) and len(same) < 300:  # until one of them meets a recording
            with model.context() as context:
                rows = [_logits(context, step) for step in (1, 2, 3, 4, 6, 8)]
            same.append(all(map(np.array_equal, rows, expected)))
        stop.set()
        thread.join()
    return {"same": all(same), "refused": sum(map(bool, waits)), "log": lines}
