#include "cuda/attention_plan.h"

#include "common/arguments/attention_plan.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

Tensor attention_plan(const Tensor clock, const Tensor birth, const Tensor death, int64_t group, int64_t pages,
                      const std::optional<Tensor> kv_len, const std::optional<Tensor> block_table) {
    check_attention_plan(check_same_device, clock, birth, death, group, pages, kv_len, block_table);
    const OnDevice device(clock);
    return allocate_like(clock, {intervals::plan_words(clock.size(0), group * clock.size(1), birth.size(1))},
                         ScalarType::Int);
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("attention_plan", TORCH_BOX(&simsd::attention_plan)); }
