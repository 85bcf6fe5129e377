// Best-first growth of one lane's draft graph by a block of threads: the states to copy, each time the one that the
// target's walk most probably visits. The Python definition is `_grow` in plan_block/reference.py.
#pragma once

#include "cuda/plan/continuations.h"
#include "cuda/warp.h"

namespace simsd::plan {

constexpr double TAKEN = -1.0;  // stands for the worth of a state that is no candidate any more
constexpr int FREE = -1;        // in the table

// How large one lane's graph can become.
struct Extent {
    int32_t states;  // taken and candidates
    int32_t slots;   // of the table, a power of two, at most two thirds full
};

inline Extent extent_of(const Params& p) {
    const int most = most_continuations(p.length);
    const int children = p.rule.strategy == Strategy::sequential ? 1 : most < MAX_CHILDREN ? most : MAX_CHILDREN;
    const int32_t states = 1 + (p.max_copies - 1) * children;
    int32_t slots = 64;
    while (slots * 2 < states * 3) slots *= 2;
    return {states, slots};
}

// Where a lane's growth stands; the same in all threads.
struct Progress {
    double reach, score;  // of the newest state, the one taken last
    uint64_t revealed;
    int32_t block, step;
    int32_t count, size;  // states known, states taken
    int32_t complete;
};

// Taken states and candidates in order of discovery, and where to look them up, in shared or global memory.
struct Graph {
    double *reach, *worth;  // [states]; worth: reach per copy, or TAKEN
    uint64_t* revealed;
    int32_t *block, *step, *parent;  // parent: among the taken
    int32_t* table;                  // [slots], open addressing; FREE or a state

    static SIMSD_ANYWHERE int64_t bytes(const Extent& extent) {
        const int64_t states = (extent.states + 3) / 4 * 4;
        return states * (3 * 8 + 3 * 4) + extent.slots * int64_t{4};
    }

    SIMSD_DEVICE Graph(const Extent& extent, char* memory) {
        const int64_t states = (extent.states + 3) / 4 * 4;
        reach = reinterpret_cast<double*>(memory);
        worth = reach + states;
        revealed = reinterpret_cast<uint64_t*>(worth + states);
        block = reinterpret_cast<int32_t*>(revealed + states);
        step = block + states;
        parent = step + states;
        table = parent + states;
    }
};

class Growth {
  public:
    // Of lane `b`. Where `own_draws`, states of one block may differ in their tokens though they reveal the same set.
    SIMSD_DEVICE Growth(const Params& p, const Extent& extent, const Taken& taken, int64_t b, bool own_draws,
                        char* memory, Shared& shared)
        : p_(p),
          taken_(taken),
          extent_(extent),
          graph_(extent, memory),
          continuations_(p, shared),
          words_(shared.take<uint32_t>(4)),
          best_worth_(shared.take<double>(WARP)),
          best_state_(shared.take<int32_t>(WARP)),
          b_(b),
          first_(b * p.max_copies),
          full_(full_set(p.length)),
          depth_(smaller(*p.depth.at(b), p.ahead)),
          blocks_left_(*p.blocks_left.at(b)),
          trust_(*p.trust.at(b)),
          own_draws_(own_draws) {}

    static int shared_bytes(int length) { return Continuations::shared_bytes(length) + 16 + WARP * (8 + 4); }

    // Takes the current state.
    SIMSD_DEVICE void begin() {
        now_ = {};
        now_.complete = 1;
        for (int n = thread_index(); n < p_.max_copies; n += thread_count()) taken_.score[first_ + n] = -1.0;
        if (*p_.start.at(b_) < 0) {
            if (thread_index() == 0) taken_.size[b_] = 0;
            return;
        }
        for (int at = thread_index(); at < extent_.slots; at += thread_count()) graph_.table[at] = FREE;
        block_barrier();
        now_ = {1.0, 0.0, static_cast<uint64_t>(*p_.revealed.at(b_)) & full_, 0, *p_.step.at(b_), 1, 1, 0};
        const int i = thread_index();
        token_ = i < p_.length && has(now_.revealed, i) ? *p_.tokens.at(b_, i) : -1;
        if (i == 0) {
            graph_.revealed[0] = now_.revealed;
            graph_.block[0] = graph_.parent[0] = 0;
            graph_.worth[0] = TAKEN;
            graph_.table[slot(0, now_.revealed)] = 0;
            taken_.size[b_] = 1;
            taken_.cost[first_] = 1;
            taken_.reach[first_] = 1.0;
        }
        keep();
        now_.complete = p_.max_copies == 1;
    }

    // Goes on from where another kernel left off; it was not complete.
    SIMSD_DEVICE void resume(const Progress& progress) {
        now_ = progress;
        const int i = thread_index();
        token_ = i < p_.length ? taken_.tokens[place(now_.size - 1, i)] : -1;
    }

    SIMSD_DEVICE const Progress& progress() const { return now_; }
    SIMSD_DEVICE bool complete() const { return now_.complete; }
    // Whether the draft has a proposal for what follows the newest state.
    SIMSD_DEVICE bool expands() const { return !now_.complete && now_.block < depth_; }

    // Adds what the newest state leads to; `mine` is the draft's proposal there for position thread_index().
    SIMSD_DEVICE void expand(const Proposal& mine) {
        const int i = thread_index();
        bool agrees = false;  // with the block as the draft finishes it
        if (i < p_.length) {
            agrees = (has(now_.revealed, i) ? token_ : mine.token) == *p_.clean.at(b_, now_.block, i);
            if (own_draws_) taken_.proposed[place(now_.size - 1, i)] = mine.token;
        }
        const bool finishes = positions_where(agrees, words_) == full_;
        continuations_.find(now_.revealed, now_.step, mine, *p_.power.at(b_, now_.block));
        if (continuations_.size() == 0) return;

        // One child per thread. They differ in the set that they reveal, so none can be another.
        bool fresh = false;
        double reach = 0.0;
        uint64_t revealed = 0;
        int32_t block = now_.block, step = now_.step + 1;
        if (i < continuations_.size()) {
            const uint64_t chosen = continuations_.chosen(i);
            reach = product(now_.reach, continuations_.likelihood(i));
            for (uint64_t rest = chosen; rest != 0; rest &= rest - 1) {
                reach = product(reach, product(trust_, continuations_.prob(lowest_bit(rest))));
            }
            revealed = now_.revealed | chosen;
            bool leads = chosen != 0 && reach > 0.0;
            if (revealed == full_) {  // finished: no copy of it, but the next block may follow
                leads = leads && finishes && block + 1 < blocks_left_;
                revealed = 0;
                step = 0;
                ++block;
            }
            if (leads) fresh = !merge(block, revealed, reach);
        }
        // New ones are numbered in order.
        const uint64_t newcomers = positions_where(fresh, words_ + 2);
        if (fresh) {
            const int32_t state = now_.count + count_bits(newcomers & (bit(i) - 1));
            graph_.reach[state] = reach;
            graph_.worth[state] = reach / cost(block, revealed);
            graph_.revealed[state] = revealed;
            graph_.block[state] = block;
            graph_.step[state] = step;
            graph_.parent[state] = now_.size - 1;
            int at = slot(block, revealed);
            while (atomic_compare_exchange(graph_.table + at, FREE, state) != FREE) at = (at + 1) & (extent_.slots - 1);
        }
        now_.count += count_bits(newcomers);
        block_barrier();
    }

    // Takes the likeliest candidate, if any is worth it.
    SIMSD_DEVICE void advance() {
        double worth = TAKEN;
        int32_t best = INT32_MAX;
        for (int32_t state = thread_index(); state < now_.count; state += thread_count()) {
            prefer(worth, best, graph_.worth[state], state);
        }
#pragma unroll
        for (int mask = WARP / 2; mask > 0; mask /= 2) {
            const double other = shuffle_xor(worth, mask);
            prefer(worth, best, other, shuffle_xor(best, mask));
        }
        if (lane_index() == 0) {
            best_worth_[warp_index()] = worth;
            best_state_[warp_index()] = best;
        }
        block_barrier();
        for (int warp = 0; warp < thread_count() / WARP; ++warp) {
            prefer(worth, best, best_worth_[warp], best_state_[warp]);
        }
        now_.complete = 1;
        if (!(worth >= p_.floor) || !(worth > 0.0)) return;
        take(best, worth);
        now_.complete = now_.size == p_.max_copies;
    }

  private:
    static SIMSD_DEVICE int cost(int block, uint64_t revealed) { return block > 0 && revealed == 0 ? 2 : 1; }

    // The first of equals.
    static SIMSD_DEVICE void prefer(double& worth, int32_t& state, double other_worth, int32_t other) {
        if (!(other_worth > worth || (other_worth == worth && other < state))) return;
        worth = other_worth;
        state = other;
    }

    SIMSD_DEVICE int64_t place(int n, int i) const { return (first_ + n) * p_.length + i; }

    SIMSD_DEVICE int slot(int block, uint64_t revealed) const {
        uint64_t x = revealed + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(block + 1);  // splitmix64's finaliser
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        return static_cast<int>((x ^ (x >> 31)) & (extent_.slots - 1));
    }

    // The token at a position that `state`, a child of the `parent`th of the taken, reveals.
    SIMSD_DEVICE int64_t inherited(int parent, int i) const {
        if (has(taken_.revealed[first_ + parent], i)) return taken_.tokens[place(parent, i)];
        return own_draws_ ? taken_.proposed[place(parent, i)]
                          : *p_.given.token.at(b_, taken_.block[first_ + parent], i);
    }

    // Whether `state` has the tokens that a child of the newest state has, which reveals the same set.
    SIMSD_DEVICE bool same_tokens(int32_t state, uint64_t revealed) const {
        for (uint64_t rest = revealed; rest != 0; rest &= rest - 1) {
            const int i = lowest_bit(rest);
            if (inherited(graph_.parent[state], i) != inherited(now_.size - 1, i)) return false;
        }
        return true;
    }

    // Adds the reach of a child of the newest state to what it is the same as; false: there is no such state yet.
    SIMSD_DEVICE bool merge(int32_t block, uint64_t revealed, double reach) {
        int32_t state;
        for (int at = slot(block, revealed); (state = graph_.table[at]) != FREE; at = (at + 1) & (extent_.slots - 1)) {
            if (graph_.block[state] != block || graph_.revealed[state] != revealed) continue;
            if (own_draws_ && !same_tokens(state, revealed)) continue;
            if (graph_.worth[state] == TAKEN) return true;  // what comes to a state late is not passed on
            reach = sum(graph_.reach[state], reach);
            graph_.reach[state] = reach;
            graph_.worth[state] = reach / cost(block, revealed);
            return true;
        }
        return false;
    }

    SIMSD_DEVICE void take(int32_t state, double worth) {
        // Never above its predecessor's: cutting at any score leaves a graph that the walk can enter.
        const double score = now_.size > 1 && now_.score < worth ? now_.score : worth;
        const int parent = graph_.parent[state], i = thread_index();
        now_ = {graph_.reach[state], score,      graph_.revealed[state], graph_.block[state],
                graph_.step[state],  now_.count, now_.size + 1,          0};
        token_ = i < p_.length && has(now_.revealed, i) ? inherited(parent, i) : -1;
        if (i == 0) {
            graph_.worth[state] = TAKEN;
            taken_.size[b_] = now_.size;
            taken_.score[first_ + now_.size - 1] = score;
            taken_.cost[first_ + now_.size - 1] = cost(now_.block, now_.revealed);
            taken_.reach[first_ + now_.size - 1] = now_.reach;
        }
        keep();
    }

    // Notes the newest state where later ones and the layout find it.
    SIMSD_DEVICE void keep() {
        const int i = thread_index();
        if (i < p_.length) taken_.tokens[place(now_.size - 1, i)] = token_;
        if (i == 0) {
            taken_.block[first_ + now_.size - 1] = now_.block;
            taken_.revealed[first_ + now_.size - 1] = now_.revealed;
        }
        block_barrier();
    }

    const Params& p_;
    const Taken& taken_;
    const Extent extent_;
    const Graph graph_;
    Continuations continuations_;
    uint32_t* words_;
    double* best_worth_;  // [warps]
    int32_t* best_state_;
    const int64_t b_, first_;  // lane; its first place in `taken_`
    const uint64_t full_;
    const int32_t depth_, blocks_left_;
    const double trust_;
    const bool own_draws_;
    Progress now_ = {};
    int64_t token_ = -1;  // of the newest state at position thread_index()
};

}  // namespace simsd::plan
