"""The speed part of gpu_check.py: one file under one budget, beside the least that reading takes.

A token cannot take less time than reading what it needs: weights, and the keys and values of the
positions before it. Layers follow one another; in each, GPU and processor read their neurons, or
their keys and values, at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_check_parts import FAILED, MEASURED, SKIPPED, Result, Settings

import qinfer
from qinfer import Model, OutOfMemory, Stats
from qinfer.sampling import Sampler, Sampling

# Before anything counts: prompts until it is measured who computes the host's neurons of one, and
# tokens until neurons have found their places by the first 64, which takes a while.
WARM_PROMPTS = 3
WARM_TOKENS = 96
# Tokens over which it is counted which neurons are active.
COUNTED_TOKENS = 16


@dataclass(frozen=True)
class Bytes:
    """What a token reads, in bytes: of weights by the GPU and the processor, of keys and values.

    `seconds` is the time that takes at least; 0 where a bandwidth is not known.
    """

    device: float
    host: float
    kv: float
    seconds: float


def share_name(share: float) -> str:
    """A budget's share of the file's size, in words."""
    return "whole" if share == 1 else f"{share:.0%}"


def speed(settings: Settings) -> Iterator[Result]:
    """Prompt and generation speed of one file under one budget."""
    path = Path(settings.model)
    n_bytes = path.stat().st_size
    budget = None if settings.budget_share == 1 else settings.budget_share * n_bytes / 2**30
    name = f"{settings.title}, {share_name(settings.budget_share)}"
    n_ctx = settings.n_prompt + settings.n_generate + COUNTED_TOKENS
    options: dict[str, Any] = {
        "device": settings.device, "vram_budget": budget, "n_ctx": n_ctx,
        "sparsity": settings.sparsity,
    }  # fmt: skip
    begin = time.perf_counter()
    try:
        with (
            Model(path, **options) as model,
            model.context(n_ctx=n_ctx, n_batch=settings.n_prompt) as context,
        ):
            loaded = time.perf_counter() - begin
            prompt, generation, stats = timed_rounds(context, settings)
            placement = context.placement
            read = bytes_read(model, context, stats, settings)
            mode = model.policy.mode
    except OutOfMemory as problem:
        yield Result("speed", name, SKIPPED, f"refused: {problem}")
        return
    assert placement is not None
    waits = {
        name: sum(getattr(layer, name) for layer in stats.layers) / stats.n_generated_tokens
        for name in ("device_seconds", "host_seconds", "wait_seconds")
    }
    rate = statistics.median(generation)
    values: dict[str, Any] = {
        "engine": "qinfer",
        "file_bytes": n_bytes,
        "budget_bytes": placement.budget_bytes,
        "used_bytes": placement.used_bytes,
        "load_seconds": loaded,
        "sparsity": mode,
        "n_rounds": len(prompt),
        "prompt_rate": statistics.median(prompt),
        "prompt_range": [min(prompt), max(prompt)],
        "generation_rate": rate,
        "generation_range": [min(generation), max(generation)],
        "bytes_per_token": stats.weight_bytes_read / stats.n_generated_tokens,
        "device_bytes": read.device,
        "host_bytes": read.host,
        "kv_bytes": read.kv,
        **waits,  # per token, in all layers that both compute
        "placed": placement.summary,
        "n_neurons": placement.n_neurons,
        "n_moved": placement.n_moved,
    }
    launches = stats.n_launches / stats.n_generated_tokens
    values["launches_per_token"] = launches
    if read.seconds > 0:
        both = read.seconds + launches * settings.launch_seconds
        values |= {
            "limit_seconds": read.seconds,
            "share": read.seconds * rate,
            "share_with_launches": both * rate,
        }
    exceeded = placement.used_bytes > placement.budget_bytes
    detail = f"{placement.summary}; sparsity {mode}, {len(prompt)} rounds, loaded in {loaded:.1f} s"
    if exceeded:
        detail = f"used {placement.used_bytes} of {placement.budget_bytes} bytes; {detail}"
    yield Result("speed", name, FAILED if exceeded else MEASURED, detail, values)


def timed_rounds(
    context: qinfer.Context, settings: Settings
) -> tuple[list[float], list[float], Stats]:
    """Tokens per second of prompts and of generating, by round, and what the last one generated.

    What is computed before these is not counted.
    """
    n_vocab = context.model_info.n_vocab
    tokens = np.random.default_rng(0).integers(0, n_vocab, settings.n_prompt)
    sampler = Sampler(n_vocab, Sampling(temperature=0))
    begin = time.perf_counter()

    def has_time() -> bool:
        return time.perf_counter() - begin < settings.seconds

    for i in range(WARM_PROMPTS):
        if i == 0 or has_time():
            context.truncate(0)
            context.feed(tokens)
    token = context.sample(sampler)
    for i in range(2 if settings.quick else WARM_TOKENS):
        if i > 0 and not has_time():
            break
        if i % settings.n_generate == 0:
            context.truncate(settings.n_prompt)
        (token,) = context.step([token], [sampler])
    prompt, generation = [], []
    begin = time.perf_counter()
    for number in range(settings.rounds):
        if number > 0 and not has_time():
            break
        sampler = Sampler(n_vocab, Sampling(temperature=0))
        context.truncate(0)
        start = time.perf_counter()
        context.feed(tokens)
        prompt_end = time.perf_counter()
        token = context.sample(sampler)
        context.reset_stats()
        generation_start = time.perf_counter()
        for _ in range(settings.n_generate):
            (token,) = context.step([token], [sampler])
        end = time.perf_counter()
        prompt.append(settings.n_prompt / (prompt_end - start))
        generation.append(settings.n_generate / (end - generation_start))
    return prompt, generation, context.stats()


def bytes_read(model: Model, context: qinfer.Context, stats: Stats, settings: Settings) -> Bytes:
    """What a generated token of the last round read, and how long that takes at least."""
    info, placement = model.info, context.placement
    assert placement is not None
    card, host = settings.bandwidth, settings.host_bandwidth
    of_neurons = np.array([layer.n_bytes for layer in stats.layers]) / stats.n_generated_tokens
    # Attention and the head, one after the other.
    rest = info.n_bytes_per_token - info.n_ffn_bytes_per_token
    rest_there = min(rest, placement.attention_bytes + placement.head_bytes)
    # Predictors are asked before both sides begin.
    predictors = np.zeros(info.n_layer)
    if model.policy.mode == "predict" and placement.n_predictors:
        n_there = placement.n_predictors
        predictors[:n_there] = placement.predictor_bytes / n_there
    neurons = np.maximum(of_neurons - predictors, 0)
    neurons_there = neurons * shares_there(model, context, settings)
    positions = settings.n_prompt + settings.n_generate / 2
    kv = np.full(info.n_layer, info.kv_bytes_per_token_f16 / info.n_layer * positions)
    kv_there = kv * (1 - context.kv_host_shares())
    seconds = 0.0
    if card > 0 and host > 0:
        of_layers = predictors / card
        of_layers += np.maximum(neurons_there / card, (neurons - neurons_there) / host)
        of_layers += np.maximum(kv_there / card, (kv - kv_there) / host)
        seconds = rest_there / card + (rest - rest_there) / host + float(of_layers.sum())
    device = float(rest_there + predictors.sum() + neurons_there.sum())
    return Bytes(device, float(rest + of_neurons.sum()) - device, float(kv.sum()), seconds)


def shares_there(model: Model, context: qinfer.Context, settings: Settings) -> Any:
    """By layer, which part of the neurons' bytes that tokens read the GPU keeps: (n_layer,)."""
    info, offload = model.info, model._weights.offload
    assert offload is not None
    kept = [offload.neurons(layer) for layer in range(info.n_layer)]
    shares = np.array([len(ids) / info.n_ff for ids in kept])
    if model.policy.mode == "off" or (shares == 1).all():
        return shares
    sampler = Sampler(info.n_vocab, Sampling(temperature=0))
    context.count_activations()
    token = 1
    for _ in range(min(COUNTED_TOKENS, settings.n_generate)):
        (token,) = context.step([token], [sampler])
    for layer, ids in enumerate(kept):
        counts = context.activation_counts(layer)
        if counts.any():
            shares[layer] = counts[ids].sum() / counts.sum()
    context.count_activations(False)
    return shares
