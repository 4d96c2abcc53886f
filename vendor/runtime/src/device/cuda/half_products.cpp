#include "device/cuda/half_products.h"

#include <algorithm>

#include "base/error.h"

namespace qi::cuda {

namespace {

// Rows of activations begin at multiples of 16 bytes, as cuBLAS likes them.
int64_t narrowed_stride(int64_t n_cols) {
    return (n_cols + 7) / 8 * 8;
}

size_t narrowed_rows_bytes(int64_t n_tokens, int64_t n_cols) {
    return (size_t(n_tokens * narrowed_stride(n_cols)) * 2 + 255) / 256 * 256;
}

bool is_wide(Type type) {
    return type == Type::f16 || type == Type::bf16;
}

}  // namespace

size_t HalfProducts::narrowed_bytes(int64_t n_tokens, int64_t n_cols) {
    return narrowed_rows_bytes(n_tokens, n_cols) + 2 * size_t(n_tokens) * sizeof(float);
}

bool HalfProducts::takes(Type type, int architecture) {
    return type != Type::f32 && (type != Type::bf16 || architecture >= 80);
}

HalfProducts::HalfProducts(const Stream& stream, std::shared_ptr<Budget> budget, Kernels& kernels,
                           const Room& room)
    : stream_(stream), kernels_(kernels), room_(room), cublas_(stream, std::move(budget)) {}

HalfProducts::Narrowed HalfProducts::narrow(CUdeviceptr x, int64_t n_tokens, int64_t n_cols,
                                            Type weight_type) {
    const bool bf16 = weight_type == Type::bf16;
    Narrowed narrowed;
    narrowed.input = bf16 ? Cublas::Input::bf16 : Cublas::Input::f16;
    narrowed.stride = narrowed_stride(n_cols);
    narrowed.powers = room_.narrowed + narrowed_rows_bytes(n_tokens, n_cols);
    narrowed.backs = narrowed.powers + size_t(n_tokens) * sizeof(float);
    kernels_.narrow_rows(stream_, x, n_tokens, n_cols, bf16 ? Type::bf16 : Type::f16,
                         room_.narrowed, narrowed.stride, narrowed.powers);
    return narrowed;
}

int64_t HalfProducts::rows_together(const DeviceWeight& w) const {
    if (is_wide(w.type)) return w.n_rows;
    const auto n = int64_t(room_.widened_bytes / (size_t(w.n_cols) * 2));
    if (n == 0) fail(QI_INTERNAL, "a row of %lld weights has no room", (long long)w.n_cols);
    return std::min(n >= 8 ? n / 8 * 8 : n, w.n_rows);
}

HalfProducts::Rows HalfProducts::rows_of(const DeviceWeight& w, int64_t first, int64_t n) {
    if (is_wide(w.type)) return {w.data + size_t(first) * w.row_stride, int64_t(w.row_stride / 2)};
    kernels_.widen(stream_, w, first, n, Type::f16, room_.widened);
    return {room_.widened, w.n_cols};
}

void HalfProducts::multiply(CUdeviceptr x, int64_t n_tokens, std::span<const Product> products,
                            bool accumulate) {
    const int64_t n_cols = products[0].w.n_cols;
    const Narrowed in = narrow(x, n_tokens, n_cols, products[0].w.type);
    for (const Product& product : products) {
        const DeviceWeight& w = product.w;
        if (accumulate)
            kernels_.scale_rows(stream_, in.powers, 0, n_tokens, w.n_rows, product.y,
                                product.y_stride);
        const int64_t together = rows_together(w);
        for (int64_t first = 0; first < w.n_rows; first += together) {
            const int64_t n = std::min(together, w.n_rows - first);
            const Rows rows = rows_of(w, first, n);
            Cublas::Product part;
            part.input = in.input;
            part.n_rows = n;
            part.n_cols = n_cols;
            part.n_tokens = n_tokens;
            part.w = rows.at;
            part.w_stride = rows.stride;
            part.x = room_.narrowed;
            part.x_stride = in.stride;
            part.y = product.y + size_t(first) * sizeof(float);
            part.y_stride = product.y_stride;
            part.accumulate = accumulate;
            cublas_.multiply(part);
        }
        kernels_.scale_rows(stream_, in.backs, product.bias, n_tokens, w.n_rows, product.y,
                            product.y_stride);
    }
}

void HalfProducts::multiply_by_neuron(const DownTileArgs& args) {
    const DeviceWeight& w = args.w;
    if (w.n_rows == 0) return;
    if (args.h_stride != w.n_rows)
        fail(QI_INTERNAL, "the values of neurons do not lie side by side");
    const Narrowed in = narrow(args.h, args.n_tokens, w.n_rows, w.type);
    kernels_.scale_rows(stream_, in.powers, 0, args.n_tokens, w.n_cols, args.y, w.n_cols);
    const int64_t together = rows_together(w);
    for (int64_t first = 0; first < w.n_rows; first += together) {
        const int64_t n = std::min(together, w.n_rows - first);
        const Rows rows = rows_of(w, first, n);
        Cublas::Product part;
        part.input = in.input;
        part.n_rows = w.n_cols;
        part.n_cols = n;
        part.n_tokens = args.n_tokens;
        part.w = rows.at;
        part.w_stride = rows.stride;
        part.by_column = true;
        part.x = room_.narrowed + size_t(first) * 2;
        part.x_stride = in.stride;
        part.y = args.y;
        part.y_stride = w.n_cols;
        part.accumulate = true;
        cublas_.multiply(part);
    }
    kernels_.scale_rows(stream_, in.backs, args.bias, args.n_tokens, w.n_cols, args.y, w.n_cols);
}

}  // namespace qi::cuda
