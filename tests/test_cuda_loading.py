"""Finding CUDA at run time: missing, old and broken drivers, NVRTC, the kernel cache, memory.

What needs a GPU runs on the stand-in. Each case has a process, which loads one driver for good.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cuda_standin

# Runs the code with `result` as a dict to fill in, and prints it; a failure of ours is its
# "error", with the name of its class.
PROGRAM = """
import ctypes, json, logging, os, sys
class Lines(logging.Handler):
    def emit(self, record):
        result["log"].append(f"{{record.levelname}} {{record.getMessage()}}")
result = {{"log": []}}
logging.getLogger("qinfer").addHandler(Lines())
logging.getLogger("qinfer").setLevel(logging.DEBUG)
{preload}
from qinfer import QInferError, _cuda
try:
{code}
except QInferError as error:
    result["error"] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(result))
"""


def run(
    code: str, cache: Path | None, *, preload: str = "", timeout: float = 120, **variables: str
) -> dict[str, Any]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CUDA_", "STANDIN_"))
    }
    environment["QINFER_CACHE_DIR"] = str(cache) if cache else "/nonexistent"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(preload=preload, code=textwrap.indent(code, "    "))],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- without the stand-in ----


def test_without_a_driver_the_error_says_so() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    found = run("_cuda.probe(0)", None)
    assert found["error"].startswith("DeviceError: there is no NVIDIA driver that can be loaded")
    assert "libcuda.so.1" in found["error"]
    assert "version 570" in found["error"]


def fake_driver(folder: Path, source: str) -> str:
    """The folder with a libcuda.so.1 made from a few lines of C."""
    code = folder / "fake.c"
    code.write_text(source)
    library = folder / "libcuda.so.1"
    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", str(code), "-o", str(library)], check=True
    )
    return str(folder)


def test_a_driver_that_lacks_an_entry_point_is_named_with_it(tmp_path: Path) -> None:
    source = """
        int cuInit(unsigned flags) { return 0; }
        int cuDriverGetVersion(int* version) { *version = 12090; return 0; }
    """
    found = run("_cuda.probe(0)", None, LD_LIBRARY_PATH=fake_driver(tmp_path, source))
    assert re.match("DeviceError: .*libcuda.so.1 has no cu[A-Z]", found["error"])
    assert "update the NVIDIA driver" in found["error"]


def test_a_file_that_is_no_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    found = run("_cuda.probe(0)", None, LD_LIBRARY_PATH=str(tmp_path))
    assert found["error"].startswith("DeviceError: there is no NVIDIA driver that can be loaded")


@pytest.mark.parametrize(("version", "text"), [(11080, "11.8"), (12040, "12.4"), (12070, "12.7")])
def test_an_old_driver_is_told_what_it_is_and_what_to_do(
    version: int, text: str, tmp_path: Path
) -> None:
    # It lacks all else, too; its age is what matters.
    source = f"""
        int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}
    """
    found = run("_cuda.probe(0)", None, LD_LIBRARY_PATH=fake_driver(tmp_path, source))
    assert f"is for CUDA {text}, and qinfer needs one for 12.8 or newer" in found["error"]
    assert "570" in found["error"]
    assert 'pip install ".[cuda12]"' in found["error"]
    assert 'pip install ".[cuda]"' in found["error"]


def test_the_doctor_says_what_is_missing(tmp_path: Path) -> None:
    source = "int cuDriverGetVersion(int* version) { *version = 12040; return 0; }"
    code = "from qinfer import doctor; result['rows'] = doctor.findings()"
    found = run(code, None, LD_LIBRARY_PATH=fake_driver(tmp_path, source))
    (line,) = [finding for subject, finding in found["rows"] if subject == "CUDA"]
    assert line.startswith("not used: the NVIDIA driver is for CUDA 12.4")


def test_import_loads_nothing_of_cuda() -> None:
    code = "result['maps'] = open('/proc/self/maps').read()"
    maps = run(code, None)["maps"]
    assert "libqinfer.so" in maps
    assert not re.search(r"libcuda|libnvrtc|libcublas", maps)


def test_the_folders_of_nvidias_wheels_are_found(tmp_path: Path) -> None:
    for number, folder in enumerate(["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cublas"]):
        (tmp_path / str(number) / folder).mkdir(parents=True)
    places = [str(tmp_path / str(number)) for number in range(3)]
    code = f"sys.path[:0] = {places!r}; result['found'] = list(map(str, _cuda.library_folders()))"
    found = [Path(path) for path in run(code, None)["found"] if path.startswith(str(tmp_path))]
    assert found == [tmp_path / "0/nvidia/cu13/lib", tmp_path / "1/nvidia/cuda_nvrtc/lib"]


# ---- on the stand-in ----


@pytest.fixture(scope="module")
def standin() -> Path:
    """The folder of the stand-in's libraries."""
    return cuda_standin.libraries()


# The stand-in's NVRTC comes before a real one in site-packages when it is loaded already.
PRELOAD = "for name in {names!r}: ctypes.CDLL(f'{folder}/{{name}}')"
COUNTS = """
standin = ctypes.CDLL("libcuda.so.1")
standin.standin_allocated.restype = standin.standin_live_objects.restype = ctypes.c_uint64
standin.standin_calls.restype = ctypes.c_uint64
def left():
    return standin.standin_allocated() + standin.standin_live_objects(None)
def fail_at(n, code):
    standin.standin_fail_at(ctypes.c_int64(n), code)
"""


def run_on(
    standin: Path,
    code: str,
    cache: Path | None,
    *,
    libraries: tuple[str, ...] = ("libnvrtc.so.13",),
    **variables: str,
) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(standin), os.environ.get("LD_LIBRARY_PATH", "")]))
    preload = PRELOAD.format(names=libraries, folder=standin)
    return run(code, cache, preload=preload, LD_LIBRARY_PATH=path, **variables)


def link(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Links the files of a folder whose names are wanted into another."""
    for file in source.iterdir():
        if wanted(file.name):
            (target / file.name).symlink_to(file)


PROBE = "r = _cuda.probe(0); result['origin'] = r.kernel_origin; result['free'] = r.free_bytes\n"


def test_a_kernel_is_compiled_once_and_then_cached(standin: Path, tmp_path: Path) -> None:
    first = run_on(standin, PROBE, tmp_path)
    assert (first.get("error"), first["origin"]) == (None, "compiled")
    (entry,) = (tmp_path / "kernels").iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.cubin", entry.name)
    second = run_on(standin, PROBE, tmp_path)
    assert second["origin"] == "cached"


def test_another_architecture_is_another_entry(standin: Path, tmp_path: Path) -> None:
    for capability in ("75", "90"):
        found = run_on(standin, PROBE, tmp_path, STANDIN_CAPABILITY=capability)
        assert found["origin"] == "compiled"
    assert len(list((tmp_path / "kernels").iterdir())) == 2


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "long"])
def test_a_damaged_entry_is_made_again(damage: str, standin: Path, tmp_path: Path) -> None:
    run_on(standin, PROBE, tmp_path)
    (entry,) = (tmp_path / "kernels").iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 2
    entry.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "short": whole[:middle],
            "empty": b"",
            "long": whole + b"x",
        }[damage]
    )
    found = run_on(standin, PROBE, tmp_path)
    assert found["origin"] == "compiled"
    (line,) = [line for line in found["log"] if line.startswith("WARNING")]
    assert str(entry) in line
    assert entry.read_bytes() == whole
    assert run_on(standin, PROBE, tmp_path)["origin"] == "cached"


def test_a_cache_that_cannot_be_written_is_said_once(standin: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    found = run_on(standin, 2 * PROBE, tmp_path)
    assert (found.get("error"), found["origin"]) == (None, "compiled")
    (line,) = [line for line in found["log"] if line.startswith("WARNING")]
    assert str(tmp_path / "kernels") in line
    assert "QINFER_CACHE_DIR" in line


def test_hidden_devices_are_named_as_the_cause(standin: Path, tmp_path: Path) -> None:
    for hidden in ("", "-1"):
        found = run_on(standin, PROBE, tmp_path, CUDA_VISIBLE_DEVICES=hidden)
        assert f"CUDA_VISIBLE_DEVICES='{hidden}'" in found["error"]
        assert found["error"].startswith("DeviceError: ")


def test_no_device_at_all_is_an_error(standin: Path, tmp_path: Path) -> None:
    found = run_on(standin, PROBE, tmp_path, STANDIN_DEVICES="0")
    assert found["error"].startswith("DeviceError: the NVIDIA driver finds no GPU")


def test_a_device_that_does_not_exist_is_an_error(standin: Path, tmp_path: Path) -> None:
    found = run_on(standin, "_cuda.probe(7)", tmp_path)
    assert found["error"] == "DeviceError: there is no GPU 7: 1 is visible, numbered from 0"


def test_an_old_card_is_refused_by_name(standin: Path, tmp_path: Path) -> None:
    found = run_on(standin, PROBE, tmp_path, STANDIN_CAPABILITY="70")
    assert re.search(r"GPU 0 \(.+\) has compute capability 7\.0", found["error"])
    assert "7.5 or newer" in found["error"]


@pytest.mark.parametrize(
    ("version", "extra"), [("12080", ".[cuda12]"), ("12090", ".[cuda12]"), ("13000", ".[cuda]")]
)
def test_a_missing_compiler_is_named_with_its_extra(
    version: str, extra: str, standin: Path, tmp_path: Path
) -> None:
    # The driver alone, and a Python that has no NVIDIA wheels.
    link(standin, tmp_path, lambda name: not name.startswith(("libnvrtc", "libcublas")))
    code = "_cuda.library_folders = lambda: []\n" + PROBE
    found = run_on(tmp_path, code, tmp_path, libraries=(), STANDIN_DRIVER_VERSION=version)
    assert found["error"].startswith("DeviceError: libnvrtc.so.")
    assert f'pip install "{extra}"' in found["error"]


def test_the_compiler_is_taken_from_a_wheels_folder(standin: Path, tmp_path: Path) -> None:
    lone = tmp_path / "driver"
    wheel = tmp_path / "wheel/nvidia/cuda_nvrtc/lib"
    lone.mkdir()
    wheel.mkdir(parents=True)
    link(standin, lone, lambda name: not name.startswith("libnvrtc"))
    link(standin, wheel, lambda name: name.startswith("libnvrtc"))
    code = f"sys.path.insert(0, {str(tmp_path / 'wheel')!r})\n"
    code += "result['nvrtc'] = _cuda.info().nvrtc.path\n"
    found = run_on(lone, code, tmp_path, libraries=(), STANDIN_DRIVER_VERSION="12090")
    assert Path(found["nvrtc"]).name == "libnvrtc.so.12"
    assert Path(found["nvrtc"]).is_relative_to(wheel)


def test_a_real_compiler_gives_a_real_cubin(standin: Path, tmp_path: Path) -> None:
    driver, cache = tmp_path / "driver", tmp_path / "cache"
    driver.mkdir()
    link(standin, driver, lambda name: not name.startswith(("libnvrtc", "libcublas")))
    code = "result['folders'] = list(map(str, _cuda.library_folders()))\n" + PROBE
    found = run_on(driver, code, cache, libraries=(), STANDIN_DRIVER_VERSION="12090")
    if not [folder for folder in found["folders"] if folder.endswith("cuda_nvrtc/lib")]:
        pytest.skip("NVRTC 12 is not installed here: pip install nvidia-cuda-nvrtc-cu12")
    # Which no stand-in can run.
    assert found["error"].startswith("DeviceError: the GPU failed while loading the kernels of")
    (entry,) = (cache / "kernels").iterdir()
    header_bytes = 48
    image = entry.read_bytes()[header_bytes:]
    machine = 190  # EM_CUDA
    assert image.startswith(b"\x7fELF")
    assert int.from_bytes(image[18:20], "little") == machine


def test_a_driver_of_cuda_12_gets_no_compiler_of_13(standin: Path, tmp_path: Path) -> None:
    link(standin, tmp_path, lambda name: name != "libnvrtc.so.12")
    code = "_cuda.library_folders = lambda: []\n" + PROBE
    found = run_on(tmp_path, code, tmp_path, libraries=(), STANDIN_DRIVER_VERSION="12090")
    assert "libnvrtc.so.12" in found["error"]


def test_a_fork_is_refused_and_the_parent_goes_on(standin: Path, tmp_path: Path) -> None:
    code = PROBE + textwrap.dedent("""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _cuda.probe(0)
                text = "no error"
            except QInferError as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        result["child"] = os.read(reader, 4096).decode()
        result["status"] = os.waitpid(child, 0)[1]
        result["again"] = _cuda.probe(0).kernel_origin
    """)
    found = run_on(standin, code, tmp_path)
    assert found["status"] == 0
    assert re.match(r"DeviceError: process \d+ is a fork of process \d+", found["child"])
    assert "spawn" in found["child"]
    assert found["again"] == "cached"


def test_a_fork_before_cuda_is_used_works(standin: Path, tmp_path: Path) -> None:
    code = textwrap.dedent("""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, _cuda.probe(0).kernel_origin.encode())
            os._exit(0)
        os.close(writer)
        result["child"] = os.read(reader, 4096).decode()
        os.waitpid(child, 0)
    """)
    assert run_on(standin, code, tmp_path)["child"] == "compiled"


def test_a_budget_is_kept_before_the_card_is_asked(standin: Path, tmp_path: Path) -> None:
    code = (
        COUNTS
        + PROBE
        + textwrap.dedent("""
        before = left()
        try:
            _cuda.probe(0, n_bytes=64 << 20, budget_bytes=48 << 20)
        except QInferError as error:
            result["error"] = f"{type(error).__name__}: {error}"
        result["left"] = left() - before
        _cuda.probe(0, n_bytes=64 << 20, budget_bytes=64 << 20)
    """)
    )
    found = run_on(standin, code, tmp_path)
    assert found["error"].startswith("OutOfMemory: no GPU memory for a probe's output: 32.0 MiB")
    assert "16.0 MiB are left of the budget of 48.0 MiB" in found["error"]
    assert found["left"] == 0


def test_a_card_that_is_full_is_an_error_with_numbers(standin: Path, tmp_path: Path) -> None:
    code = (
        COUNTS
        + PROBE
        + textwrap.dedent("""
        try:
            _cuda.probe(0, n_bytes=1 << 40)
        except QInferError as error:
            result["error"] = f"{type(error).__name__}: {error}"
        result["left"] = left()
        result["again"] = _cuda.probe(0).kernel_origin
    """)
    )
    found = run_on(standin, code, tmp_path)
    assert found["error"].startswith("OutOfMemory: no GPU memory for a probe's input: 524288.0 MiB")
    assert re.search(r"[\d.]+ MiB are free of the card's [\d.]+ MiB", found["error"])
    assert (found["left"], found["again"]) == (0, "cached")


# What a probe does, in the words of its errors.
STEPS = (
    "counting GPUs",
    "opening a context",
    "entering its context",
    "a probe's input",
    "a probe's output",
    "pinn",
    "mapping pinned memory",
    "loading the kernels of 'probe.cu'",
    "looking for the kernel probe",
    "making a stream",
    "making an event",
    "copying to the GPU",
    "recording an event",
    "letting a stream wait",
    "launching the kernel probe",
    "copying from the GPU",
    "computing",
    "beginning to record a graph",
    "recording a graph",
    "making a graph ready",
    "replaying a graph",
)


@pytest.mark.parametrize(("code", "kind"), [(2, "OutOfMemory"), (999, "DeviceError")])
def test_a_failure_at_any_call_is_an_error_that_leaves_nothing(
    code: int, kind: str, standin: Path, tmp_path: Path
) -> None:
    program = (
        COUNTS
        + PROBE
        + textwrap.dedent(f"""
        before = standin.standin_calls()
        _cuda.probe(0)
        result["calls"] = standin.standin_calls() - before
        result["errors"], result["left"] = [], left()
        for n in range(1, result["calls"] + 1):
            fail_at(n, {code})
            try:
                _cuda.probe(0)
                result["errors"].append("")
            except QInferError as error:
                result["errors"].append(f"{{type(error).__name__}}: {{error}}")
            fail_at(0, 0)
            result["left"] += left()
        result["again"] = _cuda.probe(0).kernel_origin
    """)
    )
    found = run_on(standin, program, tmp_path)
    assert found["left"] == 0
    assert found["again"] == "cached"
    assert found["calls"] > 30
    failed = [error for error in found["errors"] if error]
    kinds = {error.partition(":")[0] for error in failed}
    assert kind in kinds <= {kind, "DeviceError"}
    for step in STEPS:
        assert any(step in error for error in failed), step


@pytest.mark.parametrize("how", ["standin.standin_kill()", "fail_at(40, 719)"])
def test_a_lost_device_is_an_error_and_no_hang(how: str, standin: Path, tmp_path: Path) -> None:
    code = (
        COUNTS
        + PROBE
        + textwrap.dedent(f"""
        {how}
        for name in ("error", "later"):
            try:
                _cuda.probe(0)
            except QInferError as error:
                result[name] = f"{{type(error).__name__}}: {{error}}"
    """)
    )
    found = run_on(standin, code, tmp_path)
    assert found["error"].startswith("DeviceError: ")


def test_the_doctor_shows_a_gpu_that_computes(standin: Path, tmp_path: Path) -> None:
    code = "from qinfer import doctor; result['rows'] = doctor.findings()"
    libraries = ("libnvrtc.so.13", "libcublas.so.13")
    rows = dict(run_on(standin, code, tmp_path, libraries=libraries)["rows"])
    after = "after its kernels have been tested with the first model"
    assert rows["CUDA"] == f"GPU 0 computes and is used, {after}"
    assert re.search(r"compute capability 9\.0, .*GiB free of .*computes", rows["  GPU 0"])
    assert rows["  driver"] == "for CUDA 13.0"
    assert re.match(r"1[23]\.\d+, /", rows["  NVRTC"])
    assert re.match(r"1[23]\.\d+, /", rows["  cuBLAS"])


def test_the_doctor_shows_what_auto_found(standin: Path, tmp_path: Path) -> None:
    """Kernels that failed their test keep it from the GPU, which it takes no other for."""
    code = textwrap.dedent("""
        from qinfer import _cuda_check, doctor
        def note(**verdicts):
            known = {_cuda_check._of_gpu(0) + name: why for name, why in verdicts.items()}
            _cuda_check.notes().write_text(json.dumps(known))
            return dict(doctor.findings())
        result["right"] = note(Q4_0="")
        result["wrong"] = note(Q4_0="", F16="2 of 9 kernel tests fail")
        result["second"] = doctor._verdict([1])
    """)
    libraries = ("libnvrtc.so.13", "libcublas.so.13")
    found = run_on(standin, code, tmp_path, libraries=libraries)
    assert found["right"]["CUDA"] == "GPU 0 computes and is used"
    assert "not used" not in found["right"]["  GPU 0"]
    assert found["wrong"]["CUDA"] == "GPU 0 computes, but not all of it right (see below)"
    why = "; not used without --device for weights of F16: 2 of 9 kernel tests fail (as "
    assert why in found["wrong"]["  GPU 0"]
    assert str(tmp_path / "gpu-checked.json") in found["wrong"]["  GPU 0"]
    assert found["second"].startswith("GPU 1 computes, for --device cuda:1; without the option")


@pytest.mark.parametrize("delay", ["0", "2000"])
def test_late_streams_change_nothing(delay: str, standin: Path, tmp_path: Path) -> None:
    found = run_on(standin, PROBE, tmp_path, STANDIN_DELAY_US=delay, STANDIN_SEED="5")
    assert found.get("error") is None
