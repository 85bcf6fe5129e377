#pragma once

#include "cuda/linear/params.h"
#include "cuda/stream.h"

namespace simsd::linear {

// There are rows, columns and experts.
void launch_grouped_linear(const GroupedParams& params, Element element, Stream stream);

}  // namespace simsd::linear
