// Best-first growth of one slot's draft graph: the states to take, each time the one that the target's walk most
// probably visits. The Python definition is `_grow` in plan_block/reference.py.
#pragma once

#include <limits>

#include "control/plan/continuations.h"
#include "control/plan_block.h"

namespace simsd::control {

// A state that was found: taken, or a candidate.
struct Found {
    double reach;  // probability that the walk visits it; 0 once it is taken
    uint64_t revealed;
    int32_t block, step;
    int32_t parent;  // among the taken
    int32_t cost;    // in blocks of rows

    SIMSD_CONTROL double worth() const { return reach / cost; }
};

// How large one slot's graph can become.
struct Extent {
    int32_t states;  // that are found
    int32_t places;  // of the table, a power of two, at most two thirds full
};

inline Extent extent_of(const PlanParams& p) {
    const int most = (p.length + 1) * (p.length + 1) / 4 + 2;
    const int32_t states = 1 + (p.max_states - 1) * (most < MAX_CHILDREN ? most : MAX_CHILDREN);
    int32_t places = 64;
    while (places * 2 < states * 3) places *= 2;
    return {states, places};
}

// The states found, in order, so that those found from one state are neighbours; and where to look them up.
struct Graph {
    static constexpr int32_t FREE = -1;

    Found* found;    // [states]
    double* best;    // [C], the greatest worth among those found from each state taken
    int32_t* begin;  // [C + 1], where these begin
    int32_t* table;  // [places], open addressing by block and revealed set; FREE, or a state

    static int64_t bytes(const PlanParams& p, const Extent& extent) {
        const int64_t sizes = extent.states * sizeof(Found) + (p.max_states + 1) * (sizeof(double) + sizeof(int32_t)) +
                              extent.places * sizeof(int32_t);
        return (sizes + 15) / 16 * 16;
    }

    SIMSD_CONTROL Graph(const PlanParams& p, const Extent& extent, char* memory)
        : found(reinterpret_cast<Found*>(memory)),
          best(reinterpret_cast<double*>(found + extent.states)),
          begin(reinterpret_cast<int32_t*>(best + p.max_states + 1)),
          table(begin + p.max_states + 1) {}
};

// Where a slot's growth stands.
struct Progress {
    double reach, score;  // of the newest state, the one taken last
    uint64_t revealed;
    int32_t block, step;
    int32_t size, found;     // states taken, states found
    int32_t blocks, logits;  // that those taken cost, the current one aside
    int32_t complete;
};

constexpr double CERTAIN = 1e30;                                    // a sharpness that leaves one order
constexpr double PEEKED = std::numeric_limits<double>::infinity();  // a score above all others

// What is proposed for a block in a state, [L], read where the state is masked; how far it tells the order, and how far
// its probabilities are believed (negative: it is certain).
struct Proposal {
    View<const int64_t, 1> token;
    Statistics statistics;
    double sharpness, calibration;
};

template <typename Team>
class Growth {
  public:
    // `memory` is of Graph::bytes.
    SIMSD_CONTROL Growth(const PlanParams& p, const Extent& extent, const Taken& taken, int64_t b, char* memory,
                         Room& room)
        : p_(p),
          taken_(taken),
          extent_(extent),
          graph_(p, extent, memory),
          room_(room),
          continuations_(room),
          b_(b),
          first_(b * p.max_states),
          full_(full_set(p.length)),
          rule_(rule_of(p.rules, b, p.length)),
          start_(p.start[b]),
          depth_(static_cast<int32_t>(smaller(p.proposal_depth[b], p.blocks))),
          blocks_left_(smaller((int64_t{p.end[b]} - start_) / p.length, p.draft_end[b])),
          calibration_(p.draft_calibration[b]),
          floor_(p.min_visit_prob[b]) {}

    // Takes the current state.
    SIMSD_CONTROL void begin() {
        now_ = {};
        now_.complete = 1;
        if (start_ < 0) {
            if (Team::leads()) taken_.size[b_] = 0;
            return;
        }
        Team::range(extent_.places, [&](int at) { graph_.table[at] = Graph::FREE; });
        Team::sync();
        Found root{1.0, static_cast<uint64_t>(p_.revealed[b_]) & full_, 0, p_.step[b_], 0, 1};
        now_.found = 1;
        Team::each(full_, [&](int i) {
            const int64_t at = int64_t{start_} + i;
            const bool shown = has(root.revealed, i) && at < p_.text_length;  // a GPU trusts `start`
            p_.out.states[place(0, i)] = shown ? *p_.text.at(b_, at) : 0;
        });
        note(root, 0.0, 0);
        root.reach = 0.0;
        if (Team::leads()) {
            graph_.found[0] = root;
            graph_.table[place_of(0, root.revealed)] = 0;
        }
        Team::sync();
    }

    // Goes on from where another growth of the slot left off.
    SIMSD_CONTROL void resume(const Progress& progress) { now_ = progress; }

    SIMSD_CONTROL const Progress& progress() const { return now_; }
    SIMSD_CONTROL int64_t slot() const { return b_; }
    SIMSD_CONTROL bool complete() const { return now_.complete; }
    // Whether anything is proposed for the newest state: what the target drew in the nearest state that it has seen, or
    // what the draft says.
    SIMSD_CONTROL bool expands() {
        if (now_.complete) return false;
        nearest_ = p_.seen.count > 0 ? Team::greatest(p_.seen.count, [&](int m) { return near(m); }) : -1;
        if (nearest_ >= 0 && near(nearest_) < 0.0) nearest_ = -1;
        return nearest_ >= 0 || now_.block < depth_;
    }
    SIMSD_CONTROL uint64_t masked() const { return full_ & ~now_.revealed; }

    // The state seen that is nearest to the newest one, which expands; negative: there is none.
    SIMSD_CONTROL int nearest() const { return nearest_; }

    // That for the newest state, which expands.
    SIMSD_CONTROL Proposal proposal() const {
        const Seen& seen = p_.seen;
        const int block = now_.block, nearest = nearest_;
        if (nearest < 0) {
            const Drafted& drafted = p_.drafted;
            return proposal(drafted.token[b_][block],
                            {drafted.prob[b_][block], drafted.log_odds[b_][block], drafted.entropy[b_][block]});
        }
        return proposal(seen.tokens[b_][nearest],
                        {seen.prob[b_][nearest], seen.log_odds[b_][nearest], seen.entropy[b_][nearest]});
    }

    // Likewise, of what was drawn in it from the logits of the nearest state, or the draft's.
    SIMSD_CONTROL Proposal proposal(View<const int64_t, 1> token, const Statistics& drawn) const {
        const Seen& seen = p_.seen;
        const int nearest = nearest_;
        if (nearest < 0) return {token, drawn, *p_.order_sharpness.at(b_, now_.block), calibration_};
        Proposal found{token, drawn, seen.sharpness[b_], calibration_};
        const uint64_t more = now_.revealed & ~static_cast<uint64_t>(*seen.revealed.at(b_, nearest));
        if (more == 0 && *seen.exact.at(b_, nearest) != 0) {  // the target will do there what it would have done
            found.sharpness = CERTAIN;
            found.calibration = -1.0;
        }
        if (!seen.shift.data || more == 0) return found;
        Team::each(masked(), [&](int i) {
            double change = *seen.shift.at(b_, nearest, i);
            for (uint64_t rest = more; rest != 0; rest &= rest - 1) {
                change = sum(change, *seen.pair.at(b_, nearest, i, lowest_bit(rest)));
            }
            room_.log_odds[i] = static_cast<float>(sum(found.statistics.log_odds[i], change));
            room_.prob[i] = static_cast<float>(probability(room_.log_odds[i]));
        });
        Team::sync();
        found.statistics.prob = contiguous<const float>(room_.prob);
        found.statistics.log_odds = contiguous<const float>(room_.log_odds);
        return found;
    }

    // Finds what the newest state leads to, for which it is proposed.
    SIMSD_CONTROL void expand(const Proposal& drawn) {
        const int newest = now_.size - 1;
        const uint64_t masked = this->masked();
        Team::each(masked, [&](int i) {
            room_.factor[i] = drawn.calibration < 0.0 ? 1.0 : product(drawn.calibration, drawn.statistics.prob[i]);
            if (taken_.proposed) taken_.proposed[place(newest, i)] = drawn.token[i];
        });
        continuations_.find(rule_, now_.step, masked, drawn.statistics, drawn.sharpness);
        Team::sync();
        if (continuations_.size() == 0) return;
        // A finished block: no state of it, but the next block may follow.
        const uint64_t children = full_set(continuations_.size());
        const auto finishes = [&](int n) { return continuations_.chosen(n) == masked; };
        const bool goes_on = now_.block < depth_ && now_.block + 1 < blocks_left_ &&
                             Team::where(children, finishes) != 0 && as_drafted(drawn);

        // Children differ in what they reveal, so none is another.
        const auto child = [&](int n, double reach) {
            const int parent = newest;
            if (finishes(n)) return Found{reach, 0, now_.block + 1, 0, parent, 2};
            return Found{reach, now_.revealed | continuations_.chosen(n), now_.block, now_.step + 1, parent, 1};
        };
        typename Team::template Values<double> reach;
        const uint64_t fresh = Team::where(children, [&](int n) {
            const uint64_t chosen = continuations_.chosen(n);
            double visit = product(now_.reach, continuations_.likelihood(n));
            for (uint64_t rest = chosen; rest != 0; rest &= rest - 1) {
                visit = product(visit, room_.factor[lowest_bit(rest)]);
            }
            reach[n] = visit;
            return chosen != 0 && visit > 0.0 && (goes_on || !finishes(n)) && !merge(child(n, visit));
        });
        Team::each(fresh, [&](int n) {
            const int32_t state = now_.found + count_bits(fresh & full_set(n));
            const Found found = child(n, reach[n]);
            graph_.found[state] = found;
            int at = place_of(found.block, found.revealed);
            while (!Team::claim(graph_.table + at, Graph::FREE, state)) at = next(at);
            Team::raise(graph_.best + newest, found.worth());
        });
        now_.found += count_bits(fresh);
        if (Team::leads()) graph_.begin[now_.size] = now_.found;
        Team::sync();
    }

    // Takes the likeliest candidate, if any is worth it.
    SIMSD_CONTROL void advance() {
        if (now_.complete) return;
        now_.complete = 1;
        const int parent = Team::greatest(now_.size, [&](int n) { return graph_.best[n]; });
        const double worth = graph_.best[parent];
        if (!(worth >= floor_) || !(worth > 0.0)) return;
        const int32_t from = graph_.begin[parent], count = graph_.begin[parent + 1] - from;
        const auto worth_of = [&](int n) { return graph_.found[from + n].worth(); };
        const int32_t best = from + Team::greatest(count, worth_of);
        Found state = graph_.found[best];
        Team::sync();
        if (Team::leads()) graph_.found[best].reach = 0.0;
        Team::sync();
        const double others = worth_of(Team::greatest(count, worth_of));
        if (Team::leads()) graph_.best[parent] = others;

        Team::each(full_, [&](int i) {
            p_.out.states[place(now_.size, i)] = has(state.revealed, i) ? inherited(parent, i) : 0;
        });
        // Never above its predecessor's: cutting at any score leaves a graph that the walk can enter.
        note(state, now_.size > 1 && now_.score < worth ? now_.score : worth, state.cost);
    }

    // Where that is asked for: the next block's empty state, behind this one as drafted, comes right behind the current
    // state, in place of the least likely one of a full graph. What is seen there can be proposed once the text is
    // there.
    SIMSD_CONTROL void peek() {
        if (!p_.peeks.data || p_.peeks[b_] == 0 || start_ < 0 || depth_ < 1 || blocks_left_ < 2 || p_.max_states < 2)
            return;
        const auto is_there = [&](int n) {
            return p_.out.block[first_ + n] == 1 && p_.out.state_revealed[first_ + n] == 0;
        };
        int from = 1;  // where it is, or would be
        while (from < now_.size && !is_there(from)) ++from;
        Team::sync();
        const bool added = from == now_.size;
        if (from == p_.max_states) --from;
        for (int n = from; n > 1; --n) {
            Team::each(full_, [&](int i) { p_.out.states[place(n, i)] = p_.out.states[place(n - 1, i)]; });
            if (Team::leads()) {
                p_.out.state_revealed[first_ + n] = p_.out.state_revealed[first_ + n - 1];
                p_.out.block[first_ + n] = p_.out.block[first_ + n - 1];
                taken_.score[first_ + n] = taken_.score[first_ + n - 1];
                taken_.blocks[first_ + n] = taken_.blocks[first_ + n - 1] + 2;
                taken_.logits[first_ + n] = taken_.logits[first_ + n - 1] + p_.length;
            }
            Team::sync();
        }
        Team::each(full_, [&](int i) { p_.out.states[place(1, i)] = 0; });
        if (Team::leads()) {
            p_.out.state_revealed[first_ + 1] = 0;
            p_.out.block[first_ + 1] = 1;
            taken_.score[first_ + 1] = PEEKED;
            taken_.blocks[first_ + 1] = 2;
            taken_.logits[first_ + 1] = p_.length;
            if (added) taken_.size[b_] = from + 1;
        }
        Team::sync();
    }

  private:
    // How many positions a seen state reveals that leads to the newest one; negative where it does not, or there is
    // none.
    SIMSD_CONTROL double near(int m) const {
        const uint64_t known = static_cast<uint64_t>(*p_.seen.revealed.at(b_, m)) & full_;
        if (*p_.seen.block.at(b_, m) != now_.block) return -1.0;
        if (known == full_ || (known & ~now_.revealed) != 0) return -1.0;
        for (uint64_t rest = known; rest != 0; rest &= rest - 1) {
            const int i = lowest_bit(rest);
            if (*p_.seen.tokens.at(b_, m, i) != p_.out.states[place(now_.size - 1, i)]) return -1.0;
        }
        return count_bits(known);
    }

    static SIMSD_CONTROL int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

    SIMSD_CONTROL int64_t place(int n, int i) const { return (first_ + n) * p_.length + i; }

    // Enters a state, whose tokens are written, as the newest.
    SIMSD_CONTROL void note(const Found& state, double score, int32_t cost) {
        const int n = now_.size++;
        now_.reach = state.reach;
        now_.score = score;
        now_.revealed = state.revealed;
        now_.block = state.block;
        now_.step = state.step;
        now_.blocks += cost;
        now_.logits += n == 0 ? 0 : p_.length - count_bits(state.revealed);
        now_.complete = now_.size == p_.max_states;
        if (Team::leads()) {
            p_.out.state_revealed[first_ + n] = static_cast<int64_t>(state.revealed);
            p_.out.block[first_ + n] = state.block;
            taken_.size[b_] = now_.size;
            taken_.score[first_ + n] = score;
            taken_.blocks[first_ + n] = now_.blocks;
            taken_.logits[first_ + n] = now_.logits;
            graph_.best[n] = 0.0;
            graph_.begin[n] = graph_.begin[n + 1] = now_.found;
        }
        Team::sync();
    }

    // Whether the block would be finished as drafted.
    SIMSD_CONTROL bool as_drafted(const Proposal& drawn) const {
        const auto agrees = [&](int i) {
            const int64_t token = has(now_.revealed, i) ? p_.out.states[place(now_.size - 1, i)] : drawn.token[i];
            return token == *p_.drafted.token.at(b_, now_.block, i);
        };
        return Team::where(full_, agrees) == full_;
    }

    SIMSD_CONTROL int next(int at) const { return (at + 1) & (extent_.places - 1); }

    SIMSD_CONTROL int place_of(int block, uint64_t revealed) const {
        uint64_t x = revealed + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(block + 1);  // splitmix64's finaliser
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        return static_cast<int>((x ^ (x >> 31)) & static_cast<uint64_t>(extent_.places - 1));
    }

    // The token at a position that a state found from number `parent` of the taken reveals.
    SIMSD_CONTROL int64_t inherited(int parent, int i) const {
        if (has(static_cast<uint64_t>(p_.out.state_revealed[first_ + parent]), i)) {
            return p_.out.states[place(parent, i)];
        }
        if (taken_.proposed) return taken_.proposed[place(parent, i)];
        return *p_.drafted.token.at(b_, p_.out.block[first_ + parent], i);
    }

    // Without draws of their own, states of a block that reveal the same have the same tokens.
    SIMSD_CONTROL bool same_tokens(const Found& a, const Found& b) const {
        if (!taken_.proposed) return true;
        for (uint64_t rest = a.revealed; rest != 0; rest &= rest - 1) {
            const int i = lowest_bit(rest);
            if (inherited(a.parent, i) != inherited(b.parent, i)) return false;
        }
        return true;
    }

    // Adds a child's reach to the state that it is; false: there is no such state yet.
    SIMSD_CONTROL bool merge(const Found& child) {
        int32_t state;
        for (int at = place_of(child.block, child.revealed); (state = graph_.table[at]) != Graph::FREE; at = next(at)) {
            Found& known = graph_.found[state];
            if (known.block != child.block || known.revealed != child.revealed || !same_tokens(known, child)) continue;
            if (known.reach == 0.0) return true;  // what comes to a state late is not passed on
            known.reach = sum(known.reach, child.reach);
            Team::raise(graph_.best + known.parent, known.worth());
            return true;
        }
        return false;
    }

    const PlanParams& p_;
    const Taken& taken_;
    const Extent extent_;
    const Graph graph_;
    Room& room_;
    Continuations<Team> continuations_;
    const int64_t b_, first_;  // slot; its first place among the taken
    const uint64_t full_;
    const Rule rule_;
    const int32_t start_, depth_;
    const int64_t blocks_left_;
    const double calibration_, floor_;
    Progress now_ = {};
    int nearest_ = -1;  // of the states seen, to the newest one
};

}  // namespace simsd::control
