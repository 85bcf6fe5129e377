// Gumbel noise in registers, and the race for the best noisy score, which makes noise in full for few ids.
#pragma once

#include "common/philox.h"
#include "cuda/vocabulary/row.h"

namespace simsd::vocabulary {

// -log(-log1p(-u)) with u = (word + 1/2) / 2^32 in float, at most the largest float below 1.
SIMSD_DEVICE float gumbel(uint32_t word) {
    const float u = smaller(product(sum(static_cast<float>(word), 0.5f), 0x1p-32f), 0x1.fffffep-1f);
    return -logarithm(-log_one_plus(-u));
}

// The words of ids 4 quad .. 4 quad + 3.
SIMSD_DEVICE void noise_words(const NoiseKey& key, uint32_t quad, uint32_t (&words)[4]) {
    words[0] = static_cast<uint32_t>(key.position);
    words[1] = quad;
    words[2] = static_cast<uint32_t>(key.revealed);
    words[3] = static_cast<uint32_t>(static_cast<uint64_t>(key.revealed) >> 32);
    philox4x32(words[0], words[1], words[2], words[3], static_cast<uint32_t>(key.seed),
               static_cast<uint32_t>(static_cast<uint64_t>(key.seed) >> 32));
}

SIMSD_DEVICE float noisy(const NoiseKey& key, int32_t id, float x) {
    uint32_t words[4];
    noise_words(key, static_cast<uint32_t>(id) >> 2, words);
    const uint32_t low = id & 1 ? words[1] : words[0], high = id & 1 ? words[3] : words[2];
    return sum(x, gumbel(id & 2 ? high : low));
}

// A lane's best score x + noise and its id (the lowest among equals), and what the warp knows.
//
// -log1p(-u) >= u, so noise is at most -log(u): an id can reach the warp's best only if u <= e^(x - best). With weight
// e^(x - reference) at hand that is one product and one comparison; the two logarithms are left to the few that pass,
// and where even the smallest u fails there is no need of the words. `scale` is e^(best - reference), lowered by what
// rounding may have added, so nobody is turned away wrongly and the winner is that of a plain search.
struct Race {
    NoiseKey key;
    float reference;
    float score = -INFINITE;
    int32_t id = NO_ID;
    float shared = -INFINITE;  // the warp's best score
    float scale = 0.0f;

    SIMSD_DEVICE void offer(float candidate, int32_t at) {
        const bool better = candidate > score || (candidate == score && at < id);
        score = better ? candidate : score;
        id = better ? at : id;
    }

    // All lanes take part.
    SIMSD_DEVICE void agree() {
        const float best = warp_max(score);
        if (!(best > shared)) return;
        shared = best;
        const float rounding = 0x1p-21f * larger(best, -best);
        scale = 0.999f * exp2_fast((best - rounding - reference) * LOG2_E);
    }

    // Offers ids first .. first + COUNT - 1, first a multiple of 4, with weight e^(x - reference). All lanes take part.
    template <int COUNT>
    SIMSD_DEVICE void run(const float* x, const float* weight, int32_t first) {
        float heaviest = weight[0];
#pragma unroll
        for (int e = 1; e < COUNT; ++e) heaviest = larger(heaviest, weight[e]);
        if (!warp_any(heaviest >= 0x1p-33f * scale)) return;
        uint32_t words[COUNT];
#pragma unroll
        for (int e = 0; e < COUNT; e += 4) {
            uint32_t quad[4];
            noise_words(key, static_cast<uint32_t>(first + e) >> 2, quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) words[e + i] = quad[i];
        }
        uint32_t open = within<COUNT>(words, weight);
        while (warp_any(open != 0)) {
            const int pick = lowest_bit(open);
            float chosen = -INFINITE;
            uint32_t word = 0;
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                chosen = e == pick ? x[e] : chosen;
                word = e == pick ? words[e] : word;
            }
            offer(sum(chosen, gumbel(word)), first + pick);
            const float before = shared;
            agree();
            open &= open - 1;
            if (shared > before) open &= within<COUNT>(words, weight);
        }
    }

    // The warp's best score, and the lowest id that has it; NO_ID where nothing was finite.
    SIMSD_DEVICE void finish() {
        agree();
        id = warp_min(score == shared && score > -INFINITE ? id : NO_ID);
        score = shared;
    }

  private:
    // Which of the ids may still win, by the lower bound of u that the upper 23 bits of the word give.
    template <int COUNT>
    SIMSD_DEVICE uint32_t within(const uint32_t* words, const float* weight) const {
        uint32_t open = 0;
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
            const float u = bits_as_float(words[e] >> 9 | 0x3f800000u) - 1.0f;
            open |= static_cast<uint32_t>(u * scale <= weight[e] && weight[e] > 0.0f) << e;
        }
        return open;
    }
};

}  // namespace simsd::vocabulary
