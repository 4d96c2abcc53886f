"""Neuron-major twins: the weights moved, everything else kept, and the same model computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from oracle.checkpoint import write_gguf
from oracle.tiny import as_powerinfer, tiny_shape, write_tiny
from qinfer import Model
from qinfer._gguf import GGUF
from qinfer.errors import ArgumentError, FileError, FormatError, UnsupportedError
from qinfer.tools import _rewrite
from qinfer.tools.neuron_major import neuron_major
from qinfer.tools.quantize import quantize
from tool_program import run_tool

FLOATS = ["f32", "f16", "bf16"]
RELU = {"qinfer.hidden_act": "relu"}
TOKENS = [5, 60, 7, 200, 31, 8, 8, 100]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny tensor, too, is made of several pieces."""
    monkeypatch.setattr(_rewrite, "PIECE_WEIGHTS", 5000)


def decoded(path: Path, name: str) -> np.ndarray[Any, Any]:
    """A tensor's values by PyPI's gguf."""
    (tensor,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name]
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def logits(path: Path, sparsity: str = "off") -> np.ndarray[Any, Any]:
    """Of tokens fed one at a time."""
    with Model(path, sparsity=sparsity) as model, model.context(n_ctx=16) as context:
        rows = []
        for token in TOKENS:
            context.feed([token], generated=True)
            rows.append(context.logits.copy())
    return np.array(rows)


def assert_rest_is_kept(old_path: Path, new_path: Path) -> None:
    """Magic, metadata and all tensors but down are as they were, in the same order."""
    old, new = GGUF(old_path), GGUF(new_path)
    assert new.info.is_powerinfer == old.info.is_powerinfer
    added = [] if "qinfer.hidden_act" in old.metadata else ["qinfer.hidden_act"]
    assert new.keys == [*old.keys, *added]
    assert all(new.metadata[key] == old.metadata[key] for key in old.keys)
    for a, b in zip(old.tensors, new.tensors, strict=True):
        if "ffn_down" in a.name:
            assert b.name == a.name.replace("ffn_down", "ffn_down_t")
            assert b.shape == a.shape[::-1]
        else:
            assert (b.name, b.shape, b.type) == (a.name, a.shape, a.type)
        if "ffn_down.weight" not in a.name:
            assert b.data.tobytes() == a.data.tobytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", FLOATS)
def test_floats_move_exactly(kind: str, threads: int, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama"), kind, extra=RELU)
    out = tmp_path / "out.gguf"
    twin = neuron_major(path, out, threads=threads)
    assert twin.old_types == twin.new_types == [kind.upper()] * 3
    assert twin.old_down_bytes == twin.new_down_bytes
    assert twin.old_bytes == twin.new_bytes
    assert_rest_is_kept(path, out)
    item = np.uint32 if kind == "f32" else np.uint16
    old, new = GGUF(path), GGUF(out)
    for a, b in zip(old.tensors, new.tensors, strict=True):
        if "ffn_down." in a.name:
            before = a.data.view(item).reshape(a.shape)
            np.testing.assert_array_equal(b.data.view(item).reshape(b.shape), before.T)


@pytest.mark.parametrize("arch", ["llama", "bamboo", "falcon", "opt", "qwen2"])
def test_the_twin_is_the_same_model(arch: str, tmp_path: Path) -> None:
    """Biases included; and with neurons left out, bit for bit that with all of them."""
    act = "relu_relu" if arch == "bamboo" else "relu"
    shape = tiny_shape(arch, n_head_kv=6 if arch == "opt" else 2)
    path = write_tiny(tmp_path / "in.gguf", shape, "f32", extra={"qinfer.hidden_act": act})
    out = tmp_path / "out.gguf"
    neuron_major(path, out)
    assert_rest_is_kept(path, out)
    expected, found = logits(path), logits(out)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(logits(out, "exact"), found)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
@pytest.mark.parametrize("down", [None, "same", "q5_1", "F16"])
def test_blocks_are_the_oracles(kind: str, down: str | None, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama", kind), kind, extra=RELU)
    out = tmp_path / "out.gguf"
    expected_type = {None: "Q8_0", "same": kind.upper()}.get(down) or str(down).upper()
    twin = neuron_major(path, out, down=down)
    assert twin.new_types == [expected_type] * 3
    assert_rest_is_kept(path, out)
    for layer in range(3):
        values = decoded(path, f"blk.{layer}.ffn_down.weight")
        (tensor,) = [t for t in GGUF(out).tensors if t.name == f"blk.{layer}.ffn_down_t.weight"]
        assert tensor.type == expected_type
        blocks = gguf.quantize(np.ascontiguousarray(values.T), GGMLQuantizationType[expected_type])
        assert tensor.data.tobytes() == blocks.tobytes()


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_k_types_move_within_their_error(kind: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama", kind), kind, extra=RELU)
    largest = {"q2_k": 0.35, "q3_k": 0.2, "q4_k": 0.09, "q5_k": 0.05, "q6_k": 0.025}
    for down, limit in ((None, 0.008), ("same", largest[kind])):
        out = tmp_path / "out.gguf"
        neuron_major(path, out, down=down)
        old = decoded(path, "blk.1.ffn_down.weight")
        new = decoded(out, "blk.1.ffn_down_t.weight")
        error = np.sqrt(np.mean((new - old.T) ** 2) / np.mean(old**2))
        assert 0 < error < limit
        exact, everything = logits(out, "exact"), logits(out)
        np.testing.assert_array_equal(exact, everything)


def test_rows_that_do_not_fit_a_type_get_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """n_embd is 96 and n_ff 256, so that only `ffn_down` can be a K type."""
    source = write_tiny(
        tmp_path / "f32.gguf", tiny_shape("llama", "q4_0", n_ff=256), "f32", extra=RELU
    )
    path = tmp_path / "in.gguf"
    quantize(source, path, "Q4_K_M", pure=True)
    caplog.clear()
    twin = neuron_major(path, tmp_path / "out.gguf", down="same")
    assert twin.old_types == ["Q4_K"] * 3
    assert twin.new_types == ["Q5_0"] * 3
    (record,) = caplog.records
    assert "rows of 96 are not whole blocks of Q4_K; ffn_down_t is Q5_0" in record.getMessage()
    # Without a wish the default fits, and there is nothing to say.
    caplog.clear()
    assert neuron_major(path, tmp_path / "out.gguf").new_types == ["Q8_0"] * 3
    assert caplog.records == []


def test_rows_that_are_no_blocks_become_halves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """n_embd is 60; down is quantised along 64 neurons."""
    source = write_tiny(tmp_path / "f32.gguf", tiny_shape("llama", n_ff=64), "f32", extra=RELU)
    path = tmp_path / "in.gguf"
    quantize(source, path, "Q4_0")
    caplog.clear()
    assert neuron_major(path, tmp_path / "out.gguf").new_types == ["F16"] * 3
    (record,) = caplog.records
    assert "rows of 60 are not whole blocks of Q8_0; ffn_down_t is F16" in record.getMessage()


def test_silu_stays_silu_and_it_is_said(
    stories260k: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.gguf"
    neuron_major(stories260k, out)
    (record,) = caplog.records
    assert "activation is silu, which leaves no neuron at zero" in record.getMessage()
    assert GGUF(out).metadata["qinfer.hidden_act"] == "silu"
    assert not GGUF(out).info.is_powerinfer
    with Model(stories260k) as model, Model(out) as twin:
        text = model.generate("Once", max_tokens=40, temperature=0).text
        assert twin.generate("Once", max_tokens=40, temperature=0).text == text


def test_the_activation_is_that_of_the_source(tmp_path: Path) -> None:
    """What an architecture implies is written down, and a key keeps its spelling."""
    shape = tiny_shape("opt", n_head_kv=6)
    path = write_tiny(tmp_path / "p.gguf", shape, "f16", rank=21)
    out = tmp_path / "out.gguf"
    neuron_major(path, out)
    assert GGUF(out).metadata["qinfer.hidden_act"] == "relu"
    assert not GGUF(out).info.is_powerinfer
    with Model(out) as model:
        assert model.info.hidden_act == "relu"
        assert model.info.predictor_rank == 21
    path = write_tiny(
        tmp_path / "f.gguf", tiny_shape("llama"), extra={"qinfer.hidden_act": "fatrelu:0.0100"}
    )
    neuron_major(path, out)
    assert GGUF(out).metadata["qinfer.hidden_act"] == "fatrelu:0.0100"


def test_what_is_ordinary_and_says_it_is_powerinfers_is_refused(tmp_path: Path) -> None:
    path = as_powerinfer(write_tiny(tmp_path / "p.gguf", tiny_shape("llama"), "f16", rank=21))
    with pytest.raises(FormatError, match=r"p\.gguf: .*blk\.0\.ffn_down\.weight.* PWRI"):
        neuron_major(path, tmp_path / "out.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["p.gguf"]


def test_quantising_the_twin_of_floats_loses_once(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "f32.gguf", tiny_shape("llama", "q4_0"), "f32", extra=RELU)
    neuron_major(source, tmp_path / "twin.gguf")
    quantize(tmp_path / "twin.gguf", tmp_path / "out.gguf", "Q4_0")
    values = decoded(source, "blk.0.ffn_down.weight").T
    found = decoded(tmp_path / "out.gguf", "blk.0.ffn_down_t.weight")
    blocks = gguf.quantize(np.ascontiguousarray(values), GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(found, gguf.dequantize(blocks, GGMLQuantizationType.Q4_0))


# ---- the command line ----


def test_the_command_line(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama", "q4_0"), "q4_0", extra=RELU)
    done = run_tool("neuron_major", path, tmp_path / "a.gguf", "-t", 2)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path / 'a.gguf'}: 3 layers, down Q4_0 of 0.0 MiB to Q8_0")
    neuron_major(path, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    run_tool("neuron_major", path, tmp_path / "c.gguf", "--down", "Same")
    neuron_major(path, tmp_path / "d.gguf", down="same")
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes()


def test_errors_are_one_line(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama"), extra=RELU)
    run_tool("neuron_major", path, tmp_path / "out.gguf")
    done = run_tool("neuron_major", tmp_path / "out.gguf", tmp_path / "again.gguf", status=1)
    assert done.stderr.endswith("out.gguf is neuron-major already: it has ffn_down_t tensors\n")
    done = run_tool("neuron_major", path, tmp_path / "again.gguf", "--down", "IQ4_NL", status=1)
    assert "down: 'IQ4_NL' is not one of F32" in done.stderr
    assert "OUT" in run_tool("neuron_major", path, status=2).stderr
    assert not (tmp_path / "again.gguf").exists()
    assert "Example: python -m" in run_tool("neuron_major", "--help").stdout


# ---- what is refused ----


def test_what_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama"), extra=RELU)
    with pytest.raises(ArgumentError, match="is the file to read from"):
        neuron_major(path, path)
    with pytest.raises(ArgumentError, match="threads=0"):
        neuron_major(path, tmp_path / "out.gguf", threads=0)
    with pytest.raises(FileError, match="absent"):
        neuron_major(path, tmp_path / "absent" / "out.gguf")
    mystery = write_gguf(
        tmp_path / "m.gguf", {"general.architecture": "mystery"}, {"x": np.ones(3)}
    )
    with pytest.raises(UnsupportedError, match="mystery"):
        neuron_major(mystery, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_cannot_be_stored_are_named(value: float, tmp_path: Path) -> None:
    down = np.ones((96, 160))
    down[2, 150] = value
    shape = make_model.Shape("llama", 96, 160, 1, 6, 2, 301, 64, tied_head=False)
    path = write_tiny(tmp_path / "in.gguf", shape, "f32", extra=RELU)
    replace_tensor(path, "blk.0.ffn_down.weight", down)
    says = r"in\.gguf: tensor 'blk\.0\.ffn_down\.weight' holds \S+ at row 2, column 150"
    with pytest.raises(FormatError, match=says):
        neuron_major(path, tmp_path / "out.gguf", down="Q8_0")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "shape", "at"),
    [
        ("blk.0.ffn_up.weight", (160, 96), (7, 95)),
        ("blk.0.attn_norm.weight", (96,), (3,)),
        ("token_embd.weight", (301, 96), (300, 0)),
    ],
)
def test_other_tensors_are_looked_at_too(
    name: str, shape: tuple[int, ...], at: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.ones(shape)
    values[at] = np.nan
    model = make_model.Shape("llama", 96, 160, 1, 6, 2, 301, 64, tied_head=False)
    path = write_tiny(tmp_path / "in.gguf", model, "f32", extra=RELU)
    replace_tensor(path, name, values)
    says = rf"in\.gguf: tensor '{name}' holds nan at row {(0, *at)[-2]}, column {at[-1]};"
    with pytest.raises(FormatError, match=says):
        neuron_major(path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def replace_tensor(path: Path, name: str, values: np.ndarray[Any, Any]) -> None:
    """Overwrites the floats of a tensor in its file."""
    (tensor,) = [tensor for tensor in GGUF(path).tensors if tensor.name == name]
    with path.open("r+b") as file:
        file.seek(tensor.file_offset)
        file.write(values.astype(np.float32).tobytes())


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama"), extra=RELU)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neuron_major(path, tmp_path / "out.gguf", progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["in.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama"), extra=RELU)
    code = (
        "import resource, sys\n"
        "from qinfer.errors import FileError\n"
        "from qinfer.tools.neuron_major import neuron_major\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
        "try: neuron_major(sys.argv[1], sys.argv[2])\n"
        "except FileError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, path, tmp_path / "out.gguf"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "File too large" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["in.gguf"]
