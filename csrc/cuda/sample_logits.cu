// sample_logits: argmax or seeded Gumbel-max over rows of logits, with their softmax statistics.
//
// Data path. `scan` reads the logits once: a warp takes segments of 1024 ids to its registers, 16 bytes per load and
// one segment ahead, with 128 bytes of the mask of banned ids, and leaves of each a Partial of 32 bytes: largest x,
// sums of the others relative to the largest of them, best noisy score (vocabulary/segment.h). Segments are constant in
// length, so no sum depends on what else runs or on how many segments a warp takes: one of a row of 152k ids while rows
// are few, up to 16 of many. `finish` merges the partials of a row in a fixed tree, in double. Where top-k or top-p is
// on, `scan` makes no noise and `finish` first finds what they keep (vocabulary/filter.h) and then races over that: the
// block reads the row about twice more, mostly from the L2 cache, as segments whose largest x is too small are skipped.
//
// Bytes: R x V x itemsize, and 3 % (bfloat16) of that for the partials. 256 rows of 151936 in bfloat16: 77.8 MB, 23 us
// at 3.35 TB/s; 64 rows 5.8 us. Instructions (benchmarks/results/cuda_counts.md, sm_90): at temperature 0 a warp issues
// 424 for a segment, 16.1 M for 256 rows, 18 us on 132 multiprocessors of 4 schedulers at 1.7 GHz, under the time of
// the bytes. Noise doubles that, nearly all of it Philox; a temperature other than 1 costs 5 more for each id. What may
// win goes another way, a few units of 256 ids for each warp; a segment that cannot win makes no noise. So few rows are
// bound by bytes, 256 rows with noise by instructions.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sample_logits.h"
#include "cuda/vocabulary/filter.h"
#include "cuda/vocabulary/segment.h"
#include "cuda/vocabulary/summary.h"

namespace simsd::sample {
namespace {

using namespace vocabulary;

constexpr const char* OP = "sample_logits";
constexpr int SCAN_WARPS = 4;
constexpr int WARPS_AT_ONCE = 2048, MOST_SEGMENTS = 16;

// Whether the row's token is drawn with noise, and whether top-k or top-p has a say in what is asked of it.
SIMSD_DEVICE bool hot(const Params& p, int32_t row) { return value_of(p.temperature, row, 0.0f) > 0.0f; }
SIMSD_DEVICE bool draws(const Params& p, int32_t row) { return p.seed.data && hot(p, row); }
SIMSD_DEVICE bool filters(const Params& p, int32_t row) {
    const Filter filter = filter_of(p, row);
    return hot(p, row) && (p.seed.data || p.law) && (filter.limits_count(p.vocabulary) || filter.limits_mass());
}

SIMSD_DEVICE NoiseKey key_of_row(const Params& p, int32_t row) {
    return {value_of(p.seed, row, int64_t{0}), value_of(p.position, row, 0), value_of(p.revealed, row, int64_t{0})};
}

// A warp's segments of a row, while the next one is on its way to its registers. The race goes on from one to the next,
// so a partial has the best score of its segment and those before.
template <typename T>
__global__ void __launch_bounds__(SCAN_WARPS* WARP, 3) scan(const Params p) {
    const int32_t task = block_x(), index = draw_of(p, task), segments = segments_of(p.vocabulary);
    int32_t segment = block_y() * SCAN_WARPS + warp_index();
    if (segment >= segments || index < 0) return;
    Row<T> row = unscaled_row_of<T>(p, index);
    if (!row.logits) return;
    const bool whole = row.has_whole_units();
    Held<T> next;
    if (whole) next.load(row, segment);
    row.divisor = divisor_of(p, index);  // settings are read while the logits come
    const bool noise = draws(p, index) && !filters(p, index);
    Race race{noise ? key_of_row(p, index) : NoiseKey{}};
    Partial* partials = partials_of(p, task);
    for (int32_t following; segment < segments; segment = following) {
        following = segment + blocks_y() * SCAN_WARPS;
        Held<T> held = prepared(next, row.divisor);
        if (whole && following < segments) next.load(row, following);
        const Partial out = scan_segment(held, row, segment, noise, race);
        if (lane_index() == 0) partials[segment] = out;
    }
}

// The block's shared memory for a draw, [MOST_WARPS] each.
struct PerWarp {
    float *scores, *weights;
    int32_t* ids;

    SIMSD_DEVICE explicit PerWarp(Shared& shared)
        : scores(shared.take<float>(MOST_WARPS)),
          weights(shared.take<float>(MOST_WARPS)),
          ids(shared.take<int32_t>(MOST_WARPS)) {}
};

struct KeptDraw {
    int32_t id;
    float others;  // sum of e^(x - top) over the kept ids but the row's best
};

// The best noisy score among the ids that are kept (block); the row's best always is.
template <typename T>
SIMSD_DEVICE KeptDraw draw_kept(const Row<T>& row, const Partial* partials, const Summary& summary, const Kept& kept,
                                const NoiseKey& key, const PerWarp& of) {
    float others = 0.0f;
    Race race{key};
    race.run_one(summary.top, summary.best);
    for (int32_t segment = warp_index(); segment < segments_of(row.vocabulary); segment += thread_count() / WARP) {
        if (partials[segment].top == -INFINITE || partials[segment].top < kept.cutoff.x) continue;
#pragma unroll 1
        for (int i = 0; i < PER_LANE; i += UNIT<T>) {
            const int32_t id = id_at<T>(segment, i);
            float x[UNIT<T>];
            row.load_ids(id, x);
#pragma unroll
            for (int e = 0; e < UNIT<T>; ++e) {
                x[e] = kept.cutoff.keeps(x[e], id + e) && id + e != summary.best ? x[e] : -INFINITE;
                others += exp2_fast((x[e] - summary.top) * LOG2_E);
            }
            race.run(x, id);
        }
    }
    others = warp_sum(others);
    if (lane_index() == 0) {
        of.scores[warp_index()] = race.score;
        of.weights[warp_index()] = others;
        of.ids[warp_index()] = race.id;
    }
    block_barrier();
    others = 0.0f;
    for (int warp = 0; warp < thread_count() / WARP; ++warp) {
        race.offer(of.scores[warp], of.ids[warp]);
        others += of.weights[warp];
    }
    return {race.id, others};
}

SIMSD_DEVICE void write(const Params& p, int32_t row, int32_t token, float x, float logprob, const Summary& summary,
                        const Kept& kept) {
    p.token[row] = token;
    if (p.prob) p.prob[row] = summary.prob(x);
    if (p.log_odds) p.log_odds[row] = summary.log_odds(token, x);
    if (p.entropy) p.entropy[row] = summary.entropy();
    if (p.logsumexp) p.logsumexp[row] = summary.logsumexp();
    if (p.draw_logprob) p.draw_logprob[row] = logprob;
    const float overall = static_cast<float>(summary.total());
    if (p.law) p.law[row] = {summary.top, kept.total, overall, kept.cutoff.x, kept.cutoff.id};
}

// One block per row; rows without a filter need its first warp only. Without `Filters` there are no others.
template <typename T, bool Filters>
__global__ void __launch_bounds__(MOST_WARPS* WARP, 1) finish(const Params p) {
    const int32_t task = block_x(), index = draw_of(p, task);
    if (index < 0) return;
    const bool filtered = Filters && filters(p, index);
    if (!filtered && warp_index() > 0) return;
    const Row<T> row = row_of<T>(p, index);
    const Partial* partials = partials_of(p, task);
    const Summary summary = merge(partials, row.logits ? segments_of(p.vocabulary) : 0);
    if (summary.empty()) {
        const int32_t lowest = lowest_allowed(p);
        if (thread_index() == 0) write(p, index, lowest, -INFINITE, -INFINITE, summary, Kept{Cutoff{}, 1.0f});
        return;
    }
    Kept kept{Cutoff{}, static_cast<float>(summary.total())};
    int32_t token = summary.best;
    float kept_others = 0.0f;
    if (filtered) {
        if constexpr (Filters) {
            Shared shared;
            const Workspace workspace(shared);
            const PerWarp per_warp(shared);
            kept = filter_row(row, partials, summary.top, filter_of(p, index), p.law != nullptr, workspace);
            if (draws(p, index)) {
                const KeptDraw drawn = draw_kept(row, partials, summary, kept, key_of_row(p, index), per_warp);
                token = drawn.id;
                kept_others = drawn.others;
            }
        }
    } else if (draws(p, index)) {
        float score = -INFINITE;
        token = NO_ID;
        for (int32_t i = lane_index(); i < segments_of(p.vocabulary); i += WARP) {
            if (partials[i].score > score) {
                score = partials[i].score;
                token = partials[i].drawn;
            }
        }
        const float best = warp_max(score);
        token = warp_min(score == best ? token : NO_ID);
    }
    if (thread_index() != 0) return;
    const float x = row.at(token);
    float logprob = 0.0f;
    if (draws(p, index)) {
        const double others = filtered ? kept_others : summary.rest();
        logprob = static_cast<float>(static_cast<double>(x) - summary.top - log_one_plus(others));
    }
    write(p, index, token, x, logprob, summary, kept);
}

template <typename T>
void launch_kernels(const Params& p, Stream stream) {
    const int64_t segments = segments_of(p.vocabulary);
    // Few rows are spread out; many take more segments to a warp, whose race then starts ahead.
    const int64_t per_warp = std::clamp<int64_t>(p.tasks() * segments / WARPS_AT_ONCE, 1, MOST_SEGMENTS);
    const int64_t blocks = (segments + per_warp * SCAN_WARPS - 1) / (per_warp * SCAN_WARPS);
    launch(OP, scan<T>, Grid{p.tasks(), std::min<int64_t>(blocks, 65535)}, SCAN_WARPS * WARP, 0, stream, p);
    if (!(p.top_k || p.top_p) || !(p.seed || p.law))
        return launch(OP, finish<T, false>, Grid{p.tasks()}, WARP, 0, stream, p);
    // A power of two, and no more warps than segments: a constant of V, like all that a sum could depend on.
    int warps = 1;
    while (warps < MOST_WARPS && warps < segments) warps *= 2;
    constexpr int SHARED_BYTES = WORKSPACE_BYTES + 3 * MOST_WARPS * 4;
    launch(OP, finish<T, true>, Grid{p.tasks()}, warps * WARP, SHARED_BYTES, stream, p);
}

}  // namespace

int64_t scratch_bytes(int64_t tasks, int64_t vocabulary) {
    const int64_t segments = segments_of(vocabulary);
    return tasks * segments * static_cast<int64_t>(sizeof(Partial));
}

void launch_sample(const Params& params, Stream stream) {
    if (params.tasks() == 0) return;
    switch (params.element) {
        case Element::float32:
            return launch_kernels<float>(params, stream);
        case Element::bfloat16:
            return launch_kernels<Bfloat16>(params, stream);
        case Element::float16:
            return launch_kernels<Float16>(params, stream);
    }
}

}  // namespace simsd::sample
