#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace simsd::rope {

enum class Element { float32, bfloat16, float16 };

// Strides count elements.
struct Heads {
    const void* data;    // [B, R, H, D]
    const void* weight;  // [D], null for no norm; not for V
    int64_t strides[4], weight_stride;
};

struct Cache {
    void* data;  // [B, Hkv, C, D]
    int64_t strides[4];
};

struct Angles {
    const void* data;  // [B, R, D_rot]
    int64_t strides[3];
};

struct Params {
    Heads q, k, v;
    Angles cos, sin;
    Cache k_cache, v_cache;
    const int32_t* slots;  // [B, R]
    int64_t slot_strides[2];
    void* out;  // [B, Hq, R, D], contiguous
    int32_t rows, q_heads, kv_heads, dim, rotary, capacity;
    int64_t total_rows;  // B * R
    float eps;
};

constexpr int MAX_DIM = 256;

void launch_norm_rope_store(const Params& params, Element element, Stream stream);

}  // namespace simsd::rope
