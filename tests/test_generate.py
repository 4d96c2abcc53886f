"""Generating and streaming: seeds, batches, ends of a text, what tokens are drawn from."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qinfer
from qinfer import Completion, Model, Sampling
from qinfer._stop import StopFilter

PROMPT = "Once upon a time"
OTHER_PROMPTS = [PROMPT, "Lily and Tom", "The big red dog", "Once upon a day there was"]


@pytest.fixture(scope="module")
def model(stories260k: Path) -> Iterator[Model]:
    with Model(stories260k) as model:
        yield model


# ---- generating ----


def test_a_completion_says_what_happened(model: Model) -> None:
    completion = model.generate(PROMPT, max_tokens=12, temperature=0)
    assert str(completion) == completion.text
    assert completion.text == model.tokenizer.decode(
        [*model.tokenizer.encode(PROMPT), *completion.tokens]
    ).removeprefix(PROMPT)
    assert len(completion.tokens) == 12
    assert completion.finish_reason == "length"
    assert completion.usage.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert completion.usage.completion_tokens == 12
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 12
    assert completion.logprobs is None
    assert completion.stats.n_generated_tokens == 11  # the first comes out of the prompt
    assert completion.timings.tokens_per_second > 0
    assert completion.timings.total == completion.timings.prompt + completion.timings.generation


def test_a_seed_gives_the_same_text_and_is_reported(model: Model) -> None:
    first = model.generate(PROMPT, max_tokens=30, seed=7)
    assert first.seed == 7
    assert model.generate(PROMPT, max_tokens=30, seed=7).tokens == first.tokens
    assert model.generate(PROMPT, max_tokens=30, seed=8).tokens != first.tokens


def test_without_a_seed_each_call_draws_one_that_repeats_its_text(model: Model) -> None:
    first, second = (model.generate(PROMPT, max_tokens=30) for _ in range(2))
    assert first.seed != second.seed
    assert model.generate(PROMPT, max_tokens=30, seed=first.seed).tokens == first.tokens


def test_threads_do_not_change_the_text(stories260k: Path) -> None:
    texts = set()
    for threads in (1, 2, 3):
        with Model(stories260k, threads=threads) as model:
            texts.add(model.generate(PROMPT, max_tokens=40, seed=3).text)
    assert len(texts) == 1


def test_ids_are_a_prompt_as_they_are(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT)
    expected = model.generate(PROMPT, max_tokens=10, temperature=0).tokens
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert model.generate(prompt, max_tokens=10, temperature=0).tokens == expected


def test_a_batch_gives_each_prompt_its_answer_as_alone(model: Model) -> None:
    # More prompts than are computed together, so that later ones take over sequences.
    prompts = [OTHER_PROMPTS[i % 4] + " " * (i % 3) for i in range(20)]
    together = model.generate(prompts, max_tokens=25, seed=11)
    assert isinstance(together, list)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = model.generate(prompt, max_tokens=25, seed=11)
        assert completion.tokens == alone.tokens
        assert completion.text == alone.text
        assert completion.usage.prompt_tokens == alone.usage.prompt_tokens


def test_a_batch_computes_a_shared_beginning_once(model: Model) -> None:
    shared = " ".join([PROMPT] * 30)
    prompts = [shared + " Lily", shared + " Tom", shared + " the dog"]
    first, *others = model.generate(prompts, max_tokens=5, temperature=0)
    assert first.usage.cached_tokens == 0
    for completion, prompt in zip(others, prompts[1:], strict=True):
        assert completion.usage.cached_tokens > 60
        assert completion.tokens == model.generate(prompt, max_tokens=5, temperature=0).tokens


def test_an_empty_batch_has_no_answers(model: Model) -> None:
    assert model.generate([]) == []


def test_no_tokens_can_be_asked_for(model: Model) -> None:
    completion = model.generate(PROMPT, max_tokens=0)
    assert (completion.text, completion.tokens) == ("", [])
    assert completion.finish_reason == "length"


def test_the_end_of_the_context_ends_the_answer(stories260k: Path) -> None:
    with Model(stories260k, n_ctx=24) as model:
        n_prompt = len(model.tokenizer.encode(PROMPT))
        completion = model.generate(PROMPT, ignore_eos=True)
        assert completion.finish_reason == "length"
        assert n_prompt + len(completion.tokens) == 24
        full = model.generate([1] * 24)
        assert (full.finish_reason, full.tokens) == ("length", [])


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(stories260k: Path) -> None:
    with Model(stories260k, n_ctx=24) as model:
        for prompt in ([1] * 25, [[1], [1] * 25]):
            with pytest.raises(qinfer.ContextFull, match=r"25 tokens.* 24"):
                model.generate(prompt)
        with pytest.raises(qinfer.ContextFull, match=r"25 tokens.* 24"):
            model.score([1] * 25)


def test_an_earlier_prompt_is_continued_not_computed_again(stories260k: Path) -> None:
    with Model(stories260k) as model:
        first = model.generate(PROMPT, max_tokens=20, temperature=0)
        assert first.usage.cached_tokens == 0
        ids = model.tokenizer.encode(PROMPT) + first.tokens
        second = model.generate([*ids, 300], max_tokens=5, temperature=0)
        assert second.usage.cached_tokens == len(ids) - 1  # the last was drawn, not fed
        # Another conversation does not take its place.
        model.generate("The dog", max_tokens=5)
        third = model.generate([*ids, 300], max_tokens=5, temperature=0)
        assert third.usage.cached_tokens == len(ids)
        assert third.tokens == second.tokens
    with Model(stories260k) as fresh:
        assert fresh.generate([*ids, 300], max_tokens=5, temperature=0).tokens == second.tokens


# ---- ends of a text ----


def test_a_stop_string_ends_the_text_before_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=40, temperature=0).text
    stop = whole[20:33]
    completion = model.generate(PROMPT, max_tokens=40, temperature=0, stop=stop)
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"
    earliest = model.generate(PROMPT, max_tokens=40, temperature=0, stop=[stop, whole[9:12], "zzz"])
    assert earliest.text == whole[: whole.index(whole[9:12])]


def test_a_stop_string_spanning_tokens_is_never_emitted_in_part(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=40, temperature=0).text
    for start, length in itertools.product(range(5, 60, 7), (1, 2, 5, 11)):
        stop = whole[start : start + length]
        emitted = ""
        for piece in model.stream(PROMPT, max_tokens=40, temperature=0, stop=stop):
            emitted += piece.text
            assert whole[: whole.index(stop)].startswith(emitted)
        assert emitted == whole[: whole.index(stop)]


def test_a_stop_string_that_does_not_come_true_is_emitted_after_all(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=20, temperature=0).text
    stop = whole[-4:] + "\0"
    assert model.generate(PROMPT, max_tokens=20, temperature=0, stop=stop).text == whole


@given(st.text("abc", max_size=30), st.text("abc", min_size=1, max_size=4), st.data())
def test_the_filter_cuts_at_the_stop_however_the_text_comes(
    text: str, stop: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    found = StopFilter([stop])
    out = ""
    for piece in pieces:
        out += found.add(piece)
        if found.stopped:
            break
    else:
        out += found.finish()
    assert out == text.partition(stop)[0]
    assert found.stopped == (stop in text)


def test_a_token_can_end_the_text(model: Model) -> None:
    tokens = model.generate(PROMPT, max_tokens=20, temperature=0).tokens
    completion = model.generate(PROMPT, max_tokens=20, temperature=0, stop=tokens[8])
    assert completion.tokens == tokens[: tokens.index(tokens[8])]
    assert completion.finish_reason == "stop"


def ends_at_once(model: Model) -> dict[int, float]:
    """A bias that makes the end of the text the likeliest token."""
    return dict.fromkeys(model.tokenizer.eog_ids, 1000.0)


def test_the_end_of_the_text_is_not_part_of_it(model: Model) -> None:
    completion = model.generate(PROMPT, logit_bias=ends_at_once(model))
    assert (completion.text, completion.tokens) == ("", [])
    assert completion.finish_reason == "stop"


def test_min_tokens_and_ignore_eos_put_the_end_off(model: Model) -> None:
    bias = ends_at_once(model)
    completion = model.generate(PROMPT, logit_bias=bias, min_tokens=5, max_tokens=20)
    assert (len(completion.tokens), completion.finish_reason) == (5, "stop")
    completion = model.generate(PROMPT, logit_bias=bias, ignore_eos=True, max_tokens=20)
    assert (len(completion.tokens), completion.finish_reason) == (20, "length")
    assert not model.tokenizer.eog_ids & {*completion.tokens}


# ---- what tokens are drawn from ----


def test_temperature_0_takes_the_best_token_whatever_else_is_set(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT)
    best = []
    with model.context() as context:
        context.feed(ids)
        for _ in range(20):
            best.append(int(context.logits.argmax()))
            context.feed(best[-1:])
    assert model.generate(PROMPT, max_tokens=20, temperature=0, top_k=3, min_p=0.5).tokens == best


def test_log_probabilities_are_those_of_the_models_own_logits(model: Model) -> None:
    completion = model.generate(PROMPT, max_tokens=6, seed=1, temperature=1.5, logprobs=3)
    score = model.score(model.tokenizer.encode(PROMPT) + completion.tokens)
    assert completion.logprobs is not None
    assert [item.token for item in completion.logprobs] == completion.tokens
    found = [item.logprob for item in completion.logprobs]
    np.testing.assert_allclose(found, score.logprobs[-6:], atol=1e-5)
    for item in completion.logprobs:
        assert len(item.top) == 3
        assert sorted((value for _, value in item.top), reverse=True) == [v for _, v in item.top]
        assert item.logprob <= item.top[0][1]
    chosen_only = model.generate(PROMPT, max_tokens=6, seed=1, temperature=1.5, logprobs=0).logprobs
    assert chosen_only is not None
    assert [(item.logprob, item.top) for item in chosen_only] == [(value, ()) for value in found]


def test_logits_processors_see_the_tokens_and_change_the_logits(model: Model) -> None:
    seen: list[list[int]] = []

    def only_400(tokens: Sequence[int], logits: NDArray[np.float32]) -> None:
        seen.append(list(tokens))
        logits[:400] = -math.inf
        logits[401:] = -math.inf

    completion = model.generate(PROMPT, max_tokens=3, logits_processors=[only_400])
    assert completion.tokens == [400, 400, 400]
    ids = model.tokenizer.encode(PROMPT)
    assert seen == [ids, [*ids, 400], [*ids, 400, 400]]


def test_a_processor_that_does_nothing_changes_nothing(model: Model) -> None:
    plain = model.generate(PROMPT, max_tokens=20, seed=4)
    with_one = model.generate(PROMPT, max_tokens=20, seed=4, logits_processors=[lambda t, x: None])
    assert with_one.tokens == plain.tokens


def test_a_processor_that_returns_other_logits_is_told_to_change_them(model: Model) -> None:
    def doubled(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits * 2

    with pytest.raises(qinfer.ArgumentError, match=r"returned a ndarray: .* in place"):
        model.generate(PROMPT, logits_processors=[doubled])  # type: ignore[list-item]
    in_place = model.generate(
        PROMPT,
        max_tokens=5,
        temperature=0,
        logits_processors=[lambda tokens, logits: np.multiply(logits, 2, out=logits)],
    )
    assert in_place.tokens == model.generate(PROMPT, max_tokens=5, temperature=0).tokens


def test_a_processor_that_leaves_nan_is_an_error(model: Model) -> None:
    def spoil(tokens: Sequence[int], logits: NDArray[np.float32]) -> None:
        logits[7] = math.nan

    with pytest.raises(qinfer.ArgumentError, match="NaN"):
        model.generate(PROMPT, logits_processors=[spoil])


def test_a_bias_of_minus_infinity_bans_a_token(model: Model) -> None:
    best = model.generate(PROMPT, max_tokens=1, temperature=0).tokens[0]
    other = model.generate(PROMPT, max_tokens=1, temperature=0, logit_bias={best: -math.inf})
    assert other.tokens != [best]


def test_keywords_change_the_settings_given_as_an_object(model: Model) -> None:
    greedy = Sampling(temperature=0)
    expected = model.generate(PROMPT, max_tokens=10, temperature=0).tokens
    assert model.generate(PROMPT, max_tokens=10, sampling=greedy).tokens == expected
    sampled = model.generate(PROMPT, max_tokens=10, sampling=greedy, temperature=1.3, seed=2)
    direct = model.generate(PROMPT, max_tokens=10, temperature=1.3, seed=2)
    assert sampled.tokens == direct.tokens


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"min_tokens": -1},
        {"logprobs": -1},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [None]},
        {"stop": b"a"},
        {"stop": [b"a"]},
        {"stop": 1.5},
        {"stop": True},
        {"stop": -1},
        {"stop": 512},
        {"stop": ["a", 512]},
        {"logits_processors": 5},
        {"logits_processors": [5]},
        {"logits_processors": print},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"typical_p": 2},
        {"repeat_penalty": 0},
        {"presence_penalty": math.inf},
        {"penalty_window": -2},
        {"mirostat": 3},
        {"mirostat_tau": -1},
        {"min_keep": 0},
        {"seed": -1},
        {"seed": True},
        {"seed": 2**64},
        {"logit_bias": {512: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": {1: 1e39}},
        {"logit_bias": {1: "x"}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": None},
        {"logit_bias": [(1, 1.0)]},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(model: Model, options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(qinfer.ArgumentError, match=name):
        model.generate(PROMPT, **options)  # type: ignore[call-overload]


def test_an_unknown_keyword_is_a_type_error_with_a_hint(model: Model) -> None:
    for name in ("temprature", "temp"):
        with pytest.raises(TypeError, match=f"'{name}'; did you mean 'temperature'"):
            model.generate(PROMPT, **{name: 1})  # type: ignore[call-overload]
    for name, hint in (
        ("stream", r"Model\.stream and Model\.stream_chat"),
        ("max_new_tokens", "max_tokens="),
        ("repetition_penalty", "repeat_penalty="),
        ("zzz", "there are temperature, top_k"),
    ):
        for use in (model.generate, model.stream):
            with pytest.raises(TypeError, match=f"keyword argument '{name}'.*{hint}"):
                use(PROMPT, **{name: 1})  # type: ignore[operator]
    with pytest.raises(qinfer.ArgumentError, match=r"max_tokens=-1 .*\(None: to the end\)"):
        model.generate(PROMPT, max_tokens=-1)


@pytest.mark.parametrize(
    "prompt",
    [[-1], [512], [1.5], [[1], [512]], ["a", 5], ["a", None], b"abc", [b"abc"], None, {"a": 1}, 5],
    ids=str,
)
def test_what_is_no_prompt_is_refused(model: Model, prompt: object) -> None:
    with pytest.raises(qinfer.ArgumentError):
        model.generate(prompt, max_tokens=1)  # type: ignore[call-overload]


# ---- streaming ----


def test_a_stream_gives_the_same_answer_piece_by_piece(model: Model) -> None:
    expected = model.generate(PROMPT, max_tokens=30, seed=9, logprobs=1)
    stream = model.stream(PROMPT, max_tokens=30, seed=9, logprobs=1)
    assert stream.completion is None
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [piece.token for piece in pieces if piece.token is not None] == expected.tokens
    assert [piece.logprob for piece in pieces] == expected.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * 29 + ["length"]
    assert isinstance(stream.completion, Completion)
    assert stream.completion.text == expected.text


def test_whole_characters_only(model: Model) -> None:
    # The vocabulary spells characters it lacks in bytes: three tokens for one euro sign.
    euro = [model.tokenizer.id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert None not in euro
    order = iter(euro)

    def spell(tokens: Sequence[int], logits: NDArray[np.float32]) -> None:
        logits[next(order)] = 1e6

    pieces = list(model.stream(PROMPT, max_tokens=3, temperature=0, logits_processors=[spell]))
    assert [piece.text for piece in pieces] == ["", "", "€"]
    order = iter(euro)
    cut = model.generate(PROMPT, max_tokens=2, temperature=0, logits_processors=[spell])
    assert cut.text == "\ufffd"


def test_arguments_of_a_stream_are_checked_when_it_is_made(model: Model) -> None:
    with pytest.raises(qinfer.ArgumentError):
        model.stream(PROMPT, top_p=2)


def test_closing_or_dropping_a_stream_gives_its_context_back(stories260k: Path) -> None:
    with Model(stories260k) as model:
        n_prompt = len(model.tokenizer.encode(PROMPT))
        with model.stream(PROMPT, seed=1) as stream:
            next(stream)
        stream.close()
        assert list(stream) == []
        assert model.generate(PROMPT, max_tokens=1).usage.cached_tokens == n_prompt - 1
        dropped = model.stream(PROMPT)
        next(dropped)
        n_contexts = len(model._weights.contexts)
        del dropped
        model.generate(PROMPT, max_tokens=1)
        assert len(model._weights.contexts) == n_contexts


def test_a_cancelled_stream_ends_with_a_piece_that_says_so(model: Model) -> None:
    stream = model.stream(PROMPT, seed=1)
    text = next(stream).text + next(stream).text
    stream.cancel()
    pieces = list(stream)
    assert pieces[-1].finish_reason == "cancelled"
    assert stream.completion is not None
    assert stream.completion.text == text + "".join(piece.text for piece in pieces)
    # Nothing of it stays behind.
    assert model.generate(PROMPT, max_tokens=5).finish_reason == "length"


def test_streams_can_run_beside_each_other(model: Model) -> None:
    streams = [model.stream(prompt, max_tokens=15, seed=5) for prompt in OTHER_PROMPTS]
    texts = [""] * len(streams)
    for pieces in zip(*streams, strict=True):
        for i, piece in enumerate(pieces):
            texts[i] += piece.text
    assert texts == [model.generate(p, max_tokens=15, seed=5).text for p in OTHER_PROMPTS]


def test_an_asynchronous_stream_leaves_the_loop_free(model: Model) -> None:
    expected = model.generate(PROMPT, max_tokens=30, seed=9).text

    async def read() -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        beside = asyncio.create_task(tick())
        text = ""
        async for piece in model.astream(PROMPT, max_tokens=30, seed=9):
            text += piece.text
        beside.cancel()
        return text, ticks

    text, ticks = asyncio.run(read())
    assert text == expected
    assert ticks > 0


def test_an_asynchronous_stream_can_be_left(model: Model) -> None:
    async def leave() -> None:
        pieces = model.astream(PROMPT, ignore_eos=True)
        async for _ in pieces:
            break
        await pieces.aclose()

    n_contexts = len(model._weights.contexts)
    asyncio.run(leave())
    asyncio.run(leave())
    assert len(model._weights.contexts) <= n_contexts + 1
