// Rows of 16-bit elements from global to shared memory, as the tensor cores take them: COLUMNS to a row, zeros where
// the tensor has fewer, and 8 more between rows. An odd number of 16-byte chunks per row puts 8 neighbouring rows on
// different banks, with addresses that are a base plus constants (an XOR swizzle saves 1/16 of the memory, but works
// for powers of two only and costs an operation per access).
#pragma once

#include "cuda/attention/rows.h"

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

// The keys or the values that this thread loads of every tile: its chunk of rows thread / THREADS and every `step`th
// after it. A page has whole units of 16 rows, so a row's place is its unit's plus a constant of the thread's.
template <typename T, int COLUMNS, int THREADS>
struct Loader {
    const T* from;  // the chunk of the first row in the first page's first unit
    int64_t page_stride, column_stride;
    int32_t row_stride, columns;  // how many of the chunk's columns exist, from there on
    bool copies, idle;

    SIMSD_DEVICE void start(const void* data, const int64_t (&strides)[4], const Mask& m, const Rows& rows, int first,
                            int dim, bool copy) {
        const int column = thread_index() % THREADS * CHUNK, row = thread_index() / THREADS % PAGE_UNIT;
        row_stride = static_cast<int32_t>(strides[2]);
        column_stride = strides[3];
        page_stride = m.block_table ? strides[0] : 0;
        columns = dim - first - column;
        copies = copy;
        idle = column >= COLUMNS;
        from = static_cast<const T*>(data) + rows.kv_head * strides[1] + row * static_cast<int64_t>(row_stride) +
               (first + column) * column_stride;
        if (!m.block_table) from += rows.batch * strides[0];
    }

    // To a tile in shared memory; of its rows those whose bit is set in `seen` exist.
    SIMSD_DEVICE void load(T* to, const int32_t (&pages)[2], const int32_t (&slots)[2], uint32_t seen) const {
        if (idle) return;
        const int first = thread_index() / THREADS, step = thread_count() / THREADS;  // a power of two
        to += first % PAGE_UNIT * ROW_STRIDE<COLUMNS> + thread_index() % THREADS * CHUNK;
        if (columns <= 0) seen = 0;
#pragma unroll
        for (int unit = 0; unit < TILE / PAGE_UNIT; ++unit) {
            if (step > PAGE_UNIT && first / PAGE_UNIT % 2 != unit) continue;
            const T* row = from + pages[unit] * page_stride + static_cast<int64_t>(slots[unit]) * row_stride;
            T* target = to + unit * PAGE_UNIT * ROW_STRIDE<COLUMNS>;
#pragma unroll 1
            for (int i = first % PAGE_UNIT; i < PAGE_UNIT; i += step) {
                const bool exists = seen >> (unit * PAGE_UNIT + i) & 1;
                if (copies) {
                    copy_async_16(target, row, exists);
                } else {
                    gather_chunk(target, row, column_stride, exists ? columns : 0);
                }
                row += step * static_cast<int64_t>(row_stride);
                target += step * ROW_STRIDE<COLUMNS>;
            }
        }
    }
};

}  // namespace simsd::intervals
