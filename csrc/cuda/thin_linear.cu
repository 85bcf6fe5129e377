// thin_linear: y = x W^T, each row's bits independent of all other rows, of N and of strides. The kernels, and why that
// holds, are in linear/tiles.h, thin.h, wide.h and floats.h; which of them serves, in linear/launch.h.
//
// Floor: the weight once, 2 N K bytes. SDAR-8B, 4096 x 4096: 33.6 MB, 10.0 us at 3.35 TB/s; 12288 x 4096: 30 us;
// the vocabulary, 151936 x 4096: 372 us. Products: 8 rows cost 2 x 8 x N x K = 0.27 GFLOP for those 33.6 MB, nothing;
// 256 rows 8.6 GFLOP, 14 us at 62% of 990 TFLOPS, which is what mma.sync reaches; 2,048 rows 69 GFLOP, 110 us.
//
// Few rows. What bounds them is bytes in flight: 20 KB per SM at 800 ns of latency. A block holds up to 96 KB of
// stages: 8 rows of 4096 x 4096 are 256 blocks, two to an SM, with 112 KB of weights on their way.
//
// More rows. From L2, at some 5.5 TB/s, come the weight once per row tile and x once per column tile: tiles of R rows
// and C columns take 2 M N K (1 / R + 1 / C) bytes. 24576 x 4096 (201 MB, 60 us), 64 rows: 604 MB with tiles of 64 x
// 32, 110 us; 302 MB with 64 x 128, 55 us. 256 rows: 805 MB with 128 x 128, 146 us, as a BLAS has it that does not
// share tiles between SMs. Wide tiles are few where N is small: 4096 x 4096 are 128 blocks for 128 rows of 64 x 64 (134
// MB, 24 us) and for 256 rows of 64 x 128 (201 MB, 37 us). Row tiles of one weight tile are neighbours, so that all but
// the first find it in L2, and HBM gives it once.
//
// An int8 weight is half the bytes: for few rows that is the time. Its conversion to 16 bits (int8.h) is the issue
// slots' work: a warp's turn of 8 rows x 16 columns x 128 k, 2 KB of int8, is some 285 instructions on sm_90 (16 bits:
// 173 for 4 KB; cuda_counts), where a multiprocessor's share of 3.35 TB/s leaves room for some 560. Many rows are no
// faster than of a 16-bit weight, and slower where products bound them: a wide tile takes 2.7 times the instructions.
//
// float32, 8 rows of 4096 x 4096: 67 MB, 20 us; 0.27 GFLOP, 4 us. Its tiles stay 8 rows high: 256 rows read the weight
// 32 times from L2, 2.1 GB, 390 us for the 145 us that the FMAs take.
#include "cuda/linear/launch.h"
#include "cuda/thin_linear.h"

namespace simsd::linear {

void launch_thin_linear(const Params& params, Element element, Stream stream) {
    launch_product("thin_linear", params, element, {params.rows, params.columns}, stream);
}

}  // namespace simsd::linear
