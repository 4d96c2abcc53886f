"""Where keys and values are kept beside a GPU, and who attends to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ._native import lib
from ._weights import Weights
from .errors import ArgumentError

KvMode = Literal["auto", "device", "host", "split"]


@dataclass(frozen=True, slots=True)
class KvPlace:
    """Where the keys and values of layers that a GPU computes live, and who attends to them.

    Attributes:
        mode: "device" keeps all on the GPU, "host" all in host memory, where the processor attends
            to them. "split" keeps all in host memory and copies of as many pages as fit on the
            GPU: each attends to its positions and the parts are merged, which is exact. "auto" is
            "device" where they fit beside the attention, else "split".
        ratio: the processor's share of the positions at first, 0 to 1; None: what does not fit on
            the GPU. It implies "split".
        step: how much of the positions the boundary of a layer moves after each token, towards
            where both take as long; None or 0: not. It implies "split".
    """

    mode: KvMode = "auto"
    ratio: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ArgumentError(
                f"kv_mode={self.mode!r:.80} is not 'auto', 'device', 'host' or 'split'"
            )
        for name, value in (("kv_ratio", self.ratio), ("kv_step", self.step)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 1):
                raise ArgumentError(f"{name}={value!r:.80} is not a share from 0 to 1")
            if value is not None and self.mode in ("device", "host"):
                raise ArgumentError(
                    f"{name} is for keys and values that both share, not for kv_mode={self.mode!r}"
                )

    @property
    def number(self) -> int:
        """The runtime's number for the mode."""
        return int(_MODES[self.mode])

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self.mode == "auto" and self.ratio is None and not self.step

    def check_device(self, weights: Weights) -> None:
        """Raises ArgumentError where no GPU computes and anything but "auto" is asked for."""
        if weights.offload is None and not self.is_default:
            raise ArgumentError(
                "kv_mode, kv_ratio and kv_step say which keys and values a GPU keeps, and no GPU "
                "is used: the processor keeps them all in host memory"
            )


_MODES = {
    "auto": lib.QI_KV_AUTO,
    "device": lib.QI_KV_DEVICE,
    "host": lib.QI_KV_HOST,
    "split": lib.QI_KV_SPLIT,
}


def mode_name(number: int) -> str:
    """The name of one of the runtime's numbers."""
    return next(name for name, known in _MODES.items() if known == number)
