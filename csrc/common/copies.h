// Where plan_block puts the copies of blocks, for host and device code alike.
#pragma once

#include "common/visibility.h"

namespace simsd::plan {

inline constexpr int64_t MAX_COPIES = 512;
constexpr int COPY_ALIGNMENT = 16;

// Slots between the starts of two copies: a power of two, so that no copy straddles a power-of-two tile.
SIMSD_HOST_DEVICE constexpr int copy_stride(int64_t length) {
    int room = COPY_ALIGNMENT;
    while (room < length) room *= 2;
    return room;
}

}  // namespace simsd::plan
