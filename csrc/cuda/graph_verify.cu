// block_verify.graph: walks the target's own path through the drafted states of its blocks.
//
// Data path. Three stages, none of which the host waits for: `keys` gives every masked position of every copy the row
// of its logits and the key of its noise; sample_logits draws there, one row of logits per draw; `walk` takes it from
// the draws. The draws of copies that no walk visits are wasted, which is what not asking the host costs.
//
// One warp walks for one sequence, two positions per lane, with the current block in registers. A step is two
// dependent trips to memory: what was drawn at the copy where the walk is, with the block's proposal; then block
// numbers and sets of 32 copies at once, and the tokens of those that fit, seldom more than one.
//
// Floor. Latency: B = 1, C = 45 copies of L = 4 over K = 3 blocks are 12 kB in all, and a walk of 13 steps some 26
// trips to the L2 cache, 7 us at 0.27 us each. Beside it stand the logits, 180 rows x 151,936 x 2 bytes = 55 MB, 16 us
// at 3.35 TB/s, and the forward that made them, milliseconds.
#include "cuda/denoise/step.h"
#include "cuda/device.h"
#include "cuda/graph_verify.h"
#include "cuda/launch.h"
#include "cuda/warp.h"

namespace simsd::graph {
namespace {

using namespace denoise;

constexpr const char* OP = "block_verify.graph";
constexpr int KEYS = 128;  // per block of threads
constexpr int PROGRESS = 7;
constexpr int32_t DENOISED = 1, DRAFTED = 2;  // origin

SIMSD_DEVICE uint64_t set_at(const Copies& given, int64_t b, int c) {
    return static_cast<uint64_t>(*given.revealed.at(b, c)) & full_set(given.length);
}

__global__ void __launch_bounds__(KEYS) keys(const KeyParams p) {
    const int length = p.given.length;
    const int64_t n = static_cast<int64_t>(block_x()) * KEYS + thread_index();
    if (n >= p.given.batch * p.given.copies * length) return;
    const int i = static_cast<int>(n % length), c = static_cast<int>(n / length % p.given.copies);
    const int64_t b = n / length / p.given.copies;
    const int32_t block = *p.given.block.at(b, c);
    const uint64_t known = set_at(p.given, b, c);
    // A walk begins at copy 0 and draws at masked positions alone.
    const bool wanted = *p.given.block.at(b, 0) >= 0 && block >= 0 && !has(known, i);
    p.row[n] = wanted ? *p.given.rows.at(b, c, i) : -1;
    p.position[n] = static_cast<int32_t>(*p.start.at(b) + static_cast<int64_t>(block) * length + i);
    if (p.set != nullptr && i == 0) p.set[n / length] = static_cast<int64_t>(known);
}

// A lane's positions of one block.
struct Text {
    int64_t tokens[PER_LANE];
    int32_t steps[PER_LANE], origin[PER_LANE];
    float prob[PER_LANE];
};

SIMSD_DEVICE Text masked_text() {
    Text out;
    for (int k = 0; k < PER_LANE; ++k) {
        out.tokens[k] = out.steps[k] = out.origin[k] = 0;
        out.prob[k] = 1.0f;
    }
    return out;
}

SIMSD_DEVICE void store(const WalkParams& p, int64_t b, int row, const Text& text) {
    const int64_t first = (b * (p.ahead + 2) + row) * p.given.length;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
        const int i = position_of(k);
        if (i >= p.given.length) continue;
        p.tokens_out[first + i] = text.tokens[k];
        p.step_map_out[first + i] = text.steps[k];
        p.prob_out[first + i] = text.prob[k];
        p.origin_out[first + i] = text.origin[k];
    }
}

// The first copy with this block number, set and revealed tokens, -1 for none (warp).
SIMSD_DEVICE int copy_of(const Copies& given, int64_t b, int block, uint64_t known, const int64_t (&tokens)[PER_LANE]) {
    for (int first = 0; first < given.copies; first += WARP) {
        const int mine = first + lane_index();
        const bool fits = mine < given.copies && *given.block.at(b, mine) == block && set_at(given, b, mine) == known;
        for (uint32_t left = ballot(fits); left != 0; left &= left - 1) {
            const int c = first + lowest_bit(left);
            bool same = true;
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k) {
                const int i = position_of(k);
                if (has(known, i)) same = same && *given.states.at(b, c, i) == tokens[k];
            }
            if (warp_all(same)) return c;
        }
    }
    return -1;
}

__global__ void __launch_bounds__(WARP) walk(const WalkParams p) {
    const Copies& given = p.given;
    const int64_t b = block_x();
    const int length = given.length;
    const uint64_t full = full_set(length);
    const int cleaned = smaller(*p.cleaned.at(b), p.ahead), depth = smaller(*p.depth.at(b), p.ahead);

    Text text = masked_text();
    uint64_t known = 0;
    int step = 0, at = -1;
    if (given.copies > 0 && length > 0) {
        known = set_at(given, b, 0);
        step = *p.step.at(b);
        at = *given.block.at(b, 0) >= 0 ? 0 : -1;
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            const int i = position_of(k);
            if (i >= length) continue;
            text.tokens[k] = *given.states.at(b, 0, i);
            text.steps[k] = *p.step_map.at(b, i);
            text.prob[k] = *p.prob.at(b, i);
            text.origin[k] = *p.origin.at(b, i);
        }
    }

    int last = -1, finished = 0, committed = 0, taken = 0, judged = 0, accepted = 0;
    // The last step finishes a block, so there always is a next one. A step that reveals nothing stays at its copy:
    // the number of copies bounds those.
    while (at >= 0 && taken < given.copies && has_step(p.rule, step)) {
        const uint64_t masked = full & ~known;
        const int64_t drawn = (b * given.copies + at) * length;
        int64_t token[PER_LANE], proposal[PER_LANE];
        float token_prob[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            const int i = position_of(k);
            const bool wanted = has(masked, i);
            if (wanted) {
                const int32_t row = *given.rows.at(b, at, i);
                expect(row >= 0 && row < p.logit_rows,
                       "rows must be in [0, N) at masked positions of copies that the walk visits");
            }
            token[k] = wanted ? p.token[drawn + i] : 0;
            token_prob[k] = wanted ? p.token_prob[drawn + i] : 0.0f;
            // Blocks past the last drafted one have no proposal: nothing in them is judged or held.
            proposal[k] = finished < p.ahead && i < length ? *p.clean.at(b, finished, i) : 0;
        }
        const Statistics statistics = load_statistics(p.rule.strategy, masked, {p.token_prob + drawn, 1},
                                                      {p.log_odds + drawn, 1}, {p.entropy + drawn, 1});
        const uint64_t chosen = reveal_set(p.rule, step, masked, statistics);

        bool as_drafted[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            if (has(chosen, position_of(k))) {
                text.tokens[k] = token[k];
                text.prob[k] = token_prob[k];
                text.steps[k] = step + 1;
                text.origin[k] = at == 0 ? DENOISED : DRAFTED;
            }
            as_drafted[k] = position_of(k) < length && text.tokens[k] == proposal[k];
        }
        const uint64_t agreed = set_of(as_drafted);
        if (finished < depth) {
            judged += count_bits(chosen);
            accepted += count_bits(chosen & agreed);
        }
        known |= chosen;
        last = at;
        ++taken;
        ++step;
        if (known == full) {
            store(p, b, finished, text);
            // Rows of the next block saw this one as drafted: only then are they this walk's.
            const bool held = finished < cleaned && agreed == full;
            committed += held;
            ++finished;
            known = 0;
            step = 0;
            text = masked_text();
            if (!held) break;
        }
        at = copy_of(given, b, finished, known, text.tokens);
    }

#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
        if (!has(known, position_of(k))) text.tokens[k] = 0;
    }
    store(p, b, finished, text);
    for (int row = finished + 1; row < p.ahead + 2; ++row) store(p, b, row, masked_text());
    if (lane_index() != 0) return;
    p.revealed_out[b] = static_cast<int64_t>(known);
    int32_t* progress = p.progress + b * PROGRESS;
    progress[0] = finished;
    progress[1] = committed;
    progress[2] = taken;
    progress[3] = last;
    progress[4] = step;
    progress[5] = judged;
    progress[6] = accepted;
}

}  // namespace

void launch_keys(const KeyParams& params, Stream stream) {
    const int64_t count = params.given.batch * params.given.copies * params.given.length;
    launch(OP, keys, Grid{(count + KEYS - 1) / KEYS}, KEYS, 0, stream, params);
}

void launch_walk(const WalkParams& params, Stream stream) {
    launch(OP, walk, Grid{params.given.batch}, WARP, 0, stream, params);
}

}  // namespace simsd::graph
