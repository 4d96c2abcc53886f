"""Files of torch read without torch, and refused where they are broken or ask for anything else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qinfer._file_tensor import FileTensor
from qinfer._torch_file import load, load_note, load_tensor, load_tensors, save_tensor
from qinfer.errors import ArgumentError, FileError, FormatError

MISSING = "torch is not installed: pip install '.[test-hf]'"


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason=MISSING)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def archive(path: Path, program: bytes, data: dict[str, bytes] | None = None, **names: str) -> Path:
    """A zip archive as torch lays it out, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(names.get("pickle", "archive/data.pkl"), program)
        for key, content in (data or {}).items():
            out.writestr(f"archive/data/{key}", content)
        out.writestr("archive/version", "3\n")
    return path


def tensor_program(
    *,
    storage: bytes = b"FloatStorage",
    n_elements: int = 6,
    first: object = 0,
    shape: object = (2, 3),
    strides: object = (3, 1),
) -> bytes:
    def plain(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    reference = b"(" + plain("storage") + b"ctorch\n" + storage + b"\n" + plain("0") + plain("cpu")
    reference += plain(n_elements) + b"tQ"
    arguments = reference + plain(first) + plain(shape) + plain(strides) + plain(False)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"}tR."


SIX = {"0": np.arange(6, dtype="<f4").tobytes()}


# ---- without torch ----


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?", ">f4", ">i8"]
)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (), (0,), (3, 0, 2)])
def test_a_tensor_saved_is_read_again(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    save_tensor(tmp_path / "t.pt", values)
    tensor = load_tensor(tmp_path / "t.pt")
    assert tensor.shape == shape
    assert tensor.n_elements == values.size
    np.testing.assert_array_equal(tensor.numpy(), values, strict=dtype[0] != ">")
    np.testing.assert_array_equal(tensor.float32(), values.astype(np.float32), strict=True)
    assert names(tmp_path) == ["t.pt"]


def test_a_note_is_kept_beside_a_tensor(tmp_path: Path) -> None:
    save_tensor(tmp_path / "plain.pt", np.arange(5))
    save_tensor(tmp_path / "noted.pt", np.arange(5), b"a note")
    assert load_note(tmp_path / "noted.pt") == b"a note"
    assert load_note(tmp_path / "plain.pt") == b""
    assert load_tensor(tmp_path / "noted.pt").numpy().tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "other").write_bytes(b"no archive")
    assert load_note(tmp_path / "other") == b""
    with pytest.raises(FileError, match="absent"):
        load_note(tmp_path / "absent.pt")


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_tensor(tmp_path / name / "t.pt", np.arange(5))
    assert (tmp_path / "a/t.pt").read_bytes() == (tmp_path / "b/t.pt").read_bytes()


def test_what_torch_has_not_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="complex64"):
        save_tensor(tmp_path / "t.pt", np.zeros(2, np.complex64))
    with pytest.raises(FileError, match="nowhere"):
        save_tensor(tmp_path / "nowhere/t.pt", np.zeros(2))
    assert names(tmp_path) == []


def test_rows_are_read_alone(tmp_path: Path) -> None:
    values = np.arange(35.0).reshape(5, 7)
    save_tensor(tmp_path / "t.pt", values)
    tensor = load_tensor(tmp_path / "t.pt")
    np.testing.assert_array_equal(tensor.stored(1, 3), values[1:3])
    np.testing.assert_array_equal(tensor.stored(3, 99), values[3:])
    assert tensor.stored(9, 99).shape == (0, 7)
    pieces = list(tensor.pieces(2 * 7 * 8))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(pieces), values)


def test_strides_and_offsets(tmp_path: Path) -> None:
    program = tensor_program(first=1, shape=(2, 2), strides=(1, 3))
    tensor = load_tensor(archive(tmp_path / "t.pt", program, SIX))
    np.testing.assert_array_equal(tensor.numpy(), [[1, 4], [2, 5]])
    np.testing.assert_array_equal(tensor.stored(1, 2), [[2, 5]])


class Evil:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (pickle.dumps(Evil(os.system, "touch pwned"), 2), "posix.system"),
        (pickle.dumps(Evil(eval, "1"), 4), "builtins.eval|__builtin__.eval"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "_rebuild_tensor_v2.__glob"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93.", "OrderedDict.__class__"),
        (b"(S'touch pwned'\nios\nsystem\n.", "os.system"),
        (pickle.dumps(np.zeros(2), 2), "numpy"),
    ],
)
def test_a_pickle_that_asks_for_more_is_refused(
    program: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "evil.pt", program)
    with pytest.raises(FormatError, match=rf"evil\.pt: its pickle asks for \S*({name})"):
        load(path)
    path.write_bytes(b"\x80\x02" + program.removeprefix(b"\x80\x02"))
    with pytest.raises(FormatError, match=r"evil\.pt: its pickle"):
        load(path)
    assert names(tmp_path) == ["evil.pt"]


def test_state_given_to_a_name_changes_nothing(tmp_path: Path) -> None:
    for name in (b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor", b"torch\nSize"):
        for state in ({"__call__": 1}, (None, {"_name": "Size", "__class__": 1})):
            program = b"\x80\x02c" + name + b"\n" + pickle.dumps(state, 2)[2:-1] + b"b."
            with pytest.raises(FormatError, match=r"evil\.pt"):
                load(archive(tmp_path / "evil.pt", program))
    assert load(archive(tmp_path / "t.pt", pickle.dumps(OrderedDict(a=1), 2))) == {"a": 1}
    shadowed = (
        b"\x80\x02ccollections\nOrderedDict\n)R" + pickle.dumps({"items": 1}, 2)[2:-1] + b"b."
    )
    assert load(archive(tmp_path / "t.pt", shadowed)) == {}


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": [2.5, None, True, "x", (1, 2)]},
        OrderedDict(z=1, a=OrderedDict(y=2)),
        [],
        3,
        -(2**70),
    ],
)
def test_plain_values(value: object, tmp_path: Path) -> None:
    assert load(archive(tmp_path / "t.pt", pickle.dumps(value, 2))) == value


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n_elements": 7}, "storage '0' of 28 bytes with 24 of data"),
        ({"shape": (2, 4)}, "outside its storage"),
        ({"first": 1}, "outside its storage"),
        ({"strides": (4, 1)}, "outside its storage"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "outside its storage"),
        ({"shape": (2**40, 0), "strides": (0, 0)}, None),
        ({"shape": (-2, 3)}, "where sizes of a tensor belong"),
        ({"strides": (-3, 1)}, "where sizes of a tensor belong"),
        ({"shape": (6,)}, "shape .* with strides"),
        ({"shape": "ab"}, "where sizes of a tensor belong"),
        ({"first": None}, "where sizes of a tensor belong"),
        ({"storage": b"int32"}, None),
        ({"storage": b"LongStorage"}, "storage '0' of 48 bytes with 24"),
        ({"storage": b"QInt8Storage"}, "torch.QInt8Storage"),
    ],
)
def test_tensors_that_do_not_fit(
    options: dict[str, Any], problem: str | None, tmp_path: Path
) -> None:
    path = archive(tmp_path / "bad.pt", tensor_program(**options), SIX)
    if problem is None:
        load_tensor(path).numpy()
        return
    with pytest.raises(FormatError, match=rf"bad\.pt.*{problem}"):
        load(path)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    cases: list[tuple[bytes, str]] = [
        (b"", "neither a zip archive nor a pickle"),
        (b"GGUF" + bytes(100), "neither a zip archive nor a pickle"),
        (b"PK\x03\x04" + bytes(100), "cut short"),
        (pickle.dumps(7, 2), "does not begin as a file of torch"),
        (b"\x80\x02", "malformed or cut short"),
        (b"\x80\x05" + b"]" * 100 + b"." + bytes(9), "malformed|does not begin"),
    ]
    for content, problem in cases:
        path.write_bytes(content)
        with pytest.raises(FormatError, match=rf"bad\.pt.*({problem})"):
            load(path)
    with pytest.raises(FileError, match=r"none\.pt"):
        load(tmp_path / "none.pt")
    with pytest.raises(FileError, match=str(tmp_path)):
        load(tmp_path)


def test_archives_that_are_not_torchs(tmp_path: Path) -> None:
    path = archive(tmp_path / "bad.pt", b"", pickle="archive/other.pkl")
    with pytest.raises(FormatError, match=r"bad\.pt.*0 entries called data\.pkl"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/data.pkl", pickle.dumps([0] * 1000, 2))
    with pytest.raises(FormatError, match=r"bad\.pt.*compressed"):
        load(path)
    with pytest.raises(FormatError, match=r"bad\.pt.*storage '0', which the archive does not hold"):
        load(archive(path, tensor_program()))
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/data.pkl", pickle.dumps(1, 2))
        out.writestr("a/byteorder", "big")
    with pytest.raises(FormatError, match=r"bad\.pt.*another machine's order"):
        load(path)


def test_a_pickle_that_folds_itself_takes_no_time(tmp_path: Path) -> None:
    folded = b"\x80\x02]q\x00" + b"".join(
        b"]q" + bytes((i + 1,)) + b"(h" + bytes((i,)) + b"h" + bytes((i,)) + b"e"
        for i in range(200)
    )
    load(archive(tmp_path / "t.pt", folded + b"."))
    with pytest.raises(FormatError, match="RecursionError"):
        load(archive(tmp_path / "t.pt", b"\x80\x02]q\x00h\x00a."))
    with pytest.raises(FormatError, match="RecursionError"):
        load(archive(tmp_path / "t.pt", b"\x80\x02" + b"]" * 100000 + b"a" * 99999 + b"."))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    save_tensor(tmp_path / "t.pt", np.arange(6))
    whole = (tmp_path / "t.pt").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.pt"):
            load(tmp_path / "cut.pt")


def test_random_damage_ends_in_a_typed_error(tmp_path: Path) -> None:
    save_tensor(tmp_path / "t.pt", np.arange(6))
    whole = np.frombuffer((tmp_path / "t.pt").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pt"
    for _ in range(1500):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            value = load(path)
        except (FormatError, FileError):
            continue
        if isinstance(value, FileTensor):
            value.numpy()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    save_tensor(path, np.arange(1000))
    tensor = load_tensor(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FormatError, match=r"t\.pt: ends at byte 500"):
        tensor.numpy()
    path.unlink()
    with pytest.raises(FileError, match=r"t\.pt: cannot be read"):
        tensor.numpy()


def test_wrong_contents_are_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "t.pt", pickle.dumps([1], 2))
    with pytest.raises(FormatError, match=r"t\.pt: holds a list, expected a dict"):
        load_tensors(path)
    with pytest.raises(FormatError, match=r"t\.pt: holds a list, expected a bare tensor"):
        load_tensor(path)
    with pytest.raises(FormatError, match=r"t\.pt: entry 'a' is a int, expected a tensor"):
        load_tensors(archive(path, pickle.dumps({"a": 1}, 2)))
    save_tensor(path, np.zeros(3))
    with pytest.raises(FormatError, match=r"t\.pt: holds a tensor, expected a dict"):
        load_tensors(path)


def test_shared_predictors_and_counts(test_data: Path) -> None:
    folder = test_data / "models/relu-stories-15M"
    state = load_tensors(folder / "predictor/model_0.pt")
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        "fc1.weight": ((64, 288), "F16"),
        "fc2.weight": ((768, 64), "F16"),
    }
    assert np.isfinite(state["fc2.weight"].float32()).all()
    counts = load_tensor(folder / "activation/activation_5.pt")
    assert (counts.shape, counts.dtype) == ((768,), "I64")
    assert 0 < counts.numpy().max() <= 409600


# ---- with torch ----


def state_dict(torch: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()  # with the `_metadata` that modules add
    return state | {
        "half": base.half(),
        "bf16": base.bfloat16(),
        "double": base.double(),
        "transposed": base.t(),
        "slice": base[1:3, 2:5],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "int64": torch.arange(5),
        "int8": torch.arange(5, dtype=torch.int8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_writes(torch: Any, zipped: bool, tmp_path: Path) -> None:
    state = state_dict(torch)
    torch.save(state, tmp_path / "s.bin", _use_new_zipfile_serialization=zipped)
    tensors = load_tensors(tmp_path / "s.bin")
    assert list(tensors) == list(state)
    for name, tensor in tensors.items():
        expected = state[name].detach()
        if name == "bf16":
            assert tensor.dtype == "BF16"
            bits = expected.view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(tensor.stored(), bits)
            expected = expected.float()
        np.testing.assert_array_equal(tensor.numpy(), expected.numpy(), strict=True)


def test_reads_newer_element_types_and_nesting(torch: Any, tmp_path: Path) -> None:
    state = OrderedDict(a=[torch.arange(3).to(torch.uint16)], b={"c": torch.Size([1, 2])})
    torch.save(state, tmp_path / "s.pt")
    value = load(tmp_path / "s.pt")
    np.testing.assert_array_equal(value["a"][0].numpy(), np.arange(3, dtype=np.uint16), strict=True)
    assert value["b"]["c"] == (1, 2)


def test_old_files_cut_short(torch: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6)}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    path = tmp_path / "cut.bin"
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.bin"):
            load(path)
    path.write_bytes(whole[:-56] + struct.pack("<q", 2**60) + whole[-48:])
    with pytest.raises(FormatError, match=r"cut\.bin.*cut short"):
        load(path)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (), (0,)])
def test_torch_reads_what_is_saved(
    torch: Any, dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    save_tensor(tmp_path / "t.pt", values, b"a note, which torch does not look at")
    for options in ({"weights_only": True}, {"weights_only": False}, {"mmap": True}):
        read = torch.load(tmp_path / "t.pt", **options)
        np.testing.assert_array_equal(read.numpy(), values, strict=True)


def test_torch_and_this_package_refuse_the_same_modules(torch: Any, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(FormatError, match=r"module\.pt: its pickle asks for torch\.nn\."):
        load(tmp_path / "module.pt")
