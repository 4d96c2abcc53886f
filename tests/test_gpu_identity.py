"""GPU splits and activation counts know the model, and the file, that they are of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qinfer import ArgumentError, Model, _fingerprint
from qinfer._gguf import GGUF
from qinfer.activation import write_activations
from qinfer.gpu_index import GpuIndex
from qinfer.profile import profile, write
from qinfer.tools.export_gpu_split import export_gpu_split
from qinfer.tools.quantize import quantize
from test_cuda_model import on_gpu
from test_sparsity import Case


def fingerprints(path: Path) -> tuple[bytes, bytes]:
    with GGUF(path) as file:
        return _fingerprint.of_file(file), _fingerprint.of_model(file)


def with_other_weights(source: Path, target: Path, *names: str) -> Path:
    """A copy of a file in which the first value of some tensors is another."""
    shutil.copy(source, target)
    with GGUF(target) as file:
        places = [tensor.file_offset for tensor in file.tensors if tensor.name in names]
    assert len(places) == len(names)
    content = bytearray(target.read_bytes())
    for place in places:
        content[place] ^= 1
    target.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PowerInfer model whose rows are whole blocks."""
    sizes = {"n_embd": 128, "n_head": 4, "n_ff": 256}
    return Case("llama", sizes=sizes).write(tmp_path_factory.mktemp("model"))


def test_what_tells_files_and_models_apart(model: Path, tmp_path: Path) -> None:
    of_file, of_model = fingerprints(model)
    assert len(of_file) == len(of_model) == 32
    renamed = Path(shutil.copy(model, tmp_path / "other name.gguf"))
    assert fingerprints(renamed) == (of_file, of_model)
    quantize(model, tmp_path / "q8_0.gguf", "Q8_0")
    other_file, same_model = fingerprints(tmp_path / "q8_0.gguf")
    assert same_model == of_model
    assert other_file != of_file
    norm = with_other_weights(model, tmp_path / "norm.gguf", "blk.1.ffn_norm.weight")
    assert of_model != fingerprints(norm)[1]
    up = with_other_weights(model, tmp_path / "up.gguf", "blk.2.ffn_up.weight")
    assert of_file != fingerprints(up)[0]


def test_profiles_know_their_model(model: Path, tmp_path: Path) -> None:
    """And a split that is made with the model its file."""
    of_file, of_model = fingerprints(model)
    with Model(model, device="cpu", sparsity="off") as loaded:
        counts = [np.arange(loaded.info.n_ff)] * loaded.info.n_layer
    write_activations(tmp_path / "activation", counts, of_model)
    split = export_gpu_split(tmp_path / "activation", tmp_path / "x", model=model, neurons=256)
    assert split.index.fingerprint == of_file
    assert GpuIndex.read(tmp_path / "x").fingerprint == of_file
    other = with_other_weights(model, tmp_path / "other.gguf", "output_norm.weight")
    with pytest.raises(ArgumentError, match=r"activation_0\.pt: holds .* counts of another model"):
        export_gpu_split(tmp_path / "activation", tmp_path / "y", model=other, neurons=256)
    assert not (tmp_path / "y").exists()
    # Without the model nobody knows.
    assert (
        export_gpu_split(tmp_path / "activation", tmp_path / "x", neurons=256).index.fingerprint
        == b""
    )


def test_counts_of_a_text_are_of_their_model(tmp_path: Path) -> None:
    with Model.demo(device="cpu", sparsity="off") as demo:
        path = Path(shutil.copy(demo.path, tmp_path))
        result = profile(demo, "Once upon a time there was a dog.")
    write(result, tmp_path, plot=False)
    assert on_gpu("gpu_option_cases.splits", path, ["counts"]) == [""]


def test_other_files_splits_are_refused(model: Path, tmp_path: Path) -> None:
    """Beside the model and by name; a copy under another name takes them."""
    (tmp_path / "own").mkdir()
    own = Path(shutil.copy(model, tmp_path / "own" / "renamed.gguf"))
    other = with_other_weights(model, tmp_path / "other.gguf", "blk.0.ffn_up.weight")
    with Model(model, device="cpu", sparsity="off") as loaded:
        n_layer, n_ff = loaded.info.n_layer, loaded.info.n_ff
    ids = tuple([np.arange(0, n_ff, 2)] * n_layer)
    of_file = fingerprints(model)[0]
    for name, fingerprint in (("known", of_file), ("unknown", b"")):
        GpuIndex(n_ff, ids, fingerprint=fingerprint).write(tmp_path / name)
    refused = "is for another model or another file of it"
    for path, says in ((own, ""), (other, refused)):
        beside = path.with_name(path.name + ".generated.gpuidx")
        shutil.copy(tmp_path / "known", beside)
        by_name, unsaid, found = on_gpu(
            "gpu_option_cases.splits",
            path,
            [str(tmp_path / "known"), str(tmp_path / "unknown"), "auto"],
        )
        assert by_name.startswith("ArgumentError: " if says else "")
        # Nobody asked for what was only found: that is no reason not to run.
        assert found.startswith(
            f"neurons for the GPU are chosen without {beside}: " if says else ""
        )
        for answer in (by_name, found):
            assert says in answer
            assert bool(answer) == bool(says)
        assert unsaid.endswith("does not say which model file it was made for: only its numbers "
                               "of layers and neurons are checked")  # fmt: skip


def test_other_models_counts_are_refused(model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(model, tmp_path / "own.gguf"))
    with Model(model, device="cpu", sparsity="off") as loaded:
        counts: Any = [np.arange(loaded.info.n_ff)] * loaded.info.n_layer
    _, of_model = fingerprints(model)
    says = []
    for fingerprint in (of_model, b"", bytes(32)):
        write_activations(tmp_path / "activation", counts, fingerprint)
        says.append(on_gpu("gpu_option_cases.splits", own, ["counts", "auto"]))
    assert says[0] == ["", ""]
    assert all("does not say which model it is of" in answer for answer in says[1])
    assert all("holds activation counts of another model" in answer for answer in says[2])
    asked, found = says[2]
    assert asked.startswith("ArgumentError: ")
    assert found.startswith("neurons for the GPU are chosen without ")
