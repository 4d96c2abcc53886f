"""Models computed by a GPU, wholly and in part, against the processor; the stand-in is the GPU.

What it cannot show is speed, and the rounding of a card's own instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_standin
from cuda_cases import N_TOKENS
from qinfer._gguf import GGUF
from test_sparsity import CASES, QUANTISED, Case

DATA = Path(__file__).parent / "data"
STORIES = Path(__file__).parents[1] / "qinfer" / "data" / "relu-stories-15M.gguf"
PROGRAM = """
import importlib, json, sys
name, arguments = json.loads(sys.argv[1])
module, _, function = name.rpartition(".")
print(json.dumps(getattr(importlib.import_module(module or "cuda_cases"), function)(*arguments)))
"""


def products(device: int) -> Path:
    """Where it is kept what multiplies prompts faster on a device of the stand-in."""
    folder = cuda_standin.FOLDER / "qinfer-cache" / "kernels"
    return folder / f"products-Stand-in-GPU-{device}.txt"


@cache
def kernel_cache() -> str:
    """Compiled kernels, kept from one process to the next.

    cuBLAS multiplies on device 1 alone, and device 3 alone computes neurons of the host.
    """
    products(0).parent.mkdir(parents=True, exist_ok=True)
    for device, faster in {0: "tiles", 1: "cublas", 3: "gpu"}.items():
        products(device).write_text(f"by hand\n* * * {faster}\n")
    return str(cuda_standin.FOLDER / "qinfer-cache")


def on_gpu(
    name: str, *arguments: Any, variables: dict[str, str] | None = None, **settings: object
) -> Any:
    """What a function of cuda_cases, or `module.function`, answers; the stand-in is the GPU."""
    words = json.dumps([name, arguments], default=str)  # paths are said as texts
    environment = cuda_standin.environment(**settings) | (variables or {})
    environment["QINFER_CACHE_DIR"] = kernel_cache()
    environment["PYTHONPATH"] = os.pathsep.join([str(DATA.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modes_of(name: str) -> list[str]:
    return ["off", "exact", "predict"] if name in ("llama", "opt") else ["off", "predict"]


@pytest.mark.parametrize("name", CASES)
def test_float_weights(name: str, tmp_path: Path) -> None:
    """Every architecture and mode, with all, half or none of the neurons on the GPU."""
    path = CASES[name].write(tmp_path)
    found = on_gpu("compare", path, ["whole", "half", "none"], modes_of(name), [1, 7, 24])
    for share in ("whole", "half", "none"):
        of_share = found[share]
        assert (of_share["n_neurons"] > 0) == (share != "none")
        assert 0 < of_share["used"] <= of_share["budget"]
        for mode in modes_of(name):
            for step, errors in of_share[mode].items():
                # Keys and values are rounded to F16 on both sides, from sums of another order.
                assert np.median(errors) < 2e-5, (share, mode, step)
                # A prediction at the threshold may fall on its other side.
                assert np.max(errors) < 1e-3 or mode == "predict", (share, mode, step)
    assert found["left"] == 0


def test_one_layer(tmp_path: Path) -> None:
    """Rounds with the host are told apart from step to step, also where a step has only one."""
    path = Case("llama", sizes={"n_layer": 1}).write(tmp_path)
    found = on_gpu("compare", path, ["half"], ["off"], [1])
    assert max(found["half"]["off"]["1"]) < 2e-5


def test_steps_of_changing_length(tmp_path: Path) -> None:
    """Many heads, beyond the first page: runs of every step's own number are added."""
    sizes = {"n_embd": 256, "n_head": 32, "n_head_kv": 32, "n_ff": 64, "n_layer": 1}
    path = Case("llama", sizes=sizes).write(tmp_path)
    found = on_gpu("changing_steps", path, [70, 1, 5, 8, 1, 3, 8, 2])
    assert max(found) < 1e-4


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(name: str, tmp_path: Path) -> None:
    """A sum that differs in its last bit may fall on the other side of an int8 code."""
    path = QUANTISED[name].write(tmp_path)
    found = on_gpu("compare", path, ["whole", "half"], ["off", "predict"], [0, 7])
    for share in ("whole", "half"):
        for mode in ("off", "predict"):
            assert np.median(found[share][mode]["0"]) < 1e-5, (share, mode)
            assert np.median(found[share][mode]["7"]) < 2e-2, (share, mode)


@pytest.mark.parametrize("type_name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_blocks_of_256_neurons(type_name: str, tmp_path: Path) -> None:
    """An ordinary down of these types is split in blocks of 256; the GPU has every other."""
    case = Case("llama", type_name, by_neuron=False, sizes={"n_layer": 1, "n_ff": 1024})
    found = on_gpu("compare", case.write(tmp_path), ["whole", "half"], ["off"], [0, 7])
    assert found["whole"]["n_neurons"] == 1024
    assert found["half"]["n_neurons"] == 512
    for share in ("whole", "half"):
        assert np.median(found[share]["off"]["0"]) < 1e-5, share
        assert np.median(found[share]["off"]["7"]) < 2e-2, share


def test_q8_0_keys_and_values(tmp_path: Path) -> None:
    sizes = {"n_embd": 128, "n_head": 4, "n_ff": 256}
    path = Case("llama", "f32", sizes=sizes).write(tmp_path)
    found = on_gpu("compare", path, ["whole"], ["off"], [1, 24], "q8_0")
    for errors in found["whole"]["off"].values():
        assert np.median(errors) < 1e-4


@pytest.mark.parametrize("share", ["whole", "half", "none"])
def test_steps_are_recorded_and_replayed(share: str) -> None:
    """The same bits, whether kernels are launched one by one, recorded or replayed."""
    found = on_gpu("replayed", DATA / "stories260K.F32.gguf", share)
    assert found["n_graphs"] > 0
    assert all(row == found["rows"][0] for row in found["rows"])
    for seconds, on_gpu_seconds, on_host, waiting in found["layers"]:
        assert (on_host > 0) == (share != "whole")
        assert seconds == pytest.approx(on_gpu_seconds + waiting)


# What a layer of a replayed step takes. norm, q·k·v, append, attend, output; norm, rows, down.
LAUNCHES = {
    ("f16", True, "off"): 8,
    ("f16", True, "exact"): 8,
    ("f16", True, "predict"): 11,  # and fc1, fc2, select
    ("q4_0", True, "predict"): 12,  # and fc1's values quantised
    ("q4_0", False, "off"): 9,  # and values quantised for down
}


@pytest.mark.parametrize(("type_name", "by_neuron", "mode"), LAUNCHES)
def test_launches_of_a_layer(type_name: str, by_neuron: bool, mode: str, tmp_path: Path) -> None:
    """A launch costs microseconds of every layer: none comes back unnoticed."""
    paths = []
    for n_layer in (1, 3):
        sizes = {"n_layer": n_layer, "n_embd": 256, "n_head": 4, "n_head_kv": 2}
        folder = tmp_path / str(n_layer)
        folder.mkdir()
        paths.append(Case("llama", type_name, by_neuron, sizes=sizes).write(folder))
    for share, exchanges in (("whole", 0), ("half", 2)):
        (of_one, n_copies), (of_three, _) = on_gpu("launches", paths, share, mode)
        expected = LAUNCHES[type_name, by_neuron, mode] + exchanges
        assert of_three - of_one == 2 * expected, share
        assert n_copies == 2, share  # what is known of the token, and its embedding


@pytest.mark.parametrize("share", ["whole", "half"])
@pytest.mark.parametrize(("n_seq", "temperature"), [(1, 0.0), (1, 0.8), (3, 0.0)])
def test_a_step_is_one_graph(share: str, n_seq: int, temperature: float) -> None:
    """Layers, head and the best logits; what crosses to the host is these."""
    *_, last = on_gpu("steps", DATA / "stories260K.F32.gguf", share, n_seq, temperature)
    n_best = 11 if temperature > 0 else 1  # one more than top-k leaves in
    assert last == {
        "lone_launches": 0,
        "graph_launches": 1,
        "copies_to_device": 2,
        "copied_to_host": 8 * n_best * n_seq,  # a token and its logit
    }


@pytest.mark.parametrize("share", ["whole", "half"])
def test_steps_can_be_cancelled(share: str) -> None:
    """Wherever it meets a step, the next ones are right."""
    found = on_gpu("cancelled", DATA / "stories260K.F32.gguf", share)
    assert found["n_cancelled"] > 0
    assert found["same"]
    assert found["left"] == 0


def test_a_recording_that_is_disturbed_is_made_again() -> None:
    found = on_gpu("disturbed", DATA / "stories260K.F32.gguf", "half")
    assert found["refused"] > 0
    assert found["same"]


def test_kernels_do_not_wait_where_a_watchdog_ends_them() -> None:
    found = on_gpu("replayed", DATA / "stories260K.F32.gguf", "half", watchdog_ms=9000)
    assert found["n_graphs"] == 0
    assert all(row == found["rows"][0] for row in found["rows"])


def test_predictions_one_layer_early() -> None:
    """On the GPU, and where the layer before is on another device."""
    rows = on_gpu("early", STORIES, ["5MiB", "8MiB", "60MiB"])
    assert 0 < rows[0]["n_layers"] < rows[-1]["n_layers"] == 6
    for row in rows:
        assert row["error"] < 0.06, row  # int8 codes that flip, and predictions near the threshold


def test_counters() -> None:
    """Both count the same neurons and bytes, but for predictions at the threshold."""
    found = on_gpu("counted", STORIES)
    assert [found[name][0] for name in ("cpu", "gpu", "both")] == [0, 6, 6]
    assert 0 < found["predictors"][0] < 6
    for name in ("gpu", "both", "predictors"):
        assert found[name][1] == pytest.approx(found["cpu"][1], rel=1e-3)
        for mine, expected in zip(found[name][2:], found["cpu"][2:], strict=True):
            assert mine[0] == expected[0] == N_TOKENS - 12
            # Prompts that the host shares are read once for a few tokens: bytes differ there.
            assert mine[1:3] == pytest.approx(expected[1:3], rel=5e-3)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("llama", "predict"), ("llama", "exact"), ("opt", "predict"), ("falcon", "off")],
)
def test_neurons_are_counted(name: str, mode: str, tmp_path: Path) -> None:
    """Tokens by neuron and checked predictions, with all, half or none of the neurons there."""
    path = CASES[name].write(tmp_path)
    found = on_gpu("neurons_counted", path, mode, ["whole", "half", "none"])
    expected = found.pop("cpu")
    assert {layer[0] for layer in expected["checks"]} == {6 if mode == "predict" else 0}
    assert all(layer[2] > 0 for layer in expected["checks"]) or mode != "predict"
    for share, counted in found.items():
        assert counted["checks"] == expected["checks"], share
        for part in ("first", "second"):
            mine, theirs = np.array(counted[part]), np.array(expected[part])
            assert theirs.sum() > 0
            # A gate that is all but 0 may be on its other side.
            assert np.abs(mine - theirs).sum() <= 2, (share, part)


def test_profiles(tmp_path: Path) -> None:
    """Of a model that GPU and CPU share; int8 codes that flip move gates that are all but 0."""
    found = on_gpu("profiled", STORIES, tmp_path)
    assert found["sum"] > 10_000
    assert found["different"] < 0.005 * found["sum"]


def test_perplexities() -> None:
    """Every token's predictions are held against the gates, on the GPU as on the processor."""
    found = on_gpu("perplexities", STORIES)
    expected = found.pop("cpu")
    assert 0 < expected["missed"] < 0.5
    for share, values in found.items():
        # int8 codes that flip move predictions near the threshold.
        assert values == pytest.approx(expected, rel=0.02), share


def test_texts() -> None:
    """Both tell the published story."""
    first, second = on_gpu("texts", DATA / "stories260K.F32.gguf", "Once upon a time", 60)
    assert first == second
    assert len(first) > 100


def test_sampling_on_the_device() -> None:
    """The same tokens as from all logits, of which only what decides crosses to the host."""
    found = on_gpu("sampled", DATA / "stories260K.F32.gguf", 12)
    assert found["cuda"] == found["cpu"]
    candidate, all_logits = 8, 4 * found["n_vocab"]
    assert found["bytes"] == {
        "greedy": candidate,
        "top-k": 21 * candidate,
        "top-k and top-p": 41 * candidate,
        "most": 512 * candidate,
        **dict.fromkeys(["all", "top-p", "penalties", "bias", "mirostat"], all_logits),
    }


def test_logits_that_are_not_numbers(tmp_path: Path) -> None:
    """One NaN among them is an error on every way, and the tensor is named."""
    path = Case("llama").write(tmp_path)
    with GGUF(path) as file:
        (head,) = (tensor for tensor in file.tensors if tensor.name == "output.weight")
        at = head.file_offset + head.n_bytes // head.shape[0] * 77
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(np.float32(np.nan).tobytes())
    said = on_gpu("not_a_number", path)
    assert len(said) == 6
    for message in said.values():
        assert message.startswith("FormatError: ")
        assert "output.weight" in message


def test_a_gpu_does_not_wait_for_ever() -> None:
    """A wait that comes to its limit is an error; then nothing waits any more."""
    found = on_gpu("waits_in_vain", DATA / "stories260K.F32.gguf")
    (said,) = found["said"]
    assert said.startswith("DeviceError: the GPU waited 60 s for the processor's part of a layer")
    assert max(found["before"], found["after"]) < 1e-5
    assert found["left"] == 0


def test_counters_are_read_while_steps_are_computed() -> None:
    """By another thread, without disturbing anybody; none is lost or counted twice."""
    found = on_gpu("polled", STORIES)
    assert found["failures"] == []
    assert found["last"] == found["alone"]
    for values in zip(*found["seen"], strict=True):
        assert list(values) == sorted(values)
        assert len(set(values)) > 5


def test_states_move_between_devices() -> None:
    assert max(on_gpu("states", DATA / "stories260K.F32.gguf")) < 1e-5


def test_models_share_a_gpu() -> None:
    (errors,) = on_gpu("together", DATA / "stories260K.F32.gguf")
    assert max(errors) < 1e-5


def test_threads_share_a_gpu() -> None:
    """Kernels of one context wait for their thread while those of another do for theirs."""
    assert on_gpu("side_by_side", DATA / "stories260K.F32.gguf") == [True] * 4


@pytest.mark.parametrize(("code", "share"), [(2, "half"), (999, "whole")])
def test_any_call_may_fail(code: int, share: str) -> None:
    """Out of memory, or an unknown error: a typed exception, nothing leaked, and it goes on."""
    found = on_gpu("failures", DATA / "stories260K.F32.gguf", share, code, 7)
    kinds = found["kinds"]
    assert found["n_calls"] > 100
    assert kinds.get("DeviceError", 0) + kinds.get("OutOfMemory", 0) > 10
    assert "leaks" not in kinds
    assert found["same"]


@pytest.mark.parametrize("share", ["whole", "half"])
def test_a_lost_device_is_an_error(share: str) -> None:
    found = on_gpu("lost", DATA / "stories260K.F32.gguf", share)
    assert found["error"] == "DeviceError"
