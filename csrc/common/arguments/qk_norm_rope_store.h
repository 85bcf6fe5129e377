#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_qk_norm_rope_store(DeviceCheck check_device, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                                     const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& slots) {
    const Expect expect{"qk_norm_rope_store", check_device, q};
    expect("q", q, FLOATS, {-1, -1, -1, -1}, "[B, R, Hq, D]");
    const ScalarType dtype = q.scalar_type();
    const int64_t batch = q.size(0), rows = q.size(1), dim = q.size(3);
    expect("k", k, {dtype}, {batch, rows, -1, dim}, "[B, R, Hkv, D]");
    const int64_t kv_heads = k.size(2);
    expect("v", v, {dtype}, {batch, rows, kv_heads, dim}, "[B, R, Hkv, D]");
    expect("q_weight", q_weight, {dtype}, {dim}, "[D]");
    expect("k_weight", k_weight, {dtype}, {dim}, "[D]");
    expect("cos", cos, {dtype}, {batch, rows, -1}, "[B, R, D_rot]");
    const int64_t rotary = cos.size(2);
    expect("sin", sin, {dtype}, {batch, rows, rotary}, "[B, R, D_rot]");
    check(rotary % 2 == 0 && rotary <= dim, expect.op, ": cos and sin must have an even number of columns, at most ",
          dim, ", got ", rotary);
    expect("k_cache", k_cache, {dtype}, {batch, kv_heads, -1, dim}, "[B, Hkv, C, D]");
    expect("v_cache", v_cache, {dtype}, {batch, kv_heads, k_cache.size(2), dim}, "[B, Hkv, C, D]");
    expect("slots", slots, {ScalarType::Int}, {batch, rows}, "[B, R]");
}

}  // namespace simsd
