// reveal: one denoising step for a batch of blocks [B, L], L <= 64.
//
// Data path: one warp per block, two positions per lane. The set and the step come first, then everything that the step
// may need of the masked positions in one go (proposals, and the statistics that the strategy ranks by), so that a
// block is two round trips to memory and the ranking: each masked position is shown to all lanes by a shuffle and
// counted where it comes first. Floor: latency. B = 64 blocks of L = 32 are 64 x 32 x (8 + 4 + 12) bytes = 49 kB, 15 ns
// at 3.35 TB/s; a launch is some 2 us.
#include "cuda/denoise/step.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/reveal.h"

namespace simsd::denoise {
namespace {

SIMSD_DEVICE Line line(const View<const float, 2>& matrix, int64_t b) { return {matrix.at(b, 0), matrix.strides[1]}; }

__global__ void __launch_bounds__(WARP) reveal(const RevealParams p) {
    const int64_t b = block_x();
    const int now = *p.step.at(b);
    const uint64_t before = static_cast<uint64_t>(*p.revealed.at(b));
    uint64_t chosen = 0;
    if (has_step(p.rule, now)) {
        const uint64_t masked = full_set(p.length) & ~before;
        int64_t proposal[PER_LANE] = {};
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            if (has(masked, position_of(k))) proposal[k] = *p.proposal.at(b, position_of(k));
        }
        const Statistics given =
            load_statistics(p.rule.strategy, masked, line(p.prob, b), line(p.log_odds, b), line(p.entropy, b));
        chosen = reveal_set(p.rule, now, masked, given);
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            if (!has(chosen, position_of(k))) continue;
            *p.tokens.at(b, position_of(k)) = proposal[k];
            *p.step_map.at(b, position_of(k)) = now + 1;
        }
    }
    warp_barrier();  // every lane has read the set
    if (lane_index() != 0) return;
    p.newly[b] = static_cast<int64_t>(chosen);
    if (chosen != 0) *p.revealed.at(b) = static_cast<int64_t>(before | chosen);
}

}  // namespace

void launch_reveal(const RevealParams& params, Stream stream) {
    launch("reveal", reveal, Grid{params.batch}, WARP, 0, stream, params);
}

}  // namespace simsd::denoise
