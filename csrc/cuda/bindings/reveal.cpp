#include "cuda/reveal.h"

#include <string>

#include "common/arguments/reveal.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/view.h"

namespace simsd {
namespace {

constexpr const char* OP = "reveal";

Tensor reveal(Tensor tokens, Tensor revealed, Tensor step_map, const Tensor proposal, const Tensor prob,
              const Tensor log_odds, const Tensor entropy, const Tensor step, const Tensor schedule,
              const std::string strategy, double threshold) {
    check_reveal(check_same_device, tokens, revealed, step_map, proposal, prob, log_odds, entropy, step, schedule);
    const int64_t batch = tokens.size(0), length = tokens.size(1);
    const denoise::Rule rule = rule_of(OP, schedule, strategy, threshold);

    const OnDevice device(tokens);
    Tensor newly = allocate_like(tokens, {batch}, ScalarType::Long);
    denoise::RevealParams params{};
    params.tokens = view_mutable<int64_t, 2>(tokens);
    params.revealed = view_mutable<int64_t, 1>(revealed);
    params.step_map = view_mutable<int32_t, 2>(step_map);
    params.proposal = view_const<int64_t, 2>(proposal);
    params.prob = view_const<float, 2>(prob);
    params.log_odds = view_const<float, 2>(log_odds);
    params.entropy = view_const<float, 2>(entropy);
    params.step = view_const<int32_t, 1>(step);
    params.newly = static_cast<int64_t*>(newly.mutable_data_ptr());
    params.rule = rule;
    params.batch = batch;
    params.length = static_cast<int32_t>(length);
    denoise::launch_reveal(params, device.stream());
    return newly;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("reveal", TORCH_BOX(&simsd::reveal)); }
