// Tensors as the views that control ops take, checked on the way. A control op's CPU kernel and its CUDA binding make
// their parameters by the same function of control/arguments/.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "common/arguments/expect.h"
#include "control/step.h"

namespace simsd::control {

template <typename T>
constexpr ScalarType type_of() {
    using Value = std::remove_const_t<T>;
    if constexpr (std::is_same_v<Value, int64_t>) {
        return ScalarType::Long;
    } else if constexpr (std::is_same_v<Value, int32_t>) {
        return ScalarType::Int;
    } else {
        static_assert(std::is_same_v<Value, float>);
        return ScalarType::Float;
    }
}

// How slots draw; all but the temperature may be without data.
struct Sampling {
    View<const float, 1> temperature;  // [B]
    View<const int32_t, 1> top_k;      // [B]
    View<const float, 1> top_p;        // [B]
    View<const int64_t, 1> seed;       // [B]
};

// The tensors of one call, which belong on the device of `first`.
struct [[gnu::visibility("hidden")]] Arguments {  // as torch's Tensor is
    Expect expect;

    Arguments(const char* op, DeviceCheck check_device, const Tensor& first) : expect{op, check_device, first} {}

    // Throws unless dtype, device and shape (-1: any size; `letters` is the shape in words) are these. `T` is const
    // where the op only reads.
    template <typename T, size_t Dims>
    View<T, Dims> view(const char* name, const Tensor& tensor, const int64_t (&shape)[Dims],
                       const char* letters) const {
        check_shape(expect.op, name, tensor, shape, Dims, letters);
        check_dtype(expect.op, name, tensor, {type_of<T>()});
        expect.check_device(expect.op, name, tensor, expect.first);
        View<T, Dims> out{};
        if constexpr (std::is_const_v<T>) {
            out.data = static_cast<T*>(tensor.const_data_ptr());
        } else {
            out.data = static_cast<T*>(tensor.mutable_data_ptr());
        }
        for (size_t axis = 0; axis < Dims; ++axis) out.strides[axis] = tensor.stride(axis);
        return out;
    }

    // Without data where the tensor was left out.
    template <typename T, size_t Dims>
    View<T, Dims> view(const char* name, const std::optional<Tensor>& tensor, const int64_t (&shape)[Dims],
                       const char* letters) const {
        return tensor ? view<T>(name, *tensor, shape, letters) : View<T, Dims>{};
    }

    Rules rules(const Tensor& schedule, const Tensor& steps, const Tensor& strategy, const Tensor& threshold,
                const std::optional<Tensor>& sub_blocks, int64_t batch, int64_t length) const {
        return {view<const int32_t>("strategy", strategy, {batch}, "[B]"),
                view<const float>("threshold", threshold, {batch}, "[B]"),
                view<const int32_t>("schedule", schedule, {batch, length}, "[B, L]"),
                view<const int32_t>("steps", steps, {batch}, "[B]"),
                view<const int64_t>("sub_blocks", sub_blocks, {batch}, "[B]")};
    }

    Sampling sampling(const Tensor& temperature, const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                      const std::optional<Tensor>& seed, int64_t batch) const {
        return {view<const float>("temperature", temperature, {batch}, "[B]"),
                view<const int32_t>("top_k", top_k, {batch}, "[B]"), view<const float>("top_p", top_p, {batch}, "[B]"),
                view<const int64_t>("seed", seed, {batch}, "[B]")};
    }

    void block_length(int64_t length) const {
        check(length <= MAX_BLOCK_LENGTH, expect.op, ": L must be at most ", MAX_BLOCK_LENGTH, ", got ", length);
    }
};

// An output, which the op has allocated.
template <typename T>
T* data_of(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace simsd::control
