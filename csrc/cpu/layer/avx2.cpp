// Row loops for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define SIMSD_LANES 8
#include "cpu/layer/kernel.h"

namespace simsd::layer {

const Kernels& avx2_kernels() { return KERNELS; }

}  // namespace simsd::layer

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
