"""Writing GGUF files: the oracle's bytes, whole files or none, and what is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import gguf_corpus as corpus
from qinfer import _native
from qinfer._gguf import GGUF, Writer
from qinfer.errors import ArgumentError, FileError


def numbers(n: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(n).standard_normal(n).astype(np.float32)


def write_small(path: Path, **options: object) -> None:
    with Writer(path, **options) as writer:  # type: ignore[arg-type]
        writer.add("general.architecture", "none")
        writer.add_tensor("t", (2, 3), "F32")
        writer.write(np.arange(6, dtype=np.float32))


# ---- what is written ----


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_the_bytes_are_the_oracles(alignment: int, tmp_path: Path) -> None:
    wide, block, odd = numbers(96).reshape(3, 32), numbers(64).reshape(2, 32), numbers(5)
    q8 = gguf.quantize(block, GGMLQuantizationType.Q8_0)
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    if alignment != 32:
        theirs.add_custom_alignment(alignment)
    theirs.add_uint32("a.u32", 7)
    theirs.add_float32("a.f32", 0.1)
    theirs.add_bool("a.bool", True)
    theirs.add_string("a.string", "größer")
    theirs.add_array("a.words", ["", "the", "ä"])
    theirs.add_array("a.numbers", [1, -2, 3])
    theirs.add_uint64("a.u64", 2**64 - 1)
    theirs.add_int8("a.i8", -3)
    theirs.add_tensor("wide", wide)
    theirs.add_tensor("blocks", q8, raw_dtype=GGMLQuantizationType.Q8_0)
    theirs.add_tensor("odd", odd)
    theirs.add_tensor("integers", np.arange(3, dtype=np.int32))
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()

    with Writer(tmp_path / "ours.gguf", alignment=alignment) as ours:
        ours.add("general.architecture", "llama")
        if alignment != 32:
            ours.add("general.alignment", alignment, "u32")
        ours.add("a.u32", 7, "u32")
        ours.add("a.f32", 0.1)
        ours.add("a.bool", True)
        ours.add("a.string", "größer")
        ours.add("a.words", ["", "the", "ä"])
        ours.add("a.numbers", [1, -2, 3], "i32")
        ours.add("a.u64", 2**64 - 1, "u64")
        ours.add("a.i8", -3, "i8")
        ours.add_tensor("wide", (3, 32), "F32")
        ours.add_tensor("blocks", (2, 32), "Q8_0")
        ours.add_tensor("odd", (5,), "F32")
        ours.add_tensor("integers", (3,), "I32")
        for data in (wide, q8, odd, np.arange(3, dtype=np.int32)):
            ours.write(data)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_pieces_of_any_size(tmp_path: Path) -> None:
    data = numbers(1_000_003).tobytes()
    for n_piece in (1 << 30, (1 << 20) + 1, 65_537):
        with Writer(tmp_path / "x.gguf") as writer:
            writer.add_tensor("before", (1,), "F32")
            writer.add_tensor("t", (1_000_003,), "F32")
            writer.write(b"1234")
            for begin in range(0, len(data), n_piece):
                writer.write(data[begin : begin + n_piece])
        assert GGUF(tmp_path / "x.gguf").tensors[1].data.tobytes() == data


def test_an_alignment_of_its_own_is_said_in_the_file(tmp_path: Path) -> None:
    write_small(tmp_path / "x.gguf", alignment=256)
    file = GGUF(tmp_path / "x.gguf")
    assert file.info.alignment == 256
    assert file.metadata["general.alignment"] == 256
    assert file.tensors[0].file_offset % 256 == 0
    with Writer(tmp_path / "y.gguf", alignment=64) as writer:
        for value, kind in [(32, "u32"), (64, "u64"), ("64", "string"), (["64"], "string")]:
            with pytest.raises(ArgumentError, match=r"general\.alignment.*u32 of 64"):
                writer.add("general.alignment", value, kind)


def test_powerinfer_files_have_its_magic_and_its_type_numbers(tmp_path: Path) -> None:
    theirs = corpus.gpu_index()
    with Writer(tmp_path / "x.gpuidx", powerinfer=True) as writer:
        writer.add("general.architecture", "generic.gpu_index")
        writer.add("generic.gpu_index.block_count", 1, "u32")
        writer.add("split.vram_capacity", 1 << 30, "u64")
        writer.add_tensor("blk.0.gpu_idx", (8,), "I32")
        writer.add_tensor("blk.0.gpu_bucket", (4,), "I32")
        writer.write(np.array([1, 0] * 4, np.int32))
        writer.write(np.array([0, 2, 4, 6], np.int32))
    assert (tmp_path / "x.gpuidx").read_bytes() == theirs.bytes + bytes(16)
    with Writer(tmp_path / "y", powerinfer=True) as writer, pytest.raises(ArgumentError) as caught:
        writer.add_tensor("t", (256,), "IQ2_XXS")
    assert "'t': type 16 (IQ2_XXS)" in str(caught.value)


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    Writer(tmp_path / "x.gguf").finish()
    assert (tmp_path / "x.gguf").read_bytes() == corpus.Layout().bytes


def test_strings_of_any_bytes_and_empty_arrays(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.gguf") as writer:
        writer.add("bytes", b"\xff\x00")
        writer.add("list", [b"\xfe", ""])
        writer.add("no strings", [], "string")
        writer.add("no numbers", [], "u32")
    file = GGUF(tmp_path / "x.gguf")
    assert file.raw_strings("bytes") == [b"\xff\x00"]
    assert file.raw_strings("list") == [b"\xfe", b""]
    assert file.metadata["no strings"] == []
    assert file.metadata["no numbers"] == []


# ---- whole files or none ----


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there")
    writer = Writer(path)
    writer.add_tensor("t", (1,), "F32")
    writer.write(b"1234")
    assert path.read_bytes() == b"what was there"
    writer.finish()
    assert [t.name for t in GGUF(path).tensors] == ["t"]
    assert list(tmp_path.iterdir()) == [path]


def test_giving_up_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there")
    with pytest.raises(ZeroDivisionError), Writer(path) as writer:
        writer.add_tensor("t", (1000,), "F32")
        writer.write(bytes(3000))
        _ = 1 // 0
    writer = Writer(path)
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"what was there"


def test_two_writers_of_one_path(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    first, second = Writer(path), Writer(path)
    second.add("who", "second")
    first.add("who", "first")
    second.finish()
    first.finish()
    assert GGUF(path).metadata["who"] == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_small(tmp_path / "x.gguf")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.gguf").stat().st_mode) == 0o640


def run_limited(code: str, path: Path) -> str:
    """Runs code in a process that may not write files over a megabyte; returns what it prints."""
    begin = (
        "import resource, sys\n"
        "from qinfer._gguf import Writer\n"
        "from qinfer.errors import FileError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "writer = Writer(sys.argv[1])\n"
        "try:\n"
    )
    body = "".join(f"    {line}\n" for line in code.splitlines())
    end = "except FileError as error:\n    print(error)\n    writer.close()\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + body + end, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_no_room_for_the_data_shows_before_it_is_written(tmp_path: Path) -> None:
    code = "writer.add_tensor('t', (1 << 20,), 'F32')\nwriter.write(b'1234')"
    said = run_limited(code, tmp_path / "x.gguf")
    assert "x.gguf" in said
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_metadata(tmp_path: Path) -> None:
    said = run_limited("writer.add('k', 'x' * 2_000_000)\nwriter.finish()", tmp_path / "x.gguf")
    assert "x.gguf" in said
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_after_a_failure_nothing_more_is_written(tmp_path: Path) -> None:
    code = (
        "writer.add('k', 'x' * 2_000_000)\n"
        "try: writer.finish()\n"
        "except FileError: pass\n"
        "writer.finish()"
    )
    assert "failed before" in run_limited(code, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent/x\.gguf.*No such file"):
        Writer(tmp_path / "absent" / "x.gguf")
    with pytest.raises(FileError, match="not a regular file"):
        Writer(tmp_path)
    with pytest.raises(FileError, match="not a regular file"):
        Writer("/dev/null")


# ---- what is refused ----


@pytest.mark.parametrize("alignment", [1, 4, 33, 2**31])
def test_alignments_are_checked(alignment: int, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=str(alignment)):
        Writer(tmp_path / "x.gguf", alignment=alignment)
    assert list(tmp_path.iterdir()) == []


def test_names_are_checked_and_the_writer_goes_on(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.gguf") as writer:
        writer.add("k", 1)
        with pytest.raises(ArgumentError, match=r"key 'k': was added before"):
            writer.add("k", "again")
        with pytest.raises(ArgumentError, match="empty name"):
            writer.add("", 1)
        with pytest.raises(ArgumentError, match="65536 bytes"):
            writer.add("k" * 65536, 1)
        writer.add_tensor("t", (1,), "F32")
        with pytest.raises(ArgumentError, match=r"tensor 't': was added before"):
            writer.add_tensor("t", (1,), "F32")
        with pytest.raises(ArgumentError, match=r"64 bytes.*63"):
            writer.add_tensor("t" * 64, (1,), "F32")
        with pytest.raises(ArgumentError, match="empty name"):
            writer.add_tensor("", (1,), "F32")
        writer.write(b"1234")
    file = GGUF(tmp_path / "x.gguf")
    assert dict(file.metadata) == {"k": 1}
    assert [t.name for t in file.tensors] == ["t"]


def test_shapes_are_checked(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.gguf") as writer:
        for shape, kind, says in [
            ((), "F32", "0 dimensions"),
            ((1, 1, 1, 1, 1), "F32", "5 dimensions"),
            ((0,), "F32", "is 0"),
            ((2, 33), "Q4_0", r"33.*Q4_0.*32"),
            ((2**32, 2**32), "F32", "counted"),
            ((2**62,), "F32", "counted"),
        ]:
            with pytest.raises(ArgumentError, match=f"'odd'.*{says}"):
                writer.add_tensor("odd", shape, kind)
        writer.add_tensor("half of all", (2**60 + 2**59,), "F32")
        with pytest.raises(ArgumentError, match=r"'other half'.*larger than any file"):
            writer.add_tensor("other half", (2**60,), "F32")
        writer.close()


def test_calls_out_of_order_are_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.gguf") as writer:
        writer.add_tensor("t", (2,), "F32")
        with pytest.raises(ArgumentError, match=r"key 'late': comes too late"):
            writer.add("late", 1)
        writer.write(b"1234")
        with pytest.raises(ArgumentError, match=r"tensor 'late': comes too late"):
            writer.add_tensor("late", (1,), "F32")
        writer.write(b"5678")


def test_too_much_and_too_little_data(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.gguf") as writer:
        writer.add_tensor("first", (2,), "F32")
        writer.add_tensor("second", (1,), "F32")
        writer.write(b"1234")
        with pytest.raises(ArgumentError, match=r"'first'.*8 bytes; 5 more.*first 4"):
            writer.write(b"56789")
        writer.write(b"5678")
        with pytest.raises(ArgumentError, match=r"'second'.*4 bytes.*only 0"):
            writer.finish()
        writer.write(b"9")
        with pytest.raises(ArgumentError, match=r"'second'.*4 bytes.*only 1"):
            writer.finish()
        writer.write(b"abc")
        with pytest.raises(ArgumentError, match="after that of the last tensor"):
            writer.write(b"d")
        writer.write(b"")
    assert [t.data.tobytes() for t in GGUF(tmp_path / "x.gguf").tensors] == [b"12345678", b"9abc"]


def call(function: str, *arguments: object) -> None:
    error = _native.new_error()
    _native.check(getattr(_native.lib, function)(*arguments, error), error)


def assert_refused(function: str, cases: list[tuple[tuple[object, ...], str]]) -> None:
    """Each case is the arguments of a call, and what the message must contain."""
    for arguments, says in cases:
        with pytest.raises(ArgumentError, match=says):
            call(function, *arguments)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    ffi, lib = _native.ffi, _native.lib
    null = ffi.NULL
    out = ffi.new("qi_gguf_writer **")
    path = os.fsencode(tmp_path / "x.gguf")
    with pytest.raises(ArgumentError, match="'path' is NULL"):
        call("qi_gguf_writer_create", null, 4, 0, 32, out)
    with pytest.raises(ArgumentError, match="'out' is NULL"):
        call("qi_gguf_writer_create", path, len(path), 0, 32, null)
    call("qi_gguf_writer_create", path, len(path), 0, 32, out)
    writer = ffi.gc(out[0], lib.qi_gguf_writer_close)
    data, offsets = ffi.new("char[8]"), ffi.new("uint64_t[3]", [0, 4, 2])
    dims = ffi.new("uint64_t[1]", [1])
    u8, boolean, text, array = corpus.U8, corpus.BOOL, corpus.STRING, corpus.ARRAY
    assert_refused(
        "qi_gguf_writer_add_kv",
        [
            ((null, b"k", 1, u8, u8, 1, data, 1), "'writer' is NULL"),
            ((writer, null, 1, u8, u8, 1, data, 1), "'key' is NULL"),
            ((writer, b"k", 1, u8, u8, 1, null, 1), "'data' is NULL"),
            ((writer, b"k", 1, 13, u8, 1, data, 1), "type 13"),
            ((writer, b"k", 1, array, -1, 1, data, 1), "item type -1"),
            ((writer, b"k", 1, text, text, 1, data, 1), "type string"),
            ((writer, b"k", 1, array, array, 1, data, 1), "type array"),
            ((writer, b"k", 1, array, text, 1, data, 1), "type string"),
            ((writer, b"k", 1, u8, boolean, 1, data, 1), "one item"),
            ((writer, b"k", 1, u8, u8, 2, data, 2), "one item"),
            ((writer, b"k", 1, array, corpus.U32, 2, data, 7), "7 bytes"),
            ((writer, b"k", 1, array, corpus.U32, 2**62, data, 8), "8 bytes"),
            ((writer, b"k", 1, boolean, boolean, 1, b"\2", 1), "2 as a bool"),
            ((writer, b"\xff", 1, u8, u8, 1, data, 1), "UTF-8"),
        ],
    )
    assert_refused(
        "qi_gguf_writer_add_strings",
        [
            ((null, b"k", 1, 1, data, offsets, 2), "'writer' is NULL"),
            ((writer, b"k", 1, 1, null, offsets, 2), "'bytes' is NULL"),
            ((writer, b"k", 1, 1, data, null, 2), "'offsets' is NULL"),
            ((writer, b"k", 1, 1, data, offsets, 2), "string 1 ends before"),
            ((writer, b"k", 1, 0, data, offsets, 2), "one item"),
            ((writer, b"k", 1, 0, data, offsets + 1, 1), "one item"),
        ],
    )
    assert_refused(
        "qi_gguf_writer_add_tensor",
        [
            ((null, b"t", 1, 0, 1, dims), "'writer' is NULL"),
            ((writer, null, 1, 0, 1, dims), "'name' is NULL"),
            ((writer, b"t", 1, 0, 1, null), "'dims' is NULL"),
            ((writer, b"t", 1, 99, 1, dims), "type 99"),
            ((writer, b"t", 1, -1, 1, dims), "type -1"),
        ],
    )
    assert_refused("qi_gguf_writer_write", [((writer, null, 1), "'data' is NULL")])
    assert_refused("qi_gguf_writer_write", [((null, data, 1), "'writer' is NULL")])
    assert_refused("qi_gguf_writer_finish", [((null,), "'writer' is NULL")])
    lib.qi_gguf_writer_close(null)
    call("qi_gguf_writer_finish", writer)
    assert_refused("qi_gguf_writer_finish", [((writer,), "is finished")])
    assert_refused("qi_gguf_writer_write", [((writer, data, 1), "is finished")])
