#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace simsd::sorting {

// Strides count elements; outputs are contiguous.
struct Params {
    const int64_t* experts;  // [M, C]
    int64_t token_stride, choice_stride;
    int32_t* offsets;  // out: [n_experts + 1]
    int32_t* rows;     // out: [M * C]
    int32_t* places;   // out: [M, C]
    int32_t entries;   // M * C
    int32_t choices;   // C
    int32_t n_experts;
};

void launch_sort(const Params& params, Stream stream);

}  // namespace simsd::sorting
