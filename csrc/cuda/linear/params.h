// What the products of thin_linear and grouped_linear are given.
#pragma once

#include <cstdint>

namespace simsd::linear {

enum class Element { float32, bfloat16, float16 };

// out = x W^T. Strides count elements.
struct Params {
    const void* x;                    // [M, K], contiguous
    const void* weight;               // [N, K]
    void* out;                        // [M, N], contiguous
    int64_t rows, columns, k;         // M, N, K
    int64_t weight_stride, k_stride;  // of the weight
    int32_t multiprocessors;          // of the device
    int32_t row_tiles;                // as the launch cuts M
    const void* scale;                // [N], of an int8 weight; null where the weight has the dtype of x
    int64_t scale_stride;
    bool scale_is_float;  // else it has the dtype of x
};

// Rows offsets[e] .. offsets[e + 1] of x times the weight of expert e, whose [N, K] is `expert_stride` from the last's.
struct GroupedParams : Params {
    const int32_t* offsets;  // [experts + 1]
    int64_t offsets_stride, expert_stride, scale_expert_stride;
    int32_t experts;
};

}  // namespace simsd::linear
