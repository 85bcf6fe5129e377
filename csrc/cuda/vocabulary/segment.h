// One segment of a row, by a warp: its two largest x, the sums of the others, and its part in the race for the best
// noisy score.
//
// The ordinary segment stays in registers as it was read, in words of one float or two 16-bit numbers: its two largest
// are found in words, and each id is made a float once, for its weight. What is not ordinary (banned ids, the end of
// the vocabulary, a tie of the largest within a lane, one finite id, numbers beyond 2^100) is read from memory, pass by
// pass. Both ways add up in the same order.
#pragma once

#include "cuda/vocabulary/noise.h"
#include "cuda/vocabulary/row.h"
#include "cuda/vocabulary/summary.h"

namespace simsd::vocabulary {

template <typename T>
constexpr int PER_WORD = 4 / sizeof(T);
template <typename T>
constexpr int HELD = PER_LANE / PER_WORD<T>;

// What stands for NaN and -inf in an ordinary segment, in every number of a word: -2^100, for Float16 the least finite.
template <typename T>
constexpr uint32_t LEAST = sizeof(T) == 4 ? 0xf1800000u : 0xf180f180u;
template <>
constexpr uint32_t LEAST<Float16> = 0xfbfffbffu;

template <typename T>
SIMSD_DEVICE float number_of(uint32_t word, int which) {
    if constexpr (sizeof(T) == 4) {
        return bits_as_float(word);
    } else {
        return which ? high_of<T>(word) : low_of<T>(word);
    }
}

// What a lane holds of a segment: word w has the ids from id_at(segment, w * PER_WORD) on.
template <typename T>
struct Held {
    uint32_t words[HELD<T>];
    uint32_t banned;  // of 32 neighbouring ids of the segment, not of those that the lane holds

    // Of a row in whole units.
    SIMSD_DEVICE void load(const Row<T>& row, int32_t segment) {
        const int32_t id = id_at<T>(segment, 0), left = row.vocabulary - id;
        const T* address = row.logits + id;
        const int32_t word = segment * WORDS + lane_index();
        banned = 0;
        if (left > (PER_LANE / UNIT<T> - 1) * WARP * UNIT<T>) {
#pragma unroll
            for (int w = 0; w < HELD<T>; w += 4) set(w, load_16(address + w / 4 * WARP * UNIT<T>));
            if (row.banned) banned = row.banned[word];
        } else {
#pragma unroll
            for (int w = 0; w < HELD<T>; w += 4) {
                Bytes16 bytes{{LEAST<T>, LEAST<T>, LEAST<T>, LEAST<T>}};
                if (left > w / 4 * WARP * UNIT<T>) bytes = load_16(address + w / 4 * WARP * UNIT<T>);
                set(w, bytes);
            }
            if (row.banned && word * 32 < row.vocabulary) banned = row.banned[word];
        }
    }
    SIMSD_DEVICE void set(int first, const Bytes16& bytes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[first + i] = bytes.words[i];
    }

    SIMSD_DEVICE float largest() const {
        uint32_t most = words[0];
#pragma unroll
        for (int w = 1; w < HELD<T>; ++w) most = word_max<T>(most, words[w]);
        return warp_max_number(maximum(number_of<T>(most, 0), number_of<T>(most, PER_WORD<T> - 1)));
    }
};

// What was read as the rest takes it: without NaN and -inf, and floats divided, as equal quotients of two are a tie.
template <typename T>
SIMSD_DEVICE Held<T> prepared(const Held<T>& read, const Divisor& divisor) {
    Held<T> out = read;
    if constexpr (sizeof(T) == 4) {
        if (divisor.divides()) {
#pragma unroll
            for (int w = 0; w < HELD<T>; w += 4) {
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = bits_as_float(out.words[w + i]);
                divisor.divide(x);
#pragma unroll
                for (int i = 0; i < 4; ++i) out.words[w + i] = float_as_bits(x[i]);
            }
        }
    }
#pragma unroll
    for (int w = 0; w < HELD<T>; ++w) out.words[w] = word_max<T>(out.words[w], LEAST<T>);
    return out;
}

// The two largest x and the id of the first, which goes from what is held. False where the segment is not ordinary.
template <typename T>
SIMSD_DEVICE bool find_two(Held<T>& held, const Divisor& divisor, int32_t segment, Partial& out) {
    const float top = held.largest();

    // Where it is. Bit w: in word w; of two numbers the second is 16 bits above.
    uint32_t wanted = float_as_bits(top), found = 0;
    if constexpr (sizeof(T) == 2) wanted = pack<T>(top, top);
#pragma unroll
    for (int w = 0; w < HELD<T>; ++w) {
        found |= word_equal<T>(held.words[w], wanted) & ((sizeof(T) == 4 ? 1u : 0x10001u) << w);
    }
    const uint32_t bit = static_cast<uint32_t>(lowest_bit(found));
    const uint32_t index = sizeof(T) == 4 ? bit : bit % 16 * 2 + bit / 16;  // -1 of no bit is not used
    const int32_t own = found ? id_at<T>(segment, index) : NO_ID;
    const int32_t best = lanes_min(held.banned || (found & (found - 1)) ? -1 : own);
    if (best < 0 || !(top < 0x1p100f)) return false;
    if (own != best) wanted = ~0u;  // NaN, which nothing equals
#pragma unroll
    for (int w = 0; w < HELD<T>; ++w) {
        const uint32_t equal = word_equal<T>(held.words[w], wanted);
        held.words[w] = (held.words[w] & ~equal) | (LEAST<T> & equal);
    }

    float two[2] = {top, held.largest()}, least = number_of<T>(LEAST<T>, 0);
    if constexpr (sizeof(T) == 2) {
        if (divisor.divides()) {
            // Quotients of numbers below 2^-100 may be wrong in the last bit, which no distance shows then.
            if (!divisor.is_ordinary() || !(larger(two[1], -two[1]) >= 0x1p-60f)) return false;
            divisor.divide(two);
            least = divisor.quotient(least);
        }
    }
    out.top = two[0];
    out.best = best;
    out.second = two[1];
    return out.second - least > 200.0f;  // whatever has become the least weighs 0
}

template <typename T>
SIMSD_DEVICE void find_two(const Row<T>& row, int32_t segment, Partial& out) {
    float x[UNIT<T>], own = -INFINITE, second = -INFINITE;
    int32_t best = NO_ID;
#pragma unroll 1
    for (int i = 0; i < PER_LANE; i += UNIT<T>) {
        row.load_ids(id_at<T>(segment, i), x);
#pragma unroll
        for (int e = 0; e < UNIT<T>; ++e) {
            best = x[e] > own ? id_at<T>(segment, i + e) : best;
            second = larger(second, smaller(own, x[e]));
            own = larger(own, x[e]);
        }
    }
    out.top = warp_max_number(own);
    out.best = lanes_min(own == out.top ? best : NO_ID);
    out.second = warp_max_number(best == out.best ? second : own);
}

// Weights and sums of the others, as far as they are this lane's. With `Noise`: which of its units, one bit each, hold
// an id that may win.
template <typename T, bool Noise>
SIMSD_DEVICE uint32_t add_others(const Held<T>& held, const Divisor& divisor, int32_t segment, const Race& race,
                                 Partial& out) {
    const float scale = Noise ? race.scale(out.second) : 0.0f;
    const bool divides = sizeof(T) == 2 && divisor.divides();
    constexpr int TOGETHER = 8;  // ids whose words are made side by side
    uint32_t open = 0;
    out.sum = out.moment = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i += TOGETHER) {
        uint32_t quads[TOGETHER / 4], words[TOGETHER / 4][4];
#pragma unroll
        for (int q = 0; q < TOGETHER / 4; ++q) quads[q] = static_cast<uint32_t>(id_at<T>(segment, i + 4 * q)) / 4;
        if constexpr (Noise) noise_words(race.key, quads, words);
#pragma unroll
        for (int unit = i; unit < i + TOGETHER; unit += UNIT<T>) {
            float x[UNIT<T>], margin = -1.0f;
#pragma unroll
            for (int e = 0; e < UNIT<T>; ++e)
                x[e] = number_of<T>(held.words[(unit + e) / PER_WORD<T>], e % PER_WORD<T>);
            if (divides) {
#pragma unroll
                for (int e = 0; e < UNIT<T>; ++e) x[e] = divisor.quotient(x[e]);
            }
#pragma unroll
            for (int e = 0; e < UNIT<T>; ++e) {
                const float distance = x[e] - out.second, weight = exp2_fast(distance * LOG2_E);
                out.sum += weight;
                out.moment = fused(weight, distance, out.moment);
                if constexpr (Noise) {
                    const auto word = static_cast<float>(words[(unit + e - i) / 4][e % 4]);
                    margin = maximum(margin, fused(-scale, word, weight));
                }
            }
            if constexpr (Noise) open |= static_cast<uint32_t>(margin >= 0.0f) << (unit / UNIT<T>);
        }
    }
    return open;
}

template <typename T>
SIMSD_DEVICE void add_others(const Row<T>& row, int32_t segment, Partial& out) {
    out.sum = out.moment = 0.0f;
#pragma unroll 1
    for (int i = 0; i < PER_LANE; i += UNIT<T>) {
        float x[UNIT<T>];
        row.load_ids(id_at<T>(segment, i), x);
#pragma unroll
        for (int e = 0; e < UNIT<T>; ++e) {
            if (id_at<T>(segment, i + e) == out.best) x[e] = -INFINITE;
            const float distance = larger(x[e] - out.second, -200.0f);  // its weight is 0
            const float weight = exp2_fast(distance * LOG2_E);
            out.sum += weight;
            out.moment = fused(weight, distance, out.moment);
        }
    }
}

// `held` is the segment, prepared, where the row has whole units; else it is read from memory.
template <typename T>
SIMSD_DEVICE Partial scan_segment(Held<T>& held, const Row<T>& row, int32_t segment, bool noise, Race& race) {
    constexpr uint32_t ALL_UNITS = (1u << (PER_LANE / UNIT<T>)) - 1;
    Partial out;
    const bool ordinary = row.has_whole_units() && find_two(held, row.divisor, segment, out);
    if (!ordinary) find_two(row, segment, out);
    if (noise) race.run_one(out.top, out.best);
    uint32_t open = 0;
    if (ordinary && noise && out.second >= race.reach()) {
        open = add_others<T, true>(held, row.divisor, segment, race, out);
    } else if (ordinary) {
        add_others<T, false>(held, row.divisor, segment, race, out);
    } else {
        out.sum = out.moment = 0.0f;
        if (out.second > -INFINITE) {
            add_others(row, segment, out);
            open = noise ? ALL_UNITS : 0;
        }
    }
    out.sum = warp_sum(out.sum);
    out.moment = warp_sum(out.moment);
    if (noise && warp_any(open != 0)) {
#pragma unroll 1
        for (int i = 0; i < PER_LANE; i += UNIT<T>) {
            const int unit = i / UNIT<T>;
            if (!warp_any(open >> unit & 1)) continue;
            float x[UNIT<T>];
            row.load_ids(id_at<T>(segment, i), x);
            race.run(x, id_at<T>(segment, i));
        }
    }
    out.score = race.score;
    out.drawn = race.id;
    out.unused = 0;
    return out;
}

}  // namespace simsd::vocabulary
