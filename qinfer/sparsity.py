"""Which neurons a token computes: the modes, the choice between them, and what a layer reports."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from ._checks import is_integer, is_number, one_of
from ._native import lib
from .errors import ArgumentError, FileError

if TYPE_CHECKING:
    from ._weights import ModelInfo, Weights
    from .context import Context

logger = logging.getLogger("qinfer")

Mode = Literal["off", "exact", "predict"]
SparsityMode = Literal["auto", "off", "exact", "predict"]
Prefill = Literal["dense", "sparse"]

MODES: tuple[Mode, ...] = ("off", "exact", "predict")
_RULES = {"off": lib.QI_RULE_ALL, "exact": lib.QI_RULE_EXACT, "predict": lib.QI_RULE_PREDICT}

# A lossy mode, or one that does more, has to be faster than the one before it by this factor.
_WORTH_IT = 0.97
# Steps timed of each mode; the fastest counts, because other programs only ever add time.
_STEPS = 4
_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Policy:
    """How tokens choose their neurons.

    Attributes:
        mode: of generated tokens: "off" computes all neurons, "exact" those whose gate is not zero,
            "predict" of those that the model's predictors name the ones whose gate is not zero.
        prefill: "dense" computes all neurons of prompt tokens; "sparse" treats them as generated
            ones.
        threshold: a neuron is left out when its prediction is below; None takes the file's.
        cross_layer_from: layers from this one on predict from what the predictor of the layer
            before looked at; None: none does.
    """

    mode: Mode = "off"
    prefill: Prefill = "dense"
    threshold: float | None = None
    cross_layer_from: int | None = None

    @property
    def generated_rule(self) -> int:
        """The runtime's number for generated tokens."""
        return int(_RULES[self.mode])

    @property
    def prompt_rule(self) -> int:
        """The runtime's number for prompt tokens."""
        return self.generated_rule if self.prefill == "sparse" else int(_RULES["off"])

    @property
    def tells_roles_apart(self) -> bool:
        """Whether a token computed as part of a prompt and as a generated one may differ."""
        return self.mode == "predict" and self.prefill == "dense"


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What the feed-forward network of one layer did.

    Attributes:
        n_tokens: computed in another mode than "off".
        n_active: neurons that contributed, summed over these tokens.
        n_predicted: neurons that the predictor named, summed over these tokens.
        n_checked: tokens whose predictions were held against all gates.
        n_due: neurons that should have contributed to the tokens checked.
        n_missed: of which the predictor did not name so many.
        n_bytes: weight bytes read, for all tokens.
        predict_seconds: spent on predictions; 0 where a GPU made them.
        seconds: all of it, predictions included; 0 of a layer that a GPU computes alone, as part of
            a recorded whole that nobody times.
        device_seconds: where a GPU shares the layer with the processor, until it had its own part;
            this and the next two are 0 elsewhere.
        host_seconds: what the processor took for its part meanwhile.
        wait_seconds: how long the GPU then waited for it.
    """

    n_tokens: int = 0
    n_active: int = 0
    n_predicted: int = 0
    n_checked: int = 0
    n_due: int = 0
    n_missed: int = 0
    n_bytes: int = 0
    predict_seconds: float = 0.0
    seconds: float = 0.0
    device_seconds: float = 0.0
    host_seconds: float = 0.0
    wait_seconds: float = 0.0

    def __add__(self, other: LayerStats) -> LayerStats:
        more = asdict(other)
        return LayerStats(**{name: value + more[name] for name, value in asdict(self).items()})

    def __sub__(self, earlier: LayerStats) -> LayerStats:
        then = asdict(earlier)
        return LayerStats(**{name: value - then[name] for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True)
class Shares:
    """Of all neurons of all layers, those that a token computes on average.

    Attributes:
        active: the share that contributed.
        predicted: the share that predictors named; None in "exact".
        missed: the part of those that should have contributed that predictors did not name; None
            where that was not looked at.
    """

    active: float
    predicted: float | None = None
    missed: float | None = None

    @classmethod
    def of(cls, layers: Sequence[LayerStats], n_ff: int) -> Shares | None:
        """The shares that counters amount to; None where all neurons were computed."""
        total = sum(layers, LayerStats())
        if total.n_tokens == 0:
            return None
        n = total.n_tokens * n_ff
        # Predictors that named no neuron at all have at least taken their time.
        were_asked = total.n_predicted > 0 or total.predict_seconds > 0
        return cls(
            active=total.n_active / n,
            predicted=total.n_predicted / n if were_asked else None,
            missed=total.n_missed / total.n_due if total.n_due else None,
        )


def checked(
    sparsity: str,
    prefill: str,
    threshold: float | None,
    info: ModelInfo,
    cross_layer_from: int | None = None,
) -> None:
    """Raises ArgumentError for settings that are not known or that the model cannot follow."""
    one_of("sparsity", sparsity, ("auto", *MODES))
    one_of("prefill", prefill, ("dense", "sparse"))
    if threshold is not None and not (is_number(threshold) and math.isfinite(threshold)):
        raise ArgumentError(f"sparse_threshold={threshold!r:.80} is not a finite number")
    if sparsity == "exact" and not info.has_sparse_act:
        raise ArgumentError(
            f"sparsity='exact' needs an activation that is zero for many inputs, such as relu; "
            f"this model's is {info.hidden_act}"
        )
    if sparsity == "predict" and not info.predictor_rank:
        raise ArgumentError("sparsity='predict' needs predictors, which this model does not have")
    if cross_layer_from is None:
        return
    if not info.predictor_rank:
        raise ArgumentError("cross_layer_from needs predictors, which this model does not have")
    if not is_integer(cross_layer_from) or not 1 <= cross_layer_from < info.n_layer:
        raise ArgumentError(
            f"cross_layer_from={cross_layer_from!r:.80} is not a layer from 1 to {info.n_layer - 1}"
        )
    if sparsity in ("off", "exact"):
        raise ArgumentError(
            f"cross_layer_from={cross_layer_from} says what predictors look at, and "
            f"sparsity={sparsity!r} asks none: it is for sparsity='predict'"
        )


def choose(
    weights: Weights,
    sparsity: SparsityMode,
    prefill: Prefill,
    threshold: float | None,
    threads: int | None,
    make_context: Callable[[Policy], Context],
    cross_layer_from: int | None = None,
) -> Policy:
    """The policy of a model: as asked for, or with "auto" the fastest mode on this machine.

    "auto" times a few tokens in each mode that the model has, keeps the result in the user cache
    for this file, processor and number of threads, and logs the choice. A mode that leaves out more
    must be faster by 3 % to be taken. "predict" is none of its choices where the activation is not
    zero for many inputs: what predictors leave out then was never zero. A PowerInfer file without
    usable predictors is "exact", untimed. `make_context` makes a context of the kind that will be
    used.
    """
    info = weights.info
    checked(sparsity, prefill, threshold, info, cross_layer_from)
    mode: Mode = "off" if sparsity == "auto" else sparsity
    early = None if cross_layer_from is None else int(cross_layer_from)
    policy = Policy(mode, prefill, None if threshold is None else float(threshold), early)
    if sparsity != "auto":
        return policy
    if info.is_powerinfer and info.has_sparse_act and not info.predictor_rank:
        # Such a file was meant to leave neurons out; the runtime has said that none are predicted.
        return replace(policy, mode="exact")
    candidates: list[Mode] = ["off"]
    if info.has_sparse_act:
        candidates.append("exact")
        if info.predictor_rank:
            candidates.append("predict")
    best = candidates[0]
    if len(candidates) > 1:
        seconds = _seconds_per_token(weights, candidates, policy, threads, make_context)
        for mode in candidates[1:]:
            if seconds[mode] < _WORTH_IT * seconds[best]:
                best = mode
        figures = ", ".join(f"{mode} {1 / seconds[mode]:.1f}" for mode in candidates)
        logger.info("sparsity='auto' is '%s' here; tokens per second: %s", best, figures)
    if early is not None and best != "predict":
        logger.warning(
            "cross_layer_from=%d has no effect: sparsity='auto' chose '%s', which asks no "
            "predictors",
            *(early, best),
        )
    return replace(policy, mode=best)


def _seconds_per_token(
    weights: Weights,
    candidates: list[Mode],
    policy: Policy,
    threads: int | None,
    make_context: Callable[[Policy], Context],
) -> dict[str, float]:
    import json

    from . import _machine
    from ._alias import cache_folder
    from ._files import whole_file

    processor = _machine.processor()
    key = "-".join(
        [
            str(_CACHE_VERSION),
            weights.fingerprint.hex()[:32],
            processor.brand.replace(" ", "_"),
            processor.isa,
            str(threads or processor.n_usable_cores),
            str(policy.threshold),
            *([] if weights.offload is None else [weights.offload.kind]),
        ]
    )
    path = cache_folder() / "sparsity.json"
    known: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    found = known.get(key) if isinstance(known, dict) else None
    if isinstance(found, dict) and set(found) == set(candidates):
        return found
    known = known if isinstance(known, dict) else {}
    seconds = known[key] = _measure(weights, candidates, policy, make_context)
    if weights.offload is not None:
        has_run = weights.offload.is_placed
        # What is kept is to be the same in a run that finds these times in the cache.
        weights.offload.reset()
        if not has_run:
            return seconds  # of the processor: the GPU may have room another time
    # Another process may lose its entry to ours; it is measured again then.
    with suppress(OSError, FileError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(known).encode())
    return seconds


def _measure(
    weights: Weights,
    candidates: list[Mode],
    policy: Policy,
    make_context: Callable[[Policy], Context],
) -> dict[str, float]:
    """Seconds that a generated token takes in each mode.

    The modes take turns, but on a GPU, whose memory is meant for one such context.
    """
    rounds = [candidates] if weights.offload is None else [[mode] for mode in candidates]
    seconds: dict[str, float] = dict.fromkeys(candidates, math.inf)
    for modes in rounds:
        with ExitStack() as stack:
            contexts = {
                mode: stack.enter_context(make_context(replace(policy, mode=mode)))
                for mode in modes
            }
            for step in range(_STEPS + 1):
                for mode, context in contexts.items():
                    token = (step * 977 + 259) % weights.info.n_vocab
                    start = time.perf_counter()
                    context.feed([token], generated=True)
                    elapsed = time.perf_counter() - start
                    if step > 0:  # the first step brings pages into memory
                        seconds[mode] = min(seconds[mode], elapsed)
    return seconds
