"""Folders of activation counts: the order of layers, types, and what is refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qinfer._torch_file import save_tensor
from qinfer.activation import read_activations, write_activations
from qinfer.errors import ArgumentError, FileError, FormatError


def write_layers(folder: Path, *layers: object) -> None:
    folder.mkdir(exist_ok=True)
    for number, layer in enumerate(layers):
        save_tensor(folder / f"activation_{number}.pt", np.asarray(layer))


def test_layers_are_ordered_by_number(tmp_path: Path) -> None:
    write_layers(tmp_path, *([n, 0, 100 + n] for n in range(23)))
    assert [layer.tolist() for layer in read_activations(tmp_path)] == [
        [n, 0, 100 + n] for n in range(23)
    ]


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8"], ids=lambda name: str(np.dtype(name))
)
def test_any_type_of_number(dtype: str, tmp_path: Path) -> None:
    write_layers(tmp_path, np.array([3, 0, 7], dtype))
    (layer,) = read_activations(tmp_path)
    assert layer.dtype == np.dtype(dtype)
    assert layer.tolist() == [3, 0, 7]


def test_other_files_are_ignored(tmp_path: Path) -> None:
    write_layers(tmp_path, [1, 2])
    (tmp_path / "README.md").write_text("counts")
    (tmp_path / "activation_x.pt").write_text("none")
    (tmp_path / "activation_1.pt.bak").write_text("none")
    assert len(read_activations(tmp_path)) == 1


def test_a_trained_models_counts(test_data: Path) -> None:
    folder = test_data / "models" / "relu-stories-15M"
    config = json.loads((folder / "config.json").read_text())
    counts = read_activations(
        folder / "activation",
        n_layers=config["num_hidden_layers"],
        n_ff=config["intermediate_size"],
    )
    for layer in counts:
        assert layer.dtype == np.int64
        assert 0 < layer.max() <= 409600  # the tokens they were counted over
        assert 0.15 < layer.mean() / 409600 < 0.25  # a fifth of the gates is not zero


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle for .pt files")
    counts = [np.array([1, 2**40, 0], np.uint64), np.array([7, 8, 9], np.uint64)]
    write_activations(tmp_path, counts)
    for number, layer in enumerate(counts):
        tensor = torch.load(tmp_path / f"activation_{number}.pt", weights_only=True)
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == layer.tolist()


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle for .pt files")
    torch.save(torch.tensor([1.0, 2.5, 0.0], dtype=torch.bfloat16), tmp_path / "activation_0.pt")
    torch.save(torch.tensor([[1, 2], [3, 4], [5, 6]])[:, 1], tmp_path / "activation_1.pt")
    first, second = read_activations(tmp_path)
    assert first.tolist() == [1.0, 2.5, 0.0]
    assert second.tolist() == [2, 4, 6]


@settings(max_examples=30, deadline=None)
@given(counts=arrays(np.uint64, st.tuples(st.integers(1, 4), st.integers(1, 9)),
                     elements=st.integers(0, 2**63 - 1)))  # fmt: skip
def test_what_is_written_is_read(
    counts: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("counts") / "new" / "activation"
    write_activations(folder, list(counts))
    assert np.array_equal(read_activations(folder), counts)
    assert len(list(folder.iterdir())) == len(counts)


def test_another_models_layers_do_not_stay(tmp_path: Path) -> None:
    write_activations(tmp_path, [np.arange(4)] * 12)
    (tmp_path / "kept.txt").write_text("ours")
    write_activations(tmp_path, [np.arange(3)] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "activation_0.pt",
        "activation_1.pt",
        "kept.txt",
    ]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([[1, 2], [3, 4, 5]], r"activation_1\.pt: has 3 neurons, activation_0\.pt has 2"),
        ([[1, 2], [3, -4]], r"activation_1\.pt: neuron 1 was active -4 times"),
        ([[1.0, float("nan")]], r"activation_0\.pt: neuron 1 was active nan times"),
        ([[float("inf"), 0.0]], r"activation_0\.pt: neuron 0 was active inf times"),
        ([[[1, 2], [3, 4]]], r"activation_0\.pt: .*shape \(2, 2\)"),
        ([7], r"activation_0\.pt: .*shape \(\)"),
        ([np.empty(0)], r"activation_0\.pt: .*shape \(0,\)"),
        ([[True, False]], r"activation_0\.pt: holds bool"),
    ],
)
def test_what_is_not_counts_is_refused(layers: list[object], says: str, tmp_path: Path) -> None:
    write_layers(tmp_path, *layers)
    with pytest.raises(FormatError, match=says):
        read_activations(tmp_path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    write_layers(tmp_path, *([1, 2] for _ in range(12)))
    (tmp_path / "activation_3.pt").unlink()
    with pytest.raises(FormatError, match=r"activation_3\.pt: is missing; the last .* is 11"):
        read_activations(tmp_path)


def test_a_layer_that_is_there_twice(tmp_path: Path) -> None:
    write_layers(tmp_path, [1], [2])
    save_tensor(tmp_path / "activation_01.pt", np.array([3]))
    with pytest.raises(FormatError, match=r"activation_1\.pt: activation_01\.pt is there"):
        read_activations(tmp_path)


def test_expectations_are_checked_with_both_numbers(tmp_path: Path) -> None:
    write_layers(tmp_path, [1, 2], [3, 4])
    with pytest.raises(FormatError, match="counts of 2 layers, 3 are expected"):
        read_activations(tmp_path, n_layers=3)
    with pytest.raises(FormatError, match=r"activation_0\.pt: has 2 neurons.*have 5"):
        read_activations(tmp_path, n_ff=5)


def test_folders_without_counts(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no activation_0\.pt"):
        read_activations(tmp_path)
    with pytest.raises(FileError, match=r"absent.*No such file"):
        read_activations(tmp_path / "absent")
    (tmp_path / "activation_0.pt").write_bytes(b"not torch's")
    with pytest.raises(FormatError, match=r"activation_0\.pt"):
        read_activations(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file: cannot write"):
        write_activations(tmp_path / "file", [np.arange(3)])


def test_a_full_disk_is_told_of_the_file_that_was_to_be(tmp_path: Path) -> None:
    write_activations(tmp_path, [np.arange(3)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(FileError) as caught:
            write_activations(tmp_path, [np.arange(1 << 16)] * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"{tmp_path}/activation_0.pt: cannot write: File too large"
    assert [each.name for each in tmp_path.iterdir()] == ["activation_0.pt"]
    assert read_activations(tmp_path)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([], "one array per layer"),
        ([[1, 2], [3]], "all of one length"),
        ([[1, 2], [-3, 1]], "layer 1: counts are neither negative"),
        ([[1.0, float("nan")]], "layer 0"),
        ([np.array([2**63], np.uint64)], "beyond 63 bits"),
        ([[[1]]], r"layer 0: .*shape \(1, 1\)"),
    ],
)
def test_what_is_not_counts_is_not_written(layers: list[object], says: str, tmp_path: Path) -> None:
    write_activations(tmp_path, [np.arange(3)])
    with pytest.raises(ArgumentError, match=says):
        write_activations(tmp_path, [np.asarray(layer) for layer in layers])
    assert read_activations(tmp_path)[0].tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 1
