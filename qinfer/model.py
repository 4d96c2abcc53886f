"""`Model`: a model file, and text generated, continued, chatted, scored or embedded with it."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeGuard, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from ._checks import flag, positive
from ._context_length import check_length, context_length
from ._files import StrPath
from ._generate import Answer, GenerateOptions, Settings, run
from ._gguf import Progress
from ._keywords import check_keywords, hinting
from ._kv_place import KvMode, KvPlace
from ._kv_type import check_heads, kv_tensor_type
from ._pool import ContextPool
from ._weights import ModelInfo, Weights
from .completion import Completion, Piece, Score
from .context import Context, Tokens, Wanted
from .errors import ArgumentError, ContextFull, FileError
from .offload import GpuSplit, NeuronCache, Placement, offload
from .sampling import token_array
from .sparsity import Policy, Prefill, SparsityMode, choose
from .stream import Stream, asynchronous

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

logger = logging.getLogger("qinfer")

Pooling = Literal["mean", "last", "cls", "none"]
Message = Mapping[str, Any]

# Prompts of a batch computed together; further ones take the places of those that end.
_MAX_TOGETHER = 16
# Sequences of a context kept between calls: two conversations can alternate without starting over.
_KEPT_SEQUENCES = 2


class Model:
    """A model from a GGUF (or PowerInfer) file.

        model = Model("model.gguf")
        print(model.generate("Once upon a time", max_tokens=64))

    The weights are mapped, not copied, and shared by everything made from the model. All methods
    may be called from several threads at once; each call then works in a context of its own, and
    those of earlier calls are kept, so that a prompt which begins like an earlier one is continued
    instead of computed again. The model is a context manager; `close()` frees it at once.

    Args:
        path: the file, or the folder it is alone in; of a split model, its first part.
        device: "cpu", "cuda", or "cuda:N" for the N-th GPU; "auto" uses a GPU if it can.
        vram_budget: how much of its memory may be taken, everything counted: a number of GiB, a
            text such as "6GiB", or None for all that is free once the kernels are loaded, which is
            also what a larger one comes to.
        gpu_split: which neurons the GPU keeps where not all fit: a `.generated.gpuidx` file,
            "auto" (that file, or the folder `activation/`, beside the model), "counts" (that folder
            alone), "balance" (the same, but a layer keeps only so many that GPU and processor need
            the same time for it, by their measured speeds) or "none".
        neuron_cache: which neurons stay there. "static": those of the beginning, for good; only
            where neither a split nor counts choose them and down is stored by neuron, the first 64
            tokens computed with "exact" or "predict" choose them anew, once. "balance" and
            "frequency", for models with down by neuron, exchange neurons while the model runs, so
            that GPU and processor need the same time, or so that those used most of late are on
            the GPU. Each neuron is computed once wherever it is; where it is changes the rounding
            of sums, and so results in their last digits. Nothing moves in a deterministic context.
        n_ctx: positions per sequence; None takes what the model was trained for, or less where the
            keys and values of so many would not fit in memory. Memory is taken as they fill.
        threads: how many compute; None uses the physical cores this process may run on.
        kv_type: how keys and values are kept, "f16" or "q8_0".
        kv_mode: where those of layers that a GPU computes are kept: on the "device"; in "host"
            memory, where the processor attends to them; "split", in host memory with copies of as
            many as fit on the GPU, each of the two attending to its part; "auto" is "device" where
            they fit beside the attention, else "split".
        kv_ratio: with "split", the processor's share of the positions at first; None: what does
            not fit on the GPU.
        kv_step: with "split", by how much of the positions, a share from 0 to 1, the boundary of a
            layer moves after each token, towards where both take as long; at least by a page. It
            moves by all of that each time, so small shares such as 0.01 make sense. None or 0
            leaves it where it is.
        mmap: False reads the file into memory, for files that others may truncate meanwhile.
        progress: called while a file is so read, as `progress(done, total)`, in bytes.
        hidden_act: overrides the activation: "silu", "relu", "gelu", "gelu_tanh", "relu_relu" or
            "fatrelu:<threshold>".
        chat_template: Jinja source that replaces the file's own template.
        sparsity: which neurons a generated token computes. "off" is all of them. "exact", for ReLU
            models, is those whose gate is not zero, which changes no result. "predict", for models
            with activation predictors, is those that they name. "auto" is whichever of these is
            fastest here, found by timing a few tokens when the model is first used on a machine;
            of PowerInfer files without usable predictors it is "exact".
        sparse_threshold: predictions below it leave a neuron out; None takes the file's.
        prefill: "dense" computes all neurons of prompt tokens, "sparse" treats them as generated.
        cross_layer_from: layers from this one on predict from what the predictor of the layer
            before looked at, as Q-Infer does from layer 5, so that their neurons are known one
            layer early; it costs accuracy, and is for "predict" alone. None: every layer looks at
            its own.
        deterministic: on a GPU, too, a token's logits are the same bits however the text before it
            was cut into batches and whatever else is computed beside it. Prompts are slower so:
            cuBLAS is not used, nor are tiles of tokens, and neurons stay where they are. The
            processor always computes like that.

    Raises:
        FileError: the file cannot be read.
        FormatError: the file is damaged; the message names the key, tensor or offset. Or `path` is
            a folder of a checkpoint; the message has the command that converts it.
        UnsupportedError: the file is of an architecture or tensor type that is not known.
        DeviceError: the device asked for cannot be had, or fails. With "auto" the log says why no
            GPU is used.
        OutOfMemory: the device asked for by name has no room for one layer's attention. Where
            `sparsity` is not "auto", the first context finds that out.
        ArgumentError: an argument is out of range, or `path` is a folder without one model. Of
            those for a GPU: `gpu_split` is of a model of another shape or names counts that are not
            there, `neuron_cache` moves neurons of a model whose down is not stored by neuron, or
            one of them, or of `vram_budget`, `kv_mode`, `kv_ratio` and `kv_step`, asks something of
            a GPU and none is used.
    """

    @hinting
    def __init__(
        self,
        path: StrPath,
        *,
        device: str = "auto",
        vram_budget: float | str | None = None,
        gpu_split: GpuSplit = "auto",
        neuron_cache: NeuronCache = "static",
        n_ctx: int | None = None,
        threads: int | None = None,
        kv_type: str = "f16",
        kv_mode: KvMode = "auto",
        kv_ratio: float | None = None,
        kv_step: float | None = None,
        mmap: bool = True,
        progress: Progress | None = None,
        hidden_act: str | None = None,
        chat_template: str | None = None,
        sparsity: SparsityMode = "auto",
        sparse_threshold: float | None = None,
        prefill: Prefill = "dense",
        cross_layer_from: int | None = None,
        deterministic: bool = False,
    ) -> None:
        self._arguments = {
            "device": device,
            "vram_budget": vram_budget,
            "gpu_split": gpu_split,
            "neuron_cache": neuron_cache,
            "n_ctx": n_ctx,
            "threads": threads,
            "kv_type": kv_type,
            "kv_mode": kv_mode,
            "kv_ratio": kv_ratio,
            "kv_step": kv_step,
            "mmap": mmap,
            "hidden_act": hidden_act,
            "chat_template": chat_template,
            "sparsity": sparsity,
            "sparse_threshold": sparse_threshold,
            "prefill": prefill,
            "cross_layer_from": cross_layer_from,
            "deterministic": deterministic,
        }
        flag("mmap", mmap)
        flag("deterministic", deterministic)
        positive("n_ctx", n_ctx)
        positive("threads", threads)
        kv_tensor_type(kv_type)
        kv_place = KvPlace(kv_mode, kv_ratio, kv_step)
        if deterministic and neuron_cache != "static":
            raise ArgumentError(
                f"neuron_cache={neuron_cache!r} moves neurons, which shows in the last bits of "
                "what is computed: not with deterministic=True"
            )
        if not isinstance(chat_template, str | None):
            raise ArgumentError(f"chat_template={chat_template!r:.80} is not a str")
        path = _file(path)
        self.path = os.fsdecode(path)
        self._threads = threads
        self._kv_type = kv_type
        self._deterministic = deterministic
        self._chat_template = chat_template
        weights = self._weights = Weights(path, mmap=mmap, hidden_act=hidden_act, progress=progress)
        check_heads(kv_type, weights.info)
        self.n_ctx = context_length(weights.info, n_ctx, kv_type)
        weights.offload = offload(
            weights, device, vram_budget, gpu_split, kv_type, neuron_cache, kv_place
        )
        if weights.offload is None:
            kv_place = KvPlace()  # the log has said so
        self._kv_place = kv_place
        # Of the kind that calls share. No method: the pool keeps it, and must not keep the model.
        self._make_context = partial(
            _shared_context,
            weights,
            n_ctx=self.n_ctx,
            threads=threads,
            kv_type=kv_type,
            kv_place=kv_place,
            deterministic=deterministic,
        )
        self.policy = choose(
            weights, sparsity, prefill, sparse_threshold, threads, self._make_context,
            cross_layer_from,
        )  # fmt: skip
        if neuron_cache != "static" and weights.offload is not None and self.policy.mode == "off":
            logger.warning(
                "neuron_cache=%r has no effect while sparsity is 'off': neurons move by how often "
                "they are active, and all are computed",
                neuron_cache,
            )
        self._pool = ContextPool(partial(self._make_context, self.policy))
        weights.pool = weakref.ref(self._pool)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: StrPath | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """A model from the Hugging Face hub or an alias, downloaded once.

        Args:
            repo_id: "owner/name", or an alias that `qinfer run` takes, such as "smollm2".
            filename: a file's name or a glob such as "*q4*.gguf"; it must match one model, which
                may be split. None is for repositories that hold just one.
            revision: a branch, tag or commit.
            cache_dir: where downloads are kept, instead of the hub's own cache.
            token: for private repositories.
            local_files_only: never goes to the network.
            **options: the keyword arguments of `Model`.
        """
        from . import hub

        check_keywords(options, cls.__init__)
        path = hub.download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return cls(path, **options)

    @classmethod
    def demo(cls, **options: Any) -> Self:
        """The small ReLU model that comes with the package; it tells simple stories in English.

        Args:
            **options: the keyword arguments of `Model`.
        """
        from ._alias import embedded

        return cls(embedded("stories"), **options)

    # ---- text ----

    @overload
    def generate(self, prompt: str | Tokens, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **options: Unpack[GenerateOptions]
    ) -> list[Completion]: ...

    def generate(
        self, prompt: str | Tokens | list[str] | list[list[int]], **options: Unpack[GenerateOptions]
    ) -> Completion | list[Completion]:
        """Continues a prompt to the end of the answer.

        Args:
            prompt: a text or token ids; a list of either is computed together and gives a list of
                answers, each the same as alone.
            **options: `max_tokens` (None: to the end of the answer or of the context),
                `min_tokens`, `stop`, `ignore_eos`, `logprobs`, `logits_processors`, `progress` as
                described in `GenerateOptions`, and `sampling` or single fields of `Sampling`.
                Without those: temperature 0.8, top_k 40, top_p 0.95, min_p 0.05 and a fresh seed;
                `temperature=0` always takes the most likely token. `seed` goes for every prompt.

        Raises:
            ContextFull: the prompt does not fit in the context; the message states both numbers.
                An answer that reaches the end of the context has finish_reason "length" instead.
            ArgumentError: an option is out of range, or the prompt is empty.
            TypeError: an option is not known.
        """
        settings = Settings.make(options)
        if _is_batch(prompt):
            return self._generate_batch(prompt, settings)
        return _finished(Stream(self._answer(cast("str | Tokens", prompt), settings), self._pool))

    def stream(self, prompt: str | Tokens, **options: Unpack[GenerateOptions]) -> Stream:
        """Continues a prompt piece by piece; options and errors as in `generate`."""
        return Stream(self._answer(prompt, Settings.make(options)), self._pool)

    def astream(
        self, prompt: str | Tokens, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Piece, None]:
        """`stream` for `async for`: each piece is computed in a thread of its own."""
        return asynchronous(self.stream(prompt, **options))

    def _generate_batch(self, prompts: Sequence[Any], settings: Settings) -> list[Completion]:
        answers = [self._answer(prompt, settings) for prompt in prompts]
        if not answers:
            return []
        with self.context(n_seq=min(len(answers), _MAX_TOGETHER)) as context:
            for _ in run(context, answers):
                pass
            for answer in answers:
                answer.account(context)
        return [answer.completion() for answer in answers]

    def _answer(
        self, prompt: str | Tokens, settings: Settings, *, at_start: bool = False
    ) -> Answer:
        """An answer to be generated; `at_start` when it is a text of its own."""
        self._weights.pointer  # noqa: B018  raises Closed
        return Answer(
            self._tokens(prompt),
            settings,
            self.tokenizer,
            n_vocab=self.info.n_vocab,
            n_ctx=self.n_ctx,
            at_start=at_start,
        )

    def _tokens(self, text: str | Tokens) -> list[int]:
        """Token ids of a text, or those given, checked."""
        if isinstance(text, str):
            return self.tokenizer.encode(text)
        ids: list[int] = token_array(text, self.info.n_vocab).tolist()
        return ids

    # ---- chat ----

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Answers a conversation by the model's own template.

        Args:
            messages: mappings with "role" ("system", "user", "assistant"…) and "content", a str or
                a list of parts `{"type": "text", "text": …}`.
            tools: JSON schemas of functions that the model may call, for templates that know them.
            variables: more names for the template, such as `{"enable_thinking": False}`.
            **options: as in `generate`.

        Raises:
            FormatError: there is no template, or it is faulty.
            ArgumentError: the messages are malformed, or the template refuses them.
            ContextFull, TypeError: as in `generate`.
        """
        return _finished(self.stream_chat(messages, tools=tools, variables=variables, **options))

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """`chat`, piece by piece."""
        from .chat import encode

        settings = Settings.make(options)
        tokens = encode(
            self.tokenizer,
            messages,
            chat_template=self._chat_template,
            tools=tools,
            variables=variables,
        )
        return Stream(self._answer(tokens, settings, at_start=True), self._pool)

    def astream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Piece, None]:
        """`stream_chat` for `async for`."""
        return asynchronous(self.stream_chat(messages, tools=tools, variables=variables, **options))

    # ---- scores and embeddings ----

    def score(self, text: str | Tokens) -> Score:
        """How likely the model finds a text (or tokens): the log probability of every token.

        Raises ContextFull when it does not fit, ArgumentError when there is nothing to score.
        """
        tokens = self._tokens(text)
        if len(tokens) < 2:
            raise ArgumentError(f"a text of {len(tokens)} tokens leaves nothing to score")
        with self._borrowed(len(tokens)) as (context, seq):
            return Score(tokens, context.score(tokens, seq=seq)[:-1])

    @overload
    def embed(
        self, texts: str, *, pooling: Pooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32]: ...

    @overload
    def embed(
        self,
        texts: list[str],
        *,
        pooling: Literal["mean", "last", "cls"] = "mean",
        normalize: bool = True,
    ) -> NDArray[np.float32]: ...

    @overload
    def embed(
        self, texts: list[str], *, pooling: Literal["none"], normalize: bool = True
    ) -> list[NDArray[np.float32]]: ...

    def embed(
        self, texts: str | list[str], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Vectors of texts from the model's final normalised hidden states.

        Args:
            texts: a text, or a list of them.
            pooling: "mean" of all tokens, the "last" or the first ("cls") token, or "none" for a
                vector per token.
            normalize: scales each vector to length 1.

        Returns:
            float32 of shape (n_embd,), or (n_texts, n_embd) for a list; with "none"
            (n_tokens, n_embd), in a list for a list.

        Raises:
            ContextFull: a text does not fit in the context.
            ArgumentError: a text has no tokens, or `pooling` is not known.
        """
        if pooling not in ("mean", "last", "cls", "none"):
            raise ArgumentError(f"pooling={pooling!r} is not 'mean', 'last', 'cls' or 'none'")
        if isinstance(texts, str):
            return self._embed(texts, pooling, normalize)
        vectors = [self._embed(text, pooling, normalize) for text in texts]
        if pooling == "none":
            return vectors
        return np.stack(vectors) if vectors else np.empty((0, self.info.n_embd), np.float32)

    def _embed(self, text: str, pooling: Pooling, normalize: bool) -> NDArray[np.float32]:
        tokens = self._tokens(text)
        if not tokens:
            raise ArgumentError("an empty text has no vector with this model")
        with self._borrowed(len(tokens)) as (context, seq):
            wanted: Wanted = "last" if pooling == "last" else "all"
            context.feed(tokens, seq=seq, logits="none", hidden=wanted)
            hidden = context.hidden
        vectors: NDArray[np.float32]
        if pooling == "mean":
            vectors = hidden.mean(axis=0, dtype=np.float64).astype(np.float32)
        else:
            vectors = np.array(hidden if pooling == "none" else hidden[0])
        if normalize:
            lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors /= np.where(lengths > 0, lengths, 1)
        return vectors

    @contextmanager
    def _borrowed(self, n_tokens: int) -> Iterator[tuple[Context, int]]:
        """A kept context with an emptied sequence that has room for `n_tokens`."""
        if n_tokens > self.n_ctx:
            raise ContextFull(
                f"the text has {n_tokens} tokens and the context holds {self.n_ctx}: "
                "shorten the text or raise n_ctx"
            )
        self._weights.pointer  # noqa: B018  raises Closed
        context = self._pool.take(())
        try:
            seq = min(range(context.n_seq), key=context.length)
            context.truncate(0, seq)
            yield context, seq
        finally:
            self._pool.give_back(context)

    # ---- the model itself ----

    def context(
        self,
        n_ctx: int | None = None,
        *,
        n_seq: int = 1,
        n_batch: int | None = None,
        threads: int | None = None,
        kv_type: str | None = None,
        kv_mode: KvMode | None = None,
        kv_ratio: float | None = None,
        kv_step: float | None = None,
        sparsity: SparsityMode | None = None,
        sparse_threshold: float | None = None,
        prefill: Prefill | None = None,
        cross_layer_from: int | Literal[False] | None = None,
        deterministic: bool | None = None,
    ) -> Context:
        """A context of one's own: tokens in, logits out. Everything else is built on it.

        Where the model's GPU has no room for it beside other contexts, the processor alone computes
        it, and the log says so; its `placement` is None then. With no other alive, neurons on the
        GPU make room.

        Args:
            n_ctx: positions per sequence; None takes the model's.
            n_seq: sequences it can hold.
            n_batch: tokens computed together at most; None means 512.
            threads: how many compute; None takes the model's.
            kv_type: "f16" or "q8_0"; None takes the model's.
            kv_mode, kv_ratio, kv_step: as of `Model`, all three; without any the model's.
            sparsity, sparse_threshold, prefill, cross_layer_from, deterministic: as of `Model`;
                None takes the model's, and `cross_layer_from=False` predicts in every layer by
                itself.

        Raises:
            ArgumentError: an argument is out of range, the model cannot follow it, or it is about
                a GPU's keys and values and no GPU is used.
            OutOfMemory: there is no memory for it; on a GPU, only where that was asked for by name
                and holds nothing of the model yet, or with `kv_mode`, `kv_ratio` or `kv_step`.
            DeviceError: the GPU fails.
            Closed: the model was closed.
        """
        if positive("n_ctx", n_ctx) not in (0, self.n_ctx):
            check_length(self.info, positive("n_ctx", n_ctx))
        kv_place = self._kv_place
        if (kv_mode, kv_ratio, kv_step) != (None, None, None):
            kv_place = KvPlace("auto" if kv_mode is None else kv_mode, kv_ratio, kv_step)
        own = self.policy
        mode = own.mode if sparsity is None else sparsity
        early = None if cross_layer_from is False else cross_layer_from
        if cross_layer_from is None and mode in ("auto", "predict"):
            early = own.cross_layer_from
        policy = choose(
            self._weights,
            mode,
            own.prefill if prefill is None else prefill,
            own.threshold if sparse_threshold is None else sparse_threshold,
            self._threads if threads is None else threads,
            self._make_context,
            early,
        )
        return Context(
            self._weights,
            n_ctx=self.n_ctx if n_ctx is None else n_ctx,
            n_seq=n_seq,
            n_batch=n_batch,
            threads=self._threads if threads is None else threads,
            kv_type=self._kv_type if kv_type is None else kv_type,
            kv_place=kv_place,
            policy=policy,
            deterministic=self._deterministic if deterministic is None else deterministic,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's own vocabulary, made when it is first asked for."""
        self._weights.pointer  # noqa: B018  raises Closed
        from .tokenizer import Tokenizer

        return Tokenizer.from_gguf(self._weights.file)

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._weights.info

    @property
    def placement(self) -> Placement | None:
        """What of the model a GPU keeps; None where none is used. Raises Closed after `close()`."""
        self._weights.pointer  # noqa: B018  raises Closed
        share = self._weights.offload
        return None if share is None or share.has_failed else share.placement

    @property
    def metadata(self) -> Mapping[str, object]:
        """The file's key-value pairs."""
        return self._weights.file.metadata

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._weights.closed

    def close(self) -> None:
        """Frees the model and every context made from it; calling it again does nothing.

        Calls that run in other threads are cancelled. Using the model afterwards raises Closed.
        """
        self._pool.close()
        self._weights.close()

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
        return _reopen, (type(self), str(Path(self.path).absolute()), self._arguments)

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<Model {self.path!r}, {self.info.architecture}{state}>"


def _reopen(kind: type[Model], path: str, arguments: dict[str, Any]) -> Model:
    """A pickled model is its path and arguments."""
    return kind(path, **arguments)


def _finished(stream: Stream) -> Completion:
    """The whole answer of a stream."""
    for _ in stream:
        pass
    assert stream.completion is not None
    return stream.completion


def _is_batch(prompt: Any) -> TypeGuard[list[str] | list[list[int]]]:
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise ArgumentError(
            f"a prompt is a text, token ids, or a list of either, not {type(prompt).__name__}"
        )
    return len(prompt) == 0 or not isinstance(prompt[0], (int, np.integer))


def _shared_context(
    weights: Weights,
    policy: Policy,
    *,
    n_ctx: int,
    threads: int | None,
    kv_type: str,
    kv_place: KvPlace,
    deterministic: bool,
) -> Context:
    return Context(
        weights,
        n_ctx=n_ctx,
        # On a GPU the memory of another conversation is worth more as neurons.
        n_seq=_KEPT_SEQUENCES if weights.offload is None else 1,
        threads=threads,
        kv_type=kv_type,
        kv_place=kv_place,
        policy=policy,
        deterministic=deterministic,
    )


def _file(path: StrPath) -> StrPath:
    """The file meant by a path: the one model in a folder, or the path itself."""
    if not os.fsdecode(path):  # for pathlib, the working directory
        raise ArgumentError("the path of the model is empty")
    local = Path(os.fsdecode(path))
    try:
        is_folder, is_there = local.is_dir(), local.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise FileError(f"{local}: cannot read: {error.strerror}") from error
    if is_folder:
        from .hub import resolve

        return resolve(local)
    if isinstance(path, str) and not is_there:
        from .hub import call_that_gets

        if call := call_that_gets(path):
            raise FileError(
                f"{path}: there is no such file; what the command line takes by such a name comes "
                f"by {call}"
            )
    return path
