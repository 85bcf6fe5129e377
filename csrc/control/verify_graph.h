// verify_graph: walks the target's own path through the drafted states of a slot's blocks, given what the target draws
// at the states that the walk visits.
#pragma once

#include "control/step.h"

namespace simsd::control {

constexpr int32_t DENOISED = 1, DRAFTED = 2;  // origin
constexpr int PROGRESS = 7;

struct VerifyParams {
    // The states, as plan_block lays them out.
    View<const int32_t, 3> rows;            // [B, C, L], of the logits
    View<const int64_t, 3> states;          // [B, C, L]
    View<const int64_t, 2> state_revealed;  // [B, C]
    View<const int32_t, 2> block;           // [B, C]
    // What the draft proposed.
    View<const int64_t, 3> draft_tokens;                          // [B, K, L]
    View<const int32_t, 1> draft_blocks_in_rows, proposal_depth;  // [B]
    // The current block so far.
    View<const int32_t, 1> start, step;       // [B]
    View<const int32_t, 2> step_map, origin;  // [B, L]
    View<const float, 2> prob, draw_logprob;  // [B, L]
    Rules rules;
    int64_t batch, logit_rows;            // B, N
    int32_t state_count, blocks, length;  // C, K, L

    // Outputs, contiguous.
    int32_t* progress;                   // [B, 7]
    int64_t* revealed_out;               // [B]
    int64_t* tokens_out;                 // [B, K + 2, L]
    int32_t *step_map_out, *origin_out;  // [B, K + 2, L]
    float *prob_out, *draw_logprob_out;  // [B, K + 2, L]
};

SIMSD_CONTROL uint64_t revealed_in(const VerifyParams& p, int64_t b, int state) {
    return static_cast<uint64_t>(*p.state_revealed.at(b, state)) & full_set(p.length);
}

// Where position `i` of a state is in the text.
SIMSD_CONTROL int32_t position_in(const VerifyParams& p, int64_t b, int state, int i) {
    return static_cast<int32_t>(p.start[b] + static_cast<int64_t>(*p.block.at(b, state)) * p.length + i);
}

template <typename Team>
class Walk {
  public:
    SIMSD_CONTROL Walk(const VerifyParams& p, int64_t b)
        : p_(p), b_(b), full_(full_set(p.length)), rule_(rule_of(p.rules, b, p.length)) {
        clear();
        if (p.state_count == 0 || p.length == 0) return;
        known_ = revealed_in(p, b, 0);
        step_ = p.step[b];
        at_ = *p.block.at(b, 0) >= 0 ? 0 : -1;
        Team::each(full_, [&](int i) {
            text_.tokens[i] = *p_.states.at(b_, 0, i);
            text_.steps[i] = *p_.step_map.at(b_, i);
            text_.prob[i] = *p_.prob.at(b_, i);
            text_.logprob[i] = *p_.draw_logprob.at(b_, i);
            text_.origin[i] = *p_.origin.at(b_, i);
        });
    }

    // A step that reveals nothing stays at its state: the number of states bounds those.
    SIMSD_CONTROL bool goes_on() const { return at_ >= 0 && taken_ < p_.state_count && has_step(rule_, step_); }

    SIMSD_CONTROL int64_t slot() const { return b_; }
    // Where the walk stands, and what is masked there.
    SIMSD_CONTROL int state() const { return at_; }
    SIMSD_CONTROL uint64_t masked() const { return full_ & ~known_; }

    // Takes the step that the target takes by what it draws here, and goes on to the state that this leads to, if any.
    SIMSD_CONTROL void take(const Drawn& drawn) {
        const uint64_t masked = this->masked();
        // Before the choice, which is long: memory answers meanwhile.
        Values<int64_t> token, proposal;
        Values<float> prob, logprob;
        Team::each(masked, [&](int i) {
            const int32_t row = *p_.rows.at(b_, at_, i);
            expect(row >= 0 && row < p_.logit_rows,
                   "rows must be in [0, N) at masked positions of states that the walk visits");
            token[i] = drawn.token[i];
            prob[i] = drawn.statistics.prob[i];
            logprob[i] = drawn.logprob[i];
        });
        // Blocks past the last drafted one have no proposal: nothing in them is judged or held.
        const bool drafted = finished_ < p_.blocks;
        Team::each(full_, [&](int i) { proposal[i] = drafted ? *p_.draft_tokens.at(b_, finished_, i) : 0; });

        const uint64_t chosen = reveal_set<Team>(rule_, step_, masked, drawn.statistics);
        Team::each(chosen, [&](int i) {
            text_.tokens[i] = token[i];
            text_.prob[i] = prob[i];
            text_.logprob[i] = logprob[i];
            text_.steps[i] = step_ + 1;
            text_.origin[i] = at_ == 0 ? DENOISED : DRAFTED;
        });
        known_ |= chosen;
        const uint64_t agreed = Team::where(known_, [&](int i) { return text_.tokens[i] == proposal[i]; });
        if (drafted && finished_ < p_.proposal_depth[b_]) {
            judged_ += count_bits(chosen);
            accepted_ += count_bits(chosen & agreed);
        }
        last_ = at_;
        ++taken_;
        ++step_;
        if (known_ == full_) {
            // Rows of the next block saw this one as drafted: only then are they this walk's.
            const bool held = drafted && finished_ < p_.draft_blocks_in_rows[b_] && agreed == full_;
            store(finished_);
            ++finished_;
            held_ += held;
            known_ = 0;
            step_ = 0;
            clear();
            if (!held) {
                at_ = -1;
                return;
            }
        }
        at_ = next();
    }

    // Writes the outputs, but for the blocks finished, which are written.
    SIMSD_CONTROL void finish() {
        Team::each(masked(), [&](int i) { text_.tokens[i] = 0; });
        store(finished_);
        clear();
        for (int row = finished_ + 1; row < p_.blocks + 2; ++row) store(row);
        if (!Team::leads()) return;
        p_.revealed_out[b_] = static_cast<int64_t>(known_);
        int32_t* progress = p_.progress + b_ * PROGRESS;
        progress[0] = finished_;
        progress[1] = held_;
        progress[2] = taken_;
        progress[3] = last_;
        progress[4] = step_;
        progress[5] = judged_;
        progress[6] = accepted_;
    }

  private:
    template <typename T>
    using Values = typename Team::template Values<T>;

    // One block.
    struct Text {
        Values<int64_t> tokens;
        Values<int32_t> steps, origin;
        Values<float> prob, logprob;
    };

    SIMSD_CONTROL void clear() {
        Team::each(full_, [&](int i) {
            text_.tokens[i] = text_.steps[i] = text_.origin[i] = 0;
            text_.prob[i] = 1.0f;
            text_.logprob[i] = 0.0f;
        });
    }

    SIMSD_CONTROL void store(int row) const {
        const int64_t first = (b_ * (p_.blocks + 2) + row) * p_.length;
        Team::each(full_, [&](int i) {
            p_.tokens_out[first + i] = text_.tokens[i];
            p_.step_map_out[first + i] = text_.steps[i];
            p_.prob_out[first + i] = text_.prob[i];
            p_.draw_logprob_out[first + i] = text_.logprob[i];
            p_.origin_out[first + i] = text_.origin[i];
        });
    }

    // The first state with this block's number, set and revealed tokens, -1 for none.
    SIMSD_CONTROL int next() const {
        for (int found = -1;;) {
            found = Team::first(found + 1, p_.state_count, [&](int c) {
                return *p_.block.at(b_, c) == finished_ && revealed_in(p_, b_, c) == known_;
            });
            if (found < 0) return -1;
            const auto differs = [&](int i) { return *p_.states.at(b_, found, i) != text_.tokens[i]; };
            if (Team::where(known_, differs) == 0) return found;
        }
    }

    const VerifyParams& p_;
    int64_t b_;
    uint64_t full_, known_ = 0;
    Rule rule_;
    Text text_;
    int at_ = -1, last_ = -1, step_ = 0;
    int finished_ = 0, held_ = 0, taken_ = 0, judged_ = 0, accepted_ = 0;
};

}  // namespace simsd::control
