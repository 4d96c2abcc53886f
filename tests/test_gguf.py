"""Reading GGUF files: what is in them, what is wrong with them, and split models."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf_corpus as corpus
from qinfer import _native
from qinfer._gguf import GGUF, Writer
from qinfer.errors import ArgumentError, Cancelled, FileError, FormatError

WHOLE = corpus.whole_files()
BROKEN = {case.name: case for case in corpus.broken_files()}


def read_everything(path: Path, **options: bool) -> GGUF:
    """Opens a file and touches all it offers."""
    file = GGUF(path, **options)
    assert len(file.header) == file.info.header_bytes
    for key, value in file.metadata.items():
        assert file.find(key) >= 0
        if "string" in file.value_type(key):
            n = len(value) if isinstance(value, list) else 1
            assert len(file.raw_strings(key)) == n
    for index, tensor in enumerate(file.tensors):
        name = tensor.name.encode()
        assert _native.lib.qi_gguf_find_tensor(file.pointer, name, len(name)) == index
        if options.get("tensors", True):
            assert len(tensor.data.tobytes()) == tensor.n_bytes
    return file


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[bytes], Path]:
    """Saves bytes as a file and returns its path."""

    def save(data: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(data)
        return path

    return save


# ---- what is in a file ----


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_open(name: str, mmap: bool, saved: Callable[[bytes], Path]) -> None:
    file = read_everything(saved(WHOLE[name].bytes), mmap=mmap)
    assert file.info.n_bytes == len(WHOLE[name].bytes)
    assert file.info.is_powerinfer == (WHOLE[name].magic == b"PWRI")
    assert file.header == WHOLE[name].header


def test_values_of_every_type(saved: Callable[[bytes], Path]) -> None:
    file = GGUF(saved(corpus.WHOLE.bytes))
    assert dict(file.metadata) == {
        "general.architecture": "none",
        "a.u8": 255,
        "a.i8": -128,
        "a.u16": 65535,
        "a.i16": -32768,
        "a.u32": 2**32 - 1,
        "a.i32": -(2**31),
        "a.f32": 0.5,
        "a.bool": True,
        "a.u64": 2**64 - 1,
        "a.i64": -(2**63),
        "a.f64": 0.1,
        "a.bytes": "\ufffd\x00\ufffd",
        "a.empty": "",
        "l.u8": [0, 255],
        "l.bool": [True, False, True],
        "l.i16": [-1, 0, 1],
        "l.f64": [0.0, -0.5],
        "l.string": ["", "ä", "\ufffd", "the"],
        "l.nothing": [],
        "l.no strings": [],
    }
    assert file.raw_strings("a.bytes") == [b"\xff\x00\xfe"]
    assert file.raw_strings("l.string")[2] == b"\x80"
    assert file.value_type("l.i16") == "array of i16"
    assert "absent" not in file.metadata
    with pytest.raises(FormatError, match=r"a\.u8.*u8.*string"):
        file.raw_strings("a.u8")
    assert list(file.string_array("l.string")) == file.raw_strings("l.string")
    for key, kind in (("a.bytes", "string"), ("l.u8", "array of u8"), ("a.u8", "u8")):
        with pytest.raises(FormatError, match=rf"{key} is of type {kind}; wanted an array of str"):
            file.string_array(key)


def test_tensors_and_their_data(saved: Callable[[bytes], Path]) -> None:
    file = GGUF(saved(corpus.WHOLE.bytes))
    first, second, third = file.tensors
    assert [(t.name, t.shape, t.type) for t in file.tensors] == [
        ("first", (2, 3), "F32"),
        ("second", (2, 1, 32), "Q8_0"),
        ("third", (5,), "I32"),
    ]
    assert first.data.view(np.float32).tolist() == list(range(6))
    assert second.data.tolist() == list(range(68))
    assert third.data.view(np.int32).tolist() == list(range(5))
    data_begins = -(-file.info.header_bytes // 32) * 32
    assert [t.file_offset - data_begins for t in file.tensors] == [0, 32, 128]


def test_a_type_that_gguf_does_not_define_is_kept(saved: Callable[[bytes], Path]) -> None:
    (tensor,) = GGUF(saved(WHOLE["unknown tensor type"].bytes)).tensors
    assert (tensor.type, tensor.shape, tensor.n_bytes) == ("type 99", (7,), 0)


def test_powerinfers_own_type_numbers(saved: Callable[[bytes], Path]) -> None:
    file = GGUF(saved(WHOLE["gpu index"].bytes))
    assert [t.type for t in file.tensors] == ["I32", "I32"]
    assert file.tensors[1].data.view(np.int32).tolist() == [0, 2, 4, 6]
    (tensor,) = GGUF(
        saved(corpus.Layout([], [corpus.tensor("t", [256], 18, 0)], bytes(98)).bytes)
    ).tensors
    assert tensor.type == "IQ3_XXS"


def test_a_trained_model_reads_as_the_oracle_reads_it(stories260k: Path) -> None:
    ours, theirs = GGUF(stories260k), gguf.GGUFReader(stories260k)
    fields = {key: f for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == {key: field.contents() for key, field in fields.items()}
    assert len(ours.tensors) == len(theirs.tensors)
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.type) == (other.name, other.tensor_type.name)
        assert list(reversed(mine.shape)) == other.shape.tolist()
        assert mine.file_offset == other.data_offset
        np.testing.assert_array_equal(mine.data, other.data.view(np.uint8).ravel())


def test_descriptions_alone(saved: Callable[[bytes], Path]) -> None:
    """Without tensors, a file may end where its header does."""
    for data in (corpus.WHOLE.bytes, corpus.WHOLE.header):
        file = read_everything(saved(data), tensors=False)
        assert [t.n_bytes for t in file.tensors] == [24, 68, 20]
        with pytest.raises(ArgumentError, match="first"):
            _ = file.tensors[0].data


def test_strings_are_built_once_whoever_asks(stories260k: Path) -> None:
    file = GGUF(stories260k)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(file.raw_strings, ["tokenizer.ggml.tokens"] * 32))
    assert len(found[0]) == 512
    assert all(tokens == found[0] for tokens in found)


def test_closing_twice_and_data_after_closing(saved: Callable[[bytes], Path]) -> None:
    file = GGUF(saved(corpus.WHOLE.bytes))
    data = file.tensors[1].data
    file.close()
    file.close()
    del file
    assert data.tolist() == list(range(68))


def test_reading_into_memory_tells_how_far_it_is(tmp_path: Path) -> None:
    size = 64 << 20
    path = tmp_path / "x.gguf"
    with Writer(path) as writer:
        writer.add_tensor("t", (size,), "I8")
        writer.write(np.zeros(size, np.uint8))
    seen: list[tuple[int, int]] = []
    file = GGUF(path, mmap=False, progress=lambda done, total: seen.append((done, total)))
    n_bytes = path.stat().st_size
    assert seen[-1] == (n_bytes, n_bytes) and {total for _, total in seen} == {n_bytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    np.testing.assert_array_equal(file.tensors[0].data, 0)
    # Mapping takes no time, and is no reading.
    GGUF(path, progress=lambda done, total: seen.append((-1, -1))).close()
    GGUF(path, mmap=False, tensors=False, progress=lambda done, total: seen.append((-1, -1)))
    assert (-1, -1) not in seen


def test_all_parts_of_a_split_file_are_counted_together(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / f"x-{number + 1:05}-of-00003.gguf"
        path.write_bytes(corpus.split_part(number).bytes)
    n_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    seen: list[tuple[int, int]] = []
    GGUF(
        tmp_path / "x-00001-of-00003.gguf",
        mmap=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (n_bytes, n_bytes)


def test_reading_can_be_cancelled(saved: Callable[[bytes], Path]) -> None:
    ffi, lib = _native.ffi, _native.lib
    path = os.fsencode(saved(corpus.WHOLE.bytes))
    out, state = ffi.new("qi_gguf **"), ffi.new("qi_read_progress *")
    state.cancel = 1
    with pytest.raises(Cancelled, match=r"reading '.*' was cancelled at byte 0 of \d+"):
        call("qi_gguf_open", path, len(path), lib.QI_GGUF_NO_MMAP, state, out)
    assert out[0] == ffi.NULL
    assert (state.n_read, state.n_bytes) == (0, len(corpus.WHOLE.bytes))


def test_what_progress_raises_ends_the_reading(
    saved: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    path = saved(corpus.WHOLE.bytes)
    closed = []
    close = _native.lib.qi_gguf_close
    library = SimpleNamespace(
        qi_gguf_open=_native.lib.qi_gguf_open,
        qi_gguf_close=lambda file: (closed.append(file), close(file)),
        QI_GGUF_NO_MMAP=_native.lib.QI_GGUF_NO_MMAP,
    )
    monkeypatch.setattr("qinfer._gguf.lib", library)
    with pytest.raises(KeyboardInterrupt):
        GGUF(path, mmap=False, progress=stop)
    assert len(closed) == 1  # what had been opened by then


# ---- what is wrong with a file ----


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_a_defect_is_named(name: str, mmap: bool, saved: Callable[[bytes], Path]) -> None:
    path = saved(BROKEN[name].bytes)
    with pytest.raises(FormatError) as caught:
        GGUF(path, mmap=mmap)
    message = str(caught.value)
    assert str(path) in message
    for part in BROKEN[name].says:
        assert part in message


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_short_anywhere_is_refused(name: str, saved: Callable[[bytes], Path]) -> None:
    """At every byte of the header and a hundred places of the data."""
    data, n_header = WHOLE[name].bytes, len(WHOLE[name].header)
    with GGUF(saved(data)) as file:
        ends = [t.file_offset + t.n_bytes for t in file.tensors]
    needed = max([n_header, *ends])
    path = saved(data[:needed])
    read_everything(path).close()
    in_data = range(needed - 1, n_header, -max(1, (needed - n_header) // 100))
    for length in [*in_data, *range(min(n_header, needed - 1), -1, -1)]:
        os.truncate(path, length)
        with pytest.raises(FormatError, match=r"file\.gguf"):
            GGUF(path)


def test_what_a_cut_is_in_is_said(saved: Callable[[bytes], Path]) -> None:
    header = corpus.WHOLE.header
    for after, says in {
        b"GGUF": "the version",
        b"GGUF\x03\x00\x00\x00": "the number of tensors",
        b"l.i16": "key 'l.i16'",
        b"l.f64": "key 'l.f64'",
        b"second": "tensor 'second'",
        b"thir": "tensor 2",
    }.items():
        path = saved(header[: header.index(after) + len(after)])
        with pytest.raises(FormatError, match=f"{says}.*ends at byte"):
            GGUF(path)


def test_no_flipped_bit_does_harm(saved: Callable[[bytes], Path]) -> None:
    n_header, n_refused = len(corpus.WHOLE.header), 0
    path = saved(corpus.WHOLE.bytes)
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * n_header):
            byte = corpus.WHOLE.bytes[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
            try:
                read_everything(path).close()
            except FormatError:
                n_refused += 1
            os.pwrite(file.fileno(), bytes([byte]), bit // 8)
    assert n_refused > n_header
    read_everything(path)


mutations = st.lists(
    st.tuples(st.integers(0, len(corpus.WHOLE.bytes)), st.binary(max_size=9), st.integers(0, 9)),
    min_size=1,
    max_size=6,
)


@given(mutations)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_mutation_does_harm(
    saved: Callable[[bytes], Path], changes: list[tuple[int, bytes, int]]
) -> None:
    """Bytes replaced, inserted and removed at random places."""
    data = corpus.WHOLE.bytes
    for position, piece, n_removed in changes:
        data = data[:position] + piece + data[position + n_removed :]
    try:
        read_everything(saved(data)).close()
    except FormatError as error:
        assert "file.gguf" in str(error)


def test_counts_take_no_memory_before_they_are_believed(saved: Callable[[bytes], Path]) -> None:
    """A header that claims as much as its file could just hold stays within the file's measure."""
    lying = corpus.Layout([b"\x01" + bytes(7) + b"k"], n_values=10**6).header
    path = saved(lying + bytes(20_000_000))
    code = (
        "import resource, sys\n"
        "from qinfer._gguf import GGUF\n"
        "from qinfer.errors import FormatError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: GGUF(sys.argv[1], mmap=True)\n"
        "except FormatError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4096  # KiB


@pytest.mark.parametrize("what", ["keys", "tensors"])
def test_many_names_take_no_quadratic_time(what: str, saved: Callable[[bytes], Path]) -> None:
    names = [f"{i:07}" for i in range(100_000)]
    if what == "keys":
        layout = corpus.Layout([corpus.value(name, corpus.U8, 1) for name in names])
    else:
        packed = [
            corpus.tensor(name, [8], corpus.TENSOR_F32, 32 * i) for i, name in enumerate(names)
        ]
        layout = corpus.Layout([], packed, bytes(32 * len(names)))
    path = saved(layout.bytes)
    began = time.process_time()
    file = GGUF(path)
    # Some 30 ms; comparing all pairs of names would be 5 * 10^9 comparisons.
    assert time.process_time() - began < 2
    info = file.info
    assert (info.n_kv if what == "keys" else info.n_tensors) == len(names)


def test_messages_show_odd_names_safely(saved: Callable[[bytes], Path]) -> None:
    """Control characters are escaped and long names cut, on a character's edge."""
    odd = corpus.value("line\nbreak\x1b[0m", corpus.U8, 1)
    with pytest.raises(FormatError, match=r"'line\\x0abreak\\x1b\[0m'"):
        GGUF(saved(corpus.Layout([odd, odd]).bytes))
    long = corpus.value("ä" * 30_000, corpus.U8, 1)
    with pytest.raises(FormatError) as caught:
        GGUF(saved(corpus.Layout([long, long]).bytes))
    assert "ä" * 100 + "…" in str(caught.value)
    assert "ä" * 101 not in str(caught.value)


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.gguf"
    with pytest.raises(FileError, match=r"\\xff\\xfe\.gguf"):
        GGUF(os.fsdecode(path))
    Path(os.fsdecode(path)).write_bytes(corpus.WHOLE.bytes)
    assert len(GGUF(os.fsdecode(path)).tensors) == 3


# ---- what the operating system refuses ----


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_no_file_is_refused(mmap: bool, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.gguf.*No such file"):
        GGUF(tmp_path / "absent.gguf", mmap=mmap)
    with pytest.raises(FileError, match="is a directory"):
        GGUF(tmp_path, mmap=mmap)
    with pytest.raises(FileError, match="not a regular file"):
        GGUF("/dev/zero", mmap=mmap)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileError, match="not a regular file"):
        GGUF(pipe, mmap=mmap)
    with pytest.raises(FileError, match="File name too long"):
        GGUF(tmp_path / ("n" * 300), mmap=mmap)
    with pytest.raises(FileError, match="Not a directory"):
        GGUF(Path(__file__) / "x.gguf", mmap=mmap)


# ---- split models ----


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model of three tensors in three files."""
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        path.write_bytes(corpus.split_part(number).bytes)
    return paths


@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"tensors": False}])
def test_a_split_model_opens_by_its_first_part(parts: list[Path], options: dict[str, bool]) -> None:
    file = read_everything(parts[0], **options)
    assert file.info.n_files == 3
    assert file.info.n_bytes == sum(path.stat().st_size for path in parts)
    assert [t.name for t in file.tensors] == ["part 0", "part 1", "part 2"]
    assert [t.file_index for t in file.tensors] == [0, 1, 2]
    assert file.metadata["general.architecture"] == "none"
    if options.get("tensors", True):
        assert [t.data.view(np.float32)[0] for t in file.tensors] == [0.0, 1.0, 2.0]


def test_a_split_model_as_the_oracle_writes_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "none", split_max_tensors=2)
    arrays = {f"t{i}": np.full((4, 3), i, np.float32) for i in range(5)}
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUF(tmp_path / "m-00001-of-00003.gguf")
    assert {t.name: t.data.view(np.float32).reshape(t.shape).tolist() for t in file.tensors} == {
        name: values.tolist() for name, values in arrays.items()
    }


def test_another_part_says_which_to_open(parts: list[Path]) -> None:
    with pytest.raises(FormatError, match=r"part 2 of 3.*open '.*/m-00001-of-00003\.gguf'"):
        GGUF(parts[1])
    renamed = parts[2].rename(parts[2].with_name("other.gguf"))
    with pytest.raises(FormatError, match=r"other\.gguf.*part 3 of 3.*part 1"):
        GGUF(renamed)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(FileError, match=r"part 3 of 3.*m-00003-of-00003\.gguf.*No such file"):
        GGUF(parts[0])


def test_a_renamed_first_part_says_what_its_name_must_be(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(FormatError, match=r"model\.gguf.*-00001-of-00003\.gguf"):
        GGUF(renamed)


@pytest.mark.parametrize(
    "wrong",
    [
        corpus.split_part(2),
        corpus.split_part(1, count=4),
        corpus.split_part(1, n_tensors=4),
        corpus.WHOLE,
    ],
    ids=["another number", "another count", "other tensors", "no part"],
)
def test_a_part_of_another_model_is_named(parts: list[Path], wrong: corpus.Layout) -> None:
    parts[1].write_bytes(wrong.bytes)
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf.*part 2 of 3"):
        GGUF(parts[0])


def test_a_broken_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"part 2 of 3.*m-00002-of-00003\.gguf.*'part 1'"):
        GGUF(parts[0])


def test_a_tensor_in_two_parts_is_named(parts: list[Path]) -> None:
    twice = corpus.split_part(2)
    twice.tensors[0] = corpus.tensor("part 0", [4], corpus.TENSOR_F32, 0)
    parts[2].write_bytes(twice.bytes)
    with pytest.raises(FormatError, match="'part 0' stands in more than one part"):
        GGUF(parts[0])


def test_parts_that_hold_too_few_tensors(parts: list[Path]) -> None:
    for number, path in enumerate(parts):
        path.write_bytes(corpus.split_part(number, n_tensors=7).bytes)
    with pytest.raises(FormatError, match=r"7 tensors.*hold 3"):
        GGUF(parts[0])


# ---- the C functions' own checks ----


def call(function: str, *arguments: object) -> None:
    error = _native.new_error()
    _native.check(getattr(_native.lib, function)(*arguments, error), error)


def test_bad_arguments_are_refused(saved: Callable[[bytes], Path]) -> None:
    ffi, lib = _native.ffi, _native.lib
    null = ffi.NULL
    path = os.fsencode(saved(corpus.WHOLE.bytes))
    out = ffi.new("qi_gguf **")
    for arguments, says in [
        ((null, 4, 0, null, out), "'path' is NULL"),
        ((path, len(path), 0, null, null), "'out' is NULL"),
        ((path, 0, 0, null, out), "empty"),
        ((b"a\0b", 3, 0, null, out), "NUL"),
        ((path, len(path), 4, null, out), "flags 4"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            call("qi_gguf_open", *arguments)
        assert out[0] == null
    file = GGUF(saved(corpus.WHOLE.bytes))
    with pytest.raises(ArgumentError, match=r"21 keys.*index 21"):
        call("qi_gguf_get_kv", file.pointer, 21, ffi.new("qi_gguf_kv *"))
    with pytest.raises(ArgumentError, match=r"3 tensors.*index 18446744073709551615"):
        call("qi_gguf_get_tensor", file.pointer, 2**64 - 1, ffi.new("qi_gguf_tensor *"))
    with pytest.raises(ArgumentError, match="index 21"):
        call("qi_gguf_kv_strings", file.pointer, 21, ffi.new("char **"), ffi.new("uint64_t **"))
    for function in ("qi_gguf_get_kv", "qi_gguf_get_tensor"):
        with pytest.raises(ArgumentError, match="'out' is NULL"):
            call(function, file.pointer, 0, null)
        with pytest.raises(ArgumentError, match="'file' is NULL"):
            call(function, null, 0, null)
    assert lib.qi_gguf_get_info(null, null) == lib.QI_ARGUMENT
    assert lib.qi_gguf_find_kv(null, b"a", 1) == -1
    assert lib.qi_gguf_find_kv(file.pointer, null, 1) == -1
    assert lib.qi_gguf_find_tensor(file.pointer, b"firs", 4) == -1
    assert lib.qi_gguf_header(null) == null
    lib.qi_gguf_close(null)
    assert lib.qi_gguf_open(path, 0, 0, null, out, null) == lib.QI_ARGUMENT
