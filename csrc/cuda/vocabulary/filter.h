// What top-k and top-p keep of a row, found by one block in a few passes over it, without sorting.
//
// Ids are ordered by a 32-bit key. A pass adds up the masses of the keys that share what is known of the wanted one, by
// their next 11 bits, in whole numbers: the result does not depend on who comes first. Segments whose largest x is
// below all keys that still matter are not read again.
#pragma once

#include "cuda/vocabulary/summary.h"

namespace simsd::vocabulary {

constexpr int DIGIT_BITS = 11, BINS = 1 << DIGIT_BITS, MOST_WARPS = 16;

// x in the order of unsigned numbers; -0 is 0.
SIMSD_DEVICE uint32_t key_of(float x) {
    const uint32_t bits = float_as_bits(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
SIMSD_DEVICE float x_of(uint32_t key) { return bits_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The ids that are kept: those before and up to (x, id) in order of falling x, then rising id.
struct Cutoff {
    float x = -INFINITE;
    int32_t id = NO_ID;

    SIMSD_DEVICE bool keeps(float value, int32_t at) const {
        return value > -INFINITE && (value > x || (value == x && at <= id));
    }
};

// Where the masses of falling keys reach a bound.
struct Crossing {
    uint64_t bound, total;  // total mass; without a crossing where bound >= total
    uint64_t above;         // mass of larger keys
    uint32_t key;
};

// The block's shared memory for searches.
struct Workspace {
    uint32_t *low, *high;  // [BINS], masses in two halves: 64-bit atomics on shared memory are slow
    uint64_t* warp_mass;   // [MOST_WARPS]
    uint64_t* above;       // [1]
    uint32_t* digit;       // [1]

    SIMSD_DEVICE explicit Workspace(Shared& shared)
        : low(shared.take<uint32_t>(BINS)),
          high(shared.take<uint32_t>(BINS)),
          warp_mass(shared.take<uint64_t>(MOST_WARPS)),
          above(shared.take<uint64_t>(1)),
          digit(shared.take<uint32_t>(1)) {}
};
constexpr int WORKSPACE_BYTES = 2 * BINS * 4 + MOST_WARPS * 8 + 2 * 16;

SIMSD_DEVICE void add_mass(const Workspace& work, uint32_t digit, uint64_t mass) {
    const uint32_t low = static_cast<uint32_t>(mass), before = atomic_add(work.low + digit, low);
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before);
    if (high) atomic_add(work.high + digit, high);
}

// Finds the digit at which masses, from the largest digit down, reach the bound that `bound_of` makes of their total
// (block). Without one (bound >= total where `may_keep_all`) digit and above stay as they are.
template <typename BoundOf>
SIMSD_DEVICE void find_digit(const Workspace& work, BoundOf bound_of, uint64_t& bound, uint64_t& total, uint64_t& above,
                             uint32_t& digit) {
    const int per_thread = BINS / thread_count();  // thread counts are powers of two
    const int first = BINS - 1 - thread_index() * per_thread;
    const auto mass_at = [&](int bin) { return static_cast<uint64_t>(work.high[bin]) << 32 | work.low[bin]; };
    uint64_t own = 0;
    for (int i = 0; i < per_thread; ++i) own += mass_at(first - i);
    uint64_t up_to = own;  // and with the lanes before
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
        const uint64_t other = shuffle_up(up_to, delta);
        up_to += lane_index() >= delta ? other : 0;
    }
    if (lane_index() == WARP - 1) work.warp_mass[warp_index()] = up_to;
    block_barrier();
    total = 0;
    for (int warp = 0; warp < thread_count() / WARP; ++warp) {
        if (warp == warp_index()) up_to += total;
        total += work.warp_mass[warp];
    }
    bound = bound_of(total);
    if (up_to >= bound && up_to - own < bound) {
        uint64_t reached = up_to - own;
        for (int i = 0; i < per_thread; ++i) {
            const uint64_t mass = mass_at(first - i);
            if (reached + mass >= bound) {
                *work.above = reached;
                *work.digit = first - i;
                break;
            }
            reached += mass;
        }
    }
    block_barrier();
    above = *work.above;
    digit = *work.digit;
}

// Finds the key at which the masses of falling keys reach a bound (block). `entry(x, id, key, mass)` says whether an id
// counts and sets its key and mass, `bound_of(total)` is at least 1, `floor_of(known)` is the least x of an id whose
// key is at least `known`. The first pass starts at bit `shift`: all keys agree above its digit, on the bits of
// `known`.
template <typename T, typename Entry, typename BoundOf, typename FloorOf>
SIMSD_DEVICE Crossing search(const Row<T>& row, const Partial* partials, const Workspace& work, uint32_t known,
                             int shift, Entry entry, BoundOf bound_of, FloorOf floor_of) {
    Crossing out{0, 0, 0, known};
    uint32_t known_bits = 0;
    uint64_t left = 0;  // of the bound, within the known prefix
    for (bool first = true;; first = false) {
        for (int bin = thread_index(); bin < BINS; bin += thread_count()) work.low[bin] = work.high[bin] = 0;
        block_barrier();
        const float floor = floor_of(out.key);
        for (int32_t segment = warp_index(); segment < segments_of(row.vocabulary); segment += thread_count() / WARP) {
            const float top = partials[segment].top;
            if (top == -INFINITE || top < floor) continue;
#pragma unroll 1
            for (int i = 0; i < PER_LANE; i += UNIT<T>) {
                const int32_t id = id_at<T>(segment, i);
                float x[UNIT<T>];
                row.load_ids(id, x);
#pragma unroll
                for (int e = 0; e < UNIT<T>; ++e) {
                    uint32_t key;
                    uint64_t mass;
                    if (!(x[e] > -INFINITE) || !entry(x[e], id + e, key, mass)) continue;
                    if ((key ^ out.key) & known_bits) continue;
                    add_mass(work, key >> shift & (BINS - 1), mass);
                }
            }
        }
        block_barrier();
        uint64_t bound, total, above;
        uint32_t digit;
        if (first) {
            find_digit(work, bound_of, bound, total, above, digit);
            out.bound = left = bound;
            out.total = total;
            if (bound >= total) return out;
        } else {
            find_digit(work, [&](uint64_t) { return left; }, bound, total, above, digit);
        }
        out.above += above;
        left -= above;
        // The lowest digit overlaps the one before where 11 does not divide 32.
        const uint32_t digit_bits = static_cast<uint32_t>(BINS - 1) << shift;
        out.key = (out.key & ~digit_bits) | digit << shift;
        known_bits |= digit_bits;
        if (shift == 0) return out;
        shift = larger(shift - DIGIT_BITS, 0);
    }
}

struct Kept {
    Cutoff cutoff;
    float total;  // of e^(x - top) over the kept ids; as it was given where no mass was asked for
};

// What the filter keeps of a row whose largest x is `top` (block). `need_total` asks for the mass of what is kept even
// where top-p is off.
template <typename T>
SIMSD_DEVICE Kept filter_row(const Row<T>& row, const Partial* partials, float top, const Filter& filter,
                             bool need_total, const Workspace& work) {
    constexpr int TOP_SHIFT = 32 - DIGIT_BITS;
    Kept out{Cutoff{}, 1.0f};
    if (filter.limits_count(row.vocabulary)) {
        const auto each = [](float x, int32_t, uint32_t& key, uint64_t& mass) {
            key = key_of(x);
            mass = 1;
            return true;
        };
        const auto count = [&](uint64_t) { return static_cast<uint64_t>(filter.top_k); };
        const auto floor = [](uint32_t known) { return known ? x_of(known) : -INFINITE; };
        const Crossing kth = search(row, partials, work, 0, TOP_SHIFT, each, count, floor);
        if (kth.bound < kth.total) out.cutoff.x = x_of(kth.key);
    }
    if (!filter.limits_mass() && !need_total) return out;

    // Weights in whole numbers, so large that all of them fit: what rounds to 0 is below 2^-44 for 2^18 ids.
    int bits = 62;
    for (uint32_t ids = row.vocabulary; ids > 1; ids = (ids + 1) / 2) --bits;
    const float unit = static_cast<float>(static_cast<uint64_t>(1) << bits);  // a power of two: the product is exact
    const auto mass_of = [&](float x) { return static_cast<uint64_t>(exponential(x - top) * unit); };
    const float least = out.cutoff.x;
    const auto weighed = [&](float x, int32_t, uint32_t& key, uint64_t& mass) {
        if (x < least) return false;
        key = key_of(x);
        mass = mass_of(x);
        return mass > 0;
    };
    const auto bound_of = [&](uint64_t total) {
        if (!filter.limits_mass()) return total;
        const double exact = static_cast<double>(larger(filter.top_p, 0.0f)) * static_cast<double>(total);
        uint64_t whole = static_cast<uint64_t>(exact);
        whole += static_cast<double>(whole) < exact;
        return larger(whole, static_cast<uint64_t>(1));
    };
    const auto floor_of = [&](uint32_t known) {
        return larger(known ? x_of(known) : -INFINITE, larger(least, top - 45.0f));
    };
    const Crossing crossing = search(row, partials, work, 0, TOP_SHIFT, weighed, bound_of, floor_of);
    out.total = static_cast<float>(static_cast<double>(crossing.total) / unit);
    if (crossing.bound >= crossing.total) return out;

    // Of the ids at the crossing x, all of the same mass, the lowest `ties` are kept.
    const float x = x_of(crossing.key);
    const uint64_t mass = mass_of(x), ties = (crossing.bound - crossing.above + mass - 1) / mass;
    out.cutoff.x = x;
    out.total = static_cast<float>(static_cast<double>(crossing.above + ties * mass) / unit);
    const auto equal = [&](float value, int32_t id, uint32_t& key, uint64_t& count) {
        key = ~static_cast<uint32_t>(id);
        count = 1;
        return value == x;
    };
    int shift = 0;
    while (static_cast<uint32_t>(row.vocabulary - 1) >> shift >= BINS) shift += DIGIT_BITS;
    const uint32_t all_lower = ~0u;  // the key of id 0: ids agree on the bits above the first digit
    const Crossing last = search(
        row, partials, work, all_lower, smaller(shift, TOP_SHIFT), equal, [&](uint64_t) { return ties; },
        [&](uint32_t) { return x; });
    if (last.bound < last.total) out.cutoff.id = static_cast<int32_t>(~last.key);
    return out;
}

}  // namespace simsd::vocabulary
