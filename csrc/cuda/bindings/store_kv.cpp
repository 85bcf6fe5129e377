#include "cuda/store_kv.h"

#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

constexpr const char* OP = "store_kv";

store::Side side(const Tensor& rows, const Tensor& cache) {
    store::Side out{rows.const_data_ptr(), cache.mutable_data_ptr(), {}, {}};
    for (int axis = 0; axis < 4; ++axis) {
        out.row_strides[axis] = rows.stride(axis);
        out.cache_strides[axis] = cache.stride(axis);
    }
    return out;
}

void store_kv(const Tensor k, const Tensor v, Tensor k_cache, Tensor v_cache, const Tensor slots) {
    check_shape(OP, "k", k, {-1, -1, -1, -1}, "[B, Hkv, R, D]");
    const int64_t batch = k.size(0), heads = k.size(1), rows = k.size(2), dim = k.size(3);
    check_shape(OP, "v", v, {batch, heads, rows, dim}, "[B, Hkv, R, D]");
    check_shape(OP, "k_cache", k_cache, {batch, heads, -1, dim}, "[B, Hkv, C, D]");
    const int64_t capacity = k_cache.size(2);
    check_shape(OP, "v_cache", v_cache, {batch, heads, capacity, dim}, "[B, Hkv, C, D]");
    check_shape(OP, "slots", slots, {batch, rows}, "[B, R]");
    const ScalarType dtype = k.scalar_type();
    check_dtype(OP, "k", k, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    check_dtype(OP, "v", v, {dtype});
    check_dtype(OP, "k_cache", k_cache, {dtype});
    check_dtype(OP, "v_cache", v_cache, {dtype});
    check_dtype(OP, "slots", slots, {ScalarType::Int});
    check_same_device(OP, "v", v, k);
    check_same_device(OP, "k_cache", k_cache, k);
    check_same_device(OP, "v_cache", v_cache, k);
    check_same_device(OP, "slots", slots, k);
    if (k.numel() == 0) return;

    store::Params params{};
    params.sides[0] = side(k, k_cache);
    params.sides[1] = side(v, v_cache);
    params.slots = static_cast<const int32_t*>(slots.const_data_ptr());
    params.slot_strides[0] = slots.stride(0);
    params.slot_strides[1] = slots.stride(1);
    params.heads = static_cast<int32_t>(heads);
    params.rows = static_cast<int32_t>(rows);
    params.dim = static_cast<int32_t>(dim);
    params.capacity = static_cast<int32_t>(capacity);
    params.total_rows = batch * rows;
    const OnDevice device(k);
    store::launch_store(params, static_cast<int>(k.element_size()), device.stream());
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("store_kv", TORCH_BOX(&simsd::store_kv)); }
