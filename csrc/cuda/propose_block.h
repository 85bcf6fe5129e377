#pragma once

#include "control/propose_block.h"
#include "cuda/stream.h"

namespace simsd::control {

// What is drawn in a round, contiguous [B, L], and what tells one draw from another.
struct BlockDraws {
    ProposeParams given;
    int32_t* row;       // [B, L], of the logits; -1 where nothing is to draw
    int32_t* position;  // [B, L]
    int64_t* key;       // [B], the part of it that the block gives
    int64_t* token;     // [B, L]; these four are drawn
    float *prob, *log_odds, *entropy;
};

// Sets `row`, `position` and `key` for the first round.
void launch_prepare(const BlockDraws& draws, Stream stream);

// Takes what a round has drawn; sets `row` and `key` for the next one, if there may be one.
void launch_settle(const BlockDraws& draws, int round, Stream stream);

}  // namespace simsd::control
