// Starts kernels. A kernel takes one struct of parameters by value; an error is thrown as std::runtime_error, naming
// the op.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/architectures.h"
#include "cuda/device.h"
#include "cuda/stream.h"

#ifdef SIMSD_EMULATE
#include "cuda/emulation/launch.h"
#endif

namespace simsd {

struct Grid {
    int64_t x;      // up to 2^31 - 1
    int64_t y = 1;  // up to 65535
    int64_t z = 1;  // up to 65535
};

#ifndef SIMSD_EMULATE
inline void check_cuda(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    std::string message = std::string(op) + ": " + cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        message += "; the cuda backend was built for compute capability " + architectures({__CUDA_ARCH_LIST__});
        message += ": rebuild with SIMSD_CUDA_ARCHS, or use backend=\"triton\" or \"reference\"";
    }
    throw std::runtime_error(message);
}
#endif

// One launch of `threads` threads per block, a multiple of 32, with `shared_bytes` of shared memory for `Shared`.
template <typename Params>
void launch(const char* op, void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream stream,
            const Params& params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
        throw std::runtime_error(std::string(op) + ": too large for one launch: " + std::to_string(grid.x) + " x " +
                                 std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks");
    }
#ifdef SIMSD_EMULATE
    (void)stream;
    emulation::launch(op, reinterpret_cast<const void*>(kernel), grid.x, grid.y, grid.z, threads, shared_bytes,
                      [&] { kernel(params); });
#else
    if (shared_bytes > 48 * 1024) {
        check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    void* arguments[] = {const_cast<Params*>(&params)};
    check_cuda(op, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(threads), arguments,
                                    shared_bytes, static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace simsd
