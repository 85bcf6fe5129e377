// Which masked positions of a block one denoising step reveals. Shared by reveal and block_verify.graph, so that a walk
// takes the very steps that decoding without a draft takes. The Python definition is reveal/reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/strategy.h"
#include "common/strided.h"

namespace simsd {

inline uint64_t bit(int64_t position) { return uint64_t{1} << position; }

// All positions of a block of `length`.
inline uint64_t full_set(int64_t length) { return length >= 64 ? ~uint64_t{0} : bit(length) - 1; }

// The masked positions of one block, in increasing order at first.
struct Masked {
    int64_t count = 0;
    int64_t position[MAX_BLOCK_LENGTH];

    Masked(uint64_t revealed, int64_t length) {
        for (int64_t i = 0; i < length; ++i) {
            if (!(revealed & bit(i))) position[count++] = i;
        }
    }

    uint64_t first(int64_t n) const {
        uint64_t chosen = 0;
        for (int64_t i = 0; i < n; ++i) chosen |= bit(position[i]);
        return chosen;
    }

    // Sorts by rising `key(position)`; the sort is stable, so ties stay with the lowest position. NaN ranks last.
    template <typename Key>
    void rank(const Key& key) {
        constexpr float LAST = std::numeric_limits<float>::infinity();
        std::stable_sort(position, position + count, [&](int64_t a, int64_t b) {
            const float key_a = key(a), key_b = key(b);
            return (std::isnan(key_a) ? LAST : key_a) < (std::isnan(key_b) ? LAST : key_b);
        });
    }
};

// What the model says of the block's positions.
struct Statistics {
    Strided<const float, 1> prob, log_odds, entropy;
};

// A step's number of positions by `strategy`, the last step of a block aside.
inline uint64_t choose(Strategy strategy, Masked masked, int64_t count, const Statistics& given, double threshold) {
    const auto by_log_odds = [&](int64_t i) { return -*given.log_odds.at(i); };
    switch (strategy) {
        case Strategy::sequential:
            return masked.first(count);
        case Strategy::low_confidence_static:
            masked.rank(by_log_odds);
            return masked.first(count);
        case Strategy::low_confidence_dynamic: {
            uint64_t confident = 0;
            int64_t confident_count = 0;
            for (int64_t i = 0; i < masked.count; ++i) {
                if (!(*given.prob.at(masked.position[i]) > static_cast<float>(threshold))) continue;
                confident |= bit(masked.position[i]);
                ++confident_count;
            }
            if (confident_count >= count) return confident;
            masked.rank(by_log_odds);
            return masked.first(count);
        }
        case Strategy::entropy_bounded: {
            masked.rank([&](int64_t i) { return *given.entropy.at(i); });
            double total = 0.0;
            int64_t below = 0;
            for (; below < masked.count; ++below) {
                total += *given.entropy.at(masked.position[below]);
                if (!(total < threshold)) break;
            }
            return masked.first(std::min(std::max<int64_t>(below, 1), masked.count));
        }
    }
    return 0;
}

struct Schedule {
    Strided<const int32_t, 1> counts;
    int64_t steps;
};

// The set that step `now` reveals of a block of `length`; empty where the schedule has no such step.
inline uint64_t reveal_set(Strategy strategy, uint64_t revealed, int64_t length, int64_t now, const Schedule& schedule,
                           const Statistics& given, double threshold) {
    if (now < 0 || now >= schedule.steps) return 0;
    const Masked masked(revealed, length);
    if (now == schedule.steps - 1) return masked.first(masked.count);
    const int64_t count = std::clamp<int64_t>(*schedule.counts.at(now), 0, masked.count);
    return choose(strategy, masked, count, given, threshold);
}

}  // namespace simsd
