"""Compares qinfer's speed with a peer's: both on the same file, in turns, with the same threads.

The peer is llama.cpp or, for files with predictors, PowerInfer. The two are timed alternately, so
that whatever else the machine does meets both. Figures are medians with the range seen; ratios are
qinfer / peer, pairwise. The machine's read bandwidth is measured between the rounds.

qinfer and llama.cpp keep their models loaded, each in a process of its own. PowerInfer is a program
that loads, runs and ends. Its speed is what it prints, which counts only the model's computation
as with the others; the difference of two runs' lengths would add its sampling, and the noise of two
loads. It prints no CPU time: that is the difference of a long run and a short one.

\b
    python tools/bench_peers.py model.gguf --threads 2 --peer-python ~/peer/bin/python
    python tools/bench_peers.py model.powerinfer.gguf --powerinfer-main ~/PowerInfer/build/bin/main
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click

OURS, LLAMA_CPP, POWERINFER = "qinfer", "llama.cpp", "PowerInfer"
WORKER = Path(__file__).with_name("bench_worker.py")
N_DECODE = 32
HOW_TO_GET_PEER = """{python} has no llama_cpp. The peer is installed, not built here:
    python -m venv peer && peer/bin/pip install llama-cpp-python
then add --peer-python peer/bin/python."""


class Contender(Protocol):
    """An engine that answers requests; each answer holds wall seconds and CPU seconds."""

    engine: str
    resident: bool  # whether the model stays loaded

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Does what is asked, and waits for it."""


class Worker:
    """A process that runs bench_worker.py."""

    resident = True

    def __init__(
        self, python: str, engine: str, model: Path, n_threads: int, sparsity: str = "off"
    ) -> None:
        self.engine = engine
        self.process = subprocess.Popen(
            [python, str(WORKER), engine, str(model), str(n_threads), sparsity],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": what} | arguments) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"{self.engine} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise click.ClickException(f"{self.engine}: {answer['error']}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


class PowerInfer:
    """PowerInfer's `main`, started for every request.

    Its prompts are text, so its tokens are not those of the others.
    """

    engine = POWERINFER
    resident = False

    def __init__(self, main: Path, model: Path, n_threads: int) -> None:
        self.command = [str(main.resolve()), "-m", str(model.resolve()), "-t", str(n_threads)]
        self.command += ["-c", "1024", "-b", "512", "--temp", "0", "--ignore-eos"]

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Computes a prompt of n tokens, or n tokens after a prompt of 16."""
        n = arguments["n"]
        if what == "prefill":
            long, short = self.run(n, 1), self.run(2, 1)
            n_long, wall = long["prompt eval"]
            n_timed = n_long - short["prompt eval"][0]
        else:
            long, short = self.run(16, n + 1), self.run(16, 1)
            n_long, wall = long["eval"]
            n_timed = n_long
        return {"wall": wall * n / n_long, "cpu": (long["cpu"] - short["cpu"]) * n / n_timed}

    def run(self, n_prompt: int, n_generate: int) -> dict[str, Any]:
        """CPU seconds of the process; tokens and seconds of "prompt eval" and "eval"."""
        # With the token that begins a text, a letter each.
        prompt = " ".join(chr(ord("a") + i * 7 % 26) for i in range(n_prompt - 1))
        before = children_seconds()
        with tempfile.TemporaryDirectory() as folder:  # it writes a log where it runs
            done = subprocess.run(
                [*self.command, "-n", str(n_generate), "-p", prompt],
                cwd=folder,
                capture_output=True,
                check=False,
            )
        cpu = children_seconds() - before
        printed = done.stderr.decode("utf-8", "replace")
        timing = r"(prompt eval|eval) time = +([\d.]+) ms / +(\d+)"
        timings = {m[1]: (int(m[3]), float(m[2]) / 1e3) for m in re.finditer(timing, printed)}
        if done.returncode or len(timings) != 2:
            raise click.ClickException(
                f"{self.command[0]} ended with status {done.returncode}:\n{printed[-2000:]}"
            )
        return timings | {"cpu": cpu}


def children_seconds() -> float:
    """CPU time of all processes started here that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass
class Results:
    """Samples by what was measured and engine, in the order of the rounds."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    bandwidth: list[float] = field(default_factory=list)  # bytes per second
    foreign: list[float] = field(default_factory=list)  # cores that other processes kept busy

    def add(self, what: str, engine: str, value: float) -> None:
        """Keeps one sample."""
        self.samples[what, engine].append(value)

    def add_speed(self, what: str, engine: str, n: int, answer: dict[str, Any]) -> None:
        """Keeps the speed of n tokens by the wall clock and by CPU time."""
        self.add(f"{what}, tokens/s", engine, n / answer["wall"])
        self.add(f"{what}, tokens/CPU-s", engine, n / answer["cpu"])


@contextmanager
def busy_loop() -> Iterator[None]:
    """One process that does nothing, as fast as it can."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def busy_seconds() -> float:
    """CPU time that all processes of the machine together have used, stolen time included."""
    user, nice, system, _, _, irq, soft_irq, steal, *_ = (
        int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def measure_round(contenders: list[Contender], results: Results) -> None:
    """One sample of everything from each that both can tell."""
    resident = all(contender.resident for contender in contenders)
    if resident:
        for contender in contenders:
            answer = contender.ask("load")
            results.add("load to first token, ms", contender.engine, answer["wall"] * 1e3)
    for n in (128, 512) if resident else (128,):
        for contender in contenders:
            answer = measured(contender, results, "prefill", n)
            results.add_speed(f"prefill {n}", contender.engine, n, answer)
    if resident:  # now that pages of keys and values are full and scratch is in use
        for contender in contenders:
            answer = contender.ask("memory")
            results.add("memory beyond file and KV, MB", contender.engine, answer["bytes"] / 1e6)
    for contender in contenders:
        answer = measured(contender, results, "decode", N_DECODE)
        results.add_speed("decode", contender.engine, N_DECODE, answer)
    for contender in contenders:
        with busy_loop():
            answer = contender.ask("decode", n=N_DECODE)
        results.add_speed("decode beside a busy loop", contender.engine, N_DECODE, answer)


def measured(contender: Contender, results: Results, what: str, n: int) -> dict[str, Any]:
    """Asks, and notes how many cores were busy with something else meanwhile."""
    before = busy_seconds()
    answer = contender.ask(what, n=n)
    foreign = (busy_seconds() - before - answer["cpu"]) / answer["wall"]
    results.foreign.append(max(0.0, foreign))
    return answer


def spread(values: list[float], unit: str = "") -> str:
    """Median and range."""
    digits = 1 if statistics.median(values) < 1000 else 0
    return (
        f"{statistics.median(values):.{digits}f}{unit} "
        f"({min(values):.{digits}f}..{max(values):.{digits}f})"
    )


def report(results: Results, peer: str, bytes_per_token: float) -> None:
    """Prints the table."""
    bandwidth = statistics.median(results.bandwidth)
    gigabytes = [value / 1e9 for value in results.bandwidth]
    click.echo(f"read bandwidth       {spread(gigabytes, ' GB/s')}")
    click.echo(f"read per token       {bytes_per_token / 1e6:.1f} MB by qinfer")
    click.echo(f"busy with others     {spread(results.foreign)} cores\n")
    click.echo(f"{'':<40}{peer:>24}{OURS:>24}{'ratio':>24}")
    for what in dict.fromkeys(what for what, _ in results.samples):
        theirs, ours = results.samples[what, peer], results.samples[what, OURS]
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        click.echo(f"{what:<40}{spread(theirs):>24}{spread(ours):>24}{ratio:>24}")
        if what == "decode, tokens/s":
            # The same bytes for both: what qinfer needs for a token, a peer needs, too.
            shares = [
                [100 * rate * bytes_per_token / bandwidth for rate in rates]
                for rates in (theirs, ours)
            ]
            texts = [spread(share) for share in shares]
            click.echo(f"{'  share of read bandwidth, %':<40}{texts[0]:>24}{texts[1]:>24}")


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--peer-python", default=sys.executable, help="A Python that has llama_cpp.")
@click.option(
    "--peer-model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the peer runs instead, such as the dense twin of a sparse model.",
)
@click.option(
    "--powerinfer-main",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with this build of PowerInfer's main instead.",
)
@click.option(
    "--sparsity",
    type=click.Choice(["auto", "off", "exact", "predict"]),
    default="auto",
    show_default=True,
    help="Of qinfer.",
)
def main(
    model: Path,
    threads: int,
    rounds: int,
    peer_python: str,
    peer_model: Path | None,
    powerinfer_main: Path | None,
    sparsity: str,
) -> None:
    """Command line."""
    if powerinfer_main is None:
        check_llama_cpp(peer_python)
    load = os.getloadavg()[0]
    if load > 0.5:
        click.echo(f"warning: the load average is {load:.1f}; a busy neighbour distorts", err=True)
    results = Results()
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(sys.executable, OURS, model, threads, sparsity))
        peer: Contender
        if powerinfer_main is not None:
            peer = PowerInfer(powerinfer_main, peer_model or model, threads)
            version = f"PowerInfer's {powerinfer_main}"
        else:
            worker = Worker(peer_python, LLAMA_CPP, peer_model or model, threads)
            peer = stack.enter_context(worker)
            version = worker.ask("load")["version"]
        version = f"{ours.ask('load')['version']} / {version}"
        facts = ours.ask("facts", n_threads=threads)
        click.echo(
            f"{model.name}, sparsity {facts['sparsity']}, {threads} threads, {rounds} rounds: "
            f"{version}"
        )
        with click.progressbar(range(rounds), file=sys.stderr) as bar:
            for number in bar:
                facts = ours.ask("facts", n_threads=threads)
                results.bandwidth.append(facts["bandwidth"])
                # Taking turns at going first, so that neither always follows the other.
                measure_round([peer, ours] if number % 2 == 0 else [ours, peer], results)
        report(results, peer.engine, facts["bytes_per_token"])


def check_llama_cpp(python: str) -> None:
    """Says how to get the peer where it is missing."""
    found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    if found.returncode:
        raise click.ClickException(HOW_TO_GET_PEER.format(python=python))


if __name__ == "__main__":
    main()
