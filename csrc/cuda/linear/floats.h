// The product of float32 elements, on CUDA cores.
//
// Order of summation. A lane adds with FMAs what it finds at 4 consecutive k in every 128, ascending, and the warp adds
// the lanes as a tree. Past K both operands are zeros. All of these are constants.
//
// Data path. A warp takes 4 columns and up to 8 rows, registers only; x from L1 after the first warp of a block has
// read it. An int8 weight comes 4 bytes at a time.
#pragma once

#include "cuda/device.h"
#include "cuda/linear/int8.h"
#include "cuda/warp.h"

namespace simsd::linear {
namespace {

constexpr int FLOATS = 4;        // that a lane takes at a time
constexpr int WARP_COLUMNS = 4;  // float32: columns of a warp

// `Again`: others of the block will read the same, so it is to stay in L1.
template <bool Vector, bool Again>
SIMSD_DEVICE void read(float (&to)[FLOATS], const float* row, int64_t k, int64_t end, int64_t stride, bool exists) {
    if constexpr (Vector) {
        Bytes16 piece = {};
        if (exists && k < end) piece = Again ? *reinterpret_cast<const Bytes16*>(row + k) : load_16(row + k);
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) to[i] = bits_as_float(piece.words[i]);
    } else {
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) to[i] = exists && k + i < end ? row[(k + i) * stride] : 0.0f;
    }
}

// Of an int8 weight.
template <bool Vector, bool Again>
SIMSD_DEVICE void read(float (&to)[FLOATS], const int8_t* row, int64_t k, int64_t end, int64_t stride, bool exists) {
    if constexpr (Vector) {
        const uint32_t piece = exists && k < end ? *reinterpret_cast<const uint32_t*>(row + k) : 0;
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) to[i] = static_cast<int8_t>(piece >> 8 * i);
    } else {
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) to[i] = exists && k + i < end ? row[(k + i) * stride] : 0;
    }
}

// `W`: of the weight, float or int8_t.
template <typename W, int ROWS, bool Vector, typename P>
__global__ void __launch_bounds__(WARPS* WARP) multiply_float32(const P p) {
    const Place place = place_of<ROWS>(p);
    if (place.row >= place.end) return;
    const int64_t row = place.row, column = (place.column_tile * WARPS + warp_index()) * WARP_COLUMNS;
    const W* weight = static_cast<const W*>(p.weight) + place.weight_offset + column * p.weight_stride;
    const float* x = static_cast<const float*>(p.x) + row * p.k;
    float sums[ROWS * WARP_COLUMNS] = {};
    constexpr int AT_ONCE = Vector || sizeof(W) > 1 ? 2 : 1;  // bytes one by one take more registers than there are
#pragma unroll AT_ONCE
    for (int64_t k = lane_index() * FLOATS; k < p.k; k += WARP * FLOATS) {
        float w[WARP_COLUMNS][FLOATS];
#pragma unroll
        for (int c = 0; c < WARP_COLUMNS; ++c) {
            read<Vector, false>(w[c], weight + c * p.weight_stride, k, p.k, p.k_stride, column + c < p.columns);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float a[FLOATS];
            read<Vector, true>(a, x + r * p.k, k, p.k, 1, row + r < place.end);
#pragma unroll
            for (int c = 0; c < WARP_COLUMNS; ++c) {
#pragma unroll
                for (int i = 0; i < FLOATS; ++i) {
                    sums[r * WARP_COLUMNS + c] = fused(a[i], w[c][i], sums[r * WARP_COLUMNS + c]);
                }
            }
        }
    }
    float mine = 0.0f;  // lane r * 4 + c keeps that output
#pragma unroll
    for (int i = 0; i < ROWS * WARP_COLUMNS; ++i) {
        const float total = warp_sum(sums[i]);
        if (lane_index() == i) mine = total;
    }
    const int64_t r = row + lane_index() / WARP_COLUMNS, c = column + lane_index() % WARP_COLUMNS;
    if (lane_index() < ROWS * WARP_COLUMNS && r < place.end && c < p.columns) {
        if constexpr (sizeof(W) == 1) mine = product(mine, scale_of<float>(p, place, c));
        static_cast<float*>(p.out)[r * p.columns + c] = mine;
    }
}

}  // namespace
}  // namespace simsd::linear
