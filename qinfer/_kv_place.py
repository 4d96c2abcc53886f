"""Where keys and values are kept beside a GPU, and who attends to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ._checks import is_number, one_of
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
        step: how much of the positions, 0 to 1, the boundary of a layer moves after each token,
            towards where both take as long; a page at least. None or 0: not at all. Any other
            implies "split".
    """

    mode: KvMode = "auto"
    ratio: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        one_of("kv_mode", self.mode, _MODES)
        for name in ("ratio", "step"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_number(value) or not 0 <= value <= 1:
                raise ArgumentError(f"kv_{name}={value!r:.80} is not a share from 0 to 1")
            if self.mode in ("device", "host") and (name == "ratio" or value > 0):
                raise ArgumentError(
                    f"kv_{name} is for keys and values that both share, not for "
                    f"kv_mode={self.mode!r}"
                )
            object.__setattr__(self, name, float(value))

    @property
    def number(self) -> int:
        """The runtime's number for the mode."""
        return int(_MODES[self.mode])

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self.mode == "auto" and self.ratio is None and not self.step

    @property
    def given(self) -> list[str]:
        """What was asked for, as it is written."""
        return [
            *([f"kv_mode={self.mode!r}"] if self.mode != "auto" else []),
            *([f"kv_ratio={self.ratio:g}"] if self.ratio is not None else []),
            *([f"kv_step={self.step:g}"] if self.step else []),
        ]

    def check_device(self, weights: Weights) -> None:
        """Raises ArgumentError where no GPU computes and anything but "auto" is asked for."""
        if weights.offload is None and not self.is_default:
            raise ArgumentError(for_gpus(self.given, weights.why_no_gpu))


def for_gpus(options: list[str], reason: str) -> str:
    """The message for options that need a GPU where none is used."""
    are = "is" if len(options) == 1 else "are"
    return f"{' and '.join(options)} {are} for GPUs, and no GPU is used: {reason}"


_MODES = {
    "auto": lib.QI_KV_AUTO,
    "device": lib.QI_KV_DEVICE,
    "host": lib.QI_KV_HOST,
    "split": lib.QI_KV_SPLIT,
}


def mode_name(number: int) -> str:
    """The name of one of the runtime's numbers."""
    return next(name for name, known in _MODES.items() if known == number)
