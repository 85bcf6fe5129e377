// The product of few rows of 16-bit elements: a warp takes a segment of K (tiles.h), and the block adds the warps'
// sums.
//
// Data path. Up to 8 rows of x cost one product per 16 x 16 weights, and no tensor core works for rows that are not
// there. Every warp has a ring of stages of its own, of 32 k each: cp.async from global to shared memory, ldmatrix from
// there. Warps share nothing until they add up. Rows and columns that are not there repeat the last one, at the cost of
// no other bytes, and nobody stores what comes of them.
#pragma once

#include "cuda/linear/tiles.h"

namespace simsd::linear {
namespace {

constexpr int MOST_ROW_TILES = 8;  // of 8 rows, per block

// A block of `ROWS` tiles of 8 rows by `COLUMNS` tiles of 16 columns.
template <typename T, int ROWS, int COLUMNS>
struct Tile {
    static constexpr int WEIGHTS = COLUMNS * 16 / Elements<T>::UNIT_COLUMNS;
    static constexpr int UNITS = WEIGHTS + ROWS;  // per stage: the weight's, then x's
    static constexpr int STAGE = UNITS * UNIT;    // pieces
    static constexpr int STAGES = least(MOST_STAGES, RING / (WARPS * STAGE * 16));
    static constexpr int BYTES = WARPS * STAGES * STAGE * 16;
    static constexpr int OUTPUTS = ROWS * 8 * COLUMNS * 16;
    static_assert(WARPS == SEGMENTS && STAGES >= 2 && WARPS * OUTPUTS * 4 <= BYTES);
};

// The `count` elements that a row has from here on, at most a piece of them, and zeros.
template <bool Vector, typename T>
SIMSD_DEVICE void fetch(Bytes16* to, const T* from, int64_t count, int64_t stride) {
    if constexpr (Vector) {
        copy_async_16(to, from, count > 0);
    } else if constexpr (sizeof(T) == 1) {
        Bytes16 piece = {};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint32_t byte = i < count ? static_cast<uint8_t>(from[i * stride]) : 0;
            piece.words[i / 4] |= byte << i % 4 * 8;
        }
        *to = piece;
    } else {
        Bytes16 piece;
#pragma unroll
        for (int i = 0; i < PIECE; i += 2) {
            const T low = i < count ? from[i * stride] : T{0};
            const T high = i + 1 < count ? from[(i + 1) * stride] : T{0};
            piece.words[i / 2] = pack(low, high);
        }
        *to = piece;
    }
}

template <typename T, int ROWS, int COLUMNS, bool Vector, typename P>
__global__ void __launch_bounds__(WARPS* WARP, ROWS < MOST_ROW_TILES ? 2 : 1) multiply(const P p) {
    using Sizes = Tile<T, ROWS, COLUMNS>;
    using X = typename Elements<T>::X;
    using W = typename Elements<T>::W;
    constexpr int WEIGHTS = Sizes::WEIGHTS;
    Shared shared;
    Bytes16* memory = shared.take<Bytes16>(Sizes::BYTES / 16);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const Place place = place_of<ROWS * 8>(p);
    if (place.row >= place.end) return;
    const int64_t row = place.row, column = place.column_tile * (COLUMNS * 16);
    const int chunks = chunks_of(p.k), segment = segment_of(chunks), first = warp * segment;
    const int steps = (first + segment < chunks ? segment : first < chunks ? chunks - first : 0) * (CHUNK / STEP);

    // What this lane copies next.
    int64_t k = static_cast<int64_t>(first) * CHUNK + t * PIECE;
    const int ahead = k_of<T>(lane) - t * PIECE;  // of it, the weight's k
    const W* weight[WEIGHTS];
    const X* x[ROWS];
#pragma unroll
    for (int i = 0; i < WEIGHTS; ++i) {
        int64_t c = column + Elements<T>::UNIT_COLUMNS * i + column_of<T>(lane);
        if (c >= p.columns) c = p.columns - 1;
        weight[i] =
            static_cast<const W*>(p.weight) + place.weight_offset + c * p.weight_stride + (k + ahead) * p.k_stride;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t r = row + 8 * i + g < place.end ? row + 8 * i + g : place.end - 1;
        x[i] = static_cast<const X*>(p.x) + r * p.k + k;
    }
    // [stage][unit][piece]
    Ring<T, Sizes::STAGES, Sizes::STAGE> ring(memory + warp * Sizes::STAGES * Sizes::STAGE, 0, WEIGHTS, 0);
    const auto copy = [&](Bytes16* to) {
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) {
            fetch<Vector>(to + i * UNIT, weight[i], p.k - k - ahead, p.k_stride);
            weight[i] += Vector ? STEP : STEP * p.k_stride;
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            fetch<Vector>(to + (WEIGHTS + i) * UNIT, x[i], p.k - k, 1);
            x[i] += STEP;
        }
        k += STEP;
    };

    float sums[COLUMNS][ROWS][4] = {};
#pragma unroll
    for (int step = 0; step < Sizes::STAGES - 1; ++step) {
        if (step < steps) copy(ring.own(step));
        copy_commit();
    }
    const auto turn = [&](int step) {
        copy_wait<Sizes::STAGES - 2>();
        warp_barrier();
        if (step + Sizes::STAGES - 1 < steps) copy(ring.own());
        copy_commit();
        multiply_step<T>(sums, ring, 0);
        ring.advance();
    };
    if constexpr (Elements<T>::INT8) {  // too long a turn for the compiler to unroll by itself
#pragma unroll 4
        for (int step = 0; step < steps; ++step) turn(step);
    } else {
        for (int step = 0; step < steps; ++step) turn(step);
    }
    copy_wait<0>();
    block_barrier();

    // The warps' sums, [warp][row][column], where the ring was.
    float* partial = reinterpret_cast<float*>(memory);
    constexpr int WIDTH = COLUMNS * 16;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float* to = partial + warp * Sizes::OUTPUTS + (8 * r + 2 * t) * WIDTH + 16 * c + g;
            to[0] = sums[c][r][0];
            to[WIDTH] = sums[c][r][1];
            to[8] = sums[c][r][2];
            to[WIDTH + 8] = sums[c][r][3];
        }
    }
    block_barrier();
    for (int i = thread_index(); i < Sizes::OUTPUTS; i += WARPS * WARP) {
        float total = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) total = sum(total, partial[other * Sizes::OUTPUTS + i]);
        const int64_t r = row + i / WIDTH, c = column + i % WIDTH;
        if (r < place.end && c < p.columns) {
            if constexpr (Elements<T>::INT8) total = product(total, scale_of<X>(p, place, c));
            static_cast<X*>(p.out)[r * p.columns + c] = from_float<X>(total);
        }
    }
}

}  // namespace
}  // namespace simsd::linear
