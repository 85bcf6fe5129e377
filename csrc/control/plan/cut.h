// The graphs of all slots, cut to what the batch may have. The Python definitions are `_fit` and `_ask_for_logits` in
// plan_block/reference.py.
#pragma once

#include "control/plan_block.h"

namespace simsd::control {

// What stays of the slots' graphs, [B] each.
struct Cut {
    int32_t* kept;  // states; 0: the slot is idle
    // Where in logits_index the rows of a slot's current state begin, and those of its others.
    int32_t *first_root, *first_other;
};

// The best-scored states of the batch stay, those that fit the budgets, up to the first that does not. Scores fall
// along a slot, so that a slot keeps the first of its own; equal ones rank by slot. Returns how many rows of logits
// that asks for.
template <typename Team>
SIMSD_CONTROL int64_t cut(const PlanParams& p, const Taken& taken, const Cut& out) {
    const auto ignore = [](int64_t, int64_t) {};
    const auto root_logits = [&](int64_t b) -> int64_t {
        if (taken.size[b] == 0) return 0;
        return count_bits(full_set(p.length) & ~static_cast<uint64_t>(p.out.state_revealed[b * p.max_states]));
    };
    const int64_t roots = Team::running_sum(p.batch, root_logits, ignore);
    // What the first `counts[b]` states of each slot take, current ones aside.
    const auto cost = [&](const int32_t* costs, const int32_t* counts, auto note) {
        const auto of_slot = [&](int64_t b) -> int64_t {
            return counts[b] == 0 ? 0 : costs[b * p.max_states + counts[b] - 1];
        };
        return Team::running_sum(p.batch, of_slot, note);
    };
    const auto fit = [&](const int32_t* counts) {
        return cost(taken.blocks, counts, ignore) <= p.row_budget[0] / p.length &&
               cost(taken.logits, counts, ignore) <= p.logits_rows - roots;
    };

    if (fit(taken.size)) {
        Team::range(p.batch, [&](int64_t b) { out.kept[b] = taken.size[b]; });
        Team::sync();
    } else {
        // The first `kept` of a slot stay, those from `limit` on go. Whether one between them fits, together with all
        // that rank no lower (the first `ranked` of each slot), decides for those, or for all that rank lower.
        int32_t *const ranked = out.first_root, *const limit = out.first_other;
        Team::range(p.batch, [&](int64_t b) {
            out.kept[b] = taken.size[b] > 0;
            limit[b] = taken.size[b];
        });
        Team::sync();
        for (;;) {
            const auto undecided = [&](int b) { return limit[b] - out.kept[b]; };
            const int slot = Team::greatest(static_cast<int>(p.batch), undecided);
            if (undecided(slot) == 0) break;
            const int32_t middle = out.kept[slot] + undecided(slot) / 2;
            const double score = taken.score[int64_t{slot} * p.max_states + middle];
            Team::sync();
            Team::range(p.batch, [&](int64_t b) {
                int32_t from = out.kept[b], to = limit[b];
                while (from < to) {
                    const int32_t n = from + (to - from) / 2;
                    const double other = taken.score[b * p.max_states + n];
                    const bool lower = other < score || (other == score && (b > slot || (b == slot && n > middle)));
                    if (lower) {
                        to = n;
                    } else {
                        from = n + 1;
                    }
                }
                ranked[b] = from;
            });
            Team::sync();
            const bool all_fit = fit(ranked);
            Team::range(p.batch, [&](int64_t b) {
                if (all_fit) {
                    out.kept[b] = ranked[b];
                } else {
                    limit[b] = b == slot ? middle : ranked[b];
                }
            });
            Team::sync();
        }
    }
    Team::running_sum(p.batch, root_logits, [&](int64_t b, int64_t before) { out.first_root[b] = before; });
    const int64_t others = cost(taken.logits, out.kept, [&](int64_t b, int64_t before) {
        out.first_other[b] = static_cast<int32_t>(roots + before);
    });
    Team::sync();
    return roots + others;
}

}  // namespace simsd::control
