// advance_slots: applies a walk to a slot, and tells the host of it.
#pragma once

#include "control/stop.h"
#include "control/team.h"
#include "control/verify_graph.h"
#include "control/view.h"

namespace simsd::control {

constexpr int32_t NO_END = 1 << 30;  // draft_end of a draft that did not end the text
constexpr int REPORT_HEAD = 16;      // numbers before the blocks of a report
constexpr int REPORTED = 14;         // those that are not the caller's
constexpr int REPORT_COLUMNS = 5;    // numbers for each position of the blocks

// Blocks of a walk, [B, K + 2, L].
struct WalkedBlocks {
    View<const int64_t, 3> tokens;
    View<const int32_t, 3> step_map, origin;
    View<const float, 3> prob, draw_logprob;
};

struct AdvanceParams {
    // Updated.
    View<int64_t, 2> text;                                      // [B, T]
    View<int32_t, 1> start, step, target_kv_len, draft_kv_len;  // [B]
    View<int64_t, 1> revealed;                                  // [B]
    View<int32_t, 2> step_map, origin, last_rows;               // [B, L]
    View<float, 2> prob, draw_logprob;                          // [B, L]
    View<int64_t, 3> draft_tokens;                              // [B, K, L]
    View<float, 3> draft_prob, draft_log_odds, draft_entropy;   // [B, K, L]
    View<float, 2> order_sharpness;                             // [B, K]
    View<int32_t, 1> proposal_depth, draft_end;                 // [B]
    View<int32_t, 2> report;                                    // [B, REPORT_HEAD + 5 (K + 2) L]
    // Read.
    View<const int32_t, 1> end, prompt_len, request_epoch;  // [B]
    View<const int64_t, 2> stop_ids;                        // [B, E]
    View<const int32_t, 2> walk_progress;                   // [B, PROGRESS]
    View<const int64_t, 1> walk_revealed;                   // [B]
    WalkedBlocks walk;
    View<const int32_t, 3> state_rows;            // [B, C, L]
    View<const int32_t, 2> block;                 // [B, C]
    View<const int32_t, 1> draft_blocks_in_rows;  // [B]

    int64_t batch, capacity;                          // B, T
    int32_t blocks, length, state_count, stop_count;  // K, L, C, E
};

// The walk as `verify_graph` tells of it.
struct Progress {
    int32_t finished, held, taken, last, step, judged, accepted;
};

SIMSD_CONTROL Progress progress_of(const AdvanceParams& p, int64_t b) {
    const View<const int32_t, 1> row = p.walk_progress[b];
    return {row[0], row[1], row[2], row[3], row[4], row[5], row[6]};
}

SIMSD_CONTROL bool has_walked(const AdvanceParams& p, int64_t b) {
    return p.start[b] >= 0 && *p.walk_progress.at(b, 3) >= 0;
}

// Of the block that the walk ended in.
SIMSD_CONTROL uint64_t revealed_by_walk(const AdvanceParams& p, int64_t b) {
    return static_cast<uint64_t>(p.walk_revealed[b]) & full_set(p.length);
}

// Whether the walk stays within the slot, of which the caller takes care.
SIMSD_CONTROL bool walk_fits(const AdvanceParams& p, int64_t b) {
    const Progress walked = progress_of(p, b);
    if (walked.finished < 0 || walked.finished > p.blocks + 1 || walked.last >= p.state_count) return false;
    const int64_t blocks = walked.finished + (revealed_by_walk(p, b) != 0 ? 1 : 0);
    return p.start[b] + blocks * p.length <= p.capacity;
}

SIMSD_CONTROL int32_t bits_of(float value) { return __builtin_bit_cast(int32_t, value); }

template <typename Team>
class Advance {
  public:
    SIMSD_CONTROL Advance(const AdvanceParams& p, int64_t b)
        : p_(p), b_(b), full_(full_set(p.length)), start_(p.start[b]) {}

    SIMSD_CONTROL void run() {
        const View<int32_t, 1> report = p_.report[b_];
        const int64_t walk = static_cast<int64_t>(p_.blocks + 2) * p_.length;
        if (!has_walked(p_, b_)) {
            Team::range(REPORT_HEAD + REPORT_COLUMNS * walk, [&](int64_t n) {
                if (n < REPORTED || n >= REPORT_HEAD) report[n] = n == 0 ? p_.request_epoch[b_] : 0;
            });
            return;
        }
        expect(walk_fits(p_, b_), "the walk must stay within the text, its blocks and its states");
        const Progress walked = progress_of(p_, b_);
        const bool stopped = cut(walked);
        // Where finished blocks do not count, the current one is empty.
        const bool counts = finished_ == walked.finished;
        const int32_t step = counts ? walked.step : 0;
        const bool ended = stopped || start_ + finished_ * p_.length >= p_.end[b_];
        const bool failed = write_text();
        const int32_t depth = p_.proposal_depth[b_] < p_.blocks ? p_.proposal_depth[b_] : p_.blocks;
        const int32_t same = agreeing(depth);
        const bool stands = same == finished_ && depth > finished_ && differing(finished_, revealed_) == 0;
        const int with_rows = set_current(counts, step, walked.last);
        if (stands && finished_ > 0) move_proposal();
        for (int32_t k = 0; k < p_.blocks + 2; ++k) report_block(k, walk);

        const int32_t planned = states_planned();
        Team::sync();  // all have read what the lead writes
        if (!Team::leads()) return;
        const int32_t left = stands ? depth - finished_ : 0;
        const int32_t head[REPORTED] = {
            p_.request_epoch[b_],
            1,
            finished_,
            walked.taken,
            step,
            walked.judged,
            walked.accepted,
            planned + p_.draft_blocks_in_rows[b_],
            failed,
            ended,
            static_cast<int32_t>(revealed_),
            static_cast<int32_t>(revealed_ >> 32),
            with_rows,
            left,
        };
        for (int n = 0; n < REPORTED; ++n) report[n] = head[n];
        const int32_t held = walked.held < finished_ ? walked.held : finished_;
        p_.target_kv_len[b_] = start_ + held * p_.length;
        const int32_t agreed = start_ + same * p_.length;
        if (agreed < p_.draft_kv_len[b_]) p_.draft_kv_len[b_] = agreed;
        p_.proposal_depth[b_] = left;
        if (!stands) {
            p_.draft_end[b_] = NO_END;
        } else if (p_.draft_end[b_] < NO_END) {
            p_.draft_end[b_] -= finished_;
        }
        p_.revealed[b_] = static_cast<int64_t>(revealed_);
        p_.step[b_] = step;
        p_.start[b_] = failed || ended ? -1 : start_ + finished_ * p_.length;
    }

  private:
    // Leaves out the finished blocks behind the first with a stop id; whether there is one.
    SIMSD_CONTROL bool cut(const Progress& walked) {
        finished_ = walked.finished;
        revealed_ = static_cast<uint64_t>(p_.walk_revealed[b_]) & full_;
        const int32_t prompt = p_.prompt_len[b_];
        for (int32_t k = 0; k < walked.finished; ++k) {
            const uint64_t stops = Team::where(full_, [&](int i) {
                return start_ + k * p_.length + i >= prompt &&
                       is_stop(p_.stop_ids[b_], p_.stop_count, *p_.walk.tokens.at(b_, k, i));
            });
            if (stops == 0) continue;
            if (k + 1 < walked.finished) revealed_ = 0;
            finished_ = k + 1;
            return true;
        }
        return false;
    }

    // Whether a newly revealed token has no probability.
    SIMSD_CONTROL bool write_text() const {
        uint64_t failures = 0;
        for (int32_t k = 0; k <= finished_; ++k) {
            failures |= Team::where(k < finished_ ? full_ : revealed_, [&](int i) {
                *p_.text.at(b_, start_ + static_cast<int64_t>(k) * p_.length + i) = *p_.walk.tokens.at(b_, k, i);
                return *p_.walk.step_map.at(b_, k, i) > 0 && !(*p_.walk.prob.at(b_, k, i) > 0.0f);
            });
        }
        return failures != 0;
    }

    // The positions of `set` where block k is not as proposed.
    SIMSD_CONTROL uint64_t differing(int32_t k, uint64_t set) const {
        return Team::where(set, [&](int i) { return *p_.walk.tokens.at(b_, k, i) != *p_.draft_tokens.at(b_, k, i); });
    }

    // Finished blocks that are as proposed, from the first on.
    SIMSD_CONTROL int32_t agreeing(int32_t depth) const {
        int32_t same = 0;
        while (same < finished_ && same < depth && differing(same, full_) == 0) ++same;
        return same;
    }

    // The current block's state; how many of its positions have a row of the target's logits.
    SIMSD_CONTROL int set_current(bool counts, int32_t step, int32_t last) const {
        const bool inside = step > 0 && *p_.block.at(b_, last) == finished_;
        const uint64_t rows = Team::where(full_, [&](int i) {
            *p_.step_map.at(b_, i) = counts ? *p_.walk.step_map.at(b_, finished_, i) : 0;
            *p_.prob.at(b_, i) = counts ? *p_.walk.prob.at(b_, finished_, i) : 1.0f;
            *p_.draw_logprob.at(b_, i) = counts ? *p_.walk.draw_logprob.at(b_, finished_, i) : 0.0f;
            *p_.origin.at(b_, i) = counts ? *p_.walk.origin.at(b_, finished_, i) : 0;
            const int32_t row = inside && !has(revealed_, i) ? *p_.state_rows.at(b_, last, i) : -1;
            *p_.last_rows.at(b_, i) = row;
            return row >= 0;
        });
        return count_bits(rows);
    }

    // To the front; what is behind it stays as it is.
    SIMSD_CONTROL void move_proposal() const {
        Team::each(full_, [&](int i) {
            for (int32_t k = 0; k + finished_ < p_.blocks; ++k) {
                *p_.draft_tokens.at(b_, k, i) = *p_.draft_tokens.at(b_, k + finished_, i);
                *p_.draft_prob.at(b_, k, i) = *p_.draft_prob.at(b_, k + finished_, i);
                *p_.draft_log_odds.at(b_, k, i) = *p_.draft_log_odds.at(b_, k + finished_, i);
                *p_.draft_entropy.at(b_, k, i) = *p_.draft_entropy.at(b_, k + finished_, i);
            }
        });
        if (!Team::leads()) return;
        for (int32_t k = 0; k + finished_ < p_.blocks; ++k) {
            *p_.order_sharpness.at(b_, k) = *p_.order_sharpness.at(b_, k + finished_);
        }
    }

    SIMSD_CONTROL int32_t states_planned() const {
        int32_t planned = 0;
        for (int32_t first = 0; first < p_.state_count; first += MAX_BLOCK_LENGTH) {
            const uint64_t states = full_set(p_.state_count - first);
            planned += count_bits(Team::where(states, [&](int c) { return *p_.block.at(b_, first + c) >= 0; }));
        }
        return planned;
    }

    SIMSD_CONTROL void report_block(int32_t k, int64_t walk) const {
        const View<int32_t, 1> report = p_.report[b_];
        const int64_t first = REPORT_HEAD + static_cast<int64_t>(k) * p_.length;
        Team::each(full_, [&](int i) {
            report[first + i] = static_cast<int32_t>(*p_.walk.tokens.at(b_, k, i));
            report[first + walk + i] = *p_.walk.step_map.at(b_, k, i);
            report[first + 2 * walk + i] = bits_of(*p_.walk.prob.at(b_, k, i));
            report[first + 3 * walk + i] = bits_of(*p_.walk.draw_logprob.at(b_, k, i));
            report[first + 4 * walk + i] = *p_.walk.origin.at(b_, k, i);
        });
    }

    const AdvanceParams& p_;
    int64_t b_;
    uint64_t full_;
    int32_t start_;
    int32_t finished_ = 0;
    uint64_t revealed_ = 0;  // of the block that is current from now on
};

}  // namespace simsd::control
