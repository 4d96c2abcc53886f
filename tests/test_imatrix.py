"""Importance matrices: both formats of them, what they change in a quantised file, broken ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from oracle.tiny import tiny_shape, write_tiny
from qinfer._gguf import GGUF, Writer
from qinfer._types import encode
from qinfer.errors import FileError, FormatError
from qinfer.tools._imatrix import read_imatrix
from qinfer.tools.quantize import quantize

Entries = dict[str, tuple[int, np.ndarray[Any, Any]]]  # count, and sums of squares by column


def write_old(path: Path, entries: Entries, *, n_chunks: int | None = 7) -> Path:
    """As llama.cpp wrote it until 2025."""
    data = struct.pack("<i", len(entries))
    for name, (count, sums) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", count, len(sums)) + sums.astype("<f4").tobytes()
    if n_chunks is not None:
        data += struct.pack("<ii", n_chunks, 4) + b"text"
    path.write_bytes(data)
    return path


def write_new(path: Path, entries: Entries) -> Path:
    """As llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (count, sums) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows are whole blocks of 256."""
    folder = tmp_path_factory.mktemp("model")
    return write_tiny(folder / "m.gguf", tiny_shape("llama", "q4_k", n_layer=1), "f32")


def entries_of(path: Path) -> Entries:
    """An entry for each matrix: a few columns matter a hundred times as much as the others."""
    rng = np.random.default_rng(1)
    found = {}
    for tensor in GGUF(path).tensors:
        if len(tensor.shape) == 2:
            sums = rng.uniform(0.5, 1.5, tensor.shape[1])
            sums[rng.integers(0, tensor.shape[1], 20)] *= 100
            found[tensor.name] = (4, sums)
    return found


@pytest.mark.parametrize("write", [write_old, write_new])
def test_both_formats_give_means(write: Any, tmp_path: Path) -> None:
    entries = {"a.weight": (4, np.array([4.0, 8.0, 0.0])), "b.weight": (0, np.array([5.0, 6.0]))}
    found = read_imatrix(write(tmp_path / "x", entries))
    assert list(found.columns) == ["a.weight", "b.weight"]
    np.testing.assert_array_equal(found.columns["a.weight"], np.float32([1, 2, 0]))
    np.testing.assert_array_equal(found.columns["b.weight"], np.float32([1, 1]))
    assert found.n_chunks == 7


def test_the_old_format_may_end_with_its_entries(tmp_path: Path) -> None:
    path = write_old(tmp_path / "x", {"a": (1, np.ones(2))}, n_chunks=None)
    assert read_imatrix(path).n_chunks is None


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_M", "Q4_K_S", "Q5_K_M", "Q6_K"])
def test_columns_that_matter_err_less(name: str, model: Path, tmp_path: Path) -> None:
    entries = entries_of(model)
    old = write_old(tmp_path / "old.dat", entries)
    new = write_new(tmp_path / "new.gguf", entries)
    quantize(model, tmp_path / "plain.gguf", name)
    quantize(model, tmp_path / "steered.gguf", name, imatrix=old)
    quantize(model, tmp_path / "again.gguf", name, imatrix=new)
    plain, steered, again = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{x}.gguf").tensors}
        for x in ("plain", "steered", "again")
    )
    n_steered = 0
    for tensor in GGUF(model).tensors:
        kind = steered[tensor.name].tensor_type
        np.testing.assert_array_equal(again[tensor.name].data, steered[tensor.name].data)
        if not kind.name.endswith("_K"):
            np.testing.assert_array_equal(plain[tensor.name].data, steered[tensor.name].data)
            continue
        values = tensor.data.view(np.float32).reshape(tensor.shape)
        weights = (entries[tensor.name][1] / 4).astype(np.float32)
        expected = encode(values, kind.name, importance=weights)
        np.testing.assert_array_equal(steered[tensor.name].data, expected)
        without, with_it = (
            np.sum(weights * (gguf.dequantize(x[tensor.name].data, kind) - values) ** 2)
            for x in (plain, steered)
        )
        assert with_it < without
        n_steered += 1
    assert n_steered == 9


def test_what_is_recorded(model: Path, tmp_path: Path) -> None:
    path = write_old(tmp_path / "x.dat", entries_of(model))
    quantize(model, tmp_path / "out.gguf", "Q4_K_M", imatrix=path)
    metadata = GGUF(tmp_path / "out.gguf").metadata
    assert metadata["quantize.imatrix.file"] == str(path)
    assert metadata["quantize.imatrix.entries_count"] == 9
    assert metadata["quantize.imatrix.chunks_count"] == 7


def test_what_it_does_not_steer_is_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = entries_of(model)
    del entries["blk.0.attn_q.weight"]
    path = write_old(tmp_path / "x.dat", entries)
    quantize(model, tmp_path / "out.gguf", "Q4_K_S", pure=True, imatrix=path)
    quantize(model, tmp_path / "out.gguf", "Q4_0", pure=True, imatrix=path)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("x.dat: has no entry for 1 tensor: blk.0.attn_q.weight")
    assert second.endswith("x.dat: no tensor is of a K type, and it steers only those")


def test_experts_are_left_out(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("experts.in_sum2", np.ones((2, 4), np.float32))
    writer.add_tensor("experts.counts", np.ones((2, 1), np.float32))
    writer.add_tensor("one.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("one.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert list(read_imatrix(tmp_path / "x.gguf").columns) == ["one"]


# ---- broken ones ----


def test_another_models_matrix_is_refused(model: Path, tmp_path: Path) -> None:
    path = write_old(tmp_path / "x.dat", {"blk.0.attn_q.weight": (1, np.ones(255))})
    with pytest.raises(FormatError, match=r"x\.dat: 'blk\.0\.attn_q\.weight' has 255 columns"):
        quantize(model, tmp_path / "out.gguf", "Q4_K_S", imatrix=path)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("write", [write_old, write_new])
def test_importance_is_finite_and_not_negative(value: float, write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": (2, np.array([1.0, value]))})
    with pytest.raises(FormatError, match="importance of column 1 of 'a' is"):
        read_imatrix(path)


def test_every_beginning_of_the_old_format_is_refused(tmp_path: Path) -> None:
    path = write_old(tmp_path / "x", {"abc": (2, np.ones(3)), "de": (1, np.ones(2))})
    data = path.read_bytes()
    whole_entries = len(data) - 12
    for n in range(len(data) - 8):
        path.write_bytes(data[:n])
        if n == whole_entries:
            assert read_imatrix(path).n_chunks is None
            continue
        with pytest.raises(FormatError, match="is no importance matrix"):
            read_imatrix(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (struct.pack("<i", 0), "number of entries is 0"),
        (struct.pack("<i", -3), "number of entries is -3"),
        (struct.pack("<ii", 1, -1), "length of name 0 is -1"),
        (struct.pack("<ii", 1, 2**31 - 1) + b"abc", "within name 0"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 0), "number of values of 'a' is 0"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1), "within the values of 'a'"),
        (struct.pack("<ii1siif", 1, 1, b"a", -1, 1, 1.0), "the count of 'a' is -1"),
    ],
)
def test_numbers_of_the_old_format_are_checked(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FormatError, match=says):
        read_imatrix(tmp_path / "x")


def test_gguf_files_that_are_no_matrices(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"general\.type is None, not 'imatrix'"):
        read_imatrix(model)
    for name, counts, says in (
        ("a.in_sum2", None, r"tensor 'a\.counts' is missing"),
        ("a.in_sum2", "F16", r"tensor 'a\.counts' is F16, not F32"),
        ("a", None, "has no entries"),
    ):
        with Writer(tmp_path / "x.gguf") as writer:
            writer.add("general.type", "imatrix")
            writer.add_tensor(name, (1, 2), "F32")
            if counts:
                writer.add_tensor("a.counts", (1, 1), counts)
            writer.write(np.ones(2, np.float32))
            if counts:
                writer.write(np.ones(1, np.float16))
        with pytest.raises(FormatError, match=says):
            read_imatrix(tmp_path / "x.gguf")
    with pytest.raises(FileError, match="absent"):
        read_imatrix(tmp_path / "absent")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_32_are_not_steered(name: str) -> None:
    """What the warning says."""
    values = np.random.default_rng(2).standard_normal((2, 256)).astype(np.float32)
    steered = encode(values, name, importance=np.arange(256))
    np.testing.assert_array_equal(steered, encode(values, name))
