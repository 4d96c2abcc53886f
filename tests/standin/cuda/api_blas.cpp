// What libcublas asks of the driver, beside the driver's own entry points: these count no calls.
#include "control.h"

using namespace standin;

namespace {

// Elements from a matrix's first to its last, column-major.
uint64_t extent(int64_t rows, int64_t columns, int64_t leading) {
    return rows == 0 || columns == 0 ? 0 : static_cast<uint64_t>((columns - 1) * leading + rows);
}

uint64_t bytes_of(Number type) {
    return type == Number::f32 ? 4 : 2;
}

template <class Body>
CUresult inner(Body&& body) {
    Driver& d = driver();
    std::lock_guard lock(d.mutex);
    try {
        d.current();
        require(d.injected == CUDA_SUCCESS, d.injected);
        const CUresult error = d.gpu.error();
        require(error == CUDA_SUCCESS, error);
        return body(d);
    } catch (const Failure& failure) {
        return failure.code;
    }
}

}  // namespace

// Of the current context's device; 0 without a context.
STANDIN_API int standin_capability() {
    Driver& d = driver();
    std::lock_guard lock(d.mutex);
    try {
        d.current();
        return d.settings.capability;
    } catch (const Failure&) {
        return 0;
    }
}

STANDIN_API int standin_has_stream(CUstream stream) {
    return inner([&](Driver& d) {
        d.stream(stream);
        return CUDA_SUCCESS;
    });
}

STANDIN_API int standin_gemm(CUstream handle, const Gemm* gemm) {
    return inner([&](Driver& d) {
        const Gemm& g = *gemm;
        Stream& stream = d.stream(handle);
        const uint64_t a = extent(g.transpose_a ? g.k : g.m, g.transpose_a ? g.m : g.k, g.lda);
        const uint64_t b = extent(g.transpose_b ? g.n : g.k, g.transpose_b ? g.k : g.n, g.ldb);
        const uint64_t c = extent(g.m, g.n, g.ldc);
        if (!d.find_device(g.a, a * bytes_of(g.type_ab)) ||
            !d.find_device(g.b, b * bytes_of(g.type_ab)) ||
            !d.find_device(g.c, c * bytes_of(g.type_c)))
            return d.complain(CUDA_ERROR_ILLEGAL_ADDRESS,
                              "cublasGemmEx of a matrix outside of device memory");
        const std::array product{int(g.type_ab), int(g.transpose_a), int(g.n > 64)};
        if (!d.products.contains(product)) {
            d.require_free(product_bytes);
            d.products.insert(product);
        }
        d.note_use(stream, g.a);
        d.note_use(stream, g.b);
        d.note_use(stream, g.c);
        d.submit(stream, Kind::gemm, {{gemm, sizeof *gemm}});
        return CUDA_SUCCESS;
    });
}

STANDIN_API int standin_allocate(CUdeviceptr* pointer, size_t bytes) {
    return inner([&](Driver& d) {
        d.refuse_in_capture();
        *pointer = d.allocate(bytes);
        return CUDA_SUCCESS;
    });
}

STANDIN_API int standin_release(CUdeviceptr pointer) {
    return inner([&](Driver& d) {
        auto found = d.memory.find(pointer);
        require(found != d.memory.end(), CUDA_ERROR_INVALID_VALUE);
        d.invalidate_captures();  // cublasDestroy waits for the device
        release_memory(d, found, true);
        return CUDA_SUCCESS;
    });
}
