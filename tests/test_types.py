"""Tensor types: block bytes and values against `gguf.quants`, and what is refused."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from qinfer import _native, _types
from qinfer.errors import ArgumentError, UnsupportedError

IN_BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
ENCODED = ["F32", "F16", "BF16", *IN_BLOCKS]  # which the oracle encodes, too
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
COMPUTED = [*ENCODED, *K_TYPES]
SCALE_BYTES = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4, "Q5_0": 2, "Q5_1": 4}

FLOAT_MAX = np.finfo(np.float32).max


def oracle_decode(blocks: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, GGMLQuantizationType[name])


def oracle_encode(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        return gguf.quantize(values, GGMLQuantizationType[name]).view(np.uint8)


def assert_same_floats(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Bit for bit, the sign of zero included; any NaN equals any other."""
    assert ours.shape == theirs.shape
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


# ---- the table ----


def test_every_gguf_type_is_listed_as_gguf_lists_it() -> None:
    ours = {t.name: (t.number, t.block_size, t.block_bytes) for t in _types.known_types().values()}
    theirs = {t.name: (t.value, *gguf.GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType}
    assert ours == theirs


def test_what_is_computed_and_what_is_encoded() -> None:
    types = _types.known_types().values()
    assert {t.name for t in types if t.can_decode} == set(COMPUTED)
    assert {t.name for t in types if t.can_encode} == set(COMPUTED)


def test_the_list_of_types_ends() -> None:
    out = _native.ffi.new("qi_type_info *")
    n_types = len(GGMLQuantizationType)
    assert _native.lib.qi_type_by_index(n_types - 1, out) == _native.lib.QI_OK
    for index in (n_types, -1, 2**31 - 1):
        assert _native.lib.qi_type_by_index(index, out) == _native.lib.QI_ARGUMENT
    assert _native.lib.qi_type_by_index(0, _native.ffi.NULL) == _native.lib.QI_ARGUMENT


# ---- blocks to floats ----


@pytest.mark.parametrize("name", COMPUTED)
def test_decoding_any_bytes_gives_the_oracles_floats(name: str) -> None:
    kind = _types.tensor_type(name)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (37, 8 * kind.block_bytes), dtype=np.uint8)
    assert_same_floats(_types.decode(blocks, name), oracle_decode(blocks, name))


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_decoding_bytes_that_are_all_alike(name: str, byte: int) -> None:
    blocks = np.full((1, _types.tensor_type(name).block_bytes), byte, np.uint8)
    assert_same_floats(_types.decode(blocks, name), oracle_decode(blocks, name))


@pytest.mark.parametrize("name", COMPUTED)
def test_blocks_need_no_alignment(name: str) -> None:
    kind = _types.tensor_type(name)
    data = np.random.default_rng(2).integers(0, 256, 6 * kind.block_bytes + 1, dtype=np.uint8)
    blocks = data[1:]
    assert blocks.ctypes.data % 2 == 1
    values = np.empty(6 * kind.block_size, np.float32)
    error = _native.new_error()
    status = _native.lib.qi_type_decode(
        kind.number,
        _native.ffi.from_buffer(blocks),
        values.size,
        _native.ffi.from_buffer("float[]", values),
        error,
    )
    _native.check(status, error)
    assert_same_floats(values, oracle_decode(blocks.copy(), name))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_decodes_to_its_value(name: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    if name == "F16":
        expected = bits.view(np.float16).astype(np.float32)
    else:
        expected = (bits.astype(np.uint32) << 16).view(np.float32)
    assert_same_floats(_types.decode(bits.view(np.uint8), name), expected)


# ---- floats to blocks ----


def samples() -> dict[str, NDArray[np.float32]]:
    """Rows of 256 finite values, in ranges that every block format can hold."""
    rng = np.random.default_rng(3)
    shape = (64, 256)
    halves = rng.integers(-64, 65, shape) / 2
    sparse = np.zeros(shape)
    sparse[np.arange(64), rng.integers(0, 256, 64)] = rng.standard_normal(64)
    signs = rng.choice([-1.0, 1.0], shape)
    found = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.uniform(0, 1, shape),
        "negative": -rng.uniform(0.5, 1, shape),
        "zeros": np.zeros(shape),
        "negative zeros": np.full(shape, -0.0),
        "constant": np.full(shape, 0.7),
        "negative constant": np.full(shape, -0.7),
        "ties of magnitude": signs,
        "ties of magnitude after zero": np.where(rng.random(shape) < 0.5, 0.0, signs * 3),
        "halves": halves,
        "one in 256": sparse,
        "scales of all sizes": rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 11, (64, 1)),
        "values of all sizes": rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 11, shape),
        "around the least half": rng.standard_normal(shape)
        * 2.0 ** rng.integers(-30, -20, (64, 1)),
        "ramp": np.linspace(-127, 127, 64 * 256).reshape(shape),
        "integers": rng.integers(-127, 128, shape),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def extremes() -> dict[str, NDArray[np.float32]]:
    """Rows whose scale is beyond f16, or whose scale has no finite inverse in f32."""
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**32, (256, 256), dtype=np.uint32)
    any_bits = bits.view(np.float32)
    any_bits[~np.isfinite(any_bits)] = 1.0
    denormal = (bits & 0x807FFFFF).view(np.float32)
    least = np.zeros((4, 256), np.float32)
    least[:, ::7] = np.float32(1e-45)
    least[1::2] *= -1
    greatest = rng.choice([-FLOAT_MAX, FLOAT_MAX], (16, 256)).astype(np.float32)
    return {
        "any finite bits": any_bits,
        "denormal": denormal,
        "the least numbers": least,
        "the greatest numbers": greatest,
        "greatest of one sign": np.abs(greatest),
        "beyond f16": rng.standard_normal((16, 256)).astype(np.float32) * np.float32(1e8),
        "a range beyond f32": np.linspace(-1, 1, 256, dtype=np.float32)[None] * FLOAT_MAX,
    }


@pytest.mark.parametrize("sample", samples())
@pytest.mark.parametrize("name", ENCODED)
def test_encoding_gives_the_oracles_bytes(name: str, sample: str) -> None:
    values = samples()[sample]
    np.testing.assert_array_equal(_types.encode(values, name), oracle_encode(values, name))


@pytest.mark.parametrize("sample", extremes())
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_encoding_extremes_as_plain_types(name: str, sample: str) -> None:
    values = extremes()[sample]
    np.testing.assert_array_equal(_types.encode(values, name), oracle_encode(values, name))


@pytest.mark.parametrize("sample", extremes())
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_encoding_extremes_as_blocks(name: str, sample: str) -> None:
    values = extremes()[sample].reshape(-1, 32)
    ours, theirs = _types.encode(values, name), oracle_encode(values, name)
    n = SCALE_BYTES[name]
    np.testing.assert_array_equal(ours[:, :n], theirs[:, :n])
    # Where the scale's inverse or the range is not finite, the oracle casts infinities to integers,
    # which each kind of machine does in its own way; our codes are 0 there.
    with np.errstate(all="ignore"):
        low, high = values.min(axis=1), values.max(axis=1)
        span = high - low if name.endswith("_1") else np.abs(values).max(axis=1)
        steps = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}[name]
        scale = span / np.float32(steps)
        sound = (scale == 0) | np.isfinite(1 / scale) & np.isfinite(span)
    np.testing.assert_array_equal(ours[sound], theirs[sound])
    assert not ours[~sound][:, n:].any()


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_round_to_nearest_even(name: str) -> None:
    """Each float halfway between two neighbours, and the floats right beside that one."""
    bits = np.arange(65536, dtype=np.uint32)
    with np.errstate(all="ignore"):
        as_half = bits.astype(np.uint16).view(np.float16).astype(np.float64)
        if name == "BF16":
            as_half = (bits << 16).view(np.float32).astype(np.float64)
        middle = ((as_half[:-1] + as_half[1:]) / 2).astype(np.float32)
    middle = middle[np.isfinite(middle)]
    below, above = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
    values = np.concatenate([middle, below, above])
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(_types.encode(values, name), oracle_encode(values, name))


@pytest.mark.parametrize("name", ENCODED)
def test_what_was_encoded_decodes_within_a_step(name: str) -> None:
    values = samples()["normal"]
    decoded = _types.decode(_types.encode(values, name), name)
    steps = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}
    span = np.abs(values).max()
    assert np.abs(decoded - values).max() <= steps.get(name, 1 / 7) * span


# ---- floats to blocks of 256, which the oracle does not encode ----


@dataclass(frozen=True)
class Layout:
    """A K type: groups of values share an integer scale, and a minimum if `ranged`."""

    group: int
    lowest: int  # code
    highest: int
    max_scale: int
    ranged: bool
    error: float  # root mean square over normal values, relative, at most


LAYOUTS = {
    "Q2_K": Layout(16, 0, 3, 15, True, 0.27),
    "Q3_K": Layout(16, -4, 3, 31, False, 0.145),
    "Q4_K": Layout(32, 0, 15, 63, True, 0.071),
    "Q5_K": Layout(32, 0, 31, 63, True, 0.0352),
    "Q6_K": Layout(16, -32, 31, 127, False, 0.0170),
}


def plainly_rounded(values: NDArray[np.float32], layout: Layout) -> NDArray[np.float64]:
    """Values after the simplest encoding: each group's range spread over the codes."""
    x = values.astype(np.float64).reshape(-1, 256 // layout.group, layout.group)
    if layout.ranged:
        low = np.minimum(x.min(axis=2), 0)
        scale = (np.maximum(x.max(axis=2), 0) - low) / layout.highest
    else:
        low = np.zeros(x.shape[:2])
        scale = np.abs(x).max(axis=2) / layout.highest

    def in_steps(parts: NDArray[np.float64]) -> NDArray[np.float64]:
        step = np.abs(parts).max(axis=1, keepdims=True) / layout.max_scale
        step[step == 0] = 1
        return np.round(parts / step) * step

    scale, low = in_steps(scale), in_steps(low)
    safe = np.where(scale == 0, 1, scale)[..., None]
    codes = np.clip(np.round((x - low[..., None]) / safe), layout.lowest, layout.highest)
    return (codes * scale[..., None] + low[..., None]).reshape(values.shape)


def rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).mean()))


def round_trip(
    values: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    return oracle_decode(_types.encode(values, name, importance=importance), name)


@pytest.mark.parametrize("sample", samples())
@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_err_less_than_plain_rounding(name: str, sample: str) -> None:
    values = samples()[sample]
    plain = rms(plainly_rounded(values, LAYOUTS[name]) - values)
    # Below the least half no scale can be as it should.
    slack = 2.0**-24 if sample == "around the least half" else 3e-3 * rms(values)
    assert rms(round_trip(values, name) - values) <= plain + slack


@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_err_no_more_than_they_should(name: str) -> None:
    values = np.random.default_rng(5).standard_normal((64, 1024)).astype(np.float32)
    assert rms(round_trip(values, name) - values) < LAYOUTS[name].error


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_stay_zeros_in_k_types(name: str, value: float) -> None:
    blocks = _types.encode(np.full((1, 512), value, np.float32), name)
    assert not oracle_decode(blocks, name).any()
    assert np.isfinite(oracle_decode(blocks, name)).all()


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("value", [0.7, -0.7, 0.05, 60000.0, -1e5])
def test_constants_in_k_types(name: str, value: float) -> None:
    values = np.full((1, 256), value, np.float32)
    np.testing.assert_allclose(round_trip(values, name), values, rtol=2e-3)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
@pytest.mark.parametrize("value", [0.02, 0.031, 1.7])
def test_groups_that_are_alike_come_to_the_same_scale(name: str, value: float) -> None:
    signs = np.random.default_rng(12).choice([-1, 1], (8, 256))
    values = (signs * value).astype(np.float32)
    decoded = round_trip(values, name)
    assert [len(np.unique(block)) for block in decoded] == [2] * len(decoded)
    np.testing.assert_allclose(decoded, values, rtol=1e-3)


@pytest.mark.parametrize("name", K_TYPES)
def test_zero_groups_stay_zero_beside_others(name: str) -> None:
    values = np.random.default_rng(6).standard_normal((8, 256)).astype(np.float32)
    values[:, 64:96] = 0
    assert not round_trip(values, name)[:, 64:96].any()


@pytest.mark.parametrize("sample", extremes())
@pytest.mark.parametrize("name", K_TYPES)
def test_extremes_stay_finite_in_k_types(name: str, sample: str) -> None:
    values = extremes()[sample]
    decoded = round_trip(values, name).astype(np.float64)
    assert np.isfinite(decoded).all()
    # Zeros would be no worse a copy of the block; numbers too large come as the largest there is.
    error = np.square(decoded - values).reshape(-1, 256).sum(axis=1)
    of_zeros = np.square(values.astype(np.float64)).reshape(-1, 256).sum(axis=1)
    assert (error <= of_zeros * 1.0001).all()


@pytest.mark.parametrize("name", K_TYPES)
def test_a_blocks_bytes_depend_on_nothing_but_its_values(name: str) -> None:
    values = np.random.default_rng(7).standard_normal((6, 1024)).astype(np.float32)
    together = _types.encode(values, name)
    alone = np.stack([_types.encode(block, name) for block in values.reshape(-1, 256)])
    np.testing.assert_array_equal(together.reshape(alone.shape), alone)


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_moves_the_error_to_where_it_matters_less(name: str) -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.where(rng.random(512) < 0.2, 50.0, 0.5).astype(np.float32)
    plain, steered = round_trip(values, name), round_trip(values, name, importance)
    weight = np.sqrt(importance)
    assert rms((steered - values) * weight) < 0.97 * rms((plain - values) * weight)
    assert rms(steered - values) > rms(plain - values)


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("weight", [0.0, 1.0, 8.0])
def test_importance_that_is_the_same_everywhere_changes_nothing(name: str, weight: float) -> None:
    values = np.random.default_rng(9).standard_normal((4, 512)).astype(np.float32)
    same = np.full(512, weight, np.float32)
    np.testing.assert_array_equal(
        _types.encode(values, name, importance=same), _types.encode(values, name)
    )


@pytest.mark.parametrize("name", K_TYPES)
def test_what_has_no_importance_still_stays_in_range(name: str) -> None:
    values = np.random.default_rng(10).standard_normal((16, 256)).astype(np.float32)
    importance = np.zeros(256, np.float32)
    importance[::3] = 1
    assert np.abs(round_trip(values, name, importance)).max() < 2 * np.abs(values).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("name", ["Q4_K", "Q4_0"])
def test_importance_that_is_no_weight_is_refused_by_column(name: str, bad: float) -> None:
    importance = np.ones(256, np.float32)
    importance[41] = bad
    with pytest.raises(ArgumentError, match="column 41"):
        _types.encode(np.ones((2, 256), np.float32), name, importance=importance)
    with pytest.raises(ArgumentError, match=r"\(255,\)"):
        _types.encode(np.ones((2, 256), np.float32), name, importance=importance[1:])
    ones = np.ones((2, 256), np.float32).view(np.uint8)
    with pytest.raises(ArgumentError, match="column 41"):
        _types.convert(ones.reshape(-1), "F32", name, (2, 256), importance=importance)


def peers_blocks(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """The blocks of llama.cpp's own quantiser."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python, whose errors ours are compared with, is not here"
    )
    library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    if not library.is_file():
        pytest.skip(f"this llama-cpp-python has no {library.name} to compare with")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    kind = _types.tensor_type(name)
    n_rows, n_cols = values.shape
    blocks = np.empty((n_rows, n_cols // 256 * kind.block_bytes), np.uint8)
    function(kind.number, values.ctypes.data, blocks.ctypes.data, 0, n_rows, n_cols, None)
    return blocks


@pytest.mark.parametrize("sample", ["normal", "uniform", "positive", "heavy tails", "sparse"])
@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_err_less_than_llama_cpp(name: str, sample: str) -> None:
    rng = np.random.default_rng(11)
    shape = (32, 2048)
    values = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.uniform(0, 1, shape),
        "heavy tails": rng.standard_t(3, shape),
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    }[sample].astype(np.float32)
    theirs = oracle_decode(peers_blocks(values, name), name)
    assert rms(round_trip(values, name) - values) < rms(theirs - values)


# ---- blocks to other blocks ----


@pytest.mark.parametrize("new", COMPUTED)
@pytest.mark.parametrize("old", COMPUTED)
def test_converting_is_decoding_and_encoding(old: str, new: str) -> None:
    rng = np.random.default_rng(13)
    values = rng.standard_normal((3, 1280)).astype(np.float32)  # more than what is done at a time
    importance = rng.random(1280).astype(np.float32)
    blocks = _types.encode(values, old)
    for weights in (None, importance):
        converted = _types.convert(blocks.reshape(-1), old, new, values.shape, importance=weights)
        expected = blocks
        if new != old:
            expected = _types.encode(_types.decode(blocks, old), new, importance=weights)
        np.testing.assert_array_equal(converted, expected.reshape(-1))


@pytest.mark.parametrize("n", [1, 3, 31, 1025])
def test_rows_of_any_length_convert_between_plain_types(n: int) -> None:
    values = np.random.default_rng(14).standard_normal((5, n)).astype(np.float32)
    half = _types.convert(values.view(np.uint8).reshape(-1), "F32", "F16", values.shape)
    np.testing.assert_array_equal(half.view(np.float16), values.astype(np.float16).reshape(-1))


@pytest.mark.parametrize(
    ("old", "new", "bad", "rule"),
    [
        ("F32", "F16", np.nan, "NaN"),
        ("F16", "Q4_0", np.nan, "NaN"),
        ("F16", "F16", -np.inf, "infinite"),
        ("BF16", "Q6_K", np.inf, "infinite"),
        ("F32", "Q8_0", 65536.0, "65504"),
        ("BF16", "F16", -65536.0, "65504"),
        ("F32", "BF16", FLOAT_MAX, "3.38953e.38"),
    ],
)
def test_converting_refuses_what_the_type_cannot_hold(
    old: str, new: str, bad: float, rule: str
) -> None:
    values = np.ones((2, 2048), np.float32)
    values[1, 1500] = bad
    blocks = oracle_encode(values, old).reshape(-1)
    with pytest.raises(ArgumentError, match=rf"{new}: value {2048 + 1500} is .*{rule}"):
        _types.convert(blocks, old, new, values.shape)


def test_the_greatest_value_of_a_type_converts() -> None:
    for name, value in [("F16", 65504.0), ("Q8_0", 65504.0), ("F32", FLOAT_MAX)]:
        values = np.full((1, 256), value, np.float32)
        blocks = _types.convert(values.view(np.uint8).reshape(-1), "F32", name, values.shape)
        assert np.isfinite(oracle_decode(blocks, name)).all()


# ---- what is refused ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", COMPUTED)
def test_values_that_are_not_finite_are_refused_by_position(name: str, bad: float) -> None:
    values = np.ones((3, 256), np.float32)
    values[1, 37] = bad
    with pytest.raises(ArgumentError, match=rf"{name}.* {256 + 37} "):
        _types.encode(values, name)


def call(function: str, *arguments: object) -> None:
    error = _native.new_error()
    _native.check(getattr(_native.lib, function)(*arguments, error), error)


def test_types_that_are_not_computed_with_are_refused() -> None:
    ffi = _native.ffi
    blocks, values = ffi.new("char[64]"), ffi.new("float[16]")
    with pytest.raises(UnsupportedError, match="I32"):
        call("qi_type_decode", 26, blocks, 16, values)
    with pytest.raises(UnsupportedError, match="IQ4_NL"):
        call("qi_type_encode", 20, values, 16, 16, ffi.NULL, blocks)
    for number in (99, 4, -1, 2**31 - 1):
        with pytest.raises(ArgumentError, match=str(number)):
            call("qi_type_decode", number, blocks, 16, values)


def test_bad_arguments_are_refused() -> None:
    ffi = _native.ffi
    blocks, values = ffi.new("char[68]"), ffi.new("float[64]")
    null = ffi.NULL
    with pytest.raises(ArgumentError, match="'blocks' is NULL"):
        call("qi_type_decode", 8, null, 32, values)
    with pytest.raises(ArgumentError, match="'out' is NULL"):
        call("qi_type_decode", 8, blocks, 32, null)
    with pytest.raises(ArgumentError, match=r"n_elements is 33.*32"):
        call("qi_type_decode", 8, blocks, 33, values)
    with pytest.raises(ArgumentError, match="n_elements is 18446744073709551584"):
        call("qi_type_decode", 8, blocks, 2**64 - 32, values)
    with pytest.raises(ArgumentError, match="'values' is NULL"):
        call("qi_type_encode", 8, null, 32, 32, null, blocks)
    with pytest.raises(ArgumentError, match="'blocks' is NULL"):
        call("qi_type_encode", 8, values, 32, 32, null, null)
    with pytest.raises(ArgumentError, match="n_per_row is 16"):
        call("qi_type_encode", 8, values, 32, 16, null, blocks)
    with pytest.raises(ArgumentError, match="n_per_row, 0"):
        call("qi_type_encode", 8, values, 32, 0, null, blocks)
    with pytest.raises(ArgumentError, match=r"n_elements is 32.*n_per_row, 64"):
        call("qi_type_encode", 8, values, 32, 64, null, blocks)
    with pytest.raises(ArgumentError, match="'blocks' is NULL"):
        call("qi_type_convert", 8, null, 32, 32, null, 0, values)
    with pytest.raises(ArgumentError, match=r"n_per_row is 32.*Q4_K.*256"):
        call("qi_type_convert", 8, blocks, 32, 32, null, 12, values)
    with pytest.raises(ArgumentError, match=r"n_elements is 32.*n_per_row, 64"):
        call("qi_type_convert", 8, blocks, 32, 64, null, 0, values)
    with pytest.raises(UnsupportedError, match="IQ4_NL"):
        call("qi_type_convert", 8, blocks, 32, 32, null, 20, values)
    assert _native.lib.qi_type_decode(8, null, 32, values, null) == _native.lib.QI_ARGUMENT
