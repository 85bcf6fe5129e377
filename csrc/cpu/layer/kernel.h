// The loops over a row, written once on the compiler's own vectors of SIMSD_LANES floats. What is left of a row at its
// end is padded to a vector and goes through the same arithmetic. Each step is rounded to the tensors' dtype as the
// modules of transformers round it.
//
// Floor: every row read once and written once. The second look at a residual finds it in the first cache.
//
// Each instruction set includes this file once, under a target pragma. It must not instantiate library templates: the
// linker could then pick their AVX-512 copy for code that runs everywhere.
#pragma once

#include "cpu/layer/row.h"
#include "cpu/vectors.h"

namespace simsd::layer {
namespace {

typedef uint16_t H __attribute__((vector_size(2 * SIMSD_LANES)));

// 16-bit words to 32 bits and back (the upper halves are 0): gcc 12 finds no single instruction for either.
SIMSD_INLINE U to_words(H halves) {
#if SIMSD_LANES == 16
    return (U)_mm512_cvtepu16_epi32((__m256i)halves);
#elif SIMSD_LANES == 8
    return (U)_mm256_cvtepu16_epi32((__m128i)halves);
#else
    return __builtin_convertvector(halves, U);
#endif
}

SIMSD_INLINE H to_halves(U words) {
#if SIMSD_LANES == 16
    return (H)_mm512_cvtepi32_epi16((__m512i)words);
#elif SIMSD_LANES == 8
    const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
    return (H)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
    return __builtin_convertvector(words, H);
#endif
}

struct BFloat16 {
    using Vector = H;
    uint16_t bits;

    SIMSD_INLINE F widen(H bits) { return (F)(to_words(bits) << 16); }

    SIMSD_INLINE H narrow(F value) {
        const U bits = (U)value;
        const U nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // ties to even
        return to_halves(value == value ? nearest : bits >> 16 | 0x40);
    }
};

struct Half {
    using Vector = H;
    uint16_t bits;

#if SIMSD_LANES == 16
    SIMSD_INLINE F widen(H half) { return (F)_mm512_cvtph_ps((__m256i)half); }
    SIMSD_INLINE H narrow(F value) { return (H)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT); }
#elif SIMSD_LANES == 8
    SIMSD_INLINE F widen(H half) { return (F)_mm256_cvtph_ps((__m128i)half); }
    SIMSD_INLINE H narrow(F value) { return (H)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
    SIMSD_INLINE F widen(H half) {
        const U bits = to_words(half);
        const U doubled = bits << 17;  // exponent and mantissa, the sign shifted out
        const F normal = (F)((doubled >> 4) + (0xE0u << 23)) * 0x1p-112f;
        const F subnormal = (F)((doubled >> 17) | (126u << 23)) - 0.5f;
        const F magnitude = doubled < (1u << 27) ? subnormal : normal;
        return (F)((U)magnitude | (bits & 0x8000) << 16);
    }

    SIMSD_INLINE H narrow(F value) {
        const U bits = (U)value, magnitude = bits & 0x7fffffff;
        const F units = (F)magnitude * 0x1p24f;                                       // of the least subnormal
        const U small = (U) __builtin_convertvector((units + 0x1p23f) - 0x1p23f, I);  // ties to even, as below
        const U nearest = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
        const U infinite = U{} + 0x7c00, nan = U{} + 0x7e00;
        U half = magnitude < 0x38800000 ? small : nearest;
        half = magnitude < 0x477ff000 ? half : infinite;  // rounds to 2^16 or more
        half = magnitude > 0x7f800000 ? nan : half;
        return to_halves(half | (bits >> 16 & 0x8000));
    }
#endif
};

struct Float {
    using Vector = F;
    float value;

    SIMSD_INLINE F widen(F value) { return value; }
    SIMSD_INLINE F narrow(F value) { return value; }
};

// LANES elements, 0 past `count`.
template <typename T>
SIMSD_INLINE F load(const T* from, int64_t stride, int64_t count) {
    if (stride == 1 && count >= LANES) return T::widen(read<typename T::Vector>(from));
    T lanes[LANES] = {};
    for (int64_t i = 0; i < LANES && i < count; ++i) lanes[i] = from[i * stride];
    return T::widen(read<typename T::Vector>(lanes));
}

template <typename T>
SIMSD_INLINE void store(typename T::Vector value, T* to, int64_t stride, int64_t count) {
    if (stride == 1 && count >= LANES) {
        __builtin_memcpy(to, &value, sizeof(value));
        return;
    }
    T lanes[LANES];
    __builtin_memcpy(lanes, &value, sizeof(value));
    for (int64_t i = 0; i < LANES && i < count; ++i) to[i * stride] = lanes[i];
}

constexpr int SUMS = 4;  // vectors of squares side by side: one addition need not wait for the last

template <typename T>
void add_rms_norm(Source x, void* residual_data, int64_t stride, Source weight, int64_t dim, float eps, void* out) {
    T* residual = static_cast<T*>(residual_data);
    F squares[SUMS] = {};
    for (int64_t block = 0; block < dim; block += SUMS * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < SUMS; ++i) {
            const int64_t d = block + i * LANES, left = dim - d;
            if (left <= 0) break;
            F value = load(residual + d * stride, stride, left);
            if (x.data != nullptr) {
                const F added = load(static_cast<const T*>(x.data) + d * x.stride, x.stride, left);
                const auto sum = T::narrow(value + added);
                store(sum, residual + d * stride, stride, left);
                value = T::widen(sum);
            }
            squares[i] += value * value;
        }
    }
    const F sums = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    float lanes[LANES];
    __builtin_memcpy(lanes, &sums, sizeof(lanes));
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    const float scale = 1.0f / __builtin_sqrtf(lanes[0] / static_cast<float>(dim) + eps);
    for (int64_t d = 0; d < dim; d += LANES) {
        const int64_t left = dim - d;
        const F value = T::widen(T::narrow(load(residual + d * stride, stride, left) * scale));
        const F factor = load(static_cast<const T*>(weight.data) + d * weight.stride, weight.stride, left);
        store(T::narrow(factor * value), static_cast<T*>(out) + d, 1, left);
    }
}

// x / (1 + e^-x) with an exponential that cannot overflow. -inf gives -0, as the large numbers that it stands for do.
SIMSD_INLINE F silu(F x) {
    const F bounded = x < -104.0f ? broadcast(-104.0f) : x;
    const F e = exponential((F)((U)bounded | 0x80000000u));
    return (bounded < 0.0f ? bounded * e : bounded) / (1.0f + e);
}

template <typename T>
void silu_mul(const void* gate_data, const void* up_data, int64_t stride, int64_t count, void* out) {
    const T *gate = static_cast<const T*>(gate_data), *up = static_cast<const T*>(up_data);
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        const F activated = T::widen(T::narrow(silu(load(gate + i * stride, stride, left))));
        const F factor = load(up + i * stride, stride, left);
        store(T::narrow(activated * factor), static_cast<T*>(out) + i, 1, left);
    }
}

template <typename T>
void combine_experts(const void* const* rows, const float* weights, int64_t choices, int64_t stride, int64_t size,
                     void* out) {
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t left = size - d;
        F total = {};
        for (int64_t c = 0; c < choices; ++c) {
            const F value = load(static_cast<const T*>(rows[c]) + d * stride, stride, left);
            total += T::widen(T::narrow(value * weights[c]));
        }
        store(T::narrow(total), static_cast<T*>(out) + d, 1, left);
    }
}

constexpr Kernels KERNELS{{add_rms_norm<Float>, add_rms_norm<BFloat16>, add_rms_norm<Half>},
                          {silu_mul<Float>, silu_mul<BFloat16>, silu_mul<Half>},
                          {combine_experts<Float>, combine_experts<BFloat16>, combine_experts<Half>}};

}  // namespace
}  // namespace simsd::layer
