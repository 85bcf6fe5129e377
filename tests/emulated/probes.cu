// Small kernels that use, or misuse, one primitive each: what the emulation makes of them is printed.
//   probes NAME [SCHEDULE]
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/warp.h"

using namespace simsd;

struct Params {
    float* out;
    const float* in;
};

__global__ void lanes_part_ways(const Params) {
    if (lane_index() < 16) {
        shuffle(1, 0);
    } else {
        ballot(true);
    }
}

__global__ void some_lanes_stay_away(const Params) {
    if (lane_index() < 16) shuffle(1, 0);
}

__global__ void a_warp_skips_the_barrier(const Params) {
    if (warp_index() == 0) block_barrier();
}

__global__ void waits_for_a_block_behind_it(const Params p) {
    if (thread_index() == 0) wait_for(reinterpret_cast<const int32_t*>(p.out), 1);
}

__global__ void writes_past_a_shared_array(const Params) {
    Shared shared;
    float* first = shared.take<float>(64);
    shared.take<float>(64);
    first[thread_index() + 1] = 1.0f;  // 64 threads
    block_barrier();
}

__global__ void takes_more_than_launched(const Params) {
    Shared shared;
    shared.take<float>(1 << 16);
}

__global__ void copies_to_a_misaligned_place(const Params p) {
    Shared shared;
    float* array = shared.take<float>(64);
    copy_async_16(array + 1, p.in);
}

// Every thread reads its neighbour's element.
template <bool Waits, bool Meets>
__global__ void exchange(const Params p) {
    Shared shared;
    float* array = shared.take<float>(256);
    copy_async_16(array + 4 * thread_index(), p.in + 4 * thread_index());
    copy_commit();
    if (Waits) copy_wait<0>();
    if (Meets) block_barrier();
    const int neighbour = (thread_index() + WARP) % thread_count();
    p.out[thread_index()] = array[4 * neighbour];
}

__global__ void totals(const Params p) {
    const float lane = static_cast<float>(lane_index());
    const float total = warp_sum(lane), most = warp_max(lane), least = warp_min(lane);
    const int voters = block_count(thread_index() % 3 == 0);
    p.out[thread_index()] = total + 1000.0f * most + 100000.0f * least + static_cast<float>(voters) * 0.5f;
}

__global__ void last_block_adds_up(const Params p) {
    auto* arrived = reinterpret_cast<int32_t*>(p.out + 1);
    p.out[2 + block_x()] = static_cast<float>(block_x() + 1);
    device_fence();
    Shared shared;
    int* last = shared.take<int>(1);
    if (thread_index() == 0) *last = atomic_add(arrived, 1) == blocks_x() - 1;
    block_barrier();
    if (*last == 0 || thread_index() != 0) return;
    float sum = 0.0f;
    for (int i = 0; i < blocks_x(); ++i) sum += load_fresh(p.out + 2 + i);
    p.out[0] = sum;
}

// c[16][8] = a[16][16] b[16][8] for a row-major at `in`, b row-major behind it, through shared memory and ldmatrix.
__global__ void multiplies(const Params p) {
    Shared shared;
    Bfloat16* a = shared.take<Bfloat16>(256);
    Bfloat16* b = shared.take<Bfloat16>(256);  // rows of 16, the last eight columns unused
    for (int i = lane_index(); i < 256; i += WARP) a[i] = from_float<Bfloat16>(p.in[i]);
    for (int i = lane_index(); i < 128; i += WARP) b[i / 8 * 16 + i % 8] = from_float<Bfloat16>(p.in[256 + i]);
    for (int i = lane_index(); i < 128; i += WARP) b[i / 8 * 16 + 8 + i % 8] = from_float<Bfloat16>(0.0f);
    block_barrier();
    uint32_t from_a[4], from_b[4];
    const int lane = lane_index();
    load_matrices(from_a, a + (lane % 16) * 16 + lane / 16 * 8);
    load_matrices_transposed(from_b, b + (lane % 16) * 16 + lane / 16 * 8);
    float c[4] = {};
    multiply_add<Bfloat16>(c, from_a, from_b[0], from_b[1]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

// The fragments one by one, as the PTX manual numbers them ("Matrix fragments for mma.m16n8k16"): element i of lane
// l is in[...] by its own row and column, whatever `multiplies` does.
__global__ void multiplies_fragments(const Params p) {
    const int group = lane_index() / 4, in_group = lane_index() % 4;
    Bfloat16 a[8], b[4];
    for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[i] = from_float<Bfloat16>(p.in[row * 16 + column]);
    }
    for (int i = 0; i < 4; ++i) {
        const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        b[i] = from_float<Bfloat16>(p.in[256 + row * 8 + group]);
    }
    const uint32_t packed[4] = {pack(a[0], a[1]), pack(a[2], a[3]), pack(a[4], a[5]), pack(a[6], a[7])};
    float c[4] = {};
    multiply_add<Bfloat16>(c, packed, pack(b[0], b[1]), pack(b[2], b[3]));
    for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
        p.out[row * 8 + column] = c[i];
    }
}

__global__ void transposes(const Params p) {
    Shared shared;
    uint16_t* matrices = shared.take<uint16_t>(256);  // four of 8 x 8
    for (int i = lane_index(); i < 256; i += WARP) matrices[i] = static_cast<uint16_t>(i);
    block_barrier();
    uint32_t plain[4], turned[4];
    load_matrices(plain, matrices + lane_index() * 8);
    load_matrices_transposed(turned, matrices + lane_index() * 8);
    for (int i = 0; i < 4; ++i) {
        float* out = p.out + (lane_index() * 4 + i) * 4;
        out[0] = static_cast<float>(plain[i] & 0xffff);
        out[1] = static_cast<float>(plain[i] >> 16);
        out[2] = static_cast<float>(turned[i] & 0xffff);
        out[3] = static_cast<float>(turned[i] >> 16);
    }
}

struct Probe {
    const char* name;
    void (*kernel)(Params);
    int blocks, threads, shared_bytes, results;
};

const Probe PROBES[] = {
    {"lanes_part_ways", lanes_part_ways, 1, 32, 0, 0},
    {"some_lanes_stay_away", some_lanes_stay_away, 1, 32, 0, 0},
    {"a_warp_skips_the_barrier", a_warp_skips_the_barrier, 1, 64, 0, 0},
    {"waits_for_a_block_behind_it", waits_for_a_block_behind_it, 2, 32, 0, 1},
    {"writes_past_a_shared_array", writes_past_a_shared_array, 1, 64, 512, 0},
    {"takes_more_than_launched", takes_more_than_launched, 1, 32, 1024, 0},
    {"copies_to_a_misaligned_place", copies_to_a_misaligned_place, 1, 32, 256, 0},
    {"half_a_warp", totals, 1, 16, 0, 0},
    {"exchange", exchange<true, true>, 1, 64, 1024, 64},
    {"exchange_without_waiting", exchange<false, true>, 1, 64, 1024, 64},
    {"exchange_without_a_barrier", exchange<true, false>, 1, 64, 1024, 64},
    {"totals", totals, 1, 64, 0, 64},
    {"last_block_adds_up", last_block_adds_up, 5, 32, 16, 1},
    {"multiplies", multiplies, 1, 32, 1024, 128},
    {"multiplies_fragments", multiplies_fragments, 1, 32, 0, 128},
    {"transposes", transposes, 1, 32, 512, 512},
};

int main(int count, char** arguments) {
    if (count > 2) emulation::set_schedule(std::strtoull(arguments[2], nullptr, 10));
    std::vector<float> in(1024), out(1024, 0.0f);
    for (int i = 0; i < 1024; ++i) in[i] = static_cast<float>(i * 37 % 101 - 50);
    for (const Probe& probe : PROBES) {
        if (std::string(probe.name) != arguments[1]) continue;
        try {
            launch("probe", probe.kernel, Grid{probe.blocks}, probe.threads, probe.shared_bytes, nullptr,
                   Params{out.data(), in.data()});
        } catch (const std::exception& error) {
            std::printf("%s\n", error.what());
            return 1;
        }
        for (int i = 0; i < probe.results; ++i) std::printf("%.9g\n", out[i]);
        return 0;
    }
    return 2;
}
