"""Checks qinfer on an NVIDIA GPU, and measures it: everything in one run of less than nine minutes.

Needs an installed qinfer with what it depends on, a GPU, and the files of this folder. Each part
has a process and a time limit of its own. Results are printed as soon as they are there and
appended to --output as JSON lines; one table comes at the end. The exit status is 1 when a check
failed.

Kernels are held against the processor's on random data, then whole models: texts, logits with
all, half or none of the neurons on the GPU, replayed steps, budgets, memory given back.
compute-sanitizer watches a few kernels when it is there. Measured are synthetic llamas of 7B shape,
sparse (10 % of the neurons active) and dense, wholly on the card and with half and a quarter of
their size as a budget, beside the card's own bandwidth for copies. Peers are measured when their
programs are given.

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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from bench_peers import PowerInfer
from gpu_check_parts import FAILED, MEASURED, PASSED, SKIPPED, Result, Settings, run, write_model

TOOL = Path(__file__).resolve()
ALL_PARTS = ("card", "kernels", "golden", "properties", "sanitizer", "speed")
TIME_IN_ALL = 530.0  # seconds
# Seconds for each part; that for speed is for each file and budget.
LIMITS = {
    "card": 30, "kernels": 150, "golden": 45, "properties": 90, "sanitizer": 60, "speed": 60,
}  # fmt: skip
SANITIZED = "rms norm"  # whose kernels compute-sanitizer watches, a hundred times as slow
FOUND_ERRORS = 86  # its exit status when it saw something
SHAPE_7B = {
    "n_embd": 4096, "n_ff": 11008, "n_layer": 32, "n_head": 32, "n_head_kv": 32, "n_vocab": 32000,
}  # fmt: skip
SHAPE_QUICK = {
    "n_embd": 256, "n_ff": 1024, "n_layer": 4, "n_head": 4, "n_head_kv": 4, "n_vocab": 300,
}  # fmt: skip
TYPES = "q4_0,f16"
SHARES = "1,0.5,0.25"


def results_of(
    part: str, command: list[str], seconds: float, status_is: Callable[[int], str]
) -> Iterator[Result]:
    """What a process prints, as it prints it; it is ended, with its children, when time is up.

    `status_is` tells what is wrong with an exit status, if anything.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        problem = ""
        try:
            while not problem and (line := lines.get(timeout=max(0, deadline - time.monotonic()))):
                with suppress(json.JSONDecodeError, TypeError):  # others may print, too
                    yield Result(**json.loads(line))
            problem = status_is(process.wait(max(0, deadline - time.monotonic())))
        except (queue.Empty, subprocess.TimeoutExpired):
            problem = f"took longer than {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if problem:
            said.seek(0)
            last = said.read()[-2000:].strip()
            yield Result(part, "all of it", FAILED, problem + (f": {last}" if last else ""))


def _pass_on(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def own_status(status: int) -> str:
    """What is wrong with the status of a part's process."""
    return f"ended with status {status}" if status else ""


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
    found: list[Result] = field(default_factory=list)
    makers: list[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Prints and keeps a result."""
        self.found.append(result)
        click.echo(f"{result.status:<9}{result.part:<12}{result.name}: {result.detail}")
        if self.output:
            with self.output.open("a") as out:
                out.write(json.dumps(dataclasses.asdict(result)) + "\n")

    def left(self, limit: float) -> float:
        """Seconds for something that may take so long."""
        return max(0.0, min(limit, self.end - time.monotonic()))

    def run(self, parts: list[str]) -> None:
        """Runs parts, one after the other; only the first where there is no GPU."""
        self.run_part("card")
        if any(result.status == FAILED for result in self.found):
            return
        if "speed" in parts:
            self.start_models()
        for part in parts:
            if part in ("kernels", "sanitizer", "speed"):
                getattr(self, part)()
            elif part != "card":
                self.run_part(part)

    def run_part(self, part: str, **changes: Any) -> None:
        """Runs a part in a process of its own."""
        settings = replace(self.settings, **changes)
        command = command_of(part, settings)
        for result in results_of(part, command, self.left(LIMITS[part]), own_status):
            self.add(result)

    def kernels(self) -> None:
        """The self-tests, side by side: compiling and the processor's side take the time."""
        n = 1 if self.settings.quick else max(1, min(8, (os.cpu_count() or 1) // 2))
        found: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        seconds = self.left(LIMITS["kernels"])

        def run_share(i: int) -> None:
            command = command_of("kernels", replace(self.settings, share=(i, n)))
            try:
                for result in results_of("kernels", command, seconds, own_status):
                    found.put(result)
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
        if not any(result.part == "kernels" for result in self.found):
            self.add(Result("kernels", "self-tests", FAILED, "none has run"))

    def sanitizer(self) -> None:
        """compute-sanitizer on a few self-tests."""
        program = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if not program:
            self.add(Result("sanitizer", "memcheck", SKIPPED, "compute-sanitizer is not on PATH"))
            return
        settings = replace(self.settings, word=SANITIZED)
        command = [
            program, "--tool", "memcheck", "--error-exitcode", str(FOUND_ERRORS),
            *command_of("kernels", settings),
        ]  # fmt: skip

        def status_is(status: int) -> str:
            return "saw errors" if status == FOUND_ERRORS else own_status(status)

        n_failed = 0
        for result in results_of("sanitizer", command, self.left(LIMITS["sanitizer"]), status_is):
            n_failed += result.status == FAILED
            self.add(replace(result, part="sanitizer"))
        if n_failed == 0:
            self.add(Result("sanitizer", "memcheck", PASSED, f"no errors in {SANITIZED!r}"))

    # ---- speed ----

    def model_path(self, type_name: str, kind: str) -> Path:
        """Where a synthetic model is made."""
        return self.folder / f"{kind}.{type_name}.gguf"

    def start_models(self) -> None:
        """Begins to write the models, beside the checks, which leave most cores alone."""
        for type_name in self.types:
            for kind in ("sparse", "dense"):
                path = self.model_path(type_name, kind)
                words = ["--make-model", str(path), type_name, kind, json.dumps(self.shape)]
                said = path.with_suffix(".log")
                with said.open("wb") as log:
                    maker = subprocess.Popen(
                        [sys.executable, str(TOOL), *words], stdout=log, stderr=log
                    )
                self.makers.append((maker, said))

    def wait_for_models(self) -> bool:
        """Whether all are written; timing begins when no one writes any more."""
        begin = time.monotonic()
        for maker, said in self.makers:
            try:
                status = maker.wait(self.left(TIME_IN_ALL))
            except subprocess.TimeoutExpired:
                self.add(Result("speed", "models", FAILED, "making them took too long"))
                return False
            if status:
                detail = f"ended with status {status}: {said.read_text()[-1000:]}"
                self.add(Result("speed", "models", FAILED, detail))
                return False
        detail = f"waited {time.monotonic() - begin:.0f} s for them to be written"
        self.add(Result("speed", "models", PASSED, detail))
        return True

    def stop_models(self) -> None:
        """Ends what still writes."""
        for maker, _ in self.makers:
            if maker.poll() is None:
                maker.kill()
                maker.wait()

    def speed(self) -> None:
        """All files under all budgets; whole models first, as time may run out."""
        if not self.wait_for_models():
            return
        bandwidth = next((r.values["bandwidth"] for r in self.found if r.name == "bandwidth"), 0.0)
        for share in self.shares:
            for type_name in self.types:
                for kind in ("sparse", "dense"):
                    path = self.model_path(type_name, kind)
                    title = f"{kind} {type_name.upper()}"
                    if self.left(LIMITS["speed"]) < 5:
                        self.add(Result("speed", f"{title}, {share:.0%}", SKIPPED, "time is up"))
                        continue
                    self.run_part(
                        "speed", model=str(path), title=title, budget_share=share,
                        sparsity="predict" if kind == "sparse" else "off",
                        bandwidth=bandwidth,
                    )  # fmt: skip
                    self.peer(path, kind, type_name, share)

    def peer(self, path: Path, kind: str, type_name: str, share: float) -> None:
        """The peer that runs such a file, if there is one."""
        program = self.powerinfer_main if kind == "sparse" else self.llama_bench
        if program is None:
            return
        engine = "PowerInfer" if kind == "sparse" else "llama.cpp"
        name = f"{engine}, {kind} {type_name.upper()}, " + (
            "whole" if share == 1 else f"{share:.0%}"
        )
        words = [engine, str(program), str(path), str(share), json.dumps(self.shape)]
        command = [
            sys.executable, str(TOOL), "--run-peer", name, *words,
            json.dumps(dataclasses.asdict(self.settings)),
        ]  # fmt: skip
        for result in results_of("speed", command, self.left(LIMITS["speed"]), own_status):
            # A peer that cannot run is no failure of what is checked here.
            status = SKIPPED if result.status == FAILED else result.status
            label = name if result.name == "all of it" else result.name
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
            columns = ("prompt t/s", "decode t/s", "MB/token", "of copies", "VRAM GB")
            columns += ("GPU ms", "CPU ms", "waits ms")
            lines += ["", f"{'speed':<32}" + "".join(f"{name:>12}" for name in columns)]
        for result in measured:
            values = result.values
            share = values.get("share")
            cells = [
                f"{values['prompt_rate']:.1f}",
                f"{values['generation_rate']:.1f}",
                f"{values['bytes_per_token'] / 1e6:.0f}" if "bytes_per_token" in values else "",
                f"{share:.0%}" if share is not None else "",
                f"{values['used_bytes'] / 1e9:.2f}" if "used_bytes" in values else "",
            ]
            if values.get("host_seconds"):
                names = ("device_seconds", "host_seconds", "wait_seconds")
                cells += [f"{values[name] * 1e3:.3f}" for name in names]
            row = f"{result.name:<32}" + "".join(f"{cell:>12}" for cell in cells)
            lines.append(row.rstrip())
        if measured:
            lines.append(
                "of copies: the weights that a token reads, wherever they lie, beside what the "
                "card\nreads and writes per second where it copies\n"
                "GPU, CPU: of a token, what each takes for its neurons of the layers that both "
                "compute;\nwaits: how long the GPU is idle there until the CPU is ready"
            )
        failed = [r for r in self.found if r.status == FAILED]
        lines += ["", *(f"FAILED {r.part} {r.name}: {r.detail}" for r in failed)]
        cards = [r.detail for r in self.found if r.name == "what it is"]
        lines += [f"{len(failed)} failed on {cards[0] if cards else 'a card that is not known'}"]
        return "\n".join(lines)


# ---- peers, each in a process of its own ----


def run_peer(
    name: str, engine: str, program: Path, model: Path, share: float, shape: dict[str, int],
    settings: Settings,
) -> Iterator[Result]:  # fmt: skip
    """One measurement of a peer's program."""
    if engine == "PowerInfer":
        prompt_rate, generation_rate, how = run_powerinfer(program, model, share, settings)
    else:
        prompt_rate, generation_rate, how = run_llama_bench(program, model, share, shape, settings)
    values = {"engine": engine, "prompt_rate": prompt_rate, "generation_rate": generation_rate}
    yield Result("speed", name, MEASURED, how, values)


def run_powerinfer(
    program: Path, model: Path, share: float, settings: Settings
) -> tuple[float, float, str]:
    """What PowerInfer's main prints of a prompt and of generating."""
    main = PowerInfer(program, model, os.cpu_count() or 1)
    if share < 1:
        main.command += ["--vram-budget", f"{share * model.stat().st_size / 2**30:.3f}"]
    timings = main.run(settings.n_prompt, settings.n_generate + 1)
    prompt, generation = (n / seconds for n, seconds in (timings["prompt eval"], timings["eval"]))
    return prompt, generation, " ".join(main.command[3:])


def run_llama_bench(
    program: Path, model: Path, share: float, shape: dict[str, int], settings: Settings
) -> tuple[float, float, str]:
    """The medians of llama-bench, with as many layers on the card as the share has room for."""
    n_layers = 999 if share == 1 else int(share * shape["n_layer"])
    words = ["-ngl", n_layers, "-p", settings.n_prompt, "-n", settings.n_generate]
    words += ["-r", settings.rounds, "-o", "json"]
    done = subprocess.run(
        [str(program), "-m", str(model), *map(str, words)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise click.ClickException(f"status {done.returncode}: {done.stderr[-1000:]}")
    prompt, generation = parse_llama_bench(done.stdout)
    return prompt, generation, " ".join(map(str, words))


def parse_llama_bench(text: str) -> tuple[float, float]:
    """Median tokens per second of prompts and of generating."""
    tests = json.loads(text)
    prompt = [test["samples_ts"] for test in tests if test["n_prompt"] and not test["n_gen"]]
    generation = [test["samples_ts"] for test in tests if test["n_gen"] and not test["n_prompt"]]
    return statistics.median(prompt[0]), statistics.median(generation[0])


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
            print_results(run(part, settings_from(settings)))
        case ["--run-peer", name, engine, program, model, share, shape, settings]:
            try:
                arguments = (engine, Path(program), Path(model), float(share), json.loads(shape))
                print_results(run_peer(name, *arguments, settings_from(settings)))
            except (click.ClickException, OSError, ValueError, LookupError) as error:
                detail = error.message if isinstance(error, click.ClickException) else str(error)
                print_results(iter([Result("speed", name, FAILED, detail)]))
        case ["--make-model", path, type_name, kind, shape]:
            sizes = json.loads(shape)
            n_pred = min(512, sizes["n_embd"])
            half = Path(path + ".part")
            write_model(half, type_name, sizes, n_pred=n_pred, dense_twin=kind == "dense")
            half.rename(path)
        case _:
            return False
    return True


PROGRAM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.option("--gpu", default=0, show_default=True, help="Number of the GPU.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--parts", default=",".join(ALL_PARTS), show_default=True)
@click.option("--quick", is_flag=True, help="Everything tiny, to see that this program works.")
@click.option("--word", default="", help="Only self-tests whose names contain it.")
@click.option("--golden", type=PROGRAM, help="Another model for greedy texts.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="For the models.")
@click.option("--n-layer", type=int, help="Layers of the models; 32 are 7B, and 35 GB of files.")
@click.option("--types", default=TYPES, show_default=True, help="Of their weights.")
@click.option("--shares", default=SHARES, show_default=True, help="Budgets, of a file's size.")
@click.option("--llama-bench", type=PROGRAM)
@click.option("--powerinfer-main", type=PROGRAM)
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
    stories = TOOL.parents[1] / "tests" / "data" / "stories260K.F32.gguf"
    if golden is None and stories.is_file():
        golden = stories
    settings = Settings(gpu=gpu, quick=quick, word=word, golden=str(golden or ""))
    if quick:
        settings = replace(settings, n_prompt=8, n_generate=2, rounds=1)
    shape = dict(SHAPE_QUICK if quick else SHAPE_7B)
    shape["n_layer"] = n_layer or shape["n_layer"]
    with tempfile.TemporaryDirectory(dir=folder) as made:
        check = Check(
            settings=settings,
            folder=Path(made),
            shape=shape,
            types=tuple(types.split(",")),
            shares=tuple(map(float, shares.split(","))),
            output=output,
            llama_bench=llama_bench,
            powerinfer_main=powerinfer_main,
            end=time.monotonic() + TIME_IN_ALL,
        )
        try:
            check.run(chosen)
        finally:
            check.stop_models()
    click.echo(check.table())
    sys.exit(any(result.status == FAILED for result in check.found))


if __name__ == "__main__" and not inner(sys.argv[1:]):
    main()
