// The product of 16-bit elements, on tensor cores.
//
// Order of summation. K is cut into chunks of 64, dealt out to 8 warps in turn. A warp adds its chunks with m16n8k16
// products, ascending, and the block adds the 8 warps' sums, ascending. An output is one element of such products,
// whatever tile it lies in. Past K both operands are zeros. All of these are constants.
//
// Data path. The weight is the products' 16-row operand, x the 8-column one: up to 8 rows of x cost one product per
// 16 x 16 weights, and no tensor core works for rows that are not there. In a step of 32 k lane (g, t) takes
// k = 8t .. 8t + 7 of rows g: 16 bytes, which serve as the k pairs of two products. The hardware thinks of them as
// other k, but of the same ones in both operands. So what a lane copies (cp.async, global to shared memory) is what
// that lane reads: the ring of stages needs no barrier. Warps share nothing until they add up.
#pragma once

#include "cuda/device.h"
#include "cuda/linear/place.h"

namespace simsd::linear {
namespace {

constexpr int CHUNK = 64;        // k that a warp takes in turn: 128 bytes of a row of the weight, a cache line
constexpr int STEP = 32;         // k per stage
constexpr int PIECE = 8;         // 16-bit elements in 16 bytes
constexpr int RING = 96 * 1024;  // bytes of stages per block; sm_120 has 99 KB
constexpr int MOST_STAGES = 8;
constexpr int MOST_ROW_TILES = 8;  // of 8 rows, per block

constexpr int least(int a, int b) { return a < b ? a : b; }

// A block of `ROWS` tiles of 8 rows by `COLUMNS` tiles of 16 columns.
template <int ROWS, int COLUMNS>
struct Tile {
    static constexpr int LOADS = 2 * COLUMNS + ROWS;  // of 16 bytes, per lane and stage: the weight's rows, then x's
    static constexpr int STAGES = least(MOST_STAGES, RING / (WARPS * WARP * LOADS * 16));
    static constexpr int BYTES = WARPS * STAGES * LOADS * WARP * 16;
    static constexpr int OUTPUTS = ROWS * 8 * COLUMNS * 16;
    static_assert(STAGES >= 2 && WARPS * OUTPUTS * 4 <= BYTES);
};

// 8 elements of a row from `k` on, zeros past `end`, as a copy into shared memory of this lane's own.
template <bool Vector, typename T>
SIMSD_DEVICE void fetch(Bytes16* to, const T* row, int64_t k, int64_t end, int64_t stride, bool exists) {
    if constexpr (Vector) {
        const bool inside = exists && k < end;
        copy_async_16(to, inside ? row + k : row, inside);
    } else {
        Bytes16 piece;
#pragma unroll
        for (int i = 0; i < PIECE / 2; ++i) {
            const int64_t at = k + 2 * i;
            const T low = exists && at < end ? row[at * stride] : T{0};
            const T high = exists && at + 1 < end ? row[(at + 1) * stride] : T{0};
            piece.words[i] = pack(low, high);
        }
        *to = piece;
    }
}

template <typename T, int ROWS, int COLUMNS, bool Vector, typename P>
__global__ void __launch_bounds__(WARPS* WARP, ROWS < MOST_ROW_TILES ? 2 : 1) multiply(const P p) {
    using Sizes = Tile<ROWS, COLUMNS>;
    Shared shared;
    Bytes16* memory = shared.take<Bytes16>(Sizes::BYTES / 16);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const Place place = place_of<ROWS * 8>(p);
    if (place.row >= place.end) return;
    const int64_t row = place.row, column = place.column_tile * (COLUMNS * 16);
    const T* own_weight = static_cast<const T*>(p.weight) + place.weight_offset;

    Bytes16* ring = memory + warp * (Sizes::STAGES * Sizes::LOADS * WARP) + lane;  // [stage][load][lane]
    const T* weight = own_weight + (column + g) * p.weight_stride;
    const T* x = static_cast<const T*>(p.x) + (row + g) * p.k;
    const int64_t chunks = (p.k + CHUNK - 1) / CHUNK;
    const int64_t steps = chunks > warp ? (chunks - warp + WARPS - 1) / WARPS * (CHUNK / STEP) : 0;

    const auto copy = [&](int64_t step, int stage) {
        const int64_t k = (step / (CHUNK / STEP) * WARPS + warp) * CHUNK + step % (CHUNK / STEP) * STEP + t * PIECE;
        Bytes16* to = ring + stage * (Sizes::LOADS * WARP);
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; ++i) {
            const bool exists = column + g + 8 * i < p.columns;
            const T* from = exists ? weight + 8 * i * p.weight_stride : own_weight;
            fetch<Vector>(to + i * WARP, from, k, p.k, p.k_stride, exists);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const bool exists = row + g + 8 * i < place.end;
            const T* from = exists ? x + 8 * i * p.k : static_cast<const T*>(p.x);
            fetch<Vector>(to + (2 * COLUMNS + i) * WARP, from, k, p.k, 1, exists);
        }
    };

    float sums[COLUMNS][ROWS][4] = {};
#pragma unroll
    for (int step = 0; step < Sizes::STAGES - 1; ++step) {
        if (step < steps) copy(step, step);
        copy_commit();
    }
    int stage = 0, free = Sizes::STAGES - 1;
    for (int64_t step = 0; step < steps; ++step) {
        copy_wait<Sizes::STAGES - 2>();
        if (step + Sizes::STAGES - 1 < steps) copy(step + Sizes::STAGES - 1, free);
        copy_commit();
        const Bytes16* here = ring + stage * (Sizes::LOADS * WARP);
        Bytes16 w[2 * COLUMNS];
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; ++i) w[i] = here[i * WARP];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Bytes16 b = here[(2 * COLUMNS + r) * WARP];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const uint32_t a[4] = {w[2 * c].words[2 * half], w[2 * c + 1].words[2 * half],
                                           w[2 * c].words[2 * half + 1], w[2 * c + 1].words[2 * half + 1]};
                    multiply_add<T>(sums[c][r], a, b.words[2 * half], b.words[2 * half + 1]);
                }
            }
        }
        free = stage;
        stage = stage + 1 == Sizes::STAGES ? 0 : stage + 1;
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
        float total = partial[i];
#pragma unroll
        for (int other = 1; other < WARPS; ++other) total += partial[other * Sizes::OUTPUTS + i];
        const int64_t r = row + i / WIDTH, c = column + i % WIDTH;
        if (r < place.end && c < p.columns) static_cast<T*>(p.out)[r * p.columns + c] = from_float<T>(total);
    }
}

}  // namespace
}  // namespace simsd::linear
