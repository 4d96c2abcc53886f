// Norms, activation functions and sums of whole rows, each with the q8 copy that the next product
// wants.
//
// A row of n_embd floats is read twice (norm: once to sum, once to scale, from L1 or L2) and
// written once with 1.4 bytes of q8 per value: 16 to 64 KB per token, far below a microsecond of
// bandwidth, so what counts is latency. norm: one block per token, as many threads as quads of the
// row up to 1024, so that each thread loads once or a few times. The elementwise kernels: one
// thread per quad of the row, blocks of 256 over the row, grid.y over tokens.
#include "activation.cuh"
#include "q8.cuh"

// out[t] = x[t] / sqrt(mean(x²) + epsilon) · weight, or with layer (x - mean) / sqrt(variance +
// epsilon) · weight + bias, and the q8 copies of out and of x. out and bias may be null, and so may
// either copy. grid n_tokens.
QI_KERNEL qi_norm(const f32* x, const f32* weight, const f32* bias, f32 epsilon, int layer, int n,
                  f32* out, i8* codes, f32* scales, f32* sums, i8* x_codes, f32* x_scales,
                  f32* x_sums) {
    __shared__ f32 room[warp_size];
    const i64 token = blockIdx.x;
    const f32* row = x + token * n;
    const bool aligned = n % 4 == 0;
    const int width = ceil_div(n, warp_size) * warp_size;
    const Q8Rows q8 = {codes, scales, sums, width}, x_q8 = {x_codes, x_scales, x_sums, width};
    // Whole warps stay together through the shuffles of store_q8.
    const int n_quads = ceil_div(n, 4 * warp_size) * warp_size;

    f32 mean = 0.0f;
    if (layer) {
        f32 sum = 0.0f;
        for (int quad = int(threadIdx.x); quad < n_quads; quad += int(blockDim.x)) {
            f32 v[4];
            load_quad(row, quad, n, aligned, v);
            sum += (v[0] + v[1]) + (v[2] + v[3]);
        }
        mean = block_sum(sum, room) / f32(n);
    }
    f32 squares = 0.0f;
    for (int quad = int(threadIdx.x); quad < n_quads; quad += int(blockDim.x)) {
        f32 v[4];
        load_quad(row, quad, n, aligned, v);
        if (x_codes) store_q8(x_q8, token, quad, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const f32 distance = 4 * quad + i < n ? v[i] - mean : 0.0f;
            squares = fmaf(distance, distance, squares);
        }
    }
    const f32 inverse = 1.0f / sqrtf(block_sum(squares, room) / f32(n) + epsilon);
    for (int quad = int(threadIdx.x); quad < n_quads; quad += int(blockDim.x)) {
        f32 v[4], w[4], b[4];
        load_quad(row, quad, n, aligned, v);
        load_quad(weight, quad, n, aligned, w);
        if (bias) load_quad(bias, quad, n, aligned, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const f32 distance = 4 * quad + i < n ? v[i] - mean : 0.0f;
            v[i] = mul(mul(distance, inverse), w[i]);
            if (bias) v[i] += b[i];
        }
        if (out) store_quad(out + token * n, quad, n, aligned, v);
        if (codes) store_q8(q8, token, quad, v);
    }
}

// The q8 copy of x. grid (quads of a row / 256, n_tokens).
QI_KERNEL qi_quantise(const f32* x, int n, i8* codes, f32* scales, f32* sums) {
    const i64 token = blockIdx.y;
    const int quad = int(blockIdx.x * blockDim.x + threadIdx.x);
    f32 v[4];
    load_quad(x + token * n, quad, n, n % 4 == 0, v);
    store_q8({codes, scales, sums, ceil_div(n, warp_size) * warp_size}, token, quad, v);
}

// h[t] = act(gate[t]) ⊙ up[t], or act(gate[t]) where up is null; h may be gate, or null where only
// the q8 copy is wanted. grid (quads of a row / 256, n_tokens).
QI_KERNEL qi_act_mul(int act, f32 threshold, const f32* gate, const f32* up, int n, f32* h,
                     i8* codes, f32* scales, f32* sums) {
    const i64 token = blockIdx.y;
    const int quad = int(blockIdx.x * blockDim.x + threadIdx.x);
    const bool aligned = n % 4 == 0;
    f32 g[4], u[4];
    load_quad(gate + token * n, quad, n, aligned, g);
    if (up) load_quad(up + token * n, quad, n, aligned, u);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool inside = 4 * quad + i < n;
        const f32 value =
            up ? activate_mul(act, threshold, g[i], u[i]) : activate(act, threshold, g[i]);
        g[i] = inside ? value : 0.0f;
    }
    if (h) store_quad(h + token * n, quad, n, aligned, g);
    if (codes) store_q8({codes, scales, sums, ceil_div(n, warp_size) * warp_size}, token, quad, g);
}

// y[t] = y[t] · factors[t] + bias, where there is anything to do; bias may be null. Rows of y are
// `stride` floats apart. grid (quads of a row / 256, n_tokens).
QI_KERNEL qi_scale_rows(const f32* factors, const f32* bias, int n, f32* y, i64 stride) {
    const i64 token = blockIdx.y;
    const f32 factor = factors[token];
    if (factor == 1.0f && !bias) return;
    const int quad = int(blockIdx.x * blockDim.x + threadIdx.x);
    const bool aligned = n % 4 == 0 && stride % 4 == 0;
    f32 v[4], b[4] = {};
    load_quad(y + token * stride, quad, n, aligned, v);
    if (bias) load_quad(bias, quad, n, n % 4 == 0, b);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] = mul(v[i], factor) + b[i];
    store_quad(y + token * stride, quad, n, aligned, v);
}

// out[t] = x[t] · power as f16, or x[t] as bfloat16, for cuBLAS. The power of two is 1 unless a row
// would lose values to the ends of f16's range: its largest magnitude is beyond 65504 or below
// 2^-4. powers[t] is it, powers[n_tokens + t] its reciprocal. grid n_tokens.
QI_KERNEL qi_narrow_rows(const f32* x, int n, int bf16, u16* out, i64 out_stride, f32* powers) {
    __shared__ f32 room[warp_size];
    const i64 token = blockIdx.x;
    const f32* row = x + token * n;
    const bool aligned = n % 4 == 0;
    const int n_quads = ceil_div(n, 4);
    f32 largest = 0.0f;
    for (int quad = int(threadIdx.x); !bf16 && quad < n_quads; quad += int(blockDim.x)) {
        f32 v[4];
        load_quad(row, quad, n, aligned, v);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            largest = fmaxf(largest, fabsf(v[i]));
    }
    largest = block_max(largest, room);
    const bool fits = largest == 0.0f || (largest >= 0.0625f && largest <= 65504.0f);
    // A tiny row is left tiny: what it is added to must stay finite when it is scaled likewise.
    f32 power = 1.0f;
    if (!fits && largest < infinity()) power = fminf(power_for(largest), 16777216.0f);
    if (threadIdx.x == 0) {
        powers[token] = power;
        powers[gridDim.x + token] = 1.0f / power;
    }
    u16* to = out + token * out_stride;
    for (int quad = int(threadIdx.x); quad < n_quads; quad += int(blockDim.x)) {
        f32 v[4];
        load_quad(row, quad, n, aligned, v);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (4 * quad + i < n)
                to[4 * quad + i] = bf16 ? f32_to_bf16(v[i]) : f32_to_f16(mul(v[i], power));
    }
}
