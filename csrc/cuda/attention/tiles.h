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

// What this thread loads of every tile: a chunk of the keys, or of the values in the second half of the block; of row
// `first` and of every `step`th after it, in both units of 16 rows, which lie in one page each.
struct Loader {
    const char* from;     // the chunk of `first` in the first page's first unit
    int64_t page_bytes, column_stride;
    int32_t row_bytes;
    int to, to_step, to_unit;  // in elements from the stage's start; from row to row, and to the second unit
    int first, step;
    int columns;  // how many of the chunk's exist
    bool copies;

    // K and V of `rows`' head; V from `first_column` on. They take K_ELEMENTS and what follows in a stage.
    template <typename T, int K_COLUMNS, int V_COLUMNS, int K_ELEMENTS>
    SIMSD_DEVICE void start(const Params& p, const Rows& rows, int first_column) {
        const int half = thread_count() / 2;
        const bool values = thread_index() >= half;
        const int64_t(&strides)[4] = values ? p.v_strides : p.k_strides;
        const int threads = values ? ROW_THREADS<V_COLUMNS> : ROW_THREADS<K_COLUMNS>;  // to a row
        const int stride = values ? ROW_STRIDE<V_COLUMNS> : ROW_STRIDE<K_COLUMNS>;
        const int thread = thread_index() % half, column = thread % threads * CHUNK;
        first = column < (values ? V_COLUMNS : K_COLUMNS) ? thread / threads : PAGE_UNIT;
        step = half / threads;
        columns = p.dim - column - (values ? first_column : 0);
        copies = p.copy_kv;
        column_stride = strides[3];
        row_bytes = values ? p.v_row_bytes : p.k_row_bytes;
        page_bytes = 2 * strides[0];
        to = (values ? K_ELEMENTS : 0) + first * stride + column;
        to_step = step * stride;
        to_unit = PAGE_UNIT * stride;
        int64_t offset = rows.kv_head * strides[1] + (column + (values ? first_column : 0)) * strides[3];
        if (p.block_table == nullptr) offset += rows.batch * strides[0];
        from = static_cast<const char*>(values ? p.v : p.k) + 2 * offset + first * static_cast<int64_t>(row_bytes);
    }

    // To a stage in shared memory, from where both units lie.
    template <typename T>
    SIMSD_DEVICE void load(T* stage, const char* row, const char* other, bool full, uint32_t seen) const {
        T* target = stage + to;
        const int64_t row_step = step * row_bytes;
        if (full && copies) {
            const bool exists = columns > 0;
#pragma unroll 2
            for (int i = first; i < PAGE_UNIT; i += step) {
                copy_async_16(target, row, exists);
                copy_async_16(target + to_unit, other, exists);
                target += to_step;
                row += row_step;
                other += row_step;
            }
            return;
        }
        if (full) seen = ~0u;
#pragma unroll 1
        for (int i = first; i < PAGE_UNIT; i += step) {
            load_chunk(target, row, seen >> i & 1);
            load_chunk(target + to_unit, other, seen >> (i + PAGE_UNIT) & 1);
            target += to_step;
            row += row_step;
            other += row_step;
        }
    }

    template <typename T>
    SIMSD_DEVICE void load_chunk(T* target, const char* row, bool exists) const {
        if (copies) {
            copy_async_16(target, row, exists && columns > 0);
        } else {
            gather_chunk(target, reinterpret_cast<const T*>(row), column_stride, exists ? columns : 0);
        }
    }
};

}  // namespace simsd::intervals
