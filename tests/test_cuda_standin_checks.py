"""The stand-in for NVIDIA's libraries checks, counts and fails where a backend would notice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from cuda_standin import on_standin, run_program

# ---- checks ----


@on_standin()
def test_arguments_are_checked() -> None:
    import client as cu
    import numpy as np

    out = cu.c_uint64()
    cu.raises(cu.NOT_INITIALIZED, "cuDeviceGetCount", cu.byref(out))
    cu.call("cuInit", 0)
    cu.raises(cu.INVALID_CONTEXT, "cuMemAlloc_v2", cu.byref(out), 64)
    cu.raises(cu.INVALID_DEVICE, "cuDeviceGet", cu.byref(out), 1)
    cu.start()
    module = cu.Module(cu.SAXPY)
    device = cu.allocate(100)
    lane = cu.stream()

    cu.raises(cu.INVALID_VALUE, "cuMemAlloc_v2", cu.byref(out), 0)
    cu.raises(cu.INVALID_VALUE, "cuMemAlloc_v2", None, 64)
    cu.raises(cu.OUT_OF_MEMORY, "cuMemAlloc_v2", cu.byref(out), 2 << 30)
    host = np.zeros(200, np.uint8)
    cu.raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", device, host.ctypes.data, 101)
    cu.raises(cu.INVALID_VALUE, "cuMemcpyDtoH_v2", host.ctypes.data, device.value + 1, 100)
    cu.raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", host.ctypes.data, host.ctypes.data, 10)
    cu.raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", device, device, 10)
    cu.raises(cu.INVALID_VALUE, "cuMemsetD32Async", device.value + 1, cu.c_int(0), 1, lane)
    cu.raises(cu.INVALID_HANDLE, "cuStreamSynchronize", 0xDEAD)
    cu.raises(cu.NOT_FOUND, "cuModuleGetFunction", cu.byref(out), module.handle, b"nothing")
    cu.raises(cu.INVALID_IMAGE, "cuModuleLoadData", cu.byref(out), b"no image" * 20)
    cubin = bytearray(cu.compile_cubin(cu.SAXPY))
    cubin[len(cubin) // 2] ^= 1
    cu.raises(cu.INVALID_IMAGE, "cuModuleLoadData", cu.byref(out), bytes(cubin))
    other = cu.compile_cubin(cu.SAXPY, arch="sm_80")
    cu.raises(cu.NO_BINARY_FOR_GPU, "cuModuleLoadData", cu.byref(out), other)

    arguments = (device, device, 1.0, 4)
    limits = [
        {"block": 1025},
        {"block": (1, 1, 65)},
        {"block": (32, 33, 1)},
        {"block": 0},
        {"grid": (1, 65536, 1)},
        {"grid": 0},
        {"grid": 1 << 31},
        {"shared": 48 * 1024 + 1},
    ]
    for limit in limits:
        assert module.code("saxpy", *arguments, **limit) == cu.INVALID_VALUE, limit
    function = module.function("saxpy")
    cu.raises(cu.INVALID_VALUE, "cuFuncSetAttribute", function, 8, 227 * 1024 + 1)
    cu.call("cuFuncSetAttribute", function, 8, 100 * 1024)
    module.launch("saxpy", *arguments, shared=100 * 1024, stream=lane)
    cu.synchronize(lane)

    cu.call("cuMemFree_v2", device)
    cu.raises(cu.INVALID_VALUE, "cuMemFree_v2", device)
    cu.raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", device, host.ctypes.data, 10)
    cu.call("cuStreamDestroy_v2", lane)
    cu.raises(cu.INVALID_HANDLE, "cuStreamDestroy_v2", lane)
    assert module.code("saxpy", *arguments, stream=lane) == cu.INVALID_HANDLE
    cu.call("cuModuleUnload", module.handle)
    cu.raises(cu.INVALID_HANDLE, "cuModuleUnload", module.handle)


@on_standin()
def test_launch_bounds_limit_a_block() -> None:
    import client as cu

    cu.start()
    module = cu.Module("""
#define THREADS 128
extern "C" __global__ void __launch_bounds__(THREADS, 2) bounded(int* out) { *out = 1; }
""")
    out = cu.allocate(4)
    assert module.code("bounded", out, block=129) == cu.INVALID_VALUE
    module.launch("bounded", out, block=128)
    value = cu.c_int()
    cu.call("cuFuncGetAttribute", cu.byref(value), 0, module.function("bounded"))
    assert value.value == 128
    cu.synchronize()


@on_standin()
def test_what_queued_work_uses_cannot_be_taken_away() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(cu.SPIN)
    flag = cu.pinned(1)
    flag[0] = 0
    out, lane = cu.allocate(4), cu.stream()
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, out, stream=lane)
    cu.raises(cu.ILLEGAL_STATE, "cuMemFree_v2", out)
    cu.raises(cu.ILLEGAL_STATE, "cuMemFreeHost", flag.ctypes.data)
    cu.raises(cu.ILLEGAL_STATE, "cuModuleUnload", module.handle)
    assert "may still run" in cu.report()
    cu.call("cuStreamDestroy_v2", lane)  # allowed: what is queued still runs
    flag[0] = 1
    cu.call("cuCtxSynchronize")
    deadline = time.monotonic() + 10
    while cu.download(out, np.empty(1, np.int32))[0] != 1:
        assert time.monotonic() < deadline
    cu.call("cuMemFree_v2", out)
    cu.call("cuMemFreeHost", flag.ctypes.data)
    cu.call("cuModuleUnload", module.handle)


@on_standin()
def test_registered_memory_is_pinned_in_place() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(cu.SPIN)
    host = np.arange(5000, dtype=np.int32)
    at = host.ctypes.data
    cu.call("cuMemHostRegister_v2", at, host.nbytes, 2)
    cu.raises(cu.ALREADY_REGISTERED, "cuMemHostRegister_v2", at + 64, 64, 2)
    np.testing.assert_array_equal(host, np.arange(5000))
    address = cu.Address(cu.made("cuMemHostGetDevicePointer_v2", at, 0))
    host[0] = 7
    lane = cu.stream()
    module.launch("wait_for", address, 7, cu.Address(address.value + 40), stream=lane)
    cu.synchronize(lane)
    assert host[10] == 7
    assert cu.live_objects()["pinned_bytes"] == host.nbytes
    cu.call("cuMemHostUnregister", at)
    cu.raises(cu.NOT_REGISTERED, "cuMemHostUnregister", at)
    assert host[0] == host[10] == 7 and host[4999] == 4999
    host[1] = 3
    assert cu.live_objects()["pinned_bytes"] == 0


# ---- devices and contexts ----


@on_standin(capability=75, devices=3, driver_version=12090, memory=64 << 20)
def test_settings_describe_the_device() -> None:
    import client as cu

    version, count, value = cu.c_int(), cu.c_int(), cu.c_int()
    cu.call("cuDriverGetVersion", cu.byref(version))
    context = cu.start(2)
    cu.call("cuDeviceGetCount", cu.byref(count))
    assert (version.value, count.value) == (12090, 3)
    for attribute, expected in ((75, 7), (76, 5), (97, 64 << 10), (39, 1024), (10, 32)):
        cu.call("cuDeviceGetAttribute", cu.byref(value), cu.c_int(attribute), 2)
        assert value.value == expected, attribute
    free, total = cu.c_size_t(), cu.c_size_t()
    cu.call("cuMemGetInfo_v2", cu.byref(free), cu.byref(total))
    assert total.value == 64 << 20 and (32 << 20) < free.value < (64 << 20)
    cu.allocate(free.value)
    cu.raises(cu.OUT_OF_MEMORY, "cuMemAlloc_v2", cu.byref(cu.c_uint64()), 1)
    current = cu.made("cuCtxGetCurrent")
    assert current == context
    first = cu.start(0)  # another device's memory is its own
    assert first != context
    cu.allocate(free.value)
    lane = cu.stream()
    cu.call("cuCtxSetCurrent", context)
    cu.raises(cu.INVALID_HANDLE, "cuStreamSynchronize", lane)  # a stream of the other's


@on_standin()
def test_a_program_can_make_its_streams_late() -> None:
    import client as cu

    cu.start()
    lane, device = cu.stream(), cu.allocate(64)
    assert cu.CUDA.standin_set(b"delay_us", cu.c_uint64(100_000))
    assert cu.CUDA.standin_set(b"seed", cu.c_uint64(2))
    assert not cu.CUDA.standin_set(b"capability", cu.c_uint64(80))
    for _ in range(4):
        cu.call("cuMemsetD8Async", device, cu.c_int(0), 64, lane)
    assert cu.code_of("cuStreamQuery", lane) == cu.NOT_READY
    assert cu.CUDA.standin_set(b"delay_us", cu.c_uint64(0))
    cu.synchronize(lane)


@on_standin()
def test_a_program_can_make_clocks_run_faster() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(
        """
        extern "C" __global__ void doze(long long* taken) {
            const long long start = clock64();
            for (int i = 0; i < 1000; ++i) __nanosleep(1000);
            *taken = clock64() - start;
        }"""
    )
    out = cu.allocate(8)
    taken = []
    for rate in (1, 10**6, 1):
        assert cu.CUDA.standin_set(b"clock_rate", cu.c_uint64(rate))
        module.launch("doze", out)
        taken.append(int(cu.download(out, np.zeros(1, np.int64))[0]))
    assert taken[1] > 100 * max(taken[0], taken[2]) > 0


def test_visible_devices_are_chosen_as_the_driver_does() -> None:
    code = """
import client as cu
status = cu.code_of("cuInit", 0)
count = cu.c_int()
names = []
if status == 0:
    cu.call("cuDeviceGetCount", cu.byref(count))
    for i in range(count.value):
        name = cu.ctypes.create_string_buffer(64)
        cu.call("cuDeviceGetName", name, cu.c_int(64), i)
        names.append(name.value.decode()[-1])
print(status, "".join(names))
"""
    prefix = "GPU-" + b"stan".hex()
    expected = {
        "0,1,2": "0 012",
        "2,0": "0 20",
        "1,-1,0": "0 1",
        "0,7,1": "0 0",
        "": "100 ",
        "-1": "100 ",
        "1,1": "100 ",
        prefix: "100 ",  # of all three devices: ambiguous
        f"{prefix}-642d-696e-2047-505520303002": "0 2",
    }
    for visible, result in expected.items():
        done = run_program(code, devices=3, variables={"CUDA_VISIBLE_DEVICES": visible})
        assert done.stdout == result + "\n", (visible, done.stdout, done.stderr)


@on_standin()
def test_a_forked_child_is_not_initialised() -> None:
    import client as cu

    cu.start()
    child = os.fork()
    if child == 0:
        os._exit(cu.code_of("cuMemAlloc_v2", cu.byref(cu.c_uint64()), 64))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == cu.NOT_INITIALIZED
    cu.allocate(64)  # the parent goes on


@on_standin()
def test_host_code_cannot_follow_a_device_pointer() -> None:
    import client as cu

    cu.start()
    address = cu.allocate(64).value
    child = os.fork()
    if child == 0:
        cu.ctypes.string_at(address, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV


# ---- counts and failures ----


@on_standin()
def test_everything_that_is_made_is_counted() -> None:
    import client as cu

    context = cu.start()
    empty = cu.live_objects()
    device = cu.allocate(1000)
    assert cu.CUDA.standin_allocated() == 1000
    module, lane, event = cu.Module(cu.SAXPY), cu.stream(), cu.made("cuEventCreate", 0)
    host = cu.pinned(100)
    counts = cu.live_objects()
    for name, value in (("modules", 1), ("streams", 1), ("events", 1), ("pinned_bytes", 400)):
        assert counts[name] - empty[name] == value
    cu.call("cuMemFree_v2", device)
    cu.call("cuModuleUnload", module.handle)
    cu.call("cuStreamDestroy_v2", lane)
    cu.call("cuEventDestroy_v2", event)
    cu.call("cuMemFreeHost", host.ctypes.data)
    assert cu.live_objects() == empty and cu.CUDA.standin_allocated() == 0
    # What is left goes with the context.
    cu.allocate(64)
    cu.stream()
    cu.call("cuCtxPopCurrent_v2", cu.byref(cu.c_void_p(context)))
    cu.call("cuDevicePrimaryCtxRelease_v2", 0)
    assert cu.CUDA.standin_allocated() == 0
    assert set(cu.live_objects().values()) == {0}
    cu.start()
    cu.allocate(64)


@on_standin()
def test_a_chosen_call_fails() -> None:
    import client as cu

    cu.start()
    before = cu.CUDA.standin_calls()
    pointer = cu.c_uint64()
    cu.call("cuMemAlloc_v2", cu.byref(pointer), 64)
    assert cu.CUDA.standin_calls() == before + 1
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(2), cu.OUT_OF_MEMORY)
    cu.call("cuMemFree_v2", pointer)
    cu.raises(cu.OUT_OF_MEMORY, "cuMemAlloc_v2", cu.byref(pointer), 64)
    assert cu.CUDA.standin_allocated() == 0
    cu.call("cuMemAlloc_v2", cu.byref(pointer), 64)  # once only
    # A release does its work and says so too.
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.UNKNOWN)
    cu.raises(cu.UNKNOWN, "cuMemFree_v2", pointer)
    assert cu.CUDA.standin_allocated() == 0
    # NVRTC's calls are counted along.
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.OUT_OF_MEMORY)
    major, minor = cu.c_int(), cu.c_int()
    assert cu.NVRTC.nvrtcVersion(cu.byref(major), cu.byref(minor)) == 1
    assert cu.NVRTC.nvrtcVersion(cu.byref(major), cu.byref(minor)) == 0 and major.value == 13
    # A device error stays.
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.ILLEGAL_ADDRESS)
    cu.raises(cu.ILLEGAL_ADDRESS, "cuCtxSynchronize")
    cu.raises(cu.ILLEGAL_ADDRESS, "cuMemAlloc_v2", cu.byref(pointer), 64)


@on_standin()
def test_every_call_of_a_program_can_fail_without_a_leak() -> None:
    import client as cu
    import numpy as np

    def work() -> None:
        """Everything is released, whatever fails; a release that fails has released."""
        undo: list[tuple[str, object]] = []
        try:
            context = cu.made("cuDevicePrimaryCtxRetain", 0)
            undo.append(("cuDevicePrimaryCtxRelease_v2", 0))
            cu.call("cuCtxSetCurrent", context)
            x = cu.Address()
            cu.call("cuMemAlloc_v2", cu.byref(x), 64)
            undo.append(("cuMemFree_v2", x))
            lane = cu.stream()
            undo.append(("cuStreamDestroy_v2", lane))
            host = cu.made("cuMemHostAlloc", 64, 2)
            undo.append(("cuMemFreeHost", host))
            module = cu.made("cuModuleLoadData", cubin)
            undo.append(("cuModuleUnload", module))
            cu.call("cuMemsetD8Async", x, cu.c_int(0), 64, lane)
            cu.call("cuStreamBeginCapture_v2", lane, 0)
            graph = cu.c_void_p()
            try:
                cu.call("cuMemcpyDtoHAsync_v2", host, x, 64, lane)
            finally:
                code = cu.code_of("cuStreamEndCapture", lane, cu.byref(graph))
                if graph.value:
                    undo.append(("cuGraphDestroy", graph))
            if code:
                raise cu.CudaError("cuStreamEndCapture", code)
            executable = cu.made("cuGraphInstantiateWithFlags", graph, 0)
            undo.append(("cuGraphExecDestroy", executable))
            cu.call("cuGraphLaunch", executable, lane)
            cu.synchronize(lane)
            assert not np.ctypeslib.as_array((cu.ctypes.c_char * 64).from_address(host)).any()
        finally:
            failures = [cu.code_of("cuCtxSynchronize")] if undo else []
            failures += [cu.code_of(name, handle) for name, handle in reversed(undo)]
        assert not any(failures)

    cubin = cu.compile_cubin(cu.SAXPY)
    cu.call("cuInit", 0)
    failed = 0
    for n in range(1, 100):
        cu.CUDA.standin_fail_at(cu.ctypes.c_int64(n), cu.OUT_OF_MEMORY)
        before = cu.CUDA.standin_calls()
        try:
            work()
        except (cu.CudaError, AssertionError):
            failed += 1
        assert set(cu.live_objects().values()) == {0}, n
        assert cu.CUDA.standin_allocated() == 0, n
        if cu.CUDA.standin_calls() - before < n:
            break
    assert failed == n - 1 > 15


CRASHES = {
    "*(int*)0x10 = 1": ("ILLEGAL_ADDRESS", "address 0x10"),
    "out[1024] = 1": ("ILLEGAL_ADDRESS", "behind the start of 256 bytes"),
    "*(float2*)(out + 1) = float2{}": ("MISALIGNED_ADDRESS", "test.cu:3"),
    "__shared__ int s[4]; s[n] = 1; *out = s[n - 1]": ("ILLEGAL_ADDRESS", "index 40"),
    "extern __shared__ int d[]; d[n] = 1": ("ILLEGAL_ADDRESS", "address"),
    "__trap()": ("LAUNCH_FAILED", "trapped"),
    "if (threadIdx.x) __syncthreads(); else __syncwarp()": ("LAUNCH_FAILED", "deadlock"),
    "if (threadIdx.x) __shfl_sync(~0u, n, 0)": ("LAUNCH_FAILED", "has ended"),
    "if (threadIdx.x % 2) __ballot_sync(0x55555555, 1)": ("LAUNCH_FAILED", "leaves it out"),
    "if (threadIdx.x % 2) __syncwarp(); else __ballot_sync(~0u, 1)": (
        "LAUNCH_FAILED",
        "different collectives",
    ),
    "*out = n / (n - 40)": ("LAUNCH_FAILED", "division"),
    "volatile int big[20000]; for (int i = 0; i < 20000; i++) big[i] = i": (
        "LAUNCH_FAILED",
        "stack",
    ),
    "while (*(volatile int*)out != 5) qi_standin_yield()": ("LAUNCH_TIMEOUT", "watchdog"),
}


def test_a_crash_is_reported_and_stays() -> None:
    code = """
import sys
import client as cu
cu.start()
body, name, words = sys.stdin.read().split("|")
module = cu.Module('''
extern "C" __global__ void crash(int* out, int n) {
    %s;
}''' % body)
out, lane = cu.allocate(256), cu.stream()
module.launch("crash", out, 40, block=32, stream=lane)
code = getattr(cu, name)
for call in ("cuStreamSynchronize", "cuStreamQuery", "cuStreamDestroy_v2"):
    assert cu.code_of(call, lane) == code, (call, cu.code_of(call, lane), cu.report())
assert cu.code_of("cuMemAlloc_v2", cu.byref(out), 64) == code
assert cu.code_of("cuMemFree_v2", out) == code
assert words in cu.report(), cu.report()
assert "watchdog" in words or "kernel crash, block (0,0,0)" in cu.report(), cu.report()
assert cu.code_of("cuDevicePrimaryCtxRelease_v2", 0) == code
assert cu.CUDA.standin_allocated() == 0
"""
    for body, (name, words) in CRASHES.items():
        program = f"import io, sys; sys.stdin = io.StringIO({'|'.join([body, name, words])!r})\n"
        done = run_program(program + code, watchdog_ms=300)
        assert done.returncode == 0, (body, done.stdout, done.stderr)


@on_standin()
def test_use_after_free_is_named() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(cu.SAXPY)
    x = cu.upload(np.ones(4, np.float32))
    cu.call("cuMemFree_v2", x)
    module.launch("saxpy", cu.allocate(16), x, 1.0, 4, block=4)
    cu.raises(cu.ILLEGAL_ADDRESS, "cuCtxSynchronize")
    assert "freed device memory of 16 bytes" in cu.report()


@on_standin()
def test_freed_pinned_memory_is_out_of_a_kernels_reach() -> None:
    import client as cu

    cu.start()
    module = cu.Module(cu.SAXPY)
    host = cu.pinned(4, "float32")
    address = cu.Address(host.ctypes.data)
    host[:] = 1
    module.launch("saxpy", address, address, 1.0, 4, block=4)
    cu.synchronize()
    assert host.tolist() == [2] * 4
    cu.call("cuMemFreeHost", address)
    module.launch("saxpy", address, address, 1.0, 4, block=4)
    cu.raises(cu.ILLEGAL_ADDRESS, "cuCtxSynchronize")
    assert "pinned host memory" in cu.report()


@on_standin()
def test_a_lost_device_is_an_error_and_no_hang() -> None:
    import client as cu

    context = cu.start()
    module = cu.Module(cu.SPIN)
    flag = cu.pinned(1)
    flag[0] = 0
    lane = cu.stream()
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, cu.allocate(4), stream=lane)
    results: list[int] = []

    def wait() -> None:
        cu.call("cuCtxSetCurrent", context)
        results.append(cu.code_of("cuStreamSynchronize", lane))

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.02)
    cu.CUDA.standin_kill()
    waiter.join(10)
    assert results == [cu.UNKNOWN]
    cu.raises(cu.UNKNOWN, "cuMemAlloc_v2", cu.byref(cu.c_uint64()), 64)
    assert flag[0] == 0  # pinned memory is the host's still


def test_the_gpu_process_ends_with_its_host() -> None:
    code = """
import os
import client as cu
cu.start()
flag = cu.pinned(1)
flag[0] = 0
module = cu.Module(cu.SPIN)
module.launch("wait_for", cu.Address(flag.ctypes.data), 1, cu.allocate(4))
print(cu.CUDA.standin_process(), flush=True)
os.kill(os.getpid(), 9)
"""
    process = int(run_program(code).stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ENTRY_POINTS = """
cuInit cuDriverGetVersion cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDeviceGetUuid_v2
cuDeviceGetAttribute cuDeviceTotalMem_v2 cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2
cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuCtxSetCurrent cuCtxGetCurrent cuCtxSynchronize
cuMemGetInfo_v2 cuMemAlloc_v2 cuMemFree_v2 cuMemHostAlloc cuMemFreeHost
cuMemHostGetDevicePointer_v2 cuMemHostRegister_v2 cuMemHostUnregister cuMemcpyHtoD_v2
cuMemcpyDtoH_v2 cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemsetD8Async
cuMemsetD32Async cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2
cuStreamSynchronize cuStreamQuery cuStreamWaitEvent cuStreamWaitValue32_v2
cuStreamWriteValue32_v2 cuEventCreate cuEventRecord cuEventQuery cuEventSynchronize
cuEventElapsedTime cuEventDestroy_v2 cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
cuModuleGetFunction cuFuncGetAttribute cuFuncSetAttribute cuLaunchKernel
cuOccupancyMaxActiveBlocksPerMultiprocessor cuStreamBeginCapture_v2 cuStreamEndCapture
cuStreamIsCapturing cuGraphInstantiateWithFlags cuGraphLaunch cuGraphExecDestroy cuGraphDestroy
cuGetErrorName cuGetErrorString cuGetProcAddress_v2
"""


@on_standin()
def test_entry_points_are_found_by_base_name() -> None:
    import client as cu

    cu.call("cuInit", 0)
    for entry in ENTRY_POINTS.split():
        base, status, found = entry.partition("_v")[0], cu.c_int(), cu.c_void_p()
        cu.call("cuGetProcAddress_v2", base.encode(), cu.byref(found), 13000, 0, cu.byref(status))
        assert found.value == cu.ctypes.cast(getattr(cu.CUDA, entry), cu.c_void_p).value
        assert status.value == 0
    cu.raises(cu.NOT_FOUND, "cuGetProcAddress_v2", b"cuNothing", cu.byref(found), 13000, 0, None)
    name = cu.ctypes.c_char_p()
    cu.call("cuGetErrorName", 700, cu.byref(name))
    assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    cu.raises(cu.INVALID_VALUE, "cuGetErrorName", 12345, cu.byref(name))


# ---- NVRTC ----


@on_standin()
def test_programs_are_compiled_as_nvrtc_compiles_them() -> None:
    import client as cu

    def log_of(source: str, *options: str, arch: str = "sm_90") -> tuple[int, str]:
        try:
            cu.compile_cubin(source, *options, arch=arch)
        except cu.CompileError as error:
            return error.code, error.log
        return 0, ""

    code, log = log_of('extern "C" __global__ void f(int* x) {\n    *x = nothing;\n}')
    assert code == 6 and "test.cu:2:" in log and "nothing" in log
    assert log_of("#include <cstdint>\n")[0] == 6  # no headers of the host
    assert log_of("#error PLAIN", "-DX")[0] == 6
    assert log_of(
        "#if !defined(QI_PLAIN) || X != 3 || __CUDA_ARCH__ != 900\n#error\n#endif", "-DX=3"
    ) == (0, "")
    code, log = log_of("", "--unknown-option")
    assert code == 5 and "--unknown-option" in log
    assert log_of("", arch="sm_42")[0] == 5
    # Headers are those handed over.
    source = '#include "sub/a.cuh"\nextern "C" __global__ void f(int* x) { *x = A; }'
    assert cu.compile_cubin(source, headers={"sub/a.cuh": "#define A 3\n"})
    # Only extern "C" functions have names to ask for.
    cu.start()
    module = cu.Module('__global__ void hidden(int*) {}\nextern "C" __global__ void seen(int*) {}')
    cu.raises(
        cu.NOT_FOUND, "cuModuleGetFunction", cu.byref(cu.c_void_p()), module.handle, b"hidden"
    )
    module.function("seen")


@on_standin()
def test_libraries_of_both_versions_are_there() -> None:
    import client as cu

    for major, minor in ((12, 9), (13, 0)):
        nvrtc = cu.ctypes.CDLL(f"libnvrtc.so.{major}")
        blas = cu.ctypes.CDLL(f"libcublas.so.{major}")
        found = [cu.c_int() for _ in range(3)]
        assert nvrtc.nvrtcVersion(cu.byref(found[0]), cu.byref(found[1])) == 0
        assert blas.cublasGetProperty(0, cu.byref(found[2])) == 0
        assert [value.value for value in found] == [major, minor, major]
        assert nvrtc.nvrtcGetNumSupportedArchs(cu.byref(found[0])) == 0
        architectures = (cu.c_int * found[0].value)()
        assert nvrtc.nvrtcGetSupportedArchs(architectures) == 0
        assert {75, 80, 86, 89, 90, 100, 120} <= set(architectures)
        assert (70 in architectures) == (major == 12)


# ---- cuBLAS ----


@on_standin()
def test_matrix_products_in_all_orientations() -> None:
    import client as cu
    import numpy as np

    cu.start()
    blas = cu.ctypes.CDLL("libcublas.so.13")
    held = cu.CUDA.standin_allocated()
    handle = cu.c_void_p()
    assert blas.cublasCreate_v2(cu.byref(handle)) == 0
    assert cu.CUDA.standin_allocated() > held  # its workspace
    lane = cu.stream()
    assert blas.cublasSetStream_v2(handle, cu.c_void_p(lane)) == 0
    random = np.random.default_rng(2)
    m, n, k = 5, 7, 33

    def gemm(op_a: int, op_b: int, c_type: int, beta: float = 0.0, **changed: int) -> int:
        s = {"m": m, "n": n, "k": k, "ldc": m + 1} | changed
        lda, ldb = s.get("lda", k if op_a else m), n if op_b else k
        return int(
            blas.cublasGemmEx(
                handle, op_a, op_b, s["m"], s["n"], s["k"], cu.byref(cu.c_float(0.5)),
                da, 2, lda, db, 2, ldb, cu.byref(cu.c_float(beta)),
                dc, c_type, s["ldc"], 68, -1,
            )
        )  # fmt: skip

    for op_a in (0, 1):
        for op_b in (0, 1):
            a = random.standard_normal((m, k)).astype(np.float16)
            b = random.standard_normal((k, n)).astype(np.float16)
            # Column-major, so a transposed operand is stored by rows.
            da = cu.upload(np.ascontiguousarray(a if op_a else a.T))
            db = cu.upload(np.ascontiguousarray(b if op_b else b.T))
            for c_type, dtype in ((0, np.float32), (2, np.float16)):
                before = np.full((n, m + 1), 2, dtype)
                dc = cu.upload(before)
                assert gemm(op_a, op_b, c_type, beta=1.0) == 0
                cu.synchronize(lane)
                c = cu.download(dc, before)
                expected = 0.5 * a.astype(np.float64) @ b.astype(np.float64) + 2
                np.testing.assert_allclose(
                    c[:, :m].T, expected, rtol=1e-3 if dtype == np.float16 else 1e-5, atol=1e-5
                )
                assert (c[:, m] == 2).all()
    assert gemm(0, 0, 0, lda=m - 1) == 7
    assert gemm(0, 0, 0, m=-1) == 7
    assert gemm(0, 0, 14) == 15
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.OUT_OF_MEMORY)
    assert gemm(0, 0, 0) == 3
    dc = cu.allocate(n * (m + 1) * 4)  # not a number, and with beta 0 not read
    graph = cu.c_void_p()
    cu.call("cuStreamBeginCapture_v2", lane, 0)
    assert gemm(1, 1, 0) == 0
    cu.call("cuStreamEndCapture", lane, cu.byref(graph))
    assert np.isnan(cu.download(dc, np.empty((n, m + 1), np.float32))).all()
    cu.call("cuGraphLaunch", cu.made("cuGraphInstantiateWithFlags", graph, 0), lane)
    cu.synchronize(lane)
    assert np.isfinite(cu.download(dc, np.empty((n, m + 1), np.float32))[:, :m]).all()
    assert blas.cublasDestroy_v2(handle) == 0
    assert blas.cublasDestroy_v2(handle) == 1
