#pragma once

#include <cstdint>

#include "cuda/denoise/rule.h"
#include "cuda/denoise/view.h"
#include "cuda/stream.h"

namespace simsd::denoise {

struct RevealParams {
    View<int64_t, 2> tokens;                       // [B, L], updated
    View<int64_t, 1> revealed;                     // [B], updated
    View<int32_t, 2> step_map;                     // [B, L], updated
    View<const int64_t, 2> proposal;               // [B, L]
    View<const float, 2> prob, log_odds, entropy;  // [B, L]
    View<const int32_t, 1> step;                   // [B]
    int64_t* newly;                                // out: [B]
    Rule rule;
    int64_t batch;
    int32_t length;  // L <= MAX_BLOCK_LENGTH
};

void launch_reveal(const RevealParams& params, Stream stream);

}  // namespace simsd::denoise
