"""The real NVRTC compiles every kernel for every architecture; no GPU is needed."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from package_build import ROOT, call_backend

sys.path.insert(0, str(ROOT / "build_backend"))

import cubins

# What the compiler's back end says of one kernel, with -v.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


# Some kernels for one token: loads that make up a unit (a block of 32, eight weights or values),
# and how many loops over units there are. Four units are on the way at a time.
ROUNDS = {
    "matvec.cu QI_WEIGHT=Q4_0": ("qi_matvec_1", 2, 1),
    "matvec.cu QI_WEIGHT=Q6_K": ("qi_matvec_1", 4, 1),
    "ffn.cu QI_WEIGHT=Q8_0": ("qi_ffn_1", 3, 2),
    "down.cu QI_WEIGHT=Q3_K": ("qi_down_1", 5, 1),
    "down.cu QI_WEIGHT=Q4_K": ("qi_down_1", 2, 1),
    "attend.cu QI_KV=KvQ8_0": ("qi_attend_1", 2, 1),
}


@pytest.fixture(scope="module")
def nvrtc() -> Path:
    try:
        return cubins.nvrtc_library()
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def nvdisasm() -> Path:
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        for path in Path(place).glob("cu*/bin/nvdisasm"):
            return path
    pytest.skip("nvdisasm is not installed here: pip install nvidia-cuda-nvdisasm")


def compiled(nvrtc: Path, jobs: list[cubins.Job]) -> Iterator[cubins.Result]:
    """The results of jobs that all succeed without a warning."""
    # Other test processes want their share of the cores.
    n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    n_processes = max(1, len(os.sched_getaffinity(0)) // n_workers)
    for result in cubins.compile_all(jobs, nvrtc, n_processes=n_processes):
        case = f"{result.job.unit} for sm_{result.job.architecture}"
        assert result.code, f"{case}:\n{result.log}"
        assert " warning" not in result.log, f"{case}:\n{result.log}"
        yield result


def test_every_kernel_compiles_for_every_architecture_without_spills(
    nvrtc: Path, record_property: Callable[[str, object], None]
) -> None:
    jobs = [
        cubins.Job(unit, architecture, ("--ptxas-options=-v",))
        for unit in cubins.units()
        for architecture in cubins.ARCHITECTURES
    ]
    table: dict[tuple[str, str], dict[int, str]] = {}
    spilling = []
    for result in compiled(nvrtc, jobs):
        unit, architecture = result.job.unit, result.job.architecture
        kernels = list(KERNEL.finditer(result.log))
        assert kernels, f"{unit} for sm_{architecture} has no kernel:\n{result.log}"
        for kernel in kernels:
            row = table.setdefault((unit, kernel["name"]), {})
            spilled = int(kernel["stores"]) + int(kernel["loads"])
            row[architecture] = kernel["registers"] + (f"+{spilled}B" if spilled else "")
            if spilled:
                spilling.append(f"{kernel['name']} of {unit}, sm_{architecture}: {spilled} bytes")
    lines = ["registers per thread (+ bytes spilled), by NVRTC 12.9"]
    lines.append(" " * 68 + "".join(f"{f'sm_{a}':>8}" for a in cubins.ARCHITECTURES))
    for (unit, name), row in table.items():
        cells = "".join(f"{row.get(a, '-'):>8}" for a in cubins.ARCHITECTURES)
        lines.append(f"{unit:<36}{name:<32}{cells}")
    record_property("table", "\n".join(lines))
    assert spilling == []


def stalls(assembly: str, kernel: str, per_round: int) -> tuple[int, list[str]]:
    """Rounds of streamed loads in a kernel, and instructions that wait for one inside a round."""
    body = assembly.partition(f".text.{kernel}:")[2].partition(".section")[0]
    code = re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", body)
    n_loads, waiting, arriving = 0, [], set[str]()
    for instruction in code:
        registers = re.findall(r"\bR\d+\b", instruction)
        if arriving & set(registers):
            waiting.append(instruction.strip())
        if "LDG" not in instruction or "STRONG.GPU" not in instruction:
            continue
        n_loads += 1
        width = 4 if ".128.STRONG" in instruction else 2 if ".64.STRONG" in instruction else 1
        first = int(registers[0][1:])
        arriving |= {f"R{first + i}" for i in range(width)}
        if n_loads % per_round == 0:
            arriving.clear()
    return n_loads // per_round if n_loads % per_round == 0 else -1, waiting


def test_one_token_has_a_round_of_loads_on_the_way_before_the_first_is_used(
    nvrtc: Path, nvdisasm: Path, tmp_path: Path
) -> None:
    for result in compiled(nvrtc, [cubins.Job(unit, 90) for unit in ROUNDS]):
        cubin = tmp_path / "unit.cubin"
        cubin.write_bytes(result.code)
        command = [str(nvdisasm), "-c", str(cubin)]
        assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kernel, unit_loads, n_loops = ROUNDS[result.job.unit]
        found = stalls(assembly, kernel, 4 * unit_loads)
        assert found == (n_loops, []), f"{kernel} of {result.job.unit}"


def test_the_plain_path_of_every_kernel_compiles(nvrtc: Path) -> None:
    """Of each file for one type, and of rows.cu, which decodes rows, for all."""
    oldest = min(cubins.ARCHITECTURES)
    of_files = {unit.split()[0]: unit for unit in cubins.units()}
    units = {*of_files.values(), *(u for u in cubins.units() if u.startswith("rows.cu"))}
    jobs = [cubins.Job(unit, oldest, ("-DQI_PLAIN",), ptx=True) for unit in sorted(units)]
    for result in compiled(nvrtc, jobs):
        assert b".visible .entry" in result.code


def test_every_kernel_file_is_in_a_unit() -> None:
    files = {path.name for path in cubins.KERNELS.glob("*.cu")}
    assert files
    assert {unit.split()[0] for unit in cubins.units()} == files


def test_units_are_named_once() -> None:
    assert len(cubins.units()) == len(set(cubins.units()))


def test_kernels_include_nothing_but_our_own_headers() -> None:
    for path in [*cubins.KERNELS.glob("*.cu"), *cubins.KERNELS.glob("*.cuh")]:
        for name in re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text("utf-8"), re.MULTILINE):
            assert (cubins.KERNELS / name.strip('"')).is_file(), f"{path.name} includes {name}"


def test_a_broken_kernel_is_an_error_with_the_compilers_words(nvrtc: Path, tmp_path: Path) -> None:
    (tmp_path / "units.txt").write_text("broken.cu QI_WEIGHT=Q4_0\n")
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void f() { int x = QI_WEIGHT; }\n')
    (result,) = cubins.compile_all([cubins.Job("broken.cu QI_WEIGHT=Q4_0", 86)], nvrtc, tmp_path)
    assert result.code == b""
    assert '"Q4_0" is undefined' in result.log


def test_embedded_cubins_are_in_the_object_byte_for_byte(nvrtc: Path, tmp_path: Path) -> None:
    architectures = (75, 120)
    cubins.write(tmp_path, [cubins.Job("probe.cu", a) for a in architectures], nvrtc)
    made = tmp_path / "cubins.o"
    sources = ROOT / "vendor/runtime/src"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-ffunction-sections", "-fdata-sections"]
    includes = [f"-I{sources}", f"-I{ROOT / 'vendor/runtime/include'}"]
    files = ["-c", str(tmp_path / "cubins.cpp"), "-o", str(made)]
    subprocess.run([*command, *includes, *files], check=True)
    content = made.read_bytes()
    images = [path.read_bytes() for path in sorted(tmp_path.glob("*.cubin"))]
    assert len(images) == len(set(images)) == len(architectures)
    for image in images:
        assert image.startswith(b"\x7fELF")
        assert image in content


def test_embedding_asks_for_the_compiler_and_nothing_else_does(tmp_path: Path) -> None:
    hook = "get_requires_for_build_wheel"

    def requirements(settings: dict[str, str]) -> list[str]:
        code = f"import qinfer_build; print('\\n'.join(qinfer_build.{hook}({settings!r})))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "build_backend")},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert "nvidia-cuda-nvrtc-cu12==12.9.*" in requirements({"cuda": "embed"})
    for settings in ({}, {"cuda": "jit"}, {"cuda": "off"}):
        assert not [name for name in requirements(settings) if "nvidia" in name]
    done = call_backend(ROOT, "build_wheel", tmp_path, {"cuda": "on"})
    assert done.returncode == 1
    assert done.stderr == "-Ccuda=on: the allowed values are off, jit, embed.\n"


def test_the_build_and_the_runtime_compile_alike() -> None:
    sources = ["build_backend/cubins.py", "vendor/runtime/src/device/cuda/nvrtc.cpp"]
    flag = re.compile(r'"(-default-device|--(?:std|fmad)=[^"]*)"')
    build, runtime = (flag.findall((ROOT / source).read_text("utf-8")) for source in sources)
    assert build == runtime
    assert len(build) == 3
