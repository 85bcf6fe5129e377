// Draws for slots, each with its own settings.
#pragma once

#include "control/tensors.h"
#include "cpu/vocabulary/row.h"

namespace simsd::vocabulary {

// What is drawn at positions, one after the other.
struct Draws {
    std::vector<int64_t> token;
    std::vector<float> prob, log_odds, entropy, logprob;

    explicit Draws(int64_t size) : token(size), prob(size), log_odds(size), entropy(size), logprob(size) {}

    control::Statistics statistics(int64_t first) const {
        return {control::contiguous(prob.data() + first), control::contiguous(log_odds.data() + first),
                control::contiguous(entropy.data() + first)};
    }
};

class SlotLogits {
  public:
    // Of logits whose last dimension is the vocabulary; all tensors must have been checked.
    SlotLogits(const char* op, const Tensor& logits, const control::Sampling& sampling,
               const std::optional<Tensor>& banned, int64_t batch)
        : element_(element_of<Element>(logits)),
          data_(logits.const_data_ptr()),
          stride_(logits.stride(logits.dim() - 1)),
          vocabulary_(logits.size(logits.dim() - 1)),
          sampling_(sampling),
          banned_(banned, vocabulary_) {
        for (int64_t b = 0; b < batch && sampling.seed.data == nullptr; ++b) {
            check(!noisy(b), op, ": temperature must be 0 without seed, got ", sampling.temperature[b]);
        }
    }

    bool noisy(int64_t b) const { return sampling_.temperature[b] > 0.0f; }

    int64_t rows_per_task() const { return vocabulary::rows_per_task(vocabulary_); }

    // Of the row `offset` elements from the first, for slot b; `revealed` is what its noise is keyed by.
    void draw(int64_t b, int64_t offset, int32_t position, int64_t revealed, Workspace& work, Draws& out,
              int64_t at) const {
        const float temperature = sampling_.temperature[b];
        const Row row{element_, row_pointer(element_, data_, offset), stride_, vocabulary_, divisor_of(temperature),
                      &banned_};
        Filter filter;
        if (sampling_.top_k.data) filter.top_k = sampling_.top_k[b];
        if (sampling_.top_p.data) filter.top_p = sampling_.top_p[b];
        NoiseKey key{};
        if (noisy(b)) {
            key.seed = sampling_.seed[b];
            key.position = position;
            key.revealed = revealed;
        }
        const auto drawn = draw_row(row, filter, noisy(b) ? &key : nullptr, work);
        out.token[at] = drawn.token;
        out.prob[at] = drawn.summary.prob(drawn.x);
        out.log_odds[at] = drawn.summary.log_odds(drawn.token, drawn.x);
        out.entropy[at] = drawn.summary.entropy();
        out.logprob[at] = drawn.logprob;
    }

  private:
    Element element_;
    const void* data_;
    int64_t stride_, vocabulary_;
    control::Sampling sampling_;
    Banned banned_;
};

}  // namespace simsd::vocabulary
