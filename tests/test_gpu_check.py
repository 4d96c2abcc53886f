"""tools/gpu_check.py on the stand-in: what it finds and writes, and that it can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import numpy as np
import pytest
from gpu_check_speed import bytes_read

import cuda_standin
from qinfer import Stats, _cuda
from qinfer.sparsity import LayerStats

TOOL = Path(gpu_check.__file__)
LLAMA_BENCH = """\
#!/bin/sh
echo '[{"n_prompt": 8, "n_gen": 0, "samples_ts": [10.0, 30.0, 20.0]},
       {"n_prompt": 0, "n_gen": 2, "samples_ts": [1.0, 2.0, 3.0]}]'
"""
POWERINFER = """\
#!/bin/sh
echo 'prompt eval time =  1000.00 ms /     8 tokens' >&2
echo '       eval time =  2000.00 ms /     3 runs' >&2
"""
# In compute-sanitizer's place: runs what it is given, and ends as if it had seen errors or not.
SANITIZER = """\
#!/bin/sh
[ "$1 $3 $4" = "--tool --error-exitcode 86" ] || exit 1
case "$2" in memcheck | racecheck) ;; *) exit 1 ;; esac
shift 4
"$@" && exit {status}
"""
# Compiles kernels that add one too much in `qi_scale_rows`.
BROKEN_COMPILER = """\
#!/bin/sh
for word; do
    case "$word" in
        */in) sed -i 's/factor) + b\\[i\\];/factor) + b[i] + 1.0f;/' "$word"/norm.cu ;;
    esac
done
exec c++ "$@"
"""


def run_check(
    *words: object, variables: dict[str, str] | None = None, **settings: object
) -> subprocess.CompletedProcess[str]:
    environment = cuda_standin.environment(**settings)
    environment["QINFER_CACHE_DIR"] = str(cuda_standin.FOLDER / "qinfer-cache")
    environment.pop("PYTHONSAFEPATH", None)  # the folder of a program is on its path
    return subprocess.run(
        [sys.executable, str(TOOL), "--quick", *map(str, words)],
        env=environment | (variables or {}),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_everything_in_small(tmp_path: Path) -> None:
    """Each part answers, as JSON and in the table; peers' output is understood."""
    output = tmp_path / "out.jsonl"
    done = run_check(
        "--word", "scale ", "--types", "f16", "--shares", "1,0.5", "--output", output,
        "--llama-bench", program(tmp_path / "llama-bench", LLAMA_BENCH),
        "--powerinfer-main", program(tmp_path / "main", POWERINFER),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(result["part"], result["name"]): result for result in results}
    assert found["card", "what it is"]["values"]["card"] == "Stand-in GPU 0"
    assert found["card", "bandwidth"]["values"]["bandwidth"] > 0
    assert sum(part == "kernels" for part, _ in found) == len(
        [name for name in _cuda.self_test_names() if "scale " in name]
    )
    assert found["golden", "stories260K.F32.gguf: Once upon a time"]["status"] == "passed"
    for share in ("whole", "half", "none"):
        assert found["properties", f"f32, {share}"]["status"] == "passed"
    for kind in ("sparse", "dense"):
        for share in ("whole", "50%"):
            values = found["speed", f"{kind} F16, {share}"]["values"]
            assert 0 < values["used_bytes"] <= values["budget_bytes"]
            assert values["bytes_per_token"] > 0
            assert 0 < values["share"] < values["share_with_launches"]
            assert values["launches_per_token"] > 0
    sparse, dense = (found["speed", f"{kind} F16, whole"]["values"] for kind in ("sparse", "dense"))
    assert (sparse["sparsity"], dense["sparsity"]) == ("predict", "off")
    assert sparse["bytes_per_token"] < dense["bytes_per_token"]
    # All, or some, of the neurons; the processor leaves out parts of down that nobody needs.
    n_neurons = 2 * 16384
    assert dense["n_neurons"] == sparse["n_neurons"] == n_neurons
    assert dense["host_seconds"] == dense["host_bytes"] == 0
    assert dense["device_bytes"] == pytest.approx(dense["bytes_per_token"])
    for kind, whole in (("sparse", sparse), ("dense", dense)):
        part = found["speed", f"{kind} F16, 50%"]["values"]
        assert 0.1 * n_neurons < part["n_neurons"] < 0.6 * n_neurons
        assert 0.8 < part["bytes_per_token"] / whole["bytes_per_token"] <= 1.01
        assert part["device_bytes"] + part["host_bytes"] == pytest.approx(part["bytes_per_token"])
        assert min(part[name] for name in ("device_bytes", "host_bytes", "host_seconds")) > 0
    table = done.stdout.partition("\nchecks ")[2]
    assert re.search(r"^kernels +7 +0 +0$", table, re.MULTILINE)
    row = r"^sparse F16, 50% +[\d.]+ +[\d.]+ +\d+ +\d+% +\d+ +\d+% +[\d.]+( +[\d.]+){3}$"
    assert re.search(row, table, re.MULTILINE)
    assert re.search(r"^llama.cpp, dense F16, whole +20.0 +2.0$", table, re.MULTILINE)
    assert re.search(r"^PowerInfer, sparse F16, 50% +8.0 +1.5$", table, re.MULTILINE)
    assert "\n0 failed on Stand-in GPU 0, compute capability 9.0" in table


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--types", "f16,q9"), "--types has 'q9'; there are f32, f16, bf16, q8_0"),
        (("--shares", "1,half"), "--shares 1,half: expected numbers"),
        (("--shares", "1.5"), "--shares has 1.5, expected more than 0, up to 1"),
        (("--parts", "card,all"), "--parts has all; there are card, kernels"),
        (("--n-layer", "0"), "0 is not in the range x>=1"),
    ],
)
def test_options_are_checked(words: tuple[str, str], says: str) -> None:
    done = run_check(*words, devices=0)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert done.stdout == ""


def test_the_least_time_of_a_token() -> None:
    """By hand: each side reads at its own speed, and in a layer both do at the same time."""
    info = SimpleNamespace(
        n_layer=2, n_ff=100, n_bytes_per_token=1000, n_ffn_bytes_per_token=600,
        kv_bytes_per_token_f16=20,
    )  # fmt: skip
    kept = {0: np.arange(100), 1: np.arange(25)}
    model: Any = SimpleNamespace(
        info=info,
        policy=SimpleNamespace(mode="off"),
        _weights=SimpleNamespace(offload=SimpleNamespace(neurons=kept.__getitem__)),
    )
    context: Any = SimpleNamespace(
        placement=SimpleNamespace(
            attention_bytes=300, head_bytes=0, predictor_bytes=0, n_predictors=0
        ),
        kv_host_shares=lambda: np.array([0.0, 0.5]),
    )
    layer = LayerStats(n_bytes=10 * 300)
    stats = Stats(n_generated_tokens=10, layers=(layer, layer))
    settings = gpu_check.Settings(
        gpu=0, quick=True, bandwidth=100.0, host_bandwidth=10.0, n_prompt=8, n_generate=4
    )
    found = bytes_read(model, context, stats, settings)
    assert (found.device, found.host, found.kv) == (300 + 300 + 75, 100 + 225, 200)
    # Attention 3 s and the head, with the processor, 10 s. Neurons 3 s and 22.5 s; keys and values
    # 1 s and 5 s.
    assert found.seconds == pytest.approx(3 + 10 + 3 + 22.5 + 1 + 5)


def test_a_wrong_kernel_is_found(tmp_path: Path) -> None:
    variables = {
        "STANDIN_CXX": str(program(tmp_path / "compiler", BROKEN_COMPILER)),
        "STANDIN_CACHE": str(tmp_path / "kernels"),
        "QINFER_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = run_check("--word", "scale 3", "--parts", "kernels", variables=variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r"^FAILED kernels scale 31: error inf of 1, \d+ values", done.stdout, re.MULTILINE
    )
    assert re.search(r"^kernels +0 +1 +0$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("status", [0, 86])
def test_what_the_sanitizer_sees_counts(status: int, tmp_path: Path) -> None:
    program(tmp_path / "compute-sanitizer", SANITIZER.format(status=status))
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run_check("--parts", "sanitizer", variables={"PATH": path})
    assert done.returncode == (status != 0), done.stdout + done.stderr
    for tool in gpu_check.SANITIZERS:
        passed = re.findall(rf"^passed +sanitizer +{tool}, (.*): error", done.stdout, re.MULTILINE)
        assert all(any(word in name for name in passed) for word in gpu_check.SANITIZED)
        assert (f"{tool}: no errors in {len(passed)} self-tests" in done.stdout) == (status == 0)
        failed = f"FAILED sanitizer {tool}, all of it: saw errors"
        assert (failed in done.stdout) == (status != 0)


def test_shares_of_the_self_tests_are_all_of_them() -> None:
    """Several processes run them side by side, each its own."""
    code = """
import json, sys
from gpu_check_parts import Settings, kernels
for i in range(3):
    settings = Settings(gpu=0, quick=True, word="scale ", share=(i, 3))
    print(json.dumps([result.name for result in kernels(settings)]))
"""
    shares = [json.loads(line) for line in on_gpu(code).splitlines()]
    assert all(shares)
    names = [name for name in _cuda.self_test_names() if "scale " in name]
    assert [name for share in shares for name in share] == names


# Stands for a process of self-tests: the second cannot run, the fourth crashes, the sixth hangs.
FAULTY = """
import dataclasses, json, os, sys, time
from gpu_check_parts import Settings, judged, own_tests
from qinfer import _cuda
settings = Settings(**json.loads(sys.argv[1]) | {"share": (0, 1)})
names = _cuda.self_test_names()
numbers = own_tests(settings)
for i, number in list(enumerate(numbers))[settings.skip :]:
    if i == 3:
        os.abort()
    if i == 5:
        time.sleep(100)
    print(json.dumps(dataclasses.asdict(judged("kernels", names[number], i != 1, ""))), flush=True)
    if i == 1:
        break
"""


def test_self_tests_go_on_behind_one_that_takes_its_process_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = str(TOOL.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, *filter(None, sys.path)]))
    monkeypatch.setattr(gpu_check, "SILENCE", 5.0)
    monkeypatch.setattr(
        gpu_check,
        "command_of",
        lambda _, settings: [sys.executable, "-c", FAULTY, json.dumps(asdict(settings))],
    )
    settings = gpu_check.Settings(gpu=0, quick=True, word="scale ")
    found = list(gpu_check.self_tests(settings, time.monotonic() + 60))
    names = [name for name in _cuda.self_test_names() if "scale " in name]
    assert len(names) == 7
    assert [result.name for result in found] == names
    assert [i for i, result in enumerate(found) if result.status == "failed"] == [1, 3, 5]
    assert (found[3].detail, found[5].detail) == ("ended with status -6", "hangs: silent for 5 s")
    # With no time left the rest is missed, aloud.
    *_, last = gpu_check.self_tests(settings, time.monotonic())
    assert (last.status, last.detail) == (
        "failed", f"6 self-tests from {names[1]!r} on were not run"
    )  # fmt: skip


def a_check(folder: Path, **changes: Any) -> gpu_check.Check:
    check = gpu_check.Check(
        settings=gpu_check.Settings(gpu=0, quick=True), folder=folder,
        shape=dict(gpu_check.SHAPE_QUICK), types=("q4_0", "f16"), shares=(1.0,), output=None,
        llama_bench=None, powerinfer_main=None, end=time.monotonic() + 60,
    )  # fmt: skip
    return replace(check, **changes)


def test_a_part_that_breaks_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the program itself, and where the disk is full."""
    check = a_check(tmp_path, output=tmp_path)  # which no one can write to
    called: list[str] = []

    def run_part(part: str, name: str = "", **changes: Any) -> None:
        called.append(part)
        if part == "card":
            check.add(gpu_check.Result("card", gpu_check.WHAT_IT_IS, "passed"))
        if part == "golden":
            raise OSError("no more processes")

    monkeypatch.setattr(check, "run_part", run_part)
    check.run(["properties", "golden"])
    assert called == ["card", "golden", "properties"]
    _, failed = check.found
    assert (failed.part, failed.status) == ("golden", "failed")
    assert "OSError: no more processes" in failed.detail
    assert "1 failed" in check.table()


def test_models_that_do_not_fit_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    usage = SimpleNamespace(free=20_000_000)
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda _: usage)
    check = a_check(tmp_path)
    check.start_models()
    check.wait_for_models()
    skipped = {result.name for result in check.found if result.status == "skipped"}
    assert skipped == {"sparse.f16", "dense.f16"}
    made = {path.name: path.stat().st_size for path in tmp_path.glob("*.gguf")}
    assert set(made) == {"sparse.q4_0.gguf", "dense.q4_0.gguf"}
    for name, size in made.items():
        sparsity = gpu_check.sparsity_of(name.partition(".")[0], check.shape)
        expected = gpu_check.model_bytes("q4_0", check.shape, **sparsity)
        assert size == pytest.approx(expected, rel=0.01)


def test_measurements_that_time_cuts_short_are_skipped(tmp_path: Path) -> None:
    check = a_check(tmp_path, end=time.monotonic() + 1.5)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "command_of", lambda *_: command)
        check.run_part("speed", "dense F16, whole")
        check.run_part("golden")
    assert [(r.name, r.status) for r in check.found] == [
        ("dense F16, whole", "skipped"), ("all of it", "skipped")
    ]  # fmt: skip
    check = a_check(tmp_path, end=time.monotonic() + 1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "command_of", lambda *_: command)
        check.run_part("golden")
    assert [r.status for r in check.found] == ["failed"]


def test_without_a_gpu_nothing_else_is_tried() -> None:
    done = run_check(devices=0)
    assert done.returncode == 1
    assert "FAILED card all of it: DeviceError" in done.stdout
    assert "1 failed" in done.stdout


def test_no_such_self_test_is_a_failure() -> None:
    done = run_check("--word", "nothing", "--parts", "kernels")
    assert done.returncode == 1
    assert "no name contains 'nothing'" in done.stdout


def results_of(code: str, seconds: float) -> list[Any]:
    command = [sys.executable, "-c", code]
    return list(gpu_check.results_of("part", command, seconds, gpu_check.own_status))


def test_a_part_that_hangs_is_ended_and_what_it_found_is_kept() -> None:
    said = json.dumps({"part": "part", "name": "first", "status": "passed"})
    code = f"import os, time; print({said!r}, flush=True); print(os.getpid(), flush=True)\n"
    begin = time.monotonic()
    first, last = results_of(code + "time.sleep(100)", 2)
    assert time.monotonic() - begin < 20
    assert (first.name, first.status) == ("first", "passed")
    assert last.status == "failed"
    assert re.fullmatch(r"took longer than 2 s: \d+", last.detail)


def test_a_part_that_crashes_says_its_last_words() -> None:
    code = "import sys; print('seen'); print('ouch', file=sys.stderr); sys.exit(3)"
    (last,) = results_of(code, 20)
    assert (last.status, last.detail) == ("failed", "ended with status 3: seen\nouch")
    (last,) = results_of("import os; os.abort()", 20)
    assert (last.status, last.detail) == ("failed", "ended with status -6")


def on_gpu(code: str) -> str:
    """What Python code prints that has the stand-in for a GPU."""
    variables = {
        "QINFER_CACHE_DIR": str(cuda_standin.FOLDER / "qinfer-cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = cuda_standin.run_program(code, variables=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numbers_of_self_tests_are_checked() -> None:
    n = len(_cuda.self_test_names())
    assert n > 400
    code = """
from qinfer import QInferError, _cuda
for call in (
    lambda: next(_cuda.self_tests(0, [{n}])),
    lambda: next(_cuda.self_tests(7)),
    lambda: _cuda.read_bandwidth(0, 0),
):
    try:
        print(call())
    except QInferError as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""
    number, device, size = on_gpu(code.format(n=n)).splitlines()
    assert number == f"ArgumentError: there is no self-test {n}: they are 0 to {n - 1}"
    assert device.startswith("DeviceError: ")
    assert size == "ArgumentError: n_bytes is 0"


def test_a_self_test_that_cannot_run_has_a_problem() -> None:
    code = (
        "import ctypes; from qinfer import _cuda; tests = _cuda.self_tests(0); next(tests);"
        "ctypes.CDLL('libcuda.so.1').standin_kill(); print(next(tests))"
    )
    said = on_gpu(code)
    assert "passed=False" in said
    assert "problem=''" not in said
