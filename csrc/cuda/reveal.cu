// reveal: one denoising step for a batch of blocks [B, L], L <= 64.
//
// Data path: one warp per block, two positions per lane. The set, the step and the rule come first, then everything
// that the step may need of the masked positions in one go (proposals, and the statistics that the strategy ranks by),
// so that a block is two round trips to memory and the ranking: each masked position is shown to all lanes by a shuffle
// and counted where it comes first. Floor: latency. B = 64 blocks of L = 32 are 64 x 32 x (8 + 4 + 12) bytes = 49 kB,
// 15 ns at 3.35 TB/s; a launch is some 2 us.
#include "cuda/launch.h"
#include "cuda/reveal.h"

namespace simsd::control {
namespace {

__global__ void __launch_bounds__(WARP) reveal(const RevealParams p) { reveal_slot<Warp>(p, block_x()); }

}  // namespace

void launch_reveal(const RevealParams& params, Stream stream) {
    launch("reveal", reveal, Grid{params.batch}, WARP, 0, stream, params);
}

}  // namespace simsd::control
