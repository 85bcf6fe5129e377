#include "cuda/qk_norm_rope_store.h"

#include <optional>

#include "common/arguments/qk_norm_rope_store.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

constexpr const char* OP = "qk_norm_rope_store";

template <int Dims>
void copy_strides(const Tensor& tensor, int64_t (&strides)[Dims]) {
    for (int axis = 0; axis < Dims; ++axis) strides[axis] = tensor.stride(axis);
}

rope::Heads heads(const Tensor& rows, const std::optional<Tensor>& weight) {
    rope::Heads out{rows.const_data_ptr(), nullptr, {}, 0};
    copy_strides(rows, out.strides);
    if (weight) {
        out.weight = weight->const_data_ptr();
        out.weight_stride = weight->stride(0);
    }
    return out;
}

rope::Cache cache(const Tensor& tensor) {
    rope::Cache out{tensor.mutable_data_ptr(), {}};
    copy_strides(tensor, out.strides);
    return out;
}

rope::Angles angles(const Tensor& tensor) {
    rope::Angles out{tensor.const_data_ptr(), {}};
    copy_strides(tensor, out.strides);
    return out;
}

Tensor qk_norm_rope_store(const Tensor q, const Tensor k, const Tensor v, const std::optional<Tensor> q_weight,
                          const std::optional<Tensor> k_weight, const Tensor cos, const Tensor sin, Tensor k_cache,
                          Tensor v_cache, const Tensor slots, const double eps) {
    check_qk_norm_rope_store(check_same_device, q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots);
    const int64_t batch = q.size(0), rows = q.size(1), q_heads = q.size(2), dim = q.size(3);
    check(dim <= rope::MAX_DIM, OP, ": cuda supports head sizes up to ", rope::MAX_DIM, ", got ", dim,
          "; simsd_kernels.", OP, "(..., backend=\"reference\") takes any");

    const OnDevice device(q);
    Tensor out = allocate_like(q, {batch, q_heads, rows, dim}, q.scalar_type());
    if (batch == 0 || rows == 0 || dim == 0) return out;
    rope::Params params{};
    params.q = heads(q, q_weight);
    params.k = heads(k, k_weight);
    params.v = heads(v, std::nullopt);
    params.cos = angles(cos);
    params.sin = angles(sin);
    params.k_cache = cache(k_cache);
    params.v_cache = cache(v_cache);
    params.slots = static_cast<const int32_t*>(slots.const_data_ptr());
    copy_strides(slots, params.slot_strides);
    params.out = out.mutable_data_ptr();
    params.rows = static_cast<int32_t>(rows);
    params.q_heads = static_cast<int32_t>(q_heads);
    params.kv_heads = static_cast<int32_t>(k.size(2));
    params.dim = static_cast<int32_t>(dim);
    params.rotary = static_cast<int32_t>(cos.size(2));
    params.capacity = static_cast<int32_t>(k_cache.size(2));
    params.total_rows = batch * rows;
    params.eps = static_cast<float>(eps);
    rope::launch_norm_rope_store(params, element_of<rope::Element>(q), device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("qk_norm_rope_store", TORCH_BOX(&simsd::qk_norm_rope_store)); }
