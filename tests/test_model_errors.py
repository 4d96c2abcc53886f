"""Well-formed GGUF files that are no model: keys, shapes and types that do not fit together."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

import qinfer
from oracle.tiny import tiny_shape, write_tiny
from qinfer import Model
from qinfer._gguf import GGUF, Writer

KEYS = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
]


def rewritten(
    source: Path,
    path: Path,
    *,
    keys: Mapping[str, tuple[object, str] | None] | None = None,
    shapes: Mapping[str, tuple[int, ...] | None] | None = None,
) -> Path:
    """A copy with keys set to a (value, type) and tensors given another shape, or without them."""
    keys, shapes = dict(keys or {}), dict(shapes or {})
    with GGUF(source) as file, Writer(path) as writer:
        kept = {
            key: (file.metadata[key], file.value_type(key).removeprefix("array of "))
            for key in file.keys
        }
        for key, value in (kept | keys).items():
            if value is not None:
                writer.add(key, *value)
        tensors = [item for item in file.tensors if shapes.get(item.name, ()) is not None]
        for item in tensors:
            writer.add_tensor(item.name, shapes.get(item.name) or item.shape, item.type)
        for item in tensors:
            writer.write(item.data)
    return path


def tiny_opt(folder: Path) -> Path:
    """A random model with learned positions and no gate."""
    return write_tiny(folder / "opt.gguf", tiny_shape("opt", "f32"), "f32")


def refusal(path: Path, kind: type[qinfer.QInferError] = qinfer.FormatError) -> str:
    """What the error says; it names the file."""
    with pytest.raises(kind) as caught:
        Model(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- keys ----


@pytest.mark.parametrize("name", KEYS)
def test_a_missing_key_is_named(name: str, stories260k: Path, tmp_path: Path) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", keys={f"llama.{name}": None})
    assert f"'llama.{name}' is missing" in refusal(path)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (("12", "string"), "is of type string; wanted an integer"),
        ((5.0, "f32"), "is of type f32; wanted an integer"),
        ((-5, "i32"), "is -5; wanted 0 or more"),
        ((0, "u32"), "is 0, expected 1 to"),
        ((2**31, "u32"), "is 2147483648, expected 1 to"),
        ((2**63, "u64"), "is 9223372036854775808, expected 1 to"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_size_that_is_none_is_named(
    name: str, value: tuple[object, str], says: str, stories260k: Path, tmp_path: Path
) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", keys={f"llama.{name}": value})
    message = refusal(path)
    assert f"llama.{name}" in message
    assert says in message


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("attention.head_count", (7, "u32"), "7 heads cannot share 4 KV heads evenly"),
        ("attention.head_count_kv", (3, "u32"), "8 heads cannot share 3 KV heads evenly"),
        ("attention.head_count_kv", (16, "u32"), "8 heads cannot share 16 KV heads evenly"),
        ("attention.head_count_kv", (0, "u32"), "head_count_kv is 0, expected 1 to"),
        ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon' is missing"),
        ("attention.layer_norm_rms_epsilon", (math.nan, "f32"), "epsilon is nan, expected 0 to 1"),
        ("attention.layer_norm_rms_epsilon", (-1.0, "f32"), "epsilon is -1, expected 0 to 1"),
        ("attention.sliding_window", (-1, "i32"), "sliding_window': is -1; wanted 0 or more"),
        ("rope.dimension_count", (3, "u32"), "dimension_count is 3, expected an even number up to"),
        ("rope.dimension_count", (800, "u32"), "count is 800, expected an even number up to 8"),
        ("rope.freq_base", (0.0, "f32"), "freq_base is 0, expected 1 to"),
        ("rope.freq_base", (math.inf, "f32"), "freq_base is inf, expected 1 to"),
    ],
    ids=str,
)
def test_keys_that_do_not_fit_are_named(
    name: str, value: tuple[object, str] | None, says: str, stories260k: Path, tmp_path: Path
) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", keys={f"llama.{name}": value})
    assert says in refusal(path)


def test_rope_scaling_is_checked(stories260k: Path, tmp_path: Path) -> None:
    for kind, factor, says, error in (
        ("frob", 2.0, 'scaling.type is "frob"', qinfer.UnsupportedError),
        ("linear", 0.0, "scaling.factor is 0, expected", qinfer.FormatError),
        ("yarn", math.nan, "scaling.factor is nan, expected", qinfer.FormatError),
    ):
        keys = {
            "llama.rope.scaling.type": (kind, "string"),
            "llama.rope.scaling.factor": (factor, "f32"),
        }
        path = rewritten(stories260k, tmp_path / f"{kind}.gguf", keys=keys)
        assert says in refusal(path, error)


def test_experts_are_not_supported_and_it_is_said(stories260k: Path, tmp_path: Path) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", keys={"llama.expert_count": (8, "u32")})
    assert "mixture-of-experts" in refusal(path, qinfer.UnsupportedError)


def test_an_architecture_that_is_missing_or_no_string(stories260k: Path, tmp_path: Path) -> None:
    for value, says in ((None, "is missing"), ((5, "u32"), "is of type u32; wanted string")):
        path = rewritten(stories260k, tmp_path / "x.gguf", keys={"general.architecture": value})
        message = refusal(path)
        assert "general.architecture" in message
        assert says in message


@pytest.mark.parametrize("name", ["gptj", "", "LLAMA", "x" * 10_000, b"\xff\xfe"])
def test_an_unknown_architecture_is_refused_with_those_known(
    name: str | bytes, stories260k: Path, tmp_path: Path
) -> None:
    path = rewritten(
        stories260k, tmp_path / "x.gguf", keys={"general.architecture": (name, "string")}
    )
    message = refusal(path, qinfer.UnsupportedError)
    assert "general.architecture is '" in message
    assert message.endswith("this runtime knows llama, qwen2, falcon, opt, bamboo")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("swish", "qinfer.hidden_act is 'swish', not one of silu, relu, gelu, gelu_tanh"),
        ("fatrelu:-1", "qinfer.hidden_act is 'fatrelu:-1', not one of silu"),
        (b"\xff", "qinfer.hidden_act is '\\xff', not one of silu"),
    ],
)
def test_whose_activation_is_wrong(
    act: str | bytes, says: str, stories260k: Path, tmp_path: Path
) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", keys={"qinfer.hidden_act": (act, "string")})
    assert says in refusal(path, qinfer.UnsupportedError)
    # Asked for instead, it is the caller's fault; the file's is then of no interest.
    with pytest.raises(qinfer.ArgumentError, match=r"^hidden_act is 'swish', not one of silu"):
        Model(path, hidden_act="swish")
    Model(path, hidden_act="relu").close()


def test_an_activation_of_two_gates_needs_one(tmp_path: Path) -> None:
    path = tiny_opt(tmp_path)
    with pytest.raises(qinfer.ArgumentError, match=r"^hidden_act is relu_relu, which needs a gate"):
        Model(path, hidden_act="relu_relu")
    own = rewritten(
        path, tmp_path / "own.gguf", keys={"qinfer.hidden_act": ("relu_relu", "string")}
    )
    message = refusal(own, qinfer.UnsupportedError)
    assert "qinfer.hidden_act is relu_relu, which needs a gate; architecture opt has" in message


def test_a_context_beyond_the_learned_positions_is_refused_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_opt(tmp_path)
    with Model(path) as model:
        most = model.info.n_ctx_max
        assert most > 0
        says = f"n_ctx={most + 1} is more than the {most} positions .*position_embd.weight"
        with pytest.raises(qinfer.ArgumentError, match=says):
            model.context(n_ctx=most + 1)
    with pytest.raises(qinfer.ArgumentError, match=says):
        Model(path, n_ctx=most + 1)
    with Model(path, n_ctx=most) as model:
        assert model.context().info.n_ctx == most
    # What a file says of its training does not add positions either.
    boast = rewritten(path, tmp_path / "boast.gguf", keys={"opt.context_length": (most * 4, "u32")})
    with Model(boast) as model:
        assert model.n_ctx == most
        assert len(model.generate([3], max_tokens=None, ignore_eos=True).tokens) == most - 1
    assert not caplog.records


# ---- tensors ----


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.3.attn_q.weight"])
def test_a_missing_tensor_is_named(name: str, stories260k: Path, tmp_path: Path) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", shapes={name: None})
    assert f"tensor {name} is missing" in refusal(path)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("blk.0.attn_q.weight", (32, 128), "has shape [128, 32], expected [64, 64]"),
        ("blk.0.attn_q.weight", (4096,), "has shape [4096], expected [64, 64]"),
        ("token_embd.weight", (256, 128), "has shape [128, 256], expected [64, any]"),
        ("output_norm.weight", (1, 64), "has shape [64, 1], expected [64]"),
        ("output_norm.weight", (64, 1), "has shape [1, 64], expected [64]"),
    ],
)
def test_a_wrong_shape_is_named(
    name: str, shape: tuple[int, ...], says: str, stories260k: Path, tmp_path: Path
) -> None:
    path = rewritten(stories260k, tmp_path / "x.gguf", shapes={name: shape})
    assert f"tensor {name} {says}" in refusal(path)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        *((24, "type I8, which"), (20, "type IQ4_NL, which"), (39, "type MXFP4, which")),
        (99, "type number 99, which GGUF does not define"),
    ],
)
def test_a_type_that_is_not_computed_with_is_refused_by_name(
    number: int, name: str, stories260k: Path, tmp_path: Path
) -> None:
    data = bytearray(stories260k.read_bytes())
    tensor = b"blk.1.ffn_up.weight"
    # The name is followed by the number of dimensions, two of them, and the type.
    place = data.index(tensor) + len(tensor) + 4 + 2 * 8
    assert data[place : place + 4] == bytes(4)  # F32
    data[place : place + 4] = struct.pack("<I", number)
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    message = refusal(path, qinfer.UnsupportedError)
    assert tensor.decode() in message
    assert name in message


def test_names_that_are_too_long_are_file_errors() -> None:
    with pytest.raises(qinfer.FileError, match="cannot read: File name too long"):
        Model("a" * 5000)
