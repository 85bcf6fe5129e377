#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_store_kv(DeviceCheck check_device, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                           const Tensor& v_cache, const Tensor& slots) {
    const Expect expect{"store_kv", check_device, k};
    check_shape(expect.op, "k", k, {-1, -1, -1, -1}, "[B, Hkv, R, D]");
    check_device(expect.op, "k", k, k);
    const ScalarType dtype = k.scalar_type();
    const int64_t batch = k.size(0), heads = k.size(1), rows = k.size(2), dim = k.size(3);
    expect("v", v, {dtype}, {batch, heads, rows, dim}, "[B, Hkv, R, D]");
    expect("k_cache", k_cache, {dtype}, {batch, heads, -1, dim}, "[B, Hkv, C, D]");
    expect("v_cache", v_cache, {dtype}, {batch, heads, k_cache.size(2), dim}, "[B, Hkv, C, D]");
    expect("slots", slots, {ScalarType::Int}, {batch, rows}, "[B, R]");
}

}  // namespace simsd
