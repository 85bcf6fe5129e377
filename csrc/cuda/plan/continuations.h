// What the target may reveal next in a drafted state, and how likely, worked out by a whole block of threads. The
// Python definition is `continuations` in plan_block/reference.py; sums run in its order, so that both choose the same
// states.
#pragma once

#include "cuda/denoise/step.h"
#include "cuda/device.h"
#include "cuda/plan_block.h"

namespace simsd::plan {

using denoise::full_set;
using denoise::has;

constexpr int MAX_CHILDREN = 64;  // continuations of one state that are looked at, the likeliest

SIMSD_DEVICE uint64_t bit(int position) { return uint64_t{1} << position; }

// At most 1: nothing is likelier than what the draft would do. NaN (infinity times a power of 0) is no objection.
SIMSD_DEVICE double weight_of(double exponent) { return exponent < 0.0 ? exponential(exponent) : 1.0; }

// Finite, so that differences are numbers; NaN ranks last.
SIMSD_DEVICE double number(double value) {
    if (!(value > -1e30)) return -1e30;
    return value < 1e30 ? value : 1e30;
}

// What the draft says of one position.
struct Proposal {
    int64_t token;
    double prob, log_odds, entropy;
};

// How many continuations a state of a block of `length` has at most: the base, the swaps, and every position once in
// addition or once away.
SIMSD_ANYWHERE int most_continuations(int length) { return 1 + (length / 2) * ((length + 1) / 2) + 2 * length; }

// A 64-bit set of positions, position i being the business of thread i; the same for all threads (block). `words` has
// two entries that nobody else uses until the next barrier but one.
SIMSD_DEVICE uint64_t positions_where(bool value, uint32_t* words) {
    if (warp_index() < MAX_BLOCK_LENGTH / WARP) {
        const uint32_t bits = ballot(value);
        if (lane_index() == 0) words[warp_index()] = bits;
    }
    block_barrier();
    return static_cast<uint64_t>(words[1]) << 32 | words[0];
}

class Continuations {
  public:
    SIMSD_DEVICE Continuations(const Params& p, Shared& shared)
        : p_(p),
          prob_(shared.take<double>(MAX_BLOCK_LENGTH)),
          score_(shared.take<double>(MAX_BLOCK_LENGTH)),
          order_(shared.take<int32_t>(MAX_BLOCK_LENGTH)),
          weight_(shared.take<double>(most_continuations(p.length))),
          likeliest_(shared.take<int32_t>(MAX_CHILDREN)),
          total_(shared.take<double>(2)),
          size_found_(shared.take<int32_t>(1)),
          words_(shared.take<uint32_t>(2)) {}

    static int shared_bytes(int length) {
        return 2 * MAX_BLOCK_LENGTH * 8 + MAX_BLOCK_LENGTH * 4 + (most_continuations(length) * 8 + 15) / 16 * 16 +
               MAX_CHILDREN * 4 + 3 * 16;
    }

    // Finds the continuations of a state; `mine` is of position thread_index(). The threads meet in a barrier at the
    // end, and may call again once they have met in another.
    SIMSD_DEVICE void find(uint64_t revealed, int step, const Proposal& mine, double power) {
        swaps_ = more_ = less_ = size_ = kept_ = 0;
        power_ = power;
        const uint64_t masked = full_set(p_.length) & ~revealed;
        masked_ = count_bits(masked);
        if (step < 0 || step >= p_.rule.steps || masked_ == 0) return;
        const int scheduled = p_.rule.schedule[step * p_.rule.schedule_stride], i = thread_index();
        const int count = scheduled < 0 ? 0 : scheduled < masked_ ? scheduled : masked_;
        const bool mine_masked = i < p_.length && has(masked, i);
        if (i < p_.length) prob_[i] = mine.prob;
        kept_ = 1;
        const bool last = step == p_.rule.steps - 1;
        if (last || p_.rule.strategy == Strategy::sequential) {
            size_ = last ? masked_ : count;
            uint64_t others = masked;
            for (int n = 0; n < size_; ++n) others &= others - 1;
            base_ = masked & ~others;
            if (i == 0) {
                weight_[0] = total_[0] = 1.0;
                likeliest_[0] = 0;
            }
            block_barrier();
            return;
        }
        vary(masked, mine_masked, count, mine);
        weigh();
    }

    // How many there are, the likeliest first. The set may be empty, which leads nowhere.
    SIMSD_DEVICE int size() const { return kept_; }
    SIMSD_DEVICE uint64_t chosen(int n) const { return set(likeliest_[n]); }
    SIMSD_DEVICE double likelihood(int n) const { return weight_[likeliest_[n]] / total_[0]; }
    SIMSD_DEVICE double prob(int position) const { return prob_[position]; }

  private:
    SIMSD_DEVICE int count() const { return 1 + swaps_ + more_ + less_; }

    // The draft's own choice, and how it may be changed.
    SIMSD_DEVICE void vary(uint64_t masked, bool mine_masked, int count, const Proposal& mine) {
        const int i = thread_index();
        const bool by_entropy = p_.rule.strategy == Strategy::entropy_bounded;
        if (i < p_.length) score_[i] = number(by_entropy ? -mine.entropy : mine.log_odds);
        uint64_t sure = positions_where(mine_masked && mine.prob > p_.rule.threshold, words_);
        size_ = count;
        bool swaps = true;
        if (p_.rule.strategy == Strategy::low_confidence_dynamic && count_bits(sure) >= count) {
            size_ = count_bits(sure);
            swaps = size_ == count;
            more_ = masked_ - size_;
            if (size_ > count && size_ > 1) less_ = size_;
        } else {
            sure = 0;
        }
        if (mine_masked) {  // how many come before it: ties stay with the lowest position
            int rank = 0;
            for (uint64_t rest = masked; rest != 0; rest &= rest - 1) {
                const int j = lowest_bit(rest);
                const bool before = score_[j] > score_[i] || (score_[j] == score_[i] && j < i);
                rank += has(sure, j) == has(sure, i) ? before : has(sure, j);
            }
            order_[rank] = i;
        }
        block_barrier();
        if (by_entropy) {
            bound();
            swaps = true;
        }
        base_ = 0;
        for (int n = 0; n < size_; ++n) base_ |= bit(order_[n]);
        if (swaps) swaps_ = size_ * (masked_ - size_);
    }

    // Takes positions while the sum of their entropies, in order, stays below the threshold.
    SIMSD_DEVICE void bound() {
        if (thread_index() == 0) {
            double total = 0.0;
            int size = 0;
            for (; size < masked_; ++size) {
                const double next = total - score_[order_[size]];
                if (!(next < p_.rule.threshold)) break;
                total = next;
            }
            total_[1] = total;
            *size_found_ = size;
        }
        block_barrier();
        size_ = *size_found_;
        more_ = size_ > 0 && size_ < masked_;
        less_ = size_ > 1;
        if (size_ == 0) size_ = 1;  // that position would come in addition
    }

    // Which two positions continuation `entry`, a swap, exchanges: indices into `order_`.
    SIMSD_DEVICE int out(int entry) const { return (entry - 1) / (masked_ - size_); }
    SIMSD_DEVICE int in(int entry) const { return size_ + (entry - 1) % (masked_ - size_); }

    SIMSD_DEVICE uint64_t set(int entry) const {
        if (entry == 0) return base_;
        if (entry <= swaps_) return (base_ & ~bit(order_[out(entry)])) | bit(order_[in(entry)]);
        entry -= 1 + swaps_;
        if (entry < more_) return base_ | bit(order_[size_ + entry]);
        return base_ & ~bit(order_[size_ - less_ + entry - more_]);
    }

    SIMSD_DEVICE double weight(int entry) const {
        if (entry == 0) return 1.0;
        if (entry <= swaps_) return weight_of(power_ * (score_[order_[in(entry)]] - score_[order_[out(entry)]]));
        entry -= 1 + swaps_;
        const bool by_entropy = p_.rule.strategy == Strategy::entropy_bounded;
        if (entry < more_) {
            const double score = score_[order_[size_ + entry]];
            return weight_of(power_ * (by_entropy ? p_.rule.threshold - (total_[1] - score) : score - p_.bar));
        }
        const double score = score_[order_[size_ - less_ + entry - more_]];
        return weight_of(power_ * (by_entropy ? total_[1] - p_.rule.threshold : p_.bar - score));
    }

    // Weights, their sum, and the likeliest of them in order.
    SIMSD_DEVICE void weigh() {
        const int entries = count();
        for (int e = thread_index(); e < entries; e += thread_count()) weight_[e] = weight(e);
        block_barrier();
        if (thread_index() == thread_count() - 1) {
            double total = 0.0;
#pragma unroll 8
            for (int e = 0; e < entries; ++e) total += weight_[e];
            total_[0] = total;
        }
        for (int e = thread_index(); e < entries; e += thread_count()) {
            const double own = weight_[e];
            int rank = 0;
#pragma unroll 4
            for (int other = 0; other < entries; ++other) {
                rank += weight_[other] > own || (weight_[other] == own && other < e);
            }
            if (rank < MAX_CHILDREN) likeliest_[rank] = e;
        }
        kept_ = entries < MAX_CHILDREN ? entries : MAX_CHILDREN;
        block_barrier();
    }

    const Params& p_;
    double *prob_, *score_;  // [L]
    int32_t* order_;         // [masked], the first to be revealed first
    double* weight_;         // in the order in which continuations are thought of: base, swaps, more, less
    int32_t* likeliest_;     // [MAX_CHILDREN], indices of `weight_`
    double* total_;          // of the weights; of the entropies in the base
    int32_t* size_found_;
    uint32_t* words_;
    uint64_t base_ = 0;
    double power_ = 0.0;
    // masked_: positions; size_: of the base; the others: continuations of each kind. The same in all threads.
    int masked_ = 0, size_ = 0, swaps_ = 0, more_ = 0, less_ = 0, kept_ = 0;
};

}  // namespace simsd::plan
