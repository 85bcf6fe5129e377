// What the thin_linear kernels are given, and the entry points that every instruction set provides.
#pragma once

#include <cstdint>

namespace simsd::linear {

enum class Element { float32, bfloat16, float16, int8 };

constexpr int64_t MAX_TILE = 64;  // outputs of one `multiply`

struct Kernels {
    int64_t rows;       // rows of x that one `multiply` takes at most
    int64_t columns;    // weight rows that one `multiply` takes, always
    int64_t int8_rows;  // rows of x up to which `multiply_int8` is faster than `convert` and then `multiply`
    // `count` elements to float32, the first at `data` + offset, `stride` apart (both in elements).
    void (*convert)(Element, const void* data, int64_t offset, int64_t stride, int64_t count, float* to);
    // out[r * out_stride + c] = sum over k of x[r * K + k] * weight[c][k], for 1 <= count <= `rows` rows of x and
    // `columns` rows of the weight.
    void (*multiply)(int64_t count, const float* x, const float* const* weight, int64_t k, float* out,
                     int64_t out_stride);
    // The same, to the bit, where the weight is int8.
    void (*multiply_int8)(int64_t count, const float* x, const int8_t* const* weight, int64_t k, float* out,
                          int64_t out_stride);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace simsd::linear
