"""How many neurons of each layer go to the GPU: against exhaustive search."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.errors import ArgumentError
from qinfer.tools._placement import balance, exact, hottest

Counts = list[npt.NDArray[np.int64]]


def covered(counts: Counts, neurons: list[int]) -> int:
    """Activations of the most active neurons of each layer."""
    return sum(
        sum(sorted(layer.tolist(), reverse=True)[:k])
        for layer, k in zip(counts, neurons, strict=True)
    )


def best_by_trying_all(
    counts: Counts, capacity: int, cost: list[int], block: int, threshold: int
) -> int:
    """The most activations that any legal numbers of neurons cover."""
    n_ff = len(counts[0])
    choices = [k for k in range(0, n_ff + 1, block) if k == 0 or k >= threshold]
    return max(
        covered(counts, list(neurons))
        for neurons in product(choices, repeat=len(counts))
        if sum(k * each for k, each in zip(neurons, cost, strict=True)) <= capacity
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Counts, int, list[int], int]:
    """Counts, capacity, costs and block of a small problem, with ties and zeros."""
    n_layers = draw(st.integers(1, 4))
    block = draw(st.sampled_from([1, 1, 2, 3]))
    n_ff = block * draw(st.integers(1, 4))
    largest = draw(st.sampled_from([1, 4, 1000]))
    layer = st.lists(st.integers(0, largest), min_size=n_ff, max_size=n_ff)
    counts = [np.array(draw(layer)) for _ in range(n_layers)]
    cost = [draw(st.integers(1, draw(st.sampled_from([1, 3, 9])))) for _ in range(n_layers)]
    return counts, draw(st.integers(0, n_ff * sum(cost) + 2)), cost, block


@settings(max_examples=400, deadline=None)
@given(problem=problems())
def test_nothing_covers_more(problem: tuple[Counts, int, list[int], int]) -> None:
    counts, capacity, cost, block = problem
    neurons = exact(counts, capacity, cost=cost, block=block)
    assert all(0 <= k <= len(counts[0]) and k % block == 0 for k in neurons)
    assert sum(k * each for k, each in zip(neurons, cost, strict=True)) <= capacity
    assert covered(counts, neurons) == best_by_trying_all(counts, capacity, cost, block, 0)


@settings(max_examples=200, deadline=None)
@given(problem=problems(), threshold=st.integers(0, 12))
def test_nothing_covers_more_with_a_threshold(
    problem: tuple[Counts, int, list[int], int], threshold: int
) -> None:
    counts, capacity, cost, block = problem
    threshold = min(threshold, len(counts[0]))
    neurons = exact(counts, capacity, cost=cost, block=block, threshold=threshold)
    assert all(k == 0 or threshold <= k <= len(counts[0]) for k in neurons)
    assert all(k % block == 0 for k in neurons)
    assert sum(k * each for k, each in zip(neurons, cost, strict=True)) <= capacity
    assert covered(counts, neurons) == best_by_trying_all(counts, capacity, cost, block, threshold)


def test_no_set_of_neurons_covers_more() -> None:
    """Not even one that leaves out a more active neuron of a layer."""
    rng = np.random.default_rng(3)
    for capacity in range(12):
        counts = [rng.integers(0, 9, 5), rng.integers(0, 9, 5)]
        cost = [2, 3]
        neurons = [(layer, j) for layer in range(2) for j in range(5)]
        best = max(
            sum(int(counts[layer][j]) for layer, j in chosen)
            for n in range(7)
            for chosen in combinations(neurons, n)
            if sum(cost[layer] for layer, _ in chosen) <= capacity
        )
        assert covered(counts, exact(counts, capacity, cost=cost)) == best


def test_many_costs_against_dynamic_programming() -> None:
    """Too many layers to try all, and more costs than files have."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        counts = [rng.integers(0, 50, 20) for _ in range(12)]
        cost = rng.integers(1, 7, 12).tolist()
        capacity = int(20 * sum(cost) * rng.uniform(0.05, 0.95))
        best = np.zeros(capacity + 1, np.int64)  # by what was spent, at most
        for layer, each in zip(counts, cost, strict=True):
            for value in layer:
                best[each:] = np.maximum(best[each:], best[:-each] + value)
        neurons = exact(counts, capacity, cost=cost)
        assert covered(counts, neurons) == best[-1]


def test_the_best_blocks_of_all_layers() -> None:
    """By hand: blocks of 2 are (11, 1), (9, 8) and (2, 2); three fit."""
    counts = [np.array([1, 0, 5, 6]), np.array([4, 4, 5, 4]), np.array([1, 1, 1, 1])]
    assert exact(counts, 6, cost=[1, 1, 1], block=2) == [2, 4, 0]
    assert exact(counts, 7, cost=[1, 1, 1], block=2) == [2, 4, 0]
    assert exact(counts, 100, cost=[1, 1, 1], block=2) == [4, 4, 4]
    assert exact(counts, 1, cost=[1, 1, 1], block=2) == [0, 0, 0]


def test_cheap_neurons_win() -> None:
    """Two neurons of 5 cost as much as one of 8."""
    counts = [np.array([8, 8]), np.array([5, 5])]
    assert exact(counts, 4, cost=[4, 2]) == [0, 2]
    assert exact(counts, 4, cost=[4, 4]) == [1, 0]


def test_the_example_that_sorting_gets_wrong() -> None:
    counts = [np.array([10, 0]), np.array([6, 6])]
    assert exact(counts, 2, cost=[1, 1]) == [1, 1]
    assert exact(counts, 2, cost=[1, 1], threshold=2) == [0, 2]


def test_models_of_real_size() -> None:
    """A layer-mixed 13B file by single neurons, and by blocks with a threshold."""
    rng = np.random.default_rng(0)
    counts = [(rng.pareto(1.0, 13824) * 100).astype(np.int64) for _ in range(40)]
    cost = [3 * 2880 if layer % 3 else 2 * 2880 + 4200 for layer in range(40)]
    capacity = 2**30
    neurons = exact(counts, capacity, cost=cost)
    spent = sum(k * each for k, each in zip(neurons, cost, strict=True))
    assert capacity - min(cost) < spent <= capacity
    in_blocks = exact(counts, capacity, cost=cost, block=256)
    some = exact(counts, capacity, cost=cost, block=256, threshold=3072)
    assert {k for k in some if 0 < k < 3072} == set()
    assert any(0 < k < 3072 for k in in_blocks)
    values = [covered(counts, each) for each in (some, in_blocks, neurons)]
    assert values == sorted(values)


def test_the_hottest_neurons() -> None:
    counts = np.array([3, 9, 3, 0, 9, 3])
    assert hottest(counts, 0).tolist() == []
    assert hottest(counts, 1).tolist() == [1]
    assert hottest(counts, 3).tolist() == [0, 1, 4]
    assert hottest(counts, 4).tolist() == [0, 1, 2, 4]
    assert hottest(counts, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert hottest(counts, 2).dtype == np.int32


# ---- balance ----


def balanced_by_the_description(
    counts: Counts,
    capacity: int,
    cost_up: list[int],
    cost_down: list[int],
    ratio_up: float,
    ratio_down: float,
    block: int,
) -> tuple[list[int], list[int]]:
    """Q-Infer's rule step by step, with exact quotients."""
    ordered = [sorted(layer.tolist(), reverse=True) for layer in counts]
    taken = {"up": [0] * len(counts), "down": [0] * len(counts)}
    for i in range(len(counts[0]) // block):
        for layer, values in enumerate(ordered):
            for side, cost, ratio in (
                ("up", cost_up[layer], ratio_up), ("down", cost_down[layer], ratio_down)
            ):  # fmt: skip
                k = taken[side][layer]
                on_gpu, on_cpu = sum(values[:k]), sum(values[k:])
                if on_cpu == 0 or Fraction(on_gpu, on_cpu) >= Fraction(ratio):
                    continue  # nothing left to the CPU, or enough on the GPU
                # It has taken every block so far, or it would not be behind now.
                if capacity >= block * cost:
                    assert k <= i * block
                    taken[side][layer] += block
                    capacity -= block * cost
    return taken["up"], taken["down"]


@settings(max_examples=200, deadline=None)
@given(
    problem=problems(),
    n_up=st.integers(1, 2),
    ratios=st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 7.5])] * 2),
)
def test_balance_is_qinfers_rule(
    problem: tuple[Counts, int, list[int], int], n_up: int, ratios: tuple[float, float]
) -> None:
    counts, capacity, cost_down, block = problem
    cost_up = [n_up * each for each in cost_down]
    found = balance(
        counts, capacity, cost_up=cost_up, cost_down=cost_down,
        ratio_up=ratios[0], ratio_down=ratios[1], block=block,
    )  # fmt: skip
    assert found == balanced_by_the_description(
        counts, capacity, cost_up, cost_down, *ratios, block
    )
    spent = np.dot(found[0], cost_up) + np.dot(found[1], cost_down)
    assert spent <= capacity


def test_balance_stops_at_the_ratio_of_speeds() -> None:
    """Of ten equal neurons, a GPU three times as fast takes the eighth when seven are too few."""
    counts = [np.full(10, 4)]
    for ratio, expected in ((0.0, 0), (1.0, 5), (3.0, 8), (4.0, 8), (1e9, 10)):
        up, down = balance(
            counts, 10**6, cost_up=[2], cost_down=[1], ratio_up=ratio, ratio_down=0.0
        )
        assert (up, down) == ([expected], [0])


def test_balance_takes_all_of_no_layer_that_is_covered() -> None:
    """The original divides by zero here."""
    counts = [np.array([5, 0, 0, 0]), np.zeros(4, np.int64)]
    up, down = balance(counts, 100, cost_up=[2, 2], cost_down=[1, 1], ratio_up=9.0, ratio_down=9.0)
    assert (up, down) == ([1, 0], [1, 0])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("counts", "options", "says"),
    [
        ([], {}, "one array per layer"),
        ([[1, 2], [1]], {}, "all of one length"),
        ([[1, 2, 3]], {"block": 2}, "block=2 does not divide the 3"),
        ([[1, 2]], {"block": 0}, "block=0"),
        ([[1, 2]], {"capacity": -1}, "capacity of -1"),
        ([[1, 2]], {"cost": [0]}, "positive cost"),
        ([[1, 2]], {"cost": [1, 1]}, "positive cost for each of 1"),
        ([[1, 2]], {"threshold": 3}, "threshold=3 is not between 0 and the 2"),
        ([[1, 2]], {"threshold": -1}, "threshold=-1"),
    ],
)
def test_arguments_out_of_range(
    counts: list[list[int]], options: dict[str, object], says: str
) -> None:
    arguments = {"capacity": 5, "cost": [1] * len(counts)} | options
    with pytest.raises(ArgumentError, match=says):
        exact([np.array(layer) for layer in counts], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [-1.0, float("nan"), float("inf")])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(ArgumentError, match=f"ratio_down={ratio} is not a ratio"):
        balance([np.array([1])], 5, cost_up=[2], cost_down=[1], ratio_up=1.0, ratio_down=ratio)


def test_a_threshold_too_costly_to_solve_says_so() -> None:
    counts = [np.ones(20000)] * 80
    with pytest.raises(ArgumentError, match=r"larger blocks \(--batch\)"):
        exact(counts, 2**33, cost=[4097] * 79 + [4099], threshold=50)
