// What the bindings of CUDA kernels share: device and stream, outputs, and where an op registers.
//
// With SIMSD_EMULATE the same bindings serve CPU tensors, as torch.ops.simsd_emulated.*.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "common/check.h"
#include "cuda/stream.h"

#ifdef SIMSD_EMULATE
#define SIMSD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(simsd_emulated, CPU, m)
#else
#define SIMSD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(simsd, CUDA, m)
#endif

namespace simsd {

// Makes the device of `tensor` the current one while it lives, and knows torch's current stream there.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& tensor);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    Stream stream() const { return stream_; }

  private:
    int previous_ = 0;
    bool switched_ = false;
    Stream stream_ = nullptr;
};

// Throws unless `tensor` is on the CUDA device of `first`.
void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first);

// A contiguous tensor on the device of `like`, uninitialised (NaN bytes in the emulation).
Tensor allocate_like(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type);
inline Tensor allocate_like(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
    return allocate_like(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

// How many multiprocessors the device of `tensor` has: for choosing a grid, never for choosing an order of summation.
int multiprocessors(const Tensor& tensor);

}  // namespace simsd
