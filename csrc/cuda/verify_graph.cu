// verify_graph: walks the target's own path through the drafted states of its blocks.
//
// Data path. Three stages, none of which the host waits for: `prepare` gives every masked position of every state the
// row of its logits and the key of its noise; sample_logits draws there; `walk` takes it from the draws. Draws go by
// row of the logits, N of them, and not by position of a state, of which there are many times more, nearly all revealed
// or of no state. The draws of states that no walk visits are wasted, which is what not asking the host costs.
//
// One warp walks for one slot, two positions per lane, with the current block in registers. A step is two dependent
// trips to memory: what was drawn at the state where the walk is, with the block's proposal; then block numbers and
// sets of 32 states at once, and the tokens of those that fit, seldom more than one.
//
// Floor. Latency: B = 1, C = 45 states of L = 4 over K = 3 blocks are 12 kB in all, and a walk of 13 steps some 26
// trips to the L2 cache, 7 us at 0.27 us each. Beside it stand the logits, 100 rows x 151,936 x 2 bytes = 30 MB, 9 us
// at 3.35 TB/s, and the forward that made them, milliseconds.
#include "cuda/launch.h"
#include "cuda/verify_graph.h"

namespace simsd::control {
namespace {

constexpr const char* OP = "verify_graph";
constexpr int PREPARE_THREADS = 128;

__global__ void __launch_bounds__(PREPARE_THREADS) prepare(const StateDraws draws) {
    const VerifyParams& p = draws.given;
    const int64_t n = static_cast<int64_t>(block_x()) * PREPARE_THREADS + thread_index();
    if (n >= p.batch * p.state_count * p.length) return;
    const int i = static_cast<int>(n % p.length), c = static_cast<int>(n / p.length % p.state_count);
    const int64_t b = n / p.length / p.state_count;
    const uint64_t known = revealed_in(p, b, c);
    if (i == 0) draws.key[n / p.length] = noise_key(static_cast<Strategy>(p.rules.strategy[b]), known);
    draws.position[n] = position_in(p, b, c, i);
    // A walk begins at state 0 and draws at masked positions alone.
    const bool wanted = *p.block.at(b, 0) >= 0 && *p.block.at(b, c) >= 0 && !has(known, i);
    int32_t row = wanted ? *p.rows.at(b, c, i) : -1;
    if (row < 0 || row >= p.logit_rows) row = -1;
    draws.row[n] = row;
    if (row >= 0) draws.draw_of_row[row] = static_cast<int32_t>(n);
    if (!wanted) return;
    draws.token[n] = 0;
    draws.prob[n] = draws.entropy[n] = 0.0f;
    draws.log_odds[n] = draws.logprob[n] = -__builtin_inff();
}

// Bound to one block, ptxas keeps all in registers; unbound, it spills two.
__global__ void __launch_bounds__(WARP, 1) walk(const StateDraws draws) {
    const VerifyParams& p = draws.given;
    Walk<Warp> walk(p, block_x());
    while (walk.goes_on()) {
        const int64_t first = (walk.slot() * p.state_count + walk.state()) * p.length;
        walk.take({contiguous<const int64_t>(draws.token + first),
                   {contiguous<const float>(draws.prob + first), contiguous<const float>(draws.log_odds + first),
                    contiguous<const float>(draws.entropy + first)},
                   contiguous<const float>(draws.logprob + first)});
    }
    walk.finish();
}

}  // namespace

void launch_prepare(const StateDraws& draws, Stream stream) {
    const int64_t count = draws.given.batch * draws.given.state_count * draws.given.length;
    launch(OP, prepare, Grid{(count + PREPARE_THREADS - 1) / PREPARE_THREADS}, PREPARE_THREADS, 0, stream, draws);
}

void launch_walk(const StateDraws& draws, Stream stream) {
    launch(OP, walk, Grid{draws.given.batch}, WARP, 0, stream, draws);
}

}  // namespace simsd::control
