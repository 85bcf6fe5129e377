#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_masked_attention(DeviceCheck check_device, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& clock, const Tensor& birth, const Tensor& death,
                                   const std::optional<Tensor>& kv_len, const std::optional<Tensor>& block_table,
                                   const char* op = "masked_attention") {
    const Expect expect{op, check_device, q};
    expect("q", q, FLOATS, {-1, -1, -1, -1}, "[B, Hq, Lq, D]");
    const int64_t batch = q.size(0), q_heads = q.size(1), q_rows = q.size(2), dim = q.size(3);
    expect("block_table", block_table, {ScalarType::Int}, {batch, -1}, "[B, n_pages]");
    const char* letters = block_table ? "[P, Hkv, page_size, D]" : "[B, Hkv, Lk, D]";
    expect("k", k, {q.scalar_type()}, {block_table ? -1 : batch, -1, -1, dim}, letters);
    const int64_t kv_heads = k.size(1), page_size = k.size(2);
    const int64_t keys = block_table ? block_table->size(1) * page_size : page_size;
    expect("v", v, {q.scalar_type()}, {k.size(0), kv_heads, page_size, dim}, letters);
    check(!block_table || (page_size >= 16 && page_size <= 256 && page_size % 16 == 0), op,
          ": a page must hold a multiple of 16 keys, from 16 to 256, got ", page_size);
    expect("clock", clock, {ScalarType::Int}, {batch, q_rows}, "[B, Lq]");
    expect("birth", birth, {ScalarType::Int}, {batch, keys}, "[B, Lk]");
    expect("death", death, {ScalarType::Int}, {batch, keys}, "[B, Lk]");
    check(kv_heads > 0 && q_heads % kv_heads == 0, op, ": ", q_heads, " query heads are not a multiple of ", kv_heads,
          " key/value heads");
    expect("kv_len", kv_len, {ScalarType::Int}, {batch}, "[B]");
}

// `words`: of a plan that attention_plan makes for the same mask.
inline void check_plan(DeviceCheck check_device, const Tensor& q, const std::optional<Tensor>& plan, int64_t words) {
    const Expect expect{"masked_attention", check_device, q};
    expect("plan", plan, {ScalarType::Int}, {words}, "that of attention_plan");
    check(!plan || plan->is_contiguous(), "masked_attention: plan must be contiguous");
}

}  // namespace simsd
