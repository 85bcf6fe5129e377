// The rows that a block of threads works on. Packed row r of a KV head is query r / G of its head r % G, so that a run
// of rows holds neighbouring queries.
#pragma once

#include "common/visibility.h"
#include "cuda/device.h"
#include "cuda/masked_attention.h"
#include "cuda/warp.h"

namespace simsd::intervals {

struct Rows {
    int batch, kv_head;
    int first, count;          // packed rows
    int first_query, queries;  // which queries those are
    int keys;                  // slots of the batch element that may live
};

SIMSD_DEVICE Rows locate_rows(const Params& p, int head, int first, int most) {
    Rows rows;
    rows.batch = head / p.kv_heads;
    rows.kv_head = head % p.kv_heads;
    rows.first = first;
    rows.count = smaller(most, p.group * p.q_rows - first);
    rows.first_query = first / p.group;
    rows.queries = (first + rows.count - 1) / p.group - rows.first_query + 1;
    rows.keys = p.keys;
    if (p.kv_len) rows.keys = larger(0, smaller(p.keys, p.kv_len[rows.batch * p.kv_len_stride]));
    return rows;
}

// Of packed row `row` of the KV head, in elements of q.
SIMSD_DEVICE int64_t query_offset(const Params& p, const Rows& rows, int row) {
    const int64_t head = static_cast<int64_t>(rows.kv_head) * p.group + row % p.group;
    return rows.batch * p.q_strides[0] + head * p.q_strides[1] + row / p.group * p.q_strides[2];
}

SIMSD_DEVICE int64_t out_offset(const Params& p, const Rows& rows, int row) {
    const int64_t head = static_cast<int64_t>(rows.kv_head) * p.group + row % p.group;
    const int64_t query = static_cast<int64_t>(rows.batch) * p.q_rows + row / p.group;
    return (query * p.kv_heads * p.group + head) * p.dim;
}

// To shared memory; visible after a barrier.
SIMSD_DEVICE void load_clocks(const Params& p, const Rows& rows, int32_t* clocks) {
#pragma unroll 1
    for (int i = thread_index(); i < rows.queries; i += thread_count()) {
        clocks[i] = p.clock[rows.batch * p.clock_strides[0] + (rows.first_query + i) * p.clock_strides[1]];
    }
}

// The moments between which some live queries look; first > last if all are dead.
struct Span {
    int32_t first, last;
};

SIMSD_DEVICE Span span_of(const int32_t* clocks, int count) {
    Span span{INT32_MAX, INT32_MIN};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        if (clocks[i] < 0) continue;
        span.first = smaller(span.first, clocks[i]);
        span.last = larger(span.last, clocks[i]);
    }
    return span;
}

}  // namespace simsd::intervals
