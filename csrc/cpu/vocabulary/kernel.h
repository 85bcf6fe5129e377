// The loops over a block of ids, written once on the compiler's own vectors of SIMSD_LANES floats.
//
// Each instruction set includes this file once, under a target pragma. It must not instantiate library templates: the
// linker could then pick their AVX-512 copy for code that runs everywhere.
#pragma once

#include "cpu/vectors.h"
#include "cpu/vocabulary/block.h"

namespace simsd::vocabulary {
namespace {

constexpr float INFINITE = __builtin_huge_valf();
constexpr float LARGEST = 3.40282346638528859812e+38f;

// ln x for positive normal x (Cephes' logf): x = 2^e m with m in [sqrt 1/2, sqrt 2), a polynomial in m - 1.
SIMSD_INLINE F logarithm(F x) {
    I exponent = (((I)x >> 23) & 0xff) - 126;
    F m = (F)(((I)x & 0x007fffff) | 0x3f000000);  // [1/2, 1)
    const I low = m < 0.707106781186547524f;
    exponent += low;  // -1 where true
    m = (low ? m + m : m) - 1.0f;
    const F e = __builtin_convertvector(exponent, F);
    const F square = m * m;
    F p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    F y = p * m * square;
    y = e * -2.12194440e-4f + y;
    y = square * -0.5f + y;
    return e * 0.693359375f + (m + y);
}

// -log(-log1p(-u)) with u = (word + 1/2) / 2^32 in float, at most the largest float below 1.
SIMSD_INLINE F gumbel(U word) {
    // Each half is exact, their sum is rounded once: the nearest float.
    const F high = __builtin_convertvector((I)(word >> 16), F), low = __builtin_convertvector((I)(word & 0xffff), F);
    F u = (high * 65536.0f + low + 0.5f) * 0x1p-32f;
    u = u > 0x1.fffffep-1f ? broadcast(0x1.fffffep-1f) : u;
    // log1p(-u) = -u ln(w) / (w - 1) with w = 1 - u rounded: the rounding cancels between numerator and denominator.
    const F w = 1.0f - u, difference = w - 1.0f;
    const F ratio = difference == 0.0f ? broadcast(1.0f) : logarithm(w) / difference;
    return -logarithm(u * ratio);
}

constexpr float LARGEST_GUMBEL = 22.9f;  // 33 ln 2 = 22.87 for word 0, and some room

SIMSD_INLINE float from_bits(uint32_t bits) { return read<float>(&bits); }

SIMSD_INLINE float half_to_float(uint16_t half) {
    const uint32_t doubled = static_cast<uint32_t>(half) << 17;  // exponent and mantissa, the sign shifted out
    const float normal = from_bits((doubled >> 4) + (0xE0u << 23)) * 0x1p-112f;
    const float subnormal = from_bits((doubled >> 17) | (126u << 23)) - 0.5f;
    const float magnitude = doubled < (1u << 27) ? subnormal : normal;
    return half & 0x8000 ? -magnitude : magnitude;
}

SIMSD_INLINE float to_float(float value) { return value; }
struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
SIMSD_INLINE float to_float(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
SIMSD_INLINE float to_float(Half value) { return half_to_float(value.bits); }

template <typename T>
SIMSD_INLINE void convert(const void* logits, int64_t stride, int64_t count, float* x) {
    const T* from = static_cast<const T*>(logits);
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) x[i] = to_float(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) x[i] = to_float(from[i * stride]);
    }
}

int64_t load(Element element, const void* logits, int64_t stride, int64_t count, float divisor, float* x) {
    switch (element) {
        case Element::float32:
            convert<float>(logits, stride, count, x);
            break;
        case Element::bfloat16:
            convert<BFloat16>(logits, stride, count, x);
            break;
        case Element::float16:
            convert<Half>(logits, stride, count, x);
            break;
    }
    const int64_t padded = (count + CHUNK - 1) / CHUNK * CHUNK;
    for (int64_t i = count; i < padded; ++i) x[i] = -INFINITE;
    for (int64_t i = 0; i < padded; i += LANES) {
        F value = read<F>(x + i);
        if (divisor != 1.0f) value = value / divisor;
        value = value == value ? value : broadcast(-INFINITE);
        value = value > LARGEST ? broadcast(LARGEST) : value;
        __builtin_memcpy(x + i, &value, sizeof(value));
    }
    return padded;
}

SIMSD_INLINE float largest(F value) {
    float best = value[0];
    for (int lane = 1; lane < LANES; ++lane) best = value[lane] > best ? value[lane] : best;
    return best;
}

float maximum(const float* x, int64_t count) {
    F best = broadcast(-INFINITE);
    for (int64_t i = 0; i < count; i += LANES) {
        const F value = read<F>(x + i);
        best = value > best ? value : best;
    }
    return largest(best);
}

void weigh(const float* x, int64_t count, float reference, float* weight) {
    for (int64_t i = 0; i < count; i += LANES) {
        const F value = exponential(read<F>(x + i) - reference);
        __builtin_memcpy(weight + i, &value, sizeof(value));
    }
}

void add(const float* x, int64_t count, float reference, double* sum, double* moment) {
    F weights = {}, moments = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const F distance = read<F>(x + i) - reference;
        const F weight = exponential(distance);
        weights += weight;
        moments += weight * (distance < LOWEST_EXPONENT ? F{} : distance);
    }
    for (int lane = 0; lane < LANES; ++lane) {
        *sum += weights[lane];
        *moment += moments[lane];
    }
}

// The noise words of CHUNK ids; first_id is a multiple of 4.
SIMSD_INLINE void make_words(int64_t first_id, const NoiseKey& key, uint32_t* word) {
    const uint32_t position = static_cast<uint32_t>(key.position), quad = static_cast<uint32_t>(first_id >> 2);
    const uint32_t revealed_low = static_cast<uint32_t>(key.revealed);
    const uint32_t revealed_high = static_cast<uint32_t>(static_cast<uint64_t>(key.revealed) >> 32);
    const uint32_t seed_low = static_cast<uint32_t>(key.seed);
    const uint32_t seed_high = static_cast<uint32_t>(static_cast<uint64_t>(key.seed) >> 32);
    for (uint32_t i = 0; i < CHUNK / 4; ++i) {
        uint32_t c0 = position, c1 = quad + i, c2 = revealed_low, c3 = revealed_high;
        philox4x32(c0, c1, c2, c3, seed_low, seed_high);
        word[4 * i] = c0;
        word[4 * i + 1] = c1;
        word[4 * i + 2] = c2;
        word[4 * i + 3] = c3;
    }
}

void draw(const float* x, int64_t count, int64_t first_id, const NoiseKey& key, Best* best) {
    for (int64_t chunk = 0; chunk < count; chunk += CHUNK) {
        // No noise is larger than LARGEST_GUMBEL: most chunks of a peaked row need none.
        if (!(maximum(x + chunk, CHUNK) + LARGEST_GUMBEL > best->score)) continue;
        uint32_t word[CHUNK];
        float score[CHUNK];
        make_words(first_id + chunk, key, word);
        F top = broadcast(-INFINITE);
        for (int64_t i = 0; i < CHUNK; i += LANES) {
            const F value = read<F>(x + chunk + i) + gumbel(read<U>(word + i));
            __builtin_memcpy(score + i, &value, sizeof(value));
            top = value > top ? value : top;
        }
        const float highest = largest(top);
        if (!(highest > best->score)) continue;
        int64_t i = 0;
        while (score[i] != highest) ++i;
        *best = {highest, x[chunk + i], first_id + chunk + i};
    }
}

constexpr Kernels KERNELS{load, maximum, weigh, add, draw};

}  // namespace
}  // namespace simsd::vocabulary
