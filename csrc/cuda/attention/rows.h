// The rows that a block of threads works on. Packed row r of a KV head is query r / G of its head r % G, so that a run
// of rows holds neighbouring queries.
#pragma once

#include "common/visibility.h"
#include "cuda/attention_plan.h"
#include "cuda/device.h"
#include "cuda/masked_attention.h"
#include "cuda/warp.h"

namespace simsd::intervals {

constexpr int32_t UNSEEN = INT32_MAX, NEVER = INT32_MIN;  // birth and death of a key that is not there

struct Rows {
    int batch, kv_head;
    int first, count;          // packed rows
    int first_query, queries;  // which queries those are
};

SIMSD_DEVICE Rows locate_rows(const Mask& m, int batch, int kv_head, int first, int most) {
    Rows rows;
    rows.batch = batch;
    rows.kv_head = kv_head;
    rows.first = first;
    rows.count = smaller(most, m.group * m.q_rows - first);
    rows.first_query = first / m.group;
    rows.queries = (first + rows.count - 1) / m.group - rows.first_query + 1;
    return rows;
}

// Slots of a batch element that may live.
SIMSD_DEVICE int live_slots(const Mask& m, int batch) {
    return m.kv_len ? larger(0, smaller(m.keys, m.kv_len[batch * m.kv_len_stride])) : m.keys;
}

SIMSD_DEVICE const int32_t* clock_address(const Mask& m, const Rows& rows, int query) {
    return m.clock + rows.batch * m.clock_strides[0] + (rows.first_query + query) * m.clock_strides[1];
}

// To shared memory; visible after a barrier.
SIMSD_DEVICE void load_clocks(const Mask& m, const Rows& rows, int32_t* clocks) {
#pragma unroll 1
    for (int i = thread_index(); i < rows.queries; i += thread_count()) clocks[i] = *clock_address(m, rows, i);
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
