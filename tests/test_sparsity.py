"""Which neurons are computed: against the NumPy reference, and bit for bit against all of them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np
import numpy.typing as npt
import pytest

from oracle import Numerics, errors, forward, read_gguf
from oracle.tiny import as_powerinfer, tiny_shape, write_tiny
from qinfer import ArgumentError, FormatError, Model
from test_architectures import instruction_sets

Logits = npt.NDArray[np.floating]

N_TOKENS = 90
TOKENS = np.random.default_rng(5).integers(0, 301, N_TOKENS).tolist()
OTHERS = np.random.default_rng(6).integers(0, 301, N_TOKENS).tolist()


@dataclass(frozen=True)
class Case:
    """A tiny ReLU checkpoint with predictors."""

    arch: str
    type_name: str = "f32"
    by_neuron: bool = True
    hidden_act: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Of the predictors: a row of fc2 is whole blocks."""
        if self.type_name.endswith("_k"):
            return 256
        return 32 if self.type_name in make_model.BLOCKS else 21

    def write(self, folder: Path, **options: Any) -> Path:
        """Writes the checkpoint."""
        act = self.hidden_act or ("relu_relu" if self.arch == "bamboo" else "relu")
        return write_tiny(
            folder / "tiny.gguf",
            tiny_shape(self.arch, self.type_name, **self.sizes),
            self.type_name,
            by_neuron=self.by_neuron,
            **{"rank": self.rank, "extra": {"qinfer.hidden_act": act}} | options,
        )


CASES = {
    "llama": Case("llama"),
    "llama-ordinary": Case("llama", by_neuron=False),
    "llama-fatrelu": Case("llama", hidden_act="fatrelu:0.3"),
    "bamboo": Case("bamboo"),
    "falcon": Case("falcon"),
    "falcon-one-norm": Case("falcon", sizes={"n_head_kv": 1}),
    "opt": Case("opt", sizes={"n_head_kv": 6}),
    "opt-ordinary": Case("opt", by_neuron=False, sizes={"n_head_kv": 6}),
    "llama-f16": Case("llama", "f16"),
    "llama-bf16": Case("llama", "bf16"),
    "llama-wide": Case("llama", "f16", sizes={"n_embd": 312, "n_ff": 700}),
}
QUANTISED = {
    f"{arch}-{name}": Case(arch, name, sizes={"n_head_kv": 2 if arch != "opt" else 6})
    for arch, names in {
        "llama": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
        "bamboo": ("q4_0",),
        "falcon": ("q8_0",),
        "opt": ("q4_0",),
    }.items()
    for name in names
} | {f"llama-{name}": Case("llama", name) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")}
QUANTISED["llama-q4_0-ordinary"] = Case("llama", "q4_0", by_neuron=False)


def logits_of(model: Model, tokens: list[int], step: int, **options: Any) -> Logits:
    """Logits of tokens fed as generated ones, `step` at a time."""
    with model.context(n_ctx=N_TOKENS, **options) as context:
        rows = []
        for begin in range(0, len(tokens), step):
            context.feed(tokens[begin : begin + step], logits="all", generated=True)
            rows.append(context.all_logits)
    return np.concatenate(rows)


def numerics_of(path: Path) -> Numerics:
    """What the engine rounds: quantised weights but `ffn_down_t` multiply int8 activations."""
    reader = gguf.GGUFReader(path)
    names = [
        tensor.name
        for tensor in reader.tensors
        if tensor.tensor_type.name.startswith("Q") and "ffn_down_t" not in tensor.name
    ]
    return Numerics("f16", frozenset(names))


@pytest.mark.parametrize("name", CASES)
def test_predicted_neurons(name: str, tmp_path: Path) -> None:
    """Random predictors name half of the neurons, so that a wrong mask is far off."""
    path = CASES[name].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        found = logits_of(model, TOKENS, 1)
    checkpoint = read_gguf(path)
    expected = forward(checkpoint, TOKENS, Numerics("f16"), threshold=0.0)
    assert np.median(errors(found, expected)) < 1e-4
    assert np.median(errors(found, forward(checkpoint, TOKENS, Numerics("f16")))) > 0.05


@pytest.mark.parametrize("name", ["llama", "falcon", "falcon-one-norm", "opt-ordinary"])
def test_predictions_one_layer_early(name: str, tmp_path: Path) -> None:
    """From the second layer on; off, nothing changes, and what it costs is counted."""
    path = CASES[name].write(tmp_path)
    with Model(path, sparsity="predict", cross_layer_from=1) as model:
        found = logits_of(model, TOKENS, 1)
        for step in (3, 50):
            np.testing.assert_array_equal(logits_of(model, TOKENS, step), found)
        own = logits_of(model, TOKENS, 1, cross_layer_from=False)
        late = logits_of(model, TOKENS, 1, cross_layer_from=model.info.n_layer - 1)
    with Model(path, sparsity="predict") as model:
        np.testing.assert_array_equal(logits_of(model, TOKENS, 1), own)
    checkpoint = read_gguf(path)
    for layer, logits in ((1, found), (model.info.n_layer - 1, late)):
        expected = forward(
            checkpoint, TOKENS, Numerics("f16"), threshold=0.0, cross_layer_from=layer
        )
        assert np.median(errors(logits, expected)) < 1e-4
    assert np.median(errors(found, own)) > 0.01


@pytest.mark.parametrize("name", QUANTISED)
def test_predicted_neurons_of_quantised_weights(name: str, tmp_path: Path) -> None:
    """A prediction near the threshold may fall on its other side where an int8 code flips."""
    path = QUANTISED[name].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        found = np.concatenate([logits_of(model, [token], 1) for token in TOKENS[:40]])
    checkpoint, numerics = read_gguf(path), numerics_of(path)
    expected = np.concatenate(
        [forward(checkpoint, [token], numerics, threshold=0.0) for token in TOKENS[:40]]
    )
    assert np.median(errors(found, expected)) < 1e-5


@pytest.mark.parametrize("name", CASES | QUANTISED)
def test_exact_is_all_neurons_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = (CASES | QUANTISED)[name].write(tmp_path)
    with Model(path, sparsity="off") as model:
        expected = logits_of(model, TOKENS, N_TOKENS)
        np.testing.assert_array_equal(logits_of(model, TOKENS, 1), expected)
        for step in (1, 5, 40):
            exact = logits_of(model, TOKENS, step, sparsity="exact")
            np.testing.assert_array_equal(exact, expected)


@pytest.mark.parametrize("name", CASES | QUANTISED)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_any_threads_and_chunks(name: str, threads: int, tmp_path: Path) -> None:
    path = (CASES | QUANTISED)[name].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        expected = logits_of(model, TOKENS, N_TOKENS, threads=1)
        for step in (1, 3, 8, 50):
            found = logits_of(model, TOKENS, step, threads=threads)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "llama-ordinary", "bamboo", "falcon", "opt"])
def test_each_token_keeps_its_own_neurons(name: str, tmp_path: Path) -> None:
    """Generated tokens beside prompts and each other, with the logits they have alone."""
    path = CASES[name].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        with model.context(n_ctx=N_TOKENS) as context:
            context.feed(TOKENS[:20])
            alone = []
            for token in TOKENS[20:40]:
                context.feed([token], generated=True)
                alone.append(context.logits)
        with model.context(n_ctx=N_TOKENS, n_seq=3, threads=2) as context:
            context.feed(TOKENS[:20], seq=1)
            context.feed(OTHERS[:7], seq=2)
            for i, token in enumerate(TOKENS[20:40]):
                context.feed_batch({2: [OTHERS[i]], 1: [token]}, generated=True)
                np.testing.assert_array_equal(context.all_logits[1], alone[i])
                context.feed(OTHERS[i : i + 3], seq=0)


def test_prompts_are_dense_unless_asked_otherwise(tmp_path: Path) -> None:
    path = CASES["llama"].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        with model.context() as context:
            context.feed(TOKENS, logits="all")
            dense = context.all_logits
            assert all(layer.n_tokens == 0 for layer in context.stats().layers)
        with model.context(prefill="sparse") as context:
            context.feed(TOKENS, logits="all")
            sparse = context.all_logits
        with model.context(sparsity="off") as context:
            context.feed(TOKENS, logits="all")
            np.testing.assert_array_equal(context.all_logits, dense)
        np.testing.assert_array_equal(sparse, logits_of(model, TOKENS, 1))
    assert errors(sparse, dense).max() > 0.01


def test_the_threshold_decides(tmp_path: Path) -> None:
    path = CASES["llama"].write(
        tmp_path, extra={"qinfer.hidden_act": "relu", "powerinfer.sparse_threshold": 0.25}
    )
    checkpoint = read_gguf(path)
    with Model(path, sparsity="predict") as model:
        assert model.info.sparse_threshold == 0.25
        for options, threshold in (({}, 0.25), ({"sparse_threshold": -0.5}, -0.5)):
            found = logits_of(model, TOKENS, 1, **options)
            expected = forward(checkpoint, TOKENS, Numerics("f16"), threshold=threshold)
            assert np.median(errors(found, expected)) < 1e-4
        everything = logits_of(model, TOKENS, 1, sparse_threshold=-1e30)
        np.testing.assert_array_equal(everything, logits_of(model, TOKENS, 1, sparsity="off"))


def test_powerinfer_files_are_relu(tmp_path: Path) -> None:
    path = CASES["llama"].write(tmp_path, extra={})
    checkpoint = read_gguf(path)
    as_powerinfer(path)
    checkpoint.metadata["qinfer.hidden_act"] = "relu"
    with Model(path, sparsity="exact") as model:
        assert model.info.is_powerinfer
        assert model.info.down_by_neuron
        assert model.info.hidden_act == "relu"
        expected = forward(checkpoint, TOKENS, Numerics("f16"))
        assert np.median(errors(logits_of(model, TOKENS, 1), expected)) < 1e-4


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("llama", "blk.0.ffn_down_t.weight"),
        ("llama-ordinary", "blk.0.fc1.weight"),
        ("falcon", "blk.0.ffn_down_t.weight"),
    ],
)
def test_powerinfers_tensors_under_another_magic(case: str, found: str, tmp_path: Path) -> None:
    """It would compute SiLU or GELU with weights that were trained with ReLU."""
    path = CASES[case].write(tmp_path, extra={})
    with pytest.raises(FormatError) as caught:
        Model(path)
    message = str(caught.value)
    for part in (str(path), found, "PWRI", "qinfer.hidden_act", "hidden_act given by the caller"):
        assert part in message
    with Model(path, hidden_act="silu", sparsity="off") as model:
        assert model.info.hidden_act == "silu"
    if CASES[case].by_neuron:
        with Model(as_powerinfer(path), sparsity="off") as model:
            assert model.info.hidden_act == "relu"


@pytest.mark.parametrize("case", ["bamboo", "opt"])
def test_a_magic_that_does_not_matter(case: str, tmp_path: Path) -> None:
    """These architectures have one activation in all files."""
    with Model(CASES[case].write(tmp_path, extra={}), sparsity="off") as model:
        assert model.info.has_sparse_act


def test_powerinfer_files_have_down_by_neuron(tmp_path: Path) -> None:
    path = as_powerinfer(CASES["llama-ordinary"].write(tmp_path))
    with pytest.raises(FormatError) as caught:
        Model(path)
    message = str(caught.value)
    for part in (str(path), "blk.0.ffn_down.weight", "blk.0.ffn_down_t.weight", "begins with GGUF"):
        assert part in message
    content = path.read_bytes()
    path.write_bytes(content.replace(b"ffn_down.weight", b"ffn_done.weight"))
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_down_t\.weight is missing"):
        Model(path)


def test_statistics(tmp_path: Path) -> None:
    """Counters against the reference's own activations."""
    path = CASES["llama"].write(tmp_path)
    with Model(path, sparsity="predict") as model, model.context() as context:
        n_ff, row = model.info.n_ff, 4 * model.info.n_embd
        context.check_predictions(2)
        for token in TOKENS[:10]:
            context.feed([token], generated=True)
        layers = context.stats().layers
        predictor = 4 * CASES["llama"].rank * (model.info.n_embd + n_ff)
        for layer in layers:
            assert layer.n_tokens == 10
            assert 0 < layer.n_active < layer.n_predicted < 10 * n_ff
            assert layer.n_checked == 5
            assert 0 < layer.n_missed < layer.n_due < 5 * n_ff
            expected = 10 * predictor + row * (layer.n_predicted + 2 * layer.n_active)
            assert layer.n_bytes == expected
        rest = model.info.n_bytes_per_token - model.info.n_ffn_bytes_per_token
        total = 10 * rest + sum(layer.n_bytes for layer in layers)
        assert context.stats().weight_bytes_read == total
        context.reset_stats()
        assert all(layer.n_tokens == 0 for layer in context.stats().layers)


@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_k"])
def test_blocks_of_an_ordinary_down_without_active_neurons_are_not_read(
    type_name: str, tmp_path: Path
) -> None:
    """Of 4 x 512 neurons only the third quarter can be active: gates of zeros are."""
    n_ff, n_embd = 2048, 256
    sizes = {"n_ff": n_ff, "n_embd": n_embd, "n_head": 8}
    case = Case("llama", type_name, by_neuron=False, sizes=sizes)
    path = case.write(tmp_path)
    down_bytes = 0
    for tensor in gguf.GGUFReader(path, mode="r+").tensors:
        if "ffn_gate" in tensor.name:
            tensor.data[: n_ff // 2] = 0
            tensor.data[n_ff * 3 // 4 :] = 0
            tensor.data.flush()
        if "ffn_down" in tensor.name:
            down_bytes = tensor.n_bytes
    with Model(path, sparsity="exact") as model:
        dense = logits_of(model, TOKENS, N_TOKENS, sparsity="off")
        for step in (1, 5, 8):
            np.testing.assert_array_equal(logits_of(model, TOKENS, step), dense)
        with model.context() as context:
            context.feed(TOKENS[:1], generated=True)
            for layer in context.stats().layers:
                row = down_bytes // n_ff  # gate, up and down have one size
                assert 0 < layer.n_active < n_ff // 4
                assert layer.n_bytes == down_bytes + layer.n_active * row + down_bytes // 4


@pytest.mark.parametrize("step", [1, 50])
def test_activation_counts(step: int, tmp_path: Path) -> None:
    path = CASES["llama"].write(tmp_path)
    with Model(path, sparsity="exact") as model, model.context() as context:
        with pytest.raises(ArgumentError, match="not being counted"):
            context.activation_counts(0)
        context.count_activations()
        for begin in range(0, 50, step):
            context.feed(TOKENS[begin : begin + step], generated=True)
        layers = context.stats().layers
        for index, layer in enumerate(layers):
            counts = context.activation_counts(index)
            assert counts.dtype == np.uint64
            assert counts.max() <= 50
            assert counts.sum() == layer.n_active
        with pytest.raises(ArgumentError, match="layer 3 does not exist"):
            context.activation_counts(3)


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    relu = CASES["llama"].write(tmp_path, rank=0)
    with pytest.raises(ArgumentError, match="needs predictors"):
        Model(relu, sparsity="predict")
    silu = CASES["llama"].write(tmp_path, extra={"qinfer.hidden_act": "silu"})
    with pytest.raises(ArgumentError, match="silu"):
        Model(silu, sparsity="exact")
    with pytest.raises(ArgumentError, match="'sometimes'"):
        Model(relu, sparsity="sometimes")
    with pytest.raises(ArgumentError, match="prefill='fast'"):
        Model(relu, prefill="fast")
    with pytest.raises(ArgumentError, match="sparse_threshold=nan"):
        Model(relu, sparse_threshold=float("nan"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blk.1.fc1.weight": np.zeros((21, 60))}, "1 of 3 layers|fc2.weight is missing"),
        (
            {
                "blk.0.fc1.weight": np.zeros((21, 59)),
                "blk.0.fc2.weight": np.zeros((101, 21)),
                "blk.2.fc1.weight": np.zeros((21, 60)),
            },
            "blk.0.fc1.weight has shape",
        ),
        (
            {"blk.0.fc1.weight": np.zeros((9, 60)), "blk.0.fc2.weight": np.zeros((101, 8))},
            "blk.0.fc2.weight has shape",
        ),
    ],
)
def test_faulty_predictors_are_left_out(
    tensors: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = CASES["llama"].write(tmp_path, rank=0, extra_tensors=tensors)
    with caplog.at_level(logging.WARNING, "qinfer"), Model(path, sparsity="off") as model:
        assert model.info.predictor_rank == 0
        logits_of(model, TOKENS, 30, sparsity="exact")
    # One warning: that these tensors are not used either goes without saying.
    (warning,) = (record.getMessage() for record in caplog.records)
    assert str(path) in warning
    assert any(part in warning for part in said.split("|"))
    assert "exact" not in warning


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "0 of 3 layers have a predictor"),
        ({"blk.2.fc1.weight": np.zeros((21, 59))}, "blk.2.fc1.weight has shape"),
    ],
)
def test_powerinfer_files_without_predictors_are_exact(
    tensors: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path / "cache"))
    path = as_powerinfer(CASES["llama"].write(tmp_path, rank=0, extra={}, extra_tensors=tensors))
    with caplog.at_level(logging.WARNING, "qinfer"), Model(path) as model:
        assert model.policy.mode == "exact"
        logits_of(model, TOKENS, 30)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert str(path) in warning
    assert said in warning
    assert "runs in the mode exact" in warning
    assert not (tmp_path / "cache" / "sparsity.json").exists()  # nothing was timed
    with Model(path, sparsity="off") as model:
        assert model.policy.mode == "off"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "qinfer"), Model(path, hidden_act="silu") as model:
        assert model.policy.mode == "off"
    assert "exact" not in caplog.text


def test_auto_chooses_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qinfer import sparsity

    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path / "cache"))
    path = CASES["llama"].write(tmp_path)
    figures = {"off": 1.0, "exact": 0.5, "predict": 0.49}
    measured = []

    def measure(*_: object) -> dict[str, float]:
        measured.append(1)
        return figures

    monkeypatch.setattr(sparsity, "_measure", measure)
    with caplog.at_level(logging.INFO, "qinfer"), Model(path) as model:
        assert model.policy.mode == "exact"  # predict leaves more out but gains only 2 %
    assert any("sparsity='auto' is 'exact'" in record.message for record in caplog.records)
    figures["predict"] = 0.4
    with Model(path) as model:
        assert model.policy.mode == "exact"
    assert len(measured) == 1
    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path / "another"))
    with Model(path) as model:
        assert model.policy.mode == "predict"


def test_auto_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path / "cache"))
    with Model(CASES["llama"].write(tmp_path)) as model:
        assert model.policy.mode in ("off", "exact", "predict")
    found = json.loads((tmp_path / "cache" / "sparsity.json").read_text())
    (seconds,) = found.values()
    assert set(seconds) == {"off", "exact", "predict"}
    assert all(0 < value < 10 for value in seconds.values())


def test_auto_predicts_nothing_where_no_activation_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qinfer import sparsity

    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sparsity, "_measure", lambda *_: {"off": 1.0, "predict": 0.1})
    path = CASES["llama"].write(tmp_path, extra={"qinfer.hidden_act": "silu"})
    with Model(path) as model:
        assert model.info.predictor_rank == 21
        assert model.policy.mode == "off"
    with Model(path, sparsity="predict") as model:
        assert model.policy.mode == "predict"


def test_generated_tokens_are_no_prompt(tmp_path: Path) -> None:
    """What was computed as generated is computed again where it is part of a prompt."""
    path = CASES["llama"].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        first = model.generate(TOKENS[:9], max_tokens=8, temperature=0, ignore_eos=True)
        again = [*TOKENS[:9], *first.tokens, *TOKENS[9:12]]
        continued = model.generate(again, max_tokens=8, temperature=0, ignore_eos=True)
        assert continued.usage.cached_tokens == 9
    with Model(path, sparsity="predict") as model:
        fresh = model.generate(again, max_tokens=8, temperature=0, ignore_eos=True)
    assert fresh.tokens == continued.tokens
    with Model(path, sparsity="exact") as model:
        first = model.generate(TOKENS[:9], max_tokens=8, temperature=0, ignore_eos=True)
        again = [*TOKENS[:9], *first.tokens, *TOKENS[9:12]]
        continued = model.generate(again, max_tokens=1, temperature=0, ignore_eos=True)
        assert continued.usage.cached_tokens > 9  # the same bits either way


def test_states_keep_roles(tmp_path: Path) -> None:
    path = CASES["llama"].write(tmp_path)
    with Model(path, sparsity="predict") as model:
        with model.context() as context:
            context.feed(TOKENS[:5])
            context.feed(TOKENS[5:9], generated=True)
            assert context.n_shared(TOKENS) == 5
            context.save_state(tmp_path / "state")
        with model.context() as context:
            context.load_state(tmp_path / "state")
            assert context.tokens() == TOKENS[:9]
            assert context.n_shared(TOKENS) == 5


@pytest.mark.parametrize("type_name", ["f32", "f16", "q4_0", "q8_0", "q4_k", "q6_k"])
def test_instruction_sets(type_name: str, tmp_path: Path) -> None:
    """Each level is held to what the level in use is held to."""
    path = Case("llama", type_name).write(tmp_path)
    numerics, checkpoint = numerics_of(path), read_gguf(path)
    texts = [[token] for token in TOKENS[:20]]
    expected = np.concatenate(
        [forward(checkpoint, text, numerics, threshold=0.0) for text in texts]
    )
    script = (
        "import json, sys, numpy, qinfer\n"
        "context = qinfer.Model(sys.argv[1], sparsity='predict').context(n_ctx=8)\n"
        "rows = []\n"
        "for text in json.loads(sys.argv[3]):\n"
        "    context.truncate(0)\n"
        "    context.feed(text, logits='all', generated=True)\n"
        "    rows.append(context.all_logits)\n"
        "numpy.save(sys.argv[2], numpy.concatenate(rows))\n"
    )
    for level in instruction_sets():
        out = tmp_path / f"{level}.npy"
        command = [sys.executable, "-c", script, str(path), str(out), json.dumps(texts)]
        environment = os.environ | {"QINFER_ISA": level}
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        assert np.median(errors(np.load(out), expected)) < 1e-5, level
