// The thin_linear kernels, written once against a `Simd` type (float vector F and its operations).
//
// Every output is a dot product of two rows that both lie along K, so nothing is packed: LANES partial sums run down K
// in one vector, partial sum i over the elements k with k % LANES == i, in order, and are then added as a fixed tree.
// A tile of rows x 4 outputs shares what it loads, but each of its accumulators goes through that same sequence,
// whatever the tile's shape and wherever the output sits in it. That is the row-independence promise.
//
// Floor: 2 * M * N * K flops against N * K weights read once. With 6 x 4 accumulators of AVX-512, 10 loads feed 24
// FMAs, so the FMA units are the limit from some 8 rows up and memory (or the cache that holds the weight) below that:
// there an int8 weight, a fourth of the bytes of float32, takes 2 to 3 times less time.
//
// This file is compiled once per instruction set under a target pragma. It must not instantiate library templates: the
// linker could then pick their AVX-512 copy for code that runs everywhere.
#pragma once

#include "cpu/linear/problem.h"

namespace simsd::linear {
namespace {

constexpr int COLUMNS = 4;

// `W`: float, or int8_t, whose values become floats in registers.
template <typename Simd, int ROWS, typename W>
inline void tile(const float* x, const W* const* weight, int64_t k, float* out, int64_t out_stride) {
    using F = typename Simd::F;
    static_assert(ROWS * COLUMNS <= MAX_TILE);
    F sum[ROWS][COLUMNS];
    const float* x_row[ROWS];
    const W* w_row[COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        x_row[r] = x + r * k;
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Simd::zero();
    }
    for (int c = 0; c < COLUMNS; ++c) w_row[c] = weight[c];

    const auto step = [&](auto load) __attribute__((always_inline)) {
        F w[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) w[c] = load(w_row[c]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const F x_r = load(x_row[r]);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Simd::fma(x_r, w[c], sum[r][c]);
        }
    };
    int64_t i = 0;
    for (; i + Simd::LANES <= k; i += Simd::LANES) {
        // What the next tile reads, where rows are neighbours: they are short, and the CPU's own prefetch starts anew
        // with each. From memory 2048 x 2048 take a sixth to a fourth less time so (1 row, AVX-512).
        if constexpr (sizeof(W) == 1) {
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(w_row[c] + COLUMNS * k + i);
        }
        step([i](const auto* row) __attribute__((always_inline)) { return Simd::load(row + i); });
    }
    // Lanes past K multiply 0 by 0. They add nothing to sums that began at +0.
    if (const int64_t rest = k - i; rest > 0) {
        step([i, rest](const auto* row) __attribute__((always_inline)) { return Simd::load_first(row + i, rest); });
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) Simd::store_sums(out + r * out_stride, sum[r]);
}

template <typename Simd, typename W, int ROWS = Simd::ROWS>
void multiply(int64_t count, const float* x, const W* const* weight, int64_t k, float* out, int64_t out_stride) {
    if (count == ROWS) {
        tile<Simd, ROWS>(x, weight, k, out, out_stride);
    } else if constexpr (ROWS > 1) {
        multiply<Simd, W, ROWS - 1>(count, x, weight, k, out, out_stride);
    }
}

template <typename Simd>
void convert(Element element, const void* data, int64_t offset, int64_t stride, int64_t count, float* to) {
    if (element == Element::float32) {
        const float* from = static_cast<const float*>(data) + offset;
        for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
        return;
    }
    if (element == Element::int8) {
        const int8_t* from = static_cast<const int8_t*>(data) + offset;
        int64_t i = 0;
        if (stride == 1) {
            for (; i + Simd::LANES <= count; i += Simd::LANES) Simd::store(to + i, Simd::load(from + i));
        }
        for (; i < count; ++i) to[i] = from[i * stride];
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    const bool half = element == Element::float16;
    int64_t i = 0;
    if (stride == 1) {
        for (; i + Simd::LANES <= count; i += Simd::LANES) {
            Simd::store(to + i, half ? Simd::load_float16(from + i) : Simd::load_bfloat16(from + i));
        }
    }
    uint16_t bits[Simd::LANES] = {};
    alignas(64) float values[Simd::LANES];
    while (i < count) {
        const int64_t here = count - i < Simd::LANES ? count - i : Simd::LANES;
        for (int64_t j = 0; j < here; ++j) bits[j] = from[(i + j) * stride];
        Simd::store(values, half ? Simd::load_float16(bits) : Simd::load_bfloat16(bits));
        for (int64_t j = 0; j < here; ++j) to[i + j] = values[j];
        i += here;
    }
}

template <typename Simd>
constexpr Kernels KERNELS = {
    Simd::ROWS, COLUMNS, Simd::INT8_ROWS, convert<Simd>, multiply<Simd, float>, multiply<Simd, int8_t>};

}  // namespace
}  // namespace simsd::linear
