// propose_block: what a draft's logits for one block propose.
//
// Data path. `prepare_block` gives every masked position the row of its logits and the key of its noise; sample_logits
// draws there; `settle`, one warp per slot with two positions per lane, takes the draws. With noise a slot reveals some
// of them by its rule and draws the others again, which is L rounds of both, as the host does not ask how many steps
// the slots' schedules have: a round in which a slot has nothing left to draw reads no logits for it.
//
// Floor. Without noise that of sample_logits on B x L rows: 64 x 4 rows x 151,936 x 2 bytes = 78 MB, 23 us at 3.35
// TB/s, and one launch of some 3 us. With noise the rows still masked are read again in each round, from the L2 cache
// where they fit.
#include "cuda/launch.h"
#include "cuda/propose_block.h"

namespace simsd::control {
namespace {

constexpr const char* OP = "propose_block";

struct Round {
    BlockDraws draws;
    int number;
};

// The keys of the draws at `masked`.
SIMSD_DEVICE void ask(const BlockDraws& draws, int64_t b, uint64_t masked) {
    const ProposeParams& p = draws.given;
    Warp::each(full_set(p.length),
               [&](int i) { draws.row[b * p.length + i] = has(masked, i) ? *p.rows.at(b, i) : -1; });
    if (Warp::leads()) draws.key[b] = key_in(p, b, masked);
}

__global__ void __launch_bounds__(WARP) prepare_block(const BlockDraws draws) {
    const ProposeParams& p = draws.given;
    const int64_t b = block_x();
    const uint64_t masked = masked_in<Warp>(p, b, 0);
    Warp::each(full_set(p.length),
               [&](int i) { draws.position[b * p.length + i] = static_cast<int32_t>(position_in(p, b, i)); });
    ask(draws, b, masked);
}

__global__ void __launch_bounds__(WARP) settle_round(const Round round) {
    const BlockDraws& draws = round.draws;
    const ProposeParams& p = draws.given;
    const int64_t b = block_x(), first = b * p.length;
    const uint64_t masked = masked_in<Warp>(p, b, round.number);
    Warp::each(masked, [&](int i) {
        const int32_t row = *p.rows.at(b, i);
        expect(row >= 0 && row < p.logit_rows, "rows must be in [0, N) at masked positions");
    });
    const Drawn drawn{contiguous<const int64_t>(draws.token + first),
                      {contiguous<const float>(draws.prob + first), contiguous<const float>(draws.log_odds + first),
                       contiguous<const float>(draws.entropy + first)}};
    const uint64_t left = settle<Warp>(p, b, round.number, masked, drawn);
    if (round.number + 1 == p.rounds()) return;
    Warp::sync();  // all have read what the lead writes
    ask(draws, b, left);
    if (Warp::leads()) p.known[b] = static_cast<int64_t>(full_set(p.length) & ~left);
}

}  // namespace

void launch_prepare(const BlockDraws& draws, Stream stream) {
    launch(OP, prepare_block, Grid{draws.given.batch}, WARP, 0, stream, draws);
}

void launch_settle(const BlockDraws& draws, int round, Stream stream) {
    launch(OP, settle_round, Grid{draws.given.batch}, WARP, 0, stream, Round{draws, round});
}

}  // namespace simsd::control
