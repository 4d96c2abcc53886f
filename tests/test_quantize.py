"""The quantiser: bytes against `gguf.quants`, which type each tensor gets, whole files or none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from oracle.checkpoint import write_gguf
from oracle.tiny import as_powerinfer, tiny_shape, write_tiny
from qinfer import Model
from qinfer._gguf import GGUF, Writer
from qinfer.errors import ArgumentError, FileError, FormatError, UnsupportedError
from qinfer.tools import _rewrite
from qinfer.tools._quantize_rules import TARGETS, Facts, find_target, fitting_type, wanted_type
from qinfer.tools.quantize import quantize
from tool_program import run_tool

IN_BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
HALVES = ["F16", "BF16"]
NAMES = [*TARGETS, "Q3_K", "Q4_K", "Q5_K"]
# Beyond what the types' steps give on normal weights, so that a wrong scale or order fails.
ERROR = {"Q2_K": 0.35, "Q3_K": 0.2, "Q4_0": 0.11, "Q4_K": 0.09, "Q4_1": 0.09, "Q5_0": 0.06,
         "Q5_1": 0.05, "Q5_K": 0.05, "Q6_K": 0.025, "Q8_0": 0.008, "BF16": 0.004, "F16": 0.001,
         "F32": 0.0}  # fmt: skip


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny tensor, too, is made of several pieces."""
    monkeypatch.setattr(_rewrite, "PIECE_WEIGHTS", 1000)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole blocks of every type."""
    folder = tmp_path_factory.mktemp("wide")
    return write_tiny(folder / "wide.gguf", tiny_shape("llama", "q4_k"), "f32")


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A PowerInfer llama with rows in blocks of 32 and predictors of rank 64."""
    shape = tiny_shape("llama", "q4_0")
    return as_powerinfer(write_tiny(tmp_path / "in.gguf", shape, "f16", by_neuron=True, rank=64))


def raw(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Type and bytes, a row per row, of each tensor; read by PyPI's gguf."""
    data = path.read_bytes()
    copy = path.with_name(path.name + ".as-gguf")
    copy.write_bytes(b"GGUF" + data[4:])
    reader = gguf.GGUFReader(copy)
    copy.unlink()
    return {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in reader.tensors}


def types(path: Path) -> dict[str, str]:
    """The type of each tensor."""
    return {tensor.name: tensor.type for tensor in GGUF(path).tensors}


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- bytes ----


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("source", ["F32", "F16"])
def test_blocks_of_a_trained_model_are_the_oracles(
    name: str, source: str, stories260k: Path, tmp_path: Path
) -> None:
    path = stories260k
    if source == "F16":
        path = tmp_path / "in.gguf"
        quantize(stories260k, path, "F16")
    quantize(path, tmp_path / "out.gguf", name, pure=True, threads=2)
    old, new = raw(path), raw(tmp_path / "out.gguf")
    assert list(new) == list(old)
    n_same = 0
    for tensor, (kind, data) in new.items():
        floats = old[tensor][1].astype(np.float32)
        if floats.ndim == 2 and floats.shape[1] % 32 == 0:
            assert kind == name
            expected = gguf.quantize(floats, GGMLQuantizationType[name])
            np.testing.assert_array_equal(data.view(np.uint8), expected.view(np.uint8))
            n_same += 1
        elif floats.ndim == 2:
            assert kind == "F16"
            np.testing.assert_array_equal(data, floats.astype(np.float16))
        else:
            assert kind == "F32"
            np.testing.assert_array_equal(data, floats)
    assert n_same == 31


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_the_oracles(name: str, stories260k: Path, tmp_path: Path) -> None:
    quantize(stories260k, tmp_path / "out.gguf", name)
    old, new = raw(stories260k), raw(tmp_path / "out.gguf")
    for tensor, (kind, data) in new.items():
        floats = old[tensor][1]
        assert kind == (name if floats.ndim == 2 else "F32")
        expected = gguf.quantize(floats, GGMLQuantizationType[kind])
        np.testing.assert_array_equal(data.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_every_type_gives_a_model_that_generates(name: str, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = quantize(wide, out, name.lower())
    old, new = raw(wide), raw(out)
    for change in result.changes:
        kind, data = new[change.name]
        assert kind == change.new_type
        assert data.nbytes == change.new_bytes
        floats = old[change.name][1]
        values = gguf.dequantize(data, GGMLQuantizationType[kind]).reshape(floats.shape)
        error = np.sqrt(np.mean((values - floats) ** 2) / np.mean(floats**2))
        assert error <= ERROR[kind]
    with Model(out) as model:
        assert len(model.generate([5, 6, 7], max_tokens=4, ignore_eos=True).tokens) == 4


def test_from_bf16_and_to_f32(stories260k: Path, tmp_path: Path) -> None:
    quantize(stories260k, tmp_path / "bf16.gguf", "BF16")
    quantize(tmp_path / "bf16.gguf", tmp_path / "f32.gguf", "F32")
    old, new = raw(stories260k), raw(tmp_path / "f32.gguf")
    for name, (kind, data) in new.items():
        floats = old[name][1]
        assert kind == "F32"
        if floats.ndim == 2:
            blocks = gguf.quantize(floats, GGMLQuantizationType.BF16)
            floats = gguf.dequantize(blocks, GGMLQuantizationType.BF16)
        np.testing.assert_array_equal(data, floats)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "F16"])
def test_threads_change_no_byte(name: str, wide: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 5):
        quantize(wide, tmp_path / f"{threads}.gguf", name, threads=threads)
    first = (tmp_path / "1.gguf").read_bytes()
    assert (tmp_path / "2.gguf").read_bytes() == first
    assert (tmp_path / "5.gguf").read_bytes() == first


# ---- which type ----


def expected_types(path: Path, special: dict[str, str], other: str) -> dict[str, str]:
    """`other` for all matrices but those in `special`, whose keys are names or roles."""
    found = {}
    for tensor in GGUF(path).tensors:
        role = tensor.name.removesuffix(".weight").rpartition(".")[2]
        default = other if len(tensor.shape) > 1 else "F32"
        found[tensor.name] = special.get(tensor.name, special.get(role, default))
    return found


# Three layers: no first eighth; layers 2 (the last eighth), and of the thirds also 2.
MIXES = {
    "Q4_0": ({"output": "Q6_K"}, "Q4_0"),
    "Q8_0": ({}, "Q8_0"),
    "F16": ({}, "F16"),
    "Q2_K": (
        {"output": "Q6_K", "attn_v": "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"},
        "Q2_K",
    ),
    "Q2_K_S": ({"output": "Q6_K"}, "Q2_K"),
    "Q3_K_S": ({"output": "Q6_K"}, "Q3_K"),
    "Q3_K_M": (
        {"output": "Q6_K", "attn_v": "Q5_K", "blk.2.attn_v.weight": "Q4_K", "attn_output": "Q4_K",
         "ffn_down": "Q4_K"},
        "Q3_K",
    ),
    "Q3_K_L": (
        {"output": "Q6_K", "attn_v": "Q5_K", "attn_output": "Q5_K", "ffn_down": "Q5_K"},
        "Q3_K",
    ),
    "Q4_K_S": ({"output": "Q6_K", "attn_v": "Q5_K"}, "Q4_K"),
    "Q4_K_M": (
        {"output": "Q6_K", "blk.2.attn_v.weight": "Q6_K", "blk.2.ffn_down.weight": "Q6_K"},
        "Q4_K",
    ),
    "Q5_K_S": ({"output": "Q6_K"}, "Q5_K"),
    "Q5_K_M": (
        {"output": "Q6_K", "blk.2.attn_v.weight": "Q6_K", "blk.2.ffn_down.weight": "Q6_K"},
        "Q5_K",
    ),
    "Q6_K": ({"output": "Q6_K"}, "Q6_K"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_types_of_a_mix(name: str, tmp_path: Path) -> None:
    shape = tiny_shape("llama", "q4_k", n_head_kv=4)  # two query heads share keys and values
    path = write_tiny(tmp_path / "in.gguf", shape, "f32")
    quantize(path, tmp_path / "out.gguf", name)
    assert types(tmp_path / "out.gguf") == expected_types(path, *MIXES[name])


def test_layers_that_get_more_bits() -> None:
    """Those of llama.cpp's Q4_K_M for 32 layers."""
    facts = Facts("llama", n_layer=32, n_sharing=1, tied_head=False)
    target = TARGETS["Q4_K_M"]
    for role in ("ffn_down", "ffn_down_t", "attn_v"):
        found = [
            layer
            for layer in range(32)
            if wanted_type(target, role, layer, 4096, facts, pure=False) == "Q6_K"
        ]
        assert found == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_shared_values_get_more_bits() -> None:
    target = TARGETS["Q2_K"]
    for n_sharing, expected in ((1, "Q3_K"), (3, "Q3_K"), (4, "Q4_K"), (8, "Q4_K")):
        facts = Facts("llama", 32, n_sharing, tied_head=False)
        assert wanted_type(target, "attn_v", 0, 4096, facts, pure=False) == expected


# Sixteen layers: the first sixteenth is layer 0; the eighths are two at either end, the thirds
# between are layers 4, 7, 10 and 13.
MORE_BITS = [0, 1, 4, 7, 10, 13, 14, 15]


def in_layers(layers: Iterable[int], role: str, name: str) -> dict[str, str]:
    return {f"blk.{layer}.{role}.weight": name for layer in layers}


FALCON_MIXES = {
    "Q2_K": ({"attn_qkv": "Q4_K", "ffn_down": "Q3_K"}, "Q2_K"),
    "Q3_K_M": (
        {"attn_qkv": "Q4_K"}
        | in_layers((0, 1), "attn_qkv", "Q5_K")
        | in_layers(MORE_BITS, "ffn_down", "Q4_K")
        | in_layers((0,), "ffn_down", "Q5_K"),
        "Q3_K",
    ),
    "Q3_K_L": ({"attn_qkv": "Q5_K", "attn_output": "Q4_K", "ffn_down": "Q4_K"}, "Q3_K"),
    "Q4_K_S": (in_layers(range(4), "attn_qkv", "Q5_K"), "Q4_K"),
    "Q4_K_M": (
        in_layers(MORE_BITS, "attn_qkv", "Q6_K")
        | in_layers(MORE_BITS, "ffn_down", "Q5_K")
        | in_layers((0,), "ffn_down", "Q6_K"),
        "Q4_K",
    ),
    "Q5_K_M": (
        in_layers(MORE_BITS, "attn_qkv", "Q6_K") | in_layers(MORE_BITS, "ffn_down", "Q6_K"),
        "Q5_K",
    ),
}


@pytest.mark.parametrize("name", FALCON_MIXES)
def test_types_of_a_mix_for_falcon(name: str, tmp_path: Path) -> None:
    shape = tiny_shape("falcon", "q4_k", n_head_kv=1, n_layer=16, n_ff=256)
    path = write_tiny(tmp_path / "in.gguf", shape, "f32")
    result = quantize(path, None, name, dry_run=True)
    special, rest = FALCON_MIXES[name]
    expected = expected_types(path, {"output": "Q8_0"} | special, rest)
    assert {change.name: change.new_type for change in result.changes} == expected


def test_a_tied_head_is_the_embedding_and_positions_stay(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("opt", "q4_k", n_head_kv=8), "f16")
    quantize(path, tmp_path / "out.gguf", "Q4_0")
    special = {"token_embd": "Q6_K", "position_embd": "F16"}
    assert types(tmp_path / "out.gguf") == expected_types(path, special, "Q4_0")
    quantize(path, tmp_path / "left.gguf", "Q4_0", leave_output_tensor=True)
    assert types(tmp_path / "left.gguf")["token_embd.weight"] == "F16"


def test_rows_that_are_not_whole_blocks_fall_back_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny(tmp_path / "in.gguf", tiny_shape("llama", "q4_0", n_ff=256), "f32")
    quantize(path, tmp_path / "out.gguf", "Q4_K_S")
    special = {"output": "Q8_0", "attn_v": "Q5_1", "ffn_down": "Q4_K"}
    assert types(tmp_path / "out.gguf") == expected_types(path, special, "Q5_0")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "blocks of 256 are Q5_0 instead of Q4_K, in 16 tensors: token_embd.weight" in messages[0]
    assert "blocks of 256 are Q5_1 instead of Q5_K, in 3 tensors" in messages[1]


def test_rows_that_are_no_blocks_at_all_are_halves(
    stories260k: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of 172, which is not a multiple of 32."""
    quantize(stories260k, tmp_path / "out.gguf", "Q8_0")
    assert types(tmp_path / "out.gguf") == expected_types(stories260k, {"ffn_down": "F16"}, "Q8_0")
    (record,) = caplog.records
    assert "not whole blocks of 32 are F16 instead of Q8_0, in 5 tensors" in record.getMessage()


@pytest.mark.parametrize(
    ("wanted", "n_cols", "current", "expected"),
    [
        ("Q2_K", 512, "F32", "Q2_K"),
        ("Q2_K", 96, "F32", "Q4_0"),
        ("Q3_K", 96, "F32", "Q4_0"),
        ("Q4_K", 96, "F32", "Q5_0"),
        ("Q5_K", 96, "F32", "Q5_1"),
        ("Q6_K", 96, "F32", "Q8_0"),
        ("Q6_K", 100, "F32", "F16"),
        ("Q4_0", 100, "F16", "F16"),
        ("Q4_0", 100, "BF16", "BF16"),
        ("F32", 7, "F16", "F32"),
    ],
)
def test_fitting_types(wanted: str, n_cols: int, current: str, expected: str) -> None:
    assert fitting_type(wanted, n_cols, current) == expected


def test_pure_and_types_by_name(wide: Path, tmp_path: Path) -> None:
    quantize(wide, tmp_path / "pure.gguf", "Q4_K_M", pure=True)
    assert types(tmp_path / "pure.gguf") == expected_types(wide, {}, "Q4_K")
    quantize(
        wide, tmp_path / "named.gguf", "Q4_K_S", leave_output_tensor=True,
        token_embedding_type="q8_0", tensor_types=[(r"blk\.[01]\.ffn_", "f16"), ("ffn_up", "Q5_1")],
    )  # fmt: skip
    special = {"output": "F32", "token_embd": "Q8_0", "attn_v": "Q5_K"}
    special |= {f"blk.{i}.ffn_{x}.weight": "F16" for i in (0, 1) for x in ("gate", "up", "down")}
    special |= {"blk.2.ffn_up.weight": "Q5_1"}
    assert types(tmp_path / "named.gguf") == expected_types(wide, special, "Q4_K")
    quantize(wide, tmp_path / "head.gguf", "Q4_0", output_tensor_type="F16")
    assert types(tmp_path / "head.gguf") == expected_types(wide, {"output": "F16"}, "Q4_0")


def test_tensors_of_no_known_role_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_gguf(
        tmp_path / "in.gguf",
        {"general.architecture": "mystery"},
        {
            "blk.0.ffn_up.weight": np.ones((2, 64)),
            "blk.0.ssm_conv1d.weight": np.ones((4, 64)),
            "blk.0.ssm_norm.weight": np.ones(64),
        },
    )
    quantize(path, tmp_path / "out.gguf", "Q4_0")
    assert list(types(tmp_path / "out.gguf").values()) == ["Q4_0", "F32", "F32"]
    (record,) = caplog.records
    assert "left as they are: 1 tensor: blk.0.ssm_conv1d.weight" in record.getMessage()


# ---- PowerInfer files ----


@pytest.mark.parametrize(
    ("name", "predictors", "rest"),
    [
        ("Q4_0", "Q4_0", "Q4_0"),
        ("Q5_1", "Q5_1", "Q5_1"),
        ("Q8_0", "Q8_0", "Q8_0"),
        ("BF16", "BF16", "BF16"),
        ("Q4_K_S", "Q5_0", "Q5_0"),
        ("Q6_K", "Q8_0", "Q8_0"),
    ],
)
def test_a_powerinfer_file_stays_one(
    name: str, predictors: str, rest: str, sparse: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / "out.gguf"
    quantize(sparse, out, name)
    assert out.read_bytes()[:4] == b"PWRI"
    special = {"fc1": predictors, "fc2": predictors, "output": "Q8_0"}
    if name == "BF16":
        special["output"] = "BF16"
    if name == "Q4_K_S":
        special["attn_v"] = "Q5_1"
    assert types(out) == expected_types(sparse, special, rest)
    told = [r.getMessage() for r in caplog.records if "PowerInfer itself" in r.getMessage()]
    assert len(told) == (0 if name == "Q4_0" else 1)
    with Model(out, sparsity="predict") as model:
        assert len(model.generate([5, 6, 7], max_tokens=4, ignore_eos=True).tokens) == 4
        context = model.context(n_ctx=16)
        context.feed([5, 6, 7], generated=True)
        assert all(0 < layer.n_predicted < 3 * 160 for layer in context.stats().layers)


def test_wide_predictors_are_no_k_types_unless_pure(tmp_path: Path) -> None:
    shape = tiny_shape("bamboo", "q4_k")
    path = write_tiny(tmp_path / "in.gguf", shape, "f32", by_neuron=True, rank=256)
    as_powerinfer(path)
    for name, expected in (("Q3_K_M", "Q5_0"), ("Q5_K_S", "Q5_0"), ("Q6_K", "Q8_0")):
        quantize(path, tmp_path / "out.gguf", name)
        found = types(tmp_path / "out.gguf")
        assert {found[f"blk.{i}.{x}.weight"] for i in range(3) for x in ("fc1", "fc2")} == {
            expected
        }
    quantize(path, tmp_path / "out.gguf", "Q4_K_S", pure=True)
    assert types(tmp_path / "out.gguf") == expected_types(path, {}, "Q4_K")


def test_half_floats_of_a_powerinfer_file_are_nothing_to_warn_of(
    sparse: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(sparse, tmp_path / "out.gguf", "F16")
    assert caplog.records == []


# ---- the rest of the file ----


def test_metadata_stay_but_what_names_the_type(tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    kept: list[tuple[str, Any, str]] = [
        ("general.name", b"not \xff UTF-8", "string"),
        ("a.strings", [b"", b"\xfe", b"word"], "string"),
        ("a.nothing", [], "string"),
        ("a.bools", [True, False], "bool"),
        ("a.floats", [0.1, float("inf")], "f32"),
        ("a.i8", -3, "i8"),
        ("a.u64", 2**64 - 1, "u64"),
        ("a.f64", 0.1, "f64"),
        ("a.bytes", [1, 255], "u8"),
    ]
    with Writer(path, alignment=128) as writer:
        writer.add("general.architecture", "llama")
        writer.add("general.file_type", 1, "u32")
        for key, value, kind in kept:
            writer.add(key, value, kind)
        writer.add("general.alignment", 128, "u32")
        writer.add_tensor("output_norm.weight", (5,), "F32")
        writer.write(np.arange(5, dtype=np.float32))
    quantize(path, tmp_path / "out.gguf", "q3_k_l")
    old, new = GGUF(path), GGUF(tmp_path / "out.gguf")
    assert new.keys == [*old.keys, "general.quantization_version"]
    assert new.metadata["general.file_type"] == 13
    assert new.metadata["general.quantization_version"] == 2
    assert new.info.alignment == 128
    for key, value, kind in kept:
        assert new.value_type(key) == old.value_type(key)
        if kind == "string":
            assert new.raw_strings(key) == (value if isinstance(value, list) else [value])
        else:
            assert new.metadata[key] == old.metadata[key]
    assert new.tensors[0].data.tobytes() == old.tensors[0].data.tobytes()


def test_file_types_are_llama_cpps() -> None:
    """PyPI's gguf names the numbers MOSTLY_Q4_K_M and so on."""
    for target in TARGETS.values():
        if target.name == "COPY":
            continue
        name = "ALL_F32" if target.name == "F32" else f"MOSTLY_{target.name}"
        if target.name == "Q2_K_S":
            assert target.file_type == 21
        assert gguf.LlamaFileType(target.file_type).name == name


def test_copy_changes_nothing_but_joins_parts(wide: Path, tmp_path: Path) -> None:
    first = write_split(wide, tmp_path)
    quantize(first, tmp_path / "whole.gguf", "copy")
    assert (tmp_path / "whole.gguf").read_bytes() == wide.read_bytes()


def write_split(path: Path, folder: Path) -> Path:
    """The file in three parts, as llama.cpp writes them; returns the first."""
    file = GGUF(path)
    third = -(-len(file.tensors) // 3)
    for part in range(3):
        out = folder / f"m-{part + 1:05}-of-00003.gguf"
        tensors = file.tensors[part * third : (part + 1) * third]
        with Writer(out) as writer:
            for key in file.keys if part == 0 else []:
                kind = file.value_type(key).removeprefix("array of ")
                writer.add(key, file.metadata[key], kind)
            writer.add("split.no", part, "u16")
            writer.add("split.count", 3, "u16")
            writer.add("split.tensors.count", len(file.tensors), "i32")
            for tensor in tensors:
                writer.add_tensor(tensor.name, tensor.shape, tensor.type)
            for tensor in tensors:
                writer.write(tensor.data)
    return folder / "m-00001-of-00003.gguf"


def test_parts_become_one_file(wide: Path, tmp_path: Path) -> None:
    first = write_split(wide, tmp_path)
    quantize(first, tmp_path / "joined.gguf", "Q5_K_M")
    quantize(wide, tmp_path / "plain.gguf", "Q5_K_M")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


# ---- dry runs ----


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "F16"])
def test_a_dry_run_foretells_sizes_and_writes_nothing(
    name: str, wide: Path, tmp_path: Path
) -> None:
    foretold = quantize(wide, None, name, dry_run=True)
    assert files_of(tmp_path) == []
    assert quantize(wide, tmp_path / "out.gguf", name) == foretold
    tensors = GGUF(tmp_path / "out.gguf").tensors
    assert [tensor.n_bytes for tensor in tensors] == [c.new_bytes for c in foretold.changes]
    assert foretold.new_bytes == sum(tensor.n_bytes for tensor in tensors)
    assert foretold.old_bytes == sum(tensor.n_bytes for tensor in GGUF(wide).tensors)
    n_weights = sum(tensor.n_elements for tensor in tensors)
    assert foretold.bits_per_weight == pytest.approx(8 * foretold.new_bytes / n_weights)


def test_a_dry_run_on_the_command_line(wide: Path, tmp_path: Path) -> None:
    done = run_tool("quantize", "--dry-run", wide, tmp_path / "out.gguf", "q4_0")
    assert files_of(tmp_path) == []
    foretold = quantize(wide, None, "Q4_0", dry_run=True)
    lines = done.stdout.splitlines()
    for change, line in zip(foretold.changes, lines, strict=False):
        assert line.startswith(change.name)
        assert f"{change.old_type} to {change.new_type}" in line
        assert line.endswith(f"{change.old_bytes:>12} to {change.new_bytes:>12} bytes")
    assert lines[-1] == (
        f"{tmp_path / 'out.gguf'} (not written): {foretold.old_bytes / 2**20:.1f} MiB to "
        f"{foretold.new_bytes / 2**20:.1f} MiB, {foretold.bits_per_weight:.2f} bits per weight"
    )


# ---- the command line ----


def test_arguments_by_place(wide: Path, tmp_path: Path) -> None:
    """IN [OUT] TYPE [THREADS], as llama.cpp's tool takes them."""
    source = tmp_path / "in.gguf"
    source.write_bytes(wide.read_bytes())
    done = run_tool("quantize", source, tmp_path / "a.gguf", "Q4_K_M", 2)
    assert done.stdout.startswith(f"{tmp_path / 'a.gguf'}: ")
    assert " bits per weight, in " in done.stdout
    run_tool("quantize", source, "q4_k", "-t", "1")
    run_tool("quantize", "--pure", source, tmp_path / "b.gguf", "15")
    run_tool("quantize", source, tmp_path / "c.gguf", "q4_k_m", "--pure")
    expected = (tmp_path / "a.gguf").read_bytes()
    assert (tmp_path / "ggml-model-Q4_K_M.gguf").read_bytes() == expected
    pure = (tmp_path / "b.gguf").read_bytes()
    assert pure == (tmp_path / "c.gguf").read_bytes() != expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["IN"], "name the type: one of F32, F16"),
        (["IN", "OUT"], "name the type"),
        (["IN", "OUT", "IQ4_NL"], "unknown type 'IQ4_NL': one of F32, F16"),
        (["IN", "OUT", "Q4_0", "0"], "THREADS is '0'"),
        (["IN", "OUT", "Q4_0", "2", "3"], "'2 3' comes after"),
        (["IN", "OUT", "Q4_0", "2", "-t", "2"], "given twice"),
        (["IN", "OUT", "Q4_0", "--include-weights", "x"], "--include-weights is not available"),
        (["IN", "OUT", "Q4_0", "--keep-split"], "--keep-split is not available: the output is one"),
        (["IN", "OUT", "Q4_0", "--override-kv", "a=int:1"], "--override-kv is not available"),
        (["IN", "OUT", "Q4_0", "--tensor-type", "attn_v"], "is not PATTERN=TYPE"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = run_tool("quantize", *arguments, status=2)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert files_of(tmp_path) == []


def test_an_error_is_one_line(stories260k: Path, tmp_path: Path) -> None:
    done = run_tool("quantize", tmp_path / "absent.gguf", tmp_path / "out.gguf", "Q4_0", status=1)
    assert len(done.stderr.splitlines()) == 1
    assert "absent.gguf" in done.stderr
    done = run_tool(
        "quantize", stories260k, tmp_path / "o.gguf", "Q4_0", "--output-tensor-type", "Q9", status=1
    )
    assert "output_tensor_type: 'Q9' is not one of F32" in done.stderr
    assert files_of(tmp_path) == []


def test_help_lists_every_type() -> None:
    text = run_tool("quantize", "--help").stdout
    for target in TARGETS.values():
        assert target.name in text.split()
    assert "Example: python -m qinfer.tools.quantize" in text


def test_numbers_are_types() -> None:
    for target in TARGETS.values():
        if target.file_type is not None:
            assert find_target(str(target.file_type)) is target
    for text in ("4", "99", "-1", "Q4", ""):
        assert find_target(text) is None


# ---- what is refused ----


def test_quantising_twice_is_refused_unless_asked_for(wide: Path, tmp_path: Path) -> None:
    quantize(wide, tmp_path / "q8.gguf", "Q8_0")
    for name in ("Q4_0", "F16"):
        with pytest.raises(ArgumentError, match=r"q8\.gguf: tensor 'token_embd.*Q8_0 already"):
            quantize(tmp_path / "q8.gguf", tmp_path / "out.gguf", name)
    assert files_of(tmp_path) == ["q8.gguf"]
    # The same type again is no loss.
    quantize(tmp_path / "q8.gguf", tmp_path / "again.gguf", "Q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()
    quantize(tmp_path / "q8.gguf", tmp_path / "out.gguf", "Q4_0", allow_requantize=True)
    old, new = raw(tmp_path / "q8.gguf"), raw(tmp_path / "out.gguf")
    kind, data = new["blk.1.ffn_up.weight"]
    values = gguf.dequantize(old["blk.1.ffn_up.weight"][1], GGMLQuantizationType.Q8_0)
    assert kind == "Q4_0"
    np.testing.assert_array_equal(data, gguf.quantize(values, GGMLQuantizationType.Q4_0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "F16", "BF16", "F32", "COPY"])
def test_values_that_are_not_finite_are_named(value: float, name: str, tmp_path: Path) -> None:
    values = np.zeros((20, 256))
    values[17, 3] = value
    path = write_gguf(
        tmp_path / "in.gguf",
        {"general.architecture": "llama"},
        {"output_norm.weight": np.ones(256), "blk.0.attn_q.weight": values},
    )
    says = (
        r"in\.gguf: tensor 'blk\.0\.attn_q\.weight' holds -?(nan|inf) at row 17, column 3; it must"
    )
    with pytest.raises(FormatError, match=says):
        quantize(path, tmp_path / "out.gguf", name)
    assert files_of(tmp_path) == ["in.gguf"]


def test_a_norm_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "in.gguf",
        {"general.architecture": "llama"},
        {"output_norm.weight": np.array([1.0, np.nan])},
    )
    with pytest.raises(FormatError, match=r"'output_norm\.weight' holds nan at row 0, column 1"):
        quantize(path, tmp_path / "out.gguf", "Q4_0")


@pytest.mark.parametrize(
    ("name", "value"), [("F16", 65536.0), ("Q8_0", -1e6), ("Q6_K", 1e38), ("BF16", 3.4e38)]
)
def test_values_too_large_for_a_type_are_named(name: str, value: float, tmp_path: Path) -> None:
    values = np.zeros((2, 256))
    values[1, 2] = value
    path = write_gguf(
        tmp_path / "in.gguf", {"general.architecture": "llama"}, {"token_embd.weight": values}
    )
    with pytest.raises(FormatError, match=rf"row 1, column 2; {name} can store values up"):
        quantize(path, tmp_path / "out.gguf", name, pure=True)
    quantize(path, tmp_path / "out.gguf", "F32")


def test_the_output_cannot_be_the_input(wide: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(wide.read_bytes())
    (tmp_path / "hard.gguf").hardlink_to(path)
    (tmp_path / "soft.gguf").symlink_to(path)
    for out in (path, tmp_path / "hard.gguf", tmp_path / "soft.gguf"):
        for dry_run in (False, True):
            with pytest.raises(ArgumentError, match="is the file to read from"):
                quantize(path, out, "Q4_0", dry_run=dry_run)
    first = write_split(wide, tmp_path)
    with pytest.raises(ArgumentError, match="is the file to read from"):
        quantize(first, tmp_path / "m-00003-of-00003.gguf", "Q4_0")
    assert path.read_bytes() == wide.read_bytes()


def test_an_existing_output_is_replaced_when_the_new_one_is_whole(
    wide: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(wide, out, "Q8_0", threads=2, progress=fail)
    assert files_of(tmp_path) == ["out.gguf"]
    assert out.read_bytes() == b"old"
    quantize(wide, out, "Q8_0")
    assert types(out)["output.weight"] == "Q8_0"


def test_progress_counts_the_bytes_written(wide: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = quantize(
        wide,
        tmp_path / "out.gguf",
        "Q8_0",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (result.new_bytes, result.new_bytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) > len(result.changes)


def test_a_full_disk_leaves_nothing(wide: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from qinfer.errors import FileError\n"
        "from qinfer.tools.quantize import quantize\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: quantize(sys.argv[1], sys.argv[2], 'F16')\n"
        "except FileError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, wide, tmp_path / "out.gguf"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "out.gguf" in done.stdout
    assert "File too large" in done.stdout
    assert files_of(tmp_path) == []


def test_places_and_numbers_are_checked(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="absent"):
        quantize(wide, tmp_path / "absent" / "out.gguf", "Q4_0")
    with pytest.raises(ArgumentError, match="threads=0"):
        quantize(wide, tmp_path / "out.gguf", "Q4_0", threads=0)
    with pytest.raises(ArgumentError, match="name the file"):
        quantize(wide, None, "Q4_0")
    with pytest.raises(ArgumentError, match=r"'\('.*no regular expression"):
        quantize(wide, tmp_path / "out.gguf", "Q4_0", tensor_types=[("(", "Q4_0")])
    with pytest.raises(ArgumentError, match="'Q4_K_M' is not one of F32"):
        quantize(wide, tmp_path / "out.gguf", "Q4_0", tensor_types=[("x", "Q4_K_M")])
    assert files_of(tmp_path) == []


def test_types_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    with Writer(path) as writer:
        writer.add("general.architecture", "llama")
        writer.add_tensor("token_embd.weight", (2, 32), "IQ4_NL")
        writer.add_tensor("blk.0.unknown", (3,), "I32")
        writer.write(bytes(range(36)))
        writer.write(np.arange(3, dtype=np.int32))
    with pytest.raises(UnsupportedError, match=r"'token_embd\.weight' is of type IQ4_NL"):
        quantize(path, tmp_path / "out.gguf", "Q4_0", allow_requantize=True)
    quantize(path, tmp_path / "out.gguf", "COPY")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
