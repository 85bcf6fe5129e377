#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace simsd::store {

// A cache and the rows to write to it. Strides count elements.
struct Side {
    const void* rows;  // [B, Hkv, R, D]
    void* cache;       // [B, Hkv, C, D]
    int64_t row_strides[4], cache_strides[4];
};

struct Params {
    Side sides[2];         // keys, values
    const int32_t* slots;  // [B, R]
    int64_t slot_strides[2];
    int32_t heads, rows, dim, capacity;
    int64_t total_rows;  // B * R
};

// `element_bytes` is 2 or 4.
void launch_store(const Params& params, int element_bytes, Stream stream);

}  // namespace simsd::store
