#pragma once

#include <cstdint>

namespace simsd::intervals {

// Words of the plan for B x (group * Lq) packed rows and B x Lk keys: words_of of simsd_kernels/attention_plan/size.py
// says the same to a compiler.
inline int64_t plan_words(int64_t batch, int64_t rows, int64_t keys) {
    const int64_t groups = batch * ((keys + 2047) / 2048), tile = rows <= 64 ? 64 : 128;
    return 4 + 70 * groups * ((rows + tile - 1) / tile) + 128 * groups;
}

}  // namespace simsd::intervals
