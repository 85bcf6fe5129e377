#pragma once

#include <cstdint>

#include "common/rows.h"
#include "cuda/stream.h"

namespace simsd::layer {

enum class Element { float32, bfloat16, float16 };

struct NormParams {
    Rows<2> rows;        // of the residual, then of x
    void* residual;      // [rows, D], in place
    const void* x;       // [rows, D], null for none
    const void* weight;  // [D]
    int64_t weight_stride;
    void* out;  // [rows, D], contiguous
    int32_t dim;
    float eps;
};

void launch_add_norm(const NormParams& params, Element element, Stream stream);

}  // namespace simsd::layer
