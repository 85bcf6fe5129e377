// masked_attention on the CPU: argument checks, the work's partition over threads, registration. The arithmetic is in
// attention/kernel.h.
#include "common/arguments/masked_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/attention/describe.h"
#include "cpu/attention/memory.h"

namespace simsd {
namespace attention {
namespace {

constexpr int64_t MAX_GROUP = 8;      // row blocks that walk over a split together
constexpr double SERIAL_FLOPS = 2e6;  // below this, waking threads costs more than it saves

// Kept between calls: a thread's scratch is small, and fresh pages would cost as much as a short call computes.
float* thread_memory(int64_t floats) {
    thread_local Memory memory;
    return memory.reserve(floats);
}

// Reads a row block's queries and clocks into `memory`. Lanes past the last row repeat the first row's clock.
void load_rows(const Problem& p, int64_t batch, int64_t kv_head, RowBlock& block) {
    const int32_t* clock = p.clock + batch * p.q_rows;
    block.clock_min = block.clock_max = clock[block.first_row / p.group];
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
        const int64_t row = block.first_row + (lane < block.rows ? lane : 0);
        const int64_t i = row / p.group, head = kv_head * p.group + row % p.group;
        block.clock[lane] = clock[i];
        block.clock_min = std::min(block.clock_min, clock[i]);
        block.clock_max = std::max(block.clock_max, clock[i]);
        const int64_t offset = batch * p.q_strides[0] + head * p.q_strides[1] + i * p.q_strides[2];
        with_element(p.element, [&](auto element) {
            const auto* from = static_cast<const decltype(element)*>(p.q) + offset;
            for (int64_t d = 0; d < p.dim; ++d) {
                const float value = lane < block.rows ? static_cast<float>(from[d * p.q_strides[3]]) * p.scale : 0.0f;
                block.q[d * block.lanes + lane] = value;
            }
        });
    }
}

void store_rows(const Problem& p, int64_t batch, int64_t kv_head, const RowBlock& block, const State& state) {
    for (int64_t lane = 0; lane < block.rows; ++lane) {
        const int64_t row = block.first_row + lane;
        const int64_t i = row / p.group, head = kv_head * p.group + row % p.group;
        const int64_t offset = batch * p.out_strides[0] + head * p.out_strides[1] + i * p.out_strides[2];
        const float* from = state.out + lane;
        with_element(p.element, [&](auto element) {
            auto* to = static_cast<decltype(element)*>(p.out) + offset;
            for (int64_t d = 0; d < p.dim; ++d) to[d * p.out_strides[3]] = from[d * block.lanes];
        });
    }
}

// How the rows of each KV head are cut: into blocks of vector lanes, and groups of blocks that are one unit of work.
struct Partition {
    const Problem& p;
    const Kernels& kernels;
    int64_t blocks, group, groups, units, threads;

    Partition(const Problem& problem, const Kernels& used, int64_t available_threads) : p(problem), kernels(used) {
        const int64_t heads = p.batch * p.kv_heads;
        blocks = divide_up(p.group * p.q_rows, kernels.lanes);
        const double flops = 4.0 * heads * p.group * p.q_rows * p.keys * p.dim;
        threads = flops < SERIAL_FLOPS ? 1 : available_threads;
        group = std::clamp<int64_t>(heads * blocks / (4 * threads), 1, MAX_GROUP);
        groups = divide_up(blocks, group);
        units = heads * groups;
    }

    int64_t state_floats() const { return kernels.lanes * (2 + p.dim); }
    int64_t block_floats() const { return aligned(kernels.lanes * (1 + p.dim) + state_floats()); }

    RowBlock block(int64_t index, float* memory) const {
        const int64_t first = index * kernels.lanes, rows = std::min(kernels.lanes, p.group * p.q_rows - first);
        const int64_t lanes = rows <= kernels.half_lanes ? kernels.half_lanes : kernels.lanes;
        return {first, rows, lanes, 0, 0, reinterpret_cast<int32_t*>(memory), memory + lanes};
    }

    State state(float* memory) const { return {memory, memory + kernels.lanes, memory + 2 * kernels.lanes}; }

    // The state of a row block that has seen nothing yet; it lies behind the block's clocks and queries.
    State fresh_state(const RowBlock& block, float* memory) const {
        const State fresh = state(memory + kernels.lanes * (1 + p.dim));
        std::fill_n(fresh.max, block.lanes, -INFINITY);
        std::fill_n(fresh.sum, block.lanes, 0.0f);
        std::fill_n(fresh.out, block.lanes * p.dim, 0.0f);
        return fresh;
    }

    // work(index) for every index below count, each taken by whichever thread is free.
    template <typename Work>
    void parallel(int64_t count, const Work& work) const {
        std::atomic<int64_t> next{0};
        const auto drain = [&](int64_t, int64_t) {
            for (int64_t index = next++; index < count; index = next++) work(index);
        };
        const int64_t workers = std::min(threads, count);
        if (workers > 1) {
            torch::stable::parallel_for(0, workers, 1, drain);
        } else {
            drain(0, 1);
        }
    }
};

struct Unit {
    int64_t batch, kv_head, first_block, blocks;
};

Unit unit_at(const Partition& part, int64_t index) {
    const int64_t head = index / part.groups, first = index % part.groups * part.group;
    return {head / part.p.kv_heads, head % part.p.kv_heads, first, std::min(part.group, part.blocks - first)};
}

void stage(const Partition& part, const Unit& unit, int64_t split, const RowBlock* blocks, float* scratch) {
    int32_t clock_min = blocks[0].clock_min, clock_max = blocks[0].clock_max;
    for (int64_t i = 1; i < unit.blocks; ++i) {
        clock_min = std::min(clock_min, blocks[i].clock_min);
        clock_max = std::max(clock_max, blocks[i].clock_max);
    }
    part.kernels.stage(part.p, unit.batch, unit.kv_head, split, clock_min, clock_max, scratch);
}

// One unit from its queries to its outputs.
void attend_whole(const Partition& part, int64_t index) {
    const Problem& p = part.p;
    const Unit unit = unit_at(part, index);
    const int64_t scratch_floats = aligned(part.kernels.scratch_floats(p)),
                  partial_floats = aligned(part.state_floats());
    float* scratch = thread_memory(scratch_floats + partial_floats + unit.blocks * part.block_floats());
    const State partial = part.state(scratch + scratch_floats);
    float* memory = scratch + scratch_floats + partial_floats;
    RowBlock blocks[MAX_GROUP];
    State states[MAX_GROUP];
    for (int64_t i = 0; i < unit.blocks; ++i, memory += part.block_floats()) {
        blocks[i] = part.block(unit.first_block + i, memory);
        load_rows(p, unit.batch, unit.kv_head, blocks[i]);
        states[i] = part.fresh_state(blocks[i], memory);
    }
    for (int64_t split = 0; split * SPLIT < p.key_count[unit.batch]; ++split) {
        stage(part, unit, split, blocks, scratch);
        for (int64_t i = 0; i < unit.blocks; ++i) {
            if (part.kernels.attend(p, unit.batch, unit.kv_head, split, blocks[i], scratch, partial)) {
                part.kernels.fold(p, blocks[i], states[i], partial);
            }
        }
    }
    for (int64_t i = 0; i < unit.blocks; ++i) {
        part.kernels.normalise(p, blocks[i], states[i]);
        store_rows(p, unit.batch, unit.kv_head, blocks[i], states[i]);
    }
}

// For too few units to share evenly among the threads: splits are computed side by side, some waves of them after
// another to bound memory, and folded in the same order with the same operations as attend_whole does, so to the same
// bits.
void attend_splits(const Partition& part) {
    const Problem& p = part.p;
    const int64_t total_blocks = p.batch * p.kv_heads * part.blocks;
    const int64_t splits = divide_up(*std::max_element(p.key_count, p.key_count + p.batch), SPLIT);
    const int64_t wave = std::clamp<int64_t>(divide_up(8 * part.threads, part.units), 1, std::max<int64_t>(splits, 1));
    const int64_t partial_floats = aligned(part.state_floats());
    Memory shared;
    float* memory = shared.reserve(total_blocks * (part.block_floats() + wave * partial_floats));
    float* partials = memory + total_blocks * part.block_floats();
    std::vector<RowBlock> blocks(total_blocks);
    std::vector<State> states(total_blocks);
    std::vector<char> live(total_blocks * wave);
    const auto head_of = [&](int64_t i) { return i / part.blocks; };

    part.parallel(total_blocks, [&](int64_t i) {
        blocks[i] = part.block(i % part.blocks, memory + i * part.block_floats());
        load_rows(p, head_of(i) / p.kv_heads, head_of(i) % p.kv_heads, blocks[i]);
        states[i] = part.fresh_state(blocks[i], memory + i * part.block_floats());
    });
    for (int64_t first = 0; first < splits; first += wave) {
        const int64_t count = std::min(wave, splits - first);
        part.parallel(part.units * count, [&](int64_t index) {
            const Unit unit = unit_at(part, index / count);
            const int64_t split = first + index % count;
            const int64_t first_block = (unit.batch * p.kv_heads + unit.kv_head) * part.blocks + unit.first_block;
            float* scratch = thread_memory(aligned(part.kernels.scratch_floats(p)));
            stage(part, unit, split, &blocks[first_block], scratch);
            for (int64_t i = first_block; i < first_block + unit.blocks; ++i) {
                const int64_t slot = i * wave + index % count;
                live[slot] = part.kernels.attend(p, unit.batch, unit.kv_head, split, blocks[i], scratch,
                                                 part.state(partials + slot * partial_floats));
            }
        });
        part.parallel(total_blocks, [&](int64_t i) {
            for (int64_t slot = i * wave; slot < i * wave + count; ++slot) {
                if (live[slot])
                    part.kernels.fold(p, blocks[i], states[i], part.state(partials + slot * partial_floats));
            }
        });
    }
    part.parallel(total_blocks, [&](int64_t i) {
        part.kernels.normalise(p, blocks[i], states[i]);
        store_rows(p, head_of(i) / p.kv_heads, head_of(i) % p.kv_heads, blocks[i], states[i]);
    });
}

Tensor masked_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor clock, const Tensor birth,
                        const Tensor death, const std::optional<Tensor> kv_len, const std::optional<double> scale,
                        const std::optional<Tensor> block_table, const std::optional<Tensor> plan) {
    check_masked_attention(check_cpu, q, k, v, clock, birth, death, kv_len, block_table);
    check_plan(check_cpu, q, plan, 0);
    const Tensor out = allocate_heads(q);
    if (out.numel() == 0) return out;

    Storage storage;
    Problem p = describe(q, k, v, clock, birth, death, kv_len, scale, block_table, storage);
    p.out = out.mutable_data_ptr();
    for (int axis = 0; axis < 4; ++axis) p.out_strides[axis] = out.stride(axis);
    const Partition part(p, kernels(), torch::stable::get_num_threads());
    if (part.units >= 4 * part.threads || part.units % part.threads == 0) {
        part.parallel(part.units, [&](int64_t unit) { attend_whole(part, unit); });
    } else {
        attend_splits(part);
    }
    return out;
}

}  // namespace
}  // namespace attention
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("masked_attention", TORCH_BOX(&simsd::attention::masked_attention)); }
