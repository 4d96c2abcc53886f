"""Sampling through the C interface, each stage against its definition in NumPy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qinfer import _native
from qinfer.errors import ArgumentError
from qinfer.sampling import Sampler, Sampling

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

# No stage changes anything: plain draws at temperature 1.
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
N_VOCAB = 300


def uniform_numbers(seed: int) -> Iterator[float]:
    """The generator's numbers in [0, 1): xoshiro256++ seeded by SplitMix64, top 53 bits."""
    mask = 2**64 - 1
    state = []
    for _ in range(4):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        state.append(z ^ z >> 31)

    def rotate(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & mask

    a, b, c, d = state
    while True:
        yield ((rotate((a + d) & mask, 23) + a & mask) >> 11) / 2**53
        t = b << 17 & mask
        c ^= a
        d ^= b
        b ^= c
        a ^= d
        c ^= t
        d = rotate(d, 45)


def softmax(logits: Floats) -> Floats:
    weights: Floats = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(p: Floats) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def reach(p: Floats, mass: float, min_keep: int) -> int:
    """How many leading entries it takes to reach `mass` together, at least `min_keep`."""
    enough = np.cumsum(p) >= mass
    n = int(enough.argmax()) + 1 if enough.any() else len(p)
    return min(max(n, min_keep), len(p))


def reference(logits: Floats, options: dict[str, Any]) -> tuple[Ints, Floats]:
    """The tokens a draw chooses from, most likely first, and their probabilities."""
    order: Ints = np.argsort(-logits, kind="stable")
    order = order[logits[order] > -np.inf]
    min_keep = options.get("min_keep", 1)
    if options.get("top_k", 0) > 0:
        order = order[: options["top_k"]]
    if options.get("typical_p", 1.0) < 1:
        p = softmax(logits[order])
        nearest = np.argsort(np.abs(-np.log(p) - entropy(p)), kind="stable")
        kept = nearest[: reach(p[nearest], options["typical_p"], min_keep)]
        order = order[np.sort(kept)]
    if options.get("top_p", 1.0) < 1:
        order = order[: reach(softmax(logits[order]), options["top_p"], min_keep)]
    if options.get("min_p", 0.0) > 0:
        p = softmax(logits[order])
        order = order[: max(int((p >= options["min_p"] * p[0]).sum()), min_keep)]
    temperature = options["temperature"]
    if options.get("dynatemp_range", 0.0) > 0 and len(order) > 1:
        share = entropy(softmax(logits[order])) / math.log(len(order))
        low = max(0.0, temperature - options["dynatemp_range"])
        high = temperature + options["dynatemp_range"]
        temperature = low + (high - low) * share ** options.get("dynatemp_exponent", 1.0)
    return order, softmax(logits[order] / temperature)


def penalized(
    logits: Floats, recent: list[int], repeat: float, presence: float, frequency: float
) -> Floats:
    out = logits.copy()
    for token, count in Counter(recent).items():
        out[token] = out[token] / repeat if out[token] > 0 else out[token] * repeat
        out[token] -= presence + frequency * count
    return out


def assert_drawn(token: int, order: Ints, p: Floats, u: float) -> None:
    """`token` is the one whose stretch of the cumulative distribution holds u."""
    assert token in order
    rank = int(np.flatnonzero(order == token)[0])
    end = float(np.cumsum(p)[rank])
    assert end - p[rank] - 1e-6 <= u <= end + 1e-6


def random_logits(seed: int, n: int = N_VOCAB) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(n) * 2.5).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.0},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.2, "min_keep": 12},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"min_p": 0.9, "min_keep": 3},
        {"typical_p": 0.0},
        {"typical_p": 0.3},
        {"typical_p": 0.95},
        {"typical_p": 0.1, "min_keep": 9},
        {"dynatemp_range": 0.5},
        {"dynatemp_range": 3.0, "dynatemp_exponent": 1.7},
        {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
        {"top_k": 100, "typical_p": 0.9, "top_p": 0.8, "min_p": 0.01, "dynatemp_range": 0.4},
    ],
    ids=str,
)
def test_draws_follow_the_definition(options: dict[str, Any]) -> None:
    options = NEUTRAL | options
    for seed in range(25):
        sampler = Sampler(N_VOCAB, Sampling(**options, seed=seed))
        for step, u in enumerate(islice(uniform_numbers(seed), 4)):
            logits = random_logits(100 * seed + step)
            order, p = reference(logits.astype(np.float64), options)
            assert_drawn(sampler.sample(logits), order, p, u)


@pytest.mark.parametrize("n_vocab", [1, 2, 1025, 50_000])
@pytest.mark.parametrize("options", [{"temperature": 3.0}, {"top_p": 0.99}, {"typical_p": 0.9}])
def test_vocabularies_of_any_size(n_vocab: int, options: dict[str, Any]) -> None:
    options = NEUTRAL | options
    sampler = Sampler(n_vocab, Sampling(**options, seed=3))
    for step, u in enumerate(islice(uniform_numbers(3), 10)):
        logits = random_logits(step, n_vocab)
        order, p = reference(logits.astype(np.float64), options)
        assert_drawn(sampler.sample(logits), order, p, u)


@pytest.mark.parametrize(
    ("repeat", "presence", "frequency"),
    [(1.3, 0.0, 0.0), (0.8, 0.0, 0.0), (1.0, 0.9, 0.0), (1.0, 0.0, 0.4), (1.1, -0.5, 0.3)],
)
@pytest.mark.parametrize("window", [0, 1, 5, -1])
def test_penalties(repeat: float, presence: float, frequency: float, window: int) -> None:
    options = NEUTRAL | {
        "repeat_penalty": repeat,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "penalty_window": window,
    }
    history = [1, 2, 2, 3, 3, 3, 299]
    sampler = Sampler(N_VOCAB, Sampling(**options, seed=11))
    sampler.accept(history)
    for step, u in enumerate(islice(uniform_numbers(11), 30)):
        logits = random_logits(step)
        logits[:4] += 5  # so that the history matters
        recent = history if window < 0 else history[len(history) - min(window, len(history)) :]
        changed = penalized(logits.astype(np.float64), recent, repeat, presence, frequency)
        token = sampler.sample(logits)
        assert_drawn(token, *reference(changed, options), u)
        history.append(token)


def test_bias_is_added_and_bans() -> None:
    bias = {0: 9.0, 1: -math.inf, 2: -1.5}
    sampler = Sampler(N_VOCAB, Sampling(**NEUTRAL, logit_bias=bias, seed=5))
    for step, u in enumerate(islice(uniform_numbers(5), 50)):
        logits = random_logits(step)
        logits[1] = 20
        changed = logits.astype(np.float64)
        for token, value in bias.items():
            changed[token] += value
        token = sampler.sample(logits)
        assert token != 1
        assert_drawn(token, *reference(changed, NEUTRAL), u)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_mirostat_2(temperature: float) -> None:
    tau, eta = 2.5, 0.2
    sampler = Sampler(
        N_VOCAB,
        Sampling(mirostat=2, mirostat_tau=tau, mirostat_eta=eta, temperature=temperature, seed=8),
    )
    mu = 2 * tau
    for step, u in enumerate(islice(uniform_numbers(8), 60)):
        logits = random_logits(step)
        p = softmax(logits.astype(np.float64) / temperature)
        order: Ints = np.argsort(-p, kind="stable")
        surprise = -np.log2(p)
        order = order[: max(int((surprise <= mu).sum()), 1)]
        token = sampler.sample(logits)
        assert_drawn(token, order, p[order] / p[order].sum(), u)
        mu -= eta * (surprise[token] - tau)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [2.6, 3.2])
def test_mirostat_reaches_its_surprise(version: int, tau: float) -> None:
    sampler = Sampler(
        N_VOCAB, Sampling(mirostat=version, mirostat_tau=tau, temperature=1.0, seed=2)
    )
    surprises = []
    for step in range(1500):
        logits = random_logits(step)
        token = sampler.sample(logits)
        surprises.append(-math.log2(softmax(logits.astype(np.float64))[token]))
    assert np.mean(surprises[500:]) == pytest.approx(tau, abs=0.1)


def test_greedy_is_argmax_with_the_lowest_id_of_equals() -> None:
    sampler = Sampler(N_VOCAB, Sampling(temperature=0, top_k=3, mirostat=2))
    for seed in range(50):
        logits = np.round(random_logits(seed))  # many ties
        assert sampler.sample(logits) == int(logits.argmax())


def test_infinite_logits() -> None:
    logits = np.zeros(5, np.float32)
    logits[[2, 4]] = np.inf
    for temperature in (0.0, 1.0):
        assert Sampler(5, Sampling(temperature=temperature)).sample(logits) == 2
    logits[:] = -np.inf
    logits[3] = -2
    assert Sampler(5, Sampling(**NEUTRAL)).sample(logits) == 3


def test_the_seed_decides() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(N_VOCAB, Sampling(**NEUTRAL, seed=seed))
        return [sampler.sample(random_logits(step)) for step in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(2**64 - 1) != draws(0)


def test_logits_stay_unchanged() -> None:
    logits = random_logits(0)
    before = logits.copy()
    sampler = Sampler(N_VOCAB, Sampling(repeat_penalty=1.5, logit_bias={3: 2.0}))
    sampler.accept([3, 4])
    sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


def test_unusable_logits_are_refused_and_change_nothing() -> None:
    sampler, undisturbed = (Sampler(N_VOCAB, Sampling(**NEUTRAL, seed=4)) for _ in range(2))
    for step in range(10):
        logits = random_logits(step)
        broken = logits.copy()
        broken[17 * step] = np.nan
        with pytest.raises(ArgumentError, match=rf"logit of token {17 * step} is NaN"):
            sampler.sample(broken)
        with pytest.raises(ArgumentError, match="all 300 logits are -inf"):
            sampler.sample(np.full(N_VOCAB, -np.inf, np.float32))
        assert sampler.sample(logits) == undisturbed.sample(logits)


def test_accepted_tokens_must_exist() -> None:
    sampler = Sampler(10, Sampling(temperature=0, presence_penalty=5.0))
    for token in (-1, 10):
        with pytest.raises(ArgumentError, match=rf"{token}.*0 to 9"):
            sampler.accept([3, token])
    logits = np.arange(10, dtype=np.float32)
    logits[3] = 9.5
    assert sampler.sample(logits) == 3  # the 3 before the bad token was not accepted


# ---- what only a caller of the C functions can get wrong ----


def c_params(**changes: Any) -> Any:
    params = _native.ffi.new("qi_sampling_params *")
    params.temperature = params.top_p = params.typical_p = params.repeat_penalty = 1.0
    params.dynatemp_exponent = params.min_keep = 1
    for name, value in changes.items():
        setattr(params, name, value)
    return params


def create(params: Any, n_vocab: int) -> Any:
    out = _native.ffi.new("qi_sampler **")
    error = _native.new_error()
    status = _native.lib.qi_sampler_create(params, n_vocab, out, error)
    _native.check(status, error)
    return out[0]


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("temperature", -0.5, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", math.inf, "finite"),
        ("dynatemp_range", -1.0, "at least 0"),
        ("dynatemp_exponent", 0.0, "above 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 1.5, "from 0 to 1"),
        ("min_p", -0.25, "from 0 to 1"),
        ("typical_p", math.nan, "from 0 to 1"),
        ("repeat_penalty", 0.0, "above 0"),
        ("presence_penalty", math.inf, "finite"),
        ("frequency_penalty", math.nan, "finite"),
        ("penalty_window", -2, "at least -1"),
        ("mirostat", 3, r"0 \(off\), 1 or 2"),
        ("mirostat_tau", -1.0, "at least 0"),
        ("mirostat_eta", -1.0, "at least 0"),
        ("min_keep", 0, "at least 1"),
        ("n_bias", -1, "at least 0"),
    ],
)
def test_bad_parameters_are_named(name: str, value: float, range_: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{name} is .*{range_}"):
        create(c_params(**{name: value}), 10)


def test_null_and_empty() -> None:
    lib, null = _native.lib, _native.ffi.NULL
    with pytest.raises(ArgumentError, match="n_vocab is 0"):
        create(c_params(), 0)
    with pytest.raises(ArgumentError, match="'bias_tokens' is NULL"):
        create(c_params(n_bias=1), 10)
    with pytest.raises(ArgumentError, match="'params' is NULL"):
        create(null, 10)
    sampler = create(c_params(), 10)
    error = _native.new_error()
    token = _native.ffi.new("int32_t *")
    assert lib.qi_sampler_accept(sampler, null, 0, error) == lib.QI_OK
    assert lib.qi_sampler_accept(sampler, null, 1, error) == lib.QI_ARGUMENT
    assert lib.qi_sampler_sample(sampler, null, token, error) == lib.QI_ARGUMENT
    assert lib.qi_sampler_sample(null, null, token, null) == lib.QI_ARGUMENT
    lib.qi_sampler_close(sampler)
    lib.qi_sampler_close(null)
