"""The GPU split tool: its arguments, the files it writes, what it prints and refuses."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from oracle.checkpoint import Quantised, read_gguf, write_gguf
from oracle.tiny import as_powerinfer, tiny_shape, write_tiny
from qinfer._sizes import parse_size
from qinfer._torch_file import save_tensor
from qinfer.activation import read_activations, write_activations
from qinfer.errors import ArgumentError, FileError, FormatError, QInferError
from qinfer.gpu_index import GpuIndex
from qinfer.tools._counts_pickle import read_counts_pickle
from qinfer.tools._neuron_bytes import neuron_bytes
from qinfer.tools.export_gpu_split import export_gpu_split
from tool_program import run_tool

N_LAYERS, N_FF = 12, 8
# Layer 10 is read third where files are ordered as text.
COUNTS = [np.array([0, 3, 3, 0, 9, 1, 0, 0]) + 10 * layer for layer in range(N_LAYERS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Counts of twelve layers, later ones more active."""
    write_activations(tmp_path / "activation", COUNTS)
    return tmp_path / "activation"


def chosen(path: Path) -> list[list[int]]:
    """Neurons of a two-tensor file."""
    index = GpuIndex.read(path)
    assert index.down is None
    return [layer.tolist() for layer in index.gate_up]


# ---- the three command lines it takes the place of ----


def test_counts_of_a_pickle(folder: Path, tmp_path: Path) -> None:
    """The original's positionals; solvers left floats."""
    numbers = [float(layer % 4) for layer in range(N_LAYERS)]
    (tmp_path / "solved.pkl").write_bytes(pickle.dumps(numbers))
    done = run_tool("export_gpu_split", folder, tmp_path / "out", tmp_path / "solved.pkl")
    assert "no longer read by any release" in done.stderr
    assert chosen(tmp_path / "out") == [[], [4], [1, 4], [1, 2, 4]] * 3
    assert "18 of 96 neurons" in done.stdout.splitlines()[-1]


def test_pairs_of_a_pickle(folder: Path, tmp_path: Path) -> None:
    pairs = [[2, 1]] * N_LAYERS
    (tmp_path / "solved.pkl").write_bytes(pickle.dumps(pairs))
    split = export_gpu_split(
        folder, tmp_path / "four", counts_pickle=tmp_path / "solved.pkl", form=None
    )
    index = GpuIndex.read(tmp_path / "four")
    assert index.down is not None
    assert [layer.tolist() for layer in index.gate_up] == [[1, 4]] * N_LAYERS
    assert [layer.tolist() for layer in index.down] == [[4]] * N_LAYERS
    assert split.counts == [1] * N_LAYERS
    export_gpu_split(
        folder, tmp_path / "two", counts_pickle=tmp_path / "solved.pkl", form="powerinfer"
    )
    assert chosen(tmp_path / "two") == [[4]] * N_LAYERS


def test_the_flags_of_powerinfers_solver(folder: Path, tmp_path: Path) -> None:
    """As its runtime starts it; layers go by their numbers, not by their names as text."""
    out = tmp_path / "model.gguf.generated.gpuidx"
    done = run_tool("export_gpu_split",
        "--activation", folder, "--neuron", N_FF, "--capacity", 20, "--layer", N_LAYERS,
        "--vram-capacity", 12345, "--batch", 4, "--threshold", 0, "--output", out,
    )  # fmt: skip
    assert done.stderr == ""
    # Blocks of 4: the first of a layer has 16 + 40 · layer, the second 40 · layer, so that five
    # of the last layers' go first.
    assert chosen(out) == [[]] * 9 + [[1, 2, 4, 5]] + [list(range(8))] * 2
    assert GpuIndex.read(out).vram_capacity == 12345


def test_the_flags_of_qinfers_solver(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gpuidx"
    run_tool("export_gpu_split",
        "--activation", folder, "--neuron", N_FF, "--capacity", 3 * 96, "--layer", N_LAYERS,
        "--vram-capacity", 99, "--batch", 1, "--threshold", 0, "--output", out,
        "--computility-ratio-up", 1.0, "--computility-ratio-down", 0.01, "--has-gate", 1,
    )  # fmt: skip
    index = GpuIndex.read(out)
    assert index.down is not None
    assert index.vram_capacity == 99
    # Layer 0 has 9, 3, 3, 1: more than half with one neuron. In the last, 119 is less than half.
    assert index.gate_up[0].tolist() == [4]
    assert len(index.gate_up[11]) == 4
    assert [len(layer) for layer in index.down] == [1] * N_LAYERS


def test_has_gate_is_a_third_of_the_rows(folder: Path, tmp_path: Path) -> None:
    """Six rows are two neurons with a gate and three without."""
    n_up = {}
    for has_gate in (0, 1):
        split = export_gpu_split(
            folder, tmp_path / "x", rows=6, method="balance", ratio_up=1e9, ratio_down=1e9,
            has_gate=bool(has_gate), batch=1,
        )  # fmt: skip
        n_up[has_gate] = sum(split.counts)
    assert n_up == {0: 3, 1: 2}


# ---- capacity ----


def test_a_number_of_neurons(folder: Path, tmp_path: Path) -> None:
    done = run_tool("export_gpu_split", folder, tmp_path / "x", "--neurons", 3, "--batch", 1)
    assert chosen(tmp_path / "x") == [[]] * 11 + [[1, 2, 4]]
    assert "records no need of GPU memory" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == N_LAYERS + 1
    n_covered = 113 + 113 + 119
    share = n_covered / (16 + 8 * 110)
    assert lines[11] == f"layer  11:      3 of 8 neurons, {share:6.1%} of activations"
    total = sum(int(layer.sum()) for layer in COUNTS)
    share = n_covered / total
    assert lines[12] == f"{tmp_path / 'x'}: 3 of 96 neurons, {share:.1%} of activations"


def test_all_neurons_and_none(folder: Path, tmp_path: Path) -> None:
    export_gpu_split(folder, tmp_path / "x", neurons=10**6)
    assert chosen(tmp_path / "x") == [list(range(N_FF))] * N_LAYERS
    done = run_tool(
        "export_gpu_split", folder, tmp_path / "x", "--neurons", 7
    )  # less than a block, which is a layer here
    assert chosen(tmp_path / "x") == [[]] * N_LAYERS
    assert "no neurons are on the GPU" in done.stderr


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A PowerInfer file of three layers in F16, whose name has a space."""
    path = write_tiny(
        tmp_path / "a model.gguf",
        tiny_shape("llama", "f16"),
        "f16",
        by_neuron=True,
        rank=8,
    )
    return as_powerinfer(path)


def test_bytes_are_those_of_the_rows(sparse: Path, tmp_path: Path) -> None:
    cost = neuron_bytes(sparse)
    assert (cost.n_ff, cost.n_layers, cost.has_gate) == (101, 3, True)
    assert cost.gate_up == (2 * 2 * 60,) * 3
    assert cost.down == (2 * 60,) * 3
    rng = np.random.default_rng(1)
    counts = [rng.integers(0, 1000, 101) for _ in range(3)]
    write_activations(tmp_path / "activation", counts)
    neuron = 3 * 2 * 60
    done = run_tool(
        "export_gpu_split",
        tmp_path / "activation",
        "--model",
        sparse,
        "--vram-capacity",
        50 * neuron + 359,
    )
    path = sparse.with_name(sparse.name + ".generated.gpuidx")
    index = GpuIndex.read(path)
    assert sum(map(len, index.gate_up)) == 50
    assert index.vram_capacity == 50 * neuron + 359
    best = sorted(np.concatenate(counts).tolist())[-50:]
    taken = [counts[layer][ids] for layer, ids in enumerate(index.gate_up)]
    assert sorted(np.concatenate(taken).tolist()) == best
    size = f"{50 * neuron / 2**20:.1f} MiB"
    assert f"{path}: 50 of 303 neurons, {size}, " in done.stdout


def test_what_neurons_take_is_recorded(sparse: Path, tmp_path: Path) -> None:
    """A runtime uses a file as long as it may use as many bytes."""
    write_activations(tmp_path / "activation", [np.arange(101)] * 3)
    split = export_gpu_split(tmp_path / "activation", tmp_path / "x", model=sparse, neurons=20)
    assert split.n_bytes == GpuIndex.read(tmp_path / "x").vram_capacity == 20 * 360
    with pytest.raises(ArgumentError, match="take 7200 bytes, more than vram_capacity=7199"):
        export_gpu_split(
            tmp_path / "activation", tmp_path / "y", model=sparse, neurons=20, vram_capacity=7199
        )
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("arch", "has_gate"), [("llama", True), ("bamboo", True), ("falcon", False), ("opt", False)]
)
def test_every_sparse_architecture_has_a_cost(arch: str, has_gate: bool, tmp_path: Path) -> None:
    shape = tiny_shape(arch, "q4_0", **({"n_head_kv": 6} if arch == "opt" else {}))
    path = as_powerinfer(
        write_tiny(tmp_path / "model.gguf", shape, "q4_0", by_neuron=True, rank=32)
    )
    cost = neuron_bytes(path)
    row = 96 // 32 * 18
    assert cost.has_gate == has_gate
    assert cost.down == (row,) * 3
    assert cost.gate_up == (row * (2 if has_gate else 1),) * 3


def test_mixed_types_cost_what_they_take(tmp_path: Path) -> None:
    """Down of the middle layer is F32 here, so a neuron costs more there."""
    shape = tiny_shape("llama", "f16")
    wide = {"blk.1.ffn_down_t.weight": np.zeros((101, 60), np.float32)}
    plain = write_tiny(tmp_path / "plain.gguf", shape, "f16", by_neuron=True)
    path = _with_tensors(plain, tmp_path / "model.gguf", wide)
    assert neuron_bytes(path).down == (120, 240, 120)
    write_activations(tmp_path / "activation", [np.full(101, 7)] * 3)
    split = export_gpu_split(
        tmp_path / "activation", tmp_path / "x", model=path, vram_capacity=205 * 360
    )
    assert split.counts == [101, 2, 101]
    assert split.n_bytes == 202 * 360 + 2 * 480


def _with_tensors(source: Path, target: Path, changed: dict[str, Any]) -> Path:
    """A copy of a file with other values for some tensors."""
    checkpoint = read_gguf(source)
    f16 = gguf.GGMLQuantizationType.F16
    tensors = {
        name: Quantised(f16, values.astype(np.float16).view(np.uint8))
        if values.ndim == 2 and name not in changed
        else values
        for name, values in checkpoint.tensors.items()
    }
    return write_gguf(target, checkpoint.metadata, tensors | changed)


# ---- what does not fit together ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "say how much goes to the GPU"),
        ({"vram_capacity": 10**9}, "bytes alone do not say"),
        ({"neurons": 1, "rows": 1, "method": "balance"}, "not both"),
        ({"rows": 1}, "for the method 'balance'"),
        ({"neurons": 1, "ratio_up": 1.0}, "speed ratios are for the method 'balance'"),
        ({"neurons": 1, "method": "balance", "ratio_up": 1.0}, "needs the speed ratios"),
        (
            {"rows": 1, "method": "balance", "ratio_up": 1.0, "ratio_down": 1.0, "threshold": 8},
            "threshold is for the method 'exact'",
        ),
        ({"neurons": 1, "method": "best"}, "method='best' is neither"),
        ({"neurons": 1, "form": "both"}, "form='both' is neither"),
        ({"neurons": -1}, "negative"),
        ({"neurons": 1, "vram_capacity": 2**64}, "is not a number of bytes"),
        ({"neurons": 1, "batch": 3}, "block=3 does not divide"),
        ({"neurons": 1, "threshold": 9}, "threshold=9 is not between"),
    ],
)
def test_arguments_that_do_not_fit(
    options: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=says):
        export_gpu_split(folder, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "options", [{"neurons": 1}, {"rows": 1}, {"batch": 4}, {"threshold": 4}, {"ratio_up": 1.0}]
)
def test_a_pickle_leaves_nothing_to_choose(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "solved.pkl").write_bytes(pickle.dumps([1] * N_LAYERS))
    with pytest.raises(ArgumentError, match="leave no number of neurons to choose"):
        export_gpu_split(folder, tmp_path / "x", counts_pickle=tmp_path / "solved.pkl", **options)


def test_other_models_files_are_refused(folder: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="counts of 12 layers, 3 are expected"):
        export_gpu_split(folder, tmp_path / "x", model=sparse, neurons=1)
    write_activations(folder, [np.arange(100)] * 3)
    with pytest.raises(FormatError, match=r"activation_0\.pt: has 100 neurons.* have 101"):
        export_gpu_split(folder, tmp_path / "x", model=sparse, neurons=1)
    with pytest.raises(ArgumentError, match=r"5 layers are asked for, .*a model\.gguf has 3"):
        export_gpu_split(folder, tmp_path / "x", model=sparse, neurons=1, n_layers=5)
    write_activations(folder, [np.arange(101)] * 3)
    with pytest.raises(ArgumentError, match="has_gate=False, but the model"):
        export_gpu_split(folder, tmp_path / "x", model=sparse, neurons=1, has_gate=False)
    dense = write_tiny(tmp_path / "dense.gguf", tiny_shape("llama"))
    with pytest.raises(FormatError, match=r"dense\.gguf: holds no blk\.0\.ffn_down_t\.weight"):
        export_gpu_split(folder, tmp_path / "x", model=dense, neurons=1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), r"activation_7\.pt: is missing"),
        (lambda path: save_tensor(path, np.arange(N_FF + 1)), r"activation_7\.pt: has 9 neurons"),
        (lambda path: save_tensor(path, -np.arange(N_FF)), r"activation_7\.pt: .* active -1 times"),
        (lambda path: save_tensor(path, np.full(N_FF, np.nan)), r"activation_7\.pt: .* nan times"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), r"activation_7\.pt"),
        (
            lambda path: path.write_bytes(pickle.dumps(os.getcwd)),
            r"activation_7\.pt",
        ),
    ],
)
def test_faulty_counts(change: Any, says: str, folder: Path, tmp_path: Path) -> None:
    change(folder / "activation_7.pt")
    done = run_tool("export_gpu_split", folder, tmp_path / "x", "--neurons", 8, status=1)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(QInferError, match=says):
        export_gpu_split(folder, tmp_path / "x", neurons=8)
    assert not (tmp_path / "x").exists()


# ---- the pickle ----


class Shell:
    """What a pickle must not bring about."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_any_protocol(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "solved.pkl"
    shared = [300.0, 70000]
    path.write_bytes(pickle.dumps([shared, (1, 0), 256, 0.0, shared], protocol))
    assert read_counts_pickle(path) == [(300, 70000), (1, 0), (256, 256), (0, 0), (300, 70000)]
    path.write_bytes(pickle.dumps([1, Shell(tmp_path / "owned")], protocol))
    with pytest.raises(FormatError, match=r"solved\.pkl: refused: a list of counts needs no"):
        read_counts_pickle(path)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_that_imports_something(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "solved.pkl").write_bytes(
        b"cos\nmkdir\n(S'" + bytes(tmp_path / "owned") + b"'\ntR."
    )
    done = run_tool("export_gpu_split", folder, tmp_path / "x", tmp_path / "solved.pkl", status=1)
    assert "needs no GLOBAL ('os mkdir') in its pickle" in done.stderr
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a pickle, or a damaged one"),
        (pickle.dumps([1, 2, 3])[:-3], "is not a pickle, or a damaged one"),
        (pickle.dumps({"a": 1}), "needs no EMPTY_DICT"),
        (pickle.dumps(np.arange(3)), "needs no"),
        (pickle.dumps("12"), "needs no SHORT_BINUNICODE"),
        (pickle.dumps(7), "holds 7, not a list"),
        (pickle.dumps([]), "holds a list, not a list with a count per layer"),
        (pickle.dumps([1, 2.5]), "layer 1 has 2.5, which is not a count"),
        (pickle.dumps([float("nan")]), "layer 0 has nan"),
        (pickle.dumps([float("inf")]), "layer 0 has inf"),
        (pickle.dumps([-1]), "layer 0 has -1"),
        (pickle.dumps([2**80]), "layer 0 has 12089"),
        (pickle.dumps([True], 0), "layer 0 has True|needs no"),
        (pickle.dumps([[1, 2, 3]]), "layer 0 has 3 counts"),
        (pickle.dumps([[[1], 2]]), "layer 0 has a list"),
        (b"I" + b"9" * 5000 + b"\n.", "is not a pickle|damaged"),
        (b"]r\xff\xff\xff\x7f.", "memo index 2147483647 in a short pickle"),
        (b"]" * 3 + b"." * (1 << 20), "over 1048576 bytes"),
    ],
)  # fmt: skip
def test_pickles_of_other_things(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "solved.pkl"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"solved\.pkl: .*({says})"):
        read_counts_pickle(path)


def test_pickled_counts_of_another_model(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "solved.pkl"
    path.write_bytes(pickle.dumps([1] * 11))
    with pytest.raises(FormatError, match=r"solved\.pkl: has counts of 11 layers, .* 12"):
        export_gpu_split(folder, tmp_path / "x", counts_pickle=path)
    path.write_bytes(pickle.dumps([1] * 11 + [9]))
    with pytest.raises(FormatError, match=r"solved\.pkl: layer 11 has 9 of 8 neurons"):
        export_gpu_split(folder, tmp_path / "x", counts_pickle=path)
    with pytest.raises(FileError, match=r"absent\.pkl: cannot read"):
        export_gpu_split(folder, tmp_path / "x", counts_pickle=tmp_path / "absent.pkl")


def test_files_to_read_from_are_not_written_to(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "solved.pkl"
    path.write_bytes(pickle.dumps([1] * N_LAYERS))
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"solved\.pkl is a file to read from"):
        export_gpu_split(folder, path, counts_pickle=path)
    with pytest.raises(ArgumentError, match=r"solved\.pkl is a file to read from"):
        export_gpu_split(folder, path, model=path, vram_capacity=1)
    assert path.read_bytes() == before


# ---- the command line ----


def test_help_has_an_example() -> None:
    done = run_tool("export_gpu_split", "--help")
    assert "Example: python -m qinfer.tools.export_gpu_split" in done.stdout
    assert run_tool("export_gpu_split").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        ((), "name the output", 2),
        (("x", "--output", "y", "--neurons", 1), "the output is given twice", 2),
        (("x", "--neurons", 1, "--capacity", 1), "the number of neurons is given twice", 2),
        (("x", "--vram-capacity", "lots"), "'lots' is not a size", 2),
        (("x", "--neurons", 1, "--moe", "True"), "--moe: mixtures of experts", 2),
        (("x", "--vram-capacity", "6GiB"), "name the model, too", 1),
        (("absent/x", "--neurons", 8), "absent/x: cannot write", 1),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: tuple[object, ...], says: str, status: int, folder: Path
) -> None:
    done = run_tool("export_gpu_split", folder, *arguments, status=status)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_sizes() -> None:
    assert parse_size("4096") == parse_size("4096 B") == parse_size("4KiB") == 4096
    assert parse_size("1.5 GB") == 1_500_000_000
    assert parse_size("6GiB") == parse_size("6", bare="GiB") == 6 * 2**30
    assert parse_size("9007199254740993") == 9007199254740993
    for text in ("", "GiB", "-1", "1 XB", "1e9", "0x10", "nan", "1.2.3", "9" * 400 + ".5"):
        with pytest.raises(ArgumentError, match="is not a size"):
            parse_size(text)


def test_a_trained_models_split(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "models" / "relu-stories-15M" / "activation"
    split = export_gpu_split(folder, tmp_path / "x", neurons=2000, batch=1)
    assert sum(split.counts) == 2000
    counts = read_activations(folder)
    everything = np.sort(np.concatenate(counts))[::-1]
    assert split.total_coverage == pytest.approx(everything[:2000].sum() / everything.sum())
    in_blocks = export_gpu_split(folder, tmp_path / "y", neurons=2000)
    assert 0.5 < in_blocks.total_coverage < split.total_coverage
