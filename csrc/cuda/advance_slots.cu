// advance_slots: applies a walk to every slot and writes the report that the host reads.
//
// Data path: one warp per slot, two positions of each block per lane. The walk's K + 2 blocks are read once for stop
// ids, once against the proposal, and once on their way to text, state and report. Floor. Latency: B = 64 slots of
// L = 32 and K = 2 are 64 x (4 x 32 x 20 bytes in and out) = 330 kB, 0.1 us at 3.35 TB/s; a slot's chain of dependent
// trips to memory is some ten of 0.3 us each.
#include "cuda/advance_slots.h"
#include "cuda/launch.h"

namespace simsd::control {
namespace {

__global__ void __launch_bounds__(WARP, 1) advance(const AdvanceParams p) { Advance<Warp>(p, block_x()).run(); }

}  // namespace

void launch_advance(const AdvanceParams& params, Stream stream) {
    launch("advance_slots", advance, Grid{params.batch}, WARP, 0, stream, params);
}

}  // namespace simsd::control
