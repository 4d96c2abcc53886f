// What `qinfer doctor` runs to see that a GPU computes: a sum that any mistake on the way changes;
// and what measures how fast its memory is read.
#include "prelude.cuh"

// out[i] = scale · in[i] + i, n elements, one thread each.
extern "C" __global__ void probe(const float* in, float* out, float scale, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = scale * in[i] + i;
}

// Reads n_quads · 16 bytes, as weights are read. *out is only written where the exclusive or of
// what a thread reads has unequal halves, which one byte all over never has, so that reads are
// needed.
QI_KERNEL probe_read(const u8* from, i64 n_quads, u32* out) {
    constexpr int n_loads = 8;
    const i64 n_threads = i64(gridDim.x) * blockDim.x;
    u32 all = 0;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n_quads;
         i += n_loads * n_threads) {
        Quad quads[n_loads];
#pragma unroll
        for (int k = 0; k < n_loads; ++k) {
            const i64 at = i + k * n_threads;
            quads[k] = load_stream16(from + (at < n_quads ? at : i) * 16);
        }
#pragma unroll
        for (int k = 0; k < n_loads; ++k)
            all ^= quads[k].v[0] ^ quads[k].v[1] ^ quads[k].v[2] ^ quads[k].v[3];
    }
    if (all >> 16 != (all & 0xffffu)) *out = all;
}

// What a launch costs.
QI_KERNEL probe_nothing() {}
