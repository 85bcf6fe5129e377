// Who works on a slot: `Alone` is one thread, `Warp` the 32 lanes of one. Control ops are written once, as templates
// over the team, for the CPU and for CUDA.
//
// Positions of a block are a 64-bit set. A worker owns some of them (alone: all; lane l of a warp: l and l + 32), does
// their work and keeps their values. Everything that is not in a `Values` is the same for all workers. All of a team
// reach `each`, `where`, `first`, `value_of` and `sync` together, with the same arguments but for what the functions
// given return.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/strategy.h"

#if defined(__CUDACC__) || defined(SIMSD_EMULATE)
#include "cuda/device.h"
#define SIMSD_CONTROL SIMSD_DEVICE
#else
#include <cmath>
#define SIMSD_CONTROL inline
#endif

namespace simsd {

#ifndef SIMSD_DEVICE
// The names of cuda/device.h that control ops use.
inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }
inline int lowest_bit(uint64_t x) { return x == 0 ? -1 : __builtin_ctzll(x); }
inline double exponential(double x) { return std::exp(x); }
inline double logarithm(double x) { return std::log(x); }
inline double product(double a, double b) { return a * b; }
inline double sum(double a, double b) { return a + b; }
inline void expect(bool, const char*) {}
#endif

namespace control {

SIMSD_CONTROL uint64_t bit(int position) { return uint64_t{1} << position; }

SIMSD_CONTROL bool has(uint64_t set, int position) { return set >> position & 1; }

// All positions of a block of `length`, or those before position `length`.
SIMSD_CONTROL uint64_t full_set(int length) { return length >= MAX_BLOCK_LENGTH ? ~uint64_t{0} : bit(length) - 1; }

struct Alone {
    // A value for each position that the worker owns.
    template <typename T>
    class Values {
      public:
        SIMSD_CONTROL T& operator[](int position) { return values_[position]; }
        SIMSD_CONTROL const T& operator[](int position) const { return values_[position]; }

      private:
        T values_[MAX_BLOCK_LENGTH];
    };

    // The one that writes what is written once.
    static SIMSD_CONTROL bool leads() { return true; }

    // What the team wrote before is seen by all of it afterwards.
    static SIMSD_CONTROL void sync() {}

    // work(i) by the owner of each position of `set`.
    template <typename Work>
    static SIMSD_CONTROL void each(uint64_t set, Work work) {
        for (; set != 0; set &= set - 1) work(lowest_bit(set));
    }

    // The positions of `set` whose owner says that holds(i).
    template <typename Holds>
    static SIMSD_CONTROL uint64_t where(uint64_t set, Holds holds) {
        uint64_t out = 0;
        for (; set != 0; set &= set - 1) {
            const int i = lowest_bit(set);
            if (holds(i)) out |= bit(i);
        }
        return out;
    }

    // What the owner of the position has, for all.
    template <typename T>
    static SIMSD_CONTROL T value_of(const Values<T>& values, int position) {
        return values[position];
    }

    // The positions of a set by falling score, then rising position. No score is NaN.
    class Ranking {
      public:
        SIMSD_CONTROL Ranking(const Values<float>& score, uint64_t set) {
            each(set, [&](int i) {
                int at = count_++;
                for (; at > 0 && score[order_[at - 1]] < score[i]; --at) order_[at] = order_[at - 1];
                order_[at] = i;
            });
        }

        // The one with `place` others before it.
        SIMSD_CONTROL int position(int place) const { return order_[place]; }

        SIMSD_CONTROL uint64_t first(int count) const {
            uint64_t out = 0;
            for (int place = 0; place < count && place < count_; ++place) out |= bit(order_[place]);
            return out;
        }

      private:
        int order_[MAX_BLOCK_LENGTH], count_ = 0;
    };

    // work(n) for every n in [0, count), shared out.
    template <typename Work>
    static SIMSD_CONTROL void range(int64_t count, Work work) {
        for (int64_t n = 0; n < count; ++n) work(n);
    }

    // work(row, column) for every one of rows x columns, shared out.
    template <typename Work>
    static SIMSD_CONTROL void grid(int rows, int columns, Work work) {
        for (int row = 0; row < rows; ++row) {
            for (int column = 0; column < columns; ++column) work(row, column);
        }
    }

    // The first n in [from, count) for which holds(n), -1 for none.
    template <typename Holds>
    static SIMSD_CONTROL int first(int from, int count, Holds holds) {
        for (int n = from; n < count; ++n) {
            if (holds(n)) return n;
        }
        return -1;
    }

    // The first n in [0, count) of the greatest value(n), -1 for none. No value is NaN.
    template <typename Value>
    static SIMSD_CONTROL int greatest(int count, Value value) {
        int at = -1;
        double top = 0.0;
        for (int n = 0; n < count; ++n) {
            const double mine = value(n);
            if (at >= 0 && !(mine > top)) continue;
            top = mine;
            at = n;
        }
        return at;
    }

    // The sum of value(n) over [0, count); note(n, sum before n) by the owner of each n.
    template <typename Value, typename Note>
    static SIMSD_CONTROL int64_t running_sum(int64_t count, Value value, Note note) {
        int64_t total = 0;
        for (int64_t n = 0; n < count; ++n) {
            note(n, total);
            total += value(n);
        }
        return total;
    }

    // Writes what stands at `place` if that is greater. Neither is negative.
    static SIMSD_CONTROL void raise(double* place, double value) {
        if (value > *place) *place = value;
    }

    // Writes `value` where `free` stands; false where something else does.
    static SIMSD_CONTROL bool claim(int32_t* place, int32_t free, int32_t value) {
        if (*place != free) return false;
        *place = value;
        return true;
    }
};

#ifdef SIMSD_DEVICE
struct Warp {
    static constexpr int OWNED = MAX_BLOCK_LENGTH / WARP;

    template <typename T>
    class Values {
      public:
        SIMSD_CONTROL T& operator[](int position) { return values_[position / WARP]; }
        SIMSD_CONTROL const T& operator[](int position) const { return values_[position / WARP]; }

      private:
        T values_[OWNED];
    };

    static SIMSD_CONTROL bool leads() { return lane_index() == 0; }

    static SIMSD_CONTROL void sync() { warp_barrier(); }

    template <typename Work>
    static SIMSD_CONTROL void each(uint64_t set, Work work) {
#pragma unroll
        for (int k = 0; k < OWNED; ++k) {
            const int i = lane_index() + k * WARP;
            if (has(set, i)) work(i);
        }
    }

    template <typename Holds>
    static SIMSD_CONTROL uint64_t where(uint64_t set, Holds holds) {
        uint32_t words[OWNED];
#pragma unroll
        for (int k = 0; k < OWNED; ++k) {
            const int i = lane_index() + k * WARP;
            words[k] = ballot(has(set, i) && holds(i));
        }
        return static_cast<uint64_t>(words[1]) << WARP | words[0];
    }

    template <typename T>
    static SIMSD_CONTROL T value_of(const Values<T>& values, int position) {
        return shuffle(position < WARP ? values[0] : values[WARP], position % WARP);
    }

    class Ranking {
      public:
        SIMSD_CONTROL Ranking(const Values<float>& score, uint64_t set) : set_(set) {
            each(set, [&](int i) { place_[i] = 0; });
            for (uint64_t left = set; left != 0; left &= left - 1) {
                const int j = lowest_bit(left);
                const float other = value_of(score, j);
                each(set, [&](int i) { place_[i] += other > score[i] || (other == score[i] && j < i); });
            }
        }

        SIMSD_CONTROL int position(int place) const {
            return lowest_bit(where(set_, [&](int i) { return place_[i] == place; }));
        }

        SIMSD_CONTROL uint64_t first(int count) const {
            return where(set_, [&](int i) { return place_[i] < count; });
        }

      private:
        uint64_t set_;
        Values<int> place_;
    };

    template <typename Work>
    static SIMSD_CONTROL void range(int64_t count, Work work) {
        for (int64_t n = lane_index(); n < count; n += WARP) work(n);
    }

    template <typename Work>
    static SIMSD_CONTROL void grid(int rows, int columns, Work work) {
        range(int64_t{rows} * columns,
              [&](int64_t n) { work(static_cast<int>(n / columns), static_cast<int>(n % columns)); });
    }

    template <typename Holds>
    static SIMSD_CONTROL int first(int from, int count, Holds holds) {
        for (int base = from; base < count; base += WARP) {
            const int n = base + lane_index();
            const uint32_t found = ballot(n < count && holds(n));
            if (found != 0) return base + lowest_bit(found);
        }
        return -1;
    }

    template <typename Value>
    static SIMSD_CONTROL int greatest(int count, Value value) {
        int at = INT32_MAX;
        double top = 0.0;
        const auto prefer = [&](double other, int place) {
            if (place == INT32_MAX || (at != INT32_MAX && !(other > top || (other == top && place < at)))) return;
            top = other;
            at = place;
        };
        for (int n = lane_index(); n < count; n += WARP) prefer(value(n), n);
#pragma unroll
        for (int mask = WARP / 2; mask > 0; mask /= 2) {
            const double other = shuffle_xor(top, mask);
            prefer(other, shuffle_xor(at, mask));
        }
        return at == INT32_MAX ? -1 : at;
    }

    template <typename Value, typename Note>
    static SIMSD_CONTROL int64_t running_sum(int64_t count, Value value, Note note) {
        int64_t total = 0;
        for (int64_t base = 0; base < count; base += WARP) {
            const int64_t n = base + lane_index(), mine = n < count ? value(n) : 0;
            int64_t upto = mine;
#pragma unroll
            for (int delta = 1; delta < WARP; delta *= 2) {
                const int64_t before = shuffle_up(upto, delta);
                if (lane_index() >= delta) upto += before;
            }
            if (n < count) note(n, total + upto - mine);
            total += shuffle(upto, WARP - 1);
        }
        return total;
    }

    static SIMSD_CONTROL void raise(double* place, double value) {
        // As integers, numbers that are not negative are in the same order.
        unsigned long long bits;
        memcpy(&bits, &value, sizeof bits);
        atomic_max(reinterpret_cast<unsigned long long*>(place), bits);
    }

    static SIMSD_CONTROL bool claim(int32_t* place, int32_t free, int32_t value) {
        return atomic_compare_exchange(place, free, value) == free;
    }
};
#endif

}  // namespace control
}  // namespace simsd
