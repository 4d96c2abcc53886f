// What `qinfer doctor` runs to see that a GPU computes: a sum that any mistake on the way changes.

// out[i] = scale · in[i] + i, n elements, one thread each.
extern "C" __global__ void probe(const float* in, float* out, float scale, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = scale * in[i] + i;
}
