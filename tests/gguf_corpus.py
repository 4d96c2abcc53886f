"""GGUF files packed by hand, whole and broken, for the reader's tests and its fuzzer."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}
TENSOR_F32, TENSOR_F16, TENSOR_Q4_0, TENSOR_Q8_0, TENSOR_I32 = 0, 1, 2, 8, 26
POWERINFER_I32 = 18


def string(text: str | bytes) -> bytes:
    """A length and the bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(key: str | bytes, kind: int, item: object) -> bytes:
    """A key with one number, bool or string."""
    packed = (
        string(item) if isinstance(item, (str, bytes)) else struct.pack("<" + LETTERS[kind], item)
    )
    return string(key) + struct.pack("<I", kind) + packed


def array(key: str, kind: int, items: Sequence[object]) -> bytes:
    """A key with an array."""
    if kind == STRING:
        packed = b"".join(string(item) for item in items if isinstance(item, (str, bytes)))
    else:
        packed = struct.pack(f"<{len(items)}{LETTERS[kind]}", *items)
    return string(key) + struct.pack("<IIQ", ARRAY, kind, len(items)) + packed


def tensor(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor description; dims[0] is contiguous, the offset counts from the data section."""
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + shape + struct.pack("<IQ", kind, offset)


@dataclass(frozen=True)
class Layout:
    """The pieces of a file; counts are those of the lists unless given."""

    values: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    alignment: int = 32
    n_values: int | None = None
    n_tensors: int | None = None

    @property
    def header(self) -> bytes:
        """Magic to the last tensor description."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_values = len(self.values) if self.n_values is None else self.n_values
        counts = struct.pack("<QQ", n_tensors, n_values)
        return b"".join([self.magic, self.version, counts, *self.values, *self.tensors])

    @property
    def bytes(self) -> bytes:
        """The whole file."""
        header = self.header
        return header + bytes(-len(header) % self.alignment) + self.data


ALL_TYPES = [
    value("general.architecture", STRING, "none"),
    value("a.u8", U8, 255),
    value("a.i8", I8, -128),
    value("a.u16", U16, 65535),
    value("a.i16", I16, -32768),
    value("a.u32", U32, 2**32 - 1),
    value("a.i32", I32, -(2**31)),
    value("a.f32", F32, 0.5),
    value("a.bool", BOOL, True),
    value("a.u64", U64, 2**64 - 1),
    value("a.i64", I64, -(2**63)),
    value("a.f64", F64, 0.1),
    value("a.bytes", STRING, b"\xff\x00\xfe"),
    value("a.empty", STRING, ""),
    array("l.u8", U8, [0, 255]),
    array("l.bool", BOOL, [True, False, True]),
    array("l.i16", I16, [-1, 0, 1]),
    array("l.f64", F64, [0.0, -0.5]),
    array("l.string", STRING, ["", "ä", b"\x80", "the"]),
    array("l.nothing", U32, []),
    array("l.no strings", STRING, []),
]
THREE_TENSORS = [
    tensor("first", [3, 2], TENSOR_F32, 0),
    tensor("second", [32, 1, 2], TENSOR_Q8_0, 32),
    tensor("third", [5], TENSOR_I32, 128),
]
THREE_TENSORS_DATA = struct.pack("<6f", *range(6)) + bytes(8) + bytes(range(68)) + bytes(28)
THREE_TENSORS_DATA += struct.pack("<5i", *range(5)) + bytes(12)

WHOLE = Layout(ALL_TYPES, THREE_TENSORS, THREE_TENSORS_DATA)


def model(magic: bytes = b"GGUF") -> Layout:
    """A llama of one layer, 16 tokens and width 32, mostly Q4_0; with `PWRI`, the sparse kind."""
    n_embd, n_ff, n_vocab, n_pred = 32, 64, 16, 8
    words = ["<unk>", "<s>", "</s>", "<0x0A>", *(chr(ord("a") + i) for i in range(12))]
    values = [
        value("general.architecture", STRING, "llama"),
        value("llama.context_length", U32, 64),
        value("llama.embedding_length", U32, n_embd),
        value("llama.block_count", U32, 1),
        value("llama.feed_forward_length", U32, n_ff),
        value("llama.attention.head_count", U32, 2),
        value("llama.attention.head_count_kv", U32, 1),
        value("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        value("llama.rope.dimension_count", U32, 16),
        value("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, words),
        array("tokenizer.ggml.scores", F32, [-float(i) for i in range(n_vocab)]),
        array("tokenizer.ggml.token_type", I32, [2, 3, 3, 6, *[1] * 12]),
        value("tokenizer.ggml.bos_token_id", U32, 1),
        value("tokenizer.ggml.eos_token_id", U32, 2),
    ]
    shapes = {
        "token_embd.weight": [n_embd, n_vocab],
        "output_norm.weight": [n_embd],
        "output.weight": [n_embd, n_vocab],
        "blk.0.attn_norm.weight": [n_embd],
        "blk.0.attn_q.weight": [n_embd, n_embd],
        "blk.0.attn_k.weight": [n_embd, n_embd // 2],
        "blk.0.attn_v.weight": [n_embd, n_embd // 2],
        "blk.0.attn_output.weight": [n_embd, n_embd],
        "blk.0.ffn_norm.weight": [n_embd],
        "blk.0.ffn_gate.weight": [n_embd, n_ff],
        "blk.0.ffn_up.weight": [n_embd, n_ff],
    }
    if magic == b"PWRI":
        values.append(value("powerinfer.sparse_threshold", F32, 0.0))
        shapes["blk.0.ffn_down_t.weight"] = [n_embd, n_ff]
        shapes["blk.0.fc1.weight"] = [n_embd, n_pred]
        shapes["blk.0.fc2.weight"] = [n_pred, n_ff]
    else:
        shapes["blk.0.ffn_down.weight"] = [n_ff, n_embd]
    tensors, data = [], b""
    for name, dims in shapes.items():
        n = dims[0] * (dims[1] if len(dims) > 1 else 1)
        in_blocks = len(dims) > 1 and dims[0] % 32 == 0
        tensors.append(tensor(name, dims, TENSOR_Q4_0 if in_blocks else TENSOR_F32, len(data)))
        if in_blocks:
            codes = b"".join(
                (i * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8) * 2 for i in range(n // 32)
            )
            blocks = range(0, len(codes), 16)
            data += b"".join(struct.pack("<e", 0.01) + codes[i : i + 16] for i in blocks)
        else:
            data += struct.pack(f"<{n}f", *(((7 * i) % 15 + 1) / 16 for i in range(n)))
        data += bytes(-len(data) % 32)
    return Layout(values, tensors, data, magic=magic)


def gpu_index() -> Layout:
    """A PowerInfer file of neuron placements, whose integers have that format's own type number."""
    values = [
        value("general.architecture", STRING, "generic.gpu_index"),
        value("generic.gpu_index.block_count", U32, 1),
        value("split.vram_capacity", U64, 1 << 30),
    ]
    tensors = [
        tensor("blk.0.gpu_idx", [8], POWERINFER_I32, 0),
        tensor("blk.0.gpu_bucket", [4], POWERINFER_I32, 32),
    ]
    data = struct.pack("<8i", 1, 0, 1, 0, 1, 0, 1, 0) + struct.pack("<4i", 0, 2, 4, 6)
    return Layout(values, tensors, data, magic=b"PWRI")


def split_part(number: int, count: int = 3, n_tensors: int = 3) -> Layout:
    """Part `number` (from 0) of a model cut into files of one tensor each."""
    values = [
        value("split.no", U16, number),
        value("split.count", U16, count),
        value("split.tensors.count", I32, n_tensors),
    ]
    if number == 0:
        values.insert(0, value("general.architecture", STRING, "none"))
    described = tensor(f"part {number}", [4], TENSOR_F32, 0)
    return Layout(values, [described], struct.pack("<4f", *[float(number)] * 4))


def whole_files() -> dict[str, Layout]:
    """Well-formed files, one of each kind."""
    return {
        "all value types": WHOLE,
        "version 2": replace(WHOLE, version=struct.pack("<I", 2)),
        "nothing in it": Layout(),
        "keys only": Layout(ALL_TYPES, alignment=1),
        "one tensor": Layout([], [tensor("t", [1], TENSOR_F32, 0)], bytes(4)),
        "alignment 64": Layout(
            [value("general.alignment", U32, 64)],
            [tensor("t", [2, 3, 4, 5], TENSOR_F16, 64)],
            bytes(64 + 240),
            alignment=64,
        ),
        "unknown tensor type": Layout([], [tensor("t", [7], 99, 0)], bytes(32)),
        "llama": model(),
        "powerinfer": model(b"PWRI"),
        "gpu index": gpu_index(),
        "split": split_part(0, count=1, n_tensors=1),
    }


@dataclass(frozen=True)
class Broken:
    """A defective file, and what the message about it must contain."""

    name: str
    bytes: bytes
    says: tuple[str, ...]


def _foreign() -> Iterator[Broken]:
    yield Broken("empty", b"", ("empty",))
    yield Broken("one byte", b"G", ("not a GGUF file", "47"))
    yield Broken("safetensors", struct.pack("<Q", 80) + b'{"a":{"dtype":"F32"', ("safetensors",))
    yield Broken("zip", b"PK\x03\x04" + bytes(60), ("zip", "PyTorch"))
    yield Broken("pickle", b"\x80\x02}q\x00." + bytes(60), ("pickle",))
    yield Broken("web page", b"<!DOCTYPE html><html>", ("web page",))
    yield Broken("gzip", b"\x1f\x8b\x08" + bytes(60), ("gzip",))
    yield Broken("git lfs", b"version https://git-lfs.github.com/spec/v1\noid", ("git lfs pull",))
    yield Broken("ggjt", b"tjgg\x03\x00\x00\x00" + bytes(60), ("before GGUF",))
    yield Broken("text", b"hello world, this is text", ("not a GGUF file", "68 65 6c 6c"))
    yield Broken("zeros", bytes(4096), ("not a GGUF file", "00 00 00 00"))


def _versions() -> Iterator[Broken]:
    for number, says in {0: "version 0", 1: "version 1", 4: "version 4"}.items():
        yield Broken(says, replace(WHOLE, version=struct.pack("<I", number)).bytes, (says,))
    big = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    yield Broken("big-endian", big, ("big-endian",))


def _counts() -> Iterator[Broken]:
    for n in (100, 2**32, 2**61, 2**64 - 1):
        says = (f"{n} keys",) if n > 100 else ()
        yield Broken(f"{n} keys", replace(WHOLE, n_values=n).bytes, says)
        says = (f"{n} tensors",) if n > 100 else ()
        yield Broken(f"{n} tensors", replace(WHOLE, n_tensors=n).bytes, says)


def _with_value(packed: bytes) -> bytes:
    return Layout([*ALL_TYPES, packed], THREE_TENSORS, THREE_TENSORS_DATA).bytes


def _keys() -> Iterator[Broken]:
    yield Broken("key twice", _with_value(value("a.u8", U8, 1)), ("a.u8", "more than once"))
    yield Broken("key of no bytes", _with_value(value("", U8, 1)), ("key 21", "empty name"))
    not_utf8 = _with_value(value(b"bad\xc3\x28", U8, 1))
    yield Broken("key not utf-8", not_utf8, ("key 21", "UTF-8", "bad\\xc3("))
    long = _with_value(value("k" * 65536, U8, 1))
    yield Broken("key of 64 KiB", long, ("key 21", "65536"))
    lying = _with_value(struct.pack("<Q", 2**63) + b"lie")
    yield Broken("key length lies", lying, ("key 21", str(2**63)))
    kind = _with_value(string("odd.type") + struct.pack("<I", 13) + bytes(8))
    yield Broken("value type 13", kind, ("odd.type", "13"))
    kind = _with_value(string("odd.type") + struct.pack("<I", 2**31) + bytes(8))
    yield Broken("value type 2^31", kind, ("odd.type", str(2**31)))
    text = _with_value(string("odd.string") + struct.pack("<IQ", STRING, 2**64 - 1) + b"abc")
    yield Broken("string length lies", text, ("odd.string", str(2**64 - 1)))
    two = _with_value(string("odd.bool") + struct.pack("<IB", BOOL, 2))
    yield Broken("bool of 2", two, ("odd.bool", "2"))
    two = _with_value(string("odd.bools") + struct.pack("<IIQ3B", ARRAY, BOOL, 3, 0, 1, 255))
    yield Broken("bools of 255", two, ("odd.bools", "255"))


def _arrays() -> Iterator[Broken]:
    nested = struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQI", U32, 1, 7)
    yield Broken("nested array", _with_value(string("odd.nest") + nested), ("odd.nest", "arrays"))
    kind = _with_value(string("odd.items") + struct.pack("<IIQ", ARRAY, 77, 1) + bytes(8))
    yield Broken("item type 77", kind, ("odd.items", "77"))
    for item, size in ((U8, 1), (F64, 8), (STRING, 8)):
        for n in (10**6, 2**61, 2**64 // size - 1, 2**64 - 1):
            lie = string("odd.count") + struct.pack("<IIQ", ARRAY, item, n) + bytes(8)
            yield Broken(f"{n} items of type {item}", _with_value(lie), ("odd.count", str(n)))
    inner = struct.pack("<IIQ", ARRAY, STRING, 2) + string("fine") + struct.pack("<Q", 2**40)
    yield Broken("item length lies", _with_value(string("odd.text") + inner), ("odd.text",))


def _alignments() -> Iterator[Broken]:
    for n in (0, 1, 4, 33, 2**22, 2**31, 2**32 - 1):
        odd = Layout([value("general.alignment", U32, n)], THREE_TENSORS, THREE_TENSORS_DATA)
        yield Broken(f"alignment {n}", odd.bytes, ("general.alignment", str(n)))
    for kind, item in ((U64, 32), (I32, 32), (STRING, "32")):
        odd = Layout([value("general.alignment", kind, item)], THREE_TENSORS, THREE_TENSORS_DATA)
        yield Broken(f"alignment of type {kind}", odd.bytes, ("general.alignment", "u32"))


def _with_tensor(packed: bytes, data: bytes = bytes(4096)) -> bytes:
    return Layout([], [tensor("before", [8], TENSOR_F32, 0), packed], data).bytes


def _tensor_shapes() -> Iterator[Broken]:
    none = string("odd") + struct.pack("<IIQ", 0, TENSOR_F32, 32) + bytes(16)
    yield Broken("no dimensions", _with_tensor(none), ("'odd'", "0 dimensions"))
    five = tensor("odd", [1, 1, 1, 1, 1], TENSOR_F32, 32)
    yield Broken("five dimensions", _with_tensor(five), ("'odd'", "5 dimensions"))
    many = string("odd") + struct.pack("<I", 2**32 - 1)
    yield Broken("2^32 - 1 dimensions", _with_tensor(many), ("'odd'", "dimensions"))
    for dims in ([0], [4, 0], [0, 2**63, 2**63]):
        odd = _with_tensor(tensor("odd", dims, TENSOR_F32, 32))
        yield Broken(f"dimensions {dims}", odd, ("'odd'", "is 0"))
    for dims in ([2**63], [2**32, 2**32], [2**62, 2, 2, 2], [2**64 - 1] * 4):
        odd = _with_tensor(tensor("odd", dims, TENSOR_F32, 32))
        yield Broken(f"dimensions {dims}", odd, ("'odd'", "counted"))
    bytes_overflow = _with_tensor(tensor("odd", [2**62], TENSOR_F32, 32))
    yield Broken("2^64 bytes", bytes_overflow, ("'odd'", "bytes"))
    for n in (1, 31, 33):
        odd = _with_tensor(tensor("odd", [n, 32], TENSOR_Q4_0, 32))
        yield Broken(f"rows of {n} in blocks of 32", odd, ("'odd'", "Q4_0", str(n)))
    odd = _with_tensor(tensor("odd", [4], 2**32 - 1, 32))
    yield Broken("type 2^32 - 1", odd, ("'odd'", str(2**32 - 1)))


def _tensor_places() -> Iterator[Broken]:
    for offset in (33, 40, 2**63 + 1):
        odd = _with_tensor(tensor("odd", [4], TENSOR_F32, offset))
        yield Broken(f"offset {offset}", odd, ("'odd'", str(offset), "alignment"))
    for offset in (4096, 2**40, 2**63, 2**64 - 32):
        odd = _with_tensor(tensor("odd", [4], TENSOR_F32, offset))
        yield Broken(f"data at {offset}", odd, ("'odd'",))
    odd = _with_tensor(tensor("odd", [4096], TENSOR_F32, 32))
    yield Broken("data past the end", odd, ("'odd'", "ends at byte"))
    odd = _with_tensor(tensor("odd", [4], TENSOR_F32, 0))
    yield Broken("same place", odd, ("'odd'", "'before'"))
    inside = Layout(
        [],
        [tensor("wide", [64], TENSOR_F32, 0), tensor("odd", [4], TENSOR_F32, 64)],
        bytes(4096),
    )
    yield Broken("inside another", inside.bytes, ("'odd'", "'wide'"))
    inside = Layout(
        [], [tensor("odd", [4], 99, 32), tensor("wide", [64], TENSOR_F32, 0)], bytes(4096)
    )
    yield Broken("unknown type inside another", inside.bytes, ("'odd'", "'wide'"))
    yield Broken("no data", Layout([], THREE_TENSORS, b"").bytes, ("'first'", "ends at byte"))


def _tensor_names() -> Iterator[Broken]:
    twice = _with_tensor(tensor("before", [4], TENSOR_F32, 32))
    yield Broken("tensor twice", twice, ("'before'", "more than once"))
    empty = _with_tensor(tensor("", [4], TENSOR_F32, 32))
    yield Broken("tensor of no name", empty, ("tensor 1", "empty name"))
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82"):
        odd = _with_tensor(tensor(bad, [4], TENSOR_F32, 32))
        yield Broken(f"tensor named {bad!r}", odd, ("tensor 1", "UTF-8"))
    lying = _with_tensor(struct.pack("<Q", 2**62) + b"lie")
    yield Broken("tensor name length lies", lying, ("tensor 1", str(2**62)))


def _splits() -> Iterator[Broken]:
    odd = Layout([value("split.count", U16, 3)])
    yield Broken("split without a number", odd.bytes, ("split.no",))
    odd = Layout([value("split.count", U16, 3), value("split.no", U16, 3)])
    yield Broken("split part past the last", odd.bytes, ("split.no",))
    odd = Layout([value("split.count", U64, 2**64 - 1), value("split.no", U16, 0)])
    yield Broken("split of 2^64 - 1 parts", odd.bytes, ("split.count", str(2**64 - 1)))
    odd = Layout([value("split.count", STRING, "3")])
    yield Broken("split count of type string", odd.bytes, ("split.count", "string"))
    odd = Layout([value("split.count", I16, -3)])
    yield Broken("negative split count", odd.bytes, ("split.count", "-3"))


def broken_files() -> list[Broken]:
    """Every defect the reader knows, one file each."""
    groups = [_foreign, _versions, _counts, _keys, _arrays, _alignments]
    groups += [_tensor_shapes, _tensor_places, _tensor_names, _splits]
    return [case for group in groups for case in group()]
