#pragma once

#include <cstdint>

#include "cuda/sample_logits.h"
#include "cuda/stream.h"

namespace simsd::verify {

// Rows are those of `sample::Params`: n = b * L + i. All that has a value per sequence has it for each of its rows.
struct Params {
    sample::Params target;  // rows, token, prob, draw_logprob and, for mrs, law are set; row_index is `target_rows`
    sample::Params draft;   // mrs: rows, token (not used), law; row_index is `draft_rows`
    bool mrs;
    int32_t batch, length;              // B, L <= 64
    int32_t *target_rows, *draft_rows;  // scratch [B, L]
    double* reached;                    // scratch [B, segments] of `reached_bytes`; mrs

    sample::PerRow<int64_t> draft_ids;
    sample::PerRow<int32_t> known;
    sample::PerRow<int64_t> drafted;
    sample::PerRow<float> coin, residual;  // mrs

    int32_t* accepted;    // [B]
    int64_t* bonus;       // [B]
    int64_t* tokens;      // [B, L]
    int64_t* target_ids;  // [B, L]; target.token
    float* prob;          // [B, L]; target.prob
    float* draw_logprob;  // [B, L]; target.draw_logprob
};

int64_t reached_bytes(int64_t batch, int64_t vocabulary);

void launch_verify(const Params& params, Stream stream);

}  // namespace simsd::verify
