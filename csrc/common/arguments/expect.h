// What the argument checks of all ops are made of. An op's CPU kernel and its CUDA binding check by the same function
// of this folder; what only one of them can tell or serve it checks itself.
#pragma once

#include <initializer_list>
#include <optional>

#include "common/check.h"
#include "common/element.h"

namespace simsd {

// Throws unless a kernel can read `tensor` along with `first`: check_cpu, or check_same_device.
using DeviceCheck = void (*)(const char* op, const char* name, const Tensor& tensor, const Tensor& first);

// Checks the tensors of one call, which belong on the device of `first`; an optional one may be left out.
struct [[gnu::visibility("hidden")]] Expect {  // as torch's Tensor is
    const char* op;
    DeviceCheck check_device;
    const Tensor& first;

    void operator()(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> types,
                    std::initializer_list<int64_t> shape, const char* letters) const {
        check_shape(op, name, tensor, shape, letters);
        check_dtype(op, name, tensor, types);
        check_device(op, name, tensor, first);
    }

    void operator()(const char* name, const std::optional<Tensor>& tensor, std::initializer_list<ScalarType> types,
                    std::initializer_list<int64_t> shape, const char* letters) const {
        if (tensor) (*this)(name, *tensor, types, shape, letters);
    }

    // The mask that simsd_kernels.banned_mask makes for so many ids; it may be left out.
    void banned(const std::optional<Tensor>& tensor, int64_t vocabulary) const {
        if (!tensor) return;
        const int64_t words = (vocabulary + 31) / 32;
        check(tensor->scalar_type() == ScalarType::Int && tensor->dim() == 1 && tensor->size(0) == words, op,
              ": banned must be torch.int32 [", words, "], as simsd_kernels.banned_mask(ids, ", vocabulary,
              ") makes it, got ", dtype_text(tensor->scalar_type()), " ", shape_text(*tensor));
        check_device(op, "banned", *tensor, first);
    }

    // `shape` ends with the vocabulary.
    void logits(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                const char* letters) const {
        (*this)(name, tensor, FLOATS, shape, letters);
        check(tensor.size(tensor.dim() - 1) > 0, op, ": ", name, " must have at least one vocabulary entry, got ",
              shape_text(tensor));
    }
};

}  // namespace simsd
