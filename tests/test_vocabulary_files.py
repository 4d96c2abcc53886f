"""Tokenizers of checkpoints: what each file says of special tokens, and what broken files get."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer import ArgumentError, FormatError, QInferError, UnsupportedError
from qinfer.errors import FileError
from qinfer.tools._vocabulary import read_vocabulary
from vocabulary_folders import (
    SMALL_VOCAB,
    TEXTS,
    keys,
    put,
    small_json,
    small_processor,
    small_spm,
    stories_json,
    template,
    written,
)

# ---- added and special tokens ----


def test_added_tokens_of_spm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": False},
        "450": {"content": "<|im_start|>", "special": True},
    }
    put(tmp_path, tokenizer=small_spm(), tokenizer_config={"added_tokens_decoder": decoder})
    put(tmp_path, added_tokens={"<|im_start|>": 450, "<tool>": 451, "<pad>": 452})
    put(tmp_path, special_tokens_map={"additional_special_tokens": ["<pad>"]})
    found = keys(read_vocabulary(tmp_path))
    assert found["tokens"][450:] == ["<|im_start|>", "<tool>", "<pad>"]
    assert found["scores"][450:] == [-1000.0] * 3
    assert found["token_type"][:3] == [2, 3, 3]
    assert found["token_type"][450:] == [3, 4, 3]
    assert not caplog.records
    tokenizer = written(read_vocabulary(tmp_path), tmp_path)
    assert 451 in tokenizer.encode("a<tool>b<|im_start|>")
    assert 450 not in tokenizer.encode("a<tool>b<|im_start|>")


def test_an_added_token_may_take_the_place_of_a_piece(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = keys(read_vocabulary(put(tmp_path, tokenizer=small_spm())))
    put(tmp_path, added_tokens={"<tool>": 300})
    found = keys(read_vocabulary(tmp_path))
    assert (found["tokens"][300], found["token_type"][300]) == ("<tool>", 4)
    assert "'<tool>' takes the place of" in caplog.text
    assert before["tokens"][:300] == found["tokens"][:300]


def test_added_tokens_of_bpe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    added = [
        {"id": 7, "content": "<|endoftext|>", "special": True},
        {"id": 8, "content": "<tool>", "special": False, "rstrip": True},
    ]
    put(tmp_path, tokenizer=small_json(added_tokens=added), added_tokens={"<more>": 9})
    vocabulary = read_vocabulary(tmp_path)
    assert keys(vocabulary)["tokens"] == [*SMALL_VOCAB, "<|endoftext|>", "<tool>", "<more>"]
    assert keys(vocabulary)["token_type"] == [1] * 7 + [3, 4, 4]
    assert "1 added tokens take the spaces" in caplog.text
    assert written(vocabulary, tmp_path).encode("abc<tool>ab") == [6, 8, 5]


def test_special_tokens_come_from_the_first_file_that_names_them(tmp_path: Path) -> None:
    special = ["<0>", "<1>", "<2>", "<3>", "<4>"]
    added = [{"id": 7 + i, "content": text, "special": True} for i, text in enumerate(special)]
    put(
        tmp_path,
        tokenizer=small_json(added_tokens=added),
        tokenizer_config={"bos_token": "<0>", "pad_token": None, "eos_token": ""},
        special_tokens_map={"bos_token": "<4>", "unk_token": {"content": "<1>"}},
        config={"bos_token_id": 4, "eos_token_id": [9, 8], "pad_token_id": -1},
        generation_config={"eos_token_id": 3, "pad_token_id": 10, "sep_token_id": 11},
    )
    found = keys(read_vocabulary(tmp_path))
    assert [
        found[f"{name}_token_id"] for name in ("bos", "eos", "unknown", "padding", "seperator")
    ] == [7, 9, 8, 10, 11]


def test_ends_of_an_answer_that_get_lost_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["<|user|>", "<|im_end|>", "<|end|>"]
    added = [{"id": 7 + i, "content": text, "special": True} for i, text in enumerate(texts)]
    put(tmp_path, tokenizer=small_json(added_tokens=added), config={"eos_token_id": 8})
    put(tmp_path, generation_config={"eos_token_id": [8, 9]})
    assert keys(read_vocabulary(tmp_path))["eos_token_id"] == 8
    assert not caplog.records  # readers know <|end|> by its name
    put(tmp_path, generation_config={"eos_token_id": [8, 7]})
    read_vocabulary(tmp_path)
    assert "also end at '<|user|>'" in caplog.text


def test_tokens_called_special_are_control_tokens(tmp_path: Path) -> None:
    put(tmp_path, vocab=SMALL_VOCAB | {"</s>": 7, "<pad>": 8}, merges="a b\nab c\n")
    put(tmp_path, config={"model_type": "opt"}, tokenizer_config={"add_bos_token": True})
    put(tmp_path, special_tokens_map={"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<p>"})
    vocabulary = read_vocabulary(tmp_path)
    assert keys(vocabulary)["token_type"] == [1] * 7 + [3, 1]
    assert "padding_token_id" not in keys(vocabulary)
    assert written(vocabulary, tmp_path).encode("abc") == [7, 6]


def test_missing_special_tokens_are_fine(tmp_path: Path) -> None:
    put(tmp_path, tokenizer=small_json(added_tokens=[]))
    vocabulary = read_vocabulary(tmp_path)
    assert not [key for key in keys(vocabulary) if key.endswith(("_id", "bos_token", "eos_token"))]
    tokenizer = written(vocabulary, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.encode("abc") == [6]


@pytest.mark.parametrize(
    ("post", "config", "expected"),
    [
        (template("<s>"), {}, (True, None)),
        (template("<s>", after=("</s>",)), {}, (True, True)),
        (template("<s>"), {"add_bos_token": False, "add_eos_token": True}, (False, True)),
        (template(), {}, (None, None)),
        (None, {}, (None, None)),
        (None, {"add_bos_token": True}, (True, None)),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>")]},
            {},
            (True, None),
        ),
        (template("<x>"), {"bos_token": "<s>"}, (False, None)),
    ],
)
def test_what_is_put_beside_a_text(
    tmp_path: Path,
    post: dict[str, Any] | None,
    config: dict[str, Any],
    expected: tuple[bool | None, bool | None],
) -> None:
    texts = ["<s>", "</s>", "<x>"]
    added = [{"id": 7 + i, "content": text, "special": True} for i, text in enumerate(texts)]
    put(tmp_path, tokenizer=small_json(added_tokens=added, post_processor=post))
    put(tmp_path, tokenizer_config=config, config={"bos_token_id": 7, "eos_token_id": 8})
    found = keys(read_vocabulary(tmp_path))
    assert (found.get("add_bos_token"), found.get("add_eos_token")) == expected


def test_a_template_names_the_tokens_that_nothing_else_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    post = template("<a>", "<|endoftext|>", after=("<|endoftext|>", "<b>"))
    put(tmp_path, tokenizer=small_json(post_processor=post))
    found = keys(read_vocabulary(tmp_path))
    assert "bos_token_id" not in found and "eos_token_id" not in found
    assert "'<a>'" in caplog.text and "one side" in caplog.text
    put(tmp_path, tokenizer=small_json(post_processor=template("<|endoftext|>")))
    found = keys(read_vocabulary(tmp_path))
    assert (found["bos_token_id"], found["add_bos_token"]) == (7, True)


def test_adding_a_token_that_does_not_exist_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, tokenizer=small_json(), tokenizer_config={"add_eos_token": True})
    assert keys(read_vocabulary(tmp_path))["add_eos_token"] is False
    assert "add_eos_token is true" in caplog.text


# ---- chat templates ----


@pytest.mark.parametrize(
    ("files", "default", "others"),
    [
        ({}, None, {}),
        ({"tokenizer_config": {"chat_template": "A"}}, "A", {}),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "default", "template": "A"},
                        {"name": "tool-use", "template": "B"},
                    ]
                }
            },
            "A",
            {"tool_use": "B"},
        ),
        (
            {"tokenizer_config": {"chat_template": [{"name": "x", "template": "B"}]}},
            None,
            {"x": "B"},
        ),
        ({"chat_template": {"chat_template": "C"}}, "C", {}),
        ({"chat_template": "D", "tokenizer_config": {"chat_template": "A"}}, "D", {}),
    ],
)
def test_chat_templates(
    tmp_path: Path, files: dict[str, Any], default: str | None, others: dict[str, str]
) -> None:
    put(tmp_path, tokenizer=small_json(), **files)
    if isinstance(files.get("chat_template"), str):
        (tmp_path / "chat_template.txt").rename(tmp_path / "chat_template.jinja")
    vocabulary = read_vocabulary(tmp_path)
    found = {key: value for key, value in keys(vocabulary).items() if "chat_template" in key}
    assert found.pop("tokenizer.chat_template", None) == default
    assert found.pop("tokenizer.chat_templates", []) == [*others]
    assert found == {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    assert written(vocabulary, tmp_path).chat_template == default


# ---- the number of tokens ----


def test_padding_is_unused(tmp_path: Path) -> None:
    put(tmp_path, tokenizer=small_spm())
    assert read_vocabulary(tmp_path).n_tokens == 450
    vocabulary = read_vocabulary(tmp_path, n_vocab=452)
    assert vocabulary.n_tokens == 452
    found = keys(vocabulary)
    assert found["tokens"][450:] == ["[PAD450]", "[PAD451]"]
    assert found["token_type"][450:] == [5, 5] and len(found["scores"]) == 452
    tokenizer = written(vocabulary, tmp_path)
    for text in (*TEXTS, "[PAD450]"):
        assert tokenizer.encode(text, add_special=False) == small_processor().encode(text)
    put(tmp_path / "bpe", tokenizer=small_json())
    assert keys(read_vocabulary(tmp_path / "bpe", n_vocab=9))["tokens"][8] == "[PAD8]"


def test_ids_without_a_token_are_filled(tmp_path: Path) -> None:
    put(tmp_path, tokenizer=small_spm(), added_tokens={"<tool>": 452})
    found = keys(read_vocabulary(tmp_path))
    assert found["tokens"][450:] == ["[PAD450]", "[PAD451]", "<tool>"]
    assert found["token_type"][450:] == [5, 5, 4]


def test_a_model_with_fewer_tokens_is_refused_with_both_numbers(tmp_path: Path) -> None:
    put(tmp_path, tokenizer=small_spm(), added_tokens={"<tool>": 450})
    with pytest.raises(FormatError, match=r"451 tokens.* 450.*'<tool>'.*added_tokens\.json"):
        read_vocabulary(tmp_path, n_vocab=450)
    with pytest.raises(FormatError, match=r"451 tokens.* 10:"):
        read_vocabulary(tmp_path, n_vocab=10)


# ---- which files ----


def test_kind_chooses_among_the_files(tmp_path: Path) -> None:
    put(tmp_path, tokenizer=small_spm())
    put(tmp_path, vocab=SMALL_VOCAB, merges="a b\nab c", config={"model_type": "opt"})
    assert read_vocabulary(tmp_path).model == "llama"
    assert read_vocabulary(tmp_path, kind="spm").model == "llama"
    assert read_vocabulary(tmp_path, kind="bpe").model == "gpt2"
    put(tmp_path, tokenizer=small_json(added_tokens=[], vocab={"a": 0, "b": 1}, merges=[]))
    assert read_vocabulary(tmp_path).model == "llama"
    assert read_vocabulary(tmp_path, kind="bpe").n_tokens == 2


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("spm", small_json(), "is a byte-level BPE"),
        ("bpe", stories_json(), "is not a byte-level BPE"),
        ("wordpiece", small_json(), "'auto', 'spm' or 'bpe'"),
    ],
)
def test_the_wrong_kind_is_refused(
    tmp_path: Path, kind: Any, content: dict[str, Any], message: str
) -> None:
    put(tmp_path, tokenizer=content)
    with pytest.raises(ArgumentError, match=message):
        read_vocabulary(tmp_path, kind=kind)
    with pytest.raises(ArgumentError, match="n_vocab"):
        read_vocabulary(tmp_path, n_vocab=0)


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("auto", {}, "tokenizer.model, tokenizer.json, or vocab.json and merges.txt"),
        ("auto", {"vocab": {}}, "only vocab.json is there"),
        ("bpe", {"merges": ""}, "only merges.txt is there"),
        ("spm", {"vocab": {}, "merges": ""}, "looked for tokenizer.model or tokenizer.json$"),
    ],
)
def test_missing_files_are_named(
    tmp_path: Path, kind: Any, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(FileError, match=message):
        read_vocabulary(put(tmp_path, **files), kind=kind)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not a folder"):
        read_vocabulary(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(FileError, match=r"tokenizer\.model: cannot read"):
        read_vocabulary(tmp_path)


# ---- broken files ----


def piece(text: bytes, score: bytes = bytes(4), kind: int = 1) -> bytes:
    """A piece in sentencepiece's form."""
    body = bytes((0x0A, len(text))) + text + b"\x15" + score + bytes((0x18, kind))
    return bytes((0x0A, len(body))) + body


BPE_TRAINER = b"\x12\x02\x18\x02"
UNKNOWN = piece(b"<unk>", kind=2)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (b"", FormatError, "no pieces"),
        (b"IQ== 0\nIg== 1\n", UnsupportedError, "tiktoken"),
        (small_spm()[:-100], FormatError, "not a sentencepiece model"),
        (b"\x0b", FormatError, "wire type 3"),
        (b"\xff" * 20, FormatError, "cut off or too long"),
        (b"\x08\x01", FormatError, "a message has a wrong type"),
        (UNKNOWN + piece(b"\xff") + BPE_TRAINER, FormatError, "utf-8"),
        (UNKNOWN + piece(b"a", b"\0\0\xc0\x7f") + BPE_TRAINER, FormatError, "piece 1: .* nan"),
        (UNKNOWN + piece(b"a", kind=9) + BPE_TRAINER, FormatError, "piece 1: .* type is 9"),
        (UNKNOWN + piece(b"") + BPE_TRAINER, FormatError, ""),
        (UNKNOWN + 2 * piece(b"a") + BPE_TRAINER, FormatError, ""),
        (UNKNOWN + b"\x12\x02\x1a\x00", FormatError, "should be a number"),
        (UNKNOWN + piece(b"a"), UnsupportedError, "Unigram"),
        (UNKNOWN + piece(b"<0x0A>", kind=6) + BPE_TRAINER, FormatError, "byte piece"),
        (UNKNOWN + BPE_TRAINER + b"\x12\x03\xc0\x01\x01", UnsupportedError, "after words"),
        (UNKNOWN + BPE_TRAINER + b"\x1a\x02\x28\x00", UnsupportedError, "spaces"),
    ],
)
def test_broken_sentencepiece_models(
    tmp_path: Path, model: bytes, error: type[QInferError], message: str
) -> None:
    with pytest.raises(error, match=rf"tokenizer\.model: .*{message}"):
        read_vocabulary(put(tmp_path, tokenizer=model))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": "Unigram"}, UnsupportedError, r"model\.type is 'Unigram'"),
        ({"type": "WordPiece"}, UnsupportedError, r"model\.type is 'WordPiece'"),
        ({"type": 3}, FormatError, r"model\.type is 3"),
        ({"continuing_subword_prefix": "##"}, UnsupportedError, "'##'"),
        ({"end_of_word_suffix": "</w>"}, UnsupportedError, "'</w>'"),
        ({"ignore_merges": "yes"}, FormatError, r"model\.ignore_merges is 'yes'"),
        ({"model": None}, FormatError, "model is missing"),
        ({"model": []}, FormatError, r"model is \[\]"),
        ({"vocab": None}, FormatError, r"model\.vocab is missing"),
        ({"vocab": {"a": "0"}}, FormatError, r"model\.vocab\.'a' is '0'"),
        ({"vocab": {"a": True}}, FormatError, r"model\.vocab\.'a' is True"),
        ({"vocab": {"a": -1}}, FormatError, r"model\.vocab\.'a' is -1"),
        ({"vocab": {"a": 2**31}}, FormatError, r"model\.vocab\.'a' is 2147483648"),
        ({"vocab": SMALL_VOCAB | {"x": 2}}, FormatError, r"model\.vocab\.'x' has id 2, .*'c'"),
        ({"vocab": SMALL_VOCAB | {"": 8}}, FormatError, "token 8 has an empty text"),
        ({"vocab": SMALL_VOCAB | {"x": 2**30}}, FormatError, "id 1073741824, .*out of range"),
        ({"vocab": SMALL_VOCAB | {"\ud800": 8}}, FormatError, "token 8 .*half a surrogate"),
        (
            {"vocab": SMALL_VOCAB | {"[PAD8]": 9, "x": 10}},
            FormatError,
            r"token 8 is missing, and '\[PAD8\]'",
        ),
        ({"vocab": {}, "merges": [], "added_tokens": []}, FormatError, "no tokens"),
        ({"merges": ["a b", "a x"]}, FormatError, r"merges\[1\] is 'a x', but 'x' is not"),
        ({"merges": ["b a"]}, FormatError, r"merges\[0\] is 'b a', but 'ba' is not"),
        ({"merges": ["a"]}, FormatError, r"merges\[0\] is 'a', not two tokens"),
        ({"merges": ["a b c"]}, FormatError, r"merges\[0\] is 'a b c', not two tokens"),
        ({"merges": [["a", 1]]}, FormatError, r"merges\[0\] is \['a', 1\]"),
        ({"merges": [7]}, FormatError, r"merges\[0\] is 7"),
        ({"merges": "a b"}, FormatError, "merges is 'a b', not a list"),
        (
            {"merges": [["a", " "]], "vocab": SMALL_VOCAB | {" ": 8, "a ": 9}},
            FormatError,
            r"merges\[0\] has a space",
        ),
        ({"added_tokens": {"x": 1}}, FormatError, "added_tokens is .*, not a list"),
        ({"added_tokens": ["x"]}, FormatError, r"added_tokens\[0\] is 'x', not an object"),
        ({"added_tokens": [{"content": "x"}]}, FormatError, r"added_tokens\[0\]\.id is missing"),
        ({"added_tokens": [{"id": 7}]}, FormatError, r"added_tokens\[0\]\.content is missing"),
        ({"added_tokens": [{"id": 7, "content": "a"}]}, FormatError, "'a' is there twice.* 0 .* 7"),
        (
            {"added_tokens": [{"id": 7, "content": "x"}, {"id": 7, "content": "y"}]},
            FormatError,
            "adds 'y' as token 7, which is 'x'",
        ),
        (
            {"added_tokens": [{"id": 7, "content": "x"}, {"id": 8, "content": "x"}]},
            FormatError,
            "adds 'x' as token 8; it is token 7",
        ),
        ({"pre_tokenizer": "ByteLevel"}, FormatError, "pre_tokenizer is 'ByteLevel'"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, UnsupportedError, "BertPreTokenizer"),
        ({"pre_tokenizer": None}, UnsupportedError, "normalizer"),
        ({"post_processor": 1}, FormatError, "post_processor is 1"),
    ],
)
def test_broken_tokenizer_json(
    tmp_path: Path, changes: dict[str, Any], error: type[QInferError], message: str
) -> None:
    with pytest.raises(error, match=rf"tokenizer\.json: .*{message}"):
        read_vocabulary(put(tmp_path, tokenizer=small_json(**changes)))


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ("#version: 0.2\na b\nab x\n", r"merges\.txt: line 3 is 'ab x', but 'x'"),
        ("a b\nab\n", r"merges\.txt: line 2 is 'ab', not two tokens"),
        ("a  b\n", r"merges\.txt: line 1 is 'a  b', not two tokens"),
    ],
)
def test_broken_merges_txt(tmp_path: Path, merges: str, message: str) -> None:
    put(tmp_path, vocab=SMALL_VOCAB, merges=merges, config={"model_type": "gpt2"})
    with pytest.raises(FormatError, match=message):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer", "{", "not a JSON file"),
        ("tokenizer", "[1]", r"holds \[1\], not a JSON object"),
        ("tokenizer", '{"a": 1, "a": 2}', "'a' is there twice"),
        ("tokenizer", "[" * 100_000, "not a JSON file"),
        ("tokenizer", '{"a": ' + "1" * 5000 + "}", "not a JSON file"),
        ("tokenizer", b'{"a": "\xff"}', "not UTF-8"),
        ("tokenizer_config", '{"bos_token": 1}', "bos_token is 1, not a string"),
        ("tokenizer_config", '{"bos_token": {"content": 1}}', r"bos_token\.content is 1"),
        ("tokenizer_config", '{"add_bos_token": 1}', "add_bos_token is 1, not true or false"),
        ("tokenizer_config", '{"chat_template": 1}', "chat_template is 1"),
        ("tokenizer_config", '{"chat_template": [{"name": "x"}]}', r"\[0\]\.template is missing"),
        ("tokenizer_config", '{"added_tokens_decoder": {"x": {}}}', r"added_tokens_decoder\.'x'"),
        (
            "tokenizer_config",
            '{"added_tokens_decoder": {"7": {"content": "<x>"}}}',
            r"adds '<x>' as token 7, which is '<\|endoftext\|>' in .*tokenizer\.json",
        ),
        ("special_tokens_map", '{"additional_special_tokens": [1]}', r"tokens\[0\] is 1"),
        ("added_tokens", '{"<x>": 1.5}', "'<x>' is 1.5, not a token id"),
        ("added_tokens", '{"<x>": 8, "<y>": 8}', "'<y>' has id 8"),
        ("config", '{"bos_token_id": "1"}', "bos_token_id is '1'"),
        ("generation_config", '{"eos_token_id": -3.0}', "eos_token_id is -3.0"),
        ("config", '{"eos_token_id": [7, 8]}', r"eos_token_id is \[7, 8\], outside .* of 8"),
        ("generation_config", '{"pad_token_id": true}', "pad_token_id is True"),
    ],
)
def test_broken_json(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    put(tmp_path, tokenizer=small_json())
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / f"{name}.json").write_bytes(data)
    with pytest.raises(FormatError, match=rf"{name}\.json: .*{message}"):
        read_vocabulary(tmp_path)


MUTATION = st.lists(
    st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 6)), max_size=4
)


def mutated(data: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    for at, new, n_old in changes:
        at %= len(data) + 1
        data = data[:at] + new + data[at + n_old :]
    return data


def read_or_refuse(folder: Path) -> None:
    """Reads a vocabulary that is well-formed, or gets a typed error; a file can be written."""
    try:
        vocabulary = read_vocabulary(folder)
    except QInferError as error:
        assert str(folder) in str(error)
        return
    tokens = keys(vocabulary)["tokens"]
    assert len(set(tokens)) == len(tokens) == vocabulary.n_tokens and all(tokens)
    with suppress(QInferError):
        written(vocabulary, folder).encode("Once upon a time")


@settings(max_examples=150, deadline=None)
@given(MUTATION)
def test_mutated_sentencepiece_models(fuzzed: Path, changes: list[tuple[int, bytes, int]]) -> None:
    read_or_refuse(put(fuzzed, tokenizer=mutated(small_spm(), changes)))


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 12), st.sampled_from(["", "a", "ab", "<s>"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["id", "content", "0"]), inner)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_json(fuzzed: Path, data: st.DataObject) -> None:
    files: dict[str, Any] = {
        "tokenizer": data.draw(st.sampled_from([small_json(), stories_json()])),
        "tokenizer_config": {"bos_token": "a", "added_tokens_decoder": {"7": {"content": "<s>"}}},
        "special_tokens_map": {"eos_token": "b", "additional_special_tokens": ["c"]},
        "config": {"eos_token_id": [3]},
    }
    files = json.loads(json.dumps(files))
    name = data.draw(st.sampled_from([*files]))
    place = files[name]
    while True:
        key = data.draw(st.sampled_from([*place] if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = inner
    read_or_refuse(put(fuzzed, **files))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for hypothesis, whose many warnings are not of interest."""
    logger = logging.getLogger("qinfer")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield tmp_path_factory.mktemp("fuzzed")
    logger.setLevel(level)
