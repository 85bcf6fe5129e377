#pragma once

namespace simsd {

using Stream = void*;  // a cudaStream_t, for headers that know nothing of CUDA

}  // namespace simsd
