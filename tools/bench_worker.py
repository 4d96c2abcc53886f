"""One engine in a process of its own, answering timing requests for bench_peers.py.

Reads a JSON request per line from standard input and writes a JSON answer per line. Imports nothing
but the standard library and the engine, because it runs in the engine's own Python.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

N_CTX = 1024
N_BATCH = 512


class Engine(Protocol):
    """What is timed: a model with one empty sequence."""

    version: str

    @property
    def kv_bytes(self) -> int:
        """Memory held for keys and values."""

    def feed(self, tokens: list[int]) -> None:
        """Appends a prompt's tokens and waits until the logits of the last one are there."""

    def step(self, token: int) -> None:
        """The same with one generated token."""

    def reset(self) -> None:
        """Empties the sequence."""

    def close(self) -> None:
        """Frees model and context."""


class LlamaCpp:
    """llama.cpp through the C functions that llama-cpp-python exposes."""

    def __init__(self, path: str, n_threads: int, sparsity: str) -> None:
        import llama_cpp
        from llama_cpp import llama_cpp as lib

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.lib = lib
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = N_CTX
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = n_threads
        self.context = lib.llama_init_from_model(self.model, params)
        head_dim = lib.llama_model_n_embd(self.model) // lib.llama_model_n_head(self.model)
        n_embd_kv = head_dim * lib.llama_model_n_head_kv(self.model)
        self.kv_bytes_per_token = 2 * 2 * n_embd_kv * lib.llama_model_n_layer(self.model)

    @property
    def kv_bytes(self) -> int:
        # llama.cpp touches the whole cache when it makes it.
        return int(self.lib.llama_n_ctx(self.context) * self.kv_bytes_per_token)

    def feed(self, tokens: list[int]) -> None:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        batch = self.lib.llama_batch_get_one(array, len(tokens))
        if self.lib.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.lib.llama_synchronize(self.context)

    def step(self, token: int) -> None:
        self.feed([token])

    def reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


class QInfer:
    """qinfer through its public Python interface."""

    def __init__(self, path: str, n_threads: int, sparsity: Any) -> None:
        import qinfer

        self.version = f"qinfer {qinfer.__version__}"
        self.model = qinfer.Model(path, n_ctx=N_CTX, threads=n_threads, sparsity=sparsity)
        self.context = self.model.context(n_batch=N_BATCH)

    @property
    def kv_bytes(self) -> int:
        return int(self.context.info.kv_bytes_used)

    def feed(self, tokens: list[int]) -> None:
        self.context.feed(tokens)

    def step(self, token: int) -> None:
        self.context.feed([token], generated=True)

    def reset(self) -> None:
        self.context.truncate(0)

    def close(self) -> None:
        self.context.close()
        self.model.close()


# Module to import, class.
ENGINES: dict[str, tuple[str, Callable[[str, int, str], Engine]]] = {
    "llama.cpp": ("llama_cpp", LlamaCpp),
    "qinfer": ("qinfer", QInfer),
}


class Worker:
    """Answers requests; each answer holds wall seconds, and CPU seconds of all threads."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self.make_engine = make_engine
        self.engine: Engine | None = None
        self.own_bytes = private_bytes()  # the interpreter and its modules

    def load(self) -> dict[str, Any]:
        """Loads the model anew and computes one token."""
        if self.engine:
            self.engine.close()
        answer = timed(self.first_token)
        assert self.engine
        return answer | {"version": self.engine.version}

    def first_token(self) -> None:
        self.engine = self.make_engine()
        self.engine.feed([1])

    def prefill(self, n: int) -> dict[str, Any]:
        """Computes a prompt of n tokens."""
        assert self.engine
        engine = self.engine
        engine.reset()
        return timed(lambda: engine.feed(tokens(n)))

    def decode(self, n: int) -> dict[str, Any]:
        """Computes n tokens one by one after a prompt of 16."""
        assert self.engine
        engine = self.engine
        engine.reset()
        engine.feed(tokens(16))

        def run() -> None:
            for token in tokens(n):
                engine.step(token)

        return timed(run)

    def facts(self, n_threads: int) -> dict[str, Any]:
        """What only qinfer tells: the read bandwidth, the mode, the weight bytes of a token."""
        from qinfer._machine import read_bandwidth

        engine = self.engine
        assert isinstance(engine, QInfer)
        engine.context.reset_stats()
        self.decode(8)
        stats = engine.context.stats()
        return {
            "bandwidth": read_bandwidth(n_threads),
            "sparsity": engine.model.policy.mode,
            "bytes_per_token": stats.weight_bytes_read / stats.n_generated_tokens,
        }

    def memory(self) -> dict[str, Any]:
        """Private memory since loading, without keys and values."""
        assert self.engine
        return {"bytes": private_bytes() - self.own_bytes - self.engine.kv_bytes}


def tokens(n: int) -> list[int]:
    """Token ids that every vocabulary of 300 or more has and none treats specially."""
    return [260 + i * 7 % 40 for i in range(n)]


def timed(work: Callable[[], None]) -> dict[str, Any]:
    """Runs it; seconds on the wall and of all threads' CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def private_bytes() -> int:
    """Resident memory that no file backs."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def main(engine: str, path: str, n_threads: int, sparsity: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # llama.cpp writes its log to the C library's stdout and stderr.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    module, make_engine = ENGINES[engine]
    importlib.import_module(module)
    worker = Worker(lambda: make_engine(path, n_threads, sparsity))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # reported to the other process, which stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
