"""NVIDIA GPUs: where CUDA's libraries lie in this Python, and what the runtime makes of them."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ._alias import cache_folder
from ._native import Handle, check, ffi, lib, new_error, text
from .errors import DeviceError, OutOfMemory

# Where NVIDIA's wheels keep libraries, below the namespace package they share: CUDA 13's all in
# one folder, CUDA 12's in one per component.
_WHEEL_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib", "cublas/lib")

_ORIGINS = {
    lib.QI_KERNEL_EMBEDDED: "embedded",
    lib.QI_KERNEL_CACHED: "cached",
    lib.QI_KERNEL_COMPILED: "compiled",
}


@dataclass(frozen=True, slots=True)
class Component:
    """A part of CUDA: its version ("12.9") and file, or the problem that keeps it from use."""

    version: str
    path: str
    problem: str


@dataclass(frozen=True, slots=True)
class Cuda:
    """What there is of CUDA; versions and paths are empty for what cannot be used."""

    built: bool
    n_embedded_cubins: int
    n_devices: int
    driver: Component
    nvrtc: Component
    cublas: Component


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver describes it."""

    number: int
    name: str
    uuid: str
    compute_capability: tuple[int, int]
    n_sm: int
    memory_bytes: int
    l2_bytes: int
    memory_bandwidth: float  # bytes per second in theory; 0: not known


@dataclass(frozen=True, slots=True)
class Probe:
    """What a small computation found: where its kernel came from, and how long it took."""

    free_bytes: int
    kernel_origin: str  # "embedded", "cached" or "compiled"
    compile_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SelfTest:
    """A kernel's largest difference from the processor, in multiples of what rounding explains."""

    name: str
    error: float
    tolerance: float
    n_values: int  # compared
    passed: bool
    seconds: float
    problem: str  # what kept the kernel from running; empty where nothing did
    lacked_memory: bool = False  # which is what kept it


def library_folders() -> list[Path]:
    """Folders of NVIDIA's wheels that are installed for this Python."""
    try:
        found = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):  # something else goes by that name
        return []
    places = found.submodule_search_locations if found else None
    folders = [Path(place, name) for place in places or () for name in _WHEEL_FOLDERS]
    return [folder.resolve() for folder in folders if folder.is_dir()]


@functools.cache
def configure() -> None:
    """Tells the runtime, once, where to look for libraries and where to keep compiled kernels."""
    folders = [str(folder).encode("utf-8", "surrogateescape") for folder in library_folders()]
    offsets = list(accumulate(map(len, folders), initial=0))
    cache = str((cache_folder() / "kernels").absolute()).encode("utf-8", "surrogateescape")
    error = new_error()
    status = lib.qi_cuda_configure(
        b"".join(folders), offsets, len(folders), cache, len(cache), error
    )
    check(status, error)


def info() -> Cuda:
    """What there is of CUDA; loads the driver and the libraries, and starts nothing on a GPU."""
    configure()
    out = ffi.new("qi_cuda_info *")
    error = new_error()
    check(lib.qi_cuda_get_info(out, error), error)
    return Cuda(
        built=bool(out.built),
        n_embedded_cubins=out.n_embedded_cubins,
        n_devices=out.n_devices,
        driver=Component(_version(out.driver_version), "", text(out.driver_problem)),
        nvrtc=Component(_version(out.nvrtc_version), text(out.nvrtc_path), text(out.nvrtc_problem)),
        cublas=Component(
            _version(out.cublas_version), text(out.cublas_path), text(out.cublas_problem)
        ),
    )


def gpu(number: int) -> Gpu:
    """The visible GPU of that number, from 0; DeviceError when there are fewer."""
    configure()
    out = ffi.new("qi_cuda_device_info *")
    error = new_error()
    check(lib.qi_cuda_get_device_info(number, out, error), error)
    return Gpu(
        number=number,
        name=text(out.name),
        uuid=text(out.uuid),
        compute_capability=(out.compute_major, out.compute_minor),
        n_sm=out.n_sm,
        memory_bytes=out.memory_bytes,
        l2_bytes=out.l2_bytes,
        memory_bandwidth=out.memory_bandwidth,
    )


def probe(number: int, *, n_bytes: int = 1 << 20, budget_bytes: int = 0) -> Probe:
    """Lets a GPU compute something small in `n_bytes` of its memory, and checks the result.

    `budget_bytes` limits what may be allocated; 0: no limit. Raises DeviceError or OutOfMemory.
    """
    configure()
    out = ffi.new("qi_cuda_probe *")
    error = new_error()
    check(lib.qi_cuda_run_probe(number, n_bytes, budget_bytes, out, error), error)
    return Probe(
        free_bytes=out.free_bytes,
        kernel_origin=_ORIGINS[out.kernel_origin],
        compile_seconds=out.compile_seconds,
        seconds=out.seconds,
    )


def read_bandwidth(number: int, n_bytes: int = 1 << 30) -> float:
    """Bytes per second at which a kernel reads a GPU's memory."""
    error = new_error()
    out = ffi.new("double *")
    gpu = _open(number)
    check(lib.qi_cuda_measure_read_bandwidth(gpu.pointer, n_bytes, out, error), error)
    return float(out[0])


def launch_seconds(number: int) -> float:
    """What a kernel costs in a graph of many that do nothing."""
    error = new_error()
    out = ffi.new("double *")
    check(lib.qi_cuda_measure_launch_seconds(_open(number).pointer, out, error), error)
    return float(out[0])


def self_test_names() -> list[str]:
    """The kernels' tests; none where the runtime was built without CUDA."""
    names = []
    name = ffi.new("char[120]")
    for number in range(lib.qi_cuda_n_self_tests()):
        error = new_error()
        check(lib.qi_cuda_get_self_test_name(number, name, len(name), error), error)
        names.append(text(name))
    return names


def self_tests(device: int = 0, numbers: Iterable[int] | None = None) -> Iterator[SelfTest]:
    """Runs the kernels' tests of those numbers, or all, one after the other.

    A test that cannot run has failed, with its problem; DeviceError is raised where there is no GPU
    of that number.
    """
    gpu = _open(device)
    for number in range(lib.qi_cuda_n_self_tests()) if numbers is None else numbers:
        out = ffi.new("qi_cuda_self_test *")
        error = new_error()
        try:
            check(lib.qi_cuda_run_self_test(gpu.pointer, number, out, error), error)
        except (DeviceError, OutOfMemory) as problem:
            name = self_test_names()[number]
            lacked_memory = isinstance(problem, OutOfMemory)
            yield SelfTest(name, math.inf, 0.0, 0, False, 0.0, str(problem), lacked_memory)
        else:
            yield SelfTest(
                name=text(out.name),
                error=out.error,
                tolerance=out.tolerance,
                n_values=out.n_values,
                passed=bool(out.passed),
                seconds=out.seconds,
                problem="",
            )


def _open(number: int) -> Handle:
    configure()
    out = ffi.new("qi_cuda_gpu **")
    error = new_error()
    check(lib.qi_cuda_open(number, out, error), error)
    return Handle(out[0], lib.qi_cuda_close, f"GPU {number}")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""
