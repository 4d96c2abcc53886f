"""Contexts: sequences of tokens over one model, fed in batches, with logits as arrays."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ._checks import INT32_MAX, flag, positive
from ._create_context import create_context
from ._files import StrPath
from ._history import History
from ._interrupt import run_interruptibly
from ._kv_place import KvPlace, mode_name
from ._kv_type import kv_tensor_type
from ._native import Handle, check, ffi, lib, new_error
from ._types import type_name
from ._weights import Weights
from .completion import Stats
from .errors import ArgumentError, Busy, FormatError
from .offload import Placement
from .sampling import Sampler, token_array
from .sparsity import LayerStats, Policy

Tokens = Sequence[int] | NDArray[np.integer[Any]]
Wanted = Literal["none", "last", "all"]
Progress = Callable[[int, int], None]

# A feed of more tokens than this may take long enough for Ctrl-C to have to reach into it.
SHORT_FEED = 16

_ALL_NEURONS = Policy()
_KV_PLACE = KvPlace()


@dataclass(frozen=True, slots=True)
class ContextInfo:
    """Limits of a context, and its memory in bytes; `kv_bytes_reserved` is address space.

    `on_gpu` is false where no GPU is used, or the model's has no room for this context. `kv_mode`
    is "device", "host" or "split", and `n_device_pages` how many pages of keys and values a GPU has
    room for.
    """

    n_ctx: int
    n_seq: int
    n_batch: int
    threads: int
    kv_type: str
    page_size: int
    kv_bytes_used: int
    kv_bytes_reserved: int
    scratch_bytes: int
    on_gpu: bool
    kv_mode: str
    n_device_pages: int


class Context:
    """Sequences of tokens that a model has read, with everything it remembers of them.

    Made by `Model.context`. A context serves one thread at a time and raises Busy otherwise;
    different contexts, also of one model, run in parallel. When a call fails or is interrupted,
    the sequences are as they were before it. Ctrl-C stops a running call within milliseconds.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        n_ctx: int | None = None,
        n_seq: int = 1,
        n_batch: int | None = None,
        threads: int | None = None,
        kv_type: str = "f16",
        kv_place: KvPlace = _KV_PLACE,
        policy: Policy = _ALL_NEURONS,
        deterministic: bool = False,
    ) -> None:
        kv_place.check_device(weights)
        if deterministic and kv_place.step:
            raise ArgumentError(
                f"kv_step={kv_place.step:g} follows the times that steps take, which shows in the "
                "last bits of what is computed: not with deterministic=True"
            )
        self._weights = weights
        self.policy = policy
        self.model_info = weights.info
        params = ffi.new("qi_context_params *")
        params.n_ctx = positive("n_ctx", n_ctx)
        params.n_seq = positive("n_seq", n_seq)
        params.n_batch = positive("n_batch", n_batch)
        params.n_threads = positive("threads", threads)
        params.kv_type = kv_tensor_type(kv_type).number
        params.prompt_rule = policy.prompt_rule
        params.generated_rule = policy.generated_rule
        params.sparse_threshold = math.nan if policy.threshold is None else policy.threshold
        params.cross_layer_from = policy.cross_layer_from or 0
        params.kv_mode = kv_place.number
        params.kv_ratio = math.nan if kv_place.ratio is None else kv_place.ratio
        params.kv_step = kv_place.step or 0.0
        params.deterministic = flag("deterministic", deterministic)
        pointer, self.on_gpu = create_context(weights, params, may_do_without=kv_place.is_default)
        self._handle = Handle(pointer, lib.qi_context_close, "this context")
        self._lock = threading.Lock()
        self.n_seq = n_seq
        self._histories = [History() for _ in range(n_seq)]
        self._outputs: dict[str, NDArray[np.float32]] = {}
        self._n_hidden = 0
        weights.contexts.add(self)

    @property
    def lacks_gpu(self) -> bool:
        """Whether it is computed without the GPU that the model is on, for want of memory there."""
        share = self._weights.offload
        return not self.on_gpu and share is not None and not share.has_failed

    @property
    def placement(self) -> Placement | None:
        """What of the model the GPU that computes this keeps; None where the processor alone does.

        Raises Closed after `close()`.
        """
        self._handle.pointer  # noqa: B018  raises Closed
        share = self._weights.offload
        return share.placement if share is not None and self.on_gpu else None

    # ---- feeding ----

    def feed(
        self,
        tokens: Tokens,
        *,
        seq: int = 0,
        logits: Wanted = "last",
        hidden: Wanted = "none",
        generated: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Appends tokens to a sequence and computes them.

        Args:
            tokens: token ids.
            seq: which sequence.
            logits: of which of these tokens to compute logits.
            hidden: of which to keep the final normalised hidden state.
            generated: computes them as generated tokens and not as a prompt, where the context's
                policy tells these apart.
            progress: called about twenty times a second as `progress(done, total)`, in tokens.

        Raises:
            ArgumentError: a token is outside the vocabulary, or the sequence does not exist.
            ContextFull: the tokens do not fit; the message states both numbers.
            Cancelled: `cancel()` was called.
            Busy: another thread is inside this context.
        """
        self.feed_batch(
            {seq: tokens}, logits=logits, hidden=hidden, generated=generated, progress=progress
        )

    def feed_batch(
        self,
        tokens: Mapping[int, Tokens],
        *,
        logits: Wanted = "last",
        hidden: Wanted = "none",
        generated: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Appends tokens to several sequences at once: `{sequence: tokens}`.

        Outputs come in the mapping's order; otherwise as `feed`.
        """
        n_vocab = self.model_info.n_vocab
        parts = {seq: token_array(ids, n_vocab) for seq, ids in tokens.items()}
        for seq in parts:
            self._check_seq(seq)
        lengths = [len(part) for part in parts.values()]
        total = sum(lengths)
        if total == 0:
            return
        ids = np.concatenate(list(parts.values()))
        seqs = np.repeat(np.fromiter(parts, np.int32, len(parts)), lengths)
        flags = _wanted("logits", logits, lengths) * np.uint8(lib.QI_WANT_LOGITS)
        flags |= _wanted("hidden", hidden, lengths) * np.uint8(lib.QI_WANT_HIDDEN)
        if generated:
            flags |= np.uint8(lib.QI_GENERATED)
        with self._exclusive(), self._transaction() as pointer:
            arguments = (
                ffi.from_buffer("int32_t[]", ids),
                ffi.from_buffer("int32_t[]", seqs),
                ffi.from_buffer("uint8_t[]", flags),
                total,
            )
            self._call(pointer, lib.qi_context_feed, arguments, total, progress)
            self._n_hidden = int(np.count_nonzero(flags & lib.QI_WANT_HIDDEN))
            for seq, part in parts.items():
                self._histories[seq].extend(part, generated=generated)

    def step(
        self, tokens: Sequence[int], samplers: Sequence[Sampler], *, seqs: Sequence[int] = (0,)
    ) -> list[int]:
        """Appends `tokens[i]` to sequence `seqs[i]` and draws its next token with `samplers[i]`.

        The fast way to generate: one call computes and draws for all sequences, each of which may
        appear once. The logits drawn from are in `all_logits` afterwards.
        """
        n = len(seqs)
        if len(tokens) != n or len(samplers) != n:
            raise ArgumentError(
                f"step takes as many tokens and samplers as sequences, "
                f"not {len(tokens)}, {len(samplers)} and {n}"
            )
        ids = token_array(tokens, self.model_info.n_vocab)
        for seq in seqs:
            self._check_seq(seq)
        with self._exclusive(), self._transaction() as pointer:
            pointers = [sampler.pointer for sampler in samplers]  # held for the whole call
            drawn = ffi.new("int32_t[]", n)
            error = new_error()
            status = lib.qi_context_step(
                pointer,
                ffi.from_buffer("int32_t[]", ids),
                ffi.new("int32_t[]", list(seqs)),
                ffi.new("qi_sampler *[]", pointers),
                n,
                drawn,
                error,
            )
            if status == lib.QI_ARGUMENT and lib.qi_context_n_logits(pointer):
                self._refuse_nan(self._rows("logits", pointer))
            check(status, error)
            for seq, token in zip(seqs, ids, strict=True):
                self._histories[seq].extend(token[np.newaxis], generated=True)
            return list(ffi.unpack(drawn, n))

    def sample(self, sampler: Sampler, index: int = -1) -> int:
        """Draws a token from row `index` of the last feed's logits; does not feed it."""
        return sampler.sample(self.all_logits[index])

    def score(
        self,
        tokens: Tokens,
        targets: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        *,
        seq: int = 0,
        generated: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Appends tokens to a sequence and returns log p(targets[i] | all up to tokens[i]).

        `targets` are as many token ids, -1 where no answer is wanted (0 is written there); without
        it each token's target is the one after it, and the last has none. `generated` is as in
        `feed`. Returns float32 of shape (n_tokens,), natural logarithms. Logits are never all
        kept. Raises as `feed` does.
        """
        n_vocab = self.model_info.n_vocab
        ids = token_array(tokens, n_vocab)
        if targets is None:
            wanted = np.append(ids[1:], np.int32(-1)).astype(np.int32)[: len(ids)]
        else:
            # Shifted by one, -1 is a target like any other.
            shifted = token_array(np.asarray(targets) + 1, n_vocab + 1, "target")
            wanted = shifted - np.int32(1)
        if len(wanted) != len(ids):
            raise ArgumentError(f"{len(ids)} tokens cannot have {len(wanted)} targets")
        self._check_seq(seq)
        logprobs = np.zeros(len(ids), np.float32)
        if len(ids) == 0:
            return logprobs
        with self._exclusive(), self._transaction() as pointer:
            arguments = (
                seq,
                ffi.from_buffer("int32_t[]", ids),
                ffi.from_buffer("int32_t[]", wanted),
                len(ids),
                generated,
                ffi.from_buffer("float[]", logprobs),
            )
            self._call(pointer, lib.qi_context_score, arguments, len(ids), progress)
            self._refuse_nan(logprobs)
            self._histories[seq].extend(ids, generated=generated)
        return logprobs

    def _call(
        self,
        pointer: Any,
        function: Callable[..., int],
        arguments: tuple[Any, ...],
        n_tokens: int,
        progress: Progress | None,
    ) -> None:
        """One long call of the runtime, which Ctrl-C can stop and `progress` can follow."""
        error = new_error()
        report: Callable[[], None] | None = None
        if progress is not None:

            def report() -> None:
                progress(int(n_tokens * lib.qi_context_progress(pointer)), n_tokens)

        main = threading.current_thread() is threading.main_thread()
        if report is None and (n_tokens <= SHORT_FEED or not main):
            status = function(pointer, *arguments, error)
        else:
            status = run_interruptibly(
                lambda: function(pointer, *arguments, error),
                lambda: lib.qi_context_cancel(pointer),
                report,
            )
        check(status, error)
        if progress is not None:
            progress(n_tokens, n_tokens)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """The C context, for a change of sequences; whatever goes wrong leaves them as they were.

        That includes Ctrl-C, which can come when the runtime is done and nothing was noted yet.
        """
        pointer = self._handle.pointer
        self._forget_outputs()
        lengths = [len(history) for history in self._histories]
        try:
            yield pointer
        except BaseException:
            for seq, length in enumerate(lengths):
                lib.qi_context_truncate(pointer, seq, length, ffi.NULL)
                self._histories[seq].truncate(length)
            lib.qi_context_clear_cancel(pointer)
            raise

    # ---- outputs ----

    @property
    def logits(self) -> NDArray[np.float32]:
        """Logits of the last token of the last feed: read-only float32 of shape (n_vocab,).

        Later feeds leave the array as it is. Raises ArgumentError when the last feed asked for
        none, FormatError when they are NaN, naming the tensor at fault.
        """
        row: NDArray[np.float32] = self.all_logits[-1]
        return row

    @property
    def all_logits(self) -> NDArray[np.float32]:
        """All logits that the last feed asked for, in its order: read-only, shape (n, n_vocab)."""
        return self._output("logits")

    @property
    def hidden(self) -> NDArray[np.float32]:
        """Final normalised hidden states that the last feed asked for: read-only, (n, n_embd)."""
        return self._output("hidden")

    def _output(self, name: Literal["logits", "hidden"]) -> NDArray[np.float32]:
        with self._exclusive():
            pointer = self._handle.pointer
            if name not in self._outputs:
                rows = self._rows(name, pointer)
                self._refuse_nan(rows)
                rows.flags.writeable = False
                self._outputs[name] = rows
            return self._outputs[name]

    def _rows(self, name: Literal["logits", "hidden"], pointer: Any) -> NDArray[np.float32]:
        """A copy of what the last feed left in the runtime."""
        if name == "logits":
            get, n, width = lib.qi_context_logits, lib.qi_context_n_logits(pointer), "n_vocab"
        else:
            get, n, width = lib.qi_context_hidden, self._n_hidden, "n_embd"
        if n == 0:
            raise ArgumentError(f"the last feed asked for no {name}")
        rows = np.empty((n, getattr(self.model_info, width)), np.float32)
        row = ffi.new("float **")
        error = new_error()
        for i in range(n):
            check(get(pointer, i, row, error), error)
            ffi.memmove(rows[i], row[0], rows[i].nbytes)
        return rows

    def _refuse_nan(self, values: NDArray[np.float32]) -> None:
        if math.isnan(values.max()):  # the greatest is NaN as soon as one is
            self._weights.refuse_nan()

    def _forget_outputs(self) -> None:
        self._outputs.clear()
        self._n_hidden = 0

    # ---- sequences ----

    def length(self, seq: int = 0) -> int:
        """Number of tokens a sequence holds."""
        return len(self.tokens(seq))

    def tokens(self, seq: int = 0) -> list[int]:
        """The tokens a sequence holds."""
        self._check_seq(seq)
        self._handle.pointer  # noqa: B018  raises Closed
        return list(self._histories[seq].tokens)

    def truncate(self, n: int, seq: int = 0) -> None:
        """Drops what a sequence holds beyond its first `n` tokens."""
        self._check_seq(seq)
        with self._exclusive():
            held = len(self._histories[seq])
            if not 0 <= n <= held:
                raise ArgumentError(f"cannot keep {n} tokens of sequence {seq}, which has {held}")
            error = new_error()
            check(lib.qi_context_truncate(self._handle.pointer, seq, n, error), error)
            self._histories[seq].truncate(n)

    def fork(self, source: int, target: int, n_keep: int | None = None) -> None:
        """Makes sequence `target` the first `n_keep` tokens (all without it) of `source`.

        Full pages are shared, not copied.
        """
        self._check_seq(source)
        self._check_seq(target)
        with self._exclusive():
            held = len(self._histories[source])
            n = held if n_keep is None else n_keep
            if not 0 <= n <= held:
                raise ArgumentError(f"cannot keep {n} tokens of sequence {source}, of {held}")
            error = new_error()
            check(lib.qi_context_fork(self._handle.pointer, source, target, n, error), error)
            self._histories[target] = self._histories[source].first(n)

    def n_shared(self, tokens: Sequence[int], seq: int = 0) -> int:
        """Number of tokens that a sequence and the prompt `tokens` begin with in common.

        What was generated is not part of a prompt where the policy computes it otherwise.
        """
        self._check_seq(seq)
        return self._histories[seq].n_shared(tokens, prompt_only=self.policy.tells_roles_apart)

    def reuse(self, tokens: Sequence[int], seq: int = 0) -> int:
        """Makes a sequence hold as much of the beginning of `tokens` as any sequence has in memory.

        The rest of what it held is dropped. Returns the number of tokens held, which leaves at
        least the last of `tokens` to be fed, so that its logits can be had.
        """
        self._check_seq(seq)
        shared = [self.n_shared(tokens, i) for i in range(len(self._histories))]
        best = max(range(len(shared)), key=lambda i: (shared[i], i == seq))
        n = max(0, min(shared[best], len(tokens) - 1))
        if best == seq:
            self.truncate(n, seq)
        else:
            self.fork(best, seq, n)
        return n

    def save_state(self, path: StrPath, seq: int = 0) -> None:
        """Writes a sequence, tokens and all, to a file that `load_state` reads back.

        The file appears whole or not at all. Raises FileError when it cannot be written.
        """
        from . import _state

        self._check_seq(seq)
        with self._exclusive():
            pointer = self._handle.pointer
            data = np.empty(lib.qi_context_state_size(pointer, seq), np.uint8)
            error = new_error()
            check(
                lib.qi_context_state_save(pointer, seq, ffi.from_buffer(data), data.nbytes, error),
                error,
            )
            held = self._histories[seq]
            history = held.first(len(held))
        _state.write(path, self._weights.fingerprint, history, data)

    def load_state(self, path: StrPath, seq: int = 0) -> None:
        """Replaces a sequence by one that `save_state` wrote.

        The sequence is empty when the file's state does not fit this context. Raises FormatError
        for a file that is not one, was cut or changed, or was written with another model or
        `kv_type`; FileError when it cannot be read; ContextFull when it holds more tokens than this
        context.
        """
        from . import _state

        self._check_seq(seq)
        history, data = _state.read(path, self._weights.fingerprint)
        with self._exclusive():
            pointer = self._handle.pointer
            self._forget_outputs()
            self._histories[seq].truncate(0)
            error = new_error()
            buffer = ffi.from_buffer(data)
            try:
                check(lib.qi_context_state_load(pointer, seq, buffer, data.nbytes, error), error)
                if lib.qi_context_seq_length(pointer, seq) != len(history):
                    raise FormatError(f"{path!r} does not hold the tokens that its header lists")
                self._histories[seq] = history
            except BaseException:
                lib.qi_context_truncate(pointer, seq, 0, ffi.NULL)
                raise

    def _check_seq(self, seq: int) -> None:
        if not 0 <= seq < len(self._histories):
            raise ArgumentError(
                f"sequence {seq} does not exist: this context has 0 to {len(self._histories) - 1}"
            )

    # ---- statistics ----

    def stats(self) -> Stats:
        """The counters since the context was made or `reset_stats` was called.

        From any thread: while another computes, as they were after one of its last steps.
        """
        out = ffi.new("qi_stats *")
        layer = ffi.new("qi_layer_stats *")
        layers = []
        pointer = self._handle.pointer
        check(lib.qi_context_get_stats(pointer, out))
        for index in range(self.model_info.n_layer):
            check(lib.qi_context_get_layer_stats(pointer, index, layer, ffi.NULL))
            fields = {name: getattr(layer, name) for name in LayerStats.__slots__}
            layers.append(LayerStats(**fields))
        return Stats(
            n_prompt_tokens=out.n_prompt_tokens,
            n_generated_tokens=out.n_generated_tokens,
            prompt_seconds=out.prompt_seconds,
            generated_seconds=out.generated_seconds,
            sample_seconds=out.sample_seconds,
            weight_bytes_read=out.weight_bytes_read,
            n_launches=out.n_launches,
            layers=tuple(layers),
        )

    def kv_host_shares(self) -> NDArray[np.float64]:
        """Which share of the positions the processor attended to last, by layer: shape (n_layer,).

        1 where it keeps all keys and values, 0 where a GPU does; with `kv_mode="split"` and a
        `kv_step`, read after each token, it is the curve of how the layers adapt.
        """
        shares = np.empty(self.model_info.n_layer)
        error = new_error()
        with self._exclusive():
            pointer = ffi.from_buffer("double[]", shares, require_writable=True)
            status = lib.qi_context_kv_host_shares(
                self._handle.pointer, pointer, len(shares), error
            )
            check(status, error)
        return shares

    def reset_stats(self) -> None:
        """Sets the counters to zero."""
        with self._exclusive():
            lib.qi_context_reset_stats(self._handle.pointer)

    def check_predictions(self, every: int) -> None:
        """Holds the predictions for every n-th generated token against all gates; 0 stops it.

        Of tokens that are fed several at a time, as by `score`, all are checked. What was found is
        in `stats()`: `n_checked`, `n_due` and `n_missed` of each layer.
        """
        if not 0 <= every <= INT32_MAX:
            raise ArgumentError(f"every={every!r} is not 0 or a positive number of tokens")
        error = new_error()
        with self._exclusive():
            check(lib.qi_context_check_predictions(self._handle.pointer, every, error), error)

    def count_activations(self, on: bool = True) -> None:
        """Starts counting, from 0, for how many tokens each neuron is active; or stops."""
        error = new_error()
        with self._exclusive():
            check(lib.qi_context_count_activations(self._handle.pointer, on, error), error)

    def activation_counts(self, layer: int) -> NDArray[np.uint64]:
        """For how many tokens each neuron of a layer was active: uint64 of shape (n_ff,).

        Raises ArgumentError when they are not being counted or the layer does not exist.
        """
        counts = np.empty(self.model_info.n_ff, np.uint64)
        error = new_error()
        with self._exclusive():
            check(
                lib.qi_context_activations(
                    self._handle.pointer,
                    layer,
                    ffi.from_buffer("uint64_t[]", counts),
                    len(counts),
                    error,
                ),
                error,
            )
        return counts

    # ---- the context itself ----

    @property
    def info(self) -> ContextInfo:
        """Limits and memory."""
        out = ffi.new("qi_context_info *")
        with self._exclusive():
            check(lib.qi_context_get_info(self._handle.pointer, out))
        return ContextInfo(
            n_ctx=out.n_ctx,
            n_seq=out.n_seq,
            n_batch=out.n_batch,
            threads=out.n_threads,
            kv_type=type_name(out.kv_type).lower(),
            page_size=out.page_size,
            kv_bytes_used=out.kv_bytes_used,
            kv_bytes_reserved=out.kv_bytes_reserved,
            scratch_bytes=out.scratch_bytes,
            on_gpu=self.on_gpu,
            kv_mode=mode_name(out.kv_mode),
            n_device_pages=out.n_device_pages,
        )

    def set_threads(self, threads: int) -> None:
        """Changes how many threads compute."""
        error = new_error()
        n = positive("threads", threads)
        with self._exclusive():
            check(lib.qi_context_set_threads(self._handle.pointer, n, error), error)

    def cancel(self) -> None:
        """From any thread: the feed now running, or else the next one, raises Cancelled."""
        lib.qi_context_cancel(self._handle.pointer)

    def clear_cancel(self) -> None:
        """Takes back a `cancel()` that no feed has met."""
        lib.qi_context_clear_cancel(self._handle.pointer)

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._handle.closed

    def close(self) -> None:
        """Frees the context at once; a call running in another thread is cancelled first.

        Calling it again does nothing; using the context afterwards raises Closed.
        """
        if not self._handle.closed:
            if self._lock.locked():
                self.cancel()
            self._handle.close()
            self._outputs.clear()

    def _exclusive(self) -> threading.Lock:
        """The lock for a `with` statement; raises Busy when another thread holds it.

        Testing first and then waiting leaves Ctrl-C no moment in which a lock is taken that nobody
        will free; two threads that pass the test at once take turns.
        """
        if self._lock.locked():
            raise Busy("this context is in use by another thread; give each thread its own")
        return self._lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a Context cannot be pickled; pickle its Model and make a new one there")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._histories)} sequences"
        return f"<Context of {self._weights.path!r}, {state}>"


def _wanted(name: str, which: str, lengths: Iterable[int]) -> NDArray[np.uint8]:
    """1 for each token whose output is wanted, sequence after sequence."""
    if which not in ("none", "last", "all"):
        raise ArgumentError(f"{name}={which!r} is not 'none', 'last' or 'all'")
    parts = []
    for n in lengths:
        part = np.full(n, which == "all", np.uint8)
        if which == "last":
            part[-1:] = 1
        parts.append(part)
    return np.concatenate(parts)
