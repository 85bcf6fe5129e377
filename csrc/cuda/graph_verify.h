#pragma once

#include <cstdint>

#include "cuda/denoise/rule.h"
#include "cuda/denoise/view.h"
#include "cuda/stream.h"

namespace simsd::graph {

using denoise::View;

// The copied states, as plan_block lays them out.
struct Copies {
    View<const int32_t, 3> rows;      // [B, C, L], of the logits
    View<const int64_t, 3> states;    // [B, C, L]
    View<const int64_t, 2> revealed;  // [B, C]
    View<const int32_t, 2> block;     // [B, C]
    int64_t batch;
    int32_t copies, length;  // C; L <= MAX_BLOCK_LENGTH
};

// What tells one draw of the target from another.
struct KeyParams {
    Copies given;
    View<const int32_t, 1> start;  // [B]
    int32_t* row;                  // out: [B, C, L], -1 where no walk needs the draw
    int32_t* position;             // out: [B, C, L]
    int64_t* set;                  // out: [B, C], or nullptr where noise is not keyed by it
};

struct WalkParams {
    Copies given;
    // What the target draws at every position of every copy, contiguous [B, C, L]; set where `KeyParams::row` is not
    // -1.
    const int64_t* token;
    const float *token_prob, *log_odds, *entropy;

    View<const int64_t, 3> clean;                 // [B, K, L]
    View<const int32_t, 1> cleaned, depth, step;  // [B]
    View<const int32_t, 2> step_map, origin;      // [B, L]
    View<const float, 2> prob;                    // [B, L]
    denoise::Rule rule;
    int32_t ahead;       // K
    int32_t logit_rows;  // N

    // Outputs, contiguous.
    int32_t* progress;                   // [B, 7]
    int64_t* revealed_out;               // [B]
    int64_t* tokens_out;                 // [B, K + 2, L]
    int32_t *step_map_out, *origin_out;  // [B, K + 2, L]
    float* prob_out;                     // [B, K + 2, L]
};

void launch_keys(const KeyParams& params, Stream stream);
void launch_walk(const WalkParams& params, Stream stream);

}  // namespace simsd::graph
