// A row of logits as a warp reads it: in segments of constant length, each held in the warp's registers.
#pragma once

#include "cuda/device.h"
#include "cuda/sample_logits.h"
#include "cuda/warp.h"

namespace simsd::vocabulary {

constexpr float INFINITE = __builtin_huge_valf();
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LARGEST = 3.40282346638528859812e+38f;
constexpr int32_t NO_ID = INT32_MAX;

// Ids per segment and per lane of it. A constant, so that sums run in the same order whatever the rows and the GPU.
constexpr int SEGMENT = 1024;
constexpr int PER_LANE = SEGMENT / WARP;
constexpr int WORDS = SEGMENT / 32;  // of the mask of banned ids, one for each lane

// A unit is what a lane loads at once. Neighbouring lanes take neighbouring units; a lane's ids rise with the index.
template <typename T>
constexpr int UNIT = 16 / sizeof(T);

template <typename T>
SIMSD_DEVICE int32_t id_at(int32_t segment, int index) {
    const auto place = static_cast<uint32_t>(index);
    const uint32_t within = (place / UNIT<T> * WARP + lane_index()) * UNIT<T> + place % UNIT<T>;
    return segment * SEGMENT + static_cast<int32_t>(within);
}

// Division by one number, to the nearest float as `/` is, without its eight instructions and its call.
struct Divisor {
    float value, inverse;

    SIMSD_DEVICE explicit Divisor(float divisor) : value(divisor), inverse(reciprocal_fast(divisor)) {}

    SIMSD_DEVICE bool divides() const { return value != 1.0f; }
    SIMSD_DEVICE bool is_ordinary() const { return value >= 0x1p-20f && value <= 0x1p20f; }

    // By an ordinary number, where x is 0 or of magnitude 2^-100 to 2^100: two corrections of a quotient by the nearest
    // inverse give the nearest quotient (Markstein 1990), as long as nothing underflows or overflows.
    SIMSD_DEVICE float quotient(float x) const {
        const float first = product(x, inverse);
        const float second = fused(fused(-value, first, x), inverse, first);
        return fused(fused(-value, second, x), inverse, second);
    }

    // Any x by any number: where the above does not hold in double, whose error is less than a quotient's distance from
    // a tie.
    template <int COUNT>
    SIMSD_DEVICE void divide(float (&x)[COUNT]) const {
        if (!divides()) return;
        float smallest = larger(x[0], -x[0]), largest = smallest;
#pragma unroll
        for (int i = 1; i < COUNT; ++i) {
            const float magnitude = larger(x[i], -x[i]);
            smallest = magnitude < smallest ? magnitude : smallest;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (is_ordinary() && smallest >= 0x1p-100f && largest <= 0x1p100f) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) x[i] = quotient(x[i]);
        } else {
            const double wide = 1.0 / value;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) x[i] = static_cast<float>(static_cast<double>(x[i]) * wide);
        }
    }
};

// x = logits / divisor with banned ids and NaN at -inf, overflow at the largest float.
template <typename T>
struct Row {
    const T* logits;
    int64_t stride;
    int32_t vocabulary;
    bool vector;             // whether a unit is one aligned load
    const uint32_t* banned;  // see sample::Params
    Divisor divisor;

    SIMSD_DEVICE float at(int32_t id) const {
        float x[1] = {to_float(logits[id * stride])};
        scale(x);
        return banned && (banned[id / 32] >> (id % 32) & 1) ? -INFINITE : x[0];
    }

    // Whether it can be read in aligned units up to its end.
    SIMSD_DEVICE bool has_whole_units() const { return vector && vocabulary % UNIT<T> == 0; }

    // x[e] is of id first + e; `first` is a multiple of COUNT, COUNT of the unit.
    template <int COUNT>
    SIMSD_DEVICE void load_ids(int32_t first, float (&x)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += UNIT<T>) read(first + i, x + i);
        scale(x);
        if (!banned || first >= vocabulary) return;
        const uint32_t bits = banned[first / 32] >> (first % 32);
#pragma unroll
        for (int e = 0; e < COUNT; ++e) x[e] = bits >> e & 1 ? -INFINITE : x[e];
    }

  private:
    template <int COUNT>
    SIMSD_DEVICE void scale(float (&x)[COUNT]) const {
        divisor.divide(x);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) x[i] = x[i] == x[i] ? smaller(x[i], LARGEST) : -INFINITE;
    }

    SIMSD_DEVICE static void unpack(const Bytes16& bytes, float* x) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            if constexpr (sizeof(T) == 4) {
                x[word] = bits_as_float(bytes.words[word]);
            } else {
                x[2 * word] = low_of<T>(bytes.words[word]);
                x[2 * word + 1] = high_of<T>(bytes.words[word]);
            }
        }
    }

    SIMSD_DEVICE void read(int32_t first, float* x) const {
        if (vector && first + UNIT<T> <= vocabulary) {
            unpack(load_16_written(logits + first), x);  // kept in the L1 cache: who reads so comes again
        } else {
#pragma unroll
            for (int e = 0; e < UNIT<T>; ++e) {
                x[e] = first + e < vocabulary ? to_float(logits[(first + e) * stride]) : -INFINITE;
            }
        }
    }
};

// The lowest id that is not banned, 0 where there is none (warp).
SIMSD_DEVICE int32_t lowest_allowed(const sample::Params& p) {
    for (int32_t first = 0; p.banned && first < p.vocabulary; first += SEGMENT) {
        const int32_t id = first + lane_index() * 32;
        const uint32_t allowed = id < p.vocabulary ? ~p.banned[id / 32] : 0;
        const int32_t lowest = lanes_min(allowed ? id + lowest_bit(allowed) : NO_ID);
        if (lowest != NO_ID) return lowest < p.vocabulary ? lowest : 0;
    }
    return 0;
}

SIMSD_ANYWHERE int32_t segments_of(int32_t vocabulary) { return (vocabulary + SEGMENT - 1) / SEGMENT; }

template <typename T>
SIMSD_DEVICE T value_of(const sample::PerRow<T>& values, int32_t row, T otherwise) {
    if (!values.data) return otherwise;
    if (values.inner == 1) return values.data[row * values.strides[0]];
    return values.data[row / values.inner * values.strides[0] + row % values.inner * values.strides[1]];
}

// The number of the draw that task `task` makes, -1 for none.
SIMSD_DEVICE int32_t draw_of(const sample::Params& p, int32_t task) {
    if (!p.draw_of_row) return task;
    const int32_t draw = p.draw_of_row[task];
    return draw >= 0 && draw < p.rows && p.row_index[draw] == task ? draw : -1;
}

SIMSD_DEVICE Divisor divisor_of(const sample::Params& p, int32_t row) {
    const float temperature = value_of(p.temperature, row, 0.0f);
    return Divisor(temperature > 0.0f ? temperature : 1.0f);
}

// Row `row` of those to draw, as it lies in memory; null logits where it has none.
template <typename T>
SIMSD_DEVICE Row<T> unscaled_row_of(const sample::Params& p, int32_t row) {
    const int32_t from = p.row_index ? p.row_index[row] : row;
    Row<T> out{nullptr, p.logits_strides[2], p.vocabulary, false, p.banned, Divisor(1.0f)};
    if (from < 0 || from >= p.logit_rows + p.more_rows) return out;
    out.logits = static_cast<const T*>(p.logits);
    if (from >= p.logit_rows) {
        out.logits = static_cast<const T*>(p.more_logits) + (from - p.logit_rows) * p.more_strides[0];
        out.stride = p.more_strides[1];
    } else if (p.logits_inner == 1) {
        out.logits += from * p.logits_strides[0];
    } else {
        out.logits += from / p.logits_inner * p.logits_strides[0] + from % p.logits_inner * p.logits_strides[1];
    }
    out.vector = out.stride == 1 && reinterpret_cast<uintptr_t>(out.logits) % 16 == 0;
    return out;
}

template <typename T>
SIMSD_DEVICE Row<T> row_of(const sample::Params& p, int32_t row) {
    Row<T> out = unscaled_row_of<T>(p, row);
    out.divisor = divisor_of(p, row);
    return out;
}

// The same, whatever the type: for kernels that two rows of two types meet in.
constexpr int GROUP = 8;  // ids that a lane loads at once

struct AnyRow {
    sample::Element element;
    Row<uint8_t> row;  // logits count bytes

    template <typename T>
    SIMSD_DEVICE Row<T> as() const {
        return {
            reinterpret_cast<const T*>(row.logits), row.stride, row.vocabulary, row.vector, row.banned, row.divisor};
    }
    SIMSD_DEVICE float at(int32_t id) const {
        if (element == sample::Element::float32) return as<float>().at(id);
        return element == sample::Element::bfloat16 ? as<Bfloat16>().at(id) : as<Float16>().at(id);
    }
    SIMSD_DEVICE void load(int32_t first, float (&x)[GROUP]) const {
        if (element == sample::Element::float32) {
            as<float>().load_ids(first, x);
        } else if (element == sample::Element::bfloat16) {
            as<Bfloat16>().load_ids(first, x);
        } else {
            as<Float16>().load_ids(first, x);
        }
    }
};

SIMSD_DEVICE AnyRow any_row_of(const sample::Params& p, int32_t row) {
    const auto bytes = [](const auto& typed) {
        return Row<uint8_t>{reinterpret_cast<const uint8_t*>(typed.logits),
                            typed.stride,
                            typed.vocabulary,
                            typed.vector,
                            typed.banned,
                            typed.divisor};
    };
    if (p.element == sample::Element::float32) return {p.element, bytes(row_of<float>(p, row))};
    return {p.element, bytes(row_of<Bfloat16>(p, row))};
}

// What top-k and top-p do to a row, as far as it is known without reading it.
struct Filter {
    int32_t top_k;
    float top_p;

    SIMSD_DEVICE bool limits_count(int32_t vocabulary) const { return top_k > 0 && top_k < vocabulary; }
    SIMSD_DEVICE bool limits_mass() const { return top_p < 1.0f; }
};

SIMSD_DEVICE Filter filter_of(const sample::Params& p, int32_t row) {
    return {value_of(p.top_k, row, 0), value_of(p.top_p, row, 1.0f)};
}

}  // namespace simsd::vocabulary
