// Rows of 16-bit elements from global to shared memory, as the tensor cores take them: COLUMNS to a row, zeros where
// the tensor has fewer, and 8 more between rows. An odd number of 16-byte chunks per row puts 8 neighbouring rows on
// different banks, with addresses that are a base plus constants (an XOR swizzle saves 1/16 of the memory, but works
// for powers of two only and costs an operation per access).
#pragma once

#include "cuda/attention/keys.h"

namespace simsd::intervals {

constexpr int CHUNK = 8;  // elements in 16 bytes

template <int COLUMNS>
constexpr int ROW_STRIDE = COLUMNS + CHUNK;

// Neighbouring threads that copy a row.
template <int COLUMNS>
constexpr int ROW_THREADS = COLUMNS <= 8 * CHUNK    ? 8
                            : COLUMNS <= 16 * CHUNK ? 16
                                                    : 32;

// What cannot be copied in whole chunks: up to 8 elements, `columns` of which exist.
template <typename T>
SIMSD_DEVICE void gather_chunk(T* to, const T* from, int64_t stride, int columns) {
#pragma unroll 1
    for (int i = 0; i < CHUNK; ++i) to[i] = i < columns ? from[i * stride] : T{0};
}

template <typename T, int COLUMNS>
SIMSD_DEVICE void load_queries(T* to, const Params& p, const Rows& rows, int most) {
    const int column = thread_index() % ROW_THREADS<COLUMNS> * CHUNK;
    if (column >= COLUMNS) return;
#pragma unroll 1
    for (int i = thread_index() / ROW_THREADS<COLUMNS>; i < most; i += thread_count() / ROW_THREADS<COLUMNS>) {
        const int columns = i < rows.count ? p.dim - column : 0;
        const T* from = static_cast<const T*>(p.q);
        if (columns > 0) from += query_offset(p, rows, rows.first + i) + column * p.q_strides[3];
        T* target = to + i * ROW_STRIDE<COLUMNS> + column;
        p.copy_q ? copy_async_16(target, from, columns > 0) : gather_chunk(target, from, p.q_strides[3], columns);
    }
}

// The keys or values of a tile. `from`: their KV head in the first page; `columns`: how many they have from there on.
// THREADS to a row: where they are the same for keys and values, registers hold one place instead of two.
template <typename T, int COLUMNS, int THREADS, int KEYS>
SIMSD_DEVICE void load_tile(T* to, const T* from, const int64_t (&strides)[4], int columns, bool copy,
                            const Window<KEYS>& window, int tile) {
    const int column = thread_index() % THREADS * CHUNK;
    if (column >= COLUMNS) return;
    columns -= column;
    from += column * strides[3];
    to += column;
    const uint32_t seen = columns > 0 ? window.seen[tile] : 0;
    const int row_stride = static_cast<int>(strides[2]);
    const int first = thread_index() / THREADS, step = thread_count() / THREADS;  // rows; step is a power of two
    for (int run = first / PAGE_UNIT; run < TILE / PAGE_UNIT; run += larger(1, step / PAGE_UNIT)) {
        const int unit = tile * (TILE / PAGE_UNIT) + run, start = run * PAGE_UNIT + first % PAGE_UNIT;
        const T* row = from + larger(window.page[unit], 0) * strides[0] +
                       static_cast<int64_t>(window.slot[unit] + first % PAGE_UNIT) * row_stride;
        if (copy) {
            T* target = to + start * ROW_STRIDE<COLUMNS>;
#pragma unroll 4
            for (int i = start; i < (run + 1) * PAGE_UNIT; i += step) {
                copy_async_16(target, row, seen >> i & 1);
                row += step * row_stride;
                target += step * ROW_STRIDE<COLUMNS>;
            }
        } else {
#pragma unroll 1
            for (int i = start; i < (run + 1) * PAGE_UNIT; i += step) {
                gather_chunk(to + i * ROW_STRIDE<COLUMNS>, row, strides[3], seen >> i & 1 ? columns : 0);
                row += step * row_stride;
            }
        }
    }
}

}  // namespace simsd::intervals
