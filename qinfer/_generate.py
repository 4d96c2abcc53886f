"""Generation: settings of a call, answers in progress, and the loop that computes them together."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._keywords import unknown_keyword
from ._stop import StopFilter
from .completion import (
    Completion,
    FinishReason,
    Piece,
    Stats,
    Timings,
    TokenLogprob,
    Usage,
    token_logprob,
)
from .context import Context, Progress
from .errors import ArgumentError, ContextFull
from .offload import Placement
from .sampling import Sampler, Sampling, SamplingOptions

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], None]

# Prompts that share fewer tokens than this at their beginning are simply computed together.
_WORTH_SHARING = 32


class GenerateOptions(SamplingOptions, total=False):
    """Keyword arguments of everything that generates; those of `Sampling` are among them.

    Attributes:
        max_tokens: how many tokens at most; None goes on to the end of the answer or the context.
        min_tokens: before this many, no token that ends the text is drawn.
        stop: strings (or token ids) that end the answer and are not part of it. Strings may span
            tokens and are never emitted in part.
        ignore_eos: never draws the tokens that end a text.
        logprobs: gives each token's log probability and those of this many best tokens.
        sampling: settings to start from, instead of the defaults of `Sampling`.
        logits_processors: callables `f(tokens, logits)` that change the logits (float32 of shape
            (n_vocab,)) in place; `tokens` holds prompt and answer so far. Each costs a copy of the
            logits and a call into Python per token.
        progress: called while the prompt is computed, as `progress(done, total)`, in tokens.
    """

    max_tokens: int | None
    min_tokens: int
    stop: str | int | Sequence[str | int] | None
    ignore_eos: bool
    logprobs: int | None
    sampling: Sampling | None
    logits_processors: Sequence[LogitsProcessor]
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one call, checked."""

    sampling: Sampling
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    progress: Progress | None = None

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Settings:
        """Checks keyword arguments.

        Raises TypeError for an unknown name, ArgumentError for a value out of range.
        """
        own = {name: options[name] for name in GenerateOptions.__annotations__ if name in options}
        sampled = {name: options[name] for name in SamplingOptions.__annotations__ if name in own}
        for name in options:
            if name not in own:
                raise TypeError(unknown_keyword(name, list(GenerateOptions.__annotations__)))
        for name in sampled:
            del own[name]
        sampling = own.pop("sampling", None) or Sampling()
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling={sampling!r:.80} is not a Sampling")
        stops = _stops(own.pop("stop", None))
        for name, least in (("max_tokens", 0), ("min_tokens", 0), ("logprobs", 0)):
            value = own.get(name)
            if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
                none = " (None: to the end)" if name == "max_tokens" else ""
                raise ArgumentError(f"{name}={value!r} is not an integer of at least {least}{none}")
        processors = own.get("logits_processors") or ()
        if not isinstance(processors, Sequence) or not all(map(callable, processors)):
            raise ArgumentError(f"logits_processors={processors!r:.80} is not a list of callables")
        own["logits_processors"] = tuple(processors)
        return cls(
            sampling=sampling.changed(sampled).seeded(),
            stop=tuple(item for item in stops if isinstance(item, str)),
            stop_tokens=frozenset(int(item) for item in stops if not isinstance(item, str)),
            **own,
        )


def _stops(stop: Any) -> list[str | int]:
    """The stop strings and tokens of an option: one of either, or several."""
    stops = stop
    if stop is None or isinstance(stop, (str, int, np.integer)):
        stops = [] if stop is None else [stop]
    if not isinstance(stops, Iterable) or isinstance(stops, (bytes, bytearray)):
        raise ArgumentError(f"stop={stop!r:.80} is neither a string nor a list of strings")
    stops = list(stops)
    for item in stops:
        if not isinstance(item, (str, int, np.integer)) or isinstance(item, bool) or item == "":
            raise ArgumentError(f"stop={item!r:.80} is neither a non-empty string nor a token id")
    return stops


class Answer:
    """One prompt and what has been generated for it."""

    def __init__(
        self,
        prompt: list[int],
        settings: Settings,
        tokenizer: Tokenizer,
        *,
        n_vocab: int,
        n_ctx: int,
        at_start: bool,
    ) -> None:
        if not prompt:
            raise ArgumentError(
                "the prompt is empty, and this model begins no text with a BOS token"
            )
        if len(prompt) > n_ctx:
            raise ContextFull(
                f"the prompt has {len(prompt)} tokens and the context holds {n_ctx}: "
                "shorten the prompt or raise n_ctx"
            )
        for token in settings.stop_tokens:
            if not 0 <= token < n_vocab:
                raise ArgumentError(
                    f"stop={token} is not in the vocabulary, which has ids 0 to {n_vocab - 1}"
                )
        self.prompt = prompt
        self.settings = settings
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stats = Stats()
        self.placement: Placement | None = None
        self.kv_host_shares: list[float] | None = None
        self.n_cached = 0
        room = n_ctx - len(prompt)
        self._n_most = room if settings.max_tokens is None else min(settings.max_tokens, room)
        sampling = settings.sampling
        ends = frozenset(tokenizer.eog_ids)
        if settings.ignore_eos:
            banned = {**sampling.logit_bias, **dict.fromkeys(ends, -math.inf)}
            sampling = replace(sampling, logit_bias=banned)
        self._ends = ends | settings.stop_tokens
        self._end_ids = np.fromiter(self._ends, np.intp)
        self.sampler = Sampler(n_vocab, sampling)
        self.sampler.accept(prompt)
        self._history = list(prompt)
        # At the start of a text, the space that `encode` puts there is not part of the answer.
        at_start |= all(id < tokenizer.n_vocab and tokenizer.is_control(id) for id in prompt)
        self._decoder = tokenizer.decoder(at_start=at_start)
        self._n_spelled = tokenizer.n_vocab
        self._filter = StopFilter(settings.stop)
        self._start = self._prompt_end = self._end = time.perf_counter()

    @property
    def next_token(self) -> int:
        """The token drawn last, which is to be fed next."""
        return self._history[-1]

    @property
    def changes_logits(self) -> bool:
        """Whether the next draw is from other logits than the model's own."""
        return bool(self.settings.logits_processors) or len(self.tokens) < self.settings.min_tokens

    def start(self, n_cached: int) -> None:
        """Notes that the prompt is about to be computed, but for its first `n_cached` tokens."""
        self.n_cached = n_cached
        self._start = time.perf_counter()

    def prompt_done(self) -> Piece | None:
        """Notes that the prompt was computed; gives the last piece when nothing may follow."""
        self._prompt_end = self._end = time.perf_counter()
        return self.finish("length") if self._n_most == 0 else None

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Draws a token from the model's logits after the changes that were asked for."""
        if self.changes_logits:
            logits = logits.copy()
            for process in self.settings.logits_processors:
                changed: object = process(self._history, logits)
                # Elsewhere processors return the logits; what is new in those would be lost.
                if changed is not None and changed is not logits:
                    raise ArgumentError(
                        f"a logits processor returned a {type(changed).__name__}: it has to change "
                        "the logits in place, as by logits[:] = …, and return nothing"
                    )
            if len(self.tokens) < self.settings.min_tokens:
                logits[self._end_ids] = -math.inf
        return self.sampler.sample(logits)

    def take(self, token: int, logits: NDArray[np.float32] | None) -> Piece:
        """Adds a token that was drawn; `logits` are needed when log probabilities are wanted."""
        if token in self._ends:
            return self.finish("stop")
        self.tokens.append(token)
        self._history.append(token)
        logprob = None
        if self.settings.logprobs is not None and logits is not None:
            logprob = token_logprob(logits, token, self.settings.logprobs)
            self.logprobs.append(logprob)
        # A model may have more rows than its vocabulary has tokens; such a token has no text.
        text = self._filter.add(self._decoder.push(token) if token < self._n_spelled else "")
        if self._filter.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._n_most:
            text += self._rest()
            self.finish_reason = "stop" if self._filter.stopped else "length"
        self.text += text
        self._end = time.perf_counter()
        return Piece(text, token, logprob, self.finish_reason)

    def finish(self, reason: FinishReason) -> Piece:
        """Ends the answer without another token."""
        self.finish_reason = reason
        text = self._rest()
        self.text += text
        self._end = time.perf_counter()
        return Piece(text, finish_reason=reason)

    def _rest(self) -> str:
        """Text held back; an incomplete character may still complete a stop string."""
        text = self._filter.add(self._decoder.flush())
        return text if self._filter.stopped else text + self._filter.finish()

    def account(self, context: Context, before: Stats | None = None) -> None:
        """Notes what the context counted, since `before` if given, and where it computed."""
        stats = context.stats()
        self.stats = stats if before is None else stats - before
        self.placement = context.placement
        if self.placement is not None:
            self.kv_host_shares = context.kv_host_shares().tolist()

    def completion(self) -> Completion:
        """The answer, which must be finished."""
        assert self.finish_reason is not None
        prompt_seconds = self._prompt_end - self._start
        generation_seconds = self._end - self._prompt_end
        n_computed = len(self.prompt) - self.n_cached
        # The first token comes out of the prompt's own computation.
        n_steps = max(0, len(self.tokens) - 1)
        return Completion(
            text=self.text,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            usage=Usage(len(self.prompt), self.n_cached, len(self.tokens)),
            timings=Timings(
                prompt=prompt_seconds,
                generation=generation_seconds,
                prompt_tokens_per_second=_rate(n_computed, prompt_seconds),
                tokens_per_second=_rate(n_steps, generation_seconds),
            ),
            stats=self.stats,
            seed=self.sampler.seed,
            logprobs=None if self.settings.logprobs is None else self.logprobs,
            placement=self.placement,
            kv_host_shares=self.kv_host_shares,
        )


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n and seconds > 0 else 0.0


def run(context: Context, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Piece]]:
    """Generates answers in a context, as many at once as it has sequences.

    Yields each piece with its answer; what the context's sequences still hold is used again.
    """
    waiting = deque(answers)
    free = set(range(context.n_seq))
    active: dict[int, Answer] = {}
    while waiting or active:
        if waiting and free:
            started = {}
            while waiting and free:
                seq = _seat(context, free, waiting[0].prompt)
                free.remove(seq)
                started[seq] = waiting.popleft()
            active |= started
            rows = _read_prompts(context, started)
            drawn = {}
            for (seq, answer), logits in zip(started.items(), rows, strict=True):
                last = answer.prompt_done()
                if last is None:
                    drawn[seq] = (answer.draw(logits), logits)
                else:
                    del active[seq]
                    free.add(seq)
                    yield answer, last
        else:
            drawn = _step(context, active)
        for seq, (token, row) in drawn.items():
            answer = active[seq]
            piece = answer.take(token, row)
            if answer.finish_reason is not None:
                del active[seq]
                free.add(seq)
            yield answer, piece


def _seat(context: Context, free: Iterable[int], prompt: Sequence[int]) -> int:
    """The free sequence that loses least of what it holds; of those, the one that shares most."""

    def cost(seq: int) -> tuple[int, int]:
        shared = context.n_shared(prompt, seq)
        return context.length(seq) - shared, -shared

    return min(free, key=cost)


def _read_prompts(context: Context, started: Mapping[int, Answer]) -> NDArray[np.float32]:
    """Computes prompts, but for what a sequence already holds; one row of logits for each."""
    prompts = [answer.prompt for answer in started.values()]
    progress = next(iter(started.values())).settings.progress
    first = next(iter(started))
    held = {first: context.reuse(prompts[0], first)}
    shared = _n_shared(prompts)
    if len(prompts) > 1 and shared - held[first] >= _WORTH_SHARING:
        begin = prompts[0][held[first] : shared]
        context.feed(begin, seq=first, logits="none", progress=progress)
    rest = {}
    for seq, answer in started.items():
        if seq not in held:
            held[seq] = context.reuse(answer.prompt, seq)
        answer.start(held[seq])
        rest[seq] = answer.prompt[context.length(seq) :]
    context.feed_batch(rest, progress=progress)
    return context.all_logits


def _n_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with, short of the whole of any."""
    shortest = min(map(len, prompts)) - 1
    columns = zip(*prompts, strict=False)
    return next((i for i, ids in enumerate(columns) if i == shortest or len({*ids}) > 1), shortest)


def _step(
    context: Context, active: Mapping[int, Answer]
) -> dict[int, tuple[int, NDArray[np.float32] | None]]:
    """Feeds each answer's last token and draws its next: by sequence, the token and the logits."""
    answers = list(active.values())
    tokens = [answer.next_token for answer in answers]
    if any(answer.changes_logits for answer in answers):
        fed = {seq: [token] for seq, token in zip(active, tokens, strict=True)}
        context.feed_batch(fed, generated=True)
        logits = context.all_logits
        drawn = [answer.draw(row) for answer, row in zip(answers, logits, strict=True)]
        return dict(zip(active, zip(drawn, logits, strict=True), strict=True))
    drawn = context.step(tokens, [answer.sampler for answer in answers], seqs=list(active))
    rows: Sequence[NDArray[np.float32] | None] = [None] * len(answers)
    if any(answer.settings.logprobs is not None for answer in answers):
        rows = list(context.all_logits)
    return dict(zip(active, zip(drawn, rows, strict=True), strict=True))
