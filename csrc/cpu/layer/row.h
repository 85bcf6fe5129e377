// What lies between the matrix products of a layer, one row at a time; every instruction set provides these loops.
#pragma once

#include <cstdint>

namespace simsd::layer {

enum class Element { float32, bfloat16, float16 };

// A row's first element and the distance to the next, in elements.
struct Source {
    const void* data;
    int64_t stride;
};

// For each Element.
struct Kernels {
    // residual [D] += x (null: nothing), then out = weight * (residual / rms(residual)); `out` is contiguous. The order
    // of the sum follows from `dim` alone.
    void (*add_rms_norm[3])(Source x, void* residual, int64_t residual_stride, Source weight, int64_t dim, float eps,
                            void* out);
    // out [count] = silu(gate) * up, both `stride` apart; `out` is contiguous. Every element's bits are its own.
    void (*silu_mul[3])(const void* gate, const void* up, int64_t stride, int64_t count, void* out);
    // out [size] = the sum over c < choices of weights[c] * rows[c], each product rounded, the sum in float32 and in
    // the order of c; rows have their elements `stride` apart, `out` is contiguous. Every element's bits are its own.
    void (*combine_experts[3])(const void* const* rows, const float* weights, int64_t choices, int64_t stride,
                               int64_t size, void* out);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

const Kernels& kernels();  // for this machine

}  // namespace simsd::layer
