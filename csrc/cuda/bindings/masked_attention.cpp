#include "cuda/masked_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "common/arguments/masked_attention.h"
#include "cuda/bindings/mask.h"

namespace simsd {
namespace {

constexpr const char* OP = "masked_attention";
constexpr double LOG2_E = 1.4426950408889634;

// What the kernels can count and hold.
void check_limits(const Tensor& q, const Tensor& k, const Tensor& v) {
    const int64_t dim = q.size(3);
    check(dim <= intervals::MOST_COLUMNS, OP, ": cuda supports head sizes up to ", intervals::MOST_COLUMNS, ", got ",
          dim, "; simsd_kernels.", OP, "(..., backend=\"reference\") takes any");
    check(k.stride(2) < INT32_MAX / 32 && v.stride(2) < INT32_MAX / 32, OP, ": the keys or values of a head are ",
          std::max(k.stride(2), v.stride(2)), " elements apart, cuda takes up to ", INT32_MAX / 32 - 1);
}

Tensor masked_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor clock, const Tensor birth,
                        const Tensor death, const std::optional<Tensor> kv_len, const std::optional<double> scale,
                        const std::optional<Tensor> block_table, const std::optional<Tensor> plan) {
    check_masked_attention(check_same_device, q, k, v, clock, birth, death, kv_len, block_table);
    check_limits(q, k, v);
    const int64_t group = q.size(1) / k.size(1);
    intervals::Params p{};
    set_mask(p, OP, clock, birth, death, group, k.size(2), k.size(0), kv_len, block_table);
    const int64_t words = intervals::plan_words(p.batch, group * p.q_rows, p.keys);
    check_plan(check_same_device, q, plan, words);
    const OnDevice device(q);
    const Tensor rows = allocate_like(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type());
    const Tensor out = torch::stable::transpose(rows, 1, 2);
    if (out.numel() == 0) return out;

    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.out = out.mutable_data_ptr();
    for (int axis = 0; axis < 4; ++axis) {
        p.q_strides[axis] = q.stride(axis);
        p.k_strides[axis] = k.stride(axis);
        p.v_strides[axis] = v.stride(axis);
    }
    p.kv_heads = static_cast<int32_t>(k.size(1));
    p.dim = static_cast<int32_t>(q.size(3));
    p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.dim))) * LOG2_E);

    const auto element = element_of<intervals::Element>(q);
    const bool planned = plan || element == intervals::Element::float32;  // which takes no plan
    const Tensor own_plan = allocate_like(q, {planned ? 0 : words}, ScalarType::Int);
    check(!plan || reinterpret_cast<uintptr_t>(plan->const_data_ptr()) % 8 == 0, OP,
          ": plan must be as attention_plan returns it, this one is not aligned to 8 bytes");
    void* of_plan = plan ? const_cast<void*>(plan->const_data_ptr()) : own_plan.mutable_data_ptr();
    p.plan = intervals::plan_in(static_cast<int32_t*>(of_plan), p.batch, group * p.q_rows, p.keys);
    const Tensor scratch = allocate_like(q, {intervals::prepare(p, element, multiprocessors(q))}, ScalarType::Float);
    p.scratch = static_cast<float*>(scratch.mutable_data_ptr());
    intervals::launch_attention(p, element, planned, device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("masked_attention", TORCH_BOX(&simsd::masked_attention)); }
