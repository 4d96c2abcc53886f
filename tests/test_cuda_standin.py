"""The stand-in for NVIDIA's libraries runs kernels, streams and graphs as the real ones do."""

from __future__ import annotations

import threading
import time

from cuda_standin import on_standin

# ---- kernels ----


@on_standin()
def test_a_kernel_adds_vectors() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(cu.SAXPY)
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


@on_standin()
def test_shared_memory_is_declared_and_counted_as_in_cuda() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern __shared__ float pool[];  // at namespace scope
__device__ float* tail(int n) { return pool + n; }
template <class T> __device__ T twice(T x) {
    __shared__ T cell[1];
    if (threadIdx.x == 0) cell[0] = x + x;
    __syncthreads();
    return cell[0];
}
extern "C" __global__ void outer(float* out, int n) {
    tail(n)[threadIdx.x] = 3.0f;
    __syncthreads();
    out[threadIdx.x] = pool[n + threadIdx.x ^ 1];
}
extern "C" __global__ void inner(int* out) { *out = twice(21); }
extern "C" __global__ void large(char* out) {
    __shared__ char s[40000];
    s[threadIdx.x] = 1;
    out[0] = s[0];
}
extern "C" __global__ void lined(int* out) {
    // extern __shared__ float comment[];
    extern __shared__
        int rows[];
    rows[0] = __LINE__;
    *out = rows[0];
}
""")
    out = cu.allocate(64)
    module.launch("outer", out, 8, block=8, shared=64)
    assert cu.download(out, np.empty(8, np.float32)).tolist() == [3] * 8
    module.launch("inner", out)
    assert cu.download(out, np.empty(1, np.int32))[0] == 42
    module.launch("lined", out, shared=4)
    assert cu.download(out, np.empty(1, np.int32))[0] == 25
    value = cu.c_int()
    cu.call("cuFuncGetAttribute", cu.byref(value), 1, module.function("large"))
    assert 40000 <= value.value <= 40064
    assert module.code("large", out, shared=48 * 1024 - 40000 + 64) == cu.INVALID_VALUE


@on_standin()
def test_threads_that_have_ended_count_as_arrived_at_barriers() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void early(int* out, int n) {
    __shared__ int s[96];
    if (threadIdx.x >= n) return;
    s[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = s[n - 1 - threadIdx.x];
}
""")
    out = cu.allocate(400)
    for n in (1, 33, 96):
        module.launch("early", out, n, block=96)
        result = cu.download(out, np.empty(n, np.int32))
        np.testing.assert_array_equal(result, np.arange(n)[::-1])


def order_of_blocks() -> list[int]:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void order(int* next, int* out) { out[atomicAdd(next, 1)] = blockIdx.x; }
""")
    out = cu.allocate(400)
    module.launch("order", cu.upload(np.zeros(1, np.int32)), out, grid=100)
    return [int(block) for block in cu.download(out, np.empty(100, np.int32))]


@on_standin()
def test_blocks_run_in_order() -> None:
    assert order_of_blocks() == list(range(100))


@on_standin(seed=9)
def test_blocks_run_out_of_order_with_a_seed() -> None:
    order = order_of_blocks()
    assert sorted(order) == list(range(100)) and order != list(range(100))


# ---- what runs beside what ----


@on_standin()
def test_a_kernel_polls_a_flag_that_the_host_writes() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module(cu.SPIN)
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
    module = cu.Module(cu.SPIN + cu.SAXPY)
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
    cu.raises(cu.INVALID_HANDLE, "cuEventElapsedTime", cu.byref(milliseconds), event, 12345)


@on_standin()
def test_the_legacy_stream_waits_for_blocking_streams_alone() -> None:
    import client as cu
    import numpy as np

    context = cu.start()
    module = cu.Module(cu.SPIN)
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
    cu.raises(cu.INVALID_VALUE, "cuStreamWaitValue32_v2", lane, at + 2, cu.c_int(3), 0)


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
    module = cu.Module(cu.SPIN + cu.SAXPY)
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
    module = cu.Module(cu.SAXPY)
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
        cu.raises(code, name, *arguments)
        cu.raises(cu.CAPTURE_INVALIDATED, "cuMemsetD8Async", device, cu.c_int(0), 4, lane)
        graph = cu.c_void_p()
        cu.raises(cu.CAPTURE_INVALIDATED, "cuStreamEndCapture", lane, cu.byref(graph))
        assert not graph.value
    cu.synchronize(lane)  # usable again

    # The legacy stream cannot run beside a blocking stream under capture.
    cu.call("cuStreamBeginCapture_v2", blocking, 0)
    cu.raises(cu.CAPTURE_IMPLICIT, "cuMemsetD8Async", device, cu.c_int(0), 4, 0)
    cu.raises(cu.CAPTURE_INVALIDATED, "cuStreamEndCapture", blocking, cu.byref(cu.c_void_p()))

    # A fork has to come back.
    cu.call("cuStreamBeginCapture_v2", lane, 0)
    cu.call("cuEventRecord", event, lane)
    cu.call("cuStreamWaitEvent", other, event, 0)
    cu.call("cuMemsetD8Async", device, cu.c_int(0), 4, other)
    cu.raises(cu.CAPTURE_UNJOINED, "cuStreamEndCapture", lane, cu.byref(cu.c_void_p()))


@on_standin(seed=4, delay_us=500)
def test_a_graph_replayed_late_and_in_another_order_gives_the_same() -> None:
    test_a_captured_graph_is_replayed.program()  # type: ignore[attr-defined]


@on_standin()
def test_a_graph_does_not_run_on_what_is_gone() -> None:
    import client as cu

    cu.start()
    module, lane = cu.Module(cu.SAXPY), cu.stream()
    x, host = cu.allocate(16), cu.pinned(4)

    def captured(*what: object, **launch: object) -> int:
        graph = cu.c_void_p()
        cu.call("cuStreamBeginCapture_v2", lane, 0)
        if launch:
            module.launch("saxpy", x, x, 1.0, 4, stream=lane)
        else:
            cu.call(*what, lane)
        cu.call("cuStreamEndCapture", lane, cu.byref(graph))
        return cu.made("cuGraphInstantiateWithFlags", graph, 0)

    copy = captured("cuMemcpyDtoHAsync_v2", host.ctypes.data, x, 16)
    fill = captured("cuMemsetD8Async", x, cu.c_int(0), 16)
    kernel = captured(kernel=True)
    cu.call("cuMemFreeHost", host.ctypes.data)
    cu.raises(cu.ILLEGAL_ADDRESS, "cuGraphLaunch", copy, lane)
    cu.call("cuGraphLaunch", fill, lane)
    cu.call("cuGraphLaunch", kernel, lane)
    cu.synchronize(lane)
    cu.call("cuModuleUnload", module.handle)
    cu.raises(cu.ILLEGAL_STATE, "cuGraphLaunch", kernel, lane)
    cu.call("cuMemFree_v2", x)
    cu.raises(cu.ILLEGAL_ADDRESS, "cuGraphLaunch", fill, lane)
