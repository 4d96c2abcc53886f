"""How many positions per sequence a context has, by what is asked for, training and memory."""

from __future__ import annotations

import logging

from . import _machine
from ._kv_type import kv_bytes_per_token
from ._weights import ModelInfo
from .errors import ArgumentError

logger = logging.getLogger("qinfer")

# A context never defaults to fewer positions, however little memory is free.
_LEAST_N_CTX = 512


def context_length(info: ModelInfo, asked: int | None, kv_type: str) -> int:
    """Positions per sequence: those asked for, or as many as were trained and fit in memory."""
    if asked is not None:
        check_length(info, asked)
        return asked
    trained = min(info.n_ctx_train, info.n_ctx_max or info.n_ctx_train)
    per_token = kv_bytes_per_token(kv_type, info)
    free = _machine.available_memory()
    budget = max(free - info.n_weight_bytes, free // 4)
    fitting = max(_LEAST_N_CTX, int(budget // max(1, per_token)))
    if fitting >= trained:
        return trained
    logger.warning(
        "the context is limited to %d of %d positions, whose keys and values would take %.1f GiB "
        "of the %.1f GiB of memory that are free; n_ctx= overrides this",
        *(fitting, trained, trained * per_token / 2**30, free / 2**30),
    )
    return fitting


def check_length(info: ModelInfo, asked: int) -> None:
    """Warns of a number of positions that the model was never trained for.

    Raises ArgumentError when it is more than learned position embeddings reach.
    """
    if 0 < info.n_ctx_max < asked:
        raise ArgumentError(
            f"n_ctx={asked} is more than the {info.n_ctx_max} positions that the model has "
            "embeddings for (position_embd.weight)"
        )
    if asked > info.n_ctx_train:
        logger.warning(
            "n_ctx=%d is more than the %d the model was trained for", asked, info.n_ctx_train
        )
