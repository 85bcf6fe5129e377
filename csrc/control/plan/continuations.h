// What the target may reveal next in a drafted state, and how likely. The Python definition is `continuations` in
// plan_block/reference.py; the arithmetic is in its order, so that both choose the same states.
#pragma once

#include "control/step.h"

namespace simsd::control {

constexpr int MAX_CHILDREN = 64;  // continuations of one state that are looked at, the likeliest

// The base, every swap that may be among the likeliest (the sum of MAX_CHILDREN / n over n is 280), and every position
// once in addition or once away.
constexpr int MOST_CONTINUATIONS = 1 + 280 + MAX_BLOCK_LENGTH;

// Where a team works on one state.
struct Room {
    double score[MAX_BLOCK_LENGTH];   // of each position
    double factor[MAX_BLOCK_LENGTH];  // what revealing it multiplies the probability of a visit with
    double weight[MOST_CONTINUATIONS];
    uint64_t chosen[MOST_CONTINUATIONS];
    float log_odds[MAX_BLOCK_LENGTH], prob[MAX_BLOCK_LENGTH];  // as far as they change from a state seen to this one
    int32_t order[MAX_BLOCK_LENGTH];  // positions that may be revealed, the first to be revealed first
    int32_t pick[MAX_CHILDREN];
};

// At most 1: nothing is likelier than what the draft would do. NaN (infinity times a sharpness of 0) is no objection.
SIMSD_CONTROL double weight_of(double exponent) { return exponent < 0.0 ? exponential(exponent) : 1.0; }

// Finite, so that differences are numbers; NaN ranks last.
SIMSD_CONTROL double number(double value) {
    if (!(value > -1e30)) return -1e30;
    return value < 1e30 ? value : 1e30;
}

// That of a probability with such log-odds.
SIMSD_CONTROL double probability(double log_odds) {
    const double against = -log_odds > 700.0 ? 700.0 : -log_odds;
    return 1.0 / sum(1.0, exponential(against));
}

SIMSD_CONTROL double logit(double p) {
    if (p <= 0.0 || p >= 1.0) return p <= 0.0 ? -1e30 : 1e30;
    return logarithm(p / (1.0 - p));
}

// Sets of masked positions that may be revealed, with probabilities: the draft's own choice, and changes of it by one
// position.
template <typename Team>
class Continuations {
  public:
    SIMSD_CONTROL explicit Continuations(Room& room) : room_(room) {}

    // Finds those of a state at step `now`. The set may be empty, which leads nowhere.
    SIMSD_CONTROL void find(const Rule& rule, int now, uint64_t masked, const Statistics& given, double sharpness) {
        size_ = 0;
        if (!has_step(rule, now) || masked == 0) return;
        const bool last = now == rule.steps - 1;
        const uint64_t open = open_positions(rule, masked);
        const int asked = rule.schedule[now], available = count_bits(open);
        const int count = asked < 0 ? 0 : asked < available ? asked : available;
        if (last || rule.strategy == Strategy::sequential) {
            const uint64_t leftmost = Team::where(open, [&](int i) { return count_bits(open & full_set(i)) < count; });
            if (Team::leads()) put(0, last ? masked : leftmost, 1.0);
            size_ = 1;
            total_ = 1.0;
            picks_ = false;
            Team::sync();
            return;
        }
        vary(rule, open, count, given, sharpness);
        weigh();
    }

    SIMSD_CONTROL int size() const { return size_; }
    SIMSD_CONTROL uint64_t chosen(int n) const { return room_.chosen[place(n)]; }
    SIMSD_CONTROL double likelihood(int n) const { return room_.weight[place(n)] / total_; }

  private:
    SIMSD_CONTROL int place(int n) const { return picks_ ? room_.pick[n] : n; }

    SIMSD_CONTROL void put(int n, uint64_t chosen, double weight) {
        room_.chosen[n] = chosen;
        room_.weight[n] = weight;
    }

    SIMSD_CONTROL void vary(const Rule& rule, uint64_t open, int count, const Statistics& given, double sharpness) {
        const bool by_entropy = rule.strategy == Strategy::entropy_bounded;
        const double threshold = rule.threshold;
        typename Team::template Values<float> rank;
        Team::each(open, [&](int i) {
            const double score = number(by_entropy ? -given.entropy[i] : given.log_odds[i]);
            room_.score[i] = score;
            rank[i] = static_cast<float>(score);
        });
        // Where enough are confident, those, whatever their order; else the first `count` of all.
        uint64_t sure = 0;
        bool confident = false;
        if (rule.strategy == Strategy::low_confidence_dynamic) {
            sure = Team::where(open, [&](int i) { return given.prob[i] > rule.threshold; });
            confident = count_bits(sure) >= count;
            if (!confident) sure = 0;
        }
        const int ahead = count_bits(sure), available = count_bits(open);
        const typename Team::Ranking first(rank, sure), then(rank, open & ~sure);
        for (int n = 0; n < available; ++n) {
            const int position = n < ahead ? first.position(n) : then.position(n - ahead);
            if (Team::leads()) room_.order[n] = position;
        }
        Team::sync();

        int size = confident ? ahead : count, more = 0, less = 0;
        double total = 0.0;  // of the entropies in the base
        if (by_entropy) {
            for (size = 0; size < available; ++size) {
                const double next = total - score(size);
                if (!(next < threshold)) break;
                total = next;
            }
            more = size > 0 && size < available;
            less = size > 1;
            if (size == 0) size = 1;  // that position would come in addition
        } else if (confident) {
            more = available - size;
            less = size > count && size > 1 ? size : 0;
        }
        const uint64_t base = sure | then.first(size - ahead);
        if (Team::leads()) put(0, base, 1.0);
        size_ = 1;

        if (!confident || size == count) {
            // One of the base out, the n-th behind it in: pairs nearer to the border between them are no less likely.
            const int behind = available - size;
            const auto width = [&](int out) {
                const int most = MAX_CHILDREN / (size - out);
                return behind < most ? behind : most;
            };
            int swaps = 0;
            for (int out = 0; out < size; ++out) swaps += width(out);
            int out = 0, passed = 0, wide = swaps > 0 ? width(0) : 0;
            Team::range(swaps, [&](int n) {
                for (; n - passed >= wide; wide = width(++out)) passed += wide;
                const int in = size + n - passed;
                put(1 + n, (base & ~bit(room_.order[out])) | bit(room_.order[in]),
                    weight_of(sharpness * (score(in) - score(out))));
            });
            size_ += swaps;
        }
        const double bar = confident ? logit(threshold) : 0.0;
        Team::range(more, [&](int n) {
            const int in = size + n;
            const double against = by_entropy ? threshold - (total - score(in)) : score(in) - bar;
            put(size_ + n, base | bit(room_.order[in]), weight_of(sharpness * against));
        });
        size_ += more;
        Team::range(less, [&](int n) {
            const int out = size - less + n;
            const double against = by_entropy ? total - threshold : bar - score(out);
            put(size_ + n, base & ~bit(room_.order[out]), weight_of(sharpness * against));
        });
        size_ += less;
        Team::sync();
    }

    SIMSD_CONTROL double score(int place) const { return room_.score[room_.order[place]]; }

    // The sum of all weights, and which are the likeliest.
    SIMSD_CONTROL void weigh() {
        total_ = 0.0;
        for (int n = 0; n < size_; ++n) total_ = sum(total_, room_.weight[n]);
        picks_ = size_ > MAX_CHILDREN;
        if (!picks_) return;
        int kept = 0;
        for (int from = 0; from < size_; from += MAX_CHILDREN) {
            const uint64_t likely = Team::where(full_set(size_ - from), [&](int n) { return is_likely(from + n); });
            Team::each(likely, [&](int n) { room_.pick[kept + count_bits(likely & full_set(n))] = from + n; });
            kept += count_bits(likely);
        }
        size_ = kept;
        Team::sync();
    }

    SIMSD_CONTROL bool is_likely(int n) const {
        const double own = room_.weight[n];
        int before = 0;
        for (int other = 0; other < size_ && before < MAX_CHILDREN; ++other) {
            before += room_.weight[other] > own || (room_.weight[other] == own && other < n);
        }
        return before < MAX_CHILDREN;
    }

    Room& room_;
    double total_ = 0.0;
    int size_ = 0;
    bool picks_ = false;
};

}  // namespace simsd::control
