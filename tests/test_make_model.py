"""Synthetic sparse models: who is active, who is predicted, what else is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_model
import numpy as np
import pytest
import sparse_weights
from click.testing import CliRunner
from sparse_weights import N_BITS, N_COLUMNS, Sparsity

from oracle import Checkpoint, Numerics, read_gguf
from oracle.checkpoint import Array
from oracle.forward import Pass
from qinfer._gguf import GGUF
from qinfer._types import known_types

ARCHITECTURES = make_model.SPARSE_ARCHITECTURES
N_LAYER = 3
TOKENS = np.random.default_rng(3).integers(0, 300, 24)


def small_shape(arch: str, type_name: str = "f32", **sparsity: Any) -> make_model.Shape:
    width = 256 if type_name.endswith("_k") else 128
    how = Sparsity(**{"active": 0.1, "n_pred": width} | sparsity)
    return make_model.Shape(
        arch, width, 512, N_LAYER, 4, 2, 300, 256, tied_head=arch == "opt", sparsity=how
    )


def write(folder: Path, shape: make_model.Shape, type_name: str = "f32", seed: int = 0) -> Path:
    path = folder / f"{shape.arch}.{type_name}.{seed}.gguf"
    make_model.make_model(path, shape, type_name, seed)
    return path


def read(path: Path) -> Checkpoint:
    """Reads a PowerInfer file as the ordinary one that `gguf` knows."""
    content = path.read_bytes()
    assert content[:4] == b"PWRI"
    path.write_bytes(b"GGUF" + content[4:])
    model = read_gguf(path)
    act = "relu_relu" if model.architecture == "bamboo" else "relu"
    return Checkpoint(model.metadata | {"qinfer.hidden_act": act}, model.tensors)


class Recorder(Pass):
    """A pass that keeps what each matrix gave, and the residual."""

    def __init__(self, model: Checkpoint) -> None:
        super().__init__(model, Numerics(), threshold=0.0)
        self.products: dict[str, Array] = {}
        self.residuals: list[Array] = []

    def linear(self, name: str, x: Array) -> Array:
        self.products[name] = super().linear(name, x)
        return self.products[name]

    def layer(self, prefix: str, x: Array) -> Array:
        self.residuals.append(super().layer(prefix, x))
        return self.residuals[-1]


def recorded(path: Path) -> Recorder:
    recorder = Recorder(read(path))
    recorder.run(TOKENS)
    return recorder


ENCODABLE = [name for name in make_model.TYPES if known_types()[name.upper()].can_encode]
CASES = [(arch, type_name) for arch in ARCHITECTURES for type_name in ("f16", "q4_0")]
CASES += [("llama", name) for name in ENCODABLE if name not in ("f16", "q4_0")]


@pytest.mark.parametrize(("arch", "type_name"), CASES)
def test_a_tenth_of_the_neurons_is_active_and_predicted(
    tmp_path: Path, arch: str, type_name: str
) -> None:
    run = recorded(write(tmp_path, small_shape(arch, type_name), type_name))
    gate = "ffn_gate" if arch in ("llama", "bamboo") else "ffn_up"
    for layer in range(N_LAYER):
        active = run.products[f"blk.{layer}.{gate}"] > 0
        if arch == "bamboo":
            np.testing.assert_array_equal(run.products[f"blk.{layer}.ffn_up"] > 0, active)
        predicted = run.products[f"blk.{layer}.fc2"] >= 0
        np.testing.assert_array_equal(predicted, active)
        share = active.mean(-1)
        assert 0.085 < share.min() <= share.max() < 0.115
        assert len({row.tobytes() for row in active}) > 15  # of 24 tokens


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_leave_the_residual_stable(tmp_path: Path, arch: str) -> None:
    run = recorded(write(tmp_path, small_shape(arch)))
    first, *others = run.residuals
    for residual in others:
        np.testing.assert_array_equal(residual[:, :N_COLUMNS], first[:, :N_COLUMNS])
        assert 0.8 < residual[:, N_COLUMNS:].std() < 2.0


@pytest.mark.parametrize("active", [0.01, 0.1, 0.5, 1.0])
def test_every_code_activates_the_same_number(active: float) -> None:
    codes = np.array(np.meshgrid(*[[-1, 1]] * N_BITS)).reshape(N_BITS, -1).T
    wishes = sparse_weights.neuron_wishes(np.random.default_rng(1), 8192, active)
    counts = activity(codes, wishes).sum(1)
    np.testing.assert_allclose(counts, active * 8192, atol=N_BITS + 1)


def test_frequency_falls_as_a_power_of_the_rank() -> None:
    wishes = sparse_weights.neuron_wishes(np.random.default_rng(1), 8192, 0.1)
    rank = np.cumsum(np.bincount(np.abs(wishes).sum(1)))  # of the last that asks for 0, 1, … bits
    slope = np.diff(np.log(rank))
    np.testing.assert_allclose(slope, slope.mean(), rtol=0.01)
    assert 0.04 < rank[0] / 8192 < 0.06  # always active
    frequency = np.sort(0.5 ** np.abs(wishes).sum(1))[::-1]
    assert frequency[: 8192 // 4].sum() > 0.8 * frequency.sum()


def activity(codes: np.ndarray, wishes: np.ndarray) -> np.ndarray:
    """Which neurons have all their wishes fulfilled, [n_codes, n_ff]."""
    missed = (wishes != 0) & (codes[:, None, :] != wishes)
    return ~missed.any(-1)


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    shape = small_shape("llama")
    first, other = (write(tmp_path, shape, "q4_0", seed).read_bytes() for seed in (5, 6))
    assert write(tmp_path, shape, "q4_0", 5).read_bytes() == first
    assert other != first


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_twin_has_the_same_weights_without_predictors(tmp_path: Path, arch: str) -> None:
    sparse = GGUF(write(tmp_path, small_shape(arch)))
    (tmp_path / "twin").mkdir()
    twin = GGUF(write(tmp_path / "twin", small_shape(arch, dense_twin=True)))
    assert sparse.info.is_powerinfer
    assert not twin.info.is_powerinfer
    assert sparse.metadata["powerinfer.sparse_threshold"] == 0.0
    assert twin.metadata["qinfer.hidden_act"] == ("relu_relu" if arch == "bamboo" else "relu")
    weights = {tensor.name: tensor for tensor in sparse.tensors}
    for tensor in twin.tensors:
        if ".ffn_down." in tensor.name:
            other = weights.pop(tensor.name.replace("ffn_down", "ffn_down_t"))
            assert tensor.shape == other.shape[::-1]
        else:
            np.testing.assert_array_equal(tensor.data, weights.pop(tensor.name).data)
    assert {name.split(".")[2] for name in weights} == {"fc1", "fc2"}


def test_what_cannot_be_sparse_is_refused(tmp_path: Path) -> None:
    def refusal(*options: str) -> str:
        out = tmp_path / "no.gguf"
        result = CliRunner().invoke(make_model.main, [str(out), "--sparse", *options])
        assert result.exit_code == 1
        assert not out.exists()
        return result.output

    assert "qwen2" in refusal("--arch", "qwen2")
    assert "0.01 to 1" in refusal("--active", "0")
    assert "64 or more" in refusal("--n-pred", "32")
