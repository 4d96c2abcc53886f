"""Keys and values on a GPU, with its host and in both; the stand-in is the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qinfer import ArgumentError, Model
from qinfer.cli import cli
from test_cuda_model import DATA, STORIES, on_gpu
from test_sparsity import Case

WIDE = {"n_embd": 128, "n_head": 4, "n_ff": 256}
CASES: dict[str, tuple[Case, dict[str, Any], str]] = {
    "llama": (Case("llama"), {}, "f16"),
    "opt": (Case("opt", sizes={"n_head_kv": 6}), {}, "f16"),
    "falcon": (Case("falcon"), {}, "f16"),
    "window, q8_0": (
        Case("llama", sizes=WIDE), {"llama.attention.sliding_window": 100}, "q8_0"
    ),
}  # fmt: skip
N_LAYER = 3
N_PAGES = 10  # two sequences of 320 positions
SMALL = DATA / "stories260K.F32.gguf"


@pytest.mark.parametrize("name", CASES)
def test_every_place(name: str, tmp_path: Path) -> None:
    """Prompts, steps, forks and truncations of two sequences, of which the second finds no room."""
    case, extra, kv_type = CASES[name]
    extra = {"qinfer.hidden_act": "relu"} | extra
    path = Case(case.arch, sizes=case.sizes | {"n_ctx": 512}).write(tmp_path, extra=extra)
    places = [{"kv_mode": "host"}, {"kv_mode": "split", "kv_ratio": 0.5}]
    if name == "llama":
        places += [{"kv_mode": "device"}, {"kv_mode": "split"}, {"kv_ratio": 0.3, "kv_step": 0.1}]
    found = on_gpu("kv_cases.compare", path, places, kv_type)
    for place, of_place in zip(places, found, strict=True):
        errors, shares = of_place["errors"], of_place["shares"]
        assert len(errors) == 29
        # As in test_cuda_model: keys and values are rounded from sums of another order.
        assert np.median(errors) < (1e-4 if kv_type == "q8_0" else 2e-5), place
        assert np.max(errors) < 1e-3, place
        if place == {"kv_mode": "host"}:
            assert (of_place["mode"], of_place["n_pages"]) == ("host", 0)
            assert shares == [1.0] * N_LAYER
        elif place.get("kv_ratio") == 0.5:
            assert (of_place["mode"], of_place["n_pages"]) == ("split", N_PAGES // 2)
            assert all(0.3 < share < 0.7 for share in shares)
        elif place == {"kv_mode": "split"}:
            assert (of_place["mode"], of_place["n_pages"]) == ("split", N_PAGES)
            assert shares == [0.0] * N_LAYER
        elif place == {"kv_mode": "device"}:
            assert of_place["mode"] == "device"
            assert shares == [0.0] * N_LAYER
        else:
            assert (of_place["mode"], of_place["n_pages"]) == ("split", N_PAGES)
            assert all(0.0 <= share <= 1.0 for share in shares)


def test_states_go_from_every_place_to_every_other() -> None:
    same_as_first, errors = on_gpu("kv_cases.states", SMALL)
    # On the device and with all copies on the device the same kernels have computed.
    assert same_as_first[0]
    assert same_as_first[2]
    assert len(errors) == 16
    assert max(errors) < 1e-4


def test_the_boundary_moves_with_the_times() -> None:
    """The stand-in's GPU is the slower side: the host is given more, a page a token at most."""
    curve = np.array(on_gpu("kv_cases.adapted", SMALL, 0.1))
    assert np.all((curve >= 0.0) & (curve <= 1.0))
    assert np.all(curve.max(axis=0) > 0.55)
    steps = np.abs(np.diff(curve, axis=0))
    assert np.all(steps < 0.1 + 0.03)  # a step, rounded to pages of a sequence that grows
    assert np.any(steps > 0.05)


def test_budgets_that_hold_a_part_of_the_keys_and_values() -> None:
    """4096 positions take 28 MB; what fits is copied, and no budget is exceeded."""
    rows = on_gpu("kv_cases.kept_under", STORIES, ["4MiB", "20MiB", "60MiB"])
    for row in rows:
        assert row["used"] <= row["budget"]
        assert row["held"] <= row["budget"]
        assert row["error"] < 0.03  # int8 codes that flip; see test_quantised_weights
    few, split, whole = rows
    assert few["mode"] in ("host", "split")
    assert 0 < few["n_layers"] < 6
    assert (split["mode"], split["has_head"]) == ("split", True)
    assert 0 < split["n_pages"] < 64
    assert 0 < split["n_neurons"] < 6 * 768  # both get a part of what is left
    assert f"{split['n_pages']} pages of keys and values" in split["summary"]
    assert (whole["mode"], whole["n_pages"]) == ("device", 64)
    assert whole["later"] == "split"  # of a second context


@pytest.mark.parametrize(("code", "every"), [(2, 29), (999, 31)])
def test_any_call_may_fail(code: int, every: int) -> None:
    """The sequence is as it was, and goes on to the same bits."""
    found = on_gpu("kv_cases.failures", SMALL, code, every)
    assert found["n_calls"] > 100
    kinds = found["kinds"]
    assert set(kinds) <= {"none", "OutOfMemory" if code == 2 else "DeviceError"}
    assert sum(kinds.values()) - kinds.get("none", 0) > 5
    assert found["same"]


def test_steps_may_be_cancelled() -> None:
    found = on_gpu("cancelled", SMALL, "half", {"kv_mode": "host"})
    assert found["n_cancelled"] > 0
    assert found["same"]
    assert found["left"] == 0


def test_any_call_may_fail_while_a_context_is_made() -> None:
    found = on_gpu("failures", SMALL, "half", 2, 37, {"kv_mode": "split"})
    assert set(found["kinds"]) <= {"none", "OutOfMemory", "DeviceError"}
    assert found["kinds"]["OutOfMemory"] > 5
    assert found["same"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kv_mode": "host"}, "no GPU is used"),
        ({"kv_mode": "split"}, "no GPU is used"),
        ({"kv_ratio": 0.5}, "no GPU is used"),
        ({"kv_step": 0.01}, "no GPU is used"),
        ({"kv_mode": "both"}, "kv_mode='both' is not"),
        ({"kv_ratio": 1.5}, "kv_ratio=1.5 is not a share"),
        ({"kv_ratio": float("nan")}, "kv_ratio=nan is not a share"),
        ({"kv_step": -0.1}, "kv_step=-0.1 is not a share"),
        ({"kv_step": True}, "kv_step=True is not a share"),
        ({"kv_mode": "host", "kv_ratio": 0.5}, "kv_ratio is for keys and values that both share"),
        ({"kv_mode": "device", "kv_step": 0.1}, "kv_step is for keys and values that both share"),
    ],
)
def test_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        Model(SMALL, device="cpu", **arguments)
    with Model(SMALL, device="cpu") as model, pytest.raises(ArgumentError, match=says):
        model.context(**arguments)


@pytest.mark.parametrize(
    ("command", "more"),
    [("run", ["-p", "a"]), ("chat", []), ("bench", []), ("perplexity", ["-f", __file__])],
)
def test_the_command_line_passes_them_on(command: str, more: list[str]) -> None:
    words = [command, str(SMALL), "--device", "cpu", "--kv-ratio", "0.5", "--kv-step", "0.01"]
    done = CliRunner().invoke(cli, [*words, *more, "--kv-mode", "split"])
    assert isinstance(done.exception, ArgumentError), done.output
    assert "no GPU is used" in str(done.exception)
    assert "kv_mode='split' and kv_ratio=0.5 and kv_step=0.01" in str(done.exception)
    assert CliRunner().invoke(cli, [*words, *more, "--kv-mode", "both"]).exit_code == 2


def test_without_a_gpu_the_host_keeps_them() -> None:
    with (
        Model(SMALL, device="cpu", kv_mode="auto", kv_step=0) as model,
        model.context(n_ctx=64) as context,
    ):
        assert (context.info.kv_mode, context.info.n_device_pages) == ("host", 0)
        assert context.kv_host_shares().tolist() == [1.0] * model.info.n_layer
