"""The peers that gpu_check.py measures, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
from bench_peers import PowerInfer
from gpu_check_parts import MEASURED, Result, Settings


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
        errors="replace", check=False,
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
