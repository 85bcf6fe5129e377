#include "cuda/store_kv.h"

#include "common/arguments/store_kv.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

store::Side side(const Tensor& rows, const Tensor& cache) {
    store::Side out{rows.const_data_ptr(), cache.mutable_data_ptr(), {}, {}};
    for (int axis = 0; axis < 4; ++axis) {
        out.row_strides[axis] = rows.stride(axis);
        out.cache_strides[axis] = cache.stride(axis);
    }
    return out;
}

void store_kv(const Tensor k, const Tensor v, Tensor k_cache, Tensor v_cache, const Tensor slots) {
    check_dtype("store_kv", "k", k, FLOATS);
    check_store_kv(check_same_device, k, v, k_cache, v_cache, slots);
    if (k.numel() == 0) return;

    store::Params params{};
    params.sides[0] = side(k, k_cache);
    params.sides[1] = side(v, v_cache);
    params.slots = static_cast<const int32_t*>(slots.const_data_ptr());
    params.slot_strides[0] = slots.stride(0);
    params.slot_strides[1] = slots.stride(1);
    params.heads = static_cast<int32_t>(k.size(1));
    params.rows = static_cast<int32_t>(k.size(2));
    params.dim = static_cast<int32_t>(k.size(3));
    params.capacity = static_cast<int32_t>(k_cache.size(2));
    params.total_rows = k.size(0) * k.size(2);
    const OnDevice device(k);
    store::launch_store(params, static_cast<int>(k.element_size()), device.stream());
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("store_kv", TORCH_BOX(&simsd::store_kv)); }
