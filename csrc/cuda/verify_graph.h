#pragma once

#include "control/verify_graph.h"
#include "cuda/stream.h"

namespace simsd::control {

// What the target draws at every position of every state, contiguous [B, C, L], and what tells one draw from another.
struct StateDraws {
    VerifyParams given;
    int32_t* row;          // [B, C, L], of the logits; -1 where no walk needs the draw
    int32_t* draw_of_row;  // [N], the way back; set for rows that a draw needs
    int32_t* position;     // [B, C, L]
    int64_t* key;          // [B, C], the part of it that the state gives
    int64_t* token;        // [B, C, L]; these five are drawn where `row` is not -1
    float *prob, *log_odds, *entropy, *logprob;
};

// Sets all of `draws` but what is drawn; that becomes the draw of a row with nothing finite.
void launch_prepare(const StateDraws& draws, Stream stream);

void launch_walk(const StateDraws& draws, Stream stream);

}  // namespace simsd::control
