// reveal: one denoising step for a batch of blocks [B, L], L <= 64. The Python definition is reveal/reference.py.
#include "cpu/reveal.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/arguments/reveal.h"
#include "common/strided.h"

namespace simsd {
namespace {

constexpr const char* OP = "reveal";

Tensor reveal(Tensor tokens, Tensor revealed, Tensor step_map, const Tensor proposal, const Tensor prob,
              const Tensor log_odds, const Tensor entropy, const Tensor step, const Tensor schedule,
              const std::string strategy_name, double threshold) {
    check_reveal(check_cpu, tokens, revealed, step_map, proposal, prob, log_odds, entropy, step, schedule);
    const int64_t batch = tokens.size(0), length = tokens.size(1);
    const Strategy strategy = parse_strategy(OP, strategy_name);

    Tensor newly = torch::stable::new_empty(tokens, {batch}, ScalarType::Long);
    int64_t* newly_bits = static_cast<int64_t*>(newly.mutable_data_ptr());
    const auto token = strided_mutable<int64_t, 2>(tokens);
    const auto set = strided_mutable<int64_t, 1>(revealed);
    const auto reveal_step = strided_mutable<int32_t, 2>(step_map);
    const auto proposed = strided_const<int64_t, 2>(proposal);
    const auto probs = strided_const<float, 2>(prob), odds = strided_const<float, 2>(log_odds),
               entropies = strided_const<float, 2>(entropy);
    const auto row = [](const Strided<const float, 2>& matrix, int64_t b) {
        return Strided<const float, 1>{matrix.at(b), {matrix.strides[1]}};
    };
    const auto steps = strided_const<int32_t, 1>(step);
    const Schedule counts{strided_const<int32_t, 1>(schedule), schedule.size(0)};

    for (int64_t b = 0; b < batch; ++b) {
        const int32_t now = *steps.at(b);
        const Statistics given{row(probs, b), row(odds, b), row(entropies, b)};
        const uint64_t chosen = reveal_set(strategy, *set.at(b), length, now, counts, given, threshold);
        for (int64_t i = 0; i < length; ++i) {
            if (!(chosen & bit(i))) continue;
            *token.at(b, i) = *proposed.at(b, i);
            *reveal_step.at(b, i) = now + 1;
        }
        *set.at(b) |= static_cast<int64_t>(chosen);
        newly_bits[b] = static_cast<int64_t>(chosen);
    }
    return newly;
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("reveal", TORCH_BOX(&simsd::reveal)); }
