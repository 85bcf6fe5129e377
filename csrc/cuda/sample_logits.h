#pragma once

#include <cstdint>

#include "cuda/numbers.h"
#include "cuda/stream.h"

namespace simsd::sample {

enum class Element : int32_t { float32, bfloat16, float16 };

// A value for every row n: data[n / inner * strides[0] + n % inner * strides[1]]. A vector over the rows has inner 1,
// one over groups of `inner` rows has strides[1] 0. Null data stands for the default.
template <typename T>
struct PerRow {
    const T* data = nullptr;
    int64_t strides[2] = {0, 0};  // in elements
    int32_t inner = 1;

    explicit operator bool() const { return data != nullptr; }
};

// The softmax of a row over the ids that top-k and top-p keep: e^(x - top) / total where x > cutoff_x, or x ==
// cutoff_x and id <= cutoff_id.
struct Law {
    float top;      // largest x, -inf where nothing is finite
    float total;    // of the kept ids
    float overall;  // of all ids
    float cutoff_x;
    int32_t cutoff_id;
};

// Draws `rows` rows of logits. Row n draws from row `row_index[n]` of the logits (n without an index); where that is
// outside [0, logit_rows + more_rows) nothing is read and the outputs are those of a row with nothing finite.
//
// Where few of many rows are wanted, `draw_of_row` gives the way back, and work is by row of the logits: row r is drawn
// as number draw_of_row[r], if that draws from row r at all. Entries of rows that nothing draws from need not be set.
struct Params {
    const void* logits;  // [logit_rows, V], row r at r / logits_inner * strides[0] + r % logits_inner * strides[1]
    int64_t logits_strides[3];  // of outer rows, inner rows, ids; in elements
    int32_t logits_inner;
    const void* more_logits;  // [more_rows, V] that go on behind those: row logit_rows + r at r * strides[0]
    int64_t more_strides[2];  // of rows, ids
    int32_t more_rows;
    Element element;
    int32_t logit_rows, vocabulary, rows;
    const int32_t* row_index;    // [rows] or nullptr
    const int32_t* draw_of_row;  // [logit_rows] or nullptr

    PerRow<float> temperature;  // default 0
    PerRow<int32_t> top_k;      // default 0, off
    PerRow<float> top_p;        // default 1, off
    PerRow<int64_t> seed;       // without it every row takes the argmax, whatever its temperature
    PerRow<int32_t> position;
    PerRow<int64_t> revealed;

    const uint32_t* banned;  // [ceil(V / 32)], bit id % 32 of word id / 32, or nullptr

    // Outputs, contiguous [rows]; all but `token` may be nullptr.
    int64_t* token;
    float *prob, *log_odds, *entropy, *logsumexp;
    float* draw_logprob;  // of the token under what it was drawn from: 0 for an argmax, -inf where nothing is finite
    Law* law;             // nullptr unless the caller judges by the filtered softmax

    void* scratch;  // scratch_bytes(tasks, vocabulary, may_filter()), 16-byte aligned, in any state

    // Whether top-k or top-p could have a say in what is asked.
    SIMSD_ANYWHERE bool may_filter() const { return (top_k.data || top_p.data) && (seed.data || law); }
    SIMSD_ANYWHERE int32_t tasks() const { return draw_of_row ? logit_rows : rows; }
};

// `filters`: whether top_k or top_p are given.
int64_t scratch_bytes(int64_t tasks, int64_t vocabulary, bool filters);

// The statistics and the draw of `sample_logits`. A row's outputs do not depend on other rows, bit by bit.
void launch_sample(const Params& params, Stream stream);

}  // namespace simsd::sample
