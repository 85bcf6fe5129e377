// The 16-bit floating types as kernels store them, with the conversions that kernels need, on host and device alike.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SIMSD_ANYWHERE __host__ __device__ __forceinline__
#else
#define SIMSD_ANYWHERE inline
#endif

namespace simsd {

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

SIMSD_ANYWHERE float bits_as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

SIMSD_ANYWHERE uint32_t float_as_bits(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

SIMSD_ANYWHERE float to_float(float value) { return value; }

SIMSD_ANYWHERE float to_float(Bfloat16 value) { return bits_as_float(static_cast<uint32_t>(value.bits) << 16); }

SIMSD_ANYWHERE float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
    if (exponent == 31) return bits_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return bits_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
#endif
}

// Rounds to the nearest, ties to even. `T` is float, Bfloat16 or Float16.
template <typename T>
SIMSD_ANYWHERE T from_float(float value);

template <>
SIMSD_ANYWHERE float from_float<float>(float value) {
    return value;
}

template <>
SIMSD_ANYWHERE Bfloat16 from_float<Bfloat16>(float value) {
#ifdef __CUDA_ARCH__
    Bfloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = float_as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
SIMSD_ANYWHERE Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
    Float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = float_as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or more
    if (magnitude < 0x38800000u) {                                                 // subnormal: units of 2^-24
        const float units = bits_as_float(magnitude) * 0x1p24f;
        const float rounded = (units + 0x1p23f) - 0x1p23f;  // to an integer, ties to even
        return {static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded))};
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
#endif
}

// Two values in one register, `low` in the lower half, as the tensor cores take them. `T` is Bfloat16 or Float16.
template <typename T>
SIMSD_ANYWHERE uint32_t pack(T low, T high) {
    return static_cast<uint32_t>(high.bits) << 16 | low.bits;
}

template <typename T>
SIMSD_ANYWHERE uint32_t pack(float low, float high);

template <>
SIMSD_ANYWHERE uint32_t pack<Bfloat16>(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return pack(from_float<Bfloat16>(low), from_float<Bfloat16>(high));
#endif
}

template <>
SIMSD_ANYWHERE uint32_t pack<Float16>(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return pack(from_float<Float16>(low), from_float<Float16>(high));
#endif
}

template <typename T>
SIMSD_ANYWHERE float low_of(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed)});
}

template <typename T>
SIMSD_ANYWHERE float high_of(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed >> 16)});
}

}  // namespace simsd
