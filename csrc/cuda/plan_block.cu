// plan_block: from drafted blocks to the rows of one exact verification forward.
//
// Data path. One warp per slot grows its graph of states (control/plan/growth.h), its candidates in global memory,
// which the L2 cache holds; a warp cuts the graphs to what the batch may have (control/plan/cut.h); one warp per slot
// writes its rows (control/plan/layout.h). That is three launches where the draft's statistics are given. Where states
// have draws of their own, every one must be drawn before it can be expanded: sample_logits draws the masked positions
// of every slot's newest state, `step` expands it and asks for the next, C - 1 times whatever the graphs turn out to
// be. A slot whose states share their draws (no temperature, or `sequential`) goes on as far as what it has leads.
//
// A block is one warp; that one is to fit on a multiprocessor keeps the compiler from spilling registers.
//
// Floor. Latency: a round is some ten trips of one warp to the L2 cache and an exponential or two, about 3 us; 15
// rounds 45 us, all slots at a time. Outputs of 8 slots of 31 states, L = 16, 8k KV slots are 0.65 MB, 0.2 us at 3.35
// TB/s.
#include "cuda/launch.h"
#include "cuda/plan_block.h"

namespace simsd::control {
namespace {

constexpr const char* OP = "plan_block";

__global__ void __launch_bounds__(WARP, 1) grow(const PlanWork w) {
    Shared shared;
    const int64_t b = block_x();
    Growth<Warp> growth(w.given, w.extent, w.taken, b, w.graphs + b * w.graph_bytes, *shared.take<Room>(1));
    for (growth.begin(); !growth.complete(); growth.advance()) {
        if (growth.expands()) growth.expand(growth.proposal());
    }
    growth.peek();
}

SIMSD_DEVICE Proposal proposal_at(const Growth<Warp>& growth, const int64_t* token, const float* prob,
                                  const float* log_odds, const float* entropy, int64_t first) {
    return growth.proposal(contiguous<const int64_t>(token + first),
                           {contiguous<const float>(prob + first), contiguous<const float>(log_odds + first),
                            contiguous<const float>(entropy + first)});
}

__global__ void __launch_bounds__(WARP, 1) step(const PlanWork w) {
    Shared shared;
    const PlanParams& p = w.given;
    const GrowthDraws& d = w.draws;
    const int64_t b = block_x(), first = b * p.length, blocks = b * p.blocks;
    const uint64_t full = full_set(p.length);
    const auto strategy = static_cast<Strategy>(p.rules.strategy[b]);
    const bool noisy = d.seeded && d.temperature.data[b * d.temperature.strides[0]] > 0.0f;
    const bool shares = strategy == Strategy::sequential || !noisy;
    if (!w.begins && d.progress[b].complete) return;
    Growth<Warp> growth(p, w.extent, w.taken, b, w.graphs + b * w.graph_bytes, *shared.take<Room>(1));
    bool drawn = !w.begins;  // for the newest state
    if (w.begins) {
        Warp::range(p.blocks, [&](int64_t block) { d.ready[blocks + block] = 0; });
        growth.begin();
    } else {
        growth.resume(d.progress[b]);
        // The first state of a block that comes up has the fewest positions revealed: later ones need no more.
        const int64_t block = blocks + growth.progress().block;
        if (shares) {
            Warp::each(full, [&](int i) {
                const int64_t to = block * p.length + i, from = first + i;
                d.shared_token[to] = d.token[from];
                d.shared_prob[to] = d.prob[from];
                d.shared_log_odds[to] = d.log_odds[from];
                d.shared_entropy[to] = d.entropy[from];
            });
            if (Warp::leads()) d.ready[block] = 1;
        }
    }
    Warp::sync();
    for (; !growth.complete(); growth.advance(), drawn = false) {
        if (!growth.expands()) continue;
        const int64_t block = blocks + growth.progress().block;
        const bool given = shares && growth.nearest() >= 0;  // what was drawn in a state seen
        if (!given && (shares ? !d.ready[block] : !drawn)) break;
        growth.expand(given    ? growth.proposal()
                      : shares ? proposal_at(growth, d.shared_token, d.shared_prob, d.shared_log_odds, d.shared_entropy,
                                             block * p.length)
                               : proposal_at(growth, d.token, d.prob, d.log_odds, d.entropy, first));
    }
    if (growth.complete()) growth.peek();
    const Progress now = growth.progress();
    const int nearest = growth.nearest();
    const int64_t drafted = p.batch * p.blocks * p.length;  // rows of logits, those of states seen behind them
    Warp::sync();
    Warp::each(full, [&](int i) {
        const bool wanted = !now.complete && !has(now.revealed, i);
        const int64_t within = int64_t{now.block} * p.length + i;
        const int64_t row = nearest < 0 ? blocks * p.length + within : drafted + *p.seen.rows.at(b, nearest, i);
        d.row[first + i] = wanted ? static_cast<int32_t>(row) : -1;
        d.position[first + i] = wanted ? static_cast<int32_t>(p.start[b] + within) : 0;
    });
    if (Warp::leads()) {
        d.key[b] = noise_key(strategy, now.revealed);
        d.progress[b] = now;
    }
}

__global__ void __launch_bounds__(WARP, 1) cut_graphs(const PlanWork w) {
    const int64_t asked = cut<Warp>(w.given, w.taken, w.cut);
    if (Warp::leads()) *w.asked = asked;
}

__global__ void __launch_bounds__(WARP, 1) lay_out(const PlanWork w) {
    Layout<Warp>(w.given, w.taken, w.cut, *w.asked, block_x()).write();
}

}  // namespace

void launch_grow(const PlanWork& work, Stream stream) {
    launch(OP, grow, Grid{work.given.batch}, WARP, static_cast<int>(sizeof(Room)) + 16, stream, work);
}

void launch_step(PlanWork work, bool begins, Stream stream) {
    work.begins = begins;
    launch(OP, step, Grid{work.given.batch}, WARP, static_cast<int>(sizeof(Room)) + 16, stream, work);
}

void launch_layout(const PlanWork& work, Stream stream) {
    launch(OP, cut_graphs, Grid{1}, WARP, 0, stream, work);
    launch(OP, lay_out, Grid{work.given.batch}, WARP, 0, stream, work);
}

}  // namespace simsd::control
