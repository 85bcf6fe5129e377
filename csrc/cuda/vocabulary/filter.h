// What top-k and top-p keep of a row, found without sorting, by as many blocks as there are for it.
//
// Ids are ordered by a 32-bit key. A pass adds up the masses of the keys that share what is known of the wanted one, by
// their next 11 bits, in whole numbers: the result does not depend on who comes first, nor on how many blocks share a
// row's segments. Segments whose largest x is below all keys that still matter are not read again. Every block adds its
// share to the row's bins in global memory; the last one settles the pass.
#pragma once

#include "cuda/vocabulary/summary.h"

namespace simsd::vocabulary {

constexpr int DIGIT_BITS = 11, BINS = 1 << DIGIT_BITS, MOST_WARPS = 8;

// The passes over a row, in order: digits of the k-th largest key, digits of the key at which the mass reaches top-p,
// ids of that key, the draw. A row goes from one that it needs to the next that it needs.
constexpr int COUNT = 0, MASS = 3, TIES = 6, DRAW = 7, PASSES = 8;

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

// Where the search of a row stands. The block that settles a pass writes it.
struct alignas(16) Search {
    Summary summary;
    Cutoff cutoff;
    float total;       // of e^(x - top) over the kept ids, where a mass was asked for
    uint32_t key;      // the wanted one, as far as it is known
    uint64_t bound;    // the mass at which it is, from the largest key down
    uint64_t above;    // mass of the keys that are larger than all that share what is known
    uint64_t ties;     // kept ids of the key at the cutoff
    int32_t pass;      // the next one; PASSES: none
    uint32_t arrived;  // blocks that have added their share to it

    // As another block may have left it.
    SIMSD_DEVICE Search fresh() const {
        const Summary whole{load_fresh(&summary.top), load_fresh(&summary.best), load_fresh(&summary.second),
                            load_fresh(&summary.sum), load_fresh(&summary.moment)};
        return {whole,
                {load_fresh(&cutoff.x), load_fresh(&cutoff.id)},
                load_fresh(&total),
                load_fresh(&key),
                load_fresh(&bound),
                load_fresh(&above),
                load_fresh(&ties),
                load_fresh(&pass),
                load_fresh(&arrived)};
    }
};

// What a segment leaves to the block that settles: of the kept ids but the row's best the sum of e^(x - top), the best
// noisy score and its id; how many ids have the cutoff's x.
struct alignas(16) KeptSegment {
    float others, score;
    int32_t drawn, ties;
};

// Rows whose filters have something to do, and who takes which part of them.
struct alignas(16) Queue {
    unsigned long long tickets;
    int32_t rows;
};

// The scratch behind the partials, where a call has filters.
struct FilterScratch {
    Queue* queue;
    int32_t* tasks;            // [tasks], the first `queue->rows` are set
    Search* searches;          // [tasks], of the rows in the queue
    KeptSegment* kept;         // [tasks, segments]
    unsigned long long* bins;  // [tasks, BINS], 0 between passes
};

SIMSD_ANYWHERE int64_t partials_bytes(int64_t tasks, int64_t segments) {
    return tasks * segments * static_cast<int64_t>(sizeof(Partial));
}

SIMSD_ANYWHERE int64_t filter_bytes(int64_t tasks, int64_t segments) {
    const int64_t row = sizeof(Search) + segments * sizeof(KeptSegment) + BINS * sizeof(unsigned long long);
    return sizeof(Queue) + (tasks + 3) / 4 * 16 + tasks * row;
}

SIMSD_ANYWHERE FilterScratch filter_scratch_of(const sample::Params& p) {
    const int64_t tasks = p.tasks(), segments = segments_of(p.vocabulary);
    char* at = static_cast<char*>(p.scratch) + partials_bytes(tasks, segments);
    FilterScratch out{};
    out.queue = reinterpret_cast<Queue*>(at);
    out.tasks = reinterpret_cast<int32_t*>(out.queue + 1);
    out.searches = reinterpret_cast<Search*>(out.tasks + (tasks + 3) / 4 * 4);
    out.kept = reinterpret_cast<KeptSegment*>(out.searches + tasks);
    out.bins = reinterpret_cast<unsigned long long*>(out.kept + tasks * segments);
    return out;
}

// The block's shared memory.
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

    SIMSD_DEVICE uint64_t mass_at(int bin) const { return static_cast<uint64_t>(high[bin]) << 32 | low[bin]; }
    SIMSD_DEVICE void set(int bin, uint64_t mass) const {
        low[bin] = static_cast<uint32_t>(mass);
        high[bin] = static_cast<uint32_t>(mass >> 32);
    }
    SIMSD_DEVICE void add(int bin, uint64_t mass) const {
        const uint32_t part = static_cast<uint32_t>(mass), before = atomic_add(low + bin, part);
        const uint32_t carried = static_cast<uint32_t>(mass >> 32) + (before + part < before);
        if (carried) atomic_add(high + bin, carried);
    }
};
constexpr int WORKSPACE_BYTES = 2 * BINS * 4 + MOST_WARPS * 8 + 2 * 16;

// The block's share of a row: every so many segments of each of its warps.
struct Share {
    int32_t slice, slices;

    SIMSD_DEVICE int32_t first() const { return slice * (thread_count() / WARP) + warp_index(); }
    SIMSD_DEVICE int32_t step() const { return slices * (thread_count() / WARP); }
};

// The mass of an id in a pass: 1, or its weight in whole numbers, so large that all of them fit: what rounds to 0 is
// below 2^-44 for 2^18 ids.
struct Masses {
    bool counts;
    float top, least, unit;

    SIMSD_DEVICE Masses(int pass, const Search& now, int32_t vocabulary)
        : counts(pass < MASS), top(now.summary.top), least(now.cutoff.x) {
        int bits = 62;
        for (uint32_t ids = vocabulary; ids > 1; ids = (ids + 1) / 2) --bits;
        unit = static_cast<float>(static_cast<uint64_t>(1) << bits);  // a power of two: the product is exact
    }
    SIMSD_DEVICE uint64_t weight(float x) const { return static_cast<uint64_t>(exponential(x - top) * unit); }
    SIMSD_DEVICE uint64_t of(float x) const {
        if (!(x > -INFINITE) || x < least) return 0;
        return counts ? 1 : weight(x);
    }
    // The least x that has a mass and whose key is at least `known`.
    SIMSD_DEVICE float floor(uint32_t known) const {
        const float floor = known ? x_of(known) : -INFINITE;
        return counts ? floor : larger(floor, larger(least, top - 45.0f));
    }
};

// Of a pass's digit: where it is, and the bits of the key that are known before it. The lowest digit overlaps the one
// before, as 11 does not divide 32.
struct Digit {
    int shift;
    uint32_t known;

    SIMSD_DEVICE explicit Digit(int pass)
        : shift(larger(32 - DIGIT_BITS * (pass % 3 + 1), 0)), known(~(~0u >> (DIGIT_BITS * (pass % 3)))) {}
    SIMSD_DEVICE int of(uint32_t key) const { return static_cast<int>(key >> shift) & (BINS - 1); }
    SIMSD_DEVICE uint32_t with(uint32_t key, uint32_t digit) const {
        return (key & ~(static_cast<uint32_t>(BINS - 1) << shift)) | digit << shift;
    }
};

// Adds the masses of this block's share to the row's bins (block).
template <typename T>
SIMSD_DEVICE void gather(const Row<T>& row, const Partial* partials, const Share& share, const Masses& masses,
                         const Digit& digit, uint32_t key, const Workspace& work, unsigned long long* bins) {
    for (int bin = thread_index(); bin < BINS; bin += thread_count()) work.set(bin, 0);
    block_barrier();
    const float floor = masses.floor(key);
    for (int32_t segment = share.first(); segment < segments_of(row.vocabulary); segment += share.step()) {
        const float top = partials[segment].top;
        if (top == -INFINITE || top < floor) continue;
#pragma unroll 1
        for (int i = 0; i < PER_LANE; i += UNIT<T>) {
            float x[UNIT<T>];
            row.load_ids(id_at<T>(segment, i), x);
#pragma unroll
            for (int e = 0; e < UNIT<T>; ++e) {
                const uint32_t own = key_of(x[e]);
                if ((own ^ key) & digit.known) continue;
                const uint64_t mass = masses.of(x[e]);
                if (mass) work.add(digit.of(own), mass);
            }
        }
    }
    block_barrier();
    for (int bin = thread_index(); bin < BINS; bin += thread_count()) {
        const uint64_t mass = work.mass_at(bin);
        if (mass) atomic_add(bins + bin, static_cast<unsigned long long>(mass));
    }
}

// Finds the digit at which the masses in shared memory, from the largest digit down, reach the bound that `bound_of`
// makes of their total (block). Where bound >= total they may not: digit and above mean nothing then.
template <typename BoundOf>
SIMSD_DEVICE void find_digit(const Workspace& work, BoundOf bound_of, uint64_t& bound, uint64_t& total, uint64_t& above,
                             uint32_t& digit) {
    const int per_thread = BINS / thread_count();  // thread counts are powers of two
    const int first = BINS - 1 - thread_index() * per_thread;
    uint64_t own = 0;
    for (int i = 0; i < per_thread; ++i) own += work.mass_at(first - i);
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
            const uint64_t mass = work.mass_at(first - i);
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

// Settles a digit (block): what `now` knows afterwards, and the next pass.
SIMSD_DEVICE int settle_digit(int pass, const Filter& filter, const Masses& masses, bool wants_mass, int after,
                              const Workspace& work, unsigned long long* bins, Search& now) {
    for (int bin = thread_index(); bin < BINS; bin += thread_count()) {
        work.set(bin, load_fresh(bins + bin));
        bins[bin] = 0;
    }
    block_barrier();
    const bool first = pass % 3 == 0;
    const auto bound_of = [&](uint64_t total) {
        if (!first) return now.bound - now.above;
        if (masses.counts) return static_cast<uint64_t>(filter.top_k);
        if (!filter.limits_mass()) return total;
        const double exact = static_cast<double>(larger(filter.top_p, 0.0f)) * static_cast<double>(total);
        uint64_t whole = static_cast<uint64_t>(exact);
        whole += static_cast<double>(whole) < exact;
        return larger(whole, static_cast<uint64_t>(1));
    };
    const int beyond = masses.counts && wants_mass ? MASS : after;
    uint64_t bound, total, above;
    uint32_t digit;
    find_digit(work, bound_of, bound, total, above, digit);
    if (first) {
        now.bound = bound;
        now.above = 0;
        now.key = 0;
        if (!masses.counts) now.total = static_cast<float>(static_cast<double>(total) / masses.unit);
        if (bound >= total) return beyond;
    }
    now.above += above;
    now.key = Digit(pass).with(now.key, digit);
    if (pass % 3 < 2) return pass + 1;

    const float x = x_of(now.key);
    now.cutoff.x = x;
    const uint32_t key = now.key;
    now.key = 0;
    if (masses.counts) return beyond;
    // Of the ids at the crossing x, all of the same mass, the lowest `ties` are kept.
    const uint64_t mass = masses.weight(x), equal = work.mass_at(Digit(pass).of(key));
    now.ties = (now.bound - now.above + mass - 1) / mass;
    now.total = static_cast<float>(static_cast<double>(now.above + now.ties * mass) / masses.unit);
    return now.ties * mass < equal ? TIES : after;
}

// Sums over the lanes up to this one.
SIMSD_DEVICE int32_t inclusive_count(int32_t value) {
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
        const int32_t other = shuffle_up(value, delta);
        value += lane_index() >= delta ? other : 0;
    }
    return value;
}

// How many ids of each segment of the block's share have the cutoff's x.
template <typename T>
SIMSD_DEVICE void count_ties(const Row<T>& row, const Partial* partials, const Share& share, float x,
                             KeptSegment* kept) {
    for (int32_t segment = share.first(); segment < segments_of(row.vocabulary); segment += share.step()) {
        int32_t ties = 0;
        if (partials[segment].top >= x) {
#pragma unroll 1
            for (int i = 0; i < PER_LANE; i += UNIT<T>) {
                float values[UNIT<T>];
                row.load_ids(id_at<T>(segment, i), values);
#pragma unroll
                for (int e = 0; e < UNIT<T>; ++e) ties += values[e] == x;
            }
            ties = warp_sum(ties);
        }
        if (lane_index() == 0) kept[segment].ties = ties;
    }
}

// The id of the `nth` (from 1) that has the cutoff's x (warp).
template <typename T>
SIMSD_DEVICE int32_t nth_tie(const Row<T>& row, const KeptSegment* kept, float x, uint64_t nth) {
    const int32_t segments = segments_of(row.vocabulary);
    int32_t left = static_cast<int32_t>(nth), found = 0;
    for (int32_t first = 0; first < segments; first += WARP) {
        const int32_t segment = first + lane_index();
        const int32_t own = segment < segments ? load_fresh(&kept[segment].ties) : 0, up_to = inclusive_count(own);
        const uint32_t reaches = ballot(up_to >= left);
        if (reaches) {
            found = first + lowest_bit(reaches);
            left -= shuffle(up_to - own, lowest_bit(reaches));
            break;
        }
        left -= shuffle(up_to, WARP - 1);
    }
    for (int i = 0; i < PER_LANE; i += UNIT<T>) {
        const int32_t id = id_at<T>(found, i);
        float values[UNIT<T>];
        row.load_ids(id, values);
        int32_t own = 0, hit = NO_ID;
#pragma unroll
        for (int e = 0; e < UNIT<T>; ++e) own += values[e] == x;
        const int32_t up_to = inclusive_count(own);
        int32_t place = up_to - own;
#pragma unroll
        for (int e = 0; e < UNIT<T>; ++e) {
            place += values[e] == x;
            if (values[e] == x && place == left) hit = id + e;
        }
        hit = lanes_min(hit);
        if (hit != NO_ID) return hit;
        left -= shuffle(up_to, WARP - 1);
    }
    return NO_ID;
}

}  // namespace simsd::vocabulary
