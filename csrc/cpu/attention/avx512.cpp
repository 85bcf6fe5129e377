// masked_attention for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/attention/problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "cpu/attention/backward.h"

namespace simsd::attention {
namespace {

struct Avx512 {
    using F = __m512;
    using Mask = __mmask16;
    static constexpr int LANES = 16;
    // Keys (scores) and columns of V (values) per register block, for 1 and 2 vectors of rows.
    static constexpr int KEYS_1 = 16, KEYS_2 = 8, MAX_KEYS = 16, DIMS_1 = 16, DIMS_2 = 8;
    static constexpr int VALUE_KEYS = 32;

    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    // b where either is NaN.
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F select(Mask mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }
    // 0 where x < limit, else value.
    static F zero_below(F x, float limit, F value) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(limit), _CMP_NLT_UQ), value);
    }
    // value * 2^n, n in the low bits of `shifted` as exp leaves it.
    static F scale_by_power(F value, F shifted) {
        const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), exponent));
    }
    static Mask visible(const int32_t* clock, int32_t birth, int32_t death) {
        const __m512i moment = _mm512_loadu_si512(clock);
        return _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask(_mm512_set1_epi32(birth), moment), moment,
                                            _mm512_set1_epi32(death));
    }
    static bool any(Mask mask) { return mask != 0; }
    static bool all(Mask mask) { return mask == 0xffff; }
    static F load_bfloat16(const uint16_t* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F load_float16(const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
};

}  // namespace

const Kernels& avx512_kernels() { return KERNELS<Avx512>; }

}  // namespace simsd::attention

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
