// Row loops for AVX-512 (F, BW, VL, DQ) and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define SIMSD_LANES 16
#include "cpu/layer/kernel.h"

namespace simsd::layer {

const Kernels& avx512_kernels() { return KERNELS; }

}  // namespace simsd::layer

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
