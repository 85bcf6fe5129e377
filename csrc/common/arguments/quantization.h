// The scale of an int8 weight in thin_linear and grouped_linear.
#pragma once

#include <initializer_list>
#include <optional>

#include "common/arguments/expect.h"

namespace simsd {

// The weight's dtype, and the scale, which an int8 weight has and no other. `letters` is the scale's shape in words.
inline void check_quantization(const char* op, DeviceCheck check_device, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& scale, std::initializer_list<int64_t> shape,
                               const char* letters) {
    check_dtype(op, "weight", weight, {x.scalar_type(), ScalarType::Char});
    if (weight.scalar_type() != ScalarType::Char) {
        check(!scale, op, ": scale must be left out unless weight is torch.int8, got one with ",
              dtype_text(weight.scalar_type()));
        return;
    }
    check(scale.has_value(), op, ": scale must be a tensor where weight is torch.int8, got NoneType");
    check_shape(op, "scale", *scale, shape, letters);
    if (x.scalar_type() == ScalarType::Float) {
        check_dtype(op, "scale", *scale, {ScalarType::Float});
    } else {
        check_dtype(op, "scale", *scale, {ScalarType::Float, x.scalar_type()});
    }
    check_device(op, "scale", *scale, x);
}

}  // namespace simsd
