#pragma once

#include <cstdint>

#include "common/rows.h"
#include "cuda/stream.h"

namespace simsd::activation {

enum class Element { float32, bfloat16, float16 };

struct Params {
    Rows<1> rows;
    const void* gate_up;  // [rows, 2 * I]
    void* out;            // [rows, I], contiguous
    int32_t size;         // I
    int32_t blocks;       // per row
};

void launch_silu_times(const Params& params, Element element, Stream stream);

}  // namespace simsd::activation
