// store_kv: scatters a forward's K and V [B, Hkv, R, D] to cache slots [B, Hkv, C, D].
#include "common/arguments/store_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "common/strided.h"

namespace simsd {
namespace {

constexpr const char* OP = "store_kv";

struct Shape {
    int64_t batch, heads, rows, dim;
};

template <typename T>
void scatter(const Shape& shape, const Tensor& source, const Tensor& cache, const Tensor& slots) {
    const auto from = strided_const<T, 4>(source);  // [B, Hkv, R, D]
    const auto to = strided_mutable<T, 4>(cache);   // [B, Hkv, C, D]
    const auto slot = strided_const<int32_t, 2>(slots);
    const bool rows_are_contiguous = from.strides[3] == 1 && to.strides[3] == 1;
    const auto copy_heads = [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            const int64_t b = index / shape.heads, h = index % shape.heads;
            for (int64_t r = 0; r < shape.rows; ++r) {
                const int32_t c = *slot.at(b, r);
                if (c < 0) continue;
                const T* from_row = from.at(b, h, r);
                T* to_row = to.at(b, h, c);
                if (rows_are_contiguous) {
                    std::memcpy(to_row, from_row, shape.dim * sizeof(T));
                } else {
                    for (int64_t d = 0; d < shape.dim; ++d) to_row[d * to.strides[3]] = from_row[d * from.strides[3]];
                }
            }
        }
    };
    // Below some 64k elements a thread's start costs more than its share of the copy.
    const int64_t per_head = shape.rows * shape.dim;
    const int64_t grain = 1 + 65536 / (per_head + 1);
    if (shape.batch * shape.heads <= grain) {
        copy_heads(0, shape.batch * shape.heads);
    } else {
        torch::stable::parallel_for(0, shape.batch * shape.heads, grain, copy_heads);
    }
}

void store_kv(const Tensor k, const Tensor v, Tensor k_cache, Tensor v_cache, const Tensor slots) {
    check_store_kv(check_cpu, k, v, k_cache, v_cache, slots);
    const int64_t batch = k.size(0), rows = k.size(2), capacity = k_cache.size(2);
    const Shape shape{batch, k.size(1), rows, k.size(3)};
    if (k.numel() == 0) return;

    // Before anything is written, so that a bad slot leaves both caches as they were.
    const auto slot = strided_const<int32_t, 2>(slots);
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t r = 0; r < rows; ++r) {
            const int32_t c = *slot.at(b, r);
            check(c >= -1 && c < capacity, OP, ": slots must be -1 or in [0, ", capacity, "), got ", c);
        }
    }

    const auto store = [&](auto element) {
        using T = decltype(element);
        scatter<T>(shape, k, k_cache, slots);
        scatter<T>(shape, v, v_cache, slots);
    };
    switch (k.element_size()) {
        case 1:
            return store(uint8_t{});
        case 2:
            return store(uint16_t{});
        case 4:
            return store(uint32_t{});
        case 8:
            return store(uint64_t{});
        default:
            check(false, OP, ": k must have elements of 1, 2, 4 or 8 bytes, got ", dtype_text(k.scalar_type()));
    }
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("store_kv", TORCH_BOX(&simsd::store_kv)); }
