// Best-first growth of one lane's draft graph: the states to copy, each time the one that the target's walk most
// probably visits. The Python definition is `_grow` in plan_block/reference.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/plan/continuations.h"

namespace simsd::plan {

// A partial reveal of block number `block` (0: the current one) at denoising step `step`.
struct State {
    int64_t block;
    uint64_t revealed;
    int64_t step;
    double reach;
    int32_t cost = 1;  // in copies: 2 where the finished block before it has to come along
    double score = 0.0;
    uint64_t hash = 0;
    bool taken = false;

    double worth() const { return reach / cost; }
};

struct Limits {
    int64_t depth, blocks_left, max_copies;
    double trust, floor;
};

class Growth {
  public:
    // Tokens are -1 where masked.
    Growth(int64_t length, const Limits& limits, const State& root, const int64_t* tokens)
        : length_(length), limits_(limits), table_(256, -1) {
        states_.reserve(64);
        tokens_.reserve(64 * length);
        taken_.reserve(limits.max_copies);
        queue_.reserve(64);
        uint64_t hash = place(root.block, root.revealed);
        for (int64_t i = 0; i < length; ++i) {
            if (root.revealed & bit(i)) hash ^= trace(i, tokens[i]);
        }
        states_.push_back(root);
        states_[0].hash = hash;
        tokens_.insert(tokens_.end(), tokens, tokens + length);
        table_[slot(hash)] = 0;
        take(0);
    }

    int64_t size() const { return taken_.size(); }
    const State& state(int64_t n) const { return states_[taken_[n]]; }
    const int64_t* tokens(int64_t n) const { return tokens_.data() + taken_[n] * length_; }

    // The state taken last.
    const State& newest() const { return states_[taken_.back()]; }
    bool complete() const { return complete_; }
    // Whether what follows `newest` is wanted and the draft has a proposal for it.
    bool expands() const { return !complete_ && size() < limits_.max_copies && newest().block < limits_.depth; }

    // Adds what `newest` leads to. `finished` says whether tokens[L] are the block as the draft finishes it.
    template <typename Finished>
    void expand(const Proposal& proposal, const Rules& rules, const Finished& finished) {
        const int64_t parent_index = taken_.back();
        const State parent = states_[parent_index];
        int64_t tokens[MAX_BLOCK_LENGTH];
        for (const Continuation& next : Continuations(parent.revealed, length_, parent.step, proposal, rules)) {
            if (next.chosen == 0) continue;
            State child{parent.block, parent.revealed | next.chosen, parent.step + 1, parent.reach * next.weight};
            child.hash = parent.hash ^ place(parent.block, parent.revealed) ^ place(child.block, child.revealed);
            std::copy_n(tokens_.data() + parent_index * length_, length_, tokens);
            for (int64_t i = 0; i < length_; ++i) {
                if (!(next.chosen & bit(i))) continue;
                child.reach *= limits_.trust * proposal.prob[i];
                tokens[i] = proposal.token[i];
                child.hash ^= trace(i, tokens[i]);
            }
            if (!(child.reach > 0.0)) continue;
            if (child.revealed == full_set(length_)) {  // no copy of it, but the next block may follow
                if (!finished(tokens) || child.block + 1 >= limits_.blocks_left) continue;
                child = {child.block + 1, 0, 0, child.reach, 2};
                child.hash = place(child.block, 0);
                std::fill_n(tokens, length_, -1);
            }
            offer(child, tokens);
        }
    }

    // Takes the likeliest candidate, if any is worth it.
    void advance() {
        complete_ = true;
        if (size() == limits_.max_copies) return;
        int64_t best = -1;
        while (!queue_.empty() && best < 0) {
            std::pop_heap(queue_.begin(), queue_.end());
            const Entry entry = queue_.back();
            queue_.pop_back();
            if (!states_[entry.state].taken) best = entry.state;  // else an entry from before its reach rose
        }
        if (best < 0) return;
        const double worth = states_[best].worth();
        if (!(worth >= limits_.floor) || worth == 0.0) return;
        // Never above its predecessor's: cutting at any score leaves a graph that the walk can enter.
        states_[best].score = size() > 1 ? std::min(newest().score, worth) : worth;
        take(best);
        complete_ = false;
    }

  private:
    struct Entry {
        double worth;
        int64_t state;

        bool operator<(const Entry& other) const {
            return worth < other.worth || (worth == other.worth && state > other.state);
        }
    };

    void take(int64_t index) {
        states_[index].taken = true;
        taken_.push_back(index);
    }

    void offer(const State& child, const int64_t* tokens) {
        int64_t at = slot(child.hash);
        for (; table_[at] >= 0; at = (at + 1) & (table_.size() - 1)) {
            const State& known = states_[table_[at]];
            if (known.hash == child.hash && known.block == child.block && known.revealed == child.revealed &&
                std::equal(tokens, tokens + length_, tokens_.data() + table_[at] * length_)) {
                break;
            }
        }
        int64_t index = table_[at];
        if (index >= 0) {
            if (states_[index].taken) return;  // what comes to a state late is not passed on
            states_[index].reach += child.reach;
        } else {
            index = table_[at] = states_.size();
            states_.push_back(child);
            tokens_.insert(tokens_.end(), tokens, tokens + length_);
            if (2 * states_.size() > table_.size()) rehash();
        }
        queue_.push_back({states_[index].worth(), index});
        std::push_heap(queue_.begin(), queue_.end());
    }

    void rehash() {
        table_.assign(4 * table_.size(), -1);
        for (size_t index = 0; index < states_.size(); ++index) {
            int64_t at = slot(states_[index].hash);
            while (table_[at] >= 0) at = (at + 1) & (table_.size() - 1);
            table_[at] = index;
        }
    }

    int64_t slot(uint64_t hash) const { return hash & (table_.size() - 1); }

    static uint64_t mix(uint64_t x) {  // splitmix64's finaliser
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        return x ^ (x >> 31);
    }
    static uint64_t place(int64_t block, uint64_t revealed) {
        return mix(mix(revealed + 0x9E3779B97F4A7C15u) + static_cast<uint64_t>(block));
    }
    static uint64_t trace(int64_t position, int64_t token) {
        return mix(static_cast<uint64_t>(token) * 64 + position + 0x9E3779B97F4A7C15u);
    }

    int64_t length_;
    Limits limits_;
    bool complete_ = false;
    std::vector<State> states_;    // taken and candidates, in order of discovery
    std::vector<int64_t> tokens_;  // of each, L apiece
    std::vector<int32_t> table_;   // open addressing by hash; -1: free
    std::vector<int64_t> taken_;
    std::vector<Entry> queue_;
};

}  // namespace simsd::plan
