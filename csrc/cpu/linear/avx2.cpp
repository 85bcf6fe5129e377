// thin_linear for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/linear/problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/linear/kernel.h"

namespace simsd::linear {
namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int LANES = 8, ROWS = 3, INT8_ROWS = 6;

    static F zero() { return _mm256_setzero_ps(); }
    static F load(const float* from) { return _mm256_loadu_ps(from); }
    static F load_first(const float* from, int64_t count) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes));
    }
    static F load(const int8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static F load_first(const int8_t* from, int64_t count) {
        alignas(8) int8_t values[LANES] = {};
        for (int64_t lane = 0; lane < count; ++lane) values[lane] = from[lane];
        return load(values);
    }
    static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    // to[c] = the sum of sum[c]'s lanes, as a tree: neighbours, pairs of them, then halves.
    static void store_sums(float* to, const F* sum) {
        const F pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    }
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

}  // namespace simsd::linear

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
