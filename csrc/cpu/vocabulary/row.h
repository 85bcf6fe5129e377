// One row of logits: its softmax statistics, what top-k and top-p keep of it, and the draw. Shared by sample_logits and
// block_verify, so that a verifier judges by the very same draw. The Python definition is sample_logits/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/vocabulary/block.h"

namespace simsd::vocabulary {

constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

// Ids that count as -inf: bit id % 32 of word id / 32, as simsd_kernels.banned_mask makes them. Null data bans none.
struct Banned {
    const int32_t* data = nullptr;
    int64_t stride = 0, vocabulary = 0;

    Banned(const std::optional<torch::stable::Tensor>& banned,
           int64_t vocabulary);  // the tensor must have been checked

    uint32_t word(int64_t index) const { return data ? static_cast<uint32_t>(data[index * stride]) : 0; }
    // The lowest id that is not banned; 0 if there is none.
    int64_t lowest_allowed() const;
};

// x = logits / divisor with banned ids and NaN at -inf.
struct Row {
    Element element;
    const void* logits;
    int64_t stride;  // in elements
    int64_t vocabulary;
    float divisor;
    const Banned* banned;

    // x of ids begin .. begin + count; returns the count padded with -inf. x holds BLOCK floats.
    int64_t load(int64_t begin, int64_t count, float* x) const;
    float at(int64_t id) const;
};

// Row `index` of logits whose rows are `row_stride` elements apart.
const void* row_pointer(Element element, const void* logits, int64_t offset);

inline float divisor_of(float temperature) { return temperature > 0.0f ? temperature : 1.0f; }

// Softmax sums of a row with the largest entry kept apart: its weight is 1, and what the others add would drown in it.
struct Summary {
    float top = NEGATIVE_INFINITY;     // x of the best id; the lowest id among equals
    int64_t best = -1;                 // -1: nothing is finite
    float second = NEGATIVE_INFINITY;  // largest x of the others
    double sum = 0.0;                  // of e^(x - second) over the others
    double moment = 0.0;               // of e^(x - second) * (x - second) over the others

    // Takes in the block's ids begin .. begin + count; `x` is left as it was.
    void add(float* x, int64_t count, int64_t begin);

    bool empty() const { return best < 0; }
    double rest() const;  // sum of the others' weights, relative to the top's
    double total() const { return 1.0 + rest(); }
    float prob(float x) const;
    float log_odds(int64_t id, float x) const;
    float entropy() const;  // nats
    float logsumexp() const;
    // log(e^(x - top) / total), of ids of which the weights are `total` together.
    float log_prob(float x, double total) const;

  private:
    void raise_second(float x);
};

// The ids that top-k and top-p keep: those before and up to (x, id) in order of falling x, then rising id.
struct Cutoff {
    float x = NEGATIVE_INFINITY;
    int64_t id = std::numeric_limits<int64_t>::max();

    bool keeps(float value, int64_t at) const {
        return value > NEGATIVE_INFINITY && (value > x || (value == x && at <= id));
    }
};

struct Filter {
    int32_t top_k = 0;   // <= 0: off
    float top_p = 1.0f;  // >= 1: off

    bool active(int64_t vocabulary) const { return (top_k > 0 && top_k < vocabulary) || top_p < 1.0f; }
};

// Scratch, one per thread of work.
struct Workspace {
    std::vector<float> x;  // a whole row, where a filter needs one
    std::vector<float> weight;
    std::vector<float> finite;
    std::vector<int64_t> order;
};

// The kept ids' cutoff and the sum of their weights e^(x - top).
struct Kept {
    Cutoff cutoff;
    double total;
};

// Sums of the row; `copy` (or null) receives all of x, padded to BLOCK; `key` (or null) asks for the draw of x + noise.
Summary summarise(const Row& row, float* copy, const NoiseKey* key, Best* drawn);

// What the filter keeps of the row that `work.x` holds.
Kept filter_row(const Row& row, const Summary& summary, const Filter& filter, Workspace& work);

struct Draw {
    int64_t token;
    float x;
    float logprob;  // under what the token was drawn from: 0 for an argmax, -inf where nothing is finite
    Summary summary;
};

// The token: the argmax, or with a key the argmax of x + noise over the ids that the filter keeps.
Draw draw_row(const Row& row, const Filter& filter, const NoiseKey* key, Workspace& work);

// Rows per task, so that a task is worth a thread's while.
inline int64_t rows_per_task(int64_t vocabulary) { return 1 + 16384 / (vocabulary + 1); }

}  // namespace simsd::vocabulary
