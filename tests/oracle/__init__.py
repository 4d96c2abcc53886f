"""The architectures in plain NumPy float64: what the engine's logits are compared with.

Slow and obvious on purpose. Nothing is shared with the package: files go through PyPI's `gguf`.
"""

from .checkpoint import Checkpoint, Quantised, read_gguf, write_gguf
from .forward import forward
from .numerics import Numerics, errors

__all__ = ["Checkpoint", "Numerics", "Quantised", "errors", "forward", "read_gguf", "write_gguf"]
