// sample_logits: argmax or seeded Gumbel-max over rows of logits, with their softmax statistics.
//
// Data path. `scan` reads the logits once: a warp takes segments of 1024 ids to its registers, 16 bytes per load and
// one segment ahead, with 128 bytes of the mask of banned ids, and leaves of each a Partial of 32 bytes: largest x,
// sums of the others relative to the largest of them, best noisy score (vocabulary/segment.h). Segments are constant in
// length, so no sum depends on what else runs or on how many segments a warp takes: one of a row of 152k ids while rows
// are few, up to 16 of many. `finish`, a warp per row, merges the partials of a row in a fixed tree, in double. Where
// top-k or top-p is on, `scan` makes no noise and `finish` puts the row in a queue, from which all blocks of `filter`
// together find what is kept (vocabulary/filter.h) and race over that: a row of 152k ids has 19 blocks while it is
// alone, 4 of them among 64. Rows are read once more for what top-k keeps and once for the draw, mostly from the L2
// cache, and for flat logits up to five times for top-p: segments whose largest x is too small are skipped. A call
// without top-k and top-p has no `filter`.
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
constexpr int FILTER_BLOCKS = 264;  // two for each multiprocessor of an H100

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
    if (p.may_filter() && block_x() + block_y() + thread_index() == 0) *filter_scratch_of(p).queue = {0, 0};
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

SIMSD_DEVICE void write(const Params& p, int32_t row, int32_t token, float x, float logprob, const Summary& summary,
                        const Cutoff& cutoff, float total) {
    p.token[row] = token;
    if (p.prob) p.prob[row] = summary.prob(x);
    if (p.log_odds) p.log_odds[row] = summary.log_odds(token, x);
    if (p.entropy) p.entropy[row] = summary.entropy();
    if (p.logsumexp) p.logsumexp[row] = summary.logsumexp();
    if (p.draw_logprob) p.draw_logprob[row] = logprob;
    if (p.law) p.law[row] = {summary.top, total, static_cast<float>(summary.total()), cutoff.x, cutoff.id};
}

SIMSD_DEVICE float draw_logprob(float x, const Summary& summary, double others) {
    return static_cast<float>(static_cast<double>(x) - summary.top - log_one_plus(others));
}

// One warp per row, which either is done with it or, where a filter has something to do, leaves it to `filter`.
template <typename T>
__global__ void __launch_bounds__(WARP) finish(const Params p) {
    const int32_t task = block_x(), index = draw_of(p, task);
    if (index < 0) return;
    const Row<T> row = row_of<T>(p, index);
    const Partial* partials = partials_of(p, task);
    const Summary summary = merge(partials, row.logits ? segments_of(p.vocabulary) : 0);
    if (summary.empty()) {
        const int32_t lowest = lowest_allowed(p);
        if (lane_index() == 0) write(p, index, lowest, -INFINITE, -INFINITE, summary, Cutoff{}, 1.0f);
        return;
    }
    if (filters(p, index)) {
        const FilterScratch scratch = filter_scratch_of(p);
        Bytes16* bins = reinterpret_cast<Bytes16*>(scratch.bins + static_cast<int64_t>(task) * BINS);
        for (int i = lane_index(); i < BINS / 2; i += WARP) store_16(bins + i, Bytes16{});
        if (lane_index() != 0) return;
        const int first = filter_of(p, index).limits_count(p.vocabulary) ? COUNT : MASS;
        scratch.searches[task] = {summary, Cutoff{}, 1.0f, 0, 0, 0, 0, first, 0};
        scratch.tasks[atomic_add(&scratch.queue->rows, 1)] = task;
        return;
    }
    int32_t token = summary.best;
    if (draws(p, index)) {
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
    if (lane_index() != 0) return;
    const float x = row.at(token), logprob = draws(p, index) ? draw_logprob(x, summary, summary.rest()) : 0.0f;
    write(p, index, token, x, logprob, summary, Cutoff{}, static_cast<float>(summary.total()));
}

// Races over the kept ids of the block's share; the row's best always is one.
template <typename T>
SIMSD_DEVICE void race_kept(const Row<T>& row, const Partial* partials, const Share& share, const Search& now,
                            const NoiseKey& key, KeptSegment* kept) {
    Race race{key};
    race.run_one(now.summary.top, now.summary.best);
    for (int32_t segment = share.first(); segment < segments_of(row.vocabulary); segment += share.step()) {
        float others = 0.0f;
        if (partials[segment].top >= now.cutoff.x && partials[segment].top > -INFINITE) {
#pragma unroll 1
            for (int i = 0; i < PER_LANE; i += UNIT<T>) {
                const int32_t id = id_at<T>(segment, i);
                float x[UNIT<T>];
                row.load_ids(id, x);
#pragma unroll
                for (int e = 0; e < UNIT<T>; ++e) {
                    x[e] = now.cutoff.keeps(x[e], id + e) && id + e != now.summary.best ? x[e] : -INFINITE;
                    others += exp2_fast((x[e] - now.summary.top) * LOG2_E);
                }
                race.run(x, id);
            }
            others = warp_sum(others);
        }
        if (lane_index() == 0) kept[segment] = {others, race.score, race.id, 0};
    }
}

// The best of what the blocks left (warp): the token, and the sum of the others' e^(x - top) in `others`.
SIMSD_DEVICE int32_t best_kept(const KeptSegment* kept, int32_t segments, double& others) {
    float score = -INFINITE;
    int32_t token = NO_ID;
    others = 0.0;
    for (int32_t i = lane_index(); i < segments; i += WARP) {
        others += load_fresh(&kept[i].others);
        const float candidate = load_fresh(&kept[i].score);
        const int32_t id = load_fresh(&kept[i].drawn);
        token = candidate > score ? id : candidate == score ? smaller(token, id) : token;
        score = larger(score, candidate);
    }
    others = warp_sum(others);
    const float best = warp_max(score);
    return warp_min(score == best ? token : NO_ID);
}

// One pass over a share of a row (block); the block that is the last one to end settles the pass.
template <typename T>
SIMSD_DEVICE void run_pass(const Params& p, const FilterScratch& scratch, int32_t task, int pass, const Share& share,
                           const Workspace& work, bool* is_last) {
    const int32_t index = draw_of(p, task), segments = segments_of(p.vocabulary);
    const Row<T> row = row_of<T>(p, index);
    const Partial* partials = partials_of(p, task);
    Search* search = scratch.searches + task;
    Search now = search->fresh();
    KeptSegment* kept = scratch.kept + static_cast<int64_t>(task) * segments;
    unsigned long long* bins = scratch.bins + static_cast<int64_t>(task) * BINS;
    const Masses masses(pass, now, p.vocabulary);
    if (pass < TIES) {
        gather(row, partials, share, masses, Digit(pass), now.key, work, bins);
    } else if (pass == TIES) {
        count_ties(row, partials, share, now.cutoff.x, kept);
    } else {
        race_kept(row, partials, share, now, key_of_row(p, index), kept);
    }
    device_fence();
    block_barrier();
    if (thread_index() == 0) *is_last = atomic_add(&search->arrived, 1u) + 1 == static_cast<uint32_t>(share.slices);
    block_barrier();
    if (!*is_last) return;
    device_fence();

    const Filter filter = filter_of(p, index);
    const int after = draws(p, index) ? DRAW : PASSES;
    int next = PASSES;
    if (pass < TIES) {
        next = settle_digit(pass, filter, masses, filter.limits_mass() || p.law, after, work, bins, now);
    } else if (pass == TIES) {
        if (warp_index() == 0) now.cutoff.id = nth_tie(row, kept, now.cutoff.x, now.ties);
        next = after;
    }
    if (warp_index() == 0 && next == PASSES) {
        double others = 0.0;
        const int32_t token = pass == DRAW ? best_kept(kept, segments, others) : now.summary.best;
        const float x = pass == DRAW ? row.at(token) : now.summary.top;
        const float logprob = pass == DRAW ? draw_logprob(x, now.summary, others) : 0.0f;
        if (lane_index() == 0) write(p, index, token, x, logprob, now.summary, now.cutoff, now.total);
    }
    now.arrived = 0;
    if (thread_index() == 0) *search = now;  // its pass is still this one
    device_fence();
    block_barrier();
    if (thread_index() == 0) atomic_max(&search->pass, next);
}

// All passes over the rows in the queue, in one launch: as many blocks share a row as there are for it. A block takes
// one share after another, all of a pass before those of the next one. Before a pass it waits for the row's pass before
// to be settled, which is up to blocks that took their shares earlier: they run already and wait for nobody behind
// them.
template <typename T>
__global__ void __launch_bounds__(MOST_WARPS* WARP, 2) filter(const Params p) {
    const FilterScratch scratch = filter_scratch_of(p);
    const int32_t rows = scratch.queue->rows;
    if (rows == 0) return;
    const int32_t warps = thread_count() / WARP, most = (segments_of(p.vocabulary) + warps - 1) / warps;
    const int32_t slices = larger(smaller(blocks_x() / rows, most), 1);
    const auto shares = static_cast<unsigned long long>(rows) * slices;
    Shared shared;
    const Workspace work(shared);
    unsigned long long* ticket = shared.take<unsigned long long>(1);
    int32_t* reached = shared.take<int32_t>(1);
    bool* is_last = shared.take<bool>(1);
    for (;;) {
        if (thread_index() == 0) *ticket = atomic_add(&scratch.queue->tickets, 1ull);
        block_barrier();
        const unsigned long long taken = *ticket;
        if (taken >= PASSES * shares) return;
        const int pass = static_cast<int>(taken / shares);
        const auto place = static_cast<int32_t>(taken % shares);
        const int32_t task = scratch.tasks[place / slices];
        if (thread_index() == 0) *reached = wait_for(&scratch.searches[task].pass, pass);
        block_barrier();
        if (*reached == pass) run_pass<T>(p, scratch, task, pass, {place % slices, slices}, work, is_last);
    }
}

template <typename T>
void launch_kernels(const Params& p, Stream stream) {
    const int64_t segments = segments_of(p.vocabulary);
    // Few rows are spread out; many take more segments to a warp, whose race then starts ahead.
    const int64_t per_warp = std::clamp<int64_t>(p.tasks() * segments / WARPS_AT_ONCE, 1, MOST_SEGMENTS);
    const int64_t blocks = (segments + per_warp * SCAN_WARPS - 1) / (per_warp * SCAN_WARPS);
    launch(OP, scan<T>, Grid{p.tasks(), std::min<int64_t>(blocks, 65535)}, SCAN_WARPS * WARP, 0, stream, p);
    launch(OP, finish<T>, Grid{p.tasks()}, WARP, 0, stream, p);
    if (!p.may_filter()) return;
    int warps = 1;
    while (warps < MOST_WARPS && warps < segments) warps *= 2;
    const int64_t most = p.tasks() * ((segments + warps - 1) / warps);
    constexpr int SHARED_BYTES = WORKSPACE_BYTES + 3 * 16;
    launch(OP, filter<T>, Grid{std::min<int64_t>(most, FILTER_BLOCKS)}, warps * WARP, SHARED_BYTES, stream, p);
}

}  // namespace

int64_t scratch_bytes(int64_t tasks, int64_t vocabulary, bool filters) {
    const int64_t segments = segments_of(vocabulary);
    return partials_bytes(tasks, segments) + (filters ? filter_bytes(tasks, segments) : 0);
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
