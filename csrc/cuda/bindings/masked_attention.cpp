#include "cuda/masked_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "common/arguments/masked_attention.h"
#include "cuda/attention_plan.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

constexpr const char* OP = "masked_attention";
constexpr double LOG2_E = 1.4426950408889634;

// What the kernels can count and hold.
void check_limits(const Tensor& q, const Tensor& k, const Tensor& v, int64_t keys) {
    const int64_t q_rows = q.size(2), dim = q.size(3);
    check(dim <= intervals::MOST_COLUMNS, OP, ": cuda supports head sizes up to ", intervals::MOST_COLUMNS, ", got ",
          dim, "; simsd_kernels.", OP, "(..., backend=\"reference\") takes any");
    check(k.stride(2) < INT32_MAX / 32 && v.stride(2) < INT32_MAX / 32, OP, ": the keys or values of a head are ",
          std::max(k.stride(2), v.stride(2)), " elements apart, cuda takes up to ", INT32_MAX / 32 - 1);
    constexpr int64_t MOST = (int64_t{1} << 31) - 4096;  // rows and keys are counted in 32 bits
    check(q.size(1) / k.size(1) * q_rows < MOST && keys < MOST, OP, ": ", q_rows, " queries and ", keys,
          " keys are too many for one call");
}

const int32_t* ints(const Tensor& tensor, int64_t (&strides)[2]) {
    strides[0] = tensor.stride(0);
    strides[1] = tensor.stride(1);
    return static_cast<const int32_t*>(tensor.const_data_ptr());
}

Tensor masked_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor clock, const Tensor birth,
                        const Tensor death, const std::optional<Tensor> kv_len, const std::optional<double> scale,
                        const std::optional<Tensor> block_table, const std::optional<Tensor> plan) {
    check_masked_attention(check_same_device, q, k, v, clock, birth, death, kv_len, block_table);
    check_plan(check_same_device, q, plan,
               intervals::plan_words(q.size(0), q.size(1) / k.size(1) * q.size(2), birth.size(1)));
    check_limits(q, k, v, birth.size(1));
    const OnDevice device(q);
    const Tensor rows = allocate_like(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type());
    const Tensor out = torch::stable::transpose(rows, 1, 2);
    if (out.numel() == 0) return out;

    intervals::Params p{};
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.out = out.mutable_data_ptr();
    for (int axis = 0; axis < 4; ++axis) {
        p.q_strides[axis] = q.stride(axis);
        p.k_strides[axis] = k.stride(axis);
        p.v_strides[axis] = v.stride(axis);
    }
    p.clock = ints(clock, p.clock_strides);
    p.birth = ints(birth, p.birth_strides);
    p.death = ints(death, p.death_strides);
    if (kv_len) {
        p.kv_len = static_cast<const int32_t*>(kv_len->const_data_ptr());
        p.kv_len_stride = kv_len->stride(0);
    }
    if (block_table) p.block_table = ints(*block_table, p.table_strides);
    p.kv_heads = static_cast<int32_t>(k.size(1));
    p.heads = q.size(0) * p.kv_heads;
    p.group = static_cast<int32_t>(q.size(1) / p.kv_heads);
    p.q_rows = static_cast<int32_t>(q.size(2));
    p.keys = static_cast<int32_t>(birth.size(1));
    p.dim = static_cast<int32_t>(q.size(3));
    p.page_size = static_cast<int32_t>(k.size(2));
    p.pages = static_cast<int32_t>(k.size(0));
    p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.dim))) * LOG2_E);

    const auto element = element_of<intervals::Element>(q);
    const int64_t floats = intervals::scratch_floats(p, element, multiprocessors(q));
    const Tensor scratch = allocate_like(q, {floats}, ScalarType::Float);
    if (floats > 0) p.partials = static_cast<float*>(scratch.mutable_data_ptr());
    intervals::launch_attention(p, element, device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("masked_attention", TORCH_BOX(&simsd::masked_attention)); }
