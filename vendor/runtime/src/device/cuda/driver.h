// The NVIDIA driver: its types and entry points as we use them, found at run time.
//
// Nothing is linked against CUDA and none of its headers is needed. The library is loaded once, at
// the first call of driver(), and stays loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace qi::cuda {

// ---- the driver's types, by their own names ----

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
struct CUuuid {
    unsigned char bytes[16];
};

inline constexpr CUresult CUDA_SUCCESS = 0;
inline constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
inline constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
inline constexpr CUresult CUDA_ERROR_INVALID_IMAGE = 200;
inline constexpr CUresult CUDA_ERROR_NO_BINARY_FOR_GPU = 209;
inline constexpr CUresult CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222;
inline constexpr CUresult CUDA_ERROR_INVALID_SOURCE = 300;
inline constexpr CUresult CUDA_ERROR_NOT_READY = 600;

inline constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
inline constexpr int CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT = 17;
inline constexpr int CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36;  // kHz
inline constexpr int CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37;
inline constexpr int CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38;
inline constexpr int CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR = 39;
inline constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
inline constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
inline constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;

inline constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;

inline constexpr unsigned CU_MEMHOSTALLOC_PORTABLE = 1;
inline constexpr unsigned CU_MEMHOSTALLOC_DEVICEMAP = 2;
inline constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
inline constexpr unsigned CU_EVENT_DEFAULT = 0;
inline constexpr unsigned CU_EVENT_DISABLE_TIMING = 2;
inline constexpr int CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1;

// ---- its entry points: our name, the exported name, the parameters ----

// The exported names carry the version of the interface that the types above belong to.
#define QI_CUDA_ENTRIES(X)                                                                        \
    X(cuInit, "cuInit", (unsigned flags))                                                         \
    X(cuDriverGetVersion, "cuDriverGetVersion", (int* version))                                   \
    X(cuGetErrorName, "cuGetErrorName", (CUresult, const char**))                                 \
    X(cuGetErrorString, "cuGetErrorString", (CUresult, const char**))                             \
    X(cuDeviceGetCount, "cuDeviceGetCount", (int*))                                               \
    X(cuDeviceGet, "cuDeviceGet", (CUdevice*, int ordinal))                                       \
    X(cuDeviceGetName, "cuDeviceGetName", (char*, int capacity, CUdevice))                        \
    X(cuDeviceGetUuid, "cuDeviceGetUuid_v2", (CUuuid*, CUdevice))                                 \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int attribute, CUdevice))              \
    X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t*, CUdevice))                               \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))               \
    X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                      \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext))                                       \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext*))                                        \
    X(cuCtxSynchronize, "cuCtxSynchronize", ())                                                   \
    X(cuMemGetInfo, "cuMemGetInfo_v2", (size_t * free, size_t * total))                           \
    X(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr*, size_t))                                        \
    X(cuMemFree, "cuMemFree_v2", (CUdeviceptr))                                                   \
    X(cuMemHostAlloc, "cuMemHostAlloc", (void**, size_t, unsigned flags))                         \
    X(cuMemFreeHost, "cuMemFreeHost", (void*))                                                    \
    X(cuMemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2", (CUdeviceptr*, void*, unsigned)) \
    X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void*, size_t, CUstream))    \
    X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void*, CUdeviceptr, size_t, CUstream))          \
    X(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (CUdeviceptr, CUdeviceptr, size_t, CUstream))    \
    X(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))         \
    X(cuStreamCreateWithPriority, "cuStreamCreateWithPriority",                                   \
      (CUstream*, unsigned flags, int priority))                                                  \
    X(cuStreamDestroy, "cuStreamDestroy_v2", (CUstream))                                          \
    X(cuStreamSynchronize, "cuStreamSynchronize", (CUstream))                                     \
    X(cuStreamQuery, "cuStreamQuery", (CUstream))                                                 \
    X(cuStreamWaitEvent, "cuStreamWaitEvent", (CUstream, CUevent, unsigned flags))                \
    X(cuEventCreate, "cuEventCreate", (CUevent*, unsigned flags))                                 \
    X(cuEventRecord, "cuEventRecord", (CUevent, CUstream))                                        \
    X(cuEventQuery, "cuEventQuery", (CUevent))                                                    \
    X(cuEventSynchronize, "cuEventSynchronize", (CUevent))                                        \
    X(cuEventElapsedTime, "cuEventElapsedTime", (float* milliseconds, CUevent, CUevent))          \
    X(cuEventDestroy, "cuEventDestroy_v2", (CUevent))                                             \
    X(cuModuleLoadDataEx, "cuModuleLoadDataEx",                                                   \
      (CUmodule*, const void*, unsigned n_options, int* options, void** values))                  \
    X(cuModuleUnload, "cuModuleUnload", (CUmodule))                                               \
    X(cuModuleGetFunction, "cuModuleGetFunction", (CUfunction*, CUmodule, const char*))           \
    X(cuFuncSetAttribute, "cuFuncSetAttribute", (CUfunction, int attribute, int value))           \
    X(cuLaunchKernel, "cuLaunchKernel",                                                           \
      (CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,           \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream, void** parameters,    \
       void** extra))                                                                             \
    X(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (CUstream, int mode))                      \
    X(cuStreamEndCapture, "cuStreamEndCapture", (CUstream, CUgraph*))                             \
    X(cuGraphInstantiateWithFlags, "cuGraphInstantiateWithFlags",                                 \
      (CUgraphExec*, CUgraph, unsigned long long flags))                                          \
    X(cuGraphLaunch, "cuGraphLaunch", (CUgraphExec, CUstream))                                    \
    X(cuGraphExecDestroy, "cuGraphExecDestroy", (CUgraphExec))                                    \
    X(cuGraphDestroy, "cuGraphDestroy", (CUgraph))

struct Driver {
    int version = 0;  // 1000 · major + 10 · minor of the CUDA release it is made for
#define QI_CUDA_MEMBER(name, symbol, parameters) CUresult(*name) parameters = nullptr;
    QI_CUDA_ENTRIES(QI_CUDA_MEMBER)
#undef QI_CUDA_MEMBER
};

// The oldest driver accepted: the first that knows every architecture we compile for.
inline constexpr int oldest_driver = 12080;

// The driver, loaded and initialised. Throws QI_DEVICE saying what is missing and what to do: no
// driver, an entry point it lacks, its refusal to start, no GPU, a driver too old, or a process
// forked from one that had it started. From any thread.
const Driver& driver();

// The same for destructors: nullptr where driver() would throw; loads nothing.
const Driver* driver_if_usable() noexcept;

// "12.8" of 12080.
std::string version_text(int version);

// "CUDA_ERROR_LAUNCH_FAILED (719), unspecified launch failure"
std::string result_text(const Driver& driver, CUresult result);

// Throws QI_MEMORY for want of memory and QI_DEVICE for all else; `doing` completes "the GPU failed
// while …".
[[noreturn]] void fail_cuda(CUresult result, const char* doing);

inline void check(CUresult result, const char* doing) {
    if (result != CUDA_SUCCESS) fail_cuda(result, doing);
}

}  // namespace qi::cuda
