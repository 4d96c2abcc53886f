"""Compares qinfer's speed with llama.cpp's: both on the same file, in turns, with the same threads.

Every engine keeps its model loaded in a process of its own and the two are timed alternately, so
that whatever else the machine does meets both. Figures are medians with the range seen; ratios are
qinfer / llama.cpp, pairwise. The machine's read bandwidth is measured between the rounds.

\b
    python tools/bench_peers.py model.gguf --threads 2 --peer-python ~/peer/bin/python
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

PEER, OURS = "llama.cpp", "qinfer"
WORKER = Path(__file__).with_name("bench_worker.py")
N_DECODE = 32
HOW_TO_GET_PEER = """{python} has no llama_cpp. The peer is installed, not built here:
    python -m venv peer && peer/bin/pip install llama-cpp-python
then add --peer-python peer/bin/python."""


class Worker:
    """A process that runs bench_worker.py."""

    def __init__(self, python: str, engine: str, model: Path, n_threads: int) -> None:
        self.engine = engine
        self.process = subprocess.Popen(
            [python, str(WORKER), engine, str(model), str(n_threads)],
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


def measure_round(workers: list[Worker], results: Results) -> None:
    """One sample of everything from each worker."""
    for worker in workers:
        answer = worker.ask("load")
        results.add("load to first token, ms", worker.engine, answer["wall"] * 1e3)
    for n in (128, 512):
        for worker in workers:
            answer = measured(worker, results, "prefill", n)
            results.add_speed(f"prefill {n}", worker.engine, n, answer)
    for worker in workers:  # now that pages of keys and values are full and scratch is in use
        answer = worker.ask("memory")
        results.add("memory beyond file and KV, MB", worker.engine, answer["bytes"] / 1e6)
    for worker in workers:
        answer = measured(worker, results, "decode", N_DECODE)
        results.add_speed("decode", worker.engine, N_DECODE, answer)
    for worker in workers:
        with busy_loop():
            answer = worker.ask("decode", n=N_DECODE)
        results.add_speed("decode beside a busy loop", worker.engine, N_DECODE, answer)


def measured(worker: Worker, results: Results, what: str, n: int) -> dict[str, Any]:
    """Asks, and notes how many cores were busy with something else meanwhile."""
    before = busy_seconds()
    answer = worker.ask(what, n=n)
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


def report(results: Results, bytes_per_token: int) -> None:
    """Prints the table."""
    bandwidth = statistics.median(results.bandwidth)
    gigabytes = [value / 1e9 for value in results.bandwidth]
    click.echo(f"read bandwidth       {spread(gigabytes, ' GB/s')}")
    click.echo(f"read per token       {bytes_per_token / 1e6:.1f} MB")
    click.echo(f"busy with others     {spread(results.foreign)} cores\n")
    click.echo(f"{'':<40}{PEER:>24}{OURS:>24}{'ratio':>24}")
    for what in dict.fromkeys(what for what, _ in results.samples):
        peer, ours = results.samples[what, PEER], results.samples[what, OURS]
        ratios = [b / a for a, b in zip(peer, ours, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        click.echo(f"{what:<40}{spread(peer):>24}{spread(ours):>24}{ratio:>24}")
        if what == "decode, tokens/s":
            shares = [
                [100 * rate * bytes_per_token / bandwidth for rate in rates]
                for rates in (peer, ours)
            ]
            texts = [spread(share) for share in shares]
            click.echo(f"{'  share of read bandwidth, %':<40}{texts[0]:>24}{texts[1]:>24}")


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--peer-python", default=sys.executable, help="A Python that has llama_cpp.")
def main(model: Path, threads: int, rounds: int, peer_python: str) -> None:
    """Command line."""
    found = subprocess.run(
        [peer_python, "-c", "import llama_cpp"], capture_output=True, check=False
    )
    if found.returncode:
        raise click.ClickException(HOW_TO_GET_PEER.format(python=peer_python))
    load = os.getloadavg()[0]
    if load > 0.5:
        click.echo(f"warning: the load average is {load:.1f}; a busy neighbour distorts", err=True)
    results = Results()
    with ExitStack() as stack:
        peer = stack.enter_context(Worker(peer_python, PEER, model, threads))
        ours = stack.enter_context(Worker(sys.executable, OURS, model, threads))
        versions = [worker.ask("load")["version"] for worker in (peer, ours)]
        click.echo(
            f"{model.name}, {threads} threads, {rounds} rounds: {versions[1]} / {versions[0]}"
        )
        with click.progressbar(range(rounds), file=sys.stderr) as bar:
            for number in bar:
                facts = ours.ask("facts", n_threads=threads)
                results.bandwidth.append(facts["bandwidth"])
                # Taking turns at going first, so that neither always follows the other.
                measure_round([peer, ours] if number % 2 == 0 else [ours, peer], results)
        report(results, facts["bytes_per_token"])


if __name__ == "__main__":
    main()
