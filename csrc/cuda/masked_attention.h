#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace simsd::intervals {

enum class Element { float32, bfloat16, float16 };

constexpr int MOST_COLUMNS = 256;

// Strides count elements.
struct Params {
    const void* q;               // [B, Hq, Lq, D]
    const void* k;               // [B, Hkv, Lk, D], or [P, Hkv, page_size, D] where there is a block table
    const void* v;               // as k
    void* out;                   // [B, Lq, Hq, D], contiguous
    const int32_t* clock;        // [B, Lq]
    const int32_t* birth;        // [B, Lk]
    const int32_t* death;        // [B, Lk]
    const int32_t* kv_len;       // [B] or null
    const int32_t* block_table;  // [B, n_pages] or null
    float* partials;             // what `scratch_floats` asks for, or null
    int64_t q_strides[4], k_strides[4], v_strides[4];  // those of k and v between keys below 2^26
    int64_t clock_strides[2], birth_strides[2], death_strides[2], kv_len_stride, table_strides[2];
    int64_t heads;  // B * Hkv
    int32_t kv_heads, group, q_rows, keys, dim;
    int32_t page_size, pages;  // of k and v, where there is a block table
    float scale;               // of q k^T, to a power of two: it includes log2(e)
    // Set by the launches.
    int32_t row_tiles, splits;
    bool copy_q, copy_k, copy_v;  // rows are whole, aligned 16-byte chunks
};

// Floats of scratch for few rows: with `partials` of that size the keys are spread over blocks. 0 where one block had
// better walk over all keys; both give the same bits. Never more than 2^23 (32 MiB), the size of a small L2 cache.
int64_t scratch_floats(const Params& params, Element element, int multiprocessors);

void launch_attention(const Params& params, Element element, Stream stream);

// One kernel each; called by launch_attention.
void launch_splits(const Params& params, Element element, Stream stream);
void launch_combine(const Params& params, Element element, Stream stream);
void launch_walk(const Params& params, Element element, Stream stream);
void launch_float(const Params& params, Stream stream);

}  // namespace simsd::intervals
