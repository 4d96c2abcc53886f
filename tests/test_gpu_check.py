"""tools/gpu_check.py on the stand-in: what it finds and writes, and that it can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest

import cuda_standin
from qinfer import _cuda

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
[ "$1 $2 $3 $4" = "--tool memcheck --error-exitcode 86" ] || exit 1
shift 4
"$@" && exit {status}
"""
# Compiles kernels that add one too much in `qi_add`.
BROKEN_COMPILER = """\
#!/bin/sh
for word; do
    case "$word" in
        */in) sed -i 's/a\\[i\\] += b\\[i\\];/a[i] += b[i] + 1.0f;/' "$word"/norm.cu ;;
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
        "--word", "add ", "--types", "f16", "--shares", "1,0.5", "--output", output,
        "--llama-bench", program(tmp_path / "llama-bench", LLAMA_BENCH),
        "--powerinfer-main", program(tmp_path / "main", POWERINFER),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(result["part"], result["name"]): result for result in results}
    assert found["card", "what it is"]["values"]["card"] == "Stand-in GPU 0"
    assert found["card", "bandwidth"]["values"]["bandwidth"] > 0
    assert sum(part == "kernels" for part, _ in found) == len(
        [name for name in _cuda.self_test_names() if "add " in name]
    )
    assert found["golden", "stories260K.F32.gguf: Once upon a time"]["status"] == "passed"
    for share in ("whole", "half", "none"):
        assert found["properties", f"f32, {share}"]["status"] == "passed"
    for kind in ("sparse", "dense"):
        for share in ("whole", "50%"):
            values = found["speed", f"{kind} F16, {share}"]["values"]
            assert 0 < values["used_bytes"] <= values["budget_bytes"]
            assert values["bytes_per_token"] > 0
            assert values["share"] > 0
    sparse, dense = (found["speed", f"{kind} F16, whole"]["values"] for kind in ("sparse", "dense"))
    assert (sparse["sparsity"], dense["sparsity"]) == ("predict", "off")
    assert sparse["bytes_per_token"] < dense["bytes_per_token"]
    # A token of a dense model reads the same wherever its neurons are.
    part = found["speed", "dense F16, 50%"]["values"]
    assert (dense["n_neurons"], part["n_neurons"]) == (4 * 1024, 0)
    assert dense["bytes_per_token"] == pytest.approx(part["bytes_per_token"])
    table = done.stdout.partition("\nchecks ")[2]
    assert re.search(r"^kernels +7 +0 +0$", table, re.MULTILINE)
    row = r"^sparse F16, 50% +[\d.]+ +[\d.]+ +\d+ +\d+% +[\d.]+( +[\d.]+){3}$"
    assert re.search(row, table, re.MULTILINE)
    assert re.search(r"^llama.cpp, dense F16, whole +20.0 +2.0$", table, re.MULTILINE)
    assert re.search(r"^PowerInfer, sparse F16, 50% +8.0 +1.5$", table, re.MULTILINE)
    assert "\n0 failed on Stand-in GPU 0, compute capability 9.0" in table


def test_a_wrong_kernel_is_found(tmp_path: Path) -> None:
    variables = {
        "STANDIN_CXX": str(program(tmp_path / "compiler", BROKEN_COMPILER)),
        "STANDIN_CACHE": str(tmp_path / "kernels"),
        "QINFER_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = run_check("--word", "add 3", "--parts", "kernels", variables=variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r"^FAILED kernels add 31: error inf of 1, \d+ values", done.stdout, re.MULTILINE
    )
    assert re.search(r"^kernels +0 +1 +0$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("status", [0, 86])
def test_what_the_sanitizer_sees_counts(status: int, tmp_path: Path) -> None:
    program(tmp_path / "compute-sanitizer", SANITIZER.format(status=status))
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run_check("--parts", "sanitizer", variables={"PATH": path})
    assert done.returncode == (status != 0), done.stdout + done.stderr
    assert re.search(r"^passed +sanitizer +rms norm of 97: error", done.stdout, re.MULTILINE)
    assert ("memcheck: no errors in 'rms norm'" in done.stdout) == (status == 0)
    assert ("FAILED sanitizer all of it: saw errors" in done.stdout) == (status != 0)


def test_shares_of_the_self_tests_are_all_of_them() -> None:
    """Several processes run them side by side, each its own."""
    code = """
import json, sys
from gpu_check_parts import Settings, kernels
for i in range(3):
    settings = Settings(gpu=0, quick=True, word="add ", share=(i, 3))
    print(json.dumps([result.name for result in kernels(settings)]))
"""
    shares = [json.loads(line) for line in on_gpu(code).splitlines()]
    assert all(shares)
    names = [name for name in _cuda.self_test_names() if "add " in name]
    assert [name for share in shares for name in share] == names


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
    assert (last.status, last.detail) == ("failed", "took longer than 2 s")


def test_a_part_that_crashes_says_its_last_words() -> None:
    (last,) = results_of("import os, sys; print('ouch', file=sys.stderr); sys.exit(3)", 20)
    assert (last.status, last.detail) == ("failed", "ended with status 3: ouch")
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
    lambda: _cuda.copy_bandwidth(0, 0),
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
