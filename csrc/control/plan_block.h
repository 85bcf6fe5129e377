// plan_block: from drafted blocks to the rows of one exact verification forward. A slot's graph of states grows
// (plan/growth.h), the graphs are cut to what the batch may have (plan/cut.h) and laid out as rows (plan/layout.h).
#pragma once

#include "common/visibility.h"
#include "control/step.h"

namespace simsd::control {

// KV slots between the starts of two states' copies of a block: a power of two, so that none straddles a power-of-two
// tile.
SIMSD_HOST_DEVICE constexpr int copy_stride(int length) {
    int room = 16;
    while (room < length) room *= 2;
    return room;
}

// What a draft says of its blocks, [K, L] for each slot.
struct Drafted {
    View<const int64_t, 3> token;
    View<const float, 3> prob, log_odds, entropy;
};

// States that the target has seen, M of each slot, and what it drew there; all may be without data.
struct Seen {
    View<const int32_t, 2> block, exact;           // [B, M]
    View<const int64_t, 2> revealed;               // [B, M]
    View<const int64_t, 3> tokens;                 // [B, M, L]
    View<const float, 3> prob, log_odds, entropy;  // [B, M, L]
    View<const float, 1> sharpness;                // [B]
    View<const int32_t, 3> rows;                   // [B, M, L], of logits; where each state has draws of its own
    View<const float, 3> shift;                    // [B, M, L]
    View<const float, 4> pair;                     // [B, M, L, L]
    int32_t count;                                 // M
};

// R = (P + K + C) * L: pending tokens, finished blocks as drafted, states.
struct PlanOutputs {
    int64_t* tokens;                     // [B, R]
    int32_t *positions, *slots, *clock;  // [B, R]
    int32_t *birth, *death;              // [B, S]
    int64_t* states;                     // [B, C, L]
    int64_t* state_revealed;             // [B, C]
    int32_t* block;                      // [B, C]
    int32_t* draft_blocks_in_rows;       // [B]
    int64_t* logits_index;               // [N]
    int32_t* state_rows;                 // [B, C, L]
};

struct PlanParams {
    View<const int64_t, 2> text;                       // [B, T]
    View<const int64_t, 1> revealed;                   // [B]
    View<const int32_t, 1> start, end, step, kv_len;   // [B]
    View<const int32_t, 1> proposal_depth, draft_end;  // [B]
    Drafted drafted;                                   // [B, K, L]
    Seen seen;
    View<const int32_t, 1> peeks;                            // [B], may be without data
    View<const float, 1> draft_calibration, min_visit_prob;  // [B]
    View<const float, 2> order_sharpness;                    // [B, K]
    View<const int32_t, 1> row_budget;                       // [1]
    Rules rules;
    int64_t batch, text_length, mask_id, logits_rows;  // B, T, -, N
    int32_t blocks, length, pending, max_states;       // K, L, P, C
    int32_t scratch, kv_slots, stride;                 // -, S, -
    PlanOutputs out;

    SIMSD_HOST_DEVICE int32_t groups() const { return pending + blocks + max_states; }  // of L rows
};

// The states that were taken of each slot's graph, the current one first. What the outputs hold of them (states,
// state_revealed, block) stands there.
struct Taken {
    int32_t* size;      // [B]
    double* score;      // [B, C], falling along a slot
    int32_t* blocks;    // [B, C]: blocks of rows that a state and those before it take, the current one aside
    int32_t* logits;    // [B, C]: rows of logits, likewise
    int64_t* proposed;  // [B, C, L]: what is proposed in a state; null where that is draft_tokens in each
};

}  // namespace simsd::control
