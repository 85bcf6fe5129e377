// plan_block: from drafted blocks to the rows of one exact verification forward.
//
// Data path, without logits: two launches. `grow` gives a block of threads to each lane and grows its graph from the
// root to the last state in one go. Its candidates live in shared memory (36 bytes each and a hash table of them; in
// global memory where that is too small), and its inner loops are spread over the threads: one position per thread to
// rank, one continuation per thread to weigh, one child per thread to score and look up, the candidates strided for the
// choice of the best. Where floating-point sums decide (the weights, the entropies), one thread adds them in the
// reference's order. `lay_out` then cuts the graphs to the row budget and writes every output once: each of its blocks
// works out the cut of its lane for itself, which is cheaper than another launch.
//
// With logits that all states of a block share (no temperature, or `sequential`), one launch of sample_logits' kernels
// draws all [B, K, L] rows first. With draws of their own, every state must be drawn before it can be expanded, and
// one block of threads would need about 0.6 ms for the 16 x 152k ids of a state. So the growth is cut in steps, C - 1
// of them, whatever the graphs turn out to be: sample_logits' kernels draw, on the whole GPU, the masked rows of every
// lane's newest state, then `step` expands it and asks for the next. A lane at temperature 0 remembers the draws of a
// block, and one that is complete asks for nothing; then these launches find nothing to do and end. What top-k and
// top-p keep of a row does not depend on the state, but is found anew with each draw.
//
// Floor: 8 lanes of 31 copies, L = 16, K = 2, 8k slots write 8 x (528 rows x 20 + 8k x 8 + 31 x 144) bytes = 0.65 MB,
// 0.2 us at 3.35 TB/s. What counts is latency: 30 rounds of about ten barriers, an exponential, two divisions and a few
// loads that depend on each other, 2 to 3 thousand cycles or 1 to 2 us a round, all lanes at a time. With logits in
// bfloat16, a step of own draws reads 8 x 16 x 152k x 2 = 39 MB: 12 us, and 0.4 ms for 30.
#include <algorithm>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/plan/growth.h"
#include "cuda/plan/layout.h"
#include "cuda/plan_block.h"

namespace simsd::plan {
namespace {

constexpr const char* OP = "plan_block";
constexpr int THREADS = 128;            // at least MAX_CHILDREN and MAX_BLOCK_LENGTH
constexpr int MOST_SHARED = 96 * 1024;  // bytes, that every target has
constexpr int PER_BLOCK = 1024;         // slots and rows that a block of `lay_out` writes

// Tokens and statistics as they are drawn, row by row.
struct Draws {
    int64_t* token;
    float *prob, *log_odds, *entropy;

    SIMSD_DEVICE Proposal read(int64_t row) const { return {token[row], prob[row], log_odds[row], entropy[row]}; }
    SIMSD_DEVICE void copy(int64_t to, const Draws& other, int64_t from) const {
        token[to] = other.token[from];
        prob[to] = other.prob[from];
        log_odds[to] = other.log_odds[from];
        entropy[to] = other.entropy[from];
    }
};

// What the kernels of one call share.
struct Work {
    Params p;
    Taken taken;
    Extent extent;
    char* graphs;  // [B, graph_bytes], or null: they grow in shared memory
    int64_t graph_bytes;
    // Of drawing. Its rows are [B, L], of the newest states, or all [B, K, L] at once.
    sample::PerRow<float> temperature;  // [B]
    int32_t *row_index, *position;      // of every row; index -1: nothing to draw
    int64_t* no_seed;                   // one zero
    Draws drawn;                        // of every row
    Draws shared;                       // [B, K, L], of blocks whose states share their draws
    int32_t* ready;                     // [B, K], whether a block's are there
    Progress* progress;                 // [B]
    int64_t* revealed;                  // [B], of the newest states
    bool begins;
};

constexpr Proposal NOTHING{-1, 0.0, 0.0, 0.0};

SIMSD_DEVICE Proposal read(const Params& p, int64_t b, int block) {
    const int i = thread_index();
    if (i >= p.length) return NOTHING;
    return {*p.given.token.at(b, block, i), *p.given.prob.at(b, block, i), *p.given.log_odds.at(b, block, i),
            *p.given.entropy.at(b, block, i)};
}

__global__ void __launch_bounds__(THREADS) grow(const Work w) {
    Shared shared;
    const int64_t b = block_x();
    char* memory = w.graphs ? w.graphs + b * w.graph_bytes
                            : reinterpret_cast<char*>(shared.take<double>(static_cast<int>(w.graph_bytes / 8)));
    Growth growth(w.p, w.extent, w.taken, b, false, memory, shared);
    for (growth.begin(); !growth.complete(); growth.advance()) {
        if (growth.expands()) growth.expand(read(w.p, b, growth.progress().block));
    }
}

// Starts the growth, or goes on with what was drawn for every lane's newest state, as far as that and what is
// remembered lead; then asks for the next draws.
__global__ void __launch_bounds__(THREADS) step(const Work w) {
    Shared shared;
    const int64_t b = block_x();
    const int i = thread_index();
    const int32_t length = w.p.length, ahead = w.p.ahead;
    if (!w.begins && w.progress[b].complete) return;
    const bool own_draws = w.temperature.data[b * w.temperature.strides[0]] > 0.0f;
    const int64_t row = b * length + i, blocks = b * ahead;
    Growth growth(w.p, w.extent, w.taken, b, own_draws, w.graphs + b * w.graph_bytes, shared);
    bool drawn = !w.begins;  // for the newest state
    if (w.begins) {
        if (b == 0 && i == 0) *w.no_seed = 0;
        for (int block = i; block < ahead; block += thread_count()) w.ready[blocks + block] = 0;
        growth.begin();
    } else {
        growth.resume(w.progress[b]);
        // The first state of a block that comes up has the fewest positions revealed: later ones need no more.
        const int64_t block = blocks + growth.progress().block;
        if (!own_draws && i < length) w.shared.copy(block * length + i, w.drawn, row);
        if (!own_draws && i == 0) w.ready[block] = 1;
    }
    for (; !growth.complete(); growth.advance(), drawn = false) {
        if (!growth.expands()) continue;
        const int64_t block = blocks + growth.progress().block;
        if (!drawn && (own_draws || !w.ready[block])) break;
        Proposal mine = NOTHING;
        if (i < length) mine = own_draws ? w.drawn.read(row) : w.shared.read(block * length + i);
        growth.expand(mine);
    }
    const Progress& now = growth.progress();
    if (i < length) {
        const bool wanted = !now.complete && !has(now.revealed, i);
        const int64_t within = now.block * static_cast<int64_t>(length) + i;
        w.row_index[row] = wanted ? static_cast<int32_t>(blocks * length + within) : -1;
        w.position[row] = wanted ? static_cast<int32_t>(*w.p.start.at(b) + within) : 0;
    }
    if (i == 0) {
        w.revealed[b] = static_cast<int64_t>(now.revealed);
        w.progress[b] = now;
    }
}

// Asks for all rows that a lane may need.
__global__ void __launch_bounds__(THREADS) ask(const Work w) {
    const int64_t rows = static_cast<int64_t>(w.p.batch) * w.p.ahead * w.p.length;
    const int64_t row = static_cast<int64_t>(block_x()) * thread_count() + thread_index();
    if (row == 0) *w.no_seed = 0;
    if (row >= rows) return;
    const int32_t per_lane = w.p.ahead * w.p.length, within = static_cast<int32_t>(row % per_lane);
    const int64_t b = row / per_lane;
    const bool wanted = *w.p.start.at(b) >= 0 && within / w.p.length < *w.p.depth.at(b);
    w.row_index[row] = wanted ? static_cast<int32_t>(row) : -1;
    w.position[row] = wanted ? static_cast<int32_t>(*w.p.start.at(b) + int64_t{within}) : 0;
}

__global__ void __launch_bounds__(THREADS) lay_out(const Work w) {
    Shared shared;
    int32_t* room = shared.take<int32_t>(WARP);
    const Params& p = w.p;
    const int64_t b = block_x();
    const int kept = kept_copies(p, w.taken, b, room);
    int cleaned = 0;
    for (int n = 0; n < kept; ++n) cleaned = larger(cleaned, w.taken.block[b * p.max_copies + n]);
    const Layout layout{p, w.taken, b, *p.start.at(b), kept, cleaned, copy_stride(p.length)};
    const int32_t rows = (p.ahead + p.max_copies) * p.length, states = p.max_copies * p.length;
    const int64_t places = rows > p.slots ? rows : p.slots;
    const int64_t stride = static_cast<int64_t>(blocks_y()) * thread_count();
    if (block_y() == 0 && thread_index() == 0) p.out.cleaned[b] = cleaned;
    for (int64_t at = static_cast<int64_t>(block_y()) * thread_count() + thread_index(); at < places; at += stride) {
        const int32_t place = static_cast<int32_t>(at);
        if (place < p.slots) layout.write_slot(place);
        if (place < rows) layout.write_row(place, rows);
        if (place < states) layout.write_state(place);
        if (place < p.max_copies) layout.write_copy(place);
    }
}

// Hands out the workspace; from null it only counts.
class Workspace {
  public:
    explicit Workspace(void* memory) : at_(reinterpret_cast<uintptr_t>(memory)) {}

    template <typename T>
    T* take(int64_t count) {
        T* array = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 15) / 16 * 16;
        return array;
    }
    Draws take_draws(int64_t rows) {
        return {take<int64_t>(rows), take<float>(rows), take<float>(rows), take<float>(rows)};
    }
    int64_t end() const { return static_cast<int64_t>(at_); }

  private:
    uintptr_t at_;
};

// Whether all states of a block have the same draws, whatever the values on the device are.
bool share_draws(const Params& p, const sample::Params& draws) {
    return p.rule.strategy == Strategy::sequential || !draws.temperature;
}

// Places everything in the workspace and returns its end.
int64_t prepare(const Params& params, const sample::Params* given, void* memory, Work& w, sample::Params& draws) {
    w = {};
    w.p = params;
    const int64_t batch = params.batch, length = params.length, copies = batch * params.max_copies;
    Workspace room(memory);
    w.taken.size = room.take<int32_t>(batch);
    w.taken.score = room.take<double>(copies);
    w.taken.reach = room.take<double>(copies);
    w.taken.revealed = room.take<uint64_t>(copies);
    w.taken.block = room.take<int32_t>(copies);
    w.taken.cost = room.take<int32_t>(copies);
    w.taken.tokens = room.take<int64_t>(copies * length);
    w.extent = extent_of(params);
    w.graph_bytes = (Graph::bytes(w.extent) + 15) / 16 * 16;
    const bool in_steps = given && !share_draws(params, *given);
    if (in_steps || w.graph_bytes + Growth::shared_bytes(params.length) > MOST_SHARED) {
        w.graphs = room.take<char>(batch * w.graph_bytes);
    }
    if (!given) return room.end();

    const int64_t all = batch * params.ahead * length, rows = in_steps ? batch * length : all;
    w.no_seed = room.take<int64_t>(1);
    w.row_index = room.take<int32_t>(rows);
    w.position = room.take<int32_t>(rows);
    w.shared = room.take_draws(all);
    w.drawn = w.shared;
    w.temperature = given->temperature;
    if (in_steps) {
        w.drawn = room.take_draws(rows);
        w.taken.proposed = room.take<int64_t>(copies * length);
        w.ready = room.take<int32_t>(batch * params.ahead);
        w.progress = room.take<Progress>(batch);
        w.revealed = room.take<int64_t>(batch);
    }
    const auto view = [&](const auto* data) {
        return View<std::remove_reference_t<decltype(*data)>, 3>{data, {params.ahead * length, length, 1}};
    };
    w.p.given = {view(static_cast<const int64_t*>(w.shared.token)), view(static_cast<const float*>(w.shared.prob)),
                 view(static_cast<const float*>(w.shared.log_odds)), view(static_cast<const float*>(w.shared.entropy))};

    draws = *given;
    draws.logit_rows = static_cast<int32_t>(all);
    draws.rows = static_cast<int32_t>(rows);
    draws.row_index = w.row_index;
    if (!draws.seed) draws.seed = {w.no_seed, {0, 0}, 1};
    const int32_t per_lane = in_steps ? params.length : params.ahead * params.length;
    draws.temperature.inner = draws.top_k.inner = draws.top_p.inner = draws.seed.inner = per_lane;
    draws.position = {w.position, {1, 0}, 1};
    draws.revealed = {w.revealed, {1, 0}, per_lane};
    draws.token = w.drawn.token;
    draws.prob = w.drawn.prob;
    draws.log_odds = w.drawn.log_odds;
    draws.entropy = w.drawn.entropy;
    draws.scratch = room.take<char>(sample::scratch_bytes(rows, draws.vocabulary));
    return room.end();
}

}  // namespace

int64_t workspace_bytes(const Params& params, const sample::Params* given) {
    Work w;
    sample::Params draws{};
    return prepare(params, given, nullptr, w, draws);
}

void launch_plan(const Params& params, const sample::Params* given, void* workspace, Stream stream) {
    Work w;
    sample::Params draws{};
    prepare(params, given, workspace, w, draws);
    const int lanes = params.batch, growth_bytes = Growth::shared_bytes(params.length);
    if (given && !share_draws(params, *given)) {
        w.begins = true;
        launch(OP, step, {lanes}, THREADS, growth_bytes, stream, w);
        w.begins = false;
        for (int n = 1; n < params.max_copies && params.ahead > 0; ++n) {
            sample::launch_sample(draws, stream);
            launch(OP, step, {lanes}, THREADS, growth_bytes, stream, w);
        }
    } else {
        if (given && draws.rows > 0) {
            launch(OP, ask, {(draws.rows + THREADS - 1) / THREADS}, THREADS, 0, stream, w);
            sample::launch_sample(draws, stream);
        }
        const int64_t graph_bytes = w.graphs ? 0 : w.graph_bytes;
        launch(OP, grow, {lanes}, THREADS, growth_bytes + static_cast<int>(graph_bytes), stream, w);
    }
    const int64_t rows = int64_t{params.ahead + params.max_copies} * params.length;
    const int64_t parts = (std::max(rows, params.slots) + PER_BLOCK - 1) / PER_BLOCK;
    launch(OP, lay_out, {lanes, std::min<int64_t>(parts, 1024)}, THREADS, WARP * 4, stream, w);
}

}  // namespace simsd::plan
