#include "cuda/reveal.h"

#include "control/arguments/reveal.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

Tensor reveal(Tensor tokens, Tensor revealed, Tensor step_map, const Tensor proposal, const Tensor prob,
              const Tensor log_odds, const Tensor entropy, const Tensor step, const Tensor schedule, const Tensor steps,
              const Tensor strategy, const Tensor threshold, const std::optional<Tensor> sub_blocks) {
    control::RevealParams params =
        control::reveal_params(check_same_device, tokens, revealed, step_map, proposal, prob, log_odds, entropy, step,
                               schedule, steps, strategy, threshold, sub_blocks);
    const OnDevice device(tokens);
    Tensor newly = allocate_like(tokens, {params.batch}, ScalarType::Long);
    params.newly = control::data_of<int64_t>(newly);
    control::launch_reveal(params, device.stream());
    return newly;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("reveal", TORCH_BOX(&simsd::reveal)); }
