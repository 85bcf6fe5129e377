// block_verify: judges drafted blocks straight from logits [B, L, V], up to the first rejection.
//
// Data path. `choose_rows` leaves out the rows that nobody asks about: known positions, and draft rows that were not
// drafted. The rows' draws, statistics and, under mrs, filtered softmaxes come from the kernels of sample_logits: one
// pass over the target's rows, and one over the draft's under mrs. `judge` then has one block per sequence: thread i
// judges position i, two ballots find the first rejection. Under mrs the one rejected row is read again with its draft
// row, twice in part: sums of max(p - q, 0) for every segment, then the segment that the residual falls into.
//
// Bytes: those of sample_logits; 16 sequences of 4 rows of 151936 in bfloat16 are 19.4 MB, 5.8 us at 3.35 TB/s, and
// twice that under mrs. A rejection adds 2 x 304 KB by one block, mostly from the L2 cache: some 10 us of latency.
#include "cuda/block_verify.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/vocabulary/row.h"
#include "cuda/vocabulary/summary.h"

namespace simsd::verify {
namespace {

using namespace vocabulary;
using sample::Law;

constexpr const char* OP = "block_verify";
constexpr int CHOOSE_THREADS = 256, MATCH_THREADS = 64, MRS_THREADS = 512;

SIMSD_DEVICE bool is_known(const Params& p, int32_t n, int32_t i) { return i < value_of(p.known, n, 0); }
SIMSD_DEVICE bool is_drafted(const Params& p, int32_t n, int32_t i) {
    return !is_known(p, n, i) && (value_of(p.drafted, n, int64_t{0}) >> i & 1);
}
SIMSD_DEVICE bool is_mixed(const Params& p, int32_t n) {
    return p.mrs && value_of(p.target.temperature, n, 0.0f) > 0.0f;
}

__global__ void __launch_bounds__(CHOOSE_THREADS) choose_rows(const Params p) {
    const int32_t n = block_x() * CHOOSE_THREADS + thread_index();
    if (n >= p.batch * p.length) return;
    const int32_t i = n % p.length;
    p.target_rows[n] = is_known(p, n, i) ? -1 : n;
    if (p.mrs) p.draft_rows[n] = is_mixed(p, n) && is_drafted(p, n, i) ? n : -1;
}

// Probability under the law of a row; 0 where nothing is finite.
SIMSD_DEVICE float prob_of(const Law& law, float x, int32_t id) {
    const bool kept = x > -INFINITE && (x > law.cutoff_x || (x == law.cutoff_x && id <= law.cutoff_id));
    return kept ? exponential(x - law.top) / law.total : 0.0f;
}
SIMSD_DEVICE float unfiltered_prob_of(const Law& law, float x) {
    if (x == -INFINITE) return 0.0f;
    return static_cast<float>(exponential(static_cast<double>(x) - law.top) / law.overall);
}
// Of an id that is kept.
SIMSD_DEVICE float log_prob_of(const Law& law, float x) {
    return static_cast<float>(static_cast<double>(x) - law.top - logarithm(static_cast<double>(law.total)));
}

// A rejected row with what is drawn from: max(p - q, 0), or p alone.
struct Residual {
    AnyRow target, draft;
    Law p, q;
    bool subtract;

    SIMSD_DEVICE void load(int32_t first, float (&surplus)[GROUP]) const {
        float x[GROUP];
        target.load(first, x);
#pragma unroll
        for (int e = 0; e < GROUP; ++e) surplus[e] = prob_of(p, x[e], first + e);
        if (!subtract) return;
        draft.load(first, x);
#pragma unroll
        for (int e = 0; e < GROUP; ++e) surplus[e] = larger(surplus[e] - prob_of(q, x[e], first + e), 0.0f);
    }
};

SIMSD_DEVICE double lane_sum(const float (&values)[GROUP]) {
    double sum = 0.0;
#pragma unroll
    for (int e = 0; e < GROUP; ++e) sum += values[e];
    return sum;
}

// Sums of this lane and those before.
SIMSD_DEVICE double inclusive_sum(double value) {
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
        const double other = shuffle_up(value, delta);
        value += lane_index() >= delta ? other : 0.0;
    }
    return value;
}

SIMSD_DEVICE int32_t group_start(int32_t segment, int group) {
    return segment * SEGMENT + (group * WARP + lane_index()) * GROUP;
}

// The id at which the sums of the surplus, in order of ids, exceed uniform x their total (block, the result in warp
// 0); NO_ID where there is none. Lane sums, segments and their sums have a fixed order, in double.
SIMSD_DEVICE int32_t inverse_draw(const Residual& residual, float uniform, double* reached) {
    const int32_t segments = segments_of(residual.target.row.vocabulary);
    for (int32_t segment = warp_index(); segment < segments; segment += thread_count() / WARP) {
        double sum = 0.0;
#pragma unroll 1
        for (int group = 0; group < SEGMENT / WARP / GROUP; ++group) {
            float surplus[GROUP];
            residual.load(group_start(segment, group), surplus);
            sum += lane_sum(surplus);
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) reached[segment] = sum;
    }
    block_barrier();
    if (warp_index() > 0) return NO_ID;
    double total = 0.0;
    for (int32_t first = 0; first < segments; first += WARP) {
        const int32_t segment = first + lane_index();
        const double up_to = total + inclusive_sum(segment < segments ? reached[segment] : 0.0);
        if (segment < segments) reached[segment] = up_to;
        total = shuffle(up_to, WARP - 1);
    }
    if (!(total > 0.0)) return NO_ID;
    warp_barrier();
    const double wanted = static_cast<double>(uniform) * total;
    int32_t found = segments - 1;
    for (int32_t first = 0; first < segments; first += WARP) {
        const int32_t segment = first + lane_index();
        const uint32_t beyond = ballot(segment < segments && reached[segment] > wanted);
        if (beyond) {
            found = first + lowest_bit(beyond);
            break;
        }
    }
    double before = found > 0 ? reached[found - 1] : 0.0;
    int32_t last = NO_ID;  // the last id with any surplus: the draw, should rounding keep the sums from getting there
    for (int group = 0; group < SEGMENT / WARP / GROUP; ++group) {
        const int32_t start = group_start(found, group);
        float surplus[GROUP];
        residual.load(start, surplus);
        const double own = lane_sum(surplus), up_to = before + inclusive_sum(own);
        int32_t hit = NO_ID, latest = -1;
        double sum = up_to - own;
#pragma unroll
        for (int e = 0; e < GROUP; ++e) {
            sum += surplus[e];
            if (surplus[e] > 0.0f) latest = start + e;
            if (surplus[e] > 0.0f && sum > wanted) hit = smaller(hit, start + e);
        }
        hit = warp_min(hit);
        if (hit != NO_ID) return hit;
        latest = warp_max(latest);
        last = latest >= 0 ? latest : last;
        before = shuffle(up_to, WARP - 1);
    }
    return last;
}

struct Verdict {
    bool known, drafted, accept;
    int64_t draft_id;
    float draft_prob;     // the target's, before filters
    float draft_logprob;  // under what the token is drawn from
};

SIMSD_DEVICE Verdict judge_position(const Params& p, int32_t n, int32_t i) {
    Verdict out{is_known(p, n, i), is_drafted(p, n, i), false, value_of(p.draft_ids, n, int64_t{0}),
                p.prob[n],         p.draw_logprob[n]};
    if (!out.drafted) return out;
    out.accept = out.draft_id == p.target_ids[n];
    if (!is_mixed(p, n)) return out;
    out.accept = false;
    if (out.draft_id < 0 || out.draft_id >= p.target.vocabulary) return out;
    const int32_t id = static_cast<int32_t>(out.draft_id);
    const Law target = p.target.law[n], draft = p.draft.law[n];
    const float x = any_row_of(p.target, n).at(id), y = any_row_of(p.draft, n).at(id);
    out.accept = product(value_of(p.coin, n, 0.0f), prob_of(draft, y, id)) < prob_of(target, x, id);
    out.draft_prob = unfiltered_prob_of(target, x);
    out.draft_logprob = log_prob_of(target, x);
    return out;
}

__global__ void __launch_bounds__(MRS_THREADS, 1) judge(const Params p) {
    Shared shared;
    uint32_t* fails = shared.take<uint32_t>(2);   // bit i of both words: position i is rejected
    uint32_t* counts = shared.take<uint32_t>(2);  // position i was drafted
    const int32_t b = block_x(), i = thread_index(), n = b * p.length + i;
    Verdict verdict{false, false, false, 0, 0.0f, 0.0f};
    if (i < p.length) verdict = judge_position(p, n, i);
    if (warp_index() < 2) {
        const uint32_t failed = ballot(verdict.drafted && !verdict.accept), counted = ballot(verdict.drafted);
        if (lane_index() == 0) {
            fails[warp_index()] = failed;
            counts[warp_index()] = counted;
        }
    }
    block_barrier();
    const uint64_t all_fails = static_cast<uint64_t>(fails[1]) << 32 | fails[0];
    const uint64_t all_counts = static_cast<uint64_t>(counts[1]) << 32 | counts[0];
    const int stop = lowest_bit(all_fails);  // -1: none
    const uint64_t before = stop < 0 ? ~uint64_t{0} : (uint64_t{1} << stop) - 1;

    int64_t bonus = -1;
    float bonus_prob = 0.0f, bonus_logprob = 0.0f;
    if (stop >= 0) {
        const int32_t at = b * p.length + stop;
        bonus = p.target_ids[at];
        bonus_prob = p.prob[at];
        bonus_logprob = p.draw_logprob[at];
        if (is_mixed(p, at)) {
            Residual residual{any_row_of(p.target, at), any_row_of(p.draft, at), p.target.law[at], p.draft.law[at],
                              true};
            double* reached = p.reached + static_cast<int64_t>(b) * segments_of(p.target.vocabulary);
            int32_t* drawn = shared.take<int32_t>(1);
            for (int round = 0; round < 2; ++round) {
                residual.subtract = round == 0;
                const int32_t id = inverse_draw(residual, value_of(p.residual, at, 0.0f), reached);
                if (thread_index() == 0) *drawn = id;
                block_barrier();
                if (*drawn != NO_ID) break;
            }
            if (*drawn != NO_ID) {
                bonus = *drawn;
                const float x = residual.target.at(*drawn);
                bonus_prob = unfiltered_prob_of(residual.p, x);
                bonus_logprob = log_prob_of(residual.p, x);
            }
        }
    }

    if (thread_index() == 0) {
        p.accepted[b] = count_bits(all_counts & before);
        p.bonus[b] = bonus;
    }
    block_barrier();  // the stop's prob has been read by all
    if (i >= p.length) return;
    int64_t token = verdict.drafted || verdict.known ? verdict.draft_id : p.target_ids[n];
    float prob = p.prob[n], logprob = p.draw_logprob[n];
    if (verdict.known) {
        p.target_ids[n] = verdict.draft_id;
        prob = 1.0f;
        logprob = 0.0f;
    } else if (stop >= 0 && i > stop) {
        token = -1;
    } else if (i == stop) {
        token = bonus;
        prob = bonus_prob;
        logprob = bonus_logprob;
    } else if (verdict.drafted) {
        prob = verdict.draft_prob;
        logprob = verdict.draft_logprob;
    }
    p.tokens[n] = token;
    p.prob[n] = prob;
    p.draw_logprob[n] = logprob;
}

}  // namespace

int64_t reached_bytes(int64_t batch, int64_t vocabulary) {
    return batch * segments_of(static_cast<int32_t>(vocabulary)) * static_cast<int64_t>(sizeof(double));
}

void launch_verify(const Params& params, Stream stream) {
    const int64_t rows = static_cast<int64_t>(params.batch) * params.length;
    launch(OP, choose_rows, Grid{(rows + CHOOSE_THREADS - 1) / CHOOSE_THREADS}, CHOOSE_THREADS, 0, stream, params);
    sample::launch_sample(params.target, stream);
    if (params.mrs) sample::launch_sample(params.draft, stream);
    // Enough for L positions, and for the segments of a rejected row.
    int threads = MATCH_THREADS;
    while (params.mrs && threads < MRS_THREADS && threads < segments_of(params.target.vocabulary) * WARP) threads *= 2;
    launch(OP, judge, Grid{params.batch}, threads, 48, stream, params);
}

}  // namespace simsd::verify
