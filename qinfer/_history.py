"""The tokens that a sequence of a context holds, and which of them were computed as generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class History:
    """The tokens of a sequence and their roles.

    Attributes:
        tokens: their ids.
        roles: by token, 1 for one that was computed as generated, 0 for one of a prompt.
    """

    tokens: list[int] = field(default_factory=list)
    roles: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, ids: NDArray[np.int32], *, generated: bool) -> None:
        """Appends tokens that were computed together."""
        self.tokens.extend(ids.tolist())
        self.roles.extend(bytes([generated]) * len(ids))

    def truncate(self, n: int) -> None:
        """Drops all but the first `n` tokens."""
        del self.tokens[n:]
        del self.roles[n:]

    def first(self, n: int) -> History:
        """A copy of the first `n` tokens."""
        return History(self.tokens[:n], self.roles[:n])

    def n_shared(self, prompt: Sequence[int], *, prompt_only: bool) -> int:
        """Number of tokens that this and a prompt begin with in common.

        With `prompt_only`, of those before the first that was computed as generated.
        """
        held = self.tokens
        if prompt_only:
            first_generated = self.roles.find(1)
            held = held if first_generated < 0 else held[:first_generated]
        pairs = zip(held, prompt, strict=False)
        shorter = min(len(held), len(prompt))
        return next((i for i, (old, new) in enumerate(pairs) if old != new), shorter)
