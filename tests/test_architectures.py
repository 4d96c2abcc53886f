"""The engine's logits: against the NumPy reference, and bit for bit against themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np
import numpy.typing as npt
import pytest

from oracle import Numerics, errors, forward, read_gguf
from oracle.tiny import tiny_shape, write_tiny
from qinfer import Model
from qinfer._machine import processor

Logits = npt.NDArray[np.floating]

# Three pages of keys and values, the last of them partly filled.
N_TOKENS = 150
TOKENS = np.random.default_rng(7).integers(0, 301, N_TOKENS).tolist()
OTHERS = np.random.default_rng(8).integers(0, 301, N_TOKENS).tolist()


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint."""

    arch: str
    type_name: str = "f32"
    sizes: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    extra_tensors: dict[str, list[float]] = field(default_factory=dict)
    kv_type: str = "f16"

    def write(self, folder: Path) -> Path:
        """Writes the checkpoint."""
        return write_tiny(
            folder / "tiny.gguf",
            tiny_shape(self.arch, self.type_name, **self.sizes),
            self.type_name,
            extra=self.extra,
            extra_tensors={name: np.array(data) for name, data in self.extra_tensors.items()},
        )


YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 32,
}
WIDE_HEADS = {"n_embd": 96, "n_ff": 100, "n_head": 3, "n_head_kv": 1}
FLOAT_CASES = {
    "llama": Case("llama"),
    "llama-one-kv-head": Case("llama", sizes={"n_head_kv": 1}),
    "llama-all-kv-heads": Case("llama", sizes={"n_head_kv": 6}),
    "llama-tied": Case("llama", sizes={"tied_head": True}),
    "llama-wide-heads": Case("llama", sizes=WIDE_HEADS),
    "llama-heads-of-80": Case("llama", sizes={"n_embd": 160, "n_head": 2}),
    "llama-linear": Case(
        "llama", extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    ),
    "llama-yarn": Case("llama", extra=YARN),
    "llama-yarn-betas": Case(
        "llama",
        extra=YARN
        | {
            "llama.rope.scaling.attn_factor": 0.8,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "llama3": Case("llama", extra_tensors={"rope_freqs.weight": [1.0, 1.0, 2.5, 8.0, 8.0]}),
    "llama-base": Case("llama", extra={"llama.rope.freq_base": 500000.0}),
    "llama-window": Case("llama", extra={"llama.attention.sliding_window": 70}),
    "llama-narrow-window": Case("llama", extra={"llama.attention.sliding_window": 5}),
    "llama-relu": Case("llama", extra={"qinfer.hidden_act": "relu"}),
    "llama-gelu": Case("llama", extra={"qinfer.hidden_act": "gelu"}),
    "llama-gelu-tanh": Case("llama", extra={"qinfer.hidden_act": "gelu_tanh"}),
    "llama-fatrelu": Case("llama", extra={"qinfer.hidden_act": "fatrelu:0.25"}),
    "qwen2": Case("qwen2"),
    "qwen2-tied": Case("qwen2", sizes={"tied_head": True}),
    "falcon-7b": Case("falcon", sizes={"n_head_kv": 1}),
    "falcon-40b": Case("falcon"),
    "falcon-relu": Case("falcon", extra={"qinfer.hidden_act": "relu"}),
    "opt": Case("opt", sizes={"n_head_kv": 6}),
    "bamboo": Case("bamboo"),
}


def engine_logits(path: Path, kv_type: str = "f16", **options: Any) -> Logits:
    """All logits of TOKENS."""
    with Model(path, threads=2, **options) as model, model.context(kv_type=kv_type) as context:
        context.feed(TOKENS, logits="all")
        return context.all_logits


def numerics_of(path: Path, kv_type: str) -> Numerics:
    """What the engine rounds: keys and values, and the inputs of weights of quantised types."""
    tensors = gguf.GGUFReader(path).tensors
    quantised = (tensor.name for tensor in tensors if tensor.tensor_type.name.startswith("Q"))
    return Numerics(kv_type, frozenset(quantised))


def short_texts() -> list[list[int]]:
    """Forty texts of three tokens."""
    return np.random.default_rng(9).integers(0, 301, (40, 3)).tolist()


def short_errors(path: Path, numerics: Numerics, **options: Any) -> npt.NDArray[np.float64]:
    """Errors of short texts, against an oracle that rounds as the engine does.

    Rounding is a matter of luck where float32 and float64 lie on different sides of a midpoint, and
    what has flipped once makes everything after it flip. Texts this short mostly have no flips.
    """
    checkpoint = read_gguf(path)
    found = []
    with Model(path, threads=2) as model, model.context(n_ctx=8, **options) as context:
        for text in short_texts():
            context.truncate(0)
            context.feed(text, logits="all")
            found.append(context.all_logits)
    expected = [forward(checkpoint, text, numerics) for text in short_texts()]
    return errors(np.concatenate(found), np.concatenate(expected))


def root_mean_square(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt((values**2).mean()))


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_float_weights(name: str, tmp_path: Path) -> None:
    """What is left is float32 sums, about 1e-6, and what follows from them in the cache.

    A key or value that float32 puts on the other side of a midpoint of F16, one in some hundred, is
    stored 2^-11 (5e-4) apart, which is felt where a token looks at few others.
    """
    path = FLOAT_CASES[name].write(tmp_path)
    assert np.median(short_errors(path, Numerics("f16"))) < 2e-6
    long = errors(engine_logits(path), forward(read_gguf(path), TOKENS, Numerics("f16")))
    assert np.median(long) < 1e-4
    assert long.max() < 5e-4


def test_hidden_act_overrides_the_file(tmp_path: Path) -> None:
    path = Case("llama").write(tmp_path)
    checkpoint = read_gguf(path)
    checkpoint.metadata["qinfer.hidden_act"] = "fatrelu:0.5"
    expected = forward(checkpoint, TOKENS, Numerics("f16"))
    difference = errors(engine_logits(path, hidden_act="fatrelu:0.5"), expected)
    assert np.median(difference) < 1e-5


QUANTISED = [name for name in make_model.TYPES if name != "f32"]
TYPE_CASES = [Case("llama", name) for name in QUANTISED] + [
    Case("qwen2", "q5_1"),
    Case("falcon", "q4_k"),
    Case("opt", "q4_0", {"n_head_kv": 6}),
    Case("opt", "q6_k", {"n_head_kv": 8}),
    Case("bamboo", "q8_0"),
]


@pytest.mark.parametrize("case", TYPE_CASES, ids=lambda case: f"{case.arch}-{case.type_name}")
def test_weight_types(case: Case, tmp_path: Path) -> None:
    """As exact as float weights where no int8 code flips, and within the codes' own error else.

    Blocks of 32 int8 codes err by about 0.6 % of an activation's spread, at each of twelve inputs
    one after another; half of that is forgotten in residuals.
    """
    path = case.write(tmp_path)
    short = short_errors(path, numerics_of(path, "f16"))
    assert np.median(short) < 2e-6
    assert short.max() < 0.02
    assert root_mean_square(errors(engine_logits(path), forward(read_gguf(path), TOKENS))) < 0.012


KV_CASES = [
    Case("llama", "f32", WIDE_HEADS),
    Case("llama", "f16", WIDE_HEADS | {"n_head_kv": 3}),
    Case("falcon", "f32", WIDE_HEADS),
    Case("opt", "f32", WIDE_HEADS | {"n_head_kv": 3}),
    Case("llama", "f32", WIDE_HEADS, {"llama.attention.sliding_window": 70}),
]


@pytest.mark.parametrize("case", KV_CASES, ids=lambda case: f"{case.arch}-{case.type_name}")
def test_q8_0_cache(case: Case, tmp_path: Path) -> None:
    """As with int8 activations; averaging over many values makes the error of long texts less."""
    path = case.write(tmp_path)
    short = short_errors(path, Numerics("q8_0"), kv_type="q8_0")
    assert np.median(short) < 2e-6
    assert short.max() < 0.02
    long = errors(engine_logits(path, "q8_0"), forward(read_gguf(path), TOKENS))
    assert root_mean_square(long) < 0.004


# Every path that a type, an architecture or a cache takes through the engine.
SAME_CASES = {
    "llama-f32": Case("llama"),
    "llama-f16-window": Case("llama", "f16", extra={"llama.attention.sliding_window": 70}),
    "llama-q8_0-cache-q8_0": Case("llama", "q8_0", {"n_head": 3, "n_head_kv": 1}, kv_type="q8_0"),
    "llama-q4_0": Case("llama", "q4_0"),
    "llama-q4_k": Case("llama", "q4_k"),
    "qwen2-bf16": Case("qwen2", "bf16"),
    "falcon-q6_k": Case("falcon", "q6_k"),
    "falcon-q5_1": Case("falcon", "q5_1", {"n_head_kv": 1}),
    "opt-q4_1": Case("opt", "q4_1", {"n_head_kv": 6}),
    "opt-q2_k": Case("opt", "q2_k", {"n_head_kv": 8}),
    "bamboo-q5_0": Case("bamboo", "q5_0"),
    "bamboo-q3_k": Case("bamboo", "q3_k"),
    "qwen2-q5_k": Case("qwen2", "q5_k"),
}


@pytest.fixture(scope="module", params=SAME_CASES)
def same(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model, options of its contexts, and the logits of one thread computing all at once."""
    case = SAME_CASES[request.param]
    options = {"kv_type": case.kv_type, "n_ctx": 200}
    with Model(case.write(tmp_path_factory.mktemp(request.param))) as model:
        with model.context(threads=1, n_batch=512, **options) as context:
            context.feed(TOKENS, logits="all")
            expected = context.all_logits
        yield model, options, expected


def fed(context, tokens: list[int], step: int, seq: int = 0) -> Logits:
    """Logits of all tokens, fed a few at a time."""
    rows = []
    for begin in range(0, len(tokens), step):
        context.feed(tokens[begin : begin + step], seq=seq, logits="all")
        rows.append(context.all_logits)
    return np.concatenate(rows)


@pytest.mark.parametrize("threads", [2, 3])
def test_same_for_any_threads(same, threads: int) -> None:
    model, options, expected = same
    with model.context(threads=threads, n_batch=512, **options) as context:
        np.testing.assert_array_equal(fed(context, TOKENS, N_TOKENS), expected)


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_for_any_chunks(same, step: int, threads: int) -> None:
    model, options, expected = same
    with model.context(threads=threads, **options) as context:
        np.testing.assert_array_equal(fed(context, TOKENS, step), expected)


@pytest.mark.parametrize("n_batch", [1, 5, 100])
def test_same_for_any_batch_size(same, n_batch: int) -> None:
    model, options, expected = same
    with model.context(threads=2, n_batch=n_batch, **options) as context:
        np.testing.assert_array_equal(fed(context, TOKENS, N_TOKENS), expected)


def test_same_among_other_sequences(same) -> None:
    """A prompt beside other prompts, then single tokens beside prompts and single tokens."""
    model, options, expected = same
    with model.context(threads=2, n_seq=3, **options) as context:
        context.feed(OTHERS[:40], seq=2)
        context.feed_batch({0: OTHERS[:13], 1: TOKENS[:70], 2: OTHERS[40:61]}, logits="all")
        np.testing.assert_array_equal(context.all_logits[13:83], expected[:70])
        for i in range(70, 80):
            context.feed_batch({2: [OTHERS[i]], 1: [TOKENS[i]], 0: OTHERS[i : i + 3]})
            np.testing.assert_array_equal(context.all_logits[1], expected[i])
        context.feed_batch({1: TOKENS[80:], 0: OTHERS[80:]}, logits="all")
        np.testing.assert_array_equal(context.all_logits[: N_TOKENS - 80], expected[80:])


@pytest.mark.parametrize("n_prefix", [1, 63, 64, 100])
def test_same_after_fork(same, n_prefix: int) -> None:
    """The copy goes one way and the original another, page by page and inside one."""
    model, options, expected = same
    with model.context(threads=2, n_seq=2, **options) as context:
        context.feed(TOKENS[:110], seq=0)
        context.fork(0, 1, n_prefix)
        context.feed(OTHERS[:30], seq=0)
        copied = fed(context, TOKENS[n_prefix:], 50, seq=1)
        np.testing.assert_array_equal(copied, expected[n_prefix:])
        context.truncate(110, seq=0)
        np.testing.assert_array_equal(fed(context, TOKENS[110:], 40), expected[110:])


@pytest.mark.parametrize("n_keep", [0, 1, 64, 99])
def test_same_after_truncation(same, n_keep: int) -> None:
    model, options, expected = same
    with model.context(threads=2, **options) as context:
        context.feed(TOKENS[:n_keep] + OTHERS[: 150 - n_keep])
        context.truncate(n_keep)
        assert context.length() == n_keep
        np.testing.assert_array_equal(fed(context, TOKENS[n_keep:], 60), expected[n_keep:])


def test_same_after_saving_and_loading(same, tmp_path: Path) -> None:
    model, options, expected = same
    state = tmp_path / "sequence"
    with model.context(threads=1, **options) as context:
        context.feed(TOKENS[:90])
        context.save_state(state)
    with model.context(threads=2, n_seq=2, **options) as context:
        context.feed(OTHERS[:120], seq=1)
        context.load_state(state, seq=1)
        assert context.tokens(1) == TOKENS[:90]
        np.testing.assert_array_equal(fed(context, TOKENS[90:], 60, seq=1), expected[90:])


def test_scores_are_those_of_the_logits(same) -> None:
    """Sums of exponentials are kept in double; the logits themselves are float32."""
    model, options, expected = same
    with model.context(threads=2, n_batch=64, **options) as context:
        scores = context.score(TOKENS)
    log_sums = np.log(np.exp(expected.astype(np.float64)).sum(-1))
    found = expected[np.arange(N_TOKENS - 1), TOKENS[1:]] - log_sums[:-1]
    np.testing.assert_allclose(scores[:-1], found, rtol=0, atol=5e-6)
    assert scores[-1] == 0.0


def test_hidden_state_is_what_the_head_reads(tmp_path: Path) -> None:
    path = Case("llama").write(tmp_path)
    head = read_gguf(path).tensors["output.weight"]
    with Model(path) as model, model.context() as context:
        context.feed(TOKENS, logits="all", hidden="all")
        hidden = context.hidden.astype(np.float64)
        assert errors(context.all_logits, hidden @ head.T).max() < 1e-6


@cache
def instruction_sets() -> list[str]:
    """Levels this machine can run, the portable one first."""
    best = processor().best_isa
    levels = ["portable", "neon"] if best == "neon" else ["portable", "avx2", "avx512"]
    return levels[: levels.index(best) + 1]


@pytest.mark.parametrize(
    "type_name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q5_1", "q4_k", "q6_k"]
)
def test_instruction_sets(type_name: str, tmp_path: Path) -> None:
    """Each level is held to what the level in use is held to."""
    path = Case("llama", type_name).write(tmp_path)
    numerics = numerics_of(path, "f16")
    expected = np.concatenate([forward(read_gguf(path), text, numerics) for text in short_texts()])
    script = (
        "import json, sys, numpy, qinfer\n"
        "context = qinfer.Model(sys.argv[1]).context(n_ctx=8)\n"
        "rows = []\n"
        "for text in json.loads(sys.argv[3]):\n"
        "    context.truncate(0)\n"
        "    context.feed(text, logits='all')\n"
        "    rows.append(context.all_logits)\n"
        "numpy.save(sys.argv[2], numpy.concatenate(rows))\n"
    )
    for level in instruction_sets():
        out = tmp_path / f"{level}.npy"
        arguments = [str(path), str(out), json.dumps(short_texts())]
        environment = os.environ | {"QINFER_ISA": level}
        command = [sys.executable, "-c", script, *arguments]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        short = errors(np.load(out), expected)
        assert np.median(short) < 2e-6, level
        assert short.max() < 0.02, level
