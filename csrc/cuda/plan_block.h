#pragma once

#include "control/plan/growth.h"
#include "control/plan/layout.h"
#include "cuda/sample_logits.h"
#include "cuda/stream.h"

namespace simsd::control {

// What is drawn for a slot's newest state, contiguous [B, L], and what tells one draw from another; `shared`, [B, K,
// L]: draws of blocks whose states share them.
struct GrowthDraws {
    sample::PerRow<float> temperature;  // [B]
    bool seeded;                        // without a seed every draw is the argmax
    int32_t *row, *position;            // [B, L]; row -1: nothing to draw
    int64_t* key;                       // [B], the part of it that the state gives
    int64_t* token;
    float *prob, *log_odds, *entropy;
    int64_t* shared_token;
    float *shared_prob, *shared_log_odds, *shared_entropy;
    int32_t* ready;      // [B, K], whether a block's are there
    Progress* progress;  // [B]
};

// What the kernels of one call share.
struct PlanWork {
    PlanParams given;
    Taken taken;
    Extent extent;
    Cut cut;
    int64_t* asked;  // rows of logits that the batch needs
    char* graphs;    // [B, graph_bytes]
    int64_t graph_bytes;
    GrowthDraws draws;  // of a call with draft_logits
    bool begins;
};

// Grows every slot's graph to its end, from what the draft says of its blocks.
void launch_grow(const PlanWork& work, Stream stream);

// Begins every graph, or goes on with what was drawn for its newest state, as far as that leads; asks for what to draw
// next.
void launch_step(PlanWork work, bool begins, Stream stream);

// Cuts the graphs to the budgets and writes the outputs.
void launch_layout(const PlanWork& work, Stream stream);

}  // namespace simsd::control
