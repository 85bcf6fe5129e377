// What the thin and the wide kernel share of the product of 16-bit elements on tensor cores, so that an output has the
// same bits from either.
//
// Order of summation. K is cut into chunks of 64 and these into 8 segments of equally many neighbours; the last
// segments may be shorter or empty. A segment is added from zero with m16n8k16 products, ascending, and its sum is
// added to zero and the segments before it. The weight is the products' 16-row operand, x the 8-column one, and an
// output is one element of such products, whatever tile it lies in. Past K both operands are zeros. All of these are
// constants. (int8.h says which 16 k of 32 a product of an int8 weight takes.)
//
// In shared memory 8 rows of 32 k are a unit of 32 pieces of 16 bytes, so placed that neither the copies of a warp,
// whose lane (g, t) takes piece t of row g, nor ldmatrix, which takes one piece of 8 rows, meet in a bank.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/linear/int8.h"

namespace simsd::linear {
namespace {

constexpr int SEGMENTS = 8;
constexpr int CHUNK = 64;  // k: 128 bytes of a row, a cache line
constexpr int STEP = 32;   // k of a unit
constexpr int UNIT = 32;   // pieces
constexpr int PIECE = 8;   // 16-bit elements in 16 bytes

constexpr int RING = 96 * 1024;  // bytes of stages per block; sm_120 has 99 KB
constexpr int MOST_STAGES = 8;

constexpr int least(int a, int b) { return a < b ? a : b; }

// The chunks of a product, and those of each segment but the last ones.
SIMSD_DEVICE int chunks_of(int64_t k) { return static_cast<int>((k + CHUNK - 1) / CHUNK); }
SIMSD_DEVICE int segment_of(int chunks) { return (chunks + SEGMENTS - 1) / SEGMENTS; }

SIMSD_DEVICE int place_in_unit(int row, int piece) { return row * 4 + (piece ^ row / 2); }

// What of a unit of the weight a lane copies to its place: a piece, from this column and this k on.
template <typename T>
SIMSD_DEVICE int column_of(int lane) {
    return Elements<T>::INT8 ? place_in_unit(lane / 4, lane % 4) / 2 : lane / 4;
}
template <typename T>
SIMSD_DEVICE int k_of(int lane) {
    return Elements<T>::INT8 ? place_in_unit(lane / 4, lane % 4) % 2 * 16 : lane % 4 * PIECE;
}

// A lane's places in a ring of STAGES stages of SIZE pieces. They go along from stage to stage: computed anew from the
// lane, as the compiler would, they were a third of a loop's instructions.
template <typename T, int STAGES, int SIZE>
class Ring {
    using Weight = std::conditional_t<Elements<T>::INT8, Bytes8, Bytes16>;
    static constexpr int HALVES = Elements<T>::INT8 ? 1 : 2, PER_PIECE = 16 / sizeof(Weight);

  public:
    // `weight`, `x`: the first units that the warp reads in a stage; `own`: the first that it copies.
    SIMSD_DEVICE Ring(Bytes16* stages, int weight, int x, int own) {
        const int lane = lane_index(), row = lane % 8, matrix = lane / 8;
        if constexpr (Elements<T>::INT8) {
            weight_[0] = reinterpret_cast<const Bytes8*>(stages + weight * UNIT) + lane;
            x_ = stages + x * UNIT + place_in_unit(lane / 4, lane % 4);
        } else {
            // Two units of 8 columns in turn, the first 16 k and the last ones; a unit of x whole.
            weight_[0] = stages + (weight + matrix % 2) * UNIT + place_in_unit(row, matrix / 2);
            weight_[1] = stages + (weight + matrix % 2) * UNIT + (place_in_unit(row, matrix / 2) ^ 2);
            x_ = stages + x * UNIT + place_in_unit(row, matrix);
        }
        own_ = stages + own * UNIT + place_in_unit(lane / 4, lane % 4) + (STAGES - 1) * SIZE;
    }

    // Where to read, or to point ldmatrix, in the stage that is read, and where to copy to: in the stage read before
    // it, or `stage`.
    SIMSD_DEVICE const Weight* weight(int half) const { return weight_[half]; }
    SIMSD_DEVICE const Bytes16* x() const { return x_; }
    SIMSD_DEVICE Bytes16* own() const { return own_; }
    SIMSD_DEVICE Bytes16* own(int stage) const { return own_ + (stage - (STAGES - 1)) * SIZE; }  // before any advance

    SIMSD_DEVICE void advance() {
        own_ += last_;
        last_ = stage_ + 1 == STAGES ? -(STAGES - 1) * SIZE : SIZE;
        stage_ = stage_ + 1 == STAGES ? 0 : stage_ + 1;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) weight_[half] += last_ * PER_PIECE;
        x_ += last_;
    }

  private:
    const Weight* weight_[HALVES];
    const Bytes16* x_;
    Bytes16* own_;
    int stage_ = 0, last_ = -(STAGES - 1) * SIZE;
};

// Adds the products of a step, `offset` pieces into the stage: of COLUMNS times 16 columns of the weight, and ROWS
// units of x (warp).
template <typename T, int COLUMNS, int ROWS, typename R>
SIMSD_DEVICE void multiply_step(float (&sums)[COLUMNS][ROWS][4], const R& ring, int offset) {
    using X = typename Elements<T>::X;
    uint32_t a[2][COLUMNS][4];
    if constexpr (Elements<T>::INT8) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Bytes8 bytes = ring.weight(0)[(offset + c * UNIT) * 2 + i * WARP];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    widen<X>(a[half][c][i], a[half][c][i + 2], bytes.words[half]);
                }
            }
        }
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) load_matrices(a[half][c], ring.weight(half) + offset + c * 2 * UNIT);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        uint32_t b[4];
        if constexpr (Elements<T>::INT8) {
            const Bytes16 piece = ring.x()[offset + r * UNIT];
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i] = piece.words[i];
        } else {
            load_matrices(b, ring.x() + offset + r * UNIT);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) multiply_add<X>(sums[c][r], a[half][c], b[2 * half], b[2 * half + 1]);
        }
    }
}

}  // namespace
}  // namespace simsd::linear
