"""`Model`: chatting, scoring, embedding, its life, and what bad arguments get."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qinfer
from qinfer import Model

PROMPT = "Once upon a time"
OTHER_PROMPTS = [PROMPT, "Lily and Tom", "The big red dog", "Once upon a day there was"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(stories260k: Path) -> Iterator[Model]:
    with Model(stories260k) as model:
        yield model


# ---- chat ----


def test_chat_answers_by_the_template_with_one_bos(stories260k: Path) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    with Model(stories260k, chat_template=TEMPLATE) as model:
        expected = model.generate(PROMPT, max_tokens=15, temperature=0)
        answer = model.chat(messages, max_tokens=15, temperature=0)
        assert answer.tokens == expected.tokens
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
        pieces = model.stream_chat(messages, max_tokens=15, temperature=0)
        assert "".join(piece.text for piece in pieces) == answer.text

        async def read() -> str:
            stream = model.astream_chat(messages, max_tokens=15, temperature=0)
            return "".join([piece.text async for piece in stream])

        assert asyncio.run(read()) == answer.text


def test_a_model_without_a_template_says_so(model: Model) -> None:
    with pytest.raises(qinfer.FormatError, match="no chat template"):
        model.chat([{"role": "user", "content": "Hello"}])


# ---- scores and embeddings ----


def test_score_is_the_log_softmax_of_the_logits(model: Model) -> None:
    score = model.score(PROMPT)
    with model.context() as context:
        context.feed(score.tokens, logits="all")
        logits = context.all_logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[i, token] for i, token in enumerate(score.tokens[1:])]
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)
    assert score.logprob == pytest.approx(np.sum(expected), rel=1e-5)
    assert model.score(score.tokens).logprobs.tolist() == score.logprobs.tolist()


def test_one_token_cannot_be_scored(model: Model) -> None:
    with pytest.raises(qinfer.ArgumentError, match="nothing to score"):
        model.score("")


def test_embeddings_pool_the_hidden_states(model: Model) -> None:
    each = model.embed(PROMPT, pooling="none", normalize=False)
    assert each.shape == (len(model.tokenizer.encode(PROMPT)), model.info.n_embd)
    assert each.dtype == np.float32
    np.testing.assert_allclose(model.embed(PROMPT, normalize=False), each.mean(0), atol=1e-6)
    assert np.array_equal(model.embed(PROMPT, pooling="last", normalize=False), each[-1])
    assert np.array_equal(model.embed(PROMPT, pooling="cls", normalize=False), each[0])
    unit = model.embed(OTHER_PROMPTS)
    assert unit.shape == (4, model.info.n_embd)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert np.array_equal(unit[0], model.embed(PROMPT))
    several = model.embed(OTHER_PROMPTS, pooling="none")
    assert [len(part) for part in several] == [
        len(model.tokenizer.encode(prompt)) for prompt in OTHER_PROMPTS
    ]
    assert model.embed([]).shape == (0, model.info.n_embd)
    with pytest.raises(qinfer.ArgumentError, match="pooling"):
        model.embed(PROMPT, pooling="max")  # type: ignore[call-overload]


# ---- the model itself ----


def test_facts(model: Model) -> None:
    info = model.info
    assert (info.architecture, info.n_vocab, info.n_embd) == ("llama", 512, 64)
    assert (info.n_layer, info.n_head, info.n_head_kv, info.n_ctx_train) == (5, 8, 4, 512)
    assert model.n_ctx == 512
    assert model.metadata["general.architecture"] == "llama"
    assert info.n_params == pytest.approx(260_000, rel=0.01)


def test_a_closed_model_says_so_and_closes_twice(stories260k: Path) -> None:
    model = Model(stories260k)
    context = model.context()
    stream = model.stream(PROMPT)
    next(stream)
    model.close()
    model.close()
    assert model.closed
    assert context.closed
    for use in (
        lambda: model.generate(PROMPT),
        lambda: model.generate([1]),
        lambda: model.stream(PROMPT),
        lambda: model.score(PROMPT),
        lambda: model.embed(PROMPT),
        lambda: model.context(),
        lambda: model.placement,
        lambda: context.feed([1]),
        lambda: context.placement,
        lambda: next(stream),
    ):
        with pytest.raises(qinfer.Closed, match="is closed"):
            use()
    assert model.info.n_vocab == 512


def test_dropping_a_model_frees_it_at_once(stories260k: Path) -> None:
    gc.disable()
    try:
        model = Model(stories260k)
        model.generate(PROMPT, max_tokens=2)
        context = model.context()
        context.feed([1, 2, 3])
        parts = [model, model._weights, model._weights.file, context]
        held = [weakref.ref(part) for part in parts]
        del model, context, parts
        assert [ref() for ref in held] == [None] * 4
    finally:
        gc.enable()


def resident() -> int:
    """Bytes of memory this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_loading_and_closing_leaks_nothing(stories260k: Path) -> None:
    after_fifth = 0
    for number in range(50):
        with Model(stories260k) as model:
            model.generate(PROMPT, max_tokens=10)
            with model.context(n_seq=2) as context:
                context.feed([1, 2, 3])
        if number == 4:
            after_fifth = resident()
    assert resident() - after_fifth < 2 << 20


def test_a_larger_vocabulary_leaks_nothing_either(smollm2: Path) -> None:
    """Its 100,000 small objects leave holes in Python's and the C library's heaps.

    Those are used again: what is resident nears the most that was ever in use, which takes about
    ten loads. The runtime's own memory is constant from the first.
    """
    script = """
import os, sys
from qinfer import Model

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for number in range(25):
    with Model(sys.argv[1], n_ctx=256) as model:
        model.chat([{"role": "user", "content": "Hi"}], max_tokens=1)
    if number == 9:
        after_tenth = resident()
    if number == 0:
        after_first = resident()
print(after_tenth - after_first, resident() - after_tenth)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True, check=True
    )
    at_first, later = map(int, done.stdout.split())
    assert later < 2 << 20
    assert at_first < 16 << 20


def test_a_model_pickles_as_its_arguments(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stories260k.parent)
    with Model(stories260k.name, n_ctx=100, threads=1, chat_template=TEMPLATE) as model:
        expected = model.generate(PROMPT, max_tokens=5, temperature=0).tokens
        data = pickle.dumps(model)
    monkeypatch.chdir(tmp_path)
    with pickle.loads(data) as again:
        assert again.n_ctx == 100
        assert again.context().info.threads == 1
        assert again.generate(PROMPT, max_tokens=5, temperature=0).tokens == expected
        assert again.chat([{"role": "user", "content": "a"}], max_tokens=1).tokens


def test_reading_instead_of_mapping_gives_the_same(stories260k: Path, model: Model) -> None:
    expected = model.generate(PROMPT, max_tokens=10, temperature=0).tokens
    with Model(stories260k, mmap=False) as read:
        assert read.generate(PROMPT, max_tokens=10, temperature=0).tokens == expected


def test_keys_and_values_that_fill_no_block_are_refused_at_once(stories260k: Path) -> None:
    with pytest.raises(qinfer.ArgumentError, match=r"'q8_0' needs .* multiple of 32 .* have 8"):
        Model(stories260k, kv_type="q8_0")


def test_the_context_is_limited_by_memory_and_it_is_said(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qinfer._context_length._LEAST_N_CTX", 64)
    monkeypatch.setattr("qinfer._machine.available_memory", lambda: 640 * 100 * 4)
    with caplog.at_level(logging.WARNING, "qinfer"), Model(stories260k) as model:
        assert model.n_ctx == 100
    assert "limited to 100 of 512" in caplog.text


def test_a_context_beyond_training_is_warned_of(
    stories260k: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qinfer"), Model(stories260k, n_ctx=600) as model:
        assert model.n_ctx == 600
        model.context().close()  # which has been said
        (record,) = caplog.records
        assert record.message == "n_ctx=600 is more than the 512 the model was trained for"
        model.context(n_ctx=700).close()
    assert caplog.records[-1].message.startswith("n_ctx=700 is more than the 512")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("device", "reason"), [("cann", "does not compute on Ascend"), ("cuda:99", "GPU|driver")]
)
def test_a_device_that_cannot_be_had_is_an_error(
    stories260k: Path, device: str, reason: str
) -> None:
    with pytest.raises(qinfer.DeviceError, match=reason):
        Model(stories260k, device=device)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"n_ctx": 0},
        {"n_ctx": -5},
        {"n_ctx": 2**40},
        {"threads": 0},
        {"threads": 2.5},
        {"kv_type": "q4_0"},
        {"kv_type": 8},
        {"kv_type": None},
        {"chat_template": 5},
        {"hidden_act": "tanh"},
        {"hidden_act": 5},
        {"hidden_act": "\ud800"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(
    stories260k: Path, options: dict[str, object]
) -> None:
    (name,) = options
    with pytest.raises(qinfer.ArgumentError, match=name):
        Model(stories260k, **options)  # type: ignore[arg-type]


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="n_gpu_layers"):
        Model("x.gguf", n_gpu_layers=99)  # type: ignore[call-arg]


def test_a_folder_of_safetensors_gets_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    with pytest.raises(qinfer.ArgumentError, match=r"without a \.gguf file"):
        Model(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(qinfer.FormatError) as caught:
        Model(folder)
    assert str(caught.value).endswith(
        f"python -m qinfer.tools.convert_dense '{folder}' --outfile 'my model.gguf'"
    )


def test_the_only_model_in_a_folder_can_be_meant_by_the_folder(
    stories260k: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.gguf").symlink_to(stories260k)
    with Model(tmp_path) as model:
        assert model.path == str(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").symlink_to(stories260k)
    with pytest.raises(qinfer.ArgumentError, match=r"a\.gguf, b\.gguf"):
        Model(tmp_path)


def test_a_model_comes_from_the_hub_with_all_options(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def download(repo_id: str, filename: str | None, **options: object) -> Path:
        asked.extend([repo_id, filename, options])
        return stories260k

    monkeypatch.setattr("qinfer.hub.download", download)
    with Model.from_pretrained("owner/name", "*q4*.gguf", revision="v1", n_ctx=50) as model:
        assert model.n_ctx == 50
    options = {"revision": "v1", "cache_dir": None, "token": None, "local_files_only": False}
    assert asked == ["owner/name", "*q4*.gguf", options]
    with pytest.raises(TypeError, match="n_ctxt"):
        Model.from_pretrained("owner/name", n_ctxt=50)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"n_threads": 2}, "'n_threads': threads= says"),
        ({"n_gpu_layers": -1}, "'n_gpu_layers': vram_budget= says how much"),
        ({"verbose": False}, r"'verbose': .*logging\.getLogger\('qinfer'\)"),
        ({"n_ctxt": 5}, "'n_ctxt'; did you mean 'n_ctx'?"),
        ({"zzz": 5}, "'zzz'; there are path, device, vram_budget"),
    ],
    ids=str,
)
def test_keywords_of_others_are_answered_with_ours(
    options: dict[str, Any], hint: str, stories260k: Path
) -> None:
    with pytest.raises(TypeError, match=hint):
        Model(stories260k, **options)
    with pytest.raises(TypeError, match=hint):
        Model.from_pretrained("owner/name", **options)


def test_a_path_by_keyword_of_others() -> None:
    with pytest.raises(TypeError, match=r"'model_path': the path is the first argument"):
        Model(model_path="x.gguf")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("smollm2", "Model.from_pretrained('smollm2')"),
        ("stories", "Model.demo()"),
        ("owner/name", "Model.from_pretrained('owner/name')"),
        ("owner/name:*q4*", "Model.from_pretrained('owner/name', '*q4*')"),
    ],
)
def test_names_of_the_command_line_are_answered_with_the_call(name: str, call: str) -> None:
    with pytest.raises(qinfer.FileError, match="there is no such file") as caught:
        Model(name)
    assert str(caught.value).endswith(call)


def test_names_that_are_paths_are_sought_as_such(tmp_path: Path) -> None:
    for name in ("smollm.gguf", "owner/name.gguf", "a/b/c"):
        with pytest.raises(qinfer.FileError, match=f"cannot open '{name}'"):
            Model(name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(qinfer.FileError, match=r"none\.gguf"):
        Model(tmp_path / "none.gguf")
    with pytest.raises(qinfer.ArgumentError, match="NUL"):
        Model("a\0b")
    for empty in ("", b""):
        with pytest.raises(qinfer.ArgumentError, match="path of the model is empty"):
            Model(empty)  # type: ignore[arg-type]
