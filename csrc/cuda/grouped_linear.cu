// grouped_linear: rows sorted by expert, each times its expert's weight, by the kernels of thin_linear
// (linear/launch.h): a row's bits are thin_linear's. The grid has room for any partition of the rows;
// a block finds its expert on the device (linear/place.h), and one that finds none ends.
//
// Floor: the weights of the experts that have rows, once. SDAR-30B-A3B, gate and up, 128 x 1536 x 2048 in bf16: 8 of
// 128 experts, one row: 50 MB, 15 us at 3.35 TB/s; all of them, from some 64 rows of 8 experts each up: 805 MB, 240 us.
// Finding the expert costs a block two reads of offsets, one after the other, before its first copy: some 1.5 us, which
// another block of the multiprocessor fills where there are two. An expert with more rows than a tile has its weight
// read again, from L2: its row tiles are neighbours.
#include "cuda/grouped_linear.h"
#include "cuda/linear/launch.h"

namespace simsd::linear {

void launch_grouped_linear(const GroupedParams& params, Element element, Stream stream) {
    // Twice the rows that an expert has on average fit a tile: few experts need a second.
    const int64_t groups = params.rows < params.experts ? params.rows : params.experts;
    const Work work{divide_up(2 * params.rows, params.experts), params.columns * groups};
    launch_product("grouped_linear", params, element, work, stream);
}

}  // namespace simsd::linear
