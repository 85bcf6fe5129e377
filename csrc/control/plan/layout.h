// A slot's states, and what comes along with them, as rows of one forward: the unrolled layout. The Python definitions
// are `_lay_out` and `_ask_for_logits` in plan_block/reference.py. Every place of the outputs is written once, so that
// any number of threads may share the work.
#pragma once

#include "control/plan/cut.h"

namespace simsd::control {

template <typename Team>
class Layout {
  public:
    // `asked`: rows of logits that the batch needs.
    SIMSD_CONTROL Layout(const PlanParams& p, const Taken& taken, const Cut& cut, int64_t asked, int64_t b)
        : p_(p), taken_(taken), b_(b), first_state_(b * p.max_states), asked_(asked), kept_(cut.kept[b]) {
        // Values are trusted on a GPU, but nothing is written elsewhere for that.
        start_ = kept_ == 0 ? 0 : p.start[b] < p.scratch ? p.start[b] : p.scratch;
        number_ = start_ / p.length;
        for (int n = 0; n < kept_; ++n) {
            const int32_t block = p.out.block[first_state_ + n];
            if (block > finished_) finished_ = block;
        }
        first_root_ = cut.first_root[b];
        first_other_ = cut.first_other[b];
    }

    SIMSD_CONTROL void write() const {
        write_clean_rows();
        write_states();
        write_lifetimes();
        // What is left of the logits' index.
        const int64_t from = left(b_), count = left(b_ + 1) - from;
        int64_t* const index = p_.out.logits_index + from;
        Team::range(count, [=](int64_t n) { index[n] = 0; });
    }

  private:
    struct Row {
        int64_t token;
        int32_t position, slot, clock;
    };

    SIMSD_CONTROL void put(int row, const Row& value) const {
        const int64_t at = b_ * p_.groups() * p_.length + row;
        p_.out.tokens[at] = value.token;
        p_.out.positions[at] = value.position;
        p_.out.slots[at] = value.slot;
        p_.out.clock[at] = value.clock;
    }

    // When the rows of a state see, and are seen; and those of a finished block, which are seen for good.
    SIMSD_CONTROL int32_t moment(int n) const { return (number_ + p_.out.block[first_state_ + n]) * p_.stride + 1 + n; }
    SIMSD_CONTROL int32_t finished_moment(int block) const { return (number_ + block) * p_.stride + 1 + p_.max_states; }

    SIMSD_CONTROL int64_t left(int64_t slot) const { return asked_ + (p_.logits_rows - asked_) * slot / p_.batch; }

    // Pending tokens, and finished blocks as drafted.
    SIMSD_CONTROL void write_clean_rows() const {
        const Row dead{0, 0, -1, -1};
        const int32_t length = p_.length, kv_len = kept_ == 0 ? 0 : p_.kv_len[b_];
        Team::range(int64_t{p_.pending} * length, [&](int row) {
            const int64_t place = int64_t{kv_len} + row;
            if (kv_len < 0 || place >= start_ || place >= p_.text_length) return put(row, dead);
            const int32_t position = static_cast<int32_t>(place);
            put(row, {*p_.text.at(b_, place), position, position, position / length * p_.stride});
        });
        Team::grid(p_.blocks, length, [&](int block, int i) {
            const int32_t row = (p_.pending + block) * length + i, position = start_ + block * length + i;
            if (block >= finished_) return put(row, dead);
            put(row, {*p_.drafted.token.at(b_, block, i), position, position, finished_moment(block)});
        });
    }

    SIMSD_CONTROL void write_states() const {
        const int32_t length = p_.length, first_row = (p_.pending + p_.blocks) * length, room = copy_stride(length);
        Team::grid(p_.max_states, length, [&](int n, int i) {
            const int row = first_row + n * length + i;
            const int64_t at = (first_state_ + n) * length + i;
            if (n >= kept_) {
                p_.out.states[at] = 0;
                p_.out.state_rows[at] = -1;
                return put(row, {0, 0, -1, -1});
            }
            const uint64_t revealed = static_cast<uint64_t>(p_.out.state_revealed[first_state_ + n]);
            const bool masked = !has(revealed, i);
            put(row, {masked ? p_.mask_id : p_.out.states[at], start_ + p_.out.block[first_state_ + n] * length + i,
                      p_.scratch + n * room + i, moment(n)});
            int32_t place = -1;
            if (masked) {
                place = n == 0 ? first_root_ : first_other_ + taken_.logits[first_state_ + n - 1];
                place += count_bits(full_set(i) & ~revealed);
                p_.out.logits_index[place] = b_ * p_.groups() * length + row;
            }
            p_.out.state_rows[at] = place;
        });
        Team::range(p_.max_states - kept_, [&](int n) {
            p_.out.state_revealed[first_state_ + kept_ + n] = 0;
            p_.out.block[first_state_ + kept_ + n] = -1;
        });
        Team::range(1, [&](int) { p_.out.draft_blocks_in_rows[b_] = finished_; });
    }

    // KV slots by what stands there: committed tokens, finished blocks, nothing; states, nothing.
    SIMSD_CONTROL void write_lifetimes() const {
        const int32_t length = p_.length, stride = p_.stride;
        int32_t *birth = p_.out.birth + b_ * p_.kv_slots, *death = p_.out.death + b_ * p_.kv_slots;
        const int32_t whole = number_ * length, most = (p_.scratch - whole) / length;
        const int32_t finished = finished_ < most ? finished_ : most;
        Team::grid(number_, length, [&](int block, int i) {
            birth[block * length + i] = block * stride;
            death[block * length + i] = INF;
        });
        Team::grid(finished, length, [&](int block, int i) {
            birth[whole + block * length + i] = finished_moment(block);
            death[whole + block * length + i] = INF;
        });
        const auto nothing = [=](int32_t from, int32_t to) {
            Team::range(to - from, [=](int64_t n) { birth[from + n] = INF; });
            Team::range(to - from, [=](int64_t n) { death[from + n] = INF; });
        };
        nothing(whole + finished * length, p_.scratch);
        const int32_t room = copy_stride(length), scratch = p_.scratch;
        Team::grid(kept_, room, [&](int n, int i) {
            birth[scratch + n * room + i] = death[scratch + n * room + i] = i < length ? moment(n) : INF;
        });
        nothing(scratch + kept_ * room, p_.kv_slots);
    }

    const PlanParams& p_;
    const Taken& taken_;
    const int64_t b_, first_state_, asked_;
    const int32_t kept_;
    int32_t start_, number_, finished_ = 0, first_root_, first_other_;
};

}  // namespace simsd::control
