"""How fast a model runs on this machine, beside how fast the machine reads memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import _machine
from .errors import ArgumentError
from .model import Model
from .offload import Placement
from .sampling import Sampler, Sampling
from .sparsity import Mode, Shares


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of some values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Figures of a benchmark: tokens per second, bytes, bytes per second.

    `share` is the part of the processor's read bandwidth that reading the weights took while
    generating, `active` the part of all neurons that contributed, None where all are computed.
    `placement` tells what of the model a GPU kept in the end, and `kv_host_shares`, by layer, which
    share of the positions the processor attended to last; both are None where no GPU computed.
    """

    n_prompt: int
    n_generate: int
    threads: int
    isa: str
    sparsity: Mode
    active: float | None
    prompt_rate: Spread
    generation_rate: Spread
    bytes_per_token: int
    bytes_per_second: float
    read_bandwidth: Spread
    share: float
    placement: Placement | None
    kv_host_shares: list[float] | None


def bench(
    model: Model,
    *,
    n_prompt: int = 128,
    n_generate: int = 32,
    repeats: int = 5,
    n_ctx: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Measures prompt and generation speed, and in turns with them the machine's read bandwidth.

    The prompt is `n_prompt` arbitrary tokens; `n_generate` greedy ones follow, in a context of
    `n_ctx` positions, None for as many as that takes. One more round comes first and is not
    counted: it brings the file into memory. `progress(done, rounds)` follows.

    Raises:
        ArgumentError: a number is not positive, or `n_ctx` is less than the tokens.
    """
    for name, value in (("n_prompt", n_prompt), ("n_generate", n_generate), ("repeats", repeats)):
        if value < 1:
            raise ArgumentError(f"{name}={value} is not a positive integer")
    if n_ctx is None:
        n_ctx = n_prompt + n_generate
    elif n_ctx < n_prompt + n_generate:
        raise ArgumentError(
            f"n_ctx={n_ctx}: a prompt of {n_prompt} tokens and {n_generate} generated ones do not "
            "fit in that"
        )
    tokens = np.random.default_rng(0).integers(0, model.info.n_vocab, n_prompt)
    prompt_rates, generation_rates, bandwidths = [], [], []
    with model.context(n_ctx=n_ctx) as context:
        threads = context.info.threads
        for number in range(-1, repeats):
            sampler = Sampler(model.info.n_vocab, Sampling(temperature=0))
            context.truncate(0)
            context.reset_stats()
            start = time.perf_counter()
            context.feed(tokens)
            prompt_end = time.perf_counter()
            token = context.sample(sampler)
            generation_start = time.perf_counter()
            for _ in range(n_generate):
                (token,) = context.step([token], [sampler])
            end = time.perf_counter()
            if number >= 0:
                prompt_rates.append(n_prompt / (prompt_end - start))
                generation_rates.append(n_generate / (end - generation_start))
                bandwidths.append(_machine.read_bandwidth(threads))
            if progress is not None:
                progress(number + 2, repeats + 1)
        stats = context.stats()
        shares = Shares.of(stats.layers, model.info.n_ff)
        bytes_per_token = stats.weight_bytes_read // n_generate
        placement = context.placement
        kv_host_shares = None if placement is None else context.kv_host_shares().tolist()
    generation, bandwidth = Spread.of(generation_rates), Spread.of(bandwidths)
    bytes_per_second = bytes_per_token * generation.median
    return BenchResult(
        n_prompt=n_prompt,
        n_generate=n_generate,
        threads=threads,
        isa=_machine.processor().isa,
        sparsity=model.policy.mode,
        active=shares.active if shares is not None else None,
        prompt_rate=Spread.of(prompt_rates),
        generation_rate=generation,
        bytes_per_token=bytes_per_token,
        bytes_per_second=bytes_per_second,
        read_bandwidth=bandwidth,
        share=bytes_per_second / bandwidth.median,
        placement=placement,
        kv_host_shares=kv_host_shares,
    )


def render(model: Model, result: BenchResult) -> str:
    """A result as text for a terminal."""
    info = model.info
    rows = [
        ("model", f"{info.architecture}, {info.n_params / 1e6:.1f} M parameters, {model.path}"),
        ("machine", f"{_machine.processor().brand}, {result.isa}, {result.threads} threads"),
        *([("GPU", str(result.placement))] if result.placement is not None else []),
        (f"prompt {result.n_prompt}", _rate(result.prompt_rate)),
        (f"generate {result.n_generate}", _rate(result.generation_rate)),
        ("sparsity", _sparsity(result)),
        ("per token", f"{result.bytes_per_token / 1e6:.1f} MB of weights read"),
        ("reading", _reading(result)),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def _reading(result: BenchResult) -> str:
    speed = f"{result.bytes_per_second / 1e9:.1f} GB/s"
    most = f"{result.read_bandwidth.median / 1e9:.1f} GB/s"
    if result.placement is not None:
        return f"{speed} by all; the processor alone reads {most} of its memory"
    return f"{speed}, {result.share:.0%} of the {most} this machine reads"


def _sparsity(result: BenchResult) -> str:
    if result.active is None:
        return f"{result.sparsity}, all neurons computed"
    return f"{result.sparsity}, {result.active:.1%} of the neurons active"


def _rate(rate: Spread) -> str:
    return f"{rate.median:.1f} tokens/s ({rate.low:.1f} to {rate.high:.1f})"
