"""`qinfer demo`: a repeatable story without a network, and figures that are the runtime's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qinfer import Model, Placement
from qinfer.bench import bench
from qinfer.demo import Demo, ModeFigures, WordWrap, measure, render, story

# Whatever asks for a socket in this process fails, and says so.
OFFLINE = """
import socket, sys
def refuse(*arguments, **options):
    raise SystemExit("asked for the network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = "qinfer"
from qinfer.cli import main
main()
"""


def run(*arguments: str, cache: Path, before: tuple[str, ...] = ()) -> str:
    """Standard output of a run offline, in whose course nothing is kept."""
    done = subprocess.run(
        [*before, sys.executable, "-P", "-c", OFFLINE, *arguments],
        env={**os.environ, "QINFER_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not cache.exists()
    return done.stdout


@pytest.fixture(scope="module")
def figures() -> Demo:
    with Model.demo(threads=1, sparsity="exact") as model:
        stream = story(model, "Once upon a time", seed=1, max_tokens=24)
        for _ in stream:
            pass
        assert stream.completion is not None
        return measure(model, "Once upon a time", stream.completion)


def test_it_tells_a_story_and_shows_what_sparsity_does(tmp_path: Path) -> None:
    text = run("demo", "-t", "1", cache=tmp_path / "cache")
    told, _, shown = text.partition("\n\nA token needs only some of the model's neurons.")
    with Model.demo() as model:
        stream = story(model, "Once upon a time", seed=1, max_tokens=None)
        assert told == "Once upon a time" + "".join(piece.text for piece in stream)
        assert stream.completion is not None and stream.completion.finish_reason == "stop"
    assert "on 1 thread of " in shown
    rows = re.findall(r"^  (\w+) +(\d+)% +([\d.]+) MB +(\d+)  \w", shown, re.MULTILINE)
    assert [row[0] for row in rows] == ["off", "exact", "predict"]
    shares, megabytes = ([float(row[i]) for row in rows] for i in (1, 2))
    assert shares[0] == 100 > 40 > shares[1] > shares[2] > 5
    assert megabytes[0] > megabytes[1] > megabytes[2] > 8
    assert all(int(row[3]) > 0 for row in rows)
    layers = re.findall(r"^ +(\d)  (#+)(\.+) +(\d+)%$", shown, re.MULTILINE)
    assert [layer[0] for layer in layers] == list("012345")
    for _, full, rest, percent in layers:
        assert len(full) + len(rest) == 20
        assert abs(len(full) / 20 - int(percent) / 100) < 0.031
    assert max(map(len, shown.splitlines())) < 80


def test_it_runs_where_there_is_no_network_at_all(tmp_path: Path) -> None:
    apart = ("unshare", "--map-root-user", "--net")
    try:
        subprocess.run([*apart, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a process without network cannot be made here: {error}")
    text = run("demo", "-n", "5", cache=tmp_path / "cache", before=apart)
    assert text.startswith("Once upon a time")
    text = run("run", "stories", "-p", "Once", "-n", "5", "--sparsity", "exact",
               cache=tmp_path / "cache", before=apart)  # fmt: skip
    assert len(text) > 5


def test_json_is_one_object_and_a_seed_makes_a_story(tmp_path: Path) -> None:
    options = ("-p", "The little dragon", "-n", "12", "--json")
    first, again, other = (
        json.loads(run("demo", *options, "--seed", seed, cache=tmp_path / "cache"))
        for seed in ("3", "3", "4")
    )
    assert first["story"] == again["story"] != other["story"]
    assert (first["prompt"], first["seed"], first["n_tokens"]) == ("The little dragon", 3, 12)
    assert first["model"] == "relu-stories-15M"
    modes = {found["mode"]: found for found in first["modes"]}
    assert list(modes) == ["off", "exact", "predict"]
    assert modes["off"]["speedup"] == 1 and modes["exact"]["speedup"] > 0
    assert modes["predict"]["predicted"] > modes["predict"]["active"]
    assert [len(found["active_by_layer"]) for found in modes.values()] == [6, 6, 6]


def test_a_prompt_that_does_not_fit_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qinfer", "demo", "-p", "a word " * 200],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: the prompt has \d+ tokens and the context holds 256.*\n",
                        done.stderr)  # fmt: skip


def test_figures_are_the_runtimes(figures: Demo) -> None:
    with Model.demo() as model:
        tokens = model.tokenizer.encode(figures.prompt)
        tokens += model.generate(figures.prompt, seed=1, temperature=0.6, max_tokens=24).tokens
        for found in figures.modes:
            with model.context(sparsity=found.mode) as context:
                for token in tokens:
                    context.feed([token], generated=True)
                stats = context.stats()
            assert found.bytes_per_token == pytest.approx(
                stats.weight_bytes_read / len(tokens), rel=1e-6
            )
            if found.mode != "off":
                shares = [layer.n_active / len(tokens) / 768 for layer in stats.layers]
                assert found.active_by_layer == pytest.approx(shares)
                assert found.active == pytest.approx(sum(found.active_by_layer) / 6)
    # Gate, up and down: 768 rows of 288 weights in Q8_0, in each of six layers.
    assert figures.neuron_bytes == 6 * 3 * 768 * 288 // 32 * 34


def test_bench_counts_active_neurons_the_same_way() -> None:
    with Model.demo(sparsity="exact", n_ctx=64) as model:
        found = bench(model, n_prompt=4, n_generate=4, repeats=1).active
    assert found is not None and 0.05 < found < 0.4
    with Model.demo(sparsity="off", n_ctx=64) as model:
        assert bench(model, n_prompt=4, n_generate=4, repeats=1).active is None


@pytest.mark.parametrize(
    ("exact", "predict", "says"),
    [
        (1.3, 1.2, "Here exact is 1.30 times as fast as computing all of them."),
        (1.3, 1.42, "Here predict is 1.42 times as fast"),
        (1.04, 0.8, "Here leaving neurons out is not faster than computing all of them."),
        (0.7, 0.8, "is slower than computing all of them: predict is 0.80 times as fast."),
    ],
)
def test_the_verdict_is_what_was_measured(
    figures: Demo, exact: float, predict: float, says: str
) -> None:
    def with_speedup(found: ModeFigures) -> ModeFigures:
        return replace(found, speedup={"off": 1.0, "exact": exact, "predict": predict}[found.mode])

    changed = replace(figures, modes=[with_speedup(found) for found in figures.modes])
    assert says in " ".join(render(changed).split())


@pytest.mark.parametrize("cuts", [1, 3, 1000])
def test_lines_on_a_terminal_end_between_words(cuts: int) -> None:
    text = "Once upon a time there was an extraordinarily-long-word.\nThe end.  Two spaces"
    printed: list[str] = []
    wrap = WordWrap(printed.append, 16)
    for begin in range(0, len(text), cuts):
        wrap(text[begin : begin + cuts])
    wrap.close()
    lines = "".join(printed).split("\n")
    assert [line.rstrip() for line in lines] == [
        "Once upon a time", "there was an", "extraordinarily-long-word.", "The end.  Two",
        "spaces", "",
    ]  # fmt: skip
    whole: list[str] = []
    unbroken = WordWrap(whole.append, None)
    unbroken(text)
    unbroken.close()
    assert "".join(whole) == text + "\n"


def test_a_gpu_that_computes_is_named(figures: Demo) -> None:
    kept = Placement(
        "NVIDIA T4 (cuda:0)", "6 of 6 layers' attention, 40 % of the neurons; 9.8 MiB of 10.0 MiB",
        10 << 20, 9 << 20, 0, 0, 0, 0, 1843, 0, True, 6, False, 0,
    )  # fmt: skip
    shown = " ".join(render(replace(figures, placement=kept)).split())
    assert f"on {kept.device}, which keeps {kept.summary}, and beside it 1 thread of " in shown
    assert "NVIDIA" not in render(figures)
