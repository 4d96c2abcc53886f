"""What test_cuda_prompts.py runs on the stand-in, each function in a process of its own.

A function takes and returns what JSON can say.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_cases import TOKENS, _cuda, _errors, _keep_half, _log
from qinfer import ArgumentError, Model


def prompts(path: str, devices: list[str]) -> list[dict[str, Any]]:
    """A prompt in one batch on some devices: errors of its logits, what is held, what is logged."""
    tokens = (TOKENS * 2)[:40]
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "off"}
    with Model(path, device="cpu", **options) as cpu, cpu.context() as context:
        context.feed(tokens, logits="all")
        expected = context.all_logits.copy()
    lines = _log()
    found = []
    for device in devices:
        lines.clear()
        with Model(path, device=device, vram_budget="900MiB", **options) as gpu:
            _keep_half(gpu)
            with gpu.context(n_batch=64) as context:
                context.feed(tokens, logits="all")
                assert gpu.placement is not None
                found.append(
                    {
                        "error": float(np.median(_errors(context.all_logits, expected))),
                        "held": int(_cuda().standin_allocated()),
                        "used": gpu.placement.used_bytes,
                        "budget": gpu.placement.budget_bytes,
                        "log": [line for line in lines if "cuBLAS" in line],
                    }
                )
    return found


def chunked(path: str) -> dict[str, Any]:
    """How many different logits a prompt has that is cut in three ways, half of the neurons kept.

    By what is computed of the prompt; and how far those of an ordinary context are.
    """
    tokens = (TOKENS * 2)[:40]
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "predict", "deterministic": True}
    with Model(path, device="cuda", vram_budget="900MiB", **options) as gpu:
        _keep_half(gpu)
        for prefill in ("dense", "sparse"):
            with gpu.context(n_batch=64, prefill=prefill) as context:
                rows = []
                for step in (1, 7, 64):
                    context.truncate(0)
                    for begin in range(0, len(tokens), step):
                        context.feed(tokens[begin : begin + step])
                    context.feed([7], logits="last", generated=True)
                    rows.append(context.logits.tobytes())
            found[prefill] = len(set(rows))
        rows = []
        for deterministic in (False, True):
            with gpu.context(n_batch=64, deterministic=deterministic) as context:
                context.feed(tokens)
                rows.append(context.logits.copy())
        found["distance"] = _errors(rows[0][None], rows[1][None])[0]
        try:
            gpu.context(kv_mode="split", kv_step=0.1)
        except ArgumentError as error:
            found["refused"] = str(error)
    return found


def streamed(path: str, shares: list[str]) -> dict[str, Any]:
    """A prompt of 40 tokens on the processor, and on device 3 with its neurons with the host.

    Errors of logits, what is held, and by layer the bytes of all neurons, and tokens and neurons
    active where those alone are computed.
    """
    tokens = (TOKENS * 2)[:40]
    found: dict[str, Any] = {}
    expected = None
    for share in ["cpu", *shares]:
        device = "cpu" if share == "cpu" else "cuda:3"
        with Model(
            path,
            device=device,
            vram_budget=None if share == "cpu" else "32MiB",
            gpu_split="none" if share == "none" else "auto",
            n_ctx=64,
            sparsity="off",
        ) as model:
            if share == "half":
                _keep_half(model)
            with model.context(n_batch=64) as context:
                context.feed(tokens, logits="all")
                logits = context.all_logits.copy()
                expected = logits if expected is None else expected
                layers = context.stats().layers
                row: dict[str, Any] = {
                    "error": float(np.median(_errors(logits, expected))),
                    "dense": [layer.n_bytes for layer in layers],
                    "host_seconds": sum(layer.host_seconds for layer in layers),
                }
            with model.context(n_batch=64, sparsity="exact", prefill="sparse") as context:
                context.feed(tokens)
                layers = context.stats().layers
                row["exact"] = [[layer.n_tokens, layer.n_active] for layer in layers]
                if model.placement is not None:
                    row |= {
                        "held": int(_cuda().standin_allocated()),
                        "budget": model.placement.budget_bytes,
                    }
            found[share] = row
    return found
