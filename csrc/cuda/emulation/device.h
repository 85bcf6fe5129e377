// The primitives of cuda/device.h on a CPU. Shared memory and pending copies start out as NaN bytes, collective
// primitives wait for every lane, and what the hardware leaves undefined is an error here where it can be seen.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/numbers.h"

#define SIMSD_DEVICE inline
#define __global__
#define __device__
#define __launch_bounds__(...)
#ifndef __forceinline__
#define __forceinline__ inline
#endif

namespace simsd {
namespace emulation {

// Where the running fiber is.
struct Place {
    int thread, threads, block_x, block_y, block_z, blocks_x, blocks_y;
};
extern Place here;

// What kernels have done since `counters` was last cleared.
struct Counters {
    int64_t launches, blocks, matrix_products, async_bytes, loaded_bytes, stored_bytes;
};
extern Counters counters;

// Whether kernels run only to have their work counted: without products, and without copies of 16 bytes.
extern bool counting;

// Waits for the warp's other lanes; the last to come runs `perform` on the operands of all, in lane order.
void warp_collective(const char* name, void* operands, void (*perform)(void* const* operands));
// Waits for the block's other threads; returns how many of them gave true.
int block_collective(const char* name, bool value);
void* take_shared(int index, int offset, int bytes);
void copy_async(void* to, const void* from, int bytes, bool valid);
void copy_commit();
void copy_wait(int pending_groups);
// Ends the launch with an error.
[[noreturn]] void fail(const char* message);

inline void check_aligned(const void* address, int bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned address");
}

// Fragments of a 16 x 8 (x 16) product, as device.h gives them.
struct Product {
    float* c;
    const uint32_t *a, *b;
};

template <typename T>
inline float half_of(uint32_t packed, int which) {
    return to_float(T{static_cast<uint16_t>(packed >> (16 * which))});
}

template <typename T>
inline void multiply_add(void* const* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
        const auto* p = static_cast<const Product*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; ++i) {
            a[g][2 * t + i] = half_of<T>(p->a[0], i);
            a[g + 8][2 * t + i] = half_of<T>(p->a[1], i);
            a[g][2 * t + 8 + i] = half_of<T>(p->a[2], i);
            a[g + 8][2 * t + 8 + i] = half_of<T>(p->a[3], i);
            b[2 * t + i][g] = half_of<T>(p->b[0], i);
            b[2 * t + 8 + i][g] = half_of<T>(p->b[1], i);
        }
    }
    float c[16][8];
    for (int i = 0; i < 16; ++i) {
        float row[8] = {};
        for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) row[j] += a[i][k] * b[k][j];
        }
        for (int j = 0; j < 8; ++j) c[i][j] = row[j];
    }
    for (int lane = 0; lane < WARP; ++lane) {
        auto* p = static_cast<Product*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; ++i) {
            p->c[i] += c[g][2 * t + i];
            p->c[2 + i] += c[g + 8][2 * t + i];
        }
    }
    ++counters.matrix_products;
}

struct Matrices {
    uint32_t* out;
    const void* row;
};

template <bool Transposed>
inline void load_matrices(void* const* lanes) {
    for (int lane = 0; lane < WARP; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const auto element = [&](int row, int column) {
                const auto* p = static_cast<const Matrices*>(lanes[8 * i + row]);
                return static_cast<uint32_t>(static_cast<const uint16_t*>(p->row)[column]);
            };
            const int outer = lane / 4, inner = 2 * (lane % 4);
            static_cast<Matrices*>(lanes[lane])->out[i] = Transposed
                                                              ? element(inner, outer) | element(inner + 1, outer) << 16
                                                              : element(outer, inner) | element(outer, inner + 1) << 16;
        }
    }
}

template <typename T>
struct Exchange {
    T value, result;
    int from;  // lane, possibly out of range: then the lane's own
};

template <typename T>
inline T exchange(const char* name, T value, int from) {
    Exchange<T> mine{value, value, from};
    warp_collective(name, &mine, [](void* const* lanes) {
        for (int lane = 0; lane < WARP; ++lane) {
            auto* p = static_cast<Exchange<T>*>(lanes[lane]);
            if (p->from >= 0 && p->from < WARP) p->result = static_cast<Exchange<T>*>(lanes[p->from])->value;
        }
    });
    return mine.result;
}

}  // namespace emulation

inline int thread_index() { return emulation::here.thread; }
inline int thread_count() { return emulation::here.threads; }
inline int lane_index() { return emulation::here.thread % WARP; }
inline int warp_index() { return emulation::here.thread / WARP; }
inline int block_x() { return emulation::here.block_x; }
inline int block_y() { return emulation::here.block_y; }
inline int block_z() { return emulation::here.block_z; }
inline int blocks_x() { return emulation::here.blocks_x; }
inline int blocks_y() { return emulation::here.blocks_y; }

class Shared {
  public:
    template <typename T>
    T* take(int count) {
        const int bytes = (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
        T* array = static_cast<T*>(emulation::take_shared(arrays_++, used_, bytes));
        used_ += bytes;
        return array;
    }

  private:
    int arrays_ = 0, used_ = 0;
};

inline void block_barrier() { emulation::block_collective("block_barrier", false); }
inline bool block_any(bool value) { return emulation::block_collective("block_any", value) > 0; }
inline int block_count(bool value) { return emulation::block_collective("block_count", value); }
inline void warp_barrier() {
    emulation::warp_collective("warp_barrier", nullptr, [](void* const*) {});
}

template <typename T>
inline T shuffle(T value, int lane) {
    return emulation::exchange("shuffle", value, lane % WARP);
}
template <typename T>
inline T shuffle_xor(T value, int mask) {
    return emulation::exchange("shuffle_xor", value, lane_index() ^ mask);
}
template <typename T>
inline T shuffle_up(T value, int delta) {
    return emulation::exchange("shuffle_up", value, lane_index() - delta);
}
template <typename T>
inline T shuffle_down(T value, int delta) {
    return emulation::exchange("shuffle_down", value, lane_index() + delta);
}

inline uint32_t ballot(bool value) {
    struct Vote {
        bool value;
        uint32_t result;
    } mine{value, 0};
    emulation::warp_collective("ballot", &mine, [](void* const* lanes) {
        uint32_t votes = 0;
        for (int lane = 0; lane < WARP; ++lane) {
            votes |= static_cast<uint32_t>(static_cast<Vote*>(lanes[lane])->value) << lane;
        }
        for (int lane = 0; lane < WARP; ++lane) static_cast<Vote*>(lanes[lane])->result = votes;
    });
    return mine.result;
}
inline bool warp_any(bool value) { return ballot(value) != 0; }
inline bool warp_all(bool value) { return ballot(value) == 0xffffffffu; }

inline int32_t lanes_max(int32_t value) {
    struct Number {
        int32_t value, result;
    } mine{value, 0};
    emulation::warp_collective("lanes_max", &mine, [](void* const* lanes) {
        int32_t most = INT32_MIN;
        for (int lane = 0; lane < WARP; ++lane) most = std::max(most, static_cast<Number*>(lanes[lane])->value);
        for (int lane = 0; lane < WARP; ++lane) static_cast<Number*>(lanes[lane])->result = most;
    });
    return mine.result;
}
inline int32_t lanes_min(int32_t value) { return ~lanes_max(~value); }

inline Bytes16 load_16(const void* address) {
    emulation::check_aligned(address, 16);
    emulation::counters.loaded_bytes += 16;
    Bytes16 out;
    std::memcpy(&out, address, 16);
    return out;
}
inline Bytes16 load_16_written(const void* address) { return load_16(address); }
inline void store_16(void* address, const Bytes16& value) {
    emulation::check_aligned(address, 16);
    emulation::counters.stored_bytes += 16;
    std::memcpy(address, &value, 16);
}
template <typename T>
inline T load_fresh(const T* address) {
    return *address;
}

template <typename T>
inline T load_global(const T* address) {
    emulation::counters.loaded_bytes += sizeof(T);
    return *address;
}
template <typename T>
inline void store_global(T* address, const T& value) {
    emulation::counters.stored_bytes += sizeof(T);
    *address = value;
}

// Blocks run one after the other and fibers yield at collectives only, so a plain update is atomic.
template <typename T>
inline T atomic_add(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <typename T>
inline T atomic_max(T* address, T value) {
    const T old = *address;
    *address = old > value ? old : value;
    return old;
}
template <typename T>
inline T atomic_min(T* address, T value) {
    const T old = *address;
    *address = old < value ? old : value;
    return old;
}
template <typename T>
inline T atomic_or(T* address, T value) {
    const T old = *address;
    *address = old | value;
    return old;
}
template <typename T>
inline T atomic_compare_exchange(T* address, T expected, T desired) {
    const T old = *address;
    if (old == expected) *address = desired;
    return old;
}
inline void device_fence() {}
inline int32_t wait_for(const int32_t* address, int32_t least) {
    if (*address < least) emulation::fail("waits for a block that has yet to run");
    return *address;
}

inline void copy_async_16(void* to, const void* from, bool valid = true) { emulation::copy_async(to, from, 16, valid); }
inline void copy_async_4(void* to, const void* from) { emulation::copy_async(to, from, 4, true); }
inline void copy_commit() { emulation::copy_commit(); }
template <int N>
inline void copy_wait() {
    emulation::copy_wait(N);
}

template <int BYTES = 0>
inline void load_matrices(uint32_t (&out)[4], const void* base) {
    const void* row = static_cast<const char*>(base) + BYTES;
    emulation::check_aligned(row, 16);
    if (emulation::counting) return void(out[0] = out[1] = out[2] = out[3] = 0);
    emulation::Matrices mine{out, row};
    emulation::warp_collective("load_matrices", &mine, emulation::load_matrices<false>);
}
template <int BYTES = 0>
inline void load_matrices_transposed(uint32_t (&out)[4], const void* base) {
    const void* row = static_cast<const char*>(base) + BYTES;
    emulation::check_aligned(row, 16);
    if (emulation::counting) return void(out[0] = out[1] = out[2] = out[3] = 0);
    emulation::Matrices mine{out, row};
    emulation::warp_collective("load_matrices_transposed", &mine, emulation::load_matrices<true>);
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (emulation::counting) return void(emulation::counters.matrix_products += emulation::here.thread % 32 == 0);
    const uint32_t b[2] = {b0, b1};
    emulation::Product mine{c, a, b};
    emulation::warp_collective("multiply_add", &mine, emulation::multiply_add<T>);
}

template <typename T>
inline void widen(uint32_t& low, uint32_t& high, uint32_t bytes) {
    const auto byte = [bytes](int i) { return from_float<T>(static_cast<float>(static_cast<int8_t>(bytes >> 8 * i))); };
    low = pack(byte(0), byte(1));
    high = pack(byte(2), byte(3));
}

inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float exponential(float x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline float log_one_plus(float x) { return std::log1p(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline float round_up(float x) { return std::ceil(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline double exponential(double x) { return std::exp(x); }
inline double logarithm(double x) { return std::log(x); }
inline double log_one_plus(double x) { return std::log1p(x); }
inline float product(float a, float b) { return a * b; }
inline float sum(float a, float b) { return a + b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double product(double a, double b) { return a * b; }
inline double sum(double a, double b) { return a + b; }

template <typename T>
inline uint32_t word_max(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        return float_as_bits(std::fmax(bits_as_float(a), bits_as_float(b)));
    } else {
        return pack<T>(std::fmax(low_of<T>(a), low_of<T>(b)), std::fmax(high_of<T>(a), high_of<T>(b)));
    }
}
template <typename T>
inline uint32_t word_equal(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        return bits_as_float(a) == bits_as_float(b) ? 0xffffffffu : 0u;
    } else {
        const uint32_t low = low_of<T>(a) == low_of<T>(b) ? 0xffffu : 0u;
        return high_of<T>(a) == high_of<T>(b) ? low | 0xffff0000u : low;
    }
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }
inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }
inline int lowest_bit(uint32_t x) { return __builtin_ffs(static_cast<int>(x)) - 1; }
inline int lowest_bit(uint64_t x) { return __builtin_ffsll(static_cast<long long>(x)) - 1; }

inline void expect(bool holds, const char* message) {
    if (!holds) emulation::fail(message);
}

}  // namespace simsd
