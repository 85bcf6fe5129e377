// What the masked_attention kernels are given, and the entry points that every instruction set provides.
#pragma once

#include <cstdint>

namespace simsd::attention {

// Boundaries in keys. They are constants (never derived from rows, batch, capacity or threads): a row's sums then run
// over the same keys in the same order whatever else rides along.
constexpr int64_t TILE = 64;    // granularity of the dead / fully visible test
constexpr int64_t SPLIT = 256;  // softmax is exact within a split, splits are folded in order

struct TileRange {
    int32_t birth_min, birth_max, death_min, death_max;
};

enum class Element { float32, bfloat16, float16 };

struct Problem {
    Element element;
    const void* q;  // [B, Hq, Lq, D]
    const void* k;  // [B, Hkv, Lk, D], or pages [P, Hkv, page_size, D]
    const void* v;  // like k
    void* out;      // [B, Hq, Lq, D]
    int64_t q_strides[4], k_strides[4], v_strides[4], out_strides[4];
    const int32_t* clock;      // [B, Lq], contiguous
    const int32_t* birth;      // [B, Lk], contiguous
    const int32_t* death;      // [B, Lk], contiguous
    const int64_t* key_count;  // [B], slots that are read at all
    const TileRange* tiles;    // [B, tile_count]
    const int32_t* pages;      // [B, Lk / page_size], contiguous; negative: no page. Null where K and V are not paged
    int64_t page_size;
    int64_t batch, kv_heads, group, q_rows, keys, dim, tile_count;
    float scale;
};

// Packed row r of a KV head is query r / group of its head r % group: a block of rows spans few clocks.
// Rows are the vector lanes, so that K and V are read as they lie and broadcast, whatever their strides.
struct RowBlock {
    int64_t first_row, rows;
    int64_t lanes;  // rows rounded up to whole vectors
    int32_t clock_min, clock_max;
    int32_t* clock;  // [lanes]
    float* q;        // [D, lanes], scaled
};

// Softmax over part of the keys: maximum, sum of weights and weighted sum of V, lane by lane.
struct State {
    float* max;  // [lanes]
    float* sum;  // [lanes]
    float* out;  // [D, lanes], not yet divided by sum
};

// What the backward of a KV head works on, in float32. A row's `pitch` is D rounded up to whole vectors.
struct Head {
    const float *k, *v;  // [Lk, D], rows k_pitch and v_pitch apart
    int64_t k_pitch, v_pitch, pitch;
    float *dk, *dv;  // [Lk, pitch], added to
    float* spare;    // [pitch], nobody reads it
};

// And one of its row blocks, besides queries and clocks.
struct RowGradients {
    float* weights;          // [Lk + padded_keys, lanes], of the keys that some row sees
    float* inverse;          // [lanes], 1 / sum of weights; 0 for rows that see nothing
    const float* dout;       // [D, lanes]; 0 for rows that see nothing, as in the next two
    const float* q_rows;     // [lanes, pitch], scaled
    const float* dout_rows;  // [lanes, pitch]
    const float* delta;      // [lanes], sum over D of dout * out
    float* dq;               // [D, lanes], added to; of q unscaled
};

struct Kernels {
    int64_t lanes;       // of a full row block
    int64_t half_lanes;  // of a row block of at most this many rows
    // Floats of scratch that `attend` needs.
    int64_t (*scratch_floats)(const Problem&);
    // Converts the split's K and V rows to float32 in `scratch` where they are not already readable as such. Only tiles
    // that some query with a clock in clock_min .. clock_max may see are touched.
    void (*stage)(const Problem&, int64_t batch, int64_t kv_head, int64_t split, int32_t clock_min, int32_t clock_max,
                  float* scratch);
    // Attention of one row block over one (staged) split. Returns false, leaving `partial` alone, if no row sees a key.
    bool (*attend)(const Problem&, int64_t batch, int64_t kv_head, int64_t split, const RowBlock&, float* scratch,
                   State partial);
    // state := state combined with partial.
    void (*fold)(const Problem&, const RowBlock&, State state, State partial);
    // state.out := state.out / state.sum, and 0 for rows that saw nothing.
    void (*normalise)(const Problem&, const RowBlock&, State state);

    // Backward.
    int64_t padded_keys;  // room for what a block of keys computes past the last one
    // Whether float32 rows of K or V with these strides are read where they lie, and a row of D elements as float32.
    bool (*in_place)(const Problem&, const int64_t* strides);
    void (*convert)(const Problem&, const void* data, int64_t offset, int64_t stride, float* to);
    // Weights, not yet divided by their sum, and inverse. Returns false if no row sees a key.
    bool (*weigh)(const Problem&, int64_t batch, const Head&, const RowBlock&, const RowGradients&);
    // Adds to dq, dk and dv what the weighed row block gives.
    void (*propagate)(const Problem&, int64_t batch, const Head&, const RowBlock&, const RowGradients&);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace simsd::attention
