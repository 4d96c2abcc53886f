"""The error family, what becomes of the runtime's statuses and log lines, and damaged models."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import qinfer
from oracle.tiny import tiny_shape, write_tiny
from qinfer import Model, _native
from qinfer._gguf import GGUF, Writer
from qinfer._native import ffi, lib

FAMILY = {
    qinfer.FormatError: ValueError,
    qinfer.ArgumentError: ValueError,
    qinfer.UnsupportedError: ValueError,
    qinfer.ContextFull: ValueError,
    qinfer.DeviceError: RuntimeError,
    qinfer.Busy: RuntimeError,
    qinfer.Closed: RuntimeError,
    qinfer.InternalError: RuntimeError,
    qinfer.OutOfMemory: MemoryError,
    qinfer.FileError: OSError,
    qinfer.Cancelled: Exception,
}
STATUSES = {
    "QI_FORMAT": qinfer.FormatError,
    "QI_ARGUMENT": qinfer.ArgumentError,
    "QI_IO": qinfer.FileError,
    "QI_MEMORY": qinfer.OutOfMemory,
    "QI_CONTEXT_FULL": qinfer.ContextFull,
    "QI_CANCELLED": qinfer.Cancelled,
    "QI_BUSY": qinfer.Busy,
    "QI_UNSUPPORTED": qinfer.UnsupportedError,
    "QI_DEVICE": qinfer.DeviceError,
    "QI_INTERNAL": qinfer.InternalError,
}


@pytest.mark.parametrize(("kind", "builtin"), FAMILY.items())
def test_each_error_is_ours_and_a_builtin(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, qinfer.QInferError)
    assert issubclass(kind, builtin)
    assert str(kind("what happened")) == "what happened"


def test_every_status_has_its_error() -> None:
    names = set(ffi.typeof("qi_status").relements) - {"QI_OK"}
    assert names == set(STATUSES)
    for name, kind in STATUSES.items():
        error = _native.new_error()
        error.message = b"gr\xc3\xbc\xc3\x9fe"
        with pytest.raises(kind, match=r"^grüße$") as caught:
            _native.check(getattr(lib, name), error)
        assert type(caught.value) is kind
    _native.check(lib.QI_OK)
    with pytest.raises(qinfer.InternalError, match="status 99"):
        _native.check(99)


def test_the_runtimes_log_goes_to_the_logger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unused = {"unheard-of.weight": np.zeros(4)}
    path = write_tiny(tmp_path / "tiny.gguf", tiny_shape("llama"), extra_tensors=unused)
    with caplog.at_level(logging.DEBUG, "qinfer"), Model(path):
        pass
    (record,) = [record for record in caplog.records if "unheard-of.weight" in record.message]
    assert (record.name, record.levelno) == ("qinfer", logging.WARNING)


def test_without_handlers_nothing_is_printed(stories260k: Path) -> None:
    code = "import sys, qinfer; qinfer.Model(sys.argv[1], n_ctx=600).generate('a', max_tokens=2)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, stories260k], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_handler_may_call_qinfer(stories260k: Path, tmp_path: Path) -> None:
    unused = {"unheard-of.weight": np.zeros(4)}
    path = write_tiny(tmp_path / "tiny.gguf", tiny_shape("llama"), extra_tensors=unused)
    texts = []

    class Generating(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with Model(stories260k) as model:
                texts.append(model.generate("Once", max_tokens=3, temperature=0).text)

    handler = Generating()
    _native.logger.addHandler(handler)
    try:
        with Model(path):
            pass
    finally:
        _native.logger.removeHandler(handler)
    assert texts == [" upon a time"]


def test_every_way_to_cut_a_model_short_is_an_error_with_its_name(
    stories260k: Path, tmp_path: Path
) -> None:
    data = stories260k.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 16_000, 997), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(qinfer.FormatError, match=r"cut\.gguf"):
            Model(path)


def test_flipped_bits_end_in_our_errors_or_in_a_model(stories260k: Path, tmp_path: Path) -> None:
    data = stories260k.read_bytes()
    path = tmp_path / "flipped.gguf"
    n_refused = 0
    for index in range(0, 14_192, 41):
        flipped = bytearray(data)
        flipped[index] ^= 1 << index % 8
        path.write_bytes(flipped)
        try:
            with Model(path, n_ctx=32) as model:
                model.generate("Once", max_tokens=2, temperature=0)
        except qinfer.QInferError as error:
            n_refused += 1
            assert str(error)
    assert n_refused > 20


def test_a_folder_in_place_of_a_file_and_a_file_without_rights(tmp_path: Path) -> None:
    with pytest.raises(qinfer.ArgumentError, match=r"without a \.gguf file"):
        Model(tmp_path)
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(qinfer.ArgumentError, match=r"a\.gguf"):
        Model(tmp_path / "a.gguf")
    (tmp_path / "text.gguf").write_text("this is not a model")
    with pytest.raises(qinfer.FormatError, match=r"text\.gguf"):
        Model(tmp_path / "text.gguf")


# ---- weights that are no numbers ----


def with_weights(path: Path, tensor: str, indices: Iterable[int], value: float) -> Path:
    """Overwrites some weights of an F32 tensor."""
    with GGUF(path) as file:
        (offset,) = [item.file_offset for item in file.tensors if item.name == tensor]
    data = np.fromfile(path, np.uint8)
    data[offset:][: len(data[offset:]) // 4 * 4].view(np.float32)[list(indices)] = value
    data.tofile(path)
    return path


@pytest.mark.parametrize(
    ("tensor", "index", "place"),
    [("output_norm.weight", 0, "row 0, column 0"), ("blk.2.attn_q.weight", 69, "row 1, column 5")],
)
def test_nan_weights_are_named_when_they_are_felt(
    tensor: str, index: int, place: str, stories260k: Path, tmp_path: Path
) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(stories260k.read_bytes())
    with (
        Model(with_weights(path, tensor, [index], math.nan)) as model,
        model.context() as context,
    ):
        context.feed([1, 2], hidden="last")
        for use in (
            lambda: model.generate("Once", max_tokens=2),
            lambda: model.generate(["Once", "Twice"], max_tokens=2),
            lambda: list(model.stream("Once")),
            lambda: model.score("Once upon"),
            lambda: model.embed("Once"),
            lambda: context.logits,
            lambda: context.all_logits,
            lambda: context.hidden,
            lambda: context.score([1, 2, 3]),
        ):
            with pytest.raises(qinfer.FormatError, match=rf"nan\.gguf: tensor {tensor} .* {place}"):
                use()


def test_nan_that_comes_with_a_generated_token_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "nan.gguf", tiny_shape("llama"))
    with Model(path) as model:
        first = model.generate([5, 6], max_tokens=1, temperature=0).tokens[0]
        n_embd = model.info.n_embd
    row = range(first * n_embd, first * n_embd + 1)
    with (
        Model(with_weights(path, "token_embd.weight", row, math.nan)) as model,
        pytest.raises(qinfer.FormatError, match=f"token_embd.weight .* row {first}, column 0"),
    ):
        model.generate([5, 6], max_tokens=3, temperature=0, ignore_eos=True)


def test_finite_weights_that_give_nan(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "huge.gguf", tiny_shape("llama"))
    with_weights(path, "blk.0.attn_v.weight", range(500), 3e38)
    with Model(path) as model, pytest.raises(qinfer.FormatError, match=r"huge\.gguf: .* too large"):
        model.score([5, 6, 7])


def test_memory_that_runs_out_is_told_by_what_and_how_much(
    stories260k: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.gguf"
    with Writer(path) as writer:
        writer.add("long", ["x" * 1000] * 40_000)
    script = """
import resource, sys, qinfer
from contextlib import contextmanager
from pathlib import Path
from qinfer._gguf import GGUF, Writer

@contextmanager
def at_most(more):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    except qinfer.OutOfMemory as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

with qinfer.Model(sys.argv[1], threads=1) as model:
    context = model.context(n_ctx=20000, n_batch=20000)
    with at_most(12 << 20):
        context.feed([5] * 19000)
    context.feed([5] * 10)
    print(context.length())
with GGUF(sys.argv[2]) as file:
    with at_most(12 << 20):
        file.raw_strings("long")
    print(len(file.raw_strings("long")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(stories260k), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        f"no memory for {19000 * 64 * 4} bytes of working space",
        "10",
        "no memory is left for what qi_gguf_kv_strings needs",
        "40000",
    ], done.stderr
