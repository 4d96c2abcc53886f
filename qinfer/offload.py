"""What of a model a GPU keeps: attention, predictors and head first, then neurons, under a budget.

The runtime decides when a model's first context is made; here is how it is asked, and what it
answers.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._checks import is_number, one_of
from ._files import StrPath
from ._kv_place import KvPlace, for_gpus
from ._native import Handle, check, ffi, lib, new_error, text
from .errors import (
    ArgumentError,
    DeviceError,
    FileError,
    FormatError,
    OutOfMemory,
    QInferError,
)

if TYPE_CHECKING:
    from ._weights import Weights
    from .gpu_index import GpuIndex

logger = logging.getLogger("qinfer")

# What tells the runtime which neurons to keep: a file, or one of these. "auto" takes the split file
# or the activation counts that lie beside the model; "counts" the latter alone; "balance" these,
# and of each layer only what lets both sides finish together; "none" keeps none.
GpuSplit = StrPath | Literal["auto", "counts", "balance", "none"]
# Which neurons stay on the GPU while a model runs.
NeuronCache = Literal["static", "balance", "frequency"]
_POLICIES = {
    "static": lib.QI_CACHE_STATIC,
    "balance": lib.QI_CACHE_BALANCE,
    "frequency": lib.QI_CACHE_FREQUENCY,
}

_SPLITS = ("auto", "counts", "balance", "none")
_GIB = 2**30
_KV_PLACE = KvPlace()


@dataclass(frozen=True, slots=True)
class Placement:
    """What of a model a GPU keeps.

    Attributes:
        device: the GPU's name.
        summary: the placement in words; empty before the model's first context.
        budget_bytes: of its memory that may be used.
        used_bytes: that are used now, contexts included.
        attention_bytes, predictor_bytes, head_bytes, neuron_bytes: of the weights kept.
        n_neurons: kept, in all layers together.
        n_moved: neurons that have taken another's place since they were placed.
        is_placed: whether the first context has been made.
        n_layers: the first so many have their attention there.
        has_head: whether the head is there.
        n_predictors: the first so many layers have their predictors there.
    """

    device: str
    summary: str
    budget_bytes: int
    used_bytes: int
    attention_bytes: int
    predictor_bytes: int
    head_bytes: int
    neuron_bytes: int
    n_neurons: int
    n_moved: int
    is_placed: bool
    n_layers: int
    has_head: bool
    n_predictors: int

    def __str__(self) -> str:
        kept = self.summary or "what it will keep is decided with the first context"
        moved = f"; {self.n_moved} neurons moved so far" if self.n_moved else ""
        return f"{self.device}: {kept}{moved}"


class Offload:
    """A model's share on a GPU. Closing it, or the model, gives the memory back."""

    def __init__(
        self, weights: Weights, device: str, budget: int | None, *, optional: bool = False
    ) -> None:
        """`optional`: nobody asked for this device by name."""
        from . import _cuda

        _cuda.configure()
        out = ffi.new("qi_offload **")
        error = new_error()
        n_bytes = -1 if budget is None else min(budget, 2**63 - 1)
        status = lib.qi_offload_create(weights.pointer, device.encode(), n_bytes, out, error)
        check(status, error)
        self._handle = Handle(out[0], lib.qi_offload_close, f"the share of {weights.path}")
        self.optional = optional
        self.has_failed = False  # when it was to hold the first of it, the last time it was tried
        self._has_warned = False
        self.gpu = self.placement.device  # its name
        self.kind = f"{self.gpu}-{budget}"  # what speed depends on

    @property
    def pointer(self) -> Any:
        """The C object."""
        return self._handle.pointer

    def choose_neurons(self, layer: int, neurons: NDArray[np.int32]) -> None:
        """The neurons of a layer to keep, ascending ids of shape (k,)."""
        error = new_error()
        ids = np.ascontiguousarray(neurons, dtype=np.int32)
        pointer = ffi.from_buffer("int32_t[]", ids)
        check(lib.qi_offload_choose_neurons(self.pointer, layer, pointer, len(ids), error), error)

    def count_neurons(self, layer: int, counts: NDArray[Any]) -> None:
        """How often each neuron of a layer is active, shape (n_ff,)."""
        error = new_error()
        values = np.ascontiguousarray(counts, dtype=np.float32)
        pointer = ffi.from_buffer("float[]", values)
        check(lib.qi_offload_count_neurons(self.pointer, layer, pointer, len(values), error), error)

    def balance_layers(self) -> None:
        """Of the neurons that counts choose, a layer keeps what balances the two sides' times."""
        error = new_error()
        check(lib.qi_offload_balance_layers(self.pointer, error), error)

    def set_neuron_cache(self, neuron_cache: NeuronCache) -> None:
        """How neurons will move; ArgumentError where down is not stored by neuron."""
        error = new_error()
        policy = _POLICIES[neuron_cache]
        check(lib.qi_offload_set_neuron_cache(self.pointer, policy, error), error)

    def reset(self) -> None:
        """As if no context had been made yet: the next one decides what is kept.

        Does nothing while a context is alive.
        """
        error = new_error()
        check(lib.qi_offload_reset(self.pointer, error), error)

    def neurons(self, layer: int) -> NDArray[np.int32]:
        """The neurons of a layer that are kept now, ascending ids of shape (k,)."""
        error = new_error()
        n = ffi.new("uint64_t *")
        check(lib.qi_offload_get_neurons(self.pointer, layer, ffi.NULL, n, error), error)
        ids = np.empty(n[0], np.int32)
        pointer = ffi.from_buffer("int32_t[]", ids, require_writable=True)
        check(lib.qi_offload_get_neurons(self.pointer, layer, pointer, n, error), error)
        return ids

    @property
    def placement(self) -> Placement:
        """What is kept now."""
        out = ffi.new("qi_offload_info *")
        check(lib.qi_offload_get_info(self.pointer, out))
        return Placement(
            device=text(out.device),
            summary=text(out.placement),
            is_placed=bool(out.is_placed),
            has_head=bool(out.has_head),
            **{
                name: int(getattr(out, name))
                for name in Placement.__annotations__
                if name not in ("device", "summary", "is_placed", "has_head")
            },
        )

    @property
    def is_placed(self) -> bool:
        """Whether it is decided what of the model it holds."""
        try:
            return self.placement.is_placed
        except DeviceError:  # lost, before there was a budget to tell of
            return False

    def warn_of_context(self, error: QInferError) -> None:
        """Says why a context is computed without the GPU; once aloud."""
        level = logging.INFO if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "the processor alone computes this context: %s", error)

    def close(self) -> None:
        """Contexts keep what they use; calling it again does nothing."""
        self._handle.close()


def budget_bytes(vram_budget: float | str | None) -> int | None:
    """Bytes of a budget: a bare number is GiB, a text may have a unit; None is all free memory.

    Raises ArgumentError for anything else.
    """
    if vram_budget is None:
        return None
    if isinstance(vram_budget, str):
        from ._sizes import parse_size

        try:
            return parse_size(vram_budget, bare="GiB")
        except ArgumentError as error:
            raise ArgumentError(f"vram_budget: {error}") from None
    if not is_number(vram_budget):
        raise ArgumentError(
            f"vram_budget={vram_budget!r:.80} is neither a number of GiB nor a size"
        )
    if not math.isfinite(vram_budget) or vram_budget < 0:
        raise ArgumentError(f"vram_budget={vram_budget!r} is not a size")
    return int(float(vram_budget) * _GIB)


def offload(
    weights: Weights,
    device: str,
    vram_budget: float | str | None = None,
    gpu_split: GpuSplit = "auto",
    kv_type: str = "f16",
    neuron_cache: NeuronCache = "static",
    kv_place: KvPlace = _KV_PLACE,
) -> Offload | None:
    """A model's share on the device asked for; None where it is the processor's alone.

    With "auto" a GPU is used when one can be and its kernels agree with the processor's, and the
    log says why one is not: as a warning where something was asked of it, and where it is full or
    computes wrong.

    Raises:
        ArgumentError: the device or the policy is not known, the budget is not a size, something is
            asked of a GPU and the device is the processor, the split is that of another model or
            file, or neurons cannot move in this one.
        DeviceError, OutOfMemory: the device asked for by name cannot be had.
        FileError, FormatError: the split or the counts cannot be read.
    """
    budget = budget_bytes(vram_budget)
    kind, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("auto", "cpu", "cuda", "cann") or (number and kind != "cuda"):
        raise ArgumentError(f"device={device!r:.80} is not 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if not isinstance(gpu_split, str | os.PathLike) or not os.fspath(gpu_split):
        words = ", ".join(map(repr, _SPLITS))
        raise ArgumentError(f"gpu_split={gpu_split!r:.80} is neither a file nor one of {words}")
    one_of("neuron_cache", neuron_cache, _POLICIES)
    if neuron_cache != "static" and gpu_split == "none":
        raise ArgumentError(
            f"neuron_cache={neuron_cache!r} moves neurons, and gpu_split='none' keeps none"
        )
    if kind == "cann":
        raise DeviceError("device='cann': this version of qinfer does not compute on Ascend NPUs")
    given = [
        *([f"vram_budget={vram_budget!r}"] if vram_budget is not None else []),
        *([f"gpu_split={gpu_split!r}"] if gpu_split != "auto" else []),
        *([f"neuron_cache={neuron_cache!r}"] if neuron_cache != "static" else []),
        *kv_place.given,
    ]
    if kind == "cpu":
        weights.why_no_gpu = "device is 'cpu'"
        if given:
            raise ArgumentError(for_gpus(given, weights.why_no_gpu))
        return None
    if kind == "auto":
        try:
            share = _unnamed(weights, budget, kv_type)
        except (DeviceError, OutOfMemory) as error:
            weights.why_no_gpu = str(error)
            without = ""
            if given:
                have = "has" if len(given) == 1 else "have"
                without = f", and {' and '.join(given)} {have} no effect"
            aloud = given or isinstance(error, (_ComputesWrongError, OutOfMemory))
            level = logging.WARNING if aloud else logging.INFO
            logger.log(level, "no GPU is used%s: %s", without, error)
            return None
    else:
        share = Offload(weights, device, budget)
    try:
        _split(share, weights, gpu_split)
        share.set_neuron_cache(neuron_cache)
    except BaseException:
        share.close()
        raise
    return share


class _ComputesWrongError(DeviceError):
    """A GPU's kernels do not agree with the processor's."""


def _unnamed(weights: Weights, budget: int | None, kv_type: str) -> Offload:
    """A share on the GPU that "auto" takes."""
    from . import _cuda_check

    share = Offload(weights, "cuda", budget, optional=True)
    try:
        types = {tensor.type for tensor in weights.file.tensors} | {kv_type}
        if wrong := _cuda_check.problem(types):
            raise _ComputesWrongError(f"{share.placement.device} computes wrong: {wrong}")
    except BaseException:
        share.close()
        raise
    return share


def _split(share: Offload, weights: Weights, gpu_split: GpuSplit) -> None:
    """Tells the runtime which neurons to prefer."""
    info = weights.info
    if gpu_split == "none":
        for layer in range(info.n_layer):
            share.choose_neurons(layer, np.empty(0, np.int32))
        return
    if not (isinstance(gpu_split, str) and gpu_split in _SPLITS):
        index = _index(gpu_split, weights)
        for layer in range(info.n_layer):
            try:
                share.choose_neurons(layer, index.neurons(layer))
            except ArgumentError as error:
                raise ArgumentError(f"{os.fsdecode(gpu_split)}: {error}") from None
        return
    beside = Path(weights.path + ".generated.gpuidx")
    folder = Path(weights.path).parent / "activation"
    counted = None
    if gpu_split == "auto":
        # What lies there may be another's: nobody asked for it.
        if beside.is_file():
            counted = _unless_refused(_counts_of_split, beside, weights)
        if counted is None and folder.is_dir():
            counted = _unless_refused(_counts, folder, weights)
    elif folder.is_dir():
        counted = _counts(folder, weights)
    else:
        raise ArgumentError(
            f"gpu_split={gpu_split!r} goes by counts of activations, and there is no folder "
            f"{folder}: qinfer profile MODEL -f TEXT -o {folder.parent} writes it"
        )
    for layer, counts in enumerate(counted or []):
        share.count_neurons(layer, counts)
    if gpu_split == "balance":
        share.balance_layers()


def _unless_refused(
    read: Callable[[Path, Weights], list[NDArray[Any]]], path: Path, weights: Weights
) -> list[NDArray[Any]] | None:
    """What is read; None, and a warning, where it is not for this model."""
    try:
        return read(path, weights)
    except (ArgumentError, FileError, FormatError) as error:
        logger.warning("neurons for the GPU are chosen without %s: %s", path, error)
        return None


def _counts_of_split(path: Path, weights: Weights) -> list[NDArray[Any]]:
    """By layer, 1 for the neurons of a split and 0 for others: shape (n_ff,).

    It was made for some budget, perhaps another: its neurons are taken first, as many as fit.
    """
    index = _index(path, weights)
    counts = np.zeros((weights.info.n_layer, weights.info.n_ff), np.float32)
    for layer, of_layer in enumerate(counts):
        of_layer[index.neurons(layer)] = 1.0
    return list(counts)


def _counts(folder: Path, weights: Weights) -> list[NDArray[Any]]:
    """By layer, how often each neuron was active: shape (n_ff,)."""
    from . import _fingerprint
    from .activation import check_model, read_activations

    info = weights.info
    counted = read_activations(folder, n_layers=info.n_layer, n_ff=info.n_ff)
    if not check_model(folder, _fingerprint.of_model(weights.file)):
        _say_unchecked(folder, "which model it is of")
    return counted


def _index(path: StrPath, weights: Weights) -> GpuIndex:
    """The split in a file, which must be one for this model file."""
    from .gpu_index import GpuIndex

    index = GpuIndex.read(path)
    name = os.fsdecode(path)
    fingerprint = weights.fingerprint if index.fingerprint else b""
    index.check(weights.info.n_layer, weights.info.n_ff, fingerprint, name=name)
    if not fingerprint:
        _say_unchecked(name, "which model file it was made for")
    return index


def _say_unchecked(path: StrPath, what: str) -> None:
    logger.info(
        "%s does not say %s: only its numbers of layers and neurons are checked", path, what
    )
