// How a denoising step chooses, as parameters of a kernel.
#pragma once

#include "common/strategy.h"

namespace simsd::denoise {

struct Rule {
    Strategy strategy;
    int32_t steps;            // T
    double threshold;         // a probability or a sum of entropies in nats
    const int32_t* schedule;  // [T]
    int64_t schedule_stride;
};

}  // namespace simsd::denoise
