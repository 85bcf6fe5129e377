// What the target may reveal next in a drafted state, and how likely. The Python definition is `continuations` in
// plan_block/reference.py; the arithmetic is in its order, so that both choose the same states.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/reveal.h"

namespace simsd::plan {

constexpr int64_t MAX_CHILDREN = 64;  // continuations of one state that are looked at, the likeliest

// The draft's proposal for a block in one of its states, by position.
struct Proposal {
    int64_t token[MAX_BLOCK_LENGTH];
    double prob[MAX_BLOCK_LENGTH], log_odds[MAX_BLOCK_LENGTH], entropy[MAX_BLOCK_LENGTH];
    double power;  // how far the statistics tell the order
};

struct Rules {
    Schedule schedule;
    Strategy strategy;
    double threshold;
};

struct Continuation {
    uint64_t chosen;
    double weight;
    int32_t order;  // in which it was thought of; breaks ties
};

// At most 1: nothing is likelier than what the draft would do. NaN (infinity times a power of 0) is no objection.
inline double weight_of(double exponent) { return exponent < 0.0 ? std::exp(exponent) : 1.0; }

// Finite, so that differences are numbers; NaN ranks last.
inline double number(double value) { return std::isnan(value) ? -1e30 : std::min(std::max(value, -1e30), 1e30); }

inline double logit(double p) {
    if (p <= 0.0 || p >= 1.0) return p <= 0.0 ? -1e30 : 1e30;
    return std::log(p / (1.0 - p));
}

// Sets of positions with probabilities, the likeliest first: the draft's own choice, and changes of it by one position.
class Continuations {
  public:
    Continuations(uint64_t revealed, int64_t length, int64_t step, const Proposal& proposal, const Rules& rules)
        : masked_(revealed, length) {
        const Schedule& schedule = rules.schedule;
        if (step < 0 || step >= schedule.steps || masked_.count == 0) return;
        const int64_t count = std::clamp<int64_t>(*schedule.counts.at(step), 0, masked_.count);
        const bool last = step == schedule.steps - 1;
        if (last || rules.strategy == Strategy::sequential) {
            add(masked_.first(last ? masked_.count : count), 1.0);
        } else {
            vary(count, proposal, rules);
        }
        double total = 0.0;
        for (int64_t n = 0; n < count_; ++n) total += entries_[n].weight;
        const int64_t kept = std::min(count_, MAX_CHILDREN);
        std::partial_sort(entries_, entries_ + kept, entries_ + count_, [](const auto& a, const auto& b) {
            return a.weight > b.weight || (a.weight == b.weight && a.order < b.order);
        });
        count_ = kept;
        for (int64_t n = 0; n < count_; ++n) entries_[n].weight /= total;
    }

    // May hold the empty set, which leads nowhere.
    const Continuation* begin() const { return entries_; }
    const Continuation* end() const { return entries_ + count_; }

  private:
    void add(uint64_t chosen, double weight) {
        entries_[count_] = {chosen, weight, static_cast<int32_t>(count_)};
        ++count_;
    }

    // Stable, by falling key; blocks are short, and this allocates nothing.
    template <typename Key>
    void sort(const Key& key) {
        int64_t* order = masked_.position;
        for (int64_t n = 1; n < masked_.count; ++n) {
            const int64_t moved = order[n];
            int64_t at = n;
            for (; at > 0 && key(moved) > key(order[at - 1]); --at) order[at] = order[at - 1];
            order[at] = moved;
        }
    }

    void vary(int64_t count, const Proposal& proposal, const Rules& rules) {
        const double threshold = rules.threshold, power = proposal.power;
        const bool by_entropy = rules.strategy == Strategy::entropy_bounded;
        double score[MAX_BLOCK_LENGTH];
        for (int64_t n = 0; n < masked_.count; ++n) {
            const int64_t i = masked_.position[n];
            score[i] = number(by_entropy ? -proposal.entropy[i] : proposal.log_odds[i]);
        }
        sort([&](int64_t i) { return score[i]; });
        const int64_t* order = masked_.position;

        // Positions that may come in addition (from..to in `order`), and ones that may stay away.
        double more[MAX_BLOCK_LENGTH], less[MAX_BLOCK_LENGTH];
        int64_t size = count, more_from = 0, more_to = 0, less_from = 0, less_to = 0;
        bool swaps = true;
        if (by_entropy) {
            double total = 0.0;
            for (size = 0; size < masked_.count && total - score[order[size]] < threshold; ++size) {
                total -= score[order[size]];
            }
            if (size < masked_.count) {
                more_from = size, more_to = size + 1;
                more[size] = weight_of(power * (threshold - (total - score[order[size]])));
            }
            if (size > 1) {
                less_from = size - 1, less_to = size;
                less[size - 1] = weight_of(power * (total - threshold));
            }
            if (size == 0) size = 1, more_to = more_from;  // that position is in the base
        } else if (rules.strategy == Strategy::low_confidence_dynamic) {
            const auto sure = [&](int64_t i) { return proposal.prob[i] > threshold ? 1 : 0; };
            const int64_t confident = std::count_if(order, order + masked_.count, sure);
            if (confident >= count) {
                sort(sure);
                size = confident;
                swaps = confident == count;
                const double bar = logit(threshold);
                more_from = size, more_to = masked_.count;
                for (int64_t n = more_from; n < more_to; ++n) more[n] = weight_of(power * (score[order[n]] - bar));
                if (size > count) less_to = size;
                for (int64_t n = less_from; n < less_to; ++n) less[n] = weight_of(power * (bar - score[order[n]]));
            }
        }
        const uint64_t base = masked_.first(size);
        add(base, 1.0);
        for (int64_t out = 0; swaps && out < size; ++out) {
            for (int64_t in = size; in < masked_.count; ++in) {
                const double weight = weight_of(power * (score[order[in]] - score[order[out]]));
                add((base & ~bit(order[out])) | bit(order[in]), weight);
            }
        }
        for (int64_t n = more_from; n < more_to; ++n) add(base | bit(order[n]), more[n]);
        for (int64_t n = less_from; size > 1 && n < less_to; ++n) add(base & ~bit(order[n]), less[n]);
    }

    Masked masked_;
    int64_t count_ = 0;
    // The base, at most 32 * 32 swaps, and every position once in addition and once away.
    Continuation entries_[1 + 32 * 32 + 2 * MAX_BLOCK_LENGTH];
};

}  // namespace simsd::plan
