#pragma once

#include "cuda/linear/params.h"
#include "cuda/stream.h"

namespace simsd::linear {

void launch_thin_linear(const Params& params, Element element, Stream stream);

}  // namespace simsd::linear
