// reveal on the CPU. The Python definition is reveal/reference.py.
#include "control/arguments/reveal.h"

#include <torch/csrc/stable/library.h>

#include "cpu/allocate.h"

namespace simsd {
namespace {

Tensor reveal(Tensor tokens, Tensor revealed, Tensor step_map, const Tensor proposal, const Tensor prob,
              const Tensor log_odds, const Tensor entropy, const Tensor step, const Tensor schedule, const Tensor steps,
              const Tensor strategy, const Tensor threshold, const std::optional<Tensor> sub_blocks) {
    control::RevealParams params =
        control::reveal_params(check_cpu, tokens, revealed, step_map, proposal, prob, log_odds, entropy, step, schedule,
                               steps, strategy, threshold, sub_blocks);
    Tensor newly = allocate({params.batch}, ScalarType::Long);
    params.newly = control::data_of<int64_t>(newly);
    for (int64_t b = 0; b < params.batch; ++b) control::reveal_slot<control::Alone>(params, b);
    return newly;
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("reveal", TORCH_BOX(&simsd::reveal)); }
