"""Runs large language models from GGUF files on the machine you have.

    from qinfer import Model

    model = Model("model.gguf")
    print(model.generate("Once upon a time", max_tokens=64))

Messages go to the logger named "qinfer"; every failure is a `QInferError`.
"""

from typing import TYPE_CHECKING, Any

from . import _native
from ._generate import GenerateOptions, LogitsProcessor
from ._weights import ModelInfo
from .completion import Completion, Piece, Score, Stats, Timings, TokenLogprob, Usage
from .context import Context, ContextInfo
from .errors import (
    ArgumentError,
    Busy,
    Cancelled,
    Closed,
    ContextFull,
    DeviceError,
    FileError,
    FormatError,
    InternalError,
    OutOfMemory,
    QInferError,
    UnsupportedError,
)
from .model import Model
from .offload import Placement
from .sampling import Sampler, Sampling
from .stream import Stream

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__version__ = _native.text(_native.lib.qi_version())

__all__ = [
    "ArgumentError",
    "Busy",
    "Cancelled",
    "Closed",
    "Completion",
    "Context",
    "ContextFull",
    "ContextInfo",
    "DeviceError",
    "FileError",
    "FormatError",
    "GenerateOptions",
    "InternalError",
    "LogitsProcessor",
    "Model",
    "ModelInfo",
    "OutOfMemory",
    "Piece",
    "Placement",
    "QInferError",
    "Sampler",
    "Sampling",
    "Score",
    "Stats",
    "Stream",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "UnsupportedError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """What takes long to import and is not always wanted."""
    if name == "Tokenizer":
        from .tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
