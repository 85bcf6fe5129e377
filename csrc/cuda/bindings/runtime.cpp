#include "cuda/bindings/runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <string>
#include <vector>

#ifdef SIMSD_EMULATE
#include "cuda/emulation/launch.h"
#else
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#endif

namespace simsd {

#ifdef SIMSD_EMULATE

OnDevice::OnDevice(const Tensor&) {}
OnDevice::~OnDevice() {}

void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor&) {
    check(tensor.is_cpu(), op, ": ", name, " must be on the device of the other tensors");
}

int multiprocessors(const Tensor&) { return emulation::multiprocessors(); }

#else

namespace {

void require(cudaError_t error) { check(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// Torch's current stream. The library also loads where torch has no CUDA, so it does not link to libtorch_cuda.
Stream current_stream(int device) {
    using Query = AOTITorchError (*)(int32_t, void**);
    static const auto query = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Query>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    check(query != nullptr, "CUDA tensors were given, but this torch has no CUDA");
    void* stream = nullptr;
    check(query(device, &stream) == AOTI_TORCH_SUCCESS, "torch did not tell its stream on CUDA device ", device);
    return stream;
}

}  // namespace

OnDevice::OnDevice(const Tensor& tensor) {
    // What throws comes before the switch: a constructor that throws has no destructor to switch back.
    const int device = tensor.get_device_index();
    stream_ = current_stream(device);
    require(cudaGetDevice(&previous_));
    if (previous_ == device) return;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) cudaSetDevice(previous_);  // it may have switched and failed to initialise
    require(error);
    switched_ = true;
}

OnDevice::~OnDevice() {
    if (switched_) cudaSetDevice(previous_);
}

void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
    check(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, ": ", name,
          " must be on the CUDA device of the other tensors");
}

int multiprocessors(const Tensor& tensor) {
    int count = 0;
    require(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
    return count;
}

#endif

Tensor allocate_like(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
    Tensor out = torch::stable::new_empty(like, sizes, type);
#ifdef SIMSD_EMULATE
    std::memset(out.mutable_data_ptr(), 0xff, out.numel() * out.element_size());
#endif
    return out;
}

}  // namespace simsd
