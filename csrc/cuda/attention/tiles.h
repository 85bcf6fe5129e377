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
// `first` and of every one after it at a fixed distance, in both units of 16 rows, which lie in one page each. K and V
// take K_ELEMENTS of a stage and what follows.
template <typename T, int K_COLUMNS, int V_COLUMNS, int K_ELEMENTS>
struct Loader {
    const char* from;  // the chunk of `first` in the first page's first unit
    int32_t row_bytes;
    int to, first;  // to: in elements from the stage's start
    int columns;    // how many of the chunk's exist

    SIMSD_DEVICE static bool values() { return thread_index() >= thread_count() / 2; }
    SIMSD_DEVICE static int row_threads() { return values() ? ROW_THREADS<V_COLUMNS> : ROW_THREADS<K_COLUMNS>; }
    SIMSD_DEVICE static int to_stride() { return values() ? ROW_STRIDE<V_COLUMNS> : ROW_STRIDE<K_COLUMNS>; }
    SIMSD_DEVICE static int row_step() { return thread_count() / 2 / row_threads(); }
    SIMSD_DEVICE static const int64_t (&strides(const Params& p))[4] { return values() ? p.v_strides : p.k_strides; }

    // V from `first_column` on.
    SIMSD_DEVICE void start(const Params& p, const Rows& rows, int first_column) {
        const int thread = thread_index() % (thread_count() / 2), column = thread % row_threads() * CHUNK;
        const int column_of_all = column + (values() ? first_column : 0);
        first = column < (values() ? V_COLUMNS : K_COLUMNS) ? thread / row_threads() : PAGE_UNIT;
        columns = p.dim - column_of_all;
        row_bytes = values() ? p.v_row_bytes : p.k_row_bytes;
        to = (values() ? K_ELEMENTS : 0) + first * to_stride() + column;
        int64_t offset = rows.kv_head * strides(p)[1] + column_of_all * strides(p)[3];
        if (p.block_table == nullptr) offset += rows.batch * strides(p)[0];
        from = static_cast<const char*>(values() ? p.v : p.k) + 2 * offset + first * static_cast<int64_t>(row_bytes);
    }

    // Where the thread's chunk of key `slot` of a page lies.
    SIMSD_DEVICE const char* locate(const Params& p, uint32_t page, uint32_t slot) const {
        return from + 2 * (page * strides(p)[0]) + static_cast<int32_t>(slot) * static_cast<int64_t>(row_bytes);
    }
    SIMSD_DEVICE const char* locate(int slot) const { return from + slot * static_cast<int64_t>(row_bytes); }

    // To a stage in shared memory, from where its units lie. `seen`: which keys are to be loaded, where not all are.
    SIMSD_DEVICE void load(const Params& p, T* stage, const char* row, const char* other, bool full,
                           uint32_t seen) const {
        T* target = stage + to;
        const int step = row_step(), row_bytes_step = step * row_bytes;
        const int to_unit = PAGE_UNIT * to_stride(), to_step = step * to_stride();
        if (full && p.copy_kv) {
            const bool exists = columns > 0;
#pragma unroll 2
            for (int i = first; i < PAGE_UNIT; i += step) {
                copy_async_16(target, row, exists);
                copy_async_16(target + to_unit, other, exists);
                target += to_step;
                row += row_bytes_step;
                other += row_bytes_step;
            }
            return;
        }
        if (full) seen = ~0u;
#pragma unroll 1
        for (int i = first; i < PAGE_UNIT; i += step) {
            load_chunk(p, target, row, seen >> i & 1);
            load_chunk(p, target + to_unit, other, seen >> (i + PAGE_UNIT) & 1);
            target += to_step;
            row += row_bytes_step;
            other += row_bytes_step;
        }
    }

  private:
    SIMSD_DEVICE void load_chunk(const Params& p, T* target, const char* row, bool exists) const {
        if (p.copy_kv) {
            copy_async_16(target, row, exists && columns > 0);
        } else {
            gather_chunk(target, reinterpret_cast<const T*>(row), strides(p)[3], exists ? columns : 0);
        }
    }
};

}  // namespace simsd::intervals
