// thin_linear for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/linear/problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "cpu/linear/kernel.h"

namespace simsd::linear {
namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int LANES = 16, ROWS = 6, INT8_ROWS = 1 << 30;

    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static F load_first(const float* from, int64_t count) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
    }
    static F load(const int8_t* from) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
    static F load_first(const int8_t* from, int64_t count) {
        return widen(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from));
    }
    static F widen(__m128i values) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values)); }
    static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    // to[c] = the sum of sum[c]'s lanes, as a tree: halves, quarters, then pairs. Quarters (of 4 lanes) are named
    // below by whose lanes they hold: a a b b and c c d d become a b c d.
    static void store_sums(float* to, const F* sum) {
        const F aabb = _mm512_add_ps(quarters<0, 1, 0, 1>(sum[0], sum[1]), quarters<2, 3, 2, 3>(sum[0], sum[1]));
        const F ccdd = _mm512_add_ps(quarters<0, 1, 0, 1>(sum[2], sum[3]), quarters<2, 3, 2, 3>(sum[2], sum[3]));
        const F abcd = _mm512_add_ps(quarters<0, 2, 0, 2>(aabb, ccdd), quarters<1, 3, 1, 3>(aabb, ccdd));
        const F pairs = _mm512_add_ps(abcd, lanes<2, 3, 0, 1>(abcd));
        const F total = _mm512_add_ps(pairs, lanes<1, 0, 3, 2>(pairs));
        _mm_storeu_ps(to, _mm512_maskz_extractf32x4_ps(0xf, _mm512_maskz_compress_ps(0x1111, total), 0));
    }
    // Quarters i and j of a, then k and l of b. The unmasked intrinsic makes gcc 12 warn of its own header.
    template <int i, int j, int k, int l>
    static F quarters(F a, F b) {
        return _mm512_maskz_shuffle_f32x4(0xffff, a, b, i | j << 2 | k << 4 | l << 6);
    }
    // Lanes i, j, k and l of every quarter.
    template <int i, int j, int k, int l>
    static F lanes(F a) {
        return _mm512_maskz_permute_ps(0xffff, a, i | j << 2 | k << 4 | l << 6);
    }
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

}  // namespace simsd::linear

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
