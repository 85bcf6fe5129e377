// Which tiles a product is cut into. They change no bit of it.
#pragma once

#include "cuda/launch.h"
#include "cuda/linear/floats.h"
#include "cuda/linear/thin.h"
#include "cuda/linear/wide.h"

namespace simsd::linear {
namespace {

// Columns from which a block takes 32 of them rather than 16: still some 96 blocks with several rows, where x's bytes
// count, and several waves of blocks with few.
constexpr int64_t WIDE_FROM[] = {8192, 3072};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t row_tiles(const Params& p, int64_t tile) { return divide_up(p.rows, tile); }

// As many as there can be: every expert that may have rows may have one that does not fill its tile.
inline int64_t row_tiles(const GroupedParams& p, int64_t tile) {
    const int64_t groups = p.rows < p.experts ? p.rows : p.experts;
    return groups + (p.rows - groups) / tile;
}

// What the launch is chosen by: rows that meet one weight, and columns of all weights that are read.
struct Work {
    int64_t rows, columns;
};

template <typename P>
void launch_cut(const char* op, void (*kernel)(P), P p, int rows, int columns, int threads, int shared_bytes,
                Stream stream) {
    const int64_t tiles = row_tiles(p, rows);
    const Grid grid{tiles * divide_up(p.columns, columns)};
    p.row_tiles = static_cast<int32_t>(tiles);  // the grid, which is larger, fits 32 bits
    launch(op, kernel, grid, threads, shared_bytes, stream, p);
}

template <typename T, int ROWS, int COLUMNS, bool Vector, typename P>
void launch_tile(const char* op, const P& p, Stream stream) {
    launch_cut(op, multiply<T, ROWS, COLUMNS, Vector, P>, p, ROWS * 8, COLUMNS * 16, WARPS * WARP,
               Tile<T, ROWS, COLUMNS>::BYTES, stream);
}

template <typename T, int ROWS, typename P>
void launch_thin(const char* op, const P& p, Work work, Stream stream) {
    if (ROWS < MOST_ROW_TILES && work.rows > ROWS * 8) {
        launch_thin<T, least(2 * ROWS, MOST_ROW_TILES)>(op, p, work, stream);
    } else if (work.columns >= WIDE_FROM[ROWS > 1]) {
        launch_tile<T, ROWS, 2, true>(op, p, stream);
    } else {
        launch_tile<T, ROWS, 1, true>(op, p, stream);
    }
}

template <typename T, typename W, typename P>
void launch_wide(const char* op, const P& p, Stream stream) {
    launch_cut(op, multiply_wide<T, W, P>, p, W::HEIGHT, W::WIDTH, W::THREADS, Stages<T, W>::BYTES, stream);
}

// Whether two thirds of the multiprocessors or more get a block of their own.
template <typename W>
bool enough(Work work, int multiprocessors) {
    return divide_up(work.rows, W::HEIGHT) * divide_up(work.columns, W::WIDTH) * 3 >= 2 * multiprocessors;
}

// The tile that reads least from L2 of those that are filled and keep the multiprocessors busy; thin ones, whose warps
// share a sum among them, where none does.
template <typename T, typename P>
void launch_aligned(const char* op, const P& p, Work work, Stream stream) {
    const int64_t rows = work.rows;
    const int count = p.multiprocessors;
    if (rows > 64 && enough<Wide128x128>(work, count)) return launch_wide<T, Wide128x128>(op, p, stream);
    if (rows > 32 && enough<Wide64x128>(work, count)) return launch_wide<T, Wide64x128>(op, p, stream);
    if (rows > 32 && enough<Wide64x64>(work, count)) return launch_wide<T, Wide64x64>(op, p, stream);
    if (rows > 16 && enough<Wide32x128>(work, count)) return launch_wide<T, Wide32x128>(op, p, stream);
    launch_thin<T, 1>(op, p, work, stream);
}

template <typename W, int ROWS, bool Vector, typename P>
void launch_float32(const char* op, const P& p, Work work, Stream stream) {
    if (Vector && ROWS < 8 && work.rows > ROWS) {
        return launch_float32<W, least(2 * ROWS, 8), Vector>(op, p, work, stream);
    }
    launch_cut(op, multiply_float32<W, ROWS, Vector, P>, p, ROWS, WARPS * WARP_COLUMNS, WARPS * WARP, 0, stream);
}

inline bool experts_aligned(const Params&, int) { return true; }
inline bool experts_aligned(const GroupedParams& p, int element_bytes) {
    return p.expert_stride * element_bytes % 16 == 0 || p.experts == 1;
}

// Whether every 16 bytes that a lane takes are aligned and lie within one row.
template <typename X, typename W, typename P>
bool aligned(const P& p) {
    constexpr int element_bytes = sizeof(W);
    const auto fits = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const bool rows_fit = p.weight_stride * element_bytes % 16 == 0 || p.columns == 1;
    return fits(p.x) && fits(p.weight) && rows_fit && experts_aligned(p, element_bytes) && p.k_stride == 1 &&
           p.k * element_bytes % 16 == 0 && p.k * sizeof(X) % 16 == 0;
}

template <typename W, typename P>
void launch_float32(const char* op, const P& p, Work work, Stream stream) {
    aligned<float, W>(p) ? launch_float32<W, 1, true>(op, p, work, stream)
                         : launch_float32<W, 8, false>(op, p, work, stream);
}

template <typename T, typename P>
void launch_16_bit(const char* op, const P& p, Work work, Stream stream) {
    // Strided and unaligned weights come through the same steps, an element at a time.
    aligned<typename Elements<T>::X, typename Elements<T>::W>(p)
        ? launch_aligned<T>(op, p, work, stream)
        : launch_tile<T, MOST_ROW_TILES, 1, false>(op, p, stream);
}

template <typename P>
void launch_product(const char* op, const P& p, Element element, Work work, Stream stream) {
    const bool int8 = p.scale != nullptr;
    switch (element) {
        case Element::float32:
            return int8 ? launch_float32<int8_t>(op, p, work, stream) : launch_float32<float>(op, p, work, stream);
        case Element::bfloat16:
            return int8 ? launch_16_bit<Int8Weight<Bfloat16>>(op, p, work, stream)
                        : launch_16_bit<Bfloat16>(op, p, work, stream);
        case Element::float16:
            return int8 ? launch_16_bit<Int8Weight<Float16>>(op, p, work, stream)
                        : launch_16_bit<Float16>(op, p, work, stream);
    }
}

}  // namespace
}  // namespace simsd::linear
