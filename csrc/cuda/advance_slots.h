#pragma once

#include "control/advance_slots.h"
#include "cuda/stream.h"

namespace simsd::control {

void launch_advance(const AdvanceParams& params, Stream stream);

}  // namespace simsd::control
