// masked_attention for any CPU: 4 lanes of the compiler's own vectors (SSE2, NEON, or scalar code where there is
// neither).
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "common/visibility.h"
#include "cpu/attention/backward.h"

namespace simsd::attention {
namespace {

struct Portable {
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t Mask __attribute__((vector_size(16)));
    static constexpr int LANES = 4;
    // Keys (scores) and columns of V (values) per register block, for 1 and 2 vectors of rows.
    static constexpr int KEYS_1 = 8, KEYS_2 = 6, MAX_KEYS = 8, DIMS_1 = 8, DIMS_2 = 6;
    static constexpr int VALUE_KEYS = 32;

    template <typename To, typename From>
    static To cast(From from) {
        To to;
        std::memcpy(&to, &from, sizeof(to));
        return to;
    }

    static F load(const float* from) {
        F value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }
    static void store(float* to, F value) { std::memcpy(to, &value, sizeof(value)); }
    static F set1(float value) { return F{value, value, value, value}; }
    static F fma(F a, F b, F c) { return c + a * b; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    // b where either is NaN.
    static F max(F a, F b) { return select(a > b, a, b); }
    static F select(Mask mask, F yes, F no) { return cast<F>((mask & cast<Mask>(yes)) | (~mask & cast<Mask>(no))); }
    // 0 where x < limit, else value.
    static F zero_below(F x, float limit, F value) { return cast<F>(~(x < set1(limit)) & cast<Mask>(value)); }
    // value * 2^n, n in the low bits of `shifted` as exp leaves it.
    static F scale_by_power(F value, F shifted) { return cast<F>(cast<Mask>(value) + (cast<Mask>(shifted) << 23)); }
    static Mask visible(const int32_t* clock, int32_t birth, int32_t death) {
        Mask seen;
        for (int lane = 0; lane < LANES; ++lane) seen[lane] = -simsd::visible(clock[lane], birth, death);
        return seen;
    }
    static bool any(Mask mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
    static bool all(Mask mask) { return (mask[0] & mask[1] & mask[2] & mask[3]) != 0; }
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

}  // namespace simsd::attention
