"""A loaded model file: what contexts share, immutable and safe for any number of threads."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from ._files import StrPath
from ._gguf import GGUF, Progress
from ._native import Handle, check, ffi, lib, new_error, text
from .errors import ArgumentError, FormatError

if TYPE_CHECKING:
    from ._pool import ContextPool
    from .context import Context
    from .offload import Offload


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a model.

    Attributes:
        architecture: of the file's `general.architecture`.
        hidden_act: activation of the feed-forward network.
        n_vocab: tokens in the vocabulary.
        n_embd: width of the residual stream.
        n_layer: number of layers.
        n_head: attention heads.
        n_head_kv: heads of keys and values.
        head_dim: width of a head.
        n_ff: neurons per feed-forward network.
        n_ctx_train: positions the model was trained for.
        n_ctx_max: positions that learned embeddings have; 0 means there is no such limit.
        sliding_window: positions a token attends to; 0 means all.
        is_powerinfer: whether the file is a PowerInfer one.
        tied_head: whether embedding and head are one tensor.
        has_sparse_act: whether the activation is zero for many inputs, as ReLU is.
        predictor_rank: of the largest activation predictor; 0 means there are none.
        down_by_neuron: whether the down projections are stored by neuron.
        sparse_threshold: of the predictions, as the file gives it.
        n_params: number of weights.
        n_weight_bytes: their bytes.
        n_bytes_per_token: weight bytes that one generated token reads with all neurons computed.
        n_ffn_bytes_per_token: of these, the bytes of feed-forward networks.
        kv_bytes_per_token_f16: bytes of keys and values per token, in F16.
    """

    architecture: str
    hidden_act: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx_train: int
    n_ctx_max: int
    sliding_window: int
    is_powerinfer: bool
    tied_head: bool
    has_sparse_act: bool
    predictor_rank: int
    down_by_neuron: bool
    sparse_threshold: float
    n_params: int
    n_weight_bytes: int
    n_bytes_per_token: int
    n_ffn_bytes_per_token: int
    kv_bytes_per_token_f16: int


class Weights:
    """The file, the C model over it and the contexts that use it."""

    def __init__(
        self,
        path: StrPath,
        *,
        mmap: bool,
        hidden_act: str | None,
        progress: Progress | None = None,
    ) -> None:
        self.path = os.fsdecode(path)
        if not isinstance(hidden_act, str | None) or not (hidden_act or "").isascii():
            raise ArgumentError(f"hidden_act={hidden_act!r:.80} is not the name of an activation")
        self.file = GGUF(path, mmap=mmap, progress=progress)
        self._hidden_act = hidden_act
        self._handle = self._load()
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.offload: Offload | None = None
        self.why_no_gpu = ""  # where there is no share on one
        self.pool: weakref.ref[ContextPool] | None = None  # it keeps the weights, not they it
        self.info = self._read_info()

    def free_idle(self) -> bool:
        """Closes contexts that nobody needs just now; whether there were any."""
        pool = None if self.pool is None else self.pool()
        return pool is not None and pool.free_idle()

    def _load(self, *, check_tensors: bool = False) -> Handle:
        """The C model; `check_tensors` looks at every weight and refuses NaN and infinity."""
        act = self._hidden_act
        name = ffi.NULL if act is None else ffi.new("char[]", act.encode())
        params = ffi.new("qi_model_params *")
        params.hidden_act = name
        params.check_tensors = check_tensors
        out = ffi.new("qi_model **")
        error = new_error()
        check(lib.qi_model_load(self.file.pointer, params, out, error), error)
        return Handle(out[0], lib.qi_model_close, f"the model {self.path}")

    def refuse_nan(self) -> NoReturn:
        """Raises FormatError that says where NaN in a result comes from: the tensor, if one has it.

        Not done at load, because it reads the whole file.
        """
        self._load(check_tensors=True).close()
        raise FormatError(
            f"{self.path}: computing with its weights gives NaN; all of them are finite, so some "
            "must be too large"
        )

    @property
    def pointer(self) -> Any:
        """The C model."""
        return self._handle.pointer

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._handle.closed

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that tell files apart."""
        from . import _fingerprint

        return _fingerprint.of_file(self.file)

    def _read_info(self) -> ModelInfo:
        out = ffi.new("qi_model_info *")
        check(lib.qi_model_get_info(self.pointer, out))
        fields = {name: getattr(out, name) for name in ModelInfo.__annotations__}
        for name in ("architecture", "hidden_act"):
            fields[name] = text(fields[name])
        for name in ("is_powerinfer", "tied_head", "has_sparse_act", "down_by_neuron"):
            fields[name] = bool(fields[name])
        return ModelInfo(**fields)

    def close(self) -> None:
        """Closes the contexts, the model and the file; calling it again does nothing."""
        for context in list(self.contexts):
            context.close()
        if self.offload is not None:
            self.offload.close()
        self._handle.close()
        self.file.close()
