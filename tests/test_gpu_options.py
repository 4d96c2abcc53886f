"""Options that are about a GPU: their types, and what becomes of them where no GPU is used."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qinfer import ArgumentError, Model
from qinfer._kv_place import KvPlace
from qinfer._option_names import spoken
from qinfer.offload import budget_bytes
from test_cli import run
from test_cuda_model import DATA, on_gpu
from test_sparsity import CASES

SMALL = DATA / "stories260K.F32.gguf"


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with predictors."""
    return CASES["llama"].write(tmp_path_factory.mktemp("predicting"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", None),
        ("device", ["cpu"]),
        ("vram_budget", True),
        ("vram_budget", [6]),
        ("gpu_split", None),
        ("gpu_split", 5),
        ("gpu_split", ""),
        ("neuron_cache", []),
        ("neuron_cache", None),
        ("kv_mode", []),
        ("kv_ratio", "half"),
        ("kv_step", True),
        ("kv_type", None),
        ("deterministic", "no"),
        ("deterministic", None),
        ("mmap", "no"),
        ("threads", True),
        ("n_ctx", 1.5),
        ("sparsity", []),
        ("prefill", None),
        ("sparse_threshold", "low"),
        ("sparse_threshold", True),
        ("cross_layer_from", True),
        ("cross_layer_from", "5"),
        ("cross_layer_from", 1.0),
    ],
)
def test_a_wrong_type_is_named_with_its_argument(option: str, value: Any, predicting: Path) -> None:
    with pytest.raises(ArgumentError, match=f"^{option}="):
        Model(predicting, **{"device": "cpu", "sparsity": "predict", option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kv_mode", []),
        ("kv_mode", ""),
        ("deterministic", "no"),
        ("cross_layer_from", True),
        ("cross_layer_from", 0),
        ("sparsity", []),
        ("sparse_threshold", "low"),
    ],
)
def test_contexts_refuse_them_too(option: str, value: Any, predicting: Path) -> None:
    with (
        Model(predicting, device="cpu", sparsity="predict") as model,
        pytest.raises(ArgumentError, match=f"^{option}="),
    ):
        model.context(**{option: value})


def test_numpys_scalars_are_numbers(predicting: Path) -> None:
    assert budget_bytes(np.float32(1.5)) == 3 * 2**29  # type: ignore[arg-type]
    assert budget_bytes(np.int64(2)) == 2**31  # type: ignore[arg-type]
    one = np.int64(1)
    options: dict[str, Any] = {"n_ctx": np.int32(64), "sparse_threshold": np.float32(0.5)}
    with Model(
        predicting, device="cpu", sparsity="predict", cross_layer_from=one, **options
    ) as model:  # type: ignore[arg-type]
        assert type(model.policy.cross_layer_from) is int
        with model.context(cross_layer_from=np.int64(2)) as context:  # type: ignore[arg-type]
            context.feed([1, 2], generated=True)
            assert context.policy.cross_layer_from == 2
        # Known as numbers, and refused for the device alone.
        with pytest.raises(ArgumentError, match=r"kv_ratio=0\.5 and kv_step=0\.25 are for GPUs"):
            model.context(kv_ratio=np.float32(0.5), kv_step=np.float32(0.25))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vram_budget": 6}, "vram_budget=6 is for GPUs, and no GPU is used: device is 'cpu'"),
        ({"gpu_split": "x.gpuidx"}, "gpu_split='x.gpuidx' is for GPUs"),
        ({"gpu_split": "counts"}, "gpu_split='counts' is for GPUs"),
        ({"gpu_split": "none"}, "gpu_split='none' is for GPUs"),
        ({"neuron_cache": "balance"}, "neuron_cache='balance' is for GPUs"),
        ({"kv_mode": "host"}, "kv_mode='host' is for GPUs"),
        ({"kv_ratio": 0.5, "vram_budget": 1}, "vram_budget=1 and kv_ratio=0.5 are for GPUs"),
    ],
)
def test_the_processor_takes_none_of_them(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        Model(SMALL, device="cpu", **options)
    assert str(raised.value).startswith(says)


def test_auto_says_which_have_no_effect_without_a_gpu() -> None:
    given = {"gpu_split": "counts", "neuron_cache": "balance", "kv_mode": "split", "n_ctx": 64}
    plain, aloud, refused = on_gpu("gpu_option_cases.without_gpu", SMALL, given, devices=0)
    reason = "the NVIDIA driver finds no GPU"
    assert [line for line in plain if line[1].startswith(f"no GPU is used: {reason}")] == [
        [logging.INFO, plain[0][1]]
    ]
    (line,) = [line for line in aloud if line[1].startswith("no GPU is used")]
    assert line[0] == logging.WARNING
    assert line[1].startswith(
        "no GPU is used, and gpu_split='counts' and neuron_cache='balance' and kv_mode='split' "
        f"have no effect: {reason}"
    )
    assert refused.startswith(f"kv_mode='host' is for GPUs, and no GPU is used: {reason}")


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_predicting_early_needs_predictions(mode: Any, predicting: Path) -> None:
    says = f"cross_layer_from=1 .* sparsity='{mode}' asks none"
    with pytest.raises(ArgumentError, match=says):
        Model(predicting, device="cpu", sparsity=mode, cross_layer_from=1)
    with Model(predicting, device="cpu", sparsity="predict", cross_layer_from=1) as model:
        with pytest.raises(ArgumentError, match=says):
            model.context(sparsity=mode, cross_layer_from=1)
        with model.context(sparsity=mode) as context:  # the model's is not asked for here
            assert context.policy.cross_layer_from is None
        with model.context() as context:
            assert context.policy.cross_layer_from == 1


def test_auto_says_that_nothing_is_predicted_early(
    predicting: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qinfer.sparsity._seconds_per_token",
        lambda *_: {"off": 1.0, "exact": 2.0, "predict": 3.0},
    )
    with Model(predicting, device="cpu", cross_layer_from=1) as model:
        assert model.policy.mode == "off"
        (line,) = [line for line in caplog.messages if "cross_layer_from" in line]
        assert line.startswith("cross_layer_from=1 has no effect: sparsity='auto' chose 'off'")
        # Known for contexts that predict.
        with model.context(sparsity="predict") as context:
            assert context.policy.cross_layer_from == 1


def test_neurons_that_cannot_move_are_said(predicting: Path) -> None:
    still, moving = on_gpu("gpu_option_cases.caches", predicting)
    assert sum("neuron_cache='frequency' has no effect" in line for line in still) == 1
    assert not any("has no effect" in line for line in moving)


def test_a_step_of_nothing_goes_with_every_place() -> None:
    for mode in ("auto", "device", "host", "split"):
        place = KvPlace(mode, None, 0)  # type: ignore[arg-type]
        assert place.step == 0.0
        assert place.is_default == (mode == "auto")


def test_advice_for_a_place_without_room() -> None:
    found = on_gpu("gpu_option_cases.kept_without_room", SMALL)
    assert found["error"].startswith("OutOfMemory: ")
    assert found["error"].endswith(
        "without kv_mode, kv_ratio and kv_step the processor takes what does not fit"
    )


# ---- on the command line ----


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("kv_ratio=0.5 and kv_step=1e-05 are", "--kv-ratio 0.5 and --kv-step 1e-05 are"),
        ("neuron_cache='balance' moves", "--neuron-cache balance moves"),
        ("gpu_split='counts' goes by", "--reset-gpu-index goes by"),
        ("gpu_split='balance': no", "--balance-gpu-index: no"),
        ("and gpu_split='none' keeps none", "and --disable-gpu-index keeps none"),
        ("gpu_split=PosixPath('a b.idx'), so", "--gpu-index a b.idx, so"),
        ('gpu_split=PosixPath("it\'s"), so', "--gpu-index it's, so"),
        ("stop=['a', 'b'] is", "--stop ['a', 'b'] is"),
        ("n_ctx=5 is; n_ctx= overrides this", "--ctx-size 5 is; --ctx-size overrides this"),
        ("not with deterministic=True", "not with --deterministic"),
        ("vram_budget: 'six' is not a size", "--vram-budget: 'six' is not a size"),
        ("vram_budget=-1.5 is", "--vram-budget -1.5 is"),
        ("the sparsity of a device with threads", "the sparsity of a device with threads"),
        ("/a/kv_mode=x/kv_mode.gguf: the 'n_ctx'", "/a/kv_mode=x/kv_mode.gguf: the 'n_ctx'"),
    ],
)
def test_messages_have_the_words_of_the_command_line(message: str, says: str) -> None:
    assert spoken(message) == says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "cpu", "--balance-gpu-index"], "--balance-gpu-index is for GPUs"),
        (["--device", "cpu", "--gpu-index", "auto"], "--gpu-index auto is for GPUs"),
        (["--device", "cpu", "--disable-gpu-index"], "--disable-gpu-index is for GPUs"),
        (["--vram-budget", "six"], "--vram-budget: 'six' is not a size"),
    ],
)
def test_errors_name_options(words: list[str], says: str) -> None:
    done = run("run", SMALL, "-p", "a", *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {says}")


def test_a_files_name_is_no_keyword(tmp_path: Path) -> None:
    """On the command line, where there are options for these."""
    texts = on_gpu("gpu_option_cases.files_called", SMALL, ["auto", "none", "counts"])
    for name, text in texts.items():
        assert text == f"FileError: {name}: cannot read: No such file or directory"


def test_counts_that_are_not_there_say_what_writes_them(tmp_path: Path) -> None:
    path = shutil.copy(SMALL, tmp_path)
    (says,) = on_gpu("gpu_option_cases.splits", path, ["counts"])
    assert says.startswith("ArgumentError: gpu_split='counts' goes by counts of activations, and ")
    assert says.endswith(f"qinfer profile MODEL -f TEXT -o {tmp_path} writes it")
