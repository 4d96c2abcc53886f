"""Checks qinfer on an NVIDIA GPU, and measures it: everything in one run of less than nine minutes.

Needs an installed qinfer with what it depends on, a GPU, and the files of this folder. Each part
has processes and a time limit of its own: one that fails, crashes or hangs is a failure, and the
others go on. Results are printed as soon as they are there and appended to --output as JSON lines;
one table comes at the end. The exit status is 1 when a check failed.

Kernels are held against the processor's on random data, then whole models: texts, logits with
all, half or none of the neurons on the GPU, replayed steps, budgets, memory given back.
compute-sanitizer watches a few kernels when it is there. Measured are synthetic llamas of 7B shape,
sparse (10 % of the neurons active) and dense, wholly on the card and with half and a quarter of
their size as a budget, beside the least time in which what a token needs can be read. Peers are
measured when their programs are given.

\b
    python tools/gpu_check.py --output results.jsonl
    python tools/gpu_check.py --llama-bench ~/llama.cpp/build/bin/llama-bench
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import make_model
from gpu_check_parts import (
    FAILED,
    MEASURED,
    PASSED,
    SKIPPED,
    WHAT_IT_IS,
    Result,
    Settings,
    card,
    contained,
    golden,
    kernels,
    model_bytes,
    own_tests,
    properties,
    write_model,
)  # fmt: skip
from gpu_check_peers import run_peer
from gpu_check_process import ALL_OF_IT, TOO_LONG, own_status, results_of
from gpu_check_speed import share_name, speed

from qinfer import _cuda, _machine

TOOL = Path(__file__).resolve()
ALL_PARTS = ("card", "kernels", "golden", "properties", "sanitizer", "speed")
PARTS: dict[str, Callable[[Settings], Iterator[Result]]] = {
    "card": card, "kernels": kernels, "golden": golden, "properties": properties, "speed": speed,
}  # fmt: skip
TIME_IN_ALL = 525.0  # seconds
TIME_OF_SPEED = 270.0  # of these, kept for the speed part by those before it
# Seconds for each part; that for speed is for each file and budget.
LIMITS = {
    "card": 60, "kernels": 150, "golden": 60, "properties": 90, "sanitizer": 80, "speed": 60,
}  # fmt: skip
LEAST = 15.0  # seconds with which it is worth while to begin a measurement
TIME_OF_MODELS = 90.0  # for them to be written, once the checks are done
SILENCE = 60.0  # between two self-tests, one of which may have to compile its kernels
MAX_RESTARTS = 8  # of a process whose self-tests cannot run
# What compute-sanitizer watches, a hundred times as slow: threads that share memory.
SANITIZED = (
    "rms norm of 97", "product Q4_0 37x256", "tile F16 40x32", "tile Q4_0 40x32", "lists of 150",
    "ffn F16 predicted gated", "down tiles F16", "attend F16, 6 heads over 2 of 64",
    "attend tiles F16, 4 heads over 2 of 128", "rounds with the host, 67",
)  # fmt: skip
SANITIZERS = ("memcheck", "racecheck")
FOUND_ERRORS = 86  # its exit status when it saw something
SHAPE_7B = {
    "n_embd": 4096, "n_ff": 11008, "n_layer": 32, "n_head": 32, "n_head_kv": 32, "n_vocab": 32000,
}  # fmt: skip
# Nearly all of it neurons, so that half of it holds the rest and some of them.
SHAPE_QUICK = {
    "n_embd": 128, "n_ff": 16384, "n_layer": 2, "n_head": 4, "n_head_kv": 4, "n_vocab": 300,
}  # fmt: skip
TYPES = "q4_0,f16"
SHARES = "1,0.5,0.25"


def command_of(part: str, settings: Settings) -> list[str]:
    """This program, to run one part."""
    words = json.dumps(dataclasses.asdict(settings))
    return [sys.executable, str(TOOL), "--run-part", part, words]


@dataclass
class Check:
    """A run: its settings, when it has to end, and what was found so far."""

    settings: Settings
    folder: Path
    shape: dict[str, int]
    types: tuple[str, ...]
    shares: tuple[float, ...]
    output: Path | None
    llama_bench: Path | None
    powerinfer_main: Path | None
    end: float
    kept: float = 0.0  # seconds of what is left that are not for the present part
    found: list[Result] = field(default_factory=list)
    makers: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)

    def add(self, result: Result) -> None:
        """Prints and keeps a result."""
        self.found.append(result)
        click.echo(f"{result.status:<9}{result.part:<12}{result.name}: {result.detail}")
        if self.output:
            try:
                with self.output.open("a") as out:
                    out.write(json.dumps(dataclasses.asdict(result)) + "\n")
            except OSError as error:  # what is printed is still there
                click.echo(f"{self.output}: {error.strerror}", err=True)

    def left(self, limit: float) -> float:
        """Seconds for something that may take so long."""
        return max(0.0, min(limit, self.end - self.kept - time.monotonic()))

    def run(self, parts: list[str]) -> None:
        """Runs parts, one after the other; only the first where there is no GPU."""
        self.run_part("card")
        if not any(result.name == WHAT_IT_IS for result in self.found):
            return
        steps: dict[str, Callable[[], None]] = {
            "kernels": self.kernels, "sanitizer": self.sanitizer, "speed": self.speed,
            "golden": lambda: self.run_part("golden"),
            "properties": lambda: self.run_part("properties"),
        }  # fmt: skip
        if "speed" in parts:
            self.kept = TIME_OF_SPEED
            self.guard("speed", self.start_models)
        for part in sorted(set(parts) & set(steps), key=ALL_PARTS.index):
            if part == "speed":
                self.kept = 0.0
            self.guard(part, steps[part])

    def guard(self, part: str, step: Callable[[], None]) -> None:
        """Does a step; what it does not survive is a failure of the part, and others go on."""
        try:
            step()
        except Exception:
            self.add(Result(part, ALL_OF_IT, FAILED, traceback.format_exc(limit=-3).strip()))

    def run_part(self, part: str, name: str = ALL_OF_IT, **changes: Any) -> None:
        """Runs a part in a process of its own; `name` is that of what ends it too soon."""
        settings = replace(self.settings, **changes)
        seconds = self.left(LIMITS[part])
        if seconds < 1:
            self.add(Result(part, name, SKIPPED, "time is up"))
            return
        for result in results_of(part, command_of(part, settings), seconds):
            if result.name == ALL_OF_IT:
                result = replace(result, name=name)
                # A measurement that all of the time cuts short is no failure, a check is.
                if part == "speed" and seconds < LIMITS[part] and self.left(1.0) < 1.0:
                    result = replace(result, status=SKIPPED, detail=f"time is up: {result.detail}")
            self.add(result)

    def kernels(self) -> None:
        """The self-tests, side by side: compiling and the processor's side take the time."""
        if not own_tests(self.settings):
            detail = f"no name contains {self.settings.word!r}"
            self.add(Result("kernels", "self-tests", FAILED, detail))
            return
        n = 1 if self.settings.quick else max(1, min(8, (os.cpu_count() or 1) // 2))
        found: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        end = time.monotonic() + self.left(LIMITS["kernels"])

        def run_share(i: int) -> None:
            try:
                for result in self_tests(replace(self.settings, share=(i, n)), end):
                    found.put(result)
            except Exception as error:
                found.put(Result("kernels", f"share {i}", FAILED, repr(error)))
            finally:
                found.put(None)

        for i in range(n):
            threading.Thread(target=run_share, args=(i,), daemon=True).start()
        n_running = n
        while n_running:
            result = found.get()
            if result is None:
                n_running -= 1
            else:
                self.add(result)

    def sanitizer(self) -> None:
        """compute-sanitizer on a few self-tests."""
        program = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if not program:
            self.add(Result("sanitizer", "all", SKIPPED, "compute-sanitizer is not on PATH"))
            return
        settings = replace(self.settings, word="|".join(SANITIZED))
        for tool in SANITIZERS:
            command = [
                program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS),
                *command_of("kernels", settings),
            ]  # fmt: skip
            self.sanitize(tool, command)

    def sanitize(self, tool: str, command: list[str]) -> None:
        """One of compute-sanitizer's tools."""

        def status_is(status: int) -> str:
            return "saw errors" if status == FOUND_ERRORS else own_status(status)

        seconds = self.left(LIMITS["sanitizer"] / len(SANITIZERS))
        if seconds < LEAST:
            self.add(Result("sanitizer", tool, SKIPPED, "time is up"))
            return
        n_failed = n_passed = n_skipped = 0
        for result in results_of("sanitizer", command, seconds, status_is):
            if result.name == ALL_OF_IT and result.detail.startswith(TOO_LONG):
                result = replace(result, status=SKIPPED)  # it is slow, and saw nothing so far
            n_failed += result.status == FAILED
            n_passed += result.status == PASSED
            self.add(replace(result, part="sanitizer", name=f"{tool}, {result.name}"))
            n_skipped += result.status == SKIPPED
        if n_failed == n_passed == n_skipped == 0:
            self.add(Result("sanitizer", tool, FAILED, "no self-test has run"))
        elif n_failed == 0 and n_passed > 0:
            self.add(Result("sanitizer", tool, PASSED, f"no errors in {n_passed} self-tests"))

    # ---- speed ----

    def model_path(self, type_name: str, kind: str) -> Path:
        """Where a synthetic model is made."""
        return self.folder / f"{kind}.{type_name}.gguf"

    def start_models(self) -> None:
        """Begins to write the models, beside the checks, which leave most cores alone."""
        free = shutil.disk_usage(self.folder).free
        for type_name in self.types:
            for kind in ("sparse", "dense"):
                path = self.model_path(type_name, kind)
                needed = model_bytes(type_name, self.shape, **sparsity_of(kind, self.shape))
                if needed > free:
                    detail = f"{needed / 1e9:.1f} GB, of which {free / 1e9:.1f} are free"
                    self.add(Result("speed", path.stem, SKIPPED, f"{self.folder}: {detail}"))
                    continue
                free -= needed
                words = ["--make-model", str(path), type_name, kind, json.dumps(self.shape)]
                with path.with_suffix(".log").open("wb") as log:
                    self.makers[path] = subprocess.Popen(
                        [sys.executable, str(TOOL), *words], stdout=log, stderr=log
                    )

    def wait_for_models(self) -> None:
        """Until all are written, or time is up: timing begins when no one writes any more."""
        begin = time.monotonic()
        deadline = begin + self.left(TIME_OF_MODELS)
        for path, maker in self.makers.items():
            problem = ""
            try:
                status = maker.wait(max(0.0, deadline - time.monotonic()))
                problem = f"ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                maker.kill()
                maker.wait()
                problem = "making it took too long"
            if problem:
                said = path.with_suffix(".log").read_text(errors="replace")[-1000:]
                self.add(Result("speed", path.stem, FAILED, f"{problem}: {said}"))
        detail = f"waited {time.monotonic() - begin:.0f} s for them to be written"
        self.add(Result("speed", "models", PASSED, detail))

    def stop_models(self) -> None:
        """Ends what still writes."""
        for maker in self.makers.values():
            if maker.poll() is None:
                maker.kill()
                maker.wait()

    def speed(self) -> None:
        """All files under all budgets; whole models first, as time may run out."""
        self.wait_for_models()
        measured = next((r.values for r in self.found if r.name == "bandwidth"), {})
        cases = [
            (share, type_name, kind)
            for share in self.shares
            for type_name in self.types
            for kind in ("sparse", "dense")
        ]
        for share, type_name, kind in cases:
            path = self.model_path(type_name, kind)
            if not path.is_file():
                continue
            title = f"{kind} {type_name.upper()}"
            name = f"{title}, {share_name(share)}"
            if self.left(LIMITS["speed"]) < LEAST:
                self.add(Result("speed", name, SKIPPED, "time is up"))
                continue
            self.run_part(
                "speed", name, model=str(path), title=title, budget_share=share,
                sparsity="predict" if kind == "sparse" else "off",
                bandwidth=measured.get("bandwidth", 0.0),
                host_bandwidth=measured.get("host_bandwidth", 0.0),
                launch_seconds=measured.get("launch_seconds", 0.0),
            )  # fmt: skip
            self.peer(path, kind, type_name, share)

    def peer(self, path: Path, kind: str, type_name: str, share: float) -> None:
        """The peer that runs such a file, if there is one."""
        program = self.powerinfer_main if kind == "sparse" else self.llama_bench
        if program is None:
            return
        engine = "PowerInfer" if kind == "sparse" else "llama.cpp"
        name = f"{engine}, {kind} {type_name.upper()}, {share_name(share)}"
        seconds = self.left(LIMITS["speed"])
        if seconds < LEAST:
            self.add(Result("speed", name, SKIPPED, "time is up"))
            return
        words = [engine, str(program), str(path), str(share), json.dumps(self.shape)]
        command = [
            sys.executable, str(TOOL), "--run-peer", name, *words,
            json.dumps(dataclasses.asdict(self.settings)),
        ]  # fmt: skip
        for result in results_of("speed", command, seconds):
            # A peer that cannot run is no failure of what is checked here.
            status = SKIPPED if result.status == FAILED else result.status
            label = name if result.name == ALL_OF_IT else result.name
            self.add(replace(result, status=status, name=label))

    def table(self) -> str:
        """Everything in one table: a line for each part's checks, then one for each speed."""
        lines = ["", f"{'checks':<32}{'passed':>9}{'failed':>9}{'skipped':>9}"]
        for part in dict.fromkeys(r.part for r in self.found):
            of_part = [r.status for r in self.found if r.part == part]
            counts = [of_part.count(status) for status in (PASSED, FAILED, SKIPPED)]
            lines.append(f"{part:<32}" + "".join(f"{count:>9}" for count in counts))
        measured = [r for r in self.found if r.part == "speed" and r.status == MEASURED]
        if measured:
            columns = ("prompt t/s", "decode t/s", "MB/token", "of limit", "launches")
            columns += ("of both", "VRAM GB")
            columns += ("GPU ms", "CPU ms", "waits ms")
            lines += ["", f"{'speed':<32}" + "".join(f"{name:>12}" for name in columns)]
        for result in measured:
            values = result.values
            share, of_both = values.get("share"), values.get("share_with_launches")
            launches = values.get("launches_per_token")
            cells = [
                f"{values['prompt_rate']:.1f}",
                f"{values['generation_rate']:.1f}",
                f"{values['bytes_per_token'] / 1e6:.0f}" if "bytes_per_token" in values else "",
                f"{share:.0%}" if share is not None else "",
                f"{launches:.0f}" if launches is not None else "",
                f"{of_both:.0%}" if of_both is not None else "",
                f"{values['used_bytes'] / 1e9:.2f}" if "used_bytes" in values else "",
            ]
            if values.get("host_seconds"):
                names = ("device_seconds", "host_seconds", "wait_seconds")
                cells += [f"{values[name] * 1e3:.3f}" for name in names]
            row = f"{result.name:<32}" + "".join(f"{cell:>12}" for cell in cells)
            lines.append(row.rstrip())
        if measured:
            lines.append(
                "MB/token: of weights, read by both\n"
                "of limit: the least time that reading takes, of the time there was: weights, keys "
                "and\nvalues, by each side at the measured speed of its memory, at the same time "
                "where both\nhave neurons of a layer\n"
                "of both: the same, when what the token's launches cost at least is added\n"
                "GPU, CPU: of a token, what each takes for its neurons of the layers that both "
                "compute;\nwaits: how long the GPU is idle there until the CPU is ready"
            )
        failed = [r for r in self.found if r.status == FAILED]
        lines += ["", *(f"FAILED {r.part} {r.name}: {r.detail}" for r in failed)]
        cards = [r.detail for r in self.found if r.name == WHAT_IT_IS]
        lines += [f"{len(failed)} failed on {cards[0] if cards else 'a card that is not known'}"]
        return "\n".join(lines)


def self_tests(settings: Settings, end: float) -> Iterator[Result]:
    """A share of the self-tests, in as many processes as it takes, until `end`.

    One that crashes, hangs or cannot run may have taken the card's context with it: those behind it
    run in a new process.
    """
    numbers, names = own_tests(settings), _cuda.self_test_names()
    skip = 0
    for _ in range(MAX_RESTARTS + 1):
        if skip >= len(numbers):
            return
        command = command_of("kernels", replace(settings, skip=skip))
        seconds = max(0.0, end - time.monotonic())
        for result in results_of("kernels", command, seconds, silence=SILENCE):
            if result.name == ALL_OF_IT and skip < len(numbers):
                result = replace(result, name=names[numbers[skip]])
            yield result
            skip += 1
        if time.monotonic() >= end:
            break
    if skip < len(numbers):
        first = names[numbers[skip]]
        detail = f"{len(numbers) - skip} self-tests from {first!r} on were not run"
        yield Result("kernels", "self-tests", FAILED, detail)


def sparsity_of(kind: str, shape: dict[str, int]) -> dict[str, Any]:
    """How a "sparse" model is sparse, or its "dense" twin."""
    return {"n_pred": min(512, shape["n_embd"]), "dense_twin": kind == "dense"}


def roomy_folder(n_bytes: int) -> Path | None:
    """Where so many bytes fit: in memory, if there is plenty, as disks are slow; else None."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        return None
    # The files are read by the processor's side from there, and copied to the card.
    plenty = _machine.available_memory() >= 2.5 * n_bytes
    return memory if plenty and shutil.disk_usage(memory).free >= 1.1 * n_bytes else None


# ---- the command line ----


def print_results(results: Iterator[Result]) -> None:
    """One JSON line each, at once."""
    for result in results:
        print(json.dumps(dataclasses.asdict(result)), flush=True)


def settings_from(words: str) -> Settings:
    """Settings as `command_of` writes them."""
    values = json.loads(words)
    return Settings(**values | {"share": tuple(values["share"])})


def inner(words: list[str]) -> bool:
    """Does what this program asks of itself, if it does."""
    match words:
        case ["--run-part", part, settings]:
            results = PARTS[part](settings_from(settings))
            print_results(contained(part, ALL_OF_IT, results))
        case ["--run-peer", name, engine, program, model, share, shape, settings]:
            arguments = (engine, Path(program), Path(model), float(share), json.loads(shape))
            results = run_peer(name, *arguments, settings_from(settings))
            print_results(contained("speed", name, results))
        case ["--make-model", path, type_name, kind, shape]:
            sizes = json.loads(shape)
            half = Path(path + ".part")
            write_model(half, type_name, sizes, **sparsity_of(kind, sizes))
            half.rename(path)
        case _:
            return False
    return True


PROGRAM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.option(
    "--gpu", type=click.IntRange(0), default=0, show_default=True, help="Number of the GPU."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append results to it, a line of JSON each.",
)
@click.option(
    "--parts",
    default=",".join(ALL_PARTS),
    show_default=True,
    help="What to do, in this order; the card comes always.",
)
@click.option("--quick", is_flag=True, help="Everything tiny, to see that this program works.")
@click.option("--word", default="", help="Only self-tests whose names contain it.")
@click.option(
    "--golden", type=PROGRAM, help="Another model for greedy texts, of F32, F16 or BF16 weights."
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the models are made, and removed in the end; default: in memory if there "
    "is plenty, else the folder for temporary files.",
)
@click.option(
    "--n-layer",
    type=click.IntRange(1),
    help="Layers of the models; 32, the default, are 7B, and 35 GB of files.",
)
@click.option(
    "--types",
    default=TYPES,
    show_default=True,
    help="Of their weights, by commas; tools/make_model.py lists what there is.",
)
@click.option(
    "--shares",
    default=SHARES,
    show_default=True,
    help="Budgets as parts of a file's size, by commas; 1 is no budget.",
)
@click.option("--llama-bench", type=PROGRAM, help="llama.cpp's llama-bench, for the dense models.")
@click.option("--powerinfer-main", type=PROGRAM, help="PowerInfer's main, for the sparse models.")
def main(
    gpu: int,
    output: Path | None,
    parts: str,
    quick: bool,
    word: str,
    golden: Path | None,
    folder: Path | None,
    n_layer: int | None,
    types: str,
    shares: str,
    llama_bench: Path | None,
    powerinfer_main: Path | None,
) -> None:
    """Command line."""
    chosen = [part for part in parts.split(",") if part]
    if unknown := [part for part in chosen if part not in ALL_PARTS]:
        raise click.ClickException(f"--parts has {unknown[0]}; there are {', '.join(ALL_PARTS)}")
    type_names = [name.lower() for name in types.split(",")]
    if unknown := [name for name in type_names if name not in make_model.TYPES]:
        there = ", ".join(make_model.TYPES)
        raise click.ClickException(f"--types has {unknown[0]!r}; there are {there}")
    try:
        parts_of_size = [float(share) for share in shares.split(",")]
    except ValueError:
        raise click.ClickException(f"--shares {shares}: expected numbers, by commas") from None
    if wrong := [share for share in parts_of_size if not 0 < share <= 1]:
        raise click.ClickException(f"--shares has {wrong[0]:g}, expected more than 0, up to 1")
    stories = TOOL.parents[1] / "tests" / "data" / "stories260K.F32.gguf"
    if golden is None and stories.is_file():
        golden = stories
    settings = Settings(gpu=gpu, quick=quick, word=word, golden=str(golden or ""))
    if quick:
        settings = replace(settings, n_prompt=8, n_generate=2, rounds=1)
    shape = dict(SHAPE_QUICK if quick else SHAPE_7B)
    shape["n_layer"] = n_layer or shape["n_layer"]
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    if folder is None and "speed" in chosen:
        sizes = [
            model_bytes(name, shape, **sparsity_of(kind, shape))
            for name in type_names
            for kind in ("sparse", "dense")
        ]
        folder = roomy_folder(sum(sizes))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made:
        check = Check(
            settings=settings,
            folder=Path(made),
            shape=shape,
            types=tuple(type_names),
            shares=tuple(parts_of_size),
            output=output,
            llama_bench=llama_bench,
            powerinfer_main=powerinfer_main,
            end=begin + TIME_IN_ALL,
        )
        try:
            check.run(chosen)
        finally:
            check.stop_models()
            click.echo(check.table())
    sys.exit(any(result.status == FAILED for result in check.found))


if __name__ == "__main__" and not inner(sys.argv[1:]):
    main()
