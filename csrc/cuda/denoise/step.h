// One denoising step of a block, by one warp: which masked positions it reveals. Shared by reveal and
// block_verify.graph, so that a walk takes the very steps that decoding without a draft takes. Lane l looks after
// positions l and l + 32. The Python definition is reveal/reference.py.
#pragma once

#include "cuda/denoise/rule.h"
#include "cuda/device.h"

namespace simsd::denoise {

constexpr int PER_LANE = MAX_BLOCK_LENGTH / WARP;

SIMSD_DEVICE int position_of(int k) { return lane_index() + k * WARP; }

SIMSD_DEVICE bool has(uint64_t set, int position) { return set >> position & 1; }

SIMSD_DEVICE uint64_t full_set(int length) {
    return length >= MAX_BLOCK_LENGTH ? ~uint64_t{0} : (uint64_t{1} << length) - 1;
}

// The positions whose lanes give true (warp).
SIMSD_DEVICE uint64_t set_of(const bool (&value)[PER_LANE]) {
    return static_cast<uint64_t>(ballot(value[1])) << WARP | ballot(value[0]);
}

// What the model says of the lane's positions. Only what the strategy looks at is set, at masked positions.
struct Statistics {
    float prob[PER_LANE], log_odds[PER_LANE], entropy[PER_LANE];
};

// One of the statistics of a block, [L].
struct Line {
    const float* data;
    int64_t stride;
};

SIMSD_DEVICE Statistics load_statistics(Strategy strategy, uint64_t masked, Line prob, Line log_odds, Line entropy) {
    const bool ranks_odds = strategy == Strategy::low_confidence_static || strategy == Strategy::low_confidence_dynamic;
    Statistics out;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
        const int i = position_of(k);
        const bool wanted = has(masked, i);
        out.prob[k] = wanted && strategy == Strategy::low_confidence_dynamic ? prob.data[i * prob.stride] : 0.0f;
        out.log_odds[k] = wanted && ranks_odds ? log_odds.data[i * log_odds.stride] : 0.0f;
        out.entropy[k] = wanted && strategy == Strategy::entropy_bounded ? entropy.data[i * entropy.stride] : 0.0f;
    }
    return out;
}

SIMSD_DEVICE float nan_last(float score) { return score == score ? score : bits_as_float(0xff800000u); }

// How many masked positions come before each of the lane's, by falling score, then rising position (warp). No score is
// NaN.
SIMSD_DEVICE void rank(const float (&score)[PER_LANE], uint64_t masked, int (&place)[PER_LANE]) {
    for (int k = 0; k < PER_LANE; ++k) place[k] = 0;
    for (uint64_t left = masked; left != 0; left &= left - 1) {
        const int j = lowest_bit(left);
        const float other = shuffle(j < WARP ? score[0] : score[1], j % WARP);
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            place[k] += other > score[k] || (other == score[k] && j < position_of(k));
        }
    }
}

// The masked positions with fewer than `count` before them (warp).
SIMSD_DEVICE uint64_t best(const int (&place)[PER_LANE], uint64_t masked, int count) {
    bool chosen[PER_LANE];
    for (int k = 0; k < PER_LANE; ++k) chosen[k] = has(masked, position_of(k)) && place[k] < count;
    return set_of(chosen);
}

// In order of rising entropy as many as have a running sum below the threshold, at least one (warp).
SIMSD_DEVICE uint64_t bounded(const float (&entropy)[PER_LANE], uint64_t masked, double threshold) {
    float score[PER_LANE];
    int place[PER_LANE];
    for (int k = 0; k < PER_LANE; ++k) score[k] = nan_last(-entropy[k]);
    rank(score, masked, place);
    const int available = count_bits(masked);
    // One by one, in float64: a parallel sum would round otherwise than the other backends do.
    double total = 0.0;
    int below = 0;
    for (; below < available; ++below) {
        bool is_next[PER_LANE];
        for (int k = 0; k < PER_LANE; ++k) is_next[k] = has(masked, position_of(k)) && place[k] == below;
        const int i = lowest_bit(set_of(is_next));
        total += static_cast<double>(-shuffle(i < WARP ? score[0] : score[1], i % WARP));
        if (!(total < threshold)) break;
    }
    return best(place, masked, below > 1 ? below : 1);
}

// What a step reveals, the last step of a block aside (warp). `count` is in [0, masked positions].
SIMSD_DEVICE uint64_t choose(const Rule& rule, uint64_t masked, int count, const Statistics& given) {
    int place[PER_LANE];
    switch (rule.strategy) {
        case Strategy::sequential:
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k) place[k] = count_bits(masked & full_set(position_of(k)));
            return best(place, masked, count);
        case Strategy::entropy_bounded:
            return bounded(given.entropy, masked, rule.threshold);
        case Strategy::low_confidence_dynamic: {
            bool sure[PER_LANE];
            for (int k = 0; k < PER_LANE; ++k) {
                sure[k] = has(masked, position_of(k)) && given.prob[k] > static_cast<float>(rule.threshold);
            }
            const uint64_t confident = set_of(sure);
            if (count_bits(confident) >= count) return confident;
            break;
        }
        case Strategy::low_confidence_static:
            break;
    }
    float score[PER_LANE];
    for (int k = 0; k < PER_LANE; ++k) score[k] = nan_last(given.log_odds[k]);
    rank(score, masked, place);
    return best(place, masked, count);
}

SIMSD_DEVICE bool has_step(const Rule& rule, int now) { return now >= 0 && now < rule.steps; }

// What step `now`, which the schedule has, reveals of the masked positions (warp).
SIMSD_DEVICE uint64_t reveal_set(const Rule& rule, int now, uint64_t masked, const Statistics& given) {
    if (now == rule.steps - 1) return masked;
    const int asked = rule.schedule[now * rule.schedule_stride], available = count_bits(masked);
    const int count = asked < 0 ? 0 : asked < available ? asked : available;
    return choose(rule, masked, count, given);
}

}  // namespace simsd::denoise
