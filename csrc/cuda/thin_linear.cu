// thin_linear: y = x W^T for few rows, each row's bits independent of all other rows, of N and of strides. The kernels,
// and why that holds, are in linear/halves.h and linear/floats.h.
//
// Floor: the weight once, 2 N K bytes. SDAR-8B, 4096 x 4096: 33.6 MB, 10.0 us at 3.35 TB/s; 12288 x 4096: 30 us;
// the vocabulary, 151936 x 4096: 372 us. Products: 8 rows cost 2 x 8 x N x K = 0.27 GFLOP for those 33.6 MB, nothing.
// What bounds it is bytes in flight: 20 KB per SM at 800 ns of latency. A block holds up to 96 KB of stages: 8 rows of
// 4096 x 4096 are 256 blocks, two to an SM, with 112 KB of weights on their way. From L2 come also x, once per block:
// with 16 M columns and 8 R rows per block R / (2 M) of the weight's bytes (1.25 to 1.5 of the weight in all for up to
// 16 rows, 3 for 64 rows). That bounds 64 rows: 100 MB at some 5.5 TB/s, 18 us. More than 64 rows: row tiles of one
// weight tile are neighbours, so that all but the first find it in L2. float32, 8 rows of 4096 x 4096: 67 MB, 20 us;
// 0.27 GFLOP, 4 us.
#include "cuda/linear/launch.h"
#include "cuda/thin_linear.h"

namespace simsd::linear {

void launch_thin_linear(const Params& params, Element element, Stream stream) {
    launch_product("thin_linear", params, element, {params.rows, params.columns}, stream);
}

}  // namespace simsd::linear
