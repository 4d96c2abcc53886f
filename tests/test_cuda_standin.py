"""The stand-in for NVIDIA's libraries behaves as they do, where the CUDA backend would notice."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from cuda_standin import SOURCES, run_program

sys.path.insert(0, str(SOURCES))


def on_standin(**settings: object) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """The test runs in a process of its own: a driver is started once, and a crash is for good."""

    def decorate(program: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(program)
        def test() -> None:
            code = f"import test_cuda_standin as t; t.{program.__name__}.program()"
            folders = os.pathsep.join([str(SOURCES.parents[1]), str(SOURCES)])
            done = run_program(code, variables={"PYTHONPATH": folders}, **settings)
            assert done.returncode == 0, done.stdout + done.stderr

        test.program = program  # type: ignore[attr-defined]
        return test

    return decorate


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


def raises(code: int, name: str, *arguments: object) -> None:
    import client as cu

    assert cu.code_of(name, *arguments) == code, (name, cu.report())


# ---- kernels ----


@on_standin()
def test_a_kernel_adds_vectors() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(SAXPY)
    n = 100_003
    x = np.arange(n, dtype=np.float32)
    y = np.ones(n, np.float32)
    dx, dy = cu.upload(x), cu.upload(y)
    module.launch("saxpy", dy, dx, 2.0, n, grid=(n + 255) // 256, block=256)
    np.testing.assert_array_equal(cu.download(dy, y), 2 * x + 1)


@on_standin(seed=3, delay_us=300)
def test_the_same_with_everything_late_and_out_of_order() -> None:
    test_a_kernel_adds_vectors.program()  # type: ignore[attr-defined]
    test_a_block_reduces_through_shared_memory.program()  # type: ignore[attr-defined]
    test_lanes_exchange_values.program()  # type: ignore[attr-defined]


@on_standin()
def test_a_block_reduces_through_shared_memory() -> None:
    import client as cu
    import numpy as np

    if not cu.code_of("cuCtxSynchronize"):
        pass  # another test of this process has made a context
    else:
        cu.start()
    module = cu.Module("""
template <int N> __device__ float sum_of(const float* s) {
    float total = 0.0f;
    for (int i = 0; i < N; i++) total += s[i];
    return total;
}
extern "C" __global__ void fixed(const float* x, float* out) {
    __shared__ alignas(16) float s[256];
    s[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = sum_of<256>(s);
}
extern "C" __global__ void dynamic(const float* x, float* out) {
    extern __shared__ __align__(16) char raw[];
    float* s = reinterpret_cast<float*>(raw);
    s[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = s[0];
}
// What nobody wrote is not a number, in each block anew.
extern "C" __global__ void unwritten(float* out) {
    __shared__ float s[4];
    if (blockIdx.x == 0) s[1] = 7.0f;
    out[blockIdx.x] = s[1];
}
""")
    x = np.arange(8 * 256, dtype=np.float32)
    dx, out = cu.upload(x), cu.allocate(32)
    for name, shared in (("fixed", 0), ("dynamic", 1024)):
        module.launch(name, dx, out, grid=8, block=256, shared=shared)
        np.testing.assert_array_equal(
            cu.download(out, np.empty(8, np.float32)), x.reshape(8, 256).sum(axis=1)
        )
    module.launch("unwritten", out, grid=8)
    values = cu.download(out, np.empty(8, np.float32))
    assert values[0] == 7 and np.isnan(values[1:]).all()


@on_standin()
def test_lanes_exchange_values() -> None:
    import client as cu
    import numpy as np

    if cu.code_of("cuCtxSynchronize"):
        cu.start()
    module = cu.Module("""
#define FULL 0xffffffffu
extern "C" __global__ void exchange(int* out, long long* wide) {
    const int i = threadIdx.x, lane = i % 32;
    int* row = out + i * 10;
    row[0] = __shfl_sync(FULL, i, 5);
    row[1] = __shfl_up_sync(FULL, i, 3);
    row[2] = __shfl_down_sync(FULL, i, 3);
    row[3] = __shfl_xor_sync(FULL, i, 1);
    row[4] = __shfl_sync(FULL, i, 1, 8);
    row[5] = __shfl_down_sync(FULL, i, 2, 4);
    row[6] = static_cast<int>(__ballot_sync(FULL, lane % 3 == 0));
    row[7] = __any_sync(FULL, i == 40) * 2 + __all_sync(FULL, i >= 32);
    // Half a warp on its own.
    row[8] = lane < 16 ? __shfl_xor_sync(0xffffu, i, 8) : -1;
    __syncwarp();
    row[9] = __popc(__ballot_sync(FULL, 1)) + __ffs(8) + __clz(1);
    wide[i] = __shfl_xor_sync(FULL, 1ll << lane, 31);
}
""")
    out, wide = cu.allocate(64 * 40), cu.allocate(64 * 8)
    module.launch("exchange", out, wide, block=64)
    rows = cu.download(out, np.empty((64, 10), np.int32))
    i = np.arange(64)
    lane, first = i % 32, i // 32 * 32
    expected = np.stack(
        [
            first + 5,
            np.where(lane >= 3, i - 3, i),
            np.where(lane < 29, i + 3, i),
            i ^ 1,
            i // 8 * 8 + 1,
            np.where(i % 4 < 2, i + 2, i),
            np.full(64, sum(1 << b for b in range(0, 32, 3))),
            np.where(i >= 32, 3, 0),
            np.where(lane < 16, i ^ 8, -1),
            np.full(64, 32 + 4 + 31),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(
        cu.download(wide, np.empty(64, np.int64)), 1 << (31 - lane).astype(np.int64)
    )


@on_standin()
def test_integer_built_ins_agree_with_their_definitions() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void dot(const int* a, const int* b, int* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __dp4a(a[i], b[i], i);
}
extern "C" __global__ void count(unsigned* cells) {
    atomicAdd(&cells[0], 2u);
    atomicOr(&cells[1], 1u << threadIdx.x % 32);
    atomicMax(reinterpret_cast<int*>(&cells[2]), static_cast<int>(threadIdx.x) - 10);
}
extern "C" __global__ void numbers(float* out) {
    out[0] = rsqrtf(4.0f);
    out[1] = __uint_as_float(0x3fc00000u);
    out[2] = static_cast<float>(__float2int_rn(2.5f));
    out[3] = fmaf(2.0f, 3.0f, 4.0f) + __ldg(out + 1);
}
""")
    random = np.random.default_rng(1)
    a, b = random.integers(-128, 128, (2, 500, 4), dtype=np.int8)
    out = cu.allocate(2000)
    module.launch("dot", cu.upload(a), cu.upload(b), out, 500, grid=2, block=256)
    expected = (a.astype(np.int32) * b).sum(axis=1) + np.arange(500)
    np.testing.assert_array_equal(cu.download(out, np.empty(500, np.int32)), expected)
    cells = cu.upload(np.zeros(3, np.uint32))
    module.launch("count", cells, grid=5, block=96)
    assert cu.download(cells, np.empty(3, np.uint32)).tolist() == [960, 0xFFFFFFFF, 85]
    module.launch("numbers", out)
    assert cu.download(out, np.empty(4, np.float32)).tolist() == [0.5, 1.5, 2.0, 11.5]


# ---- what runs beside what ----


@on_standin()
def test_a_kernel_polls_a_flag_that_the_host_writes() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(SPIN)
    flag, answer = cu.pinned(1), cu.pinned(3)
    flag[0], answer[:] = 0, 0
    lane = cu.stream()
    module.launch(
        "wait_for",
        cu.Address(flag.ctypes.data),
        5,
        cu.Address(answer.ctypes.data),
        grid=3,
        stream=lane,
    )
    time.sleep(0.02)
    assert cu.code_of("cuStreamQuery", lane) == cu.NOT_READY
    assert answer.tolist() == [0, 0, 0]
    flag[0] = 5
    deadline = time.monotonic() + 10
    while answer.tolist() != [5, 5, 5] and time.monotonic() < deadline:
        pass  # the kernel's stores reach the host without any call
    np.testing.assert_array_equal(answer, 5)
    cu.synchronize(lane)


@on_standin(multiprocessors=16)
def test_blocks_of_one_launch_wait_for_each_other() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void rounds(unsigned* count, unsigned* out, int n) {
    for (int round = 1; round <= n; round++) {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(count, 1u);
            while (*(volatile unsigned*)count < gridDim.x * round) qi_standin_yield();
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = *count;
}
""")
    count, out = cu.upload(np.zeros(1, np.uint32)), cu.allocate(64)
    module.launch("rounds", count, out, 10, grid=16, block=64)
    assert cu.download(out, np.empty(16, np.uint32)).tolist() == [160] * 16


@on_standin()
def test_streams_are_independent_until_an_event_joins_them() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(SPIN + SAXPY)
    flag = cu.pinned(1)
    flag[0] = 0
    slow, fast = cu.stream(), cu.stream()
    y, x, out = (
        cu.upload(np.zeros(4, np.float32)),
        cu.upload(np.ones(4, np.float32)),
        cu.allocate(4),
    )
    event = cu.made("cuEventCreate", 0)
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, out, stream=slow)
    cu.call("cuEventRecord", event, slow)
    module.launch("saxpy", y, x, 1.0, 4, block=4, stream=fast)
    cu.synchronize(fast)  # does not wait for the other
    assert cu.code_of("cuEventQuery", event) == cu.NOT_READY
    cu.call("cuStreamWaitEvent", fast, event, 0)
    module.launch("saxpy", y, x, 1.0, 4, block=4, stream=fast)
    time.sleep(0.02)
    assert cu.code_of("cuStreamQuery", fast) == cu.NOT_READY
    flag[0] = 1
    cu.call("cuEventSynchronize", event)
    cu.synchronize(fast)
    assert cu.download(y, np.empty(4, np.float32)).tolist() == [2] * 4
    later = cu.made("cuEventCreate", 0)
    cu.call("cuEventRecord", later, fast)
    cu.synchronize(fast)
    milliseconds = cu.c_float()
    cu.call("cuEventElapsedTime", cu.byref(milliseconds), event, later)
    assert 0 < milliseconds.value < 10_000
    raises(cu.INVALID_HANDLE, "cuEventElapsedTime", cu.byref(milliseconds), event, 12345)


@on_standin()
def test_the_legacy_stream_waits_for_blocking_streams_alone() -> None:
    import client as cu
    import numpy as np

    context = cu.start()
    module = cu.Module(SPIN)
    flag = cu.pinned(1)
    flag[0] = 0
    y = cu.upload(np.zeros(4, np.uint8))
    done = threading.Event()
    free = cu.stream(cu.NON_BLOCKING)
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, cu.allocate(4), stream=free)
    cu.call("cuMemsetD8Async", y, cu.c_int(1), 4, 0)
    cu.synchronize(0)  # comes back although the non-blocking stream is busy
    blocking = cu.stream(0)
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, cu.allocate(4), stream=blocking)
    cu.call("cuMemsetD8Async", y, cu.c_int(2), 4, 0)

    def wait() -> None:
        cu.call("cuCtxSetCurrent", context)  # contexts are current by thread
        cu.synchronize(0)
        done.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not done.wait(0.05)
    flag[0] = 1
    waiter.join(10)
    assert done.is_set()


@on_standin()
def test_stream_memory_operations_wait_and_write() -> None:
    import client as cu
    import numpy as np

    cu.start()
    lane = cu.stream()
    flags = cu.pinned(2, np.uint32)
    flags[:] = 0
    at = flags.ctypes.data
    cu.call("cuStreamWaitValue32_v2", lane, at, cu.c_int(3), 0)  # at least 3
    cu.call("cuStreamWriteValue32_v2", lane, at + 4, cu.c_int(9), 0)
    time.sleep(0.02)
    assert flags[1] == 0
    flags[0] = 4
    cu.synchronize(lane)
    assert flags[1] == 9
    raises(cu.INVALID_VALUE, "cuStreamWaitValue32_v2", lane, at + 2, cu.c_int(3), 0)


@on_standin(delay_us=20_000, seed=1)
def test_copies_are_as_asynchronous_as_the_memory_allows() -> None:
    import client as cu
    import numpy as np

    cu.start()
    lane = cu.stream()
    n = 1000
    device = cu.allocate(4 * n)
    # Pageable memory is staged: what is changed after the call does not matter.
    pageable = np.full(n, 1, np.int32)
    cu.call("cuMemcpyHtoDAsync_v2", device, pageable.ctypes.data, 4 * n, lane)
    pageable[:] = 2
    # The way back is synchronous.
    back = np.zeros(n, np.int32)
    cu.call("cuMemcpyDtoHAsync_v2", back.ctypes.data, device, 4 * n, lane)
    np.testing.assert_array_equal(back, 1)
    # Pinned memory is read when the copy runs: changing it too early shows.
    early = cu.pinned(n)
    early[:] = 3
    event = cu.made("cuEventCreate", 2)
    for _ in range(8):
        cu.call("cuMemsetD8Async", device, cu.c_int(0), 4 * n, lane)
    cu.call("cuMemcpyHtoDAsync_v2", device, early.ctypes.data, 4 * n, lane)
    cu.call("cuEventRecord", event, lane)
    assert cu.code_of("cuEventQuery", event) == cu.NOT_READY
    early[:] = 4
    cu.synchronize(lane)
    np.testing.assert_array_equal(cu.download(device, back), 4)
    into = cu.pinned(n)
    into[:] = 0
    cu.call("cuMemsetD32Async", device, cu.c_int(7), n, lane)
    cu.call("cuMemcpyDtoHAsync_v2", into.ctypes.data, device, 4 * n, lane)
    cu.synchronize(lane)
    np.testing.assert_array_equal(into, 7)


@on_standin()
def test_arguments_are_copied_when_a_kernel_is_launched() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(SPIN + SAXPY)
    flag = cu.pinned(1)
    flag[0] = 0
    y, x = cu.upload(np.zeros(4, np.float32)), cu.upload(np.ones(4, np.float32))
    lane = cu.stream()
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, cu.allocate(4), stream=lane)
    scale = cu.c_float(3.0)
    module.launch("saxpy", y, x, scale, 4, block=4, stream=lane)
    scale.value = 100.0
    flag[0] = 1
    cu.synchronize(lane)
    assert cu.download(y, np.empty(4, np.float32)).tolist() == [3] * 4


# ---- graphs ----


@on_standin()
def test_a_captured_graph_is_replayed() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(SAXPY)
    main, side = cu.stream(), cu.stream()
    x, y = cu.upload(np.ones(4, np.float32)), cu.upload(np.zeros(4, np.float32))
    z = cu.upload(np.zeros(4, np.float32))
    result = cu.pinned(4, np.float32)
    fork, join = cu.made("cuEventCreate", 2), cu.made("cuEventCreate", 2)

    cu.call("cuStreamBeginCapture_v2", main, 0)
    module.launch("saxpy", y, x, 1.0, 4, block=4, stream=main)
    cu.call("cuEventRecord", fork, main)
    cu.call("cuStreamWaitEvent", side, fork, 0)
    module.launch("saxpy", z, y, 1.0, 4, block=4, stream=side)
    cu.call("cuEventRecord", join, side)
    cu.call("cuMemsetD8Async", x, cu.c_int(0), 0, main)
    cu.call("cuStreamWaitEvent", main, join, 0)
    cu.call("cuMemcpyDtoHAsync_v2", result.ctypes.data, z, 16, main)
    status = cu.c_int()
    cu.call("cuStreamIsCapturing", side, cu.byref(status))
    assert status.value == 1
    graph = cu.c_void_p()
    cu.call("cuStreamEndCapture", main, cu.byref(graph))
    assert cu.download(y, np.empty(4, np.float32)).tolist() == [0] * 4  # nothing ran

    executable = cu.made("cuGraphInstantiateWithFlags", graph, 0)
    cu.call("cuGraphDestroy", graph)
    total = 0.0
    for launches in range(1, 4):
        cu.call("cuGraphLaunch", executable, main)
        cu.synchronize(main)
        total += launches
        assert result.tolist() == [total] * 4
    cu.call("cuGraphExecDestroy", executable)
    assert cu.live_objects()["graphs"] == cu.live_objects()["executables"] == 0


@on_standin()
def test_calls_that_a_capture_forbids_invalidate_it() -> None:
    import client as cu
    import numpy as np

    cu.start()
    lane, other = cu.stream(), cu.stream()
    blocking = cu.stream(0)
    event, outside = cu.made("cuEventCreate", 2), cu.made("cuEventCreate", 2)
    device = cu.allocate(64)
    host = np.zeros(16, np.int32)
    cu.call("cuEventRecord", outside, other)
    spare = cu.c_uint64()
    forbidden: list[tuple[int, str, list[object]]] = [
        (cu.CAPTURE_UNSUPPORTED, "cuMemAlloc_v2", [cu.byref(spare), 64]),
        (cu.CAPTURE_UNSUPPORTED, "cuMemFree_v2", [device]),
        (cu.CAPTURE_UNSUPPORTED, "cuStreamSynchronize", [lane]),
        (cu.CAPTURE_UNSUPPORTED, "cuStreamQuery", [lane]),
        (cu.CAPTURE_UNSUPPORTED, "cuCtxSynchronize", []),
        (cu.CAPTURE_UNSUPPORTED, "cuMemcpyHtoDAsync_v2", [device, host.ctypes.data, 64, lane]),
        (cu.CAPTURED_EVENT, "cuEventQuery", [event]),
        (cu.CAPTURED_EVENT, "cuEventSynchronize", [event]),
        (cu.CAPTURE_ISOLATION, "cuStreamWaitEvent", [lane, outside, 0]),
    ]
    for code, name, arguments in forbidden:
        cu.call("cuStreamBeginCapture_v2", lane, 0)
        cu.call("cuEventRecord", event, lane)
        raises(code, name, *arguments)
        raises(cu.CAPTURE_INVALIDATED, "cuMemsetD8Async", device, cu.c_int(0), 4, lane)
        graph = cu.c_void_p()
        raises(cu.CAPTURE_INVALIDATED, "cuStreamEndCapture", lane, cu.byref(graph))
        assert not graph.value
    cu.synchronize(lane)  # usable again

    # The legacy stream cannot run beside a blocking stream under capture.
    cu.call("cuStreamBeginCapture_v2", blocking, 0)
    raises(cu.CAPTURE_IMPLICIT, "cuMemsetD8Async", device, cu.c_int(0), 4, 0)
    raises(cu.CAPTURE_INVALIDATED, "cuStreamEndCapture", blocking, cu.byref(cu.c_void_p()))

    # A fork has to come back.
    cu.call("cuStreamBeginCapture_v2", lane, 0)
    cu.call("cuEventRecord", event, lane)
    cu.call("cuStreamWaitEvent", other, event, 0)
    cu.call("cuMemsetD8Async", device, cu.c_int(0), 4, other)
    raises(cu.CAPTURE_UNJOINED, "cuStreamEndCapture", lane, cu.byref(cu.c_void_p()))


# ---- checks ----


@on_standin()
def test_arguments_are_checked() -> None:
    import client as cu
    import numpy as np

    out = cu.c_uint64()
    raises(cu.NOT_INITIALIZED, "cuDeviceGetCount", cu.byref(out))
    cu.call("cuInit", 0)
    raises(cu.INVALID_CONTEXT, "cuMemAlloc_v2", cu.byref(out), 64)
    raises(cu.INVALID_DEVICE, "cuDeviceGet", cu.byref(out), 1)
    cu.start()
    module = cu.Module(SAXPY)
    device = cu.allocate(100)
    lane = cu.stream()

    raises(cu.INVALID_VALUE, "cuMemAlloc_v2", cu.byref(out), 0)
    raises(cu.INVALID_VALUE, "cuMemAlloc_v2", None, 64)
    raises(cu.OUT_OF_MEMORY, "cuMemAlloc_v2", cu.byref(out), 2 << 30)
    host = np.zeros(200, np.uint8)
    raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", device, host.ctypes.data, 101)
    raises(cu.INVALID_VALUE, "cuMemcpyDtoH_v2", host.ctypes.data, device.value + 1, 100)
    raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", host.ctypes.data, host.ctypes.data, 10)
    raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", device, device, 10)
    raises(cu.INVALID_VALUE, "cuMemsetD32Async", device.value + 1, cu.c_int(0), 1, lane)
    raises(cu.INVALID_HANDLE, "cuStreamSynchronize", 0xDEAD)
    raises(cu.NOT_FOUND, "cuModuleGetFunction", cu.byref(out), module.handle, b"nothing")
    raises(cu.INVALID_IMAGE, "cuModuleLoadData", cu.byref(out), b"no image" * 20)
    cubin = bytearray(cu.compile_cubin(SAXPY))
    cubin[len(cubin) // 2] ^= 1
    raises(cu.INVALID_IMAGE, "cuModuleLoadData", cu.byref(out), bytes(cubin))
    other = cu.compile_cubin(SAXPY, arch="sm_80")
    raises(cu.NO_BINARY_FOR_GPU, "cuModuleLoadData", cu.byref(out), other)

    arguments = (device, device, 1.0, 4)
    limits = [
        dict(block=1025),
        dict(block=(1, 1, 65)),
        dict(block=(32, 33, 1)),
        dict(block=0),
        dict(grid=(1, 65536, 1)),
        dict(grid=0),
        dict(grid=1 << 31),
        dict(shared=48 * 1024 + 1),
    ]
    for limit in limits:
        assert module.code("saxpy", *arguments, **limit) == cu.INVALID_VALUE, limit
    function = module.function("saxpy")
    raises(cu.INVALID_VALUE, "cuFuncSetAttribute", function, 8, 227 * 1024 + 1)
    cu.call("cuFuncSetAttribute", function, 8, 100 * 1024)
    module.launch("saxpy", *arguments, shared=100 * 1024, stream=lane)
    cu.synchronize(lane)

    cu.call("cuMemFree_v2", device)
    raises(cu.INVALID_VALUE, "cuMemFree_v2", device)
    raises(cu.INVALID_VALUE, "cuMemcpyHtoD_v2", device, host.ctypes.data, 10)
    cu.call("cuStreamDestroy_v2", lane)
    raises(cu.INVALID_HANDLE, "cuStreamDestroy_v2", lane)
    assert module.code("saxpy", *arguments, stream=lane) == cu.INVALID_HANDLE
    cu.call("cuModuleUnload", module.handle)
    raises(cu.INVALID_HANDLE, "cuModuleUnload", module.handle)


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
    module = cu.Module(SPIN)
    flag = cu.pinned(1)
    flag[0] = 0
    out, lane = cu.allocate(4), cu.stream()
    module.launch("wait_for", cu.Address(flag.ctypes.data), 1, out, stream=lane)
    raises(cu.ILLEGAL_STATE, "cuMemFree_v2", out)
    raises(cu.ILLEGAL_STATE, "cuMemFreeHost", flag.ctypes.data)
    raises(cu.ILLEGAL_STATE, "cuModuleUnload", module.handle)
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
    module = cu.Module(SPIN)
    host = np.arange(5000, dtype=np.int32)
    at = host.ctypes.data
    cu.call("cuMemHostRegister_v2", at, host.nbytes, 2)
    raises(cu.ALREADY_REGISTERED, "cuMemHostRegister_v2", at + 64, 64, 2)
    np.testing.assert_array_equal(host, np.arange(5000))
    address = cu.Address(cu.made("cuMemHostGetDevicePointer_v2", at, 0))
    host[0] = 7
    lane = cu.stream()
    module.launch("wait_for", address, 7, cu.Address(address.value + 40), stream=lane)
    cu.synchronize(lane)
    assert host[10] == 7
    assert cu.live_objects()["pinned_bytes"] == host.nbytes
    cu.call("cuMemHostUnregister", at)
    raises(cu.NOT_REGISTERED, "cuMemHostUnregister", at)
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
    raises(cu.OUT_OF_MEMORY, "cuMemAlloc_v2", cu.byref(cu.c_uint64()), 1)
    current = cu.made("cuCtxGetCurrent")
    assert current == context
    first = cu.start(0)  # another device's memory is its own
    assert first != context
    cu.allocate(free.value)


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
    module, lane, event = cu.Module(SAXPY), cu.stream(), cu.made("cuEventCreate", 0)
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
    raises(cu.OUT_OF_MEMORY, "cuMemAlloc_v2", cu.byref(pointer), 64)
    assert cu.CUDA.standin_allocated() == 0
    cu.call("cuMemAlloc_v2", cu.byref(pointer), 64)  # once only
    # A release does its work and says so too.
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.UNKNOWN)
    raises(cu.UNKNOWN, "cuMemFree_v2", pointer)
    assert cu.CUDA.standin_allocated() == 0
    # NVRTC's calls are counted along.
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.OUT_OF_MEMORY)
    major, minor = cu.c_int(), cu.c_int()
    assert cu.NVRTC.nvrtcVersion(cu.byref(major), cu.byref(minor)) == 1
    assert cu.NVRTC.nvrtcVersion(cu.byref(major), cu.byref(minor)) == 0 and major.value == 13
    # A device error stays.
    cu.CUDA.standin_fail_at(cu.ctypes.c_int64(1), cu.ILLEGAL_ADDRESS)
    raises(cu.ILLEGAL_ADDRESS, "cuCtxSynchronize")
    raises(cu.ILLEGAL_ADDRESS, "cuMemAlloc_v2", cu.byref(pointer), 64)


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
    module = cu.Module(SAXPY)
    x = cu.upload(np.ones(4, np.float32))
    cu.call("cuMemFree_v2", x)
    module.launch("saxpy", cu.allocate(16), x, 1.0, 4, block=4)
    raises(cu.ILLEGAL_ADDRESS, "cuCtxSynchronize")
    assert "freed device memory of 16 bytes" in cu.report()


@on_standin()
def test_a_lost_device_is_an_error_and_no_hang() -> None:
    import client as cu

    context = cu.start()
    module = cu.Module(SPIN)
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
    raises(cu.UNKNOWN, "cuMemAlloc_v2", cu.byref(cu.c_uint64()), 64)
    assert flag[0] == 0  # pinned memory is the host's still


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
    raises(cu.NOT_FOUND, "cuModuleGetFunction", cu.byref(cu.c_void_p()), module.handle, b"hidden")
    module.function("seen")


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
        sizes = dict(m=m, n=n, k=k, lda=k if op_a else m, ldb=n if op_b else k, ldc=m + 1)
        s = sizes | changed
        return int(
            blas.cublasGemmEx(
                handle, op_a, op_b, s["m"], s["n"], s["k"], cu.byref(cu.c_float(0.5)),
                da, 2, s["lda"], db, 2, s["ldb"], cu.byref(cu.c_float(beta)),
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
    dc = cu.allocate(n * (m + 1) * 4)  # not a number, and with beta 0 not read
    assert gemm(1, 1, 0) == 0
    cu.synchronize(lane)
    assert np.isfinite(cu.download(dc, np.empty((n, m + 1), np.float32))[:, :m]).all()
    assert blas.cublasDestroy_v2(handle) == 0
    assert blas.cublasDestroy_v2(handle) == 1
