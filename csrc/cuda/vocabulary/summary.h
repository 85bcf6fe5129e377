// Softmax sums of a row: one Partial for every segment, merged in a tree of fixed shape.
//
// The largest entry is kept apart from the others: its weight is 1, and what they add would drown in it.
#pragma once

#include "cuda/vocabulary/row.h"

namespace simsd::vocabulary {

struct alignas(16) Partial {
    float top;      // largest x, -inf where nothing is finite
    int32_t best;   // its id, the lowest among equals; NO_ID
    float second;   // largest x of the others
    float sum;      // of e^(x - second) over the others
    float moment;   // of e^(x - second) * (x - second) over the others
    float score;    // best x + noise, where the scan makes noise
    int32_t drawn;  // its id
    int32_t unused;
};

SIMSD_DEVICE Partial* partials_of(const sample::Params& p, int32_t task) {
    return static_cast<Partial*>(p.scratch) + static_cast<int64_t>(task) * segments_of(p.vocabulary);
}

struct Summary {
    float top;
    int32_t best;  // NO_ID: nothing is finite
    float second;
    double sum, moment;

    SIMSD_DEVICE bool empty() const { return best == NO_ID; }
    // Sum of the others' weights, relative to the top's.
    SIMSD_DEVICE double rest() const { return sum > 0.0 ? sum * exponential(static_cast<double>(second) - top) : 0.0; }
    SIMSD_DEVICE double total() const { return 1.0 + rest(); }

    SIMSD_DEVICE float prob(float x) const {
        return empty() ? 0.0f : static_cast<float>(exponential(static_cast<double>(x) - top) / total());
    }
    // x[id] - logsumexp of all other ids.
    SIMSD_DEVICE float log_odds(int32_t id, float x) const {
        if (empty() || x == -INFINITE) return -INFINITE;
        if (id == best) {
            if (!(sum > 0.0)) return INFINITE;
            return static_cast<float>(static_cast<double>(top) - second - logarithm(sum));
        }
        // The top's weight of 1 stays in the sum, so taking out `id` loses at most one bit.
        const double distance = static_cast<double>(x) - top;
        const double others = rest() - exponential(distance);
        return static_cast<float>(distance - log_one_plus(larger(0.0, others)));
    }
    SIMSD_DEVICE float entropy() const {
        if (!(rest() > 0.0)) return 0.0f;
        const double distance = static_cast<double>(second) - top;
        const double moment_from_top = exponential(distance) * (moment + sum * distance);  // <= 0
        return static_cast<float>(log_one_plus(rest()) - moment_from_top / total());
    }
    SIMSD_DEVICE float logsumexp() const {
        return empty() ? -INFINITE : static_cast<float>(top + log_one_plus(rest()));
    }
};

// Merges the partials of a row (warp); every lane gets the result.
SIMSD_DEVICE Summary merge(const Partial* partials, int32_t count) {
    Summary out{-INFINITE, NO_ID, -INFINITE, 0.0, 0.0};
    for (int32_t i = lane_index(); i < count; i += WARP) out.top = larger(out.top, partials[i].top);
    out.top = warp_max(out.top);
    if (out.top == -INFINITE) return out;
    for (int32_t i = lane_index(); i < count; i += WARP) {
        if (partials[i].top == out.top) out.best = smaller(out.best, partials[i].best);
    }
    out.best = warp_min(out.best);
    for (int32_t i = lane_index(); i < count; i += WARP) {
        const float runner_up = partials[i].best == out.best ? partials[i].second : partials[i].top;
        out.second = larger(out.second, runner_up);
    }
    out.second = warp_max(out.second);
    if (out.second == -INFINITE) return out;
    for (int32_t i = lane_index(); i < count; i += WARP) {
        const Partial& partial = partials[i];
        if (partial.second > -INFINITE) {
            const double distance = static_cast<double>(partial.second) - out.second;
            const double factor = exponential(distance);
            out.sum += factor * partial.sum;
            // 0 * inf is NaN: what has vanished is dropped.
            if (factor > 0.0) out.moment += factor * (partial.moment + distance * partial.sum);
        }
        if (partial.top > -INFINITE && partial.best != out.best) {
            const double distance = static_cast<double>(partial.top) - out.second;
            const double factor = exponential(distance);
            out.sum += factor;
            if (factor > 0.0) out.moment += factor * distance;
        }
    }
    out.sum = warp_sum(out.sum);
    out.moment = warp_sum(out.moment);
    return out;
}

}  // namespace simsd::vocabulary
