// Handing rows to the host and taking its answer, without anyone waiting for a whole stream.
//
// Both ways the rows lie in the host's memory, mapped for the device: 16 KB per token of 4096
// values, 0.3 to 1.3 us of a PCIe link, so what counts is the way there and back. A round is
// numbered: `base`, which comes with the batch, plus its place in the step; its number in a flag
// says that everything before is visible. Numbers only grow, so no flag is ever reset. A kernel
// that waits reads all it waits for as one quad: each read is a trip over the bus.
//
// Shape: blocks of 256 threads over quads. Each block of qi_receive waits for the host, not for
// another block, so any number of them may be resident.
#include "prelude.cuh"

// Nanoseconds of a clock that all multiprocessors share.
QI_DEVICE u64 now() {
#ifndef QI_PLAIN
    u64 time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
#else
    return u64(clock64());
#endif
}

// What the host wrote while the kernel runs: past all caches.
QI_DEVICE Quad load_fresh16(const u32* at) {
    Quad q;
#ifndef QI_PLAIN
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
                 : "l"(at)
                 : "memory");
#else
    for (int i = 0; i < 4; ++i)
        q.v[i] = reinterpret_cast<const volatile u32*>(at)[i];
#endif
    return q;
}

QI_DEVICE bool is_aligned16(const void* a, const void* b) {
    return ((u64(a) | u64(b)) & 15u) == 0;
}

// The threads of all blocks copy n words.
QI_DEVICE void copy_words(const u32* from, u32* to, i64 n) {
    const i64 first = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 step = i64(gridDim.x) * blockDim.x;
    const i64 n_quads = is_aligned16(from, to) ? n / 4 : 0;
    for (i64 i = first; i < n_quads; i += step)
        reinterpret_cast<Quad*>(to)[i] = reinterpret_cast<const Quad*>(from)[i];
    for (i64 i = 4 * n_quads + first; i < n; i += step)
        to[i] = from[i];
}

// Times of one kind of round, in nanoseconds.
struct RoundTimes {
    u64 sent_at;
    u64 device;  // from sending to wanting the answer, summed over rounds
    u64 wait;    // from there to having it
};

// Copies up to three arrays of words to the host's memory, then raises the flag to round `place` of
// the step. ticket: zero, left at zero. grid: any.
QI_KERNEL qi_send(const u32* a, u32* to_a, i64 n_a, const u32* b, u32* to_b, i64 n_b, const u32* c,
                  u32* to_c, i64 n_c, const u32* base, u32 place, u32* ticket, u32* flag,
                  u64* times) {
    copy_words(a, to_a, n_a);
    copy_words(b, to_b, n_b);
    copy_words(c, to_c, n_c);
    __threadfence_system();
    if (!last_block(ticket, gridDim.x) || threadIdx.x != 0) return;
    __threadfence_system();
    *reinterpret_cast<volatile u32*>(flag) = *base + place;
    reinterpret_cast<RoundTimes*>(times)->sent_at = now();
}

// Words of the quad, which is aligned to its size: the last round answered, whether the host has
// given the step up, whether a kernel has waited in vain.
constexpr int answered = 0, given_up = 1, late = 2;

// Waits until the host has answered round `place` of the step, or given the step up; then y = from,
// or y += from with accumulate. The limit ends the wait after so many nanoseconds and says so in
// `late`; with that said nobody waits any more, and y stays as it is. grid: any.
QI_KERNEL qi_receive(const u32* from, i64 n, int accumulate, f32* y, const u32* base, u32 place,
                     u32* awaited, i64 limit, u64* times) {
    __shared__ u32 has_come;
    if (threadIdx.x == 0) {
        const u64 start = now();
        const u32 round = *base + place;
        has_come = 0;
        while (true) {
            const Quad seen = load_fresh16(awaited);
            if (seen.v[answered] == round) {
                has_come = 1;
                break;
            }
            if (seen.v[given_up] || seen.v[late]) break;
            if (now() - start > u64(limit)) {
                *reinterpret_cast<volatile u32*>(awaited + late) = 1;
                break;
            }
            __nanosleep(100);
        }
        __threadfence_system();
        if (blockIdx.x == 0) {
            RoundTimes& t = *reinterpret_cast<RoundTimes*>(times);
            t.device += start - t.sent_at;
            t.wait += now() - start;
        }
    }
    __syncthreads();
    if (!has_come) return;
    const i64 first = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 step = i64(gridDim.x) * blockDim.x;
    const i64 n_quads = is_aligned16(from, y) ? n / 4 : 0;
    for (i64 i = first; i < n_quads; i += step) {
        const Quad q = load_fresh16(from + 4 * i);
        Float4& at = reinterpret_cast<Float4*>(y)[i];
        Float4 sum = at;
        for (int k = 0; k < 4; ++k)
            sum.v[k] = (accumulate ? sum.v[k] : 0.0f) + __uint_as_float(q.v[k]);
        at = sum;
    }
    for (i64 i = 4 * n_quads + first; i < n; i += step) {
        const f32 value = __uint_as_float(reinterpret_cast<const volatile u32*>(from)[i]);
        y[i] = accumulate ? y[i] + value : value;
    }
}
