#include "cpu/vocabulary/row.h"

#include <algorithm>
#include <functional>

namespace simsd::vocabulary {

Banned::Banned(const std::optional<torch::stable::Tensor>& banned, int64_t vocabulary) : vocabulary(vocabulary) {
    if (!banned) return;
    data = static_cast<const int32_t*>(banned->const_data_ptr());
    stride = banned->stride(0);
}

int64_t Banned::lowest_allowed() const {
    for (int64_t index = 0; index * 32 < vocabulary; ++index) {
        const uint32_t allowed = ~word(index);
        if (allowed) return index * 32 + __builtin_ctz(allowed) < vocabulary ? index * 32 + __builtin_ctz(allowed) : 0;
    }
    return 0;
}

const void* row_pointer(Element element, const void* logits, int64_t offset) {
    return static_cast<const char*>(logits) + offset * (element == Element::float32 ? 4 : 2);
}

int64_t Row::load(int64_t begin, int64_t count, float* x) const {
    const int64_t padded =
        kernels().load(element, row_pointer(element, logits, begin * stride), stride, count, divisor, x);
    for (int64_t index = begin / 32; banned->data && index * 32 < begin + count; ++index) {
        for (uint32_t left = banned->word(index); left; left &= left - 1) {
            const int64_t id = index * 32 + __builtin_ctz(left);
            if (id >= begin && id < begin + count) x[id - begin] = NEGATIVE_INFINITY;
        }
    }
    return padded;
}

float Row::at(int64_t id) const {
    alignas(64) float x[CHUNK];
    load(id, 1, x);
    return x[0];
}

void Summary::raise_second(float x) {
    const double distance = static_cast<double>(second) - x;
    const double factor = std::exp(distance);
    // 0 * inf is NaN: what has vanished is dropped.
    moment = factor > 0.0 ? factor * (moment + distance * sum) : 0.0;
    sum = factor > 0.0 ? factor * sum : 0.0;
    second = x;
}

void Summary::add(float* x, int64_t count, int64_t begin) {
    float largest = kernels().maximum(x, count);
    if (largest == NEGATIVE_INFINITY) return;
    int64_t apart = -1;  // index of the new best, which is not among the others
    if (largest > top) {
        if (!empty()) {
            raise_second(top);
            sum += 1.0;
        }
        apart = 0;
        while (x[apart] != largest) ++apart;
        top = largest;
        best = begin + apart;
        x[apart] = NEGATIVE_INFINITY;
        largest = kernels().maximum(x, count);
    }
    if (largest > NEGATIVE_INFINITY) {
        if (largest > second) raise_second(largest);
        kernels().add(x, count, second, &sum, &moment);
    }
    if (apart >= 0) x[apart] = top;
}

double Summary::rest() const { return sum > 0.0 ? sum * std::exp(static_cast<double>(second) - top) : 0.0; }

float Summary::prob(float x) const {
    return empty() ? 0.0f : static_cast<float>(std::exp(static_cast<double>(x) - top) / total());
}

float Summary::log_odds(int64_t id, float x) const {
    if (empty() || x == NEGATIVE_INFINITY) return NEGATIVE_INFINITY;
    if (id == best) {
        if (!(sum > 0.0)) return std::numeric_limits<float>::infinity();
        return static_cast<float>(static_cast<double>(top) - second - std::log(sum));
    }
    // The top's weight of 1 stays in the sum, so taking out `id` loses at most one bit.
    const double distance = static_cast<double>(x) - top;
    return static_cast<float>(distance - std::log1p(std::max(0.0, rest() - std::exp(distance))));
}

float Summary::entropy() const {
    if (!(rest() > 0.0)) return 0.0f;
    const double distance = static_cast<double>(second) - top;
    const double moment_from_top = std::exp(distance) * (moment + sum * distance);  // <= 0
    return static_cast<float>(std::log1p(rest()) - moment_from_top / total());
}

float Summary::log_prob(float x, double total) const {
    return static_cast<float>(static_cast<double>(x) - top - std::log(total));
}

float Summary::logsumexp() const { return empty() ? NEGATIVE_INFINITY : static_cast<float>(top + std::log1p(rest())); }

Summary summarise(const Row& row, float* copy, const NoiseKey* key, Best* drawn) {
    alignas(64) float block[BLOCK];
    Summary summary;
    for (int64_t begin = 0; begin < row.vocabulary; begin += BLOCK) {
        float* x = copy ? copy + begin : block;
        const int64_t count = row.load(begin, std::min(BLOCK, row.vocabulary - begin), x);
        summary.add(x, count, begin);
        if (key) kernels().draw(x, count, begin, *key, drawn);
    }
    return summary;
}

namespace {

// Walks ids in order of falling x (ties: rising id), sorting no more of them than it takes to reach `bound`.
Kept reach(const std::vector<float>& x, const std::vector<float>& weight, std::vector<int64_t>& order, double bound) {
    const auto before = [&](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
    const int64_t count = order.size();
    Kept kept{Cutoff{}, 0.0};
    for (int64_t begin = 0, size = 64; begin < count; begin += size, size *= 4) {
        const int64_t end = std::min(count, begin + size);
        if (end < count) std::nth_element(order.begin() + begin, order.begin() + end - 1, order.end(), before);
        std::sort(order.begin() + begin, order.begin() + end, before);
        for (int64_t i = begin; i < end; ++i) {
            if (i > 0 && !(kept.total < bound)) return kept;
            kept.cutoff = {x[order[i]], order[i]};
            kept.total += weight[order[i]];
        }
    }
    return kept;
}

}  // namespace

Kept filter_row(const Row& row, const Summary& summary, const Filter& filter, Workspace& work) {
    const int64_t vocabulary = row.vocabulary;
    if (!filter.active(vocabulary) || summary.empty()) return {Cutoff{}, summary.total()};
    Cutoff cutoff;
    if (filter.top_k > 0 && filter.top_k < vocabulary) {
        work.finite.clear();
        for (int64_t id = 0; id < vocabulary; ++id) {
            if (work.x[id] > NEGATIVE_INFINITY) work.finite.push_back(work.x[id]);
        }
        const int64_t finite = work.finite.size();
        if (filter.top_k < finite) {
            const auto kth = work.finite.begin() + filter.top_k - 1;
            std::nth_element(work.finite.begin(), kth, work.finite.end(), std::greater<float>());
            cutoff.x = *kth;
        }
    }
    work.weight.resize(work.x.size());
    kernels().weigh(work.x.data(), work.x.size(), summary.top, work.weight.data());
    double total = 0.0;
    work.order.clear();
    for (int64_t id = 0; id < vocabulary; ++id) {
        if (!cutoff.keeps(work.x[id], id)) continue;
        total += work.weight[id];
        if (filter.top_p < 1.0f) work.order.push_back(id);
    }
    if (filter.top_p >= 1.0f) return {cutoff, total};
    return reach(work.x, work.weight, work.order, filter.top_p * total);
}

Draw draw_row(const Row& row, const Filter& filter, const NoiseKey* key, Workspace& work) {
    const bool filtered = key && filter.active(row.vocabulary);
    Best best{NEGATIVE_INFINITY, NEGATIVE_INFINITY, -1};
    if (filtered) work.x.resize((row.vocabulary + BLOCK - 1) / BLOCK * BLOCK, NEGATIVE_INFINITY);
    const Summary summary = summarise(row, filtered ? work.x.data() : nullptr, filtered ? nullptr : key, &best);
    if (summary.empty()) return {row.banned->lowest_allowed(), NEGATIVE_INFINITY, NEGATIVE_INFINITY, summary};
    if (!key) return {summary.best, summary.top, 0.0f, summary};
    double total = summary.total();
    if (filtered) {
        const Kept kept = filter_row(row, summary, filter, work);
        total = kept.total;
        for (int64_t id = 0; id < row.vocabulary; ++id) {
            if (!kept.cutoff.keeps(work.x[id], id)) work.x[id] = NEGATIVE_INFINITY;
        }
        for (int64_t begin = 0; begin < row.vocabulary; begin += BLOCK) {
            kernels().draw(work.x.data() + begin, BLOCK, begin, *key, &best);
        }
    }
    return {best.id, best.x, summary.log_prob(best.x, total), summary};
}

}  // namespace simsd::vocabulary
