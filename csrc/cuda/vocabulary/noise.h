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

// The words of QUADS times four ids, for ids 4 quads[q] .. 4 quads[q] + 3 each. Side by side, as they share the keys of
// the rounds.
template <int QUADS>
SIMSD_DEVICE void noise_words(const NoiseKey& key, const uint32_t (&quads)[QUADS], uint32_t (&words)[QUADS][4]) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        words[q][0] = static_cast<uint32_t>(key.position);
        words[q][1] = quads[q];
        words[q][2] = static_cast<uint32_t>(key.revealed);
        words[q][3] = static_cast<uint32_t>(static_cast<uint64_t>(key.revealed) >> 32);
    }
    uint32_t low = static_cast<uint32_t>(key.seed);
    uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(key.seed) >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) philox_round(words[q][0], words[q][1], words[q][2], words[q][3], low, high);
        low += PHILOX_WEYL_LOW;
        high += PHILOX_WEYL_HIGH;
    }
}

// More than any noise: that of word 0, -log(-log1p(-2^-33)) = 22.874.
constexpr float MOST_NOISE = 22.9f;

// The best score x + noise that the warp knows, and the lowest id that has it: the same in every lane.
//
// -log1p(-u) >= u, so noise is at most -log(u): an id can reach the score only if u <= e^(x - score). That is one
// product and one comparison; the two logarithms are left to the few that pass, and where even the most noise falls
// short there is no need of the words. Every bound is lowered by what rounding may have added, so nobody is turned away
// wrongly and the winner is that of a plain search, whoever comes first.
struct Race {
    NoiseKey key;
    float score = -INFINITE;
    int32_t id = NO_ID;

    // What x must be above to win: -inf before the first score.
    SIMSD_DEVICE float reach() const { return lowered() - MOST_NOISE; }
    // e^(score - reference) / 2^32: ids with word x this > e^(x - reference) cannot win.
    SIMSD_DEVICE float scale(float reference) const {
        return 0.999f * 0x1p-32f * exp2_fast((lowered() - reference) * LOG2_E);
    }

    // Takes the best of the lanes' candidates, -inf for none (warp).
    SIMSD_DEVICE void offer(float candidate, int32_t at) {
        const float best = warp_max_number(candidate);
        if (best == -INFINITE || best < score) return;
        const int32_t lowest = lanes_min(candidate == best ? at : NO_ID);
        id = best > score ? lowest : smaller(id, lowest);
        score = best;
    }

    // Offers the id that all lanes name (warp).
    SIMSD_DEVICE void run_one(float x, int32_t at) {
        if (!(x >= reach())) return;
        uint32_t words[1][4];
        noise_words<1>(key, {static_cast<uint32_t>(at) >> 2}, words);
        const uint32_t low = at & 1 ? words[0][1] : words[0][0], high = at & 1 ? words[0][3] : words[0][2];
        const uint32_t word = at & 2 ? high : low;
        if (static_cast<float>(word) * scale(x) <= 1.0f) offer(sum(x, gumbel(word)), at);
    }

    // Offers ids first .. first + COUNT - 1, first a multiple of 4 (warp).
    template <int COUNT>
    SIMSD_DEVICE void run(const float (&x)[COUNT], int32_t first) {
        float most = x[0];
#pragma unroll
        for (int e = 1; e < COUNT; ++e) most = larger(most, x[e]);
        if (!warp_any(most >= reach() && most > -INFINITE)) return;
        uint32_t quads[COUNT / 4], words[COUNT / 4][4];
#pragma unroll
        for (int q = 0; q < COUNT / 4; ++q) quads[q] = static_cast<uint32_t>(first) / 4 + q;
        noise_words(key, quads, words);
        for (uint32_t open = within(x, words); warp_any(open != 0);) {
            const int pick = lowest_bit(open);
            float chosen = -INFINITE;
            uint32_t word = 0;
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                chosen = e == pick ? x[e] : chosen;
                word = e == pick ? words[e / 4][e % 4] : word;
            }
            const float before = score;
            offer(sum(chosen, gumbel(word)), first + pick);
            open &= open - 1;
            if (score > before) open &= within(x, words);
        }
    }

  private:
    SIMSD_DEVICE float lowered() const { return score - 0x1p-21f * larger(score, -score); }

    // Which of the ids may still win.
    template <int COUNT>
    SIMSD_DEVICE uint32_t within(const float (&x)[COUNT], const uint32_t (&words)[COUNT / 4][4]) const {
        uint32_t open = 0;
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
            const float weight = exp2_fast((x[e] - score) * LOG2_E);
            const bool fails = static_cast<float>(words[e / 4][e % 4]) * scale(score) > weight;
            open |= static_cast<uint32_t>(!fails && x[e] > -INFINITE) << e;
        }
        return open;
    }
};

}  // namespace simsd::vocabulary
