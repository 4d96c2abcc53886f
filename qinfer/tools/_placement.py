"""How many neurons of each layer go to the GPU: the exact optimum, and the balance of two devices.

In each layer the most frequently active neurons go first, so a placement is one number per layer.

**Why sorting is optimal.** PowerInfer's programme sorts the counts of a layer, cuts them into
blocks of `block` neurons, and chooses blocks so that the sum of their counts is largest while they
fit. Sum and constraint are both sums over single blocks, so blocks interact through the capacity
alone. Suppose room for C blocks, and any selection that fits, of m <= C blocks. Counts are not
negative, so its value is at most that of the m largest blocks, hence of the C largest of all. Those
are a legal selection: blocks of a layer do not increase from first to last, so with ties broken in
favour of the earlier block, the C largest contain, with each block, all blocks before it in its
layer, and a number per layer describes them. Cutting the sorted order loses nothing either: of all
sets of k neurons of a layer the first k sorted ones have the largest sum. So the C largest blocks
are the optimum among all sets of neurons whose size is, in every layer, a multiple of `block`, and
no integer solver is needed.

**Costs that differ.** Where files mix weight types, a neuron costs more bytes in some layers than
in others. Among layers of one cost the argument above still holds for whatever share of the room
they get, which leaves one integer per distinct cost. The last two follow from the rest by trying
all values of one; others are searched in the order of an upper bound (the room that is left filled
by value per byte, the last block in part: Dantzig 1957), until the bound is no better than the best
found. The result is exact.

**A least number per layer** (`threshold`): a layer then takes either no neuron or at least that
many, so its first block can have no value alone, and sorting is no longer optimal: of two layers
with block counts (10, 0) and (6, 6), a threshold of two blocks and room for two, the best blocks by
sorting are one of each, which is not allowed, and the optimum is the second layer's 12. This case
is a knapsack with one choice per layer and is solved by dynamic programming over the capacity,
exactly too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError

Counts = Sequence[NDArray[np.generic]]
Values = NDArray[np.float64]

# Steps of the dynamic programme that take about half a minute, and cells of a gigabyte.
_MAX_STEPS = 3 * 10**10
_MAX_CELLS = 25 * 10**7


def hottest(counts: NDArray[np.generic], k: int) -> NDArray[np.int32]:
    """Ids, ascending, of the k neurons with the largest counts; of equal ones the first.

    `counts` has shape (n_ff,), the result (k,).
    """
    order = np.argsort(-counts.astype(np.float64), kind="stable")
    return np.sort(order[:k]).astype(np.int32)


def exact(
    counts: Counts, capacity: int, *, cost: Sequence[int], block: int = 1, threshold: int = 0
) -> list[int]:
    """How many neurons of each layer cover the most activations within a capacity.

    The optimum of PowerInfer's placement programme, found without an integer solver; the head of
    this module says why. Sums are float64.

    Args:
        counts: per layer, how often each neuron was active: shape (n_ff,).
        capacity: what the neurons may cost in all, in the unit of `cost`.
        cost: per layer, of one neuron.
        block: neurons are taken in multiples of this; it divides n_ff.
        threshold: a layer takes none or at least so many.

    Raises:
        ArgumentError: a number is out of range, `block` does not divide n_ff, or `threshold` is set
            for a problem too large to be solved exactly.
    """
    _check(counts, capacity, block)
    if len(cost) != len(counts) or min(cost) < 1:
        raise ArgumentError(f"a positive cost for each of {len(counts)} layers, not {list(cost)}")
    n_ff = len(counts[0])
    if not 0 <= threshold <= n_ff:
        raise ArgumentError(f"threshold={threshold} is not between 0 and the {n_ff} of a layer")
    values = np.array([block_sums(layer, block) for layer in counts])
    costs = [block * each for each in cost]
    if threshold > block:
        blocks = _one_choice_per_layer(values, costs, capacity, -(-threshold // block))
    else:
        blocks = _by_value(values, costs, capacity)
    return [block * n for n in blocks]


def balance(
    counts: Counts,
    capacity: int,
    *,
    cost_up: Sequence[int],
    cost_down: Sequence[int],
    ratio_up: float,
    ratio_down: float,
    block: int = 1,
) -> tuple[list[int], list[int]]:
    """Q-Infer's placement: a layer takes neurons until GPU and CPU need the same time for it.

    Round by round each layer is offered its next most active block, first for gate and up, then for
    down. It takes one that fits as long as the activations on the GPU, divided by those left to the
    CPU, are below the ratio of the two speeds; a layer with none left to the CPU takes no more.
    Source: the solver of the Q-Infer runtime (PDS-Lab/Q-Infer).

    Args:
        counts: per layer, how often each neuron was active: shape (n_ff,).
        capacity: what the rows may cost in all, in the unit of the costs.
        cost_up, cost_down: per layer, of one neuron's rows of gate and up, and of its row of down.
        ratio_up, ratio_down: speed of the GPU divided by that of the CPU, for the product with gate
            and up and for the one with down.
        block: neurons are taken in multiples of this; it divides n_ff.

    Returns:
        Per layer, the number of neurons for gate and up, and that for down.

    Raises:
        ArgumentError: a number is out of range, or `block` does not divide n_ff.
    """
    _check(counts, capacity, block)
    for name, ratio in (("ratio_up", ratio_up), ("ratio_down", ratio_down)):
        if not 0 <= ratio < float("inf"):
            raise ArgumentError(f"{name}={ratio} is not a ratio of two speeds")
    values = np.array([block_sums(layer, block) for layer in counts])
    totals = values.sum(axis=1).tolist()
    n_layers, n_blocks = values.shape
    sides = (
        _Side(ratio_up, [block * each for each in cost_up], [0] * n_layers, [0.0] * n_layers),
        _Side(ratio_down, [block * each for each in cost_down], [0] * n_layers, [0.0] * n_layers),
    )
    for _ in range(n_blocks):
        for layer in range(n_layers):
            for side in sides:
                covered = side.covered[layer]
                behind = covered < side.ratio * (totals[layer] - covered)
                if behind and capacity >= side.cost[layer]:
                    side.blocks[layer] += 1
                    side.covered[layer] += float(values[layer, side.blocks[layer] - 1])
                    capacity -= side.cost[layer]
    up, down = ([block * n for n in side.blocks] for side in sides)
    return up, down


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two placements of `balance`; `covered` is in activations."""

    ratio: float
    cost: list[int]
    blocks: list[int]
    covered: list[float]


def block_sums(counts: NDArray[np.generic], block: int) -> Values:
    """Sums of a layer's counts, sorted to descend, by blocks: shape (n_ff / block,)."""
    ordered = -np.sort(-counts.astype(np.float64))
    sums: Values = ordered.reshape(-1, block).sum(axis=1)
    return sums


def _check(counts: Counts, capacity: int, block: int) -> None:
    if not counts or any(layer.shape != counts[0].shape for layer in counts):
        raise ArgumentError("counts are one array per layer, all of one length")
    if capacity < 0:
        raise ArgumentError(f"a capacity of {capacity} is negative")
    if block < 1 or len(counts[0]) % block:
        raise ArgumentError(
            f"block={block} does not divide the {len(counts[0])} neurons of a layer"
        )


# ---- without a threshold: sort ----


@dataclass(frozen=True, slots=True)
class _Class:
    """Blocks of layers of one cost, most valuable first.

    Attributes:
        cost: of a block.
        layers: the layer of each block, shape (n,).
        gains: the value of the first 0, 1, … n blocks, shape (n + 1,).
    """

    cost: int
    layers: NDArray[np.intp]
    gains: Values

    def fitting(self, room: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many blocks fit."""
        return np.minimum(room // self.cost, len(self.layers))


def _by_value(values: Values, costs: list[int], capacity: int) -> list[int]:
    """Blocks per layer: the most valuable that fit."""
    classes = [_class(values, costs, cost) for cost in sorted(set(costs))]
    # The largest two come last, where all values are tried at once.
    classes.sort(key=lambda each: len(each.layers))
    room = min(capacity, sum(len(each.layers) * each.cost for each in classes))
    blocks = [0] * len(costs)
    for each, n in zip(classes, _Search(classes).run(room), strict=True):
        for layer in each.layers[:n].tolist():
            blocks[layer] += 1
    return blocks


def _class(values: Values, costs: list[int], cost: int) -> _Class:
    layers = np.flatnonzero(np.array(costs) == cost)
    # By rank, then by layer: equal blocks are spread over the layers, and stay in order in each.
    flat = values[layers].T.ravel()
    order = np.argsort(-flat, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum(flat[order])])
    return _Class(cost, layers[order % len(layers)], gains)


class _Search:
    """The best number of blocks of each class within the room."""

    def __init__(self, classes: list[_Class]) -> None:
        self._classes = classes
        self._bounds = [_Bound(classes[i:]) for i in range(len(classes))]
        self._best = -1.0
        self._taken: list[int] = []

    def run(self, room: int) -> list[int]:
        """Blocks to take of each class."""
        self._descend([], room, 0.0)
        return self._taken

    def _descend(self, taken: list[int], room: int, gained: float) -> None:
        rest = self._classes[len(taken) :]
        first = rest[0]
        if len(rest) == 1:
            n = int(first.fitting(np.array(room)))
            self._offer([*taken, n], gained + float(first.gains[n]))
            return
        n_first = np.arange(int(first.fitting(np.array(room))) + 1)
        left = room - first.cost * n_first
        gains = gained + first.gains[n_first]
        if len(rest) == 2:
            n_last = rest[1].fitting(left)
            gains = gains + rest[1].gains[n_last]
            best = int(np.argmax(gains))
            self._offer([*taken, best, int(n_last[best])], float(gains[best]))
            return
        bounds = gains + self._bounds[len(taken) + 1].of(left)
        for n in np.argsort(-bounds, kind="stable").tolist():
            # Rounding must not let a bound fall below what it bounds.
            if bounds[n] * (1 + 1e-12) <= self._best:
                break
            self._descend([*taken, n], int(left[n]), float(gains[n]))

    def _offer(self, taken: list[int], value: float) -> None:
        if value > self._best:
            self._best, self._taken = value, taken


class _Bound:
    """What blocks of some classes can be worth at most in a given room."""

    def __init__(self, classes: list[_Class]) -> None:
        values = np.concatenate([np.diff(each.gains) for each in classes])
        costs = np.concatenate([np.full(len(each.layers), each.cost) for each in classes])
        order = np.argsort(-values / costs, kind="stable")
        self._costs = np.concatenate([[0], np.cumsum(costs[order])])
        self._values = np.concatenate([[0.0], np.cumsum(values[order])])

    def of(self, room: NDArray[np.int64]) -> Values:
        bounds: Values = np.interp(room, self._costs, self._values)
        return bounds


# ---- with one: dynamic programming ----


def _one_choice_per_layer(values: Values, costs: list[int], capacity: int, least: int) -> list[int]:
    """Blocks per layer: none, or at least so many."""
    n_layers, n_blocks = values.shape
    unit = gcd(*costs)
    weights = [cost // unit for cost in costs]
    room = min(capacity // unit, n_blocks * sum(weights))
    steps, cells = n_layers * (n_blocks - least + 1) * (room + 1), n_layers * (room + 1)
    if steps > _MAX_STEPS or cells > _MAX_CELLS:
        raise ArgumentError(
            f"a threshold with blocks of so few neurons takes {steps:.1e} steps to solve exactly; "
            "larger blocks (--batch) take fewer"
        )
    best = np.zeros(room + 1)
    chosen = np.zeros((n_layers, room + 1), np.int32)
    for layer, weight in enumerate(weights):
        gains = np.cumsum(values[layer])
        so_far = best.copy()
        for n in range(least, min(n_blocks, room // weight) + 1):
            with_n = so_far[: room + 1 - n * weight] + gains[n - 1]
            better = np.flatnonzero(with_n > best[n * weight :])
            best[n * weight + better] = with_n[better]
            chosen[layer, n * weight + better] = n
    blocks = []
    for layer in reversed(range(n_layers)):
        blocks.append(int(chosen[layer, room]))
        room -= blocks[-1] * weights[layer]
    return blocks[::-1]
