"""What test_cuda_kv.py runs on the stand-in, each function in a process of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_cases import _cuda, _errors
from qinfer import Model, QInferError

N_CTX = 320  # five pages
TOKENS = np.random.default_rng(8).integers(0, 301, N_CTX).tolist()


def _use(context: Any) -> npt.NDArray[np.floating]:
    """Prompts and single tokens of two sequences, forks, truncations and a state: logits of each.

    Every kind of step is taken more than twice, so that it is computed, recorded and replayed.
    """
    rows: list[npt.NDArray[np.floating]] = []

    def feed(tokens: dict[int, list[int]], generated: bool = True) -> None:
        context.feed_batch(tokens, generated=generated)
        rows.append(context.all_logits.copy())

    feed({0: TOKENS[:150]}, generated=False)
    for token in TOKENS[150:154]:
        feed({0: [token]})
    feed({0: TOKENS[154:180]}, generated=False)
    for token in TOKENS[180:183]:  # what was recorded before the prompt
        feed({0: [token]})
    feed({0: TOKENS[183:260], 1: TOKENS[:70]}, generated=False)
    for i in range(4):
        feed({0: [TOKENS[260 + i]], 1: [TOKENS[70 + i]]})
    context.fork(0, 1, 140)  # a page that both hold is written to
    for i in range(3):
        feed({0: [TOKENS[264 + i]], 1: [TOKENS[140 + i]]})
    context.truncate(70)
    feed({0: TOKENS[70:75], 1: TOKENS[143:300]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        context.save_state(path, 1)
        context.load_state(path, 0)
    feed({0: TOKENS[300:303], 1: TOKENS[300:303]})
    return np.concatenate(rows)


def compare(path: str, places: list[dict[str, Any]], kv_type: str) -> list[dict[str, Any]]:
    """The logits with keys and values in each place against the processor's."""
    options: dict[str, Any] = {"n_ctx": N_CTX, "kv_type": kv_type, "sparsity": "off"}
    with Model(path, device="cpu", **options) as cpu, cpu.context(n_seq=2) as context:
        expected = _use(context)
        assert context.info.kv_mode == "host"
        assert context.kv_host_shares().tolist() == [1.0] * cpu.info.n_layer
    found = []
    for place in places:
        with (
            Model(path, device="cuda", vram_budget="300MiB", **options, **place) as gpu,
            gpu.context(n_seq=2, n_batch=64) as context,
        ):
            errors = _errors(_use(context), expected)
            shares = context.kv_host_shares().tolist()
            placement, info = gpu.placement, context.info
            assert placement is not None
            assert placement.used_bytes <= placement.budget_bytes
            found.append(
                {
                    "errors": errors,
                    "shares": shares,
                    "mode": info.kv_mode,
                    "n_pages": info.n_device_pages,
                }
            )
        assert int(_cuda().standin_allocated()) == 0
    return found


def states(path: str) -> list[Any]:
    """A state saved in each place has the same bytes, and is gone on with in each other."""
    places = [{"kv_mode": mode} for mode in ("device", "host", "split")] + [{"kv_ratio": 0.5}]
    files, errors = [], []
    with (
        Model(path, device="cuda", n_ctx=N_CTX, sparsity="off") as model,
        tempfile.TemporaryDirectory() as folder,
    ):
        contexts = [model.context(**place) for place in places]
        for i, context in enumerate(contexts):
            context.feed(TOKENS[:192])
            context.save_state(Path(folder) / str(i))
            context.feed(TOKENS[192:200])
            files.append((Path(folder) / str(i)).read_bytes())
        expected = contexts[0].logits[None].copy()
        for i in range(len(places)):
            for context in contexts:
                context.load_state(Path(folder) / str(i))
                context.feed(TOKENS[192:200])
                errors += _errors(context.logits[None], expected)
    return [[file == files[0] for file in files], errors]


def adapted(path: str, step: float) -> list[list[float]]:
    """The host's share by layer, token after token; ten pages and then eleven."""
    with (
        Model(path, device="cuda", n_ctx=704, sparsity="off", kv_ratio=0.5, kv_step=step) as model,
        model.context() as context,
    ):
        context.feed(np.resize(TOKENS, 630).tolist())
        curve = []
        for token in TOKENS[:16]:
            context.feed([token], generated=True)
            curve.append(context.kv_host_shares().tolist())
        return curve


def kept_under(path: str, sizes: list[str]) -> list[dict[str, Any]]:
    """What "auto" does with budgets that hold the keys and values of a long context or do not."""
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"n_ctx": 4096, "sparsity": "off"}
    tokens = TOKENS[:40]
    with Model(path, device="cpu", **options) as cpu, cpu.context() as context:
        context.feed(tokens)
        expected = context.logits[None].copy()
    for size in sizes:
        try:
            with (
                Model(path, device="cuda", vram_budget=size, **options) as model,
                model.context(n_batch=32) as context,
            ):
                context.feed(tokens)
                with model.context(n_batch=32) as other:
                    later = other.info.kv_mode
                placement, info = model.placement, context.info
                assert placement is not None
                rows.append(
                    {
                        "mode": info.kv_mode,
                        "later": later,
                        "n_pages": info.n_device_pages,
                        "n_layers": placement.n_layers,
                        "n_neurons": placement.n_neurons,
                        "has_head": placement.has_head,
                        "used": placement.used_bytes,
                        "held": int(_cuda().standin_allocated()),
                        "budget": placement.budget_bytes,
                        "error": _errors(context.logits[None], expected)[0],
                        "summary": placement.summary,
                    }
                )
        except QInferError as error:
            rows.append({"refused": type(error).__name__, "message": str(error)})
    return rows


def failures(path: str, code: int, every: int) -> dict[str, Any]:
    """A failure injected into one driver call after the other of a context that splits.

    The sequence is then as it was, and goes on to the same logits.
    """
    cuda = _cuda()
    kinds: dict[str, int] = {}
    with (
        Model(path, device="cuda", n_ctx=N_CTX, sparsity="off", kv_ratio=0.5) as model,
        model.context(n_batch=64) as context,
    ):

        def run() -> list[float]:
            context.truncate(100)
            context.feed(TOKENS[100:200])
            for token in TOKENS[200:203]:
                context.feed([token], generated=True)
            return [float(x) for x in context.logits[:8]]

        context.feed(TOKENS[:100])
        run()
        expected = run()
        start = int(cuda.standin_calls())
        run()
        n_calls = int(cuda.standin_calls()) - start
        for number in range(0, n_calls, every):
            cuda.standin_fail_at(number, code)
            try:
                run()
                kinds["none"] = kinds.get("none", 0) + 1
            except QInferError as error:
                kinds[type(error).__name__] = kinds.get(type(error).__name__, 0) + 1
            finally:
                cuda.standin_fail_at(-1, 0)
        return {"n_calls": n_calls, "kinds": kinds, "same": run() == expected}
