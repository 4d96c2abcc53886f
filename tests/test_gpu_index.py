"""GPU split files: their bytes by a parser of the test's own, and damaged ones."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle.tiny import as_powerinfer, tiny_shape, write_tiny
from qinfer import inspect
from qinfer.errors import ArgumentError, FileError, FormatError
from qinfer.gpu_index import GpuIndex

# Of the tensor type, PowerInfer's number, which is not that of GGUF today.
STRING, U32, U64, I32 = 8, 4, 10, 18
I32_TODAY = 26


def parse(content: bytes) -> tuple[dict[str, Any], list[tuple[str, list[int]]]]:
    """Keys and tensors in file order, of a sound file whose keys are u32, u64 and text."""
    at = 0

    def take(layout: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + layout, content, at)
        at += struct.calcsize("<" + layout)
        return values[0]

    def text() -> str:
        return str(take(f"{take('Q')}s").decode())

    assert take("4s") == b"PWRI"
    assert take("I") == 3
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {}
    for _ in range(n_keys):
        key = text()
        keys[key] = {STRING: text, U32: lambda: take("I"), U64: lambda: take("Q")}[take("I")]()
    described = []
    for _ in range(n_tensors):
        name = text()
        assert take("I") == 1  # dimensions
        length, kind, offset = take("Q"), take("I"), take("Q")
        assert kind == I32
        assert offset % 32 == 0
        described.append((name, length, offset))
    start = -(-at // 32) * 32
    assert set(content[at:start]) <= {0}
    return keys, [
        (name, list(struct.unpack_from(f"<{length}i", content, start + offset)))
        for name, length, offset in described
    ]


def ids(*numbers: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


def file_of(
    tensors: list[tuple[str, list[int]]],
    *,
    keys: list[bytes] | None = None,
    magic: bytes = b"PWRI",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    kind: int = I32,
    dims: int = 1,
) -> bytes:
    """A file with these tensors, and with what is wrong with it."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    n_layers = sum("gpu_idx" in name and "down" not in name for name, _ in tensors)
    if keys is None:
        keys = [
            text("general.architecture") + struct.pack("<I", STRING) + text("generic.gpu_index"),
            text("generic.gpu_index.block_count") + struct.pack("<II", U32, n_layers),
            text("split.vram_capacity") + struct.pack("<IQ", U64, 1000),
        ]
    head, data = b"", b""
    for name, values in tensors:
        head += text(name) + struct.pack("<I", dims)
        head += struct.pack(f"<{dims}Q", len(values), *[2] * (dims - 1))
        head += struct.pack("<IQ", kind, len(data))
        data += struct.pack(f"<{len(values)}i", *values)
        data += bytes(-len(data) % 32)
    counts = struct.pack(
        "<4sIQQ",
        magic,
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head = counts + b"".join(keys) + head
    return head + bytes(-len(head) % 32) + data


FINGERPRINT = "qinfer.model_fingerprint"
SOUND = [("blk.0.gpu_idx", [0, 1, 1]), ("blk.0.gpu_bucket", [1, 2])]


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


# ---- what is written ----


def test_powerinfers_form(tmp_path: Path) -> None:
    """Two tensors a layer in order; a layer may be on one device as a whole."""
    index = GpuIndex(4, (ids(1, 3), ids(), ids(0, 1, 2, 3)), vram_capacity=5 * 2**30)
    index.write(tmp_path / "x.gpuidx")
    keys, tensors = parse((tmp_path / "x.gpuidx").read_bytes())
    assert keys == {
        "general.architecture": "generic.gpu_index",
        "generic.gpu_index.block_count": 3,
        "split.vram_capacity": 5 * 2**30,
    }
    assert tensors == [
        ("blk.0.gpu_idx", [0, 1, 0, 1]),
        ("blk.0.gpu_bucket", [1, 3]),
        ("blk.1.gpu_idx", [0, 0, 0, 0]),
        ("blk.1.gpu_bucket", []),
        ("blk.2.gpu_idx", [1, 1, 1, 1]),
        ("blk.2.gpu_bucket", [0, 1, 2, 3]),
    ]


def test_the_file_it_is_made_for_is_a_key_more(tmp_path: Path) -> None:
    """After PowerInfer's, and nothing else changes."""
    fingerprint = bytes(range(32))
    index = GpuIndex(4, (ids(1, 3),), vram_capacity=7, fingerprint=fingerprint)
    index.write(tmp_path / "x.gpuidx")
    keys, tensors = parse((tmp_path / "x.gpuidx").read_bytes())
    assert list(keys)[3:] == ["qinfer.model_fingerprint"]
    assert keys["qinfer.model_fingerprint"] == fingerprint.hex()
    assert tensors == [("blk.0.gpu_idx", [0, 1, 0, 1]), ("blk.0.gpu_bucket", [1, 3])]
    read = GpuIndex.read(tmp_path / "x.gpuidx")
    assert read.fingerprint == fingerprint
    for accepted in (fingerprint, b""):
        read.check(1, 4, accepted)
    with pytest.raises(ArgumentError, match=r"x\.gpuidx is for another model or "):
        read.check(1, 4, bytes(32))


def test_qinfers_form(tmp_path: Path) -> None:
    GpuIndex(3, (ids(0, 2), ids(1)), (ids(2), ids())).write(tmp_path / "x.gpuidx")
    _, tensors = parse((tmp_path / "x.gpuidx").read_bytes())
    assert tensors == [
        ("blk.0.gpu_idx", [1, 0, 1]),
        ("blk.0.gpu_bucket", [0, 2]),
        ("blk.0.gpu_idx_down", [0, 0, 1]),
        ("blk.0.gpu_bucket_down", [2]),
        ("blk.1.gpu_idx", [0, 1, 0]),
        ("blk.1.gpu_bucket", [1]),
        ("blk.1.gpu_idx_down", [0, 0, 0]),
        ("blk.1.gpu_bucket_down", []),
    ]


def test_the_bytes_are_those_of_powerinfers_writer(tmp_path: Path) -> None:
    """One layer of three neurons, spelled out byte by byte."""
    GpuIndex(3, (ids(0, 2),), vram_capacity=4096).write(tmp_path / "x.gpuidx")
    content = (tmp_path / "x.gpuidx").read_bytes()
    head = bytes.fromhex(
        "50575249 03000000 0200000000000000 0300000000000000"
        "1400000000000000" + b"general.architecture".hex() + "08000000"
        "1100000000000000" + b"generic.gpu_index".hex() + "1d00000000000000"
        + b"generic.gpu_index.block_count".hex() + "04000000 01000000"
        "1300000000000000" + b"split.vram_capacity".hex() + "0a000000 0010000000000000"
        "0d00000000000000" + b"blk.0.gpu_idx".hex()
        + "01000000 0300000000000000 12000000 0000000000000000"
        "1000000000000000" + b"blk.0.gpu_bucket".hex()
        + "01000000 0200000000000000 12000000 2000000000000000"
    )  # fmt: skip
    head += bytes(-len(head) % 32)
    data = bytes.fromhex("01000000 00000000 01000000").ljust(32, b"\0")
    data += bytes.fromhex("00000000 02000000").ljust(32, b"\0")
    assert content == head + data


def test_it_is_a_gguf_file_but_for_the_magic_and_one_type(tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    GpuIndex(70, (ids(*range(0, 70, 2)), ids(5, 69)), vram_capacity=7).write(path)
    content = path.read_bytes()
    for length in (70, 35, 2):
        description = struct.pack("<IQI", 1, length, I32)
        assert description in content
        content = content.replace(description, struct.pack("<IQI", 1, length, I32_TODAY))
    path.write_bytes(b"GGUF" + content[4:])
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "generic.gpu_index"
    assert reader.fields["split.vram_capacity"].contents() == 7
    values = {tensor.name: tensor.data.tolist() for tensor in reader.tensors}
    assert values["blk.0.gpu_bucket"] == list(range(0, 70, 2))
    assert values["blk.1.gpu_bucket"] == [5, 69]
    assert values["blk.1.gpu_idx"] == [int(j in (5, 69)) for j in range(70)]


def test_a_file_that_gguf_writes_is_read(tmp_path: Path) -> None:
    """As the solvers of both projects write theirs."""
    path = tmp_path / "x.gpuidx"
    writer = gguf.GGUFWriter(path, "generic.gpu_index")
    chosen = [[0, 4, 40], [], list(range(41))]
    for layer, wanted in enumerate(chosen):
        on_gpu = np.zeros(41, np.int32)
        on_gpu[wanted] = 1
        writer.add_tensor(f"blk.{layer}.gpu_idx", on_gpu)
        writer.add_tensor(f"blk.{layer}.gpu_bucket", np.array(wanted, np.int32))
    writer.add_block_count(3)
    writer.add_uint64("split.vram_capacity", 123)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    index = GpuIndex.read(path)
    assert [layer.tolist() for layer in index.gate_up] == chosen
    assert (index.n_ff, index.n_layers, index.vram_capacity, index.down) == (41, 3, 123, None)


@st.composite
def splits(draw: st.DrawFn) -> GpuIndex:
    n_ff, n_layers = draw(st.integers(1, 70)), draw(st.integers(1, 12))
    layer = st.sets(st.integers(0, n_ff - 1)).map(lambda each: ids(*sorted(each)))
    layers = st.lists(layer, min_size=n_layers, max_size=n_layers).map(tuple)
    down = draw(st.none() | layers)
    return GpuIndex(n_ff, draw(layers), down, draw(st.integers(0, 2**64 - 1)))


@settings(max_examples=60, deadline=None)
@given(index=splits())
def test_what_is_written_is_read(index: GpuIndex, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("split") / "x.gpuidx"
    index.write(path)
    again = GpuIndex.read(path)
    assert (again.n_ff, again.vram_capacity) == (index.n_ff, index.vram_capacity)
    for mine, theirs in ((again.gate_up, index.gate_up), (again.down or (), index.down or ())):
        assert [each.tolist() for each in mine] == [each.tolist() for each in theirs]
    assert (again.down is None) == (index.down is None)
    keys, tensors = parse(path.read_bytes())
    assert len(tensors) == index.n_layers * (2 if index.down is None else 4)
    assert keys["split.vram_capacity"] == index.vram_capacity


def test_neurons_are_whole(tmp_path: Path) -> None:
    index = GpuIndex(6, (ids(0, 2, 5), ids(1)), (ids(2, 3, 5), ids(2)))
    assert index.neurons(0).tolist() == [2, 5]
    assert index.neurons(1).tolist() == []
    assert GpuIndex(6, (ids(0, 2),)).neurons(0).tolist() == [0, 2]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="absent"):
        GpuIndex(2, (ids(0),)).write(tmp_path / "absent" / "x.gpuidx")
    assert list(tmp_path.iterdir()) == []


# ---- what is not a split ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((3, (ids(0, 3),)), r"layer 0: neuron ids go from 0 to 2"),
        ((3, (ids(0), ids(-1))), r"layer 1: neuron ids go from 0 to 2"),
        ((3, (ids(1, 0),)), "not ascending"),
        ((3, (ids(1, 1),)), "not ascending"),
        ((3, (np.array([0.5]),)), "flat array of integers, not float64"),
        ((3, (np.array([[0, 1]]),)), r"shape \(1, 2\)"),
        ((3, (np.array([2**40]),)), "ids go from 0 to 2"),
        ((3, ()), "at least one layer"),
        ((0, (ids(),)), "n_ff=0"),
        ((3, (ids(0),), (ids(0), ids(1))), "1 layers, down for 2"),
        ((3, (ids(0),), None, -1), "vram_capacity=-1"),
        ((3, (ids(0),), None, 2**64), "is not a number of bytes"),
    ],
)
def test_what_is_no_split_cannot_be_made(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        GpuIndex(*arguments)


def test_another_models_split_is_refused(tmp_path: Path) -> None:
    made = GpuIndex(6, (ids(0), ids(1)))
    made.check(2, 6)
    with pytest.raises(ArgumentError, match="the GPU split is for another model"):
        made.check(3, 6)
    with pytest.raises(ArgumentError, match="my split is for another model"):
        made.check(2, 5, name="my split")
    made.write(tmp_path / "x.gpuidx")
    index = GpuIndex.read(tmp_path / "x.gpuidx")
    index.check(2, 6)
    with pytest.raises(
        ArgumentError,
        match=r"x\.gpuidx is for another model: it has 2 layers, up to tensor 'blk\.1\.gpu_idx', "
        "this model has 3",
    ):
        index.check(3, 6)
    with pytest.raises(
        ArgumentError,
        match=r"x\.gpuidx .* tensor 'blk\.0\.gpu_idx' is of 6 neurons, a layer of this model has 7",
    ):
        index.check(2, 7)


# ---- what is shown of one ----


def test_inspect_shows_where_neurons_are(tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    GpuIndex(2000, (ids(*range(1500)), ids()), vram_capacity=12345).write(path)
    text = inspect.render(path)
    assert f"{path}: GPU split in PowerInfer's form, 2 layers of 2,000 neurons" in text
    assert "made for 12,345 bytes of GPU memory" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("  layer")]
    assert rows == [
        ["layer", "0", "1,500", "on", "the", "GPU"],
        ["layer", "1", "0", "on", "the", "GPU"],
    ]
    assert text.endswith("\n1,500 of 4,000 neurons on the GPU")
    assert inspect.describe(path) == {
        "path": str(path),
        "gpu_split": {
            "n_layers": 2,
            "n_ff": 2000,
            "vram_capacity": 12345,
            "model_fingerprint": None,
            "n_gate_up": [1500, 0],
            "n_down": None,
            "n_whole": [1500, 0],
        },
    }
    assert "\nit does not say for which model\n" in text
    GpuIndex(3, (ids(0, 2),), fingerprint=bytes(range(32))).write(path)
    assert "\nit says for which model file\n" in inspect.render(path)
    found = inspect.describe(path)["gpu_split"]["model_fingerprint"]
    assert found == bytes(range(32)).hex()


def test_inspect_shows_qinfers_form(tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    GpuIndex(3, (ids(0, 2), ids(1)), (ids(2), ids())).write(path)
    text = inspect.render(path)
    assert "in Q-Infer's form" in text
    assert "1 on the GPU (2 gate and up, 1 down)" in text
    assert inspect.describe(path)["gpu_split"]["n_down"] == [1, 0]


def test_inspect_of_a_damaged_split_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    GpuIndex(3, (ids(0, 2),)).write(path)
    path.write_bytes(path.read_bytes()[:-64])
    for look in (inspect.render, inspect.describe):
        with pytest.raises(FormatError, match=r"x\.gpuidx: .*goes beyond the end"):
            look(path)


def test_the_files_of_these_tests_are_sound(tmp_path: Path) -> None:
    """So that each below is refused for what it is about."""
    path = tmp_path / "x.gpuidx"
    path.write_bytes(file_of(SOUND))
    assert GpuIndex.read(path).gate_up[0].tolist() == [1, 2]
    path.write_bytes(file_of(SOUND, version=2))
    assert GpuIndex.read(path).n_ff == 3
    path.write_bytes(file_of(SOUND, kind=I32_TODAY))
    assert GpuIndex.read(path).gate_up[0].tolist() == [1, 2]
    path.write_bytes(file_of([SOUND[0], ("blk.0.gpu_bucket", [2, 1])]))
    assert GpuIndex.read(path).gate_up[0].tolist() == [1, 2]


ARCHITECTURE = key("general.architecture", STRING, struct.pack("<Q", 17) + b"generic.gpu_index")
LAYERS = key("generic.gpu_index.block_count", U32, struct.pack("<I", 1))
CAPACITY = key("split.vram_capacity", U64, struct.pack("<Q", 9))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends at 0 bytes, in the middle of the magic"),
        (file_of(SOUND, magic=b"GGUF"), "begins with b'GGUF', not b'PWRI'"),
        (file_of(SOUND, version=1), "version 1; versions 2 and 3"),
        (file_of(SOUND, n_tensors=2**63), "in the middle of|0 dimensions"),
        (file_of(SOUND, n_keys=2**64 - 1), "ends at|has the type|appears twice|in the middle"),
        (file_of(SOUND, n_tensors=1), "1 tensors for 1 layers"),
        (file_of(SOUND, keys=[LAYERS, CAPACITY]), "'general.architecture' is missing"),
        (file_of(SOUND, keys=[ARCHITECTURE, CAPACITY]), "block_count' is None"),
        (file_of(SOUND, keys=[ARCHITECTURE, LAYERS]), "vram_capacity' is None"),
        (file_of(SOUND, keys=[ARCHITECTURE, ARCHITECTURE]), "appears twice"),
        (
            file_of(SOUND, keys=[ARCHITECTURE, LAYERS, key("split.vram_capacity", 6, bytes(4))]),
            "vram_capacity' is 0.0",
        ),
        (
            file_of(SOUND, keys=[ARCHITECTURE, LAYERS, CAPACITY, key("x", 9, bytes(12))]),
            "key 'x' has the type 9",
        ),
        (
            file_of(
                SOUND,
                keys=[ARCHITECTURE, LAYERS, CAPACITY, key("general.alignment", U32, bytes(4))],
            ),
            "general.alignment' is 0",
        ),
        (
            file_of(
                SOUND,
                keys=[ARCHITECTURE, LAYERS, CAPACITY, key(FINGERPRINT, U32, bytes(4))],
            ),
            "qinfer.model_fingerprint' is 0, it should be 64",
        ),
        (
            file_of(
                SOUND,
                keys=[
                    ARCHITECTURE, LAYERS, CAPACITY,
                    key(FINGERPRINT, STRING, struct.pack("<Q", 3) + b"abc"),
                ],
            ),
            "qinfer.model_fingerprint' is 'abc', it should be 64",
        ),
        (file_of(SOUND, kind=16), "'blk.0.gpu_idx' has the type 16; it should be I32, which is 18"),
        (file_of(SOUND, kind=0), "'blk.0.gpu_idx' has the type 0; it should be I32"),
        (file_of(SOUND, dims=2), "has the dimensions"),
        (file_of(SOUND, dims=5), "5 dimensions"),
        (file_of(SOUND[::-1]), "'blk.0.gpu_bucket' stands where 'blk.0.gpu_idx' should"),
        (
            file_of([*[("blk.1" + name[5:], values) for name, values in SOUND], *SOUND]),
            "'blk.1.gpu_idx' stands where 'blk.0.gpu_idx'",
        ),
        (file_of([SOUND[0], ("blk.0.gpu_bucket", [0, 2])]), "does not list the 2 neurons"),
        (file_of([SOUND[0], ("blk.0.gpu_bucket", [1, 2, 2])]), "does not list the 2 neurons"),
        (file_of([SOUND[0], ("blk.0.gpu_bucket", [])]), "does not list the 2 neurons"),
        (file_of([("blk.0.gpu_idx", [0, 2, 1]), SOUND[1]]), "has the value 2; it holds 0 and 1"),
        (file_of([("blk.0.gpu_idx", []), ("blk.0.gpu_bucket", [])]), "is empty"),
        (
            file_of([*SOUND, ("blk.1.gpu_idx", [0, 1]), ("blk.1.gpu_bucket", [1])]),
            "'blk.1.gpu_idx' has 2 neurons, that of the first layer has 3",
        ),
    ],
)  # fmt: skip
def test_damaged_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"x\.gpuidx: .*({says})"):
        GpuIndex.read(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    GpuIndex(5, (ids(1, 2), ids(0, 1, 3)), vram_capacity=3).write(path)
    content = path.read_bytes()
    # The padding behind the last tensor of three numbers may be missing.
    for length in range(len(content) - 20):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"x\.gpuidx: (ends at|.*goes beyond the end)"):
            GpuIndex.read(path)


@settings(max_examples=300, deadline=None)
@given(
    at=st.integers(0, 479),
    value=st.binary(min_size=1, max_size=9),
)
def test_any_damage_is_an_error_or_another_split(
    at: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(file_of(SOUND))
    content[at : at + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gpuidx"
    path.write_bytes(content)
    try:
        index = GpuIndex.read(path)
    except FormatError:
        return
    assert all(len(layer) <= index.n_ff <= len(content) for layer in index.gate_up)


def test_lengths_beyond_the_file_ask_for_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.gpuidx"
    content = bytearray(file_of(SOUND))
    at = content.index(b"blk.0.gpu_idx") + len("blk.0.gpu_idx") + 4
    content[at : at + 8] = struct.pack("<Q", 2**61)
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"of {2**61} numbers goes beyond the end"):
        GpuIndex.read(path)


def test_a_model_is_no_split(tmp_path: Path) -> None:
    model = as_powerinfer(write_tiny(tmp_path / "model.gguf", tiny_shape("llama"), by_neuron=True))
    with pytest.raises(FormatError, match=r"model\.gguf: not a GPU split: .* is 'llama'"):
        GpuIndex.read(model)
    with (tmp_path / "large.gguf").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(FormatError, match=r"large\.gguf: not a GPU split: it has 2147483648 bytes"):
        GpuIndex.read(tmp_path / "large.gguf")
    with pytest.raises(FileError, match=r"absent\.gpuidx: cannot read: No such file"):
        GpuIndex.read(tmp_path / "absent.gpuidx")


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileError, match=f"{name}: cannot write: it exists and is not"):
            GpuIndex(4, (np.array([1]),)).write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
