// reveal: one denoising step of a slot's block [L], L <= 64.
#pragma once

#include "control/step.h"

namespace simsd::control {

struct RevealParams {
    View<int64_t, 2> tokens;                       // [B, L], updated
    View<int64_t, 1> revealed;                     // [B], updated
    View<int32_t, 2> step_map;                     // [B, L], updated
    View<const int64_t, 2> proposal;               // [B, L]
    View<const float, 2> prob, log_odds, entropy;  // [B, L]
    View<const int32_t, 1> step;                   // [B]
    Rules rules;
    int64_t* newly;  // out: [B]
    int64_t batch;
    int32_t length;
};

template <typename Team>
SIMSD_CONTROL void reveal_slot(const RevealParams& p, int64_t b) {
    const Rule rule = rule_of(p.rules, b, p.length);
    const int now = p.step[b];
    const uint64_t before = static_cast<uint64_t>(p.revealed[b]), masked = full_set(p.length) & ~before;
    uint64_t chosen = 0;
    if (has_step(rule, now)) {
        // Before the choice, which is long: memory answers meanwhile.
        typename Team::template Values<int64_t> proposal;
        Team::each(masked, [&](int i) { proposal[i] = *p.proposal.at(b, i); });
        chosen = reveal_set<Team>(rule, now, masked, {p.prob[b], p.log_odds[b], p.entropy[b]});
        Team::each(chosen, [&](int i) {
            *p.tokens.at(b, i) = proposal[i];
            *p.step_map.at(b, i) = now + 1;
        });
    }
    Team::sync();  // all have read the set
    if (!Team::leads()) return;
    p.newly[b] = static_cast<int64_t>(chosen);
    if (chosen != 0) p.revealed[b] = static_cast<int64_t>(before | chosen);
}

}  // namespace simsd::control
