// Where few rows' results for each split wait to be added up.
#pragma once

#include "cuda/attention/block.h"

namespace simsd::intervals {

struct Partials {
    float* max;  // [B * Hkv, splits, rows]
    float* sum;  // [B * Hkv, splits, rows]; where it is 0 the row saw nothing, and the output is not written
    float* out;  // [B * Hkv, splits, rows, padded D]

    SIMSD_ANYWHERE explicit Partials(const Params& p) {
        const int64_t count = p.heads * p.splits * p.group * p.q_rows;
        max = p.partials;
        sum = max + count;
        out = max + (2 * count + 3) / 4 * 4;
    }
};

SIMSD_DEVICE int64_t partial_row(const Params& p, int head, int split, int row) {
    return (static_cast<int64_t>(head) * p.splits + split) * p.group * p.q_rows + row;
}

}  // namespace simsd::intervals
