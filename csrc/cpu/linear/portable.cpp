// thin_linear for any CPU: 4 lanes of the compiler's own vectors (SSE2, NEON, or scalar code where there is neither).
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "cpu/linear/kernel.h"

namespace simsd::linear {
namespace {

struct Portable {
    typedef float F __attribute__((vector_size(16)));
    static constexpr int LANES = 4, ROWS = 3, INT8_ROWS = 3;

    static F zero() { return F{0.0f, 0.0f, 0.0f, 0.0f}; }
    static F load(const float* from) {
        F value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }
    static F load_first(const float* from, int64_t count) {
        F value = zero();
        for (int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
        return value;
    }
    static F load(const int8_t* from) {
        typedef int8_t Int8s __attribute__((vector_size(4)));
        Int8s values;
        std::memcpy(&values, from, sizeof(values));
        return __builtin_convertvector(values, F);
    }
    static F load_first(const int8_t* from, int64_t count) {
        F value = zero();
        for (int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
        return value;
    }
    static void store(float* to, F value) { std::memcpy(to, &value, sizeof(value)); }
    static F fma(F a, F b, F c) { return c + a * b; }
    static void store_sums(float* to, const F* sum) {
        for (int c = 0; c < COLUMNS; ++c) to[c] = (sum[c][0] + sum[c][1]) + (sum[c][2] + sum[c][3]);
    }
    static F load_bfloat16(const uint16_t* from) {
        F value;
        for (int lane = 0; lane < LANES; ++lane)
            value[lane] = torch::headeronly::BFloat16(from[lane], torch::headeronly::BFloat16::from_bits());
        return value;
    }
    static F load_float16(const uint16_t* from) {
        F value;
        for (int lane = 0; lane < LANES; ++lane)
            value[lane] = torch::headeronly::Half(from[lane], torch::headeronly::Half::from_bits());
        return value;
    }
};

}  // namespace

const Kernels& portable_kernels() { return KERNELS<Portable>; }

}  // namespace simsd::linear
