#pragma once

#include <cstdint>

#include "common/copies.h"
#include "cuda/denoise/rule.h"
#include "cuda/denoise/view.h"
#include "cuda/sample_logits.h"
#include "cuda/stream.h"

namespace simsd::plan {

using denoise::View;

// The graphs as they grew, from kernel to kernel: C states of every lane, in the order in which they were taken.
struct Taken {
    int32_t* size;          // [B]
    double* score;          // [B, C]; -1 for the root and where a lane has fewer
    double* reach;          // [B, C]
    uint64_t* revealed;     // [B, C]
    int32_t *block, *cost;  // [B, C]; cost in copies
    int64_t* tokens;        // [B, C, L]; -1 where masked
    int64_t* proposed;      // [B, C, L], what was drawn in the state; null where states of a block share their draws
};

// What the draft proposes: [B, K, L].
struct Proposals {
    View<const int64_t, 3> token;
    View<const float, 3> prob, log_odds, entropy;
};

struct Outputs {
    int64_t* tokens;                     // [B, R], R = (K + C) * L
    int32_t *positions, *slots, *clock;  // [B, R]
    int32_t *birth, *death;              // [B, slots]
    int64_t* states;                     // [B, C, L]
    int64_t* revealed;                   // [B, C]
    int32_t* block;                      // [B, C]
    int32_t* cleaned;                    // [B]
    float* reach;                        // [B, C]
};

struct Params {
    View<const int64_t, 2> tokens;                           // [B, L]
    View<const int64_t, 1> revealed;                         // [B]
    View<const int32_t, 1> start, step, blocks_left, depth;  // [B]
    View<const int64_t, 3> clean;                            // [B, K, L]
    Proposals given;                                         // for `clean`
    View<const float, 1> trust;                              // [B]
    View<const float, 2> power;                              // [B, K]
    denoise::Rule rule;
    int32_t batch, ahead, length, max_copies;  // B, K, L, C
    double bar, floor;                         // bar: log-odds of the threshold
    int64_t copies;                            // that the batch may have, roots aside
    int64_t mask_id, scratch, slots, stride;
    Outputs out;
};

// `draws` may be null. Given, the tokens and statistics of each state are drawn with the noise of that state, from its
// logits [B, K, L, V], with its temperature, top_k, top_p and seed, one for each lane ([B], or null for the default);
// all about rows, outputs and scratch is set here. The workspace is 16-byte aligned, in any state.
int64_t workspace_bytes(const Params& params, const sample::Params* draws);
void launch_plan(const Params& params, const sample::Params* draws, void* workspace, Stream stream);

}  // namespace simsd::plan
