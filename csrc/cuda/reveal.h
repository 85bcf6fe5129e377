#pragma once

#include "control/reveal.h"
#include "cuda/stream.h"

namespace simsd::control {

void launch_reveal(const RevealParams& params, Stream stream);

}  // namespace simsd::control
