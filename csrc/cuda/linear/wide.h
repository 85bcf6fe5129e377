// The product of many rows of 16-bit elements: a block walks through the segments of K (tiles.h) one after the other,
// and every warp keeps a segment's sums and the total of those before it.
//
// Data path. What a block copies (cp.async) in a stage of 64 k all of its warps read (ldmatrix): a weight crosses from
// L2 once for every row tile, and x once for every column tile. With 64 x 32 outputs a warp reads 6 KB of shared memory
// for 32 products, some 48 clocks of it for 51 of a tensor core (mma.sync at 62% of what wgmma reaches). Rows and
// columns that are not there repeat the last one; warps without rows only copy.
#pragma once

#include "cuda/linear/tiles.h"

namespace simsd::linear {
namespace {

// A block of `DOWN` x `ACROSS` warps, each of `ROWS` tiles of 8 rows by `COLUMNS` tiles of 16 columns.
template <int Down, int Across, int Rows, int Columns>
struct WideTile {
    static constexpr int DOWN = Down, ACROSS = Across, ROWS = Rows, COLUMNS = Columns;
    static constexpr int WARPS = DOWN * ACROSS, THREADS = WARPS * WARP;
    static constexpr int HEIGHT = DOWN * ROWS * 8, WIDTH = ACROSS * COLUMNS * 16;
    static constexpr int PITCH = WIDTH + 8;               // elements between rows of the results: banks again
    static constexpr int BLOCKS = THREADS > 128 ? 1 : 2;  // that a multiprocessor has registers for
};

// The stages of a block.
template <typename T, typename W>
struct Stages {
    static constexpr int WEIGHT_UNITS = W::WIDTH / Elements<T>::UNIT_COLUMNS;
    static constexpr int UNITS = WEIGHT_UNITS + W::HEIGHT / 8;  // per step
    static constexpr int SIZE = CHUNK / STEP * UNITS * UNIT;    // pieces
    static constexpr int COUNT = least(MOST_STAGES, RING / (SIZE * 16));
    static constexpr int BYTES = COUNT * SIZE * 16;
    static_assert(WEIGHT_UNITS % W::WARPS == 0 && W::HEIGHT / 8 % W::WARPS == 0 && COUNT >= 3 &&
                  W::HEIGHT * W::PITCH * 2 <= BYTES);
};

using Wide128x128 = WideTile<4, 2, 4, 4>;  // rows, columns
using Wide64x128 = WideTile<2, 2, 4, 4>;
using Wide64x64 = WideTile<2, 2, 4, 2>;
using Wide32x128 = WideTile<1, 4, 4, 2>;

template <typename T, typename W, typename P>
__global__ void __launch_bounds__(W::THREADS, W::BLOCKS) multiply_wide(const P p) {
    using Sizes = Stages<T, W>;
    using X = typename Elements<T>::X;
    using Weight = typename Elements<T>::W;
    Shared shared;
    Bytes16* memory = shared.take<Bytes16>(Sizes::BYTES / 16);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const Place place = place_of<W::HEIGHT>(p);
    if (place.row >= place.end) return;
    const int64_t column = place.column_tile * W::WIDTH;
    const int chunks = chunks_of(p.k), segment = segment_of(chunks);

    // What this lane copies next: some units of the weight and of x.
    constexpr int WEIGHTS = Sizes::WEIGHT_UNITS / W::WARPS, XS = Sizes::UNITS / W::WARPS - WEIGHTS;
    const Weight* weight[WEIGHTS];
    const X* x[XS];
    int64_t k = t * PIECE;
    const int ahead = k_of<T>(lane) - t * PIECE;  // of it, the weight's k
#pragma unroll
    for (int i = 0; i < WEIGHTS; ++i) {
        int64_t c = column + (i * W::WARPS + warp) * Elements<T>::UNIT_COLUMNS + column_of<T>(lane);
        if (c >= p.columns) c = p.columns - 1;
        weight[i] = static_cast<const Weight*>(p.weight) + place.weight_offset + c * p.weight_stride + k + ahead;
    }
#pragma unroll
    for (int i = 0; i < XS; ++i) {
        int64_t r = place.row + (i * W::WARPS + warp) * 8 + g;
        if (r >= place.end) r = place.end - 1;
        x[i] = static_cast<const X*>(p.x) + r * p.k + k;
    }
    // [stage][step][unit][piece]
    const int down = warp / W::ACROSS, across = warp % W::ACROSS;
    constexpr int OWN = W::COLUMNS * 16 / Elements<T>::UNIT_COLUMNS;  // the weight's units that a warp multiplies
    Ring<T, Sizes::COUNT, Sizes::SIZE> ring(memory, across * OWN, Sizes::WEIGHT_UNITS + down * W::ROWS, warp);
    const auto copy = [&](Bytes16* to) {
#pragma unroll
        for (int step = 0; step < CHUNK / STEP; ++step) {
            Bytes16* here = to + step * Sizes::UNITS * UNIT;
            const bool inside = k + step * STEP < p.k, weight_inside = k + ahead + step * STEP < p.k;
#pragma unroll
            for (int i = 0; i < WEIGHTS; ++i) {
                copy_async_16(here + i * W::WARPS * UNIT, weight[i] + step * STEP, weight_inside);
            }
#pragma unroll
            for (int i = 0; i < XS; ++i) {
                copy_async_16(here + (Sizes::WEIGHT_UNITS + i * W::WARPS) * UNIT, x[i] + step * STEP, inside);
            }
        }
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) weight[i] += CHUNK;
#pragma unroll
        for (int i = 0; i < XS; ++i) x[i] += CHUNK;
        k += CHUNK;
    };

#pragma unroll
    for (int stage = 0; stage < Sizes::COUNT - 1; ++stage) {
        if (stage < chunks) copy(ring.own(stage));
        copy_commit();
    }
    const bool has_rows = place.row + down * W::ROWS * 8 < place.end;
    float totals[W::COLUMNS][W::ROWS][4] = {};
    for (int chunk = 0; chunk < chunks;) {
        float sums[W::COLUMNS][W::ROWS][4] = {};
        const int end = chunk + segment < chunks ? chunk + segment : chunks;
        for (; chunk < end; ++chunk) {
            copy_wait<Sizes::COUNT - 2>();
            block_barrier();  // all have copied this stage, and none reads the last one any more
            if (chunk + Sizes::COUNT - 1 < chunks) copy(ring.own());
            copy_commit();
            if (has_rows) {
#pragma unroll
                for (int step = 0; step < CHUNK / STEP; ++step) {
                    multiply_step<T>(sums, ring, step * Sizes::UNITS * UNIT);
                }
            }
            ring.advance();
        }
#pragma unroll
        for (int c = 0; c < W::COLUMNS; ++c) {
#pragma unroll
            for (int r = 0; r < W::ROWS; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) totals[c][r][i] = sum(totals[c][r][i], sums[c][r][i]);
            }
        }
    }
    copy_wait<0>();
    block_barrier();

    // [row][column], where the ring was, so that rows are written 16 bytes at a time.
    X* results = reinterpret_cast<X*>(memory);
#pragma unroll
    for (int c = 0; c < W::COLUMNS; ++c) {
        if constexpr (Elements<T>::INT8) {
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                const int64_t at = column + (across * W::COLUMNS + c) * 16 + 8 * upper + g;
                const float scale = at < p.columns ? scale_of<X>(p, place, at) : 0.0f;
#pragma unroll
                for (int r = 0; r < W::ROWS; ++r) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        totals[c][r][2 * upper + i] = product(totals[c][r][2 * upper + i], scale);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < W::ROWS; ++r) {
            X* to = results + ((down * W::ROWS + r) * 8 + 2 * t) * W::PITCH + (across * W::COLUMNS + c) * 16 + g;
            to[0] = from_float<X>(totals[c][r][0]);
            to[W::PITCH] = from_float<X>(totals[c][r][1]);
            to[8] = from_float<X>(totals[c][r][2]);
            to[W::PITCH + 8] = from_float<X>(totals[c][r][3]);
        }
    }
    block_barrier();
    const bool whole = p.columns % PIECE == 0;
    for (int i = thread_index(); i < W::HEIGHT * (W::WIDTH / PIECE); i += W::THREADS) {
        const int r = i / (W::WIDTH / PIECE), c = i % (W::WIDTH / PIECE) * PIECE;
        if (place.row + r >= place.end || column + c >= p.columns) continue;
        const X* from = results + r * W::PITCH + c;
        X* to = static_cast<X*>(p.out) + (place.row + r) * p.columns + column + c;
        if (whole) {
            store_16(to, *reinterpret_cast<const Bytes16*>(from));
        } else {
            for (int j = 0; j < PIECE && column + c + j < p.columns; ++j) to[j] = from[j];
        }
    }
}

}  // namespace
}  // namespace simsd::linear
