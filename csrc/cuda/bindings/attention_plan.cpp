#include "cuda/attention_plan.h"

#include "common/arguments/attention_plan.h"
#include "cuda/bindings/mask.h"

namespace simsd {
namespace {

Tensor attention_plan(const Tensor clock, const Tensor birth, const Tensor death, int64_t group, int64_t pages,
                      const std::optional<Tensor> kv_len, const std::optional<Tensor> block_table) {
    constexpr const char* OP = "attention_plan";
    check_attention_plan(check_same_device, clock, birth, death, group, pages, kv_len, block_table);
    const int64_t keys = birth.size(1), count = block_table ? block_table->size(1) : 0;
    intervals::Mask mask{};
    set_mask(mask, OP, clock, birth, death, group, count ? keys / count : 0, pages, kv_len, block_table);
    const OnDevice device(clock);
    const int64_t batch = clock.size(0), rows = group * clock.size(1);
    const Tensor plan = allocate_like(clock, {intervals::plan_words(batch, rows, keys)}, ScalarType::Int);
    mask.plan = intervals::plan_in(static_cast<int32_t*>(plan.mutable_data_ptr()), batch, rows, keys);
    intervals::launch_plan(OP, mask, true, device.stream());
    return plan;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("attention_plan", TORCH_BOX(&simsd::attention_plan)); }
