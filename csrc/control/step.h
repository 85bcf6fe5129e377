// Which masked positions of a block one denoising step reveals. Shared by all ops that take steps, so that a walk takes
// the very steps that decoding without a draft takes. The Python definition is reveal/reference.py.
#pragma once

#include "control/team.h"
#include "control/view.h"

namespace simsd::control {

// How the slots' blocks are denoised.
struct Rules {
    View<const int32_t, 1> strategy;    // [B], of `Strategy`
    View<const float, 1> threshold;     // [B], a probability or a sum of entropies in nats
    View<const int32_t, 2> schedule;    // [B, L], positions to reveal at each step
    View<const int32_t, 1> steps;       // [B], in 1..L
    View<const int64_t, 1> sub_blocks;  // [B], sets of positions at which a sub-block begins; may be without data
};

// One slot's.
struct Rule {
    Strategy strategy;
    float threshold;
    View<const int32_t, 1> schedule;
    int32_t steps;
    uint64_t sub_blocks;
};

SIMSD_CONTROL Rule rule_of(const Rules& rules, int64_t b, int length) {
    const int32_t steps = rules.steps[b];
    return {static_cast<Strategy>(rules.strategy[b]), rules.threshold[b], rules.schedule[b],
            steps < length ? steps : length, rules.sub_blocks.data ? static_cast<uint64_t>(rules.sub_blocks[b]) : 0};
}

// Of masked positions those that a step may reveal, the last step of a block aside: those of the leftmost sub-block
// that has any.
SIMSD_CONTROL uint64_t open_positions(const Rule& rule, uint64_t masked) {
    const uint64_t lowest = masked & (0 - masked);
    const uint64_t later = rule.sub_blocks & ~(lowest | (lowest - 1));
    return masked & ((later & (0 - later)) - 1);
}

SIMSD_CONTROL bool has_step(const Rule& rule, int now) { return now >= 0 && now < rule.steps; }

// What noise is keyed by beside seed and position, in a block of which `revealed` is revealed.
SIMSD_CONTROL int64_t noise_key(Strategy strategy, uint64_t revealed) {
    return strategy == Strategy::sequential ? 0 : static_cast<int64_t>(revealed);
}

// What the model says of a block's positions, [L] each.
struct Statistics {
    View<const float, 1> prob, log_odds, entropy;
};

// What a model draws for a block, [L]; set at masked positions.
struct Drawn {
    View<const int64_t, 1> token;
    Statistics statistics;
    View<const float, 1> logprob;  // under what the token was drawn from; without data where nobody asks
};

SIMSD_CONTROL float nan_last(float score) { return score == score ? score : -__builtin_inff(); }

// What a step reveals of the positions that it may, the last step of a block aside. `count` is in [0, so many].
template <typename Team>
SIMSD_CONTROL uint64_t choose(const Rule& rule, uint64_t open, int count, const Statistics& given) {
    if (rule.strategy == Strategy::sequential) {
        return Team::where(open, [&](int i) { return count_bits(open & full_set(i)) < count; });
    }
    const bool by_entropy = rule.strategy == Strategy::entropy_bounded;
    typename Team::template Values<float> score;
    Team::each(open, [&](int i) { score[i] = nan_last(by_entropy ? -given.entropy[i] : given.log_odds[i]); });
    if (rule.strategy == Strategy::low_confidence_dynamic) {
        const uint64_t confident = Team::where(open, [&](int i) { return given.prob[i] > rule.threshold; });
        if (count_bits(confident) >= count) return confident;
    }
    const typename Team::Ranking ranking(score, open);
    if (by_entropy) {
        // As many as have a running sum below the threshold, at least one. One by one, in float64: a parallel sum would
        // round otherwise than the definition does.
        const int available = count_bits(open);
        double total = 0.0;
        for (count = 0; count < available; ++count) {
            total += static_cast<double>(-Team::value_of(score, ranking.position(count)));
            if (!(total < static_cast<double>(rule.threshold))) break;
        }
        if (count == 0) count = 1;
    }
    return ranking.first(count);
}

// What step `now` reveals of the masked positions; nothing where the schedule has no such step.
template <typename Team>
SIMSD_CONTROL uint64_t reveal_set(const Rule& rule, int now, uint64_t masked, const Statistics& given) {
    if (!has_step(rule, now)) return 0;
    if (now == rule.steps - 1) return masked;
    const uint64_t open = open_positions(rule, masked);
    const int asked = rule.schedule[now], available = count_bits(open);
    return choose<Team>(rule, open, asked < 0 ? 0 : asked < available ? asked : available, given);
}

}  // namespace simsd::control
