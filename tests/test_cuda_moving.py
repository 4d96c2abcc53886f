"""Neurons that move between a GPU and its host while a model runs; the stand-in is the GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qinfer import ArgumentError, Model
from qinfer.activation import write_activations
from qinfer.tools._placement import balance
from test_cuda_model import STORIES, on_gpu
from test_sparsity import CASES, QUANTISED, Case


def moving(function: str, *arguments: Any, **settings: object) -> Any:
    return on_gpu(f"cuda_moving_cases.{function}", *arguments, **settings)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Case("llama", sizes={"n_ff": 320}).write(tmp_path)


@pytest.mark.parametrize(
    ("policy", "name", "mode"),
    [
        ("frequency", "llama", "predict"),
        ("frequency", "llama", "exact"),
        ("balance", "opt", "predict"),
    ],
)
def test_texts_are_the_processors(policy: str, name: str, mode: str, tmp_path: Path) -> None:
    """For tokens one by one, some together, and a prompt; every neuron is computed once."""
    case = CASES[name]
    path = Case(name, sizes=case.sizes | {"n_ff": 320}).write(tmp_path)
    found = moving("moving", path, policy, [1, 7, 24, 1], mode, delay_us=200, seed=3)
    for errors in found["errors"]:
        assert np.median(errors) < 2e-5
        assert np.max(errors) < 1e-3
    assert all(cpu == gpu for cpu, gpu in found["active"])
    assert found["same_counts"]
    assert found["n_kept"] == [[128, 128, 128]] * 4
    assert found["moved"] == sorted(found["moved"])
    assert found["moved"][-1] > 100
    assert found["sets"][0] != found["sets"][-1]
    assert found["used"] <= found["budget"]
    assert found["left"] == 0
    assert not any("stay where they are" in line for line in found["log"])


def test_quantised_neurons_move(tmp_path: Path) -> None:
    path = QUANTISED["bamboo-q4_0"].write(tmp_path)
    found = moving("moving", path, "frequency", [1, 24, 1])
    assert found["moved"][-1] > 50
    for errors in found["errors"]:
        assert np.median(errors) < 2e-2  # int8 codes that flip; see test_cuda_model


def test_contexts_in_two_threads(tiny: Path) -> None:
    found = moving("moving_in_threads", tiny, delay_us=100)
    assert max(found["errors"]) < 1e-4
    assert found["moved"] > 100
    assert found["left"] == 0


def test_any_call_may_fail(tiny: Path) -> None:
    """It is an error, or neurons stay where they are and all is as it was; nothing leaks."""
    found = moving("moving_failures", tiny, 999, 97)
    assert found["n_calls"] > 1000
    assert found["moved"] > 0
    assert max(found["errors"]) < 1e-4
    assert found["raised"] > 2
    assert found["leaks"] == 0


def test_a_lost_device_is_an_error(tiny: Path) -> None:
    assert moving("lost", tiny)["errors"] == ["DeviceError"] * 3


def test_a_budget_without_room_is_said() -> None:
    lines = moving("no_room", STORIES, "5MiB")
    assert sum(line.startswith("neurons do not move: of 5.0 MiB") for line in lines) == 1


@pytest.mark.parametrize("mode", ["predict", "exact"])
def test_first_tokens_decide_where_nothing_else_does(mode: str) -> None:
    """Of each layer the neurons that they use most are kept from then on."""
    found = moving("counted", STORIES, "8MiB", mode)
    before, after = found["shares"]
    for low, high, best in zip(before, after, found["best"], strict=True):
        # Predicted neurons are counted before their gates are known.
        assert high == pytest.approx(best, abs=0.003 if mode == "exact" else 0.1)
        assert low < high
    assert found["sizes"][0] == found["sizes"][1]
    assert max(found["sizes"][0]) - min(found["sizes"][0]) <= 1
    assert found["used"][0] == found["used"][1]
    assert sum("chosen anew by the first 64 tokens" in line for line in found["log"]) == 1
    assert found["moved"] > 0
    assert found["left"] == 0


def test_layers_are_balanced(tiny: Path) -> None:
    """By the measured speeds, as many neurons as the tool for split files would take."""
    rng = np.random.default_rng(9)
    counts = [np.ceil(1000 * rng.random(320) ** 6).astype(np.int64) for _ in range(3)]
    write_activations(tiny.parent / "activation", counts)
    found = moving("balanced", tiny)
    (line,) = [line for line in found["log"] if line.startswith("neurons per second")]
    device, host = (float(x) for x in re.findall(r"([0-9.e+]+) on", line))
    ones, none = [1, 1, 1], [0, 0, 0]
    expected, _ = balance(
        counts, 10**9, cost_up=ones, cost_down=none, ratio_up=device / host, ratio_down=0
    )
    for ids, n, layer in zip(found["kept"], expected, counts, strict=True):
        assert abs(len(ids) - n) <= 1  # speeds are printed rounded
        assert 0 < len(ids) < 320
        assert layer[ids].min() >= np.delete(layer, ids).max()
    assert max(found["errors"]) < 1e-3
    assert found["left"] == 0


def test_what_cannot_move_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = CASES["llama-ordinary"].write(tmp_path)
    n_ff = Model(path).info.n_ff
    write_activations(tmp_path / "activation", [np.ones(n_ff)] * 3)
    moved, balanced = moving("refused", path)
    assert moved.startswith("ArgumentError: neurons can move only where down is stored by neuron")
    assert balanced.startswith("ArgumentError: layers can be balanced only where down is stored")
    with pytest.raises(ArgumentError, match="neuron_cache='lru' is not 'static', 'balance' or"):
        Model(tiny, neuron_cache="lru")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="is for GPUs, and no GPU is used: device is 'cpu'"):
        Model(tiny, device="cpu", neuron_cache="balance")
    with pytest.raises(ArgumentError, match="gpu_split='none' keeps none"):
        Model(tiny, neuron_cache="balance", gpu_split="none")
