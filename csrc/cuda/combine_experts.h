#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace simsd::combination {

enum class Element { float32, bfloat16, float16 };

// Strides count elements.
struct Params {
    const void* y;  // [S, N]
    int64_t row_stride, element_stride;
    const void* weights;  // [M, C]
    int64_t weight_strides[2];
    const int32_t* places;  // [M, C]
    int64_t place_strides[2];
    void* out;  // [M, N], contiguous
    int64_t tokens, rows;
    int32_t choices, size;  // C, N
    int32_t blocks;         // per token
};

void launch_combine(const Params& params, Element element, Stream stream);

}  // namespace simsd::combination
