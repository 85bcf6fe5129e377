#pragma once

#include <cstdint>

#include "cuda/attention_plan.h"
#include "cuda/stream.h"

namespace simsd::intervals {

enum class Element { float32, bfloat16, float16 };

constexpr int MOST_COLUMNS = 256;

// Strides count elements.
struct Params : Mask {
    const void* q;  // [B, Hq, Lq, D]
    const void* k;  // [B, Hkv, Lk, D], or [P, Hkv, page_size, D] where there is a block table
    const void* v;  // as k
    void* out;      // [B, Lq, Hq, D], contiguous
    int64_t q_strides[4], k_strides[4], v_strides[4];  // those of k and v between keys below 2^26
    int32_t kv_heads, dim;
    float scale;  // of q k^T, to a power of two: it includes log2(e)
    // Set by `prepare`; `scratch` is of as many floats as it asks for.
    float* scratch;
    bool walks;      // a block of threads goes over all keys of its rows
    int32_t warps;   // of a block
    int32_t blocks;  // of attend_parts, which take the plan's list in turns
    int64_t parts;   // whose results wait in scratch, at most
    // Set by `launch_attention`.
    bool negated;                      // q k^T is to be taken times -1; scale is positive
    bool copy_q, copy_kv;              // rows are whole, aligned 16-byte chunks
    int32_t k_row_bytes, v_row_bytes;  // from key to key
};

// Chooses how the call is served, for a GPU with so many multiprocessors: which does not change a bit. Floats of
// scratch that it takes.
int64_t prepare(Params& params, Element element, int multiprocessors);

// Makes the plan first, in params.plan, unless it is `planned` already.
void launch_attention(const Params& params, Element element, bool planned, Stream stream);

// One kernel each; called by launch_attention.
void launch_parts(const Params& params, Element element, Stream stream);
void launch_combine(const Params& params, Element element, Stream stream);
void launch_walk(const Params& params, Element element, Stream stream);
int64_t walk_floats(const Params& params, int columns, int64_t blocks);  // scratch that it takes
void launch_float(const Params& params, Stream stream);

}  // namespace simsd::intervals
