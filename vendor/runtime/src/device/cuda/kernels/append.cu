// Rotates queries and keys and stores keys and values in their pages, in one launch; QI_KV names
// the pages' type.
//
// Bytes: q read and written, k and v read, pages written: about 50 KB per token, latency only.
// Shape: a block per token and head, first the query heads, then the KV heads; a thread per
// dimension (in turns of 128), so that the 32 dimensions that share a scale in Q8_0 are one warp.
#include "kv.cuh"

struct Rotation {
    const f32* cos_sin;  // [n_tokens][n_rot/2][2]; null: no rotation
    int n_rot;           // dimensions that are turned, the first ones
    int neox;            // pairs (i, i + n_rot/2) instead of (2i, 2i + 1)

    QI_DEVICE int first_of(int pair) const { return neox ? pair : 2 * pair; }
    QI_DEVICE int second_of(int pair) const { return neox ? n_rot / 2 + pair : 2 * pair + 1; }
};

// Both dimensions of a pair, turned.
struct Turned {
    f32 x, y;
};
QI_DEVICE Turned turned(const f32* head, const Rotation& rotation, i64 token, int pair) {
    const f32* angle = rotation.cos_sin + token * rotation.n_rot + 2 * pair;
    const f32 x = head[rotation.first_of(pair)], y = head[rotation.second_of(pair)];
    return {fmaf(x, angle[0], -mul(y, angle[1])), fmaf(x, angle[1], mul(y, angle[0]))};
}

// Dimension d of a rotated head.
QI_DEVICE f32 rotated(const f32* head, const Rotation& rotation, i64 token, int d) {
    if (!rotation.cos_sin || d >= rotation.n_rot) return head[d];
    const int n_pairs = rotation.n_rot / 2;
    const bool second = rotation.neox ? d >= n_pairs : d % 2;
    const Turned both = turned(head, rotation, token, rotation.neox ? d % n_pairs : d / 2);
    return second ? both.y : both.x;
}

QI_DEVICE void store(KvF16, u8* keys, u8* values, int head_dim, int slot, int d, f32 key,
                     f32 value) {
    if (d >= head_dim) return;
    reinterpret_cast<u16*>(keys)[d * page_size + slot] = f32_to_f16(key);
    reinterpret_cast<u16*>(values)[slot * head_dim + d] = f32_to_f16(value);
}

// A warp's 32 values as a block: the scale as it will be read, and this lane's code. A value that
// is not finite makes the whole block NaN.
struct Q8Code {
    u16 scale;
    i8 code;
};
QI_DEVICE Q8Code q8_code(f32 x) {
    const bool finite = fabsf(x) <= largest_float;
    const f32 max = warp_max(fabsf(x));
    const f32 wanted = __all_sync(QI_WARP_MASK, finite) ? max / 127.0f : not_a_number();
    const u16 scale = f32_to_f16(wanted);
    const f32 rounded = f16_to_f32(scale);
    const f32 inverse = rounded > 0.0f ? 1.0f / rounded : 0.0f;
    f32 code = 0.0f;
    if (inverse > 0.0f) {
        // To nearest even; a product beyond 2^22 is beyond 127 in any case.
        const f32 product = fminf(fmaxf(mul(x, inverse), -256.0f), 256.0f);
        code = (product + 12582912.0f) - 12582912.0f;
    }
    return {scale, i8(i32(fminf(fmaxf(code, -127.0f), 127.0f)))};
}

QI_DEVICE void store(KvQ8_0, u8* keys, u8* values, int head_dim, int slot, int d, f32 key,
                     f32 value) {
    // head_dim is a multiple of 32: a warp is wholly inside or outside.
    if (d >= head_dim) return;
    const Q8Code k = q8_code(key), v = q8_code(value);
    keys[d * page_size + slot] = u8(k.code);
    values[slot * head_dim + d] = u8(v.code);
    if (d % kv_block != 0) return;
    const int n_blocks = head_dim / kv_block, block = d / kv_block;
    reinterpret_cast<u16*>(keys + head_dim * page_size)[block * page_size + slot] = k.scale;
    reinterpret_cast<u16*>(values + head_dim * page_size)[slot * n_blocks + block] = v.scale;
}

// grid (n_head + n_head_kv, n_tokens); k and v are left as they were.
QI_KERNEL qi_append(f32* q, i64 q_stride, const f32* k, const f32* v, i64 kv_stride, int n_head,
                    int head_dim, const f32* cos_sin, int n_rot, int neox, const i32* positions,
                    const i32* tables, u8* pool, i64 page_stride, i64 layer_offset, i64 head_bytes,
                    const i32* pages) {
    const Rotation rotation = {cos_sin, n_rot, neox};
    const KvPages kv = {pool, page_stride, layer_offset, head_bytes, pages};
    const i64 token = blockIdx.y;
    const int head = int(blockIdx.x), position = positions[token];
    // Whole warps, so that blocks of 32 dimensions meet.
    const int n_dims = ceil_div(head_dim, warp_size) * warp_size;
    if (head < n_head) {
        if (!cos_sin) return;
        f32* at = q + token * q_stride + i64(head) * head_dim;
        for (int pair = int(threadIdx.x); pair < n_rot / 2; pair += int(blockDim.x)) {
            const Turned both = turned(at, rotation, token, pair);
            at[rotation.first_of(pair)] = both.x;
            at[rotation.second_of(pair)] = both.y;
        }
        return;
    }
    if (position < 0) return;
    const int kv_head = head - n_head, slot = position % page_size;
    const int page = tables[token] + position / page_size;
    if (pages[page] < 0) return;
    u8* keys = kv.head(page, kv_head);
    u8* values = keys + QI_KV::keys_bytes(head_dim);
    const f32* key = k + token * kv_stride + i64(kv_head) * head_dim;
    const f32* value = v + token * kv_stride + i64(kv_head) * head_dim;
    for (int d = int(threadIdx.x); d < n_dims; d += int(blockDim.x)) {
        const bool inside = d < head_dim;
        store(QI_KV{}, keys, values, head_dim, slot, d,
              inside ? rotated(key, rotation, token, d) : 0.0f, inside ? value[d] : 0.0f);
    }
}
