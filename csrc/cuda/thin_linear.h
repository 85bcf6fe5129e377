#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace simsd::linear {

enum class Element { float32, bfloat16, float16 };

// out = x W^T. Strides count elements.
struct Params {
    const void* x;                    // [M, K], contiguous
    const void* weight;               // [N, K]
    void* out;                        // [M, N], contiguous
    int64_t rows, columns, k;         // M, N, K
    int64_t weight_stride, k_stride;  // of the weight
};

void launch_thin_linear(const Params& params, Element element, Stream stream);

}  // namespace simsd::linear
