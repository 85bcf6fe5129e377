// A row's columns in units of 16 bytes, as floats: how kernels read, round, compute and write them.
#pragma once

#include "cuda/device.h"

namespace simsd {

template <typename T>
constexpr int UNIT = 16 / sizeof(T);  // columns in 16 bytes

// Columns of one unit, as floats.
template <typename T>
struct Columns {
    float x[UNIT<T>] = {};
};

// To the nearest of T and back, two at a time as the hardware converts them.
template <typename T>
SIMSD_DEVICE void round_to(Columns<T>& columns) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < UNIT<T>; i += 2) {
            const uint32_t pair = pack<T>(columns.x[i], columns.x[i + 1]);
            columns.x[i] = low_of<T>(pair);
            columns.x[i + 1] = high_of<T>(pair);
        }
    }
}

template <typename T>
SIMSD_DEVICE Columns<T> times(const Columns<T>& a, const Columns<T>& b) {
    Columns<T> out;
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) out.x[i] = product(a.x[i], b.x[i]);
    round_to<T>(out);
    return out;
}

template <typename T>
SIMSD_DEVICE Columns<T> plus(const Columns<T>& a, const Columns<T>& b) {
    Columns<T> out;
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) out.x[i] = sum(a.x[i], b.x[i]);
    round_to<T>(out);
    return out;
}

template <typename T>
SIMSD_DEVICE Columns<T> negated(Columns<T> a) {
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) a.x[i] = -a.x[i];
    return a;
}

template <typename T>
SIMSD_DEVICE T element_of(const Bytes16& bytes, int i) {
    const uint32_t word = bytes.words[i * static_cast<int>(sizeof(T)) / 4];
    if constexpr (sizeof(T) == 4) {
        return bits_as_float(word);
    } else {
        return T{static_cast<uint16_t>(i % 2 ? word >> 16 : word)};
    }
}

template <typename T>
SIMSD_DEVICE Columns<T> columns_of(const Bytes16& bytes) {
    Columns<T> out;
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) out.x[i] = to_float(element_of<T>(bytes, i));
    return out;
}

// `count` columns, at most a unit; those past them are 0. With Vector they are a whole unit, contiguous and aligned.
// With Written the kernel writes them too.
template <typename T, bool Vector, bool Written = false>
SIMSD_DEVICE Columns<T> load_columns(const void* row, int64_t stride, int first, int count) {
    const T* from = static_cast<const T*>(row) + first * stride;
    if constexpr (Vector) {
        return columns_of<T>(Written ? load_16_written(from) : load_16(from));
    } else {
        Columns<T> out;
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            if (i < count) out.x[i] = to_float(from[i * stride]);
        }
        return out;
    }
}

template <typename T, bool Vector>
SIMSD_DEVICE void store_columns(const Columns<T>& columns, T* row, int64_t stride, int first, int count) {
    T* to = row + first * stride;
    if constexpr (Vector) {
        Bytes16 bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4) {
                bytes.words[i] = float_as_bits(columns.x[i]);
            } else {
                bytes.words[i] = pack<T>(columns.x[2 * i], columns.x[2 * i + 1]);
            }
        }
        store_16(to, bytes);
    } else {
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            if (i < count) to[i * stride] = from_float<T>(columns.x[i]);
        }
    }
}

// In order of columns.
template <typename T>
SIMSD_DEVICE float squares(const Columns<T>& columns, float total) {
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) total = fused(columns.x[i], columns.x[i], total);
    return total;
}

// Whether every row of a tensor begins at a multiple of 16 bytes and is contiguous.
template <typename T, int Dims>
bool aligned(const void* data, const int64_t (&strides)[Dims]) {
    bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[Dims - 1] == 1;
    for (int axis = 0; axis < Dims - 1; ++axis) fits = fits && strides[axis] % UNIT<T> == 0;
    return fits;
}

}  // namespace simsd
