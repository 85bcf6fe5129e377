// masked_attention for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/attention/problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/attention/backward.h"

namespace simsd::attention {
namespace {

struct Avx2 {
    using F = __m256;
    using Mask = __m256;
    static constexpr int LANES = 8;
    // Keys (scores) and columns of V (values) per register block, for 1 and 2 vectors of rows.
    static constexpr int KEYS_1 = 8, KEYS_2 = 6, MAX_KEYS = 8, DIMS_1 = 8, DIMS_2 = 6;
    static constexpr int VALUE_KEYS = 32;

    static F load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
    static F set1(float value) { return _mm256_set1_ps(value); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    // b where either is NaN.
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F select(Mask mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }
    // 0 where x < limit, else value.
    static F zero_below(F x, float limit, F value) {
        return _mm256_and_ps(_mm256_cmp_ps(x, set1(limit), _CMP_NLT_UQ), value);
    }
    // value * 2^n, n in the low bits of `shifted` as exp leaves it.
    static F scale_by_power(F value, F shifted) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
    }
    static Mask visible(const int32_t* clock, int32_t birth, int32_t death) {
        const __m256i moment = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(clock));
        const __m256i unborn = _mm256_cmpgt_epi32(_mm256_set1_epi32(birth), moment);
        const __m256i gone = _mm256_cmpgt_epi32(moment, _mm256_set1_epi32(death));
        return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_or_si256(unborn, gone), _mm256_set1_epi32(-1)));
    }
    static bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
    static bool all(Mask mask) { return _mm256_movemask_ps(mask) == 0xff; }
    static F load_bfloat16(const uint16_t* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static F load_float16(const uint16_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};

}  // namespace

const Kernels& avx2_kernels() { return KERNELS<Avx2>; }

}  // namespace simsd::attention

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
