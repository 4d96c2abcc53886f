"""`Context`: feeding, outputs, sequences, scoring, state files, samplers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import qinfer
from qinfer import Context, Model, Sampler, Sampling
from qinfer.sparsity import LayerStats

TOKENS = [1, 403, 407, 261, 378, 432, 383, 300, 17, 401, 290, 333]


@pytest.fixture(scope="module")
def model(stories260k: Path) -> Iterator[Model]:
    with Model(stories260k) as model:
        yield model


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with model.context(n_seq=3) as context:
        yield context


# ---- feeding and outputs ----


def test_logits_are_read_only_float32_of_the_last_token(context: Context) -> None:
    context.feed(TOKENS)
    assert context.logits.shape == (512,)
    assert context.logits.dtype == np.float32
    assert context.all_logits.shape == (1, 512)
    with pytest.raises(ValueError, match="read-only"):
        context.logits[0] = 1


def test_logits_stay_as_they_are_after_the_next_feed(context: Context) -> None:
    context.feed(TOKENS)
    held = context.logits
    copy = held.copy()
    context.feed([5])
    assert np.array_equal(held, copy)
    assert not np.array_equal(context.logits, copy)
    context.close()
    assert np.array_equal(held, copy)


def test_all_logits_are_those_of_feeding_one_by_one(context: Context) -> None:
    context.feed(TOKENS, logits="all")
    together = context.all_logits
    assert together.shape == (len(TOKENS), 512)
    for token, row in zip(TOKENS, together, strict=True):
        context.feed([token], seq=1)
        assert np.array_equal(context.logits, row)


def test_deterministic_is_what_the_processor_always_is(context: Context, model: Model) -> None:
    context.feed([1, 2, 3, 4, 5])
    with model.context(deterministic=True) as other:
        other.feed([1, 2, 3])
        other.feed([4, 5])
        np.testing.assert_array_equal(other.logits, context.logits)


def test_deterministic_keeps_neurons_where_they_are(stories260k: Path) -> None:
    with pytest.raises(qinfer.ArgumentError, match="neuron_cache='balance' moves neurons"):
        Model(stories260k, neuron_cache="balance", deterministic=True)


def test_only_what_is_asked_for_is_there(context: Context) -> None:
    context.feed(TOKENS, logits="none")
    with pytest.raises(qinfer.ArgumentError, match="asked for no logits"):
        _ = context.logits
    context.feed(TOKENS, logits="none", hidden="all")
    assert context.hidden.shape == (len(TOKENS), 64)
    with pytest.raises(qinfer.ArgumentError, match="asked for no logits"):
        _ = context.all_logits
    context.feed(TOKENS, hidden="last")
    assert context.hidden.shape == (1, 64)
    context.feed(TOKENS)
    with pytest.raises(qinfer.ArgumentError, match="asked for no hidden"):
        _ = context.hidden


def test_a_batch_feeds_several_sequences_in_the_order_given(context: Context) -> None:
    rows = []
    for seq, part in enumerate((TOKENS, TOKENS[:5])):
        context.feed(part, seq=seq)
        rows.append(context.logits)
        context.truncate(0, seq)
    context.feed_batch({1: TOKENS[:5], 0: TOKENS})
    assert np.array_equal(context.all_logits, rows[::-1])
    assert (context.length(0), context.length(1), context.length(2)) == (12, 5, 0)
    assert context.tokens(1) == TOKENS[:5]


def test_feeding_nothing_does_nothing(context: Context) -> None:
    context.feed(TOKENS)
    logits = context.logits
    context.feed([])
    context.feed_batch({})
    assert context.length() == len(TOKENS)
    assert np.array_equal(context.logits, logits)


def test_tokens_come_as_any_sequence_of_integers(context: Context) -> None:
    for tokens in (TOKENS, tuple(TOKENS), np.array(TOKENS), np.array(TOKENS, np.uint16)[::1]):
        context.feed(tokens)
    assert context.tokens() == TOKENS * 4


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -1], "token -1 at position 1.*0 to 511"),
        ([512], "token 512 at position 0"),
        ([2**40], "token 1099511627776"),
        ([1.0], "float64"),
        (["a"], "integers"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([None], "integers"),
        ([[1], [2, 3]], "not nested"),
        ("abc", "integers"),
        ([10**30], "integers"),
    ],
)
def test_wrong_tokens_are_refused(context: Context, tokens: list[int], message: str) -> None:
    with pytest.raises(qinfer.ArgumentError, match=message):
        context.feed(tokens)
    assert context.length() == 0


@pytest.mark.parametrize("seq", [-1, 3])
def test_a_sequence_that_does_not_exist_is_refused(context: Context, seq: int) -> None:
    for use in (
        lambda: context.feed([1], seq=seq),
        lambda: context.feed_batch({seq: [1]}),
        lambda: context.step([1], [Sampler(512)], seqs=[seq]),
        lambda: context.score([1, 2], seq=seq),
        lambda: context.length(seq),
        lambda: context.tokens(seq),
        lambda: context.truncate(0, seq),
        lambda: context.fork(seq, 0),
        lambda: context.fork(0, seq),
        lambda: context.reuse([1, 2], seq),
        lambda: context.save_state("x", seq),
    ):
        with pytest.raises(qinfer.ArgumentError, match=f"sequence {seq} does not exist"):
            use()


def test_wrong_names_of_outputs_are_refused(context: Context) -> None:
    with pytest.raises(qinfer.ArgumentError, match="logits='first'"):
        context.feed(TOKENS, logits="first")  # type: ignore[arg-type]
    with pytest.raises(qinfer.ArgumentError, match="hidden='some'"):
        context.feed(TOKENS, hidden="some")  # type: ignore[arg-type]


def test_too_many_tokens_leave_the_sequence_as_it_was(model: Model) -> None:
    with model.context(n_ctx=16) as context:
        context.feed(TOKENS)
        with pytest.raises(qinfer.ContextFull) as caught:
            context.feed(TOKENS)
        for number in ("12", "16"):
            assert number in str(caught.value)
        assert context.tokens() == TOKENS
        context.feed(TOKENS[:4])
        assert context.length() == 16


def test_progress_goes_from_0_to_all(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    with model.context() as context:
        context.feed([1] * 300, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (300, 300)
    assert all(total == 300 for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_error_in_progress_undoes_the_feed(model: Model) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with model.context() as context:
        context.feed(TOKENS)
        with pytest.raises(ZeroDivisionError):
            context.feed([1] * 300, progress=fail)
        assert context.tokens() == TOKENS
        with model.context() as other:
            other.feed([*TOKENS, 5])
            context.feed([5])
            assert np.array_equal(context.logits, other.logits)


# ---- drawing ----


def test_step_is_feed_and_sample(context: Context, model: Model) -> None:
    first, second = (Sampler(512, Sampling(seed=3)) for _ in range(2))
    context.feed_batch({0: TOKENS, 1: TOKENS})
    a = context.sample(first, 0)
    b = context.sample(second, 1)
    assert a == b
    for _ in range(10):
        (a,) = context.step([a], [first])
        context.feed([b], seq=1)
        b = context.sample(second)
        assert a == b
    assert context.tokens(0) == context.tokens(1)


def test_step_leaves_the_logits_it_drew_from(context: Context) -> None:
    samplers = [Sampler(512, Sampling(temperature=0)) for _ in range(2)]
    context.feed_batch({0: TOKENS, 2: TOKENS[:3]})
    drawn = context.step([7, 8], samplers, seqs=[2, 0])
    assert context.all_logits.argmax(-1).tolist() == drawn
    assert context.tokens(2) == [*TOKENS[:3], 7]


def test_step_refuses_what_does_not_match(context: Context) -> None:
    sampler = Sampler(512)
    with pytest.raises(qinfer.ArgumentError, match="not 2, 1 and 1"):
        context.step([1, 2], [sampler])
    with pytest.raises(qinfer.ArgumentError, match="twice"):
        context.step([1, 2], [sampler, Sampler(512)], seqs=[0, 0])
    with pytest.raises(qinfer.ArgumentError, match="a sampler is given for two sequences"):
        context.step([1, 2], [sampler, sampler], seqs=[0, 1])
    with pytest.raises(qinfer.ArgumentError, match="300"):
        context.step([1], [Sampler(300)])
    assert context.length() == 0


def test_a_sampler_repeats_its_draws_and_reports_its_seed() -> None:
    logits = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    first = Sampler(512)
    second = Sampler(512, Sampling(seed=first.seed))
    assert [first.sample(logits) for _ in range(50)] == [second.sample(logits) for _ in range(50)]
    assert Sampler(512).seed != Sampler(512).seed


def test_a_sampler_refuses_wrong_logits() -> None:
    sampler = Sampler(8)
    with pytest.raises(qinfer.ArgumentError, match=r"\(7,\), not \(8,\)"):
        sampler.sample(np.zeros(7, np.float32))
    with pytest.raises(qinfer.ArgumentError, match="NaN"):
        sampler.sample(np.full(8, np.nan, np.float32))
    for token in (9, -1, 2**40, 1.5):
        with pytest.raises(qinfer.ArgumentError, match="token"):
            sampler.accept([token])  # type: ignore[list-item]
    for n_vocab in (0, -1, 2**40, "8"):
        with pytest.raises(qinfer.ArgumentError, match="n_vocab"):
            Sampler(n_vocab)  # type: ignore[arg-type]
    sampler.close()
    sampler.close()
    with pytest.raises(qinfer.Closed):
        sampler.sample(np.zeros(8, np.float32))


def test_accepted_tokens_count_for_penalties() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    sampler = Sampler(3, Sampling(temperature=0, presence_penalty=0.5))
    assert sampler.sample(logits) == 0
    fresh = Sampler(3, Sampling(temperature=0, presence_penalty=0.5))
    fresh.accept([0])
    assert fresh.sample(logits) == 1


def test_sampling_is_a_value() -> None:
    assert Sampling() == Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)
    assert hash(Sampling(logit_bias={1: 2.0})) == hash(Sampling(logit_bias={1: 2.0}))
    assert pickle.loads(pickle.dumps(Sampling(seed=4))) == Sampling(seed=4)
    with pytest.raises(AttributeError):
        Sampling().top_k = 3  # type: ignore[misc]


# ---- sequences ----


def test_truncating_and_feeding_again_gives_the_same_logits(context: Context) -> None:
    context.feed(TOKENS)
    expected = context.logits
    context.truncate(5)
    assert context.tokens() == TOKENS[:5]
    context.feed(TOKENS[5:])
    assert np.array_equal(context.logits, expected)


@pytest.mark.parametrize("n", [-1, 13])
def test_truncating_keeps_what_there_is(context: Context, n: int) -> None:
    context.feed(TOKENS)
    with pytest.raises(qinfer.ArgumentError, match=f"keep {n} tokens of sequence 0, which has 12"):
        context.truncate(n)
    with pytest.raises(qinfer.ArgumentError, match=f"keep {n} tokens of sequence 0"):
        context.fork(0, 1, n)


def test_a_fork_goes_its_own_way(context: Context) -> None:
    context.feed(TOKENS)
    context.fork(0, 1)
    context.fork(0, 2, 5)
    context.feed([9])
    expected = context.logits
    context.feed([10], seq=1)
    assert not np.array_equal(context.logits, expected)
    context.feed([*TOKENS[5:], 9], seq=2)
    assert np.array_equal(context.logits, expected)
    assert context.tokens(1) == [*TOKENS, 10]


def test_reuse_takes_the_longest_beginning_there_is(context: Context) -> None:
    context.feed(TOKENS[:4])
    context.feed(TOKENS[:8], seq=1)
    assert context.reuse(TOKENS, 2) == 8
    assert context.tokens(2) == TOKENS[:8]
    assert context.tokens(1) == TOKENS[:8]
    assert context.reuse([*TOKENS[:2], 9], 0) == 2
    assert context.tokens(0) == TOKENS[:2]
    # The last token is left to be fed, for its logits.
    assert context.reuse(TOKENS[:8], 1) == 7
    assert context.reuse([9, 9], 1) == 0


# ---- scoring ----


def test_score_is_the_log_softmax_at_the_targets(context: Context) -> None:
    context.feed(TOKENS, logits="all")
    logits = context.all_logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = [*range(11), -1]
    found = context.score(TOKENS, targets, seq=1)
    assert (found.dtype, found.shape) == (np.float32, (12,))
    assert found[-1] == 0
    np.testing.assert_allclose(found[:-1], logprobs[range(11), targets[:-1]], atol=1e-5)
    assert context.tokens(1) == TOKENS
    following = context.score(TOKENS, seq=2)
    np.testing.assert_allclose(following[:-1], logprobs[range(11), TOKENS[1:]], atol=1e-5)
    assert context.score([], seq=2).shape == (0,)


def test_wrong_targets_are_refused(context: Context) -> None:
    with pytest.raises(qinfer.ArgumentError, match="12 tokens cannot have 2 targets"):
        context.score(TOKENS, [1, 2])
    with pytest.raises(qinfer.ArgumentError, match="target"):
        context.score([1, 2], [1, 512])
    with pytest.raises(qinfer.ArgumentError, match="target"):
        context.score([1, 2], [1, -2])
    assert context.length() == 0


# ---- state files ----


def test_a_saved_sequence_goes_on_as_if_nothing_had_happened(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with model.context() as context:
        context.feed(TOKENS * 10)
        context.save_state(path)
        context.feed([7])
        expected = context.logits
    with model.context(n_seq=2) as context:
        context.feed([5, 6, 7], seq=1)
        context.load_state(path, seq=1)
        assert context.tokens(1) == TOKENS * 10
        context.feed([7], seq=1)
        assert np.array_equal(context.logits, expected)
    assert [item.name for item in tmp_path.iterdir()] == ["state"]


def test_an_empty_sequence_can_be_saved(model: Model, tmp_path: Path) -> None:
    with model.context() as context:
        context.save_state(tmp_path / "state")
        context.feed(TOKENS)
        context.load_state(tmp_path / "state")
        assert context.tokens() == []


def change(at: int) -> Callable[[bytes], bytes]:
    """Flips a bit of the byte at an index."""
    return lambda data: data[:at] + bytes((data[at] ^ 4,)) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a file written by"),
        (lambda data: data[:50], "not a file written by"),
        (change(0), "not a file written by"),
        (change(8), "version 6"),
        (change(12), "bytes, its header says"),
        (change(20), "bytes, its header says"),
        (change(30), "another model"),
        (change(60), "checksum"),
        (change(90), "checksum"),
        (change(-1000), "checksum"),
        (lambda data: data[:-1], "bytes, its header says"),
        (lambda data: data + b"\0", "bytes, its header says"),
    ],
)
def test_a_damaged_state_is_refused(
    context: Context, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "state"
    context.feed(TOKENS)
    context.save_state(path)
    path.write_bytes(damage(path.read_bytes()))
    context.feed([5])
    with pytest.raises(qinfer.FormatError, match=message):
        context.load_state(path)
    assert context.tokens() == [*TOKENS, 5]


def test_a_state_of_another_kind_is_refused(
    model: Model, stories260k: Path, tmp_path: Path
) -> None:
    changed = bytearray(stories260k.read_bytes())
    changed[-1] ^= 1
    # Samples are taken where tensors begin and in their middle; the header counts as a whole.
    name = changed.index(b"stories260K")
    changed[name] ^= 1
    other_path = tmp_path / "other.gguf"
    other_path.write_bytes(changed)
    with model.context() as context:
        context.feed(TOKENS)
        context.save_state(tmp_path / "state")
    with (
        Model(other_path) as other,
        other.context() as context,
        pytest.raises(qinfer.FormatError, match="another model"),
    ):
        context.load_state(tmp_path / "state")
    with model.context(n_ctx=8) as small:
        with pytest.raises(qinfer.ContextFull):
            small.load_state(tmp_path / "state")
        assert small.length() == 0


def test_state_files_that_cannot_be_read_or_written(context: Context, tmp_path: Path) -> None:
    with pytest.raises(qinfer.FileError, match="none"):
        context.load_state(tmp_path / "none")
    with pytest.raises(qinfer.FileError, match="no-such-folder"):
        context.save_state(tmp_path / "no-such-folder" / "state")
    for use in (context.load_state, context.save_state):
        with pytest.raises(qinfer.ArgumentError, match="NUL"):
            use("a\0b")


# ---- the context itself ----


def test_limits_and_memory_are_told(model: Model) -> None:
    with model.context(n_ctx=200, n_seq=2, n_batch=32, threads=1) as context:
        info = context.info
        assert (info.n_ctx, info.n_seq, info.n_batch, info.threads) == (200, 2, 32, 1)
        assert info.kv_type == "f16"
        assert info.kv_bytes_used == 0
        context.feed([1] * 100)
        grown = context.info
        assert grown.kv_bytes_used >= 100 * model.info.kv_bytes_per_token_f16
        assert grown.kv_bytes_used <= grown.kv_bytes_reserved
        context.truncate(0)
        assert context.info.kv_bytes_used == 0
        context.set_threads(2)
        assert context.info.threads == 2


def test_counters(model: Model) -> None:
    with model.context() as context:
        context.feed(TOKENS)
        sampler = Sampler(512)
        context.step([5], [sampler])
        stats = context.stats()
        assert (stats.n_prompt_tokens, stats.n_generated_tokens) == (12, 1)
        assert stats.weight_bytes_read == model.info.n_bytes_per_token
        assert stats.prompt_seconds > 0
        assert stats.generated_seconds > 0
        context.reset_stats()
        assert context.stats() == qinfer.Stats(layers=(LayerStats(),) * model.info.n_layer)


def test_cancel_reaches_the_next_feed_and_no_further(context: Context) -> None:
    context.feed(TOKENS)
    for use in (
        lambda: context.feed([5]),
        lambda: context.step([5], [Sampler(512)]),
        lambda: context.score(TOKENS),
    ):
        context.cancel()
        with pytest.raises(qinfer.Cancelled):
            use()
        assert context.tokens() == TOKENS
    context.cancel()
    context.clear_cancel()
    context.feed([5])
    assert context.length() == len(TOKENS) + 1


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 0},
        {"n_ctx": 2**31},
        {"n_seq": 0},
        {"n_seq": -1},
        {"n_batch": 0},
        {"n_batch": 1.5},
        {"threads": 0},
        {"threads": 10**6},
        {"kv_type": "f32"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(
    model: Model, options: dict[str, object]
) -> None:
    (name,) = options
    with pytest.raises(qinfer.ArgumentError, match=name):
        model.context(**options)  # type: ignore[arg-type]


def test_a_closed_context_says_so_and_closes_twice(model: Model) -> None:
    context = model.context()
    context.feed(TOKENS)
    context.close()
    context.close()
    assert context.closed
    for use in (
        lambda: context.feed([1]),
        lambda: context.logits,
        lambda: context.step([1], [Sampler(512)]),
        lambda: context.score([1, 2]),
        lambda: context.length(),
        lambda: context.truncate(0),
        lambda: context.info,
        lambda: context.stats(),
        lambda: context.cancel(),
        lambda: context.set_threads(1),
    ):
        with pytest.raises(qinfer.Closed, match="context is closed"):
            use()


def test_a_context_outlives_the_name_of_its_model(stories260k: Path) -> None:
    context = Model(stories260k).context()
    context.feed(TOKENS)
    assert math.isfinite(context.logits.sum())


def test_a_context_does_not_pickle_and_says_what_does(context: Context) -> None:
    with pytest.raises(TypeError, match="pickle its Model"):
        pickle.dumps(context)
