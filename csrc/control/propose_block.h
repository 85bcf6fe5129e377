// propose_block: denoises a slot's block to its end on fixed logits, given what is drawn there in each round. Without
// noise, or where noise does not depend on what is revealed, the first round's draws decide all.
#pragma once

#include "control/step.h"
#include "control/stop.h"

namespace simsd::control {

struct ProposeParams {
    View<const int32_t, 2> rows;                 // [B, L], of the logits
    View<int64_t, 2> text;                       // [B, T], updated
    View<const int32_t, 1> start, step;          // [B]
    View<const int64_t, 1> revealed;             // [B]
    View<int64_t, 3> draft_tokens;               // [B, K, L], updated
    View<float, 3> prob, log_odds, entropy;      // [B, K, L], updated
    View<int32_t, 1> proposal_depth, draft_end;  // [B], updated
    View<const int32_t, 1> prompt_len;           // [B]
    View<const int64_t, 2> stop_ids;             // [B, E]
    View<const float, 1> temperature;            // [B]
    Rules rules;
    int64_t batch, capacity, logit_rows;  // B, T, N
    int32_t block, length, stop_count;    // of K, L, E
    bool noise;

    int64_t* known;  // [B], workspace between rounds: what is revealed; all of it where the block is finished

    // Rounds that there may be: a step reveals a position, or its schedule asks for none.
    SIMSD_HOST_DEVICE int rounds() const { return noise ? length : 1; }
};

SIMSD_CONTROL int64_t position_in(const ProposeParams& p, int64_t b, int i) {
    return p.start[b] + static_cast<int64_t>(p.block) * p.length + i;
}

SIMSD_CONTROL bool block_fits(const ProposeParams& p, int64_t b) { return position_in(p, b, p.length) <= p.capacity; }

// Whether the slot has logits, and is not idle.
template <typename Team>
SIMSD_CONTROL bool is_asked(const ProposeParams& p, int64_t b) {
    return p.start[b] >= 0 && Team::where(full_set(p.length), [&](int i) { return *p.rows.at(b, i) >= 0; }) != 0;
}

template <typename Team>
SIMSD_CONTROL bool takes_part(const ProposeParams& p, int64_t b) {
    return is_asked<Team>(p, b) && block_fits(p, b);
}

// What is to draw in a round.
template <typename Team>
SIMSD_CONTROL uint64_t masked_in(const ProposeParams& p, int64_t b, int round) {
    if (round > 0) return full_set(p.length) & ~static_cast<uint64_t>(p.known[b]);
    return takes_part<Team>(p, b) ? full_set(p.length) & ~static_cast<uint64_t>(p.revealed[b]) : 0;
}

// What the noise of a round is keyed by beside seed and position, where `masked` is still masked.
SIMSD_CONTROL int64_t key_in(const ProposeParams& p, int64_t b, uint64_t masked) {
    return noise_key(static_cast<Strategy>(p.rules.strategy[b]), full_set(p.length) & ~masked);
}

// Enters the finished block into the proposal.
template <typename Team>
SIMSD_CONTROL void finish_block(const ProposeParams& p, int64_t b) {
    const uint64_t full = full_set(p.length), masked = full & ~static_cast<uint64_t>(p.revealed[b]);
    const int32_t prompt = p.prompt_len[b];
    const uint64_t stops = Team::where(full, [&](int i) {
        const int64_t token = *p.draft_tokens.at(b, p.block, i), place = position_in(p, b, i);
        if (has(masked, i)) *p.text.at(b, place) = token;
        return place >= prompt && is_stop(p.stop_ids[b], p.stop_count, token);
    });
    if (!Team::leads()) return;
    p.proposal_depth[b] = p.block + 1;
    if (stops != 0) p.draft_end[b] = p.block + 1;
}

// Takes a round's draws for the slot; `masked` is what was to draw. Returns what is to draw in the next round.
template <typename Team>
SIMSD_CONTROL uint64_t settle(const ProposeParams& p, int64_t b, int round, uint64_t masked, const Drawn& drawn) {
    if (round == 0 ? !takes_part<Team>(p, b) : masked == 0) return 0;
    const Rule rule = rule_of(p.rules, b, p.length);
    if (round == 0) {
        Team::each(full_set(p.length), [&](int i) {
            int64_t token;
            if (has(masked, i)) {
                token = drawn.token[i];
                *p.prob.at(b, p.block, i) = drawn.statistics.prob[i];
                *p.log_odds.at(b, p.block, i) = drawn.statistics.log_odds[i];
                *p.entropy.at(b, p.block, i) = drawn.statistics.entropy[i];
            } else {
                token = *p.text.at(b, position_in(p, b, i));
            }
            *p.draft_tokens.at(b, p.block, i) = token;
        });
    }
    // Later rounds draw the same where noise is not keyed by what is revealed.
    uint64_t left = 0;
    if (p.noise && p.temperature[b] > 0.0f && rule.strategy != Strategy::sequential) {
        const int64_t now = static_cast<int64_t>(p.step[b]) + round;
        left = masked;
        if (now >= 0 && now < rule.steps) {
            const uint64_t chosen = reveal_set<Team>(rule, static_cast<int>(now), masked, drawn.statistics);
            Team::each(chosen, [&](int i) { *p.draft_tokens.at(b, p.block, i) = drawn.token[i]; });
            left &= ~chosen;
        }
        if (now + 1 >= rule.steps || round + 1 == p.rounds()) left = 0;  // no step is left: the rest is as it is
    }
    if (left == 0) finish_block<Team>(p, b);
    return left;
}

}  // namespace simsd::control
