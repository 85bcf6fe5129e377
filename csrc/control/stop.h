// Tokens that end a text.
#pragma once

#include "control/team.h"
#include "control/view.h"

namespace simsd::control {

// Whether the token is one of a slot's stop ids, of which negative ones are none.
SIMSD_CONTROL bool is_stop(const View<const int64_t, 1>& stop_ids, int count, int64_t token) {
    bool found = false;
    for (int e = 0; e < count; ++e) found = found || stop_ids[e] == token;
    return found && token >= 0;
}

}  // namespace simsd::control
