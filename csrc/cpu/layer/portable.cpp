// Row loops for any CPU: 4 lanes of the compiler's own vectors.
#define SIMSD_LANES 4
#include "cpu/capability.h"
#include "cpu/layer/kernel.h"

namespace simsd::layer {

const Kernels& portable_kernels() { return KERNELS; }

const Kernels& kernels() {
    switch (capability()) {
#if defined(__x86_64__)
        case Capability::avx512:
            return avx512_kernels();
        case Capability::avx2:
            return avx2_kernels();
#endif
        default:
            return portable_kernels();
    }
}

}  // namespace simsd::layer
