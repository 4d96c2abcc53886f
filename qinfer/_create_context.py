"""Creating a context of the runtime: on the model's GPU, or without it where it has no room."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ._native import check, ffi, lib, new_error
from ._slow import said_if_slow
from ._weights import Weights
from .errors import DeviceError, OutOfMemory


def create_context(weights: Weights, params: Any, *, may_do_without: bool) -> tuple[Any, bool]:
    """The C context, and whether the GPU computes it: if its memory can hold it beside the others.

    Want of room is an error where the GPU was asked for by name and holds nothing of the model yet,
    and where the context may not do without it. Any other failure is one where the GPU was asked
    for by name, or holds something of the model.
    """
    share = weights.offload
    if share is None:
        return _create(weights, params), False
    params.offload = share.pointer
    placing = f"placing the model on {share.gpu}; its kernels are compiled once"
    for may_free in (True, False):
        try:
            with nullcontext() if share.is_placed else said_if_slow(placing):
                created = _create(weights, params)
            share.has_failed = False
            return created, True
        except OutOfMemory as error:
            if may_free and weights.free_idle():
                continue
            if not (share.optional or share.is_placed):
                raise
            if not may_do_without:
                raise OutOfMemory(
                    f"{error}; without kv_mode, kv_ratio and kv_step the processor takes "
                    "what does not fit"
                ) from None
            share.warn_of_context(error)
            break
        except DeviceError as error:
            if not share.optional or share.is_placed:
                raise
            share.has_failed = True
            share.warn_of_context(error)
            break
    params.offload = ffi.NULL
    return _create(weights, params), False


def _create(weights: Weights, params: Any) -> Any:
    out = ffi.new("qi_context **")
    error = new_error()
    check(lib.qi_context_create(weights.pointer, params, out, error), error)
    return out[0]
