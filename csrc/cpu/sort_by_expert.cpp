// sort_by_expert: a counting sort of the tokens' choices.
#include "common/arguments/sort_by_expert.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/strided.h"
#include "cpu/allocate.h"

namespace simsd {
namespace {

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor experts, int64_t n_experts) {
    check_sort_by_expert(check_cpu, experts, n_experts);
    const int64_t tokens = experts.size(0), choices = experts.size(1);
    const auto given = strided_const<int64_t, 2>(experts);
    Tensor offsets_out = allocate({n_experts + 1}, ScalarType::Int);
    Tensor rows_out = allocate({tokens * choices}, ScalarType::Int);
    Tensor places_out = allocate({tokens, choices}, ScalarType::Int);
    int32_t* offsets = static_cast<int32_t*>(offsets_out.mutable_data_ptr());
    int32_t* rows = static_cast<int32_t*>(rows_out.mutable_data_ptr());
    int32_t* places = static_cast<int32_t*>(places_out.mutable_data_ptr());
    std::vector<int32_t> next(n_experts + 1);  // the count of the expert before, then the next free place of each
    for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t c = 0; c < choices; ++c) {
            const int64_t expert = *given.at(m, c);
            check(expert >= 0 && expert < n_experts, "sort_by_expert: experts must be in [0, n_experts) = [0, ",
                  n_experts, "), got ", expert);
            ++next[expert + 1];
        }
    }
    offsets[0] = 0;
    for (int64_t e = 1; e <= n_experts; ++e) offsets[e] = next[e] += next[e - 1];
    for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t c = 0; c < choices; ++c) {
            const int32_t place = next[*given.at(m, c)]++;
            rows[place] = static_cast<int32_t>(m);
            places[m * choices + c] = place;
        }
    }
    return {offsets_out, rows_out, places_out};
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("sort_by_expert", TORCH_BOX(&simsd::sort_by_expert)); }
