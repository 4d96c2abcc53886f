"""Calls the CUDA driver, NVRTC and cuBLAS through ctypes, as the stand-in's own tests do."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

import numpy as np

CUDA = ctypes.CDLL("libcuda.so.1")
NVRTC = ctypes.CDLL("libnvrtc.so.13")
CUDA.standin_report.restype = c_char_p
CUDA.standin_set.restype = ctypes.c_bool
for _name in ("standin_calls", "standin_allocated", "standin_live_objects"):
    getattr(CUDA, _name).restype = c_uint64

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
NO_DEVICE = 100
INVALID_DEVICE = 101
INVALID_IMAGE = 200
INVALID_CONTEXT = 201
NO_BINARY_FOR_GPU = 209
INVALID_HANDLE = 400
ILLEGAL_STATE = 401
NOT_FOUND = 500
NOT_READY = 600
ILLEGAL_ADDRESS = 700
LAUNCH_TIMEOUT = 702
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713
MISALIGNED_ADDRESS = 716
LAUNCH_FAILED = 719
CAPTURE_UNSUPPORTED = 900
CAPTURE_INVALIDATED = 901
CAPTURE_UNJOINED = 904
CAPTURE_ISOLATION = 905
CAPTURE_IMPLICIT = 906
CAPTURED_EVENT = 907
UNKNOWN = 999

NON_BLOCKING = 1


SAXPY = """
extern "C" __global__ void saxpy(float* y, const float* x, float a, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}
"""

SPIN = """
extern "C" __global__ void wait_for(volatile int* flag, int value, int* out) {
    while (*flag != value) qi_standin_yield();
    out[blockIdx.x] = value;
}
"""


class CudaError(Exception):
    """A driver call that did not return CUDA_SUCCESS."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} returned {code}: {CUDA.standin_report().decode()}")
        self.code = code


class CompileError(Exception):
    """NVRTC's code and log."""

    def __init__(self, code: int, log: str) -> None:
        super().__init__(log)
        self.code = code
        self.log = log


def code_of(name: str, *arguments: Any) -> int:
    """What a driver call returns. Plain integers are passed as 64 bits: pointers, sizes, flags."""
    return int(getattr(CUDA, name)(*(c_uint64(a) if isinstance(a, int) else a for a in arguments)))


def call(name: str, *arguments: Any) -> None:
    """A driver call that has to succeed."""
    if code := code_of(name, *arguments):
        raise CudaError(name, code)


def raises(code: int, name: str, *arguments: Any) -> None:
    """A driver call that has to fail with a code."""
    got = code_of(name, *arguments)
    assert got == code, f"{name} returned {got}, not {code}: {report()}"


def made(name: str, *arguments: Any) -> int:
    """The handle that a driver call writes to its first argument."""
    handle = c_void_p()
    call(name, byref(handle), *arguments)
    return handle.value or 0


def start(device: int = 0) -> int:
    """Initialises the driver and makes the device's primary context current."""
    call("cuInit", 0)
    context = made("cuDevicePrimaryCtxRetain", device)
    call("cuCtxPushCurrent_v2", context)
    return context


def compile_cubin(
    source: str, *options: str, headers: dict[str, str] | None = None, arch: str = "sm_90"
) -> bytes:
    """The cubin of a program, or CompileError."""
    program = c_void_p()
    names = list((headers or {}).items())
    texts = (c_char_p * len(names))(*(text.encode() for _, text in names))
    titles = (c_char_p * len(names))(*(name.encode() for name, _ in names))
    assert (
        NVRTC.nvrtcCreateProgram(
            byref(program), source.encode(), b"test.cu", len(names), texts, titles
        )
        == 0
    )
    words = [f"--gpu-architecture={arch}", "--std=c++17", *options]
    code = NVRTC.nvrtcCompileProgram(
        program, len(words), (c_char_p * len(words))(*(w.encode() for w in words))
    )
    size = c_size_t()
    assert NVRTC.nvrtcGetProgramLogSize(program, byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert NVRTC.nvrtcGetProgramLog(program, log) == 0
    if code:
        NVRTC.nvrtcDestroyProgram(byref(program))
        raise CompileError(code, log.value.decode())
    assert NVRTC.nvrtcGetCUBINSize(program, byref(size)) == 0
    cubin = ctypes.create_string_buffer(size.value)
    assert NVRTC.nvrtcGetCUBIN(program, cubin) == 0
    assert NVRTC.nvrtcDestroyProgram(byref(program)) == 0
    return cubin.raw


class Module:
    """A loaded program; its kernels are called by name."""

    def __init__(self, source: str, *options: str) -> None:
        self.handle = made("cuModuleLoadData", compile_cubin(source, *options))

    def function(self, name: str) -> int:
        return made("cuModuleGetFunction", self.handle, name.encode())

    def code(
        self,
        name: str,
        *arguments: Any,
        grid: int | tuple[int, int, int] = 1,
        block: int | tuple[int, int, int] = 1,
        shared: int = 0,
        stream: int = 0,
    ) -> int:
        """What launching a kernel returns. Integers are passed as int, addresses as Address."""
        values = [
            c_int(a) if type(a) is int else c_float(a) if isinstance(a, float) else a
            for a in arguments
        ]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        shape = [
            ctypes.c_uint(n)
            for size in (grid, block)
            for n in (size if isinstance(size, tuple) else (size, 1, 1))
        ]
        return int(
            CUDA.cuLaunchKernel(
                c_void_p(self.function(name)),
                *shape,
                ctypes.c_uint(shared),
                c_void_p(stream),
                pointers,
                None,
            )
        )

    def launch(self, name: str, *arguments: Any, **shape: Any) -> None:
        if code := self.code(name, *arguments, **shape):
            raise CudaError(name, code)


class Address(c_uint64):
    """A device address, as a kernel's argument and as a copy's end."""


def allocate(n_bytes: int) -> Address:
    address = Address()
    call("cuMemAlloc_v2", byref(address), n_bytes)
    return address


def upload(array: np.ndarray[Any, Any]) -> Address:
    address = allocate(array.nbytes)
    call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)
    return address


def download(address: Address, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result = np.empty_like(like)
    call("cuMemcpyDtoH_v2", result.ctypes.data, address, result.nbytes)
    return result


def pinned(count: int, dtype: Any = np.int32) -> np.ndarray[Any, Any]:
    """Pinned host memory, as an array."""
    n_bytes = count * np.dtype(dtype).itemsize
    address = made("cuMemHostAlloc", n_bytes, 2)
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype)


def stream(flags: int = NON_BLOCKING) -> int:
    return made("cuStreamCreate", ctypes.c_uint(flags))


def synchronize(handle: int = 0) -> None:
    call("cuStreamSynchronize", handle)


def live_objects() -> dict[str, int]:
    names = ("streams", "events", "modules", "graphs", "executables", "contexts", "pinned_bytes")
    counts = (c_uint64 * len(names))()
    CUDA.standin_live_objects(counts)
    return dict(zip(names, counts, strict=True))


def report() -> str:
    """The stand-in's words on the last crash or misuse."""
    return str(CUDA.standin_report().decode())
