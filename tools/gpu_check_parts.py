"""The parts of gpu_check.py, each run in a process of its own, which a GPU may take down with it.

A part yields results as it has them. Those that compare with the processor say under which
tolerance, which is that of rounding the same quantities in another order.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_model
import numpy as np
import numpy.typing as npt
from sparse_weights import Sparsity

import qinfer
from qinfer import Model, OutOfMemory, _cuda, _machine
from qinfer._types import tensor_type

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"
WHAT_IT_IS = "what it is"  # the result that tells of the card

# Logits against the processor's, relative to their length. Of weights kept as floats, rounding in
# another order is all there is, and keys and values of the next token round to F16 from there; a
# prompt's attention multiplies F16 on tensor cores, whose rounding is 2^-11. Quantised weights meet
# activations in int8 codes, of which one in some hundred falls on the other side of its rounding.
FLOAT_TOLERANCE = 2e-5
PROMPT_TOLERANCE = 2e-3
QUANTISED_TOLERANCE = 2e-2

SIZES_OF_BUDGETS = ("0", "7.5MiB", "9MiB", "10MiB", "12MiB", "18MiB", "60MiB")
N_REOPENED = 5
# What the driver may keep of a context, far below what reopening models would leak.
MAX_KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Result:
    """One line of what was found; `values` are for machines, `detail` is for people."""

    part: str
    name: str
    status: str
    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What the parts need to know, as JSON can say it."""

    gpu: int
    quick: bool
    word: str = ""  # in the names of self-tests to run; or one of several, "one|another"
    share: tuple[int, int] = (0, 1)  # of the self-tests: the i-th of n runs,
    skip: int = 0  # the first so many of which have been run
    golden: str = ""
    model: str = ""  # a file to measure,
    title: str = ""  # what to call it,
    sparsity: str = "off"  # how to compute it,
    budget_share: float = 1.0  # of its size; 1: no limit
    bandwidth: float = 0.0  # of the card, bytes per second; 0: not known
    host_bandwidth: float = 0.0  # of the processor's memory
    launch_seconds: float = 0.0  # of a kernel that does nothing, in a graph
    n_prompt: int = 512
    n_generate: int = 32
    rounds: int = 5
    seconds: float = 10.0  # no further round begins after so many

    @property
    def device(self) -> str:
        """For `Model`."""
        return f"cuda:{self.gpu}"


def judged(part: str, name: str, passed: bool, detail: str, **values: Any) -> Result:
    """A result that passed or failed."""
    return Result(part, name, PASSED if passed else FAILED, detail, values)


def contained(part: str, name: str, results: Iterator[Result]) -> Iterator[Result]:
    """Results; what ends them too soon is a failure of that name, and others go on."""
    try:
        yield from results
    except Exception as error:
        yield Result(part, name, FAILED, f"{type(error).__name__}: {error}")


# ---- the card ----


def card(settings: Settings) -> Iterator[Result]:
    """What it is, who drives it, how fast its memory is, and what a launch costs."""
    found, gpu = _cuda.info(), _cuda.gpu(settings.gpu)
    driver = ""
    with suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text().split("\n", 1)[0]
    capability = ".".join(map(str, gpu.compute_capability))
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "qinfer": qinfer.__version__,
        "card": gpu.name,
        "compute_capability": capability,
        "memory_bytes": gpu.memory_bytes,
        "driver": driver,
        "cuda_of_driver": found.driver.version,
        "nvrtc": found.nvrtc.version or found.nvrtc.problem,
        "cublas": found.cublas.version or found.cublas.problem,
        "n_embedded_cubins": found.n_embedded_cubins,
        "processor": _machine.processor().brand,
        "n_cores": _machine.processor().n_usable_cores,
    }
    probe = _cuda.probe(settings.gpu)
    detail = (
        f"{gpu.name}, compute capability {capability}, {gpu.memory_bytes / 2**30:.0f} GiB "
        f"({probe.free_bytes / 2**30:.1f} free), driver for CUDA {found.driver.version}, "
        f"{facts['date']}"
    )
    yield Result("card", WHAT_IT_IS, PASSED, detail, facts)
    yield from contained("card", "bandwidth", bandwidth(settings, probe.free_bytes))


def bandwidth(settings: Settings, free_bytes: int) -> Iterator[Result]:
    """How fast the card and the processor read their memories, and what a launch costs."""
    gpu = _cuda.gpu(settings.gpu)
    n_bytes = 1 << 20 if settings.quick else min(1 << 30, free_bytes // 8)
    rate = _cuda.read_bandwidth(settings.gpu, n_bytes)
    launch = _cuda.launch_seconds(settings.gpu)
    threads = _machine.processor().n_usable_cores
    host = _machine.read_bandwidth(threads)
    detail = (
        f"{rate / 1e9:.0f} GB/s read by the card, {gpu.memory_bandwidth / 1e9:.0f} in theory; "
        f"{host / 1e9:.0f} GB/s read by {threads} threads of the processor; "
        f"{launch * 1e6:.2f} us for a launch in a graph"
    )
    values = {
        "bandwidth": rate,
        "theory": gpu.memory_bandwidth,
        "host_bandwidth": host,
        "launch_seconds": launch,
    }
    yield Result("card", "bandwidth", MEASURED, detail, values)


# ---- kernels ----


def own_tests(settings: Settings) -> list[int]:
    """Numbers of a process's share of the self-tests; neighbours use the same kernels."""
    names = enumerate(_cuda.self_test_names())
    words = settings.word.split("|")
    chosen = [number for number, name in names if any(word in name for word in words)]
    share, n_shares = settings.share
    return chosen[share * len(chosen) // n_shares : (share + 1) * len(chosen) // n_shares]


def kernels(settings: Settings) -> Iterator[Result]:
    """This process's share of the self-tests, to the first that cannot run.

    What keeps that one from running may be what it did to the card, and then no other will run in
    this process.
    """
    for test in _cuda.self_tests(settings.gpu, own_tests(settings)[settings.skip :]):
        detail = test.problem or (
            f"error {test.error:.2g} of {test.tolerance:g}, {test.n_values} values, "
            f"{test.seconds:.2f} s"
        )
        error = min(test.error, sys.float_info.max)  # JSON knows no infinity
        values = {"error": error, "n_values": test.n_values, "seconds": test.seconds}
        yield judged("kernels", test.name, test.passed, detail, **values)
        if test.problem:
            return


# ---- texts ----

PROMPTS = ("Once upon a time", "The dog was happy because", "Lily had a red ball")


def golden(settings: Settings) -> Iterator[Result]:
    """Greedy texts of both devices, of the embedded model and of a file."""
    from qinfer._alias import embedded

    n_tokens = 12 if settings.quick else 100
    cases = [(Path(settings.golden), FLOAT_TOLERANCE)] if settings.golden else []
    cases.append((embedded("stories"), QUANTISED_TOLERANCE))
    for path, tolerance in cases:
        with (
            Model(path, device="cpu", sparsity="off") as cpu,
            Model(path, device=settings.device, sparsity="off") as gpu,
        ):
            for prompt in PROMPTS[:1] if settings.quick else PROMPTS:
                found = compare_texts(cpu, gpu, prompt, n_tokens, tolerance)
                yield from contained("golden", f"{path.name}: {prompt}", found)


def compare_texts(
    cpu: Model, gpu: Model, prompt: str, n: int, tolerance: float
) -> Iterator[Result]:
    """Where the texts part, the processor must have found both tokens equally likely.

    They are when exchanging them takes no more than the error that logits may have.
    """
    texts = [model.generate(prompt, max_tokens=n, temperature=0) for model in (cpu, gpu)]
    ours, theirs = (list(text.tokens) for text in texts)
    name = f"{Path(cpu.path).name}: {prompt}"
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if not differing:
        same = len(ours) == len(theirs) > 0
        detail = f"the same {len(ours)} tokens" if same else f"{len(ours)} and {len(theirs)} tokens"
        yield judged("golden", name, same, detail)
        return
    first = differing[0]
    start = cpu.tokenizer.encode(prompt)
    with cpu.context() as context:
        context.feed([*start, *ours[:first]])
        logits = context.logits.copy()
    gap = float(logits[ours[first]] - logits[theirs[first]])
    limit = 2 * tolerance * float(np.sqrt(np.mean(logits**2)))
    detail = f"differs at token {first}, by {gap:.2g} of logits where rounding explains {limit:.2g}"
    yield judged("golden", name, 0 <= gap <= limit, detail, first=first, gap=gap, limit=limit)


# ---- properties ----

TOKENS = np.random.default_rng(5).integers(0, 300, 24).tolist()


def write_model(path: Path, type_name: str, shape: dict[str, int], **sparsity: Any) -> Path:
    """A random llama; PowerInfer's kind, or with dense_twin an ordinary file."""
    make_model.make_model(path, shape_of(shape, **sparsity), type_name)
    return path


def shape_of(shape: dict[str, int], **sparsity: Any) -> make_model.Shape:
    """The shape of such a llama."""
    how = Sparsity(**sparsity)
    return make_model.Shape("llama", n_ctx=4096, tied_head=False, sparsity=how, **shape)


def model_bytes(type_name: str, shape: dict[str, int], **sparsity: Any) -> int:
    """About how large its file is."""
    kind = tensor_type(type_name)
    specs = make_model.tensors(shape_of(shape, **sparsity))
    return sum(int(np.prod(spec.shape)) for spec in specs) * kind.block_bytes // kind.block_size


def logits_of(context: qinfer.Context, step: int) -> npt.NDArray[np.float32]:
    """Logits of the tokens, fed `step` at a time; 0: each a text of its own."""
    rows = []
    context.truncate(0)
    for begin in range(0, len(TOKENS), step or 1):
        if step == 0:
            context.truncate(0)
        context.feed(TOKENS[begin : begin + (step or 1)], logits="all", generated=True)
        rows.append(context.all_logits.copy())
    return np.concatenate(rows)


def error_of(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The median relative error of rows; infinite where one is not a number."""
    distance = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(np.median(distance)) if np.isfinite(found).all() else sys.float_info.max


def properties(settings: Settings) -> Iterator[Result]:
    """Shares of neurons, replayed steps, budgets, memory."""
    quick = settings.quick
    width = 128 if quick else 512
    shape = {
        "n_embd": width, "n_ff": 2 * width, "n_layer": 2, "n_head": 4, "n_head_kv": 2,
        "n_vocab": 300,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for type_name in ("f32",) if quick else ("f32", "f16", "q8_0", "q4_0", "q4_k", "q6_k"):
            path = write_model(Path(folder, type_name), type_name, shape, n_pred=width)
            found = compare_shares(settings, path, type_name)
            yield from contained("properties", type_name, found)
            if type_name == "f32":
                found = compare_kv_places(settings, path)
                yield from contained("properties", "keys and values", found)
    from qinfer._alias import embedded

    stories = embedded("stories")
    for share in ("whole", "half"):
        found = replayed(settings, stories, share)
        yield from contained("properties", f"replayed steps, {share}", found)
    yield from contained("properties", "budgets", budgets(settings, stories))
    yield from contained("properties", "memory returns", memory(settings, stories))


def compare_shares(settings: Settings, path: Path, type_name: str) -> Iterator[Result]:
    """All, half or none of the neurons on the GPU; tokens one by one and together."""
    options: dict[str, Any] = {"n_ctx": 64, "sparsity": "off"}
    # The mode, and how many tokens at a time.
    cases: list[tuple[Any, int]] = [("off", 1), ("predict", 1), ("off", len(TOKENS))]
    with Model(path, device="cpu", **options) as cpu:
        expected = {case: logits_in(cpu, *case) for case in cases}
    for share in ("whole", "half", "none"):
        split: Any = "none" if share == "none" else "auto"
        with Model(path, device=settings.device, gpu_split=split, **options) as gpu:
            if share == "half":
                keep_half(gpu)
            errors = [error_of(logits_in(gpu, *case), expected[case]) for case in cases]
            placement = gpu.placement
        assert placement is not None
        n_all = gpu.info.n_layer * gpu.info.n_ff
        n_wanted = {"whole": n_all, "half": n_all // 2, "none": 0}[share]
        limits = [PROMPT_TOLERANCE if step > 1 else FLOAT_TOLERANCE for _, step in cases]
        if type_name not in ("f32", "f16"):
            limits = [QUANTISED_TOLERANCE] * len(cases)
        within = [error <= limit for error, limit in zip(errors, limits, strict=True)]
        passed = placement.n_neurons == n_wanted and all(within)
        words = [
            f"{mode}, {step} at a time: {error:.1e} of {limit:g}"
            for (mode, step), error, limit in zip(cases, errors, limits, strict=True)
        ]
        words.append(f"{placement.n_neurons} of {n_all} neurons there")
        yield judged("properties", f"{type_name}, {share}", passed, "; ".join(words), errors=errors)


def compare_kv_places(settings: Settings, path: Path) -> Iterator[Result]:
    """Keys and values on the GPU, with the host, and in both, where the boundary may move."""
    tokens = np.resize(TOKENS, 240 if settings.quick else 500).tolist()
    options: dict[str, Any] = {"n_ctx": 576, "sparsity": "off"}

    def compute(model: Model) -> tuple[npt.NDArray[np.float32], float]:
        with model.context(n_batch=128) as context:
            context.feed(tokens, logits="last")
            rows = [context.all_logits.copy()]
            for token in TOKENS[: 4 if settings.quick else 24]:
                context.feed([token], generated=True)
                rows.append(context.all_logits.copy())
            return np.concatenate(rows), float(context.kv_host_shares().mean())

    with Model(path, device="cpu", **options) as cpu:
        expected, _ = compute(cpu)
    # How to ask, and what the host's share can be then.
    places: dict[str, tuple[dict[str, Any], float, float]] = {
        "device": ({"kv_mode": "device"}, 0.0, 0.0),
        "host": ({"kv_mode": "host"}, 1.0, 1.0),
        "half": ({"kv_ratio": 0.5}, 0.4, 0.6),
        "adapting": ({"kv_ratio": 0.5, "kv_step": 0.025}, 0.0, 1.0),
    }
    for name, (place, least, most) in places.items():
        with Model(path, device=settings.device, **options, **place) as gpu:
            found, share = compute(gpu)
        error = error_of(found, expected)
        detail = f"error {error:.1e} of {PROMPT_TOLERANCE:g}, the host's share is {share:.2f}"
        passed = error <= PROMPT_TOLERANCE and least <= share <= most
        yield judged("properties", f"keys and values, {name}", passed, detail, share=share)


def logits_in(model: Model, mode: Any, step: int) -> npt.NDArray[np.float32]:
    """Logits by a context of its own, in a mode of sparsity."""
    with model.context(sparsity=mode, n_batch=32) as context:
        return logits_of(context, step)


def keep_half(model: Model) -> None:
    """Every other neuron goes to the GPU."""
    offload = model._weights.offload
    assert offload is not None
    for layer in range(model.info.n_layer):
        offload.choose_neurons(layer, np.arange(0, model.info.n_ff, 2, dtype=np.int32))


def replayed(settings: Settings, path: Path, share: str) -> Iterator[Result]:
    """The same bits, whether kernels are launched one by one, recorded or replayed."""
    with Model(path, device=settings.device, n_ctx=64, sparsity="off") as model:
        if share == "half":
            keep_half(model)
        rows = []
        with model.context() as context:
            for _ in range(4 if settings.quick else 20):
                context.truncate(0)
                for token in TOKENS[:3]:
                    context.feed([token], generated=True)
                rows.append(context.logits.tobytes())
    same = sum(row == rows[0] for row in rows)
    name, detail = f"replayed steps, {share}", f"{same} of {len(rows)} alike"
    yield judged("properties", name, same == len(rows), detail)


def budgets(settings: Settings, path: Path) -> Iterator[Result]:
    """From nothing to everything: no budget is exceeded, and what is computed stays right."""
    with Model(path, device="cpu", n_ctx=64, sparsity="off") as cpu, cpu.context() as context:
        expected = logits_of(context, 8)
    sizes = ("0", "10MiB", "60MiB") if settings.quick else SIZES_OF_BUDGETS
    n_placed = 0
    for size in sizes:
        try:
            options: dict[str, Any] = {"vram_budget": size, "n_ctx": 64, "sparsity": "off"}
            with (
                Model(path, device=settings.device, **options) as model,
                model.context(n_batch=32) as context,
            ):
                error = error_of(logits_of(context, 8), expected)
                placement = model.placement
        except OutOfMemory as problem:
            # What is too little for any layer is refused, and says so.
            too_little = size == "0" or n_placed == 0
            yield judged("properties", f"budget {size}", too_little, f"refused: {problem}")
            continue
        assert placement is not None
        n_placed += 1
        within = placement.used_bytes <= placement.budget_bytes
        detail = (
            f"{placement.used_bytes} of {placement.budget_bytes} bytes used, "
            f"{placement.n_layers} layers, {placement.n_neurons} neurons, error {error:.1e}"
        )
        passed = within and error <= QUANTISED_TOLERANCE
        yield judged("properties", f"budget {size}", passed, detail)
    if n_placed == 0:
        yield judged("properties", "budgets", False, "no budget was enough")


def memory(settings: Settings, path: Path) -> Iterator[Result]:
    """Models that were closed hold nothing of the card."""
    before = _cuda.probe(settings.gpu).free_bytes
    for _ in range(2 if settings.quick else N_REOPENED):
        with Model(path, device=settings.device, n_ctx=64) as model, model.context() as context:
            context.feed(TOKENS[:2])
    kept = before - _cuda.probe(settings.gpu).free_bytes
    detail = f"{max(kept, 0)} bytes fewer free after models were opened and closed"
    yield judged("properties", "memory returns", kept <= MAX_KEPT_BYTES, detail, kept=kept)
