// attention_plan: masked_attention on the CPU looks at lives as it goes, so a plan is empty.
#include "common/arguments/attention_plan.h"

#include <torch/csrc/stable/library.h>

#include "cpu/allocate.h"

namespace simsd {
namespace {

Tensor attention_plan(const Tensor clock, const Tensor birth, const Tensor death, int64_t group, int64_t pages,
                      const std::optional<Tensor> kv_len, const std::optional<Tensor> block_table) {
    check_attention_plan(check_cpu, clock, birth, death, group, pages, kv_len, block_table);
    return allocate({0}, ScalarType::Int);
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("attention_plan", TORCH_BOX(&simsd::attention_plan)); }
