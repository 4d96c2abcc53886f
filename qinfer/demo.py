"""`qinfer demo`: a story by the model that comes along, and what leaving neurons out does to it."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from . import _machine
from ._gguf import GGUF
from .completion import Completion, Stats
from .context import Context
from .model import Model
from .offload import Placement
from .sparsity import MODES, Mode, Shares
from .stream import Stream

_TEMPERATURE = 0.6

# Rounds through the text go on until this is over.
_SECONDS = 2.0

_NEURON_TENSORS = ("ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight")
_MEANINGS = {
    "off": "all of them",
    "exact": "those not zero: the same text",
    "predict": "those predicted: it may differ",
}
# A smaller difference is taken for none.
_SAME_SPEED = 0.05
_BAR = 20
_WIDTH = 79


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """One mode on one text.

    Attributes:
        mode: as `sparsity=` names it.
        tokens_per_second: from the median of the times that tokens took.
        speedup: this speed against that of "off".
        bytes_per_token: weight bytes read for a token.
        active: the share of all neurons that contributed.
        active_by_layer: the same of each layer.
        predicted: the share that the predictors named; None in other modes.
    """

    mode: Mode
    tokens_per_second: float
    speedup: float
    bytes_per_token: int
    active: float
    active_by_layer: list[float]
    predicted: float | None


@dataclass(frozen=True, slots=True)
class Demo:
    """Everything that the demo shows.

    `neuron_bytes` is of all neurons of all layers. `placement` tells what of the model a GPU kept;
    it is None where the processor alone computed.
    """

    model: str
    n_params: int
    processor: str
    isa: str
    threads: int
    seed: int
    prompt: str
    story: str
    n_tokens: int
    neuron_bytes: int
    modes: list[ModeFigures]
    placement: Placement | None = None


def story(model: Model, prompt: str, *, seed: int, max_tokens: int | None) -> Stream:
    """A story piece by piece, the same for the same seed."""
    return model.stream(prompt, seed=seed, max_tokens=max_tokens, temperature=_TEMPERATURE)


def measure(
    model: Model,
    prompt: str,
    completion: Completion,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Demo:
    """Measures what a prompt and its completion cost in each mode."""
    processor = _machine.processor()
    with GGUF(model.path) as file:
        name = str(file.metadata["general.name"])
        neuron_bytes = sum(t.n_bytes for t in file.tensors if t.name.endswith(_NEURON_TENSORS))
    tokens = model.tokenizer.encode(prompt) + completion.tokens
    threads, placement, modes = _compare(model, tokens[: model.n_ctx], progress)
    return Demo(
        model=name,
        n_params=model.info.n_params,
        processor=processor.brand,
        isa=processor.isa,
        threads=threads,
        seed=completion.seed,
        prompt=prompt,
        story=completion.text,
        n_tokens=len(completion.tokens),
        neuron_bytes=neuron_bytes,
        modes=modes,
        placement=placement,
    )


def _compare(
    model: Model, tokens: list[int], progress: Callable[[int, int], None] | None
) -> tuple[int, Placement | None, list[ModeFigures]]:
    """How many threads compute, what a GPU keeps, and each mode's figures over the same tokens.

    The modes take turns token by token: what other programs do to the machine meanwhile, they do
    to all modes.
    """
    seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    with ExitStack() as stack:
        contexts = {mode: stack.enter_context(model.context(sparsity=mode)) for mode in MODES}
        for context in contexts.values():  # brings the weights into memory
            _seconds(context, tokens[0])
            context.reset_stats()
        begin = time.monotonic()
        while time.monotonic() - begin < _SECONDS:
            for context in contexts.values():
                context.truncate(0)
            for token in tokens:
                for mode, context in contexts.items():
                    seconds[mode].append(_seconds(context, token))
                if progress is not None:
                    # A slow machine's only round may take longer.
                    spent = (time.monotonic() - begin) / _SECONDS
                    progress(min(int(100 * spent), 99), 100)
        threads = contexts["off"].info.threads
        placements = [context.placement for context in contexts.values()]
        stats = {mode: context.stats() for mode, context in contexts.items()}
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    # A warning tells of contexts that find no room on the GPU.
    placement = next((each for each in placements if each is not None), None)
    figures = [
        _figures(mode, medians[mode], medians["off"], stats[mode], model.info.n_ff)
        for mode in MODES
    ]
    return threads, placement, figures


def _seconds(context: Context, token: int) -> float:
    begin = time.perf_counter()
    context.feed([token], generated=True)
    return time.perf_counter() - begin


def _figures(mode: Mode, seconds: float, dense: float, stats: Stats, n_ff: int) -> ModeFigures:
    """What the seconds per token, in this mode and densely, and the counters amount to."""
    everything = Shares(active=1.0)
    shares = Shares.of(stats.layers, n_ff) or everything
    return ModeFigures(
        mode=mode,
        tokens_per_second=1 / seconds,
        speedup=dense / seconds,
        bytes_per_token=stats.weight_bytes_read // stats.n_generated_tokens,
        active=shares.active,
        active_by_layer=[(Shares.of([layer], n_ff) or everything).active for layer in stats.layers],
        predicted=shares.predicted,
    )


# ---- for people ----


def render(result: Demo) -> str:
    """The figures as text for a terminal, and what they mean."""
    by_mode = {figures.mode: figures for figures in result.modes}
    dense, exact, predict = by_mode["off"], by_mode["exact"], by_mode["predict"]
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    machine = f"{threads} of {result.processor} ({result.isa})"
    if result.placement is not None:
        device, kept = result.placement.device, result.placement.summary
        machine = f"{device}, which keeps {kept}, and beside it {machine}"
    lines = [
        "A token needs only some of the model's neurons. That text again, in three ways,",
        *textwrap.wrap(f"on {machine}:", _WIDTH),
        "",
        f"  {'--sparsity':<12}{'neurons':>7}{'weights read':>14}{'tokens/s':>10}",
    ]
    for figures in result.modes:
        lines.append(
            f"  {figures.mode:<12}{figures.active:>7.0%}{_mb(figures.bytes_per_token):>14}"
            f"{figures.tokens_per_second:>10.0f}  {_MEANINGS[figures.mode]}"
        )
    lines += ["", "Neurons that are not zero, by layer:", ""]
    for number, share in enumerate(exact.active_by_layer):
        lines.append(f"  {number:>4}  {'#' * round(share * _BAR):.<{_BAR}}{share:>5.0%}")
    verdict = _verdict(max((exact, predict), key=lambda figures: figures.speedup))
    explanation = (
        f"{verdict} Neurons are {_mb(result.neuron_bytes)} of the {_mb(dense.bytes_per_token)} "
        "that this small model reads for a token, and the rest is mostly vocabulary. Large models "
        "are mostly neurons: there it saves more."
    )
    return "\n".join([*lines, "", *textwrap.wrap(explanation, _WIDTH)])


def _verdict(best: ModeFigures) -> str:
    """The faster sparse mode against the dense one, whichever way that went."""
    if best.speedup >= 1 + _SAME_SPEED:
        return f"Here {best.mode} is {best.speedup:.2f} times as fast as computing all of them."
    if best.speedup > 1 - _SAME_SPEED:
        return "Here leaving neurons out is not faster than computing all of them."
    return (
        "Here leaving neurons out is slower than computing all of them: "
        f"{best.mode} is {best.speedup:.2f} times as fast."
    )


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


class WordWrap:
    """Prints text that comes in pieces, on a terminal in lines that end between words.

    Args:
        write: prints a text without a line break.
        width: columns of a line; None leaves lines as they are.
    """

    def __init__(self, write: Callable[[str], None], width: int | None) -> None:
        self._write = write
        self._width = width
        self._column = 0
        self._word = ""

    def __call__(self, text: str) -> None:
        if self._width is None:
            self._write(text)
            return
        for character in text:
            if character.isspace():
                self._end_word()
                self._space(character)
            else:
                self._word += character

    def _space(self, character: str) -> None:
        """A space may end up at a line's end, where it cannot be seen."""
        self._write(character)
        self._column = 0 if character == "\n" else self._column + 1

    def _end_word(self) -> None:
        if self._width is not None and self._column + len(self._word) > self._width:
            self._space("\n")
        self._write(self._word)
        self._column += len(self._word)
        self._word = ""

    def close(self) -> None:
        """Prints what is left, and ends the line."""
        self._end_word()
        self._write("\n")
