// From sums of weighted values to the output: division, sinks, merging of partial results.
#pragma once

#include "pages.h"
#include "softmax.h"

namespace kvfold {
namespace {

// What the weighted values of a row are multiplied with. A sink is one more logit that has no value.
inline float normalizer(const Call &call, int64_t head, Running running) {
    if (call.sinks == nullptr) return 1.0f / running.sum;
    const float sink = call.sinks[head] * LOG2_E;
    const float top = sink > running.top ? sink : running.top;
    const float scale = exp2_of_nonpositive_number(running.top - top);
    return scale / (running.sum * scale + exp2_of_nonpositive_number(sink - top));
}

template <class Model>
inline Model *output(const Call &call, int64_t token, int64_t head) {
    return reinterpret_cast<Model *>(call.out) + (token * call.heads + head) * call.cache->value_dim;
}

// Writes one row's result. `Order::restore` undoes the order in which the sums were made.
template <class Model, class Order>
inline void write_output(const Call &call, int64_t token, int64_t head, const float *sums, Running running) {
    Model *out = output<Model>(call, token, head);
    const Vec factor = set1(normalizer(call, head, running));
    for (int64_t d = 0; d < call.cache->value_dim; d += CHUNK) {
        Chunk chunk = Order::restore(read_natural(sums + d));
        for (int v = 0; v < CHUNK_VECS; ++v) chunk.v[v] = mul(chunk.v[v], factor);
        write_natural(out + d, chunk);
    }
}

inline float *partial_result(const Call &call, int64_t partial, int64_t head) {
    return call.partials + (partial * call.heads + head) * partial_floats(*call.cache);
}

inline void write_partial(const Call &call, int64_t partial, int64_t head, const float *sums, Running running) {
    float *result = partial_result(call, partial, head);
    const int64_t dim = call.cache->value_dim;
    for (int64_t d = 0; d < dim; d += LANES) store(result + d, load(sums + d));
    result[dim] = running.top;
    result[dim + 1] = running.sum;
}

// Brings the partial results of a decode query together, always in the order of its slots.
template <class Model, class Order>
void merge(const Call &call, const Merge &merged) {
    const int64_t dim = call.cache->value_dim;
    const int64_t token = call.sequences[merged.sequence].first_token;
    for (int64_t head = 0; head < call.heads; ++head) {
        float *sums = partial_result(call, merged.first_partial, head);
        Running running = {sums[dim], sums[dim + 1]};
        for (int64_t i = 1; i < merged.count; ++i) {
            const float *other = partial_result(call, merged.first_partial + i, head);
            const float top = other[dim] > running.top ? other[dim] : running.top;
            const float mine = exp2_of_nonpositive_number(running.top - top);
            const float theirs = exp2_of_nonpositive_number(other[dim] - top);
            for (int64_t d = 0; d < dim; d += LANES) {
                store(sums + d, fma(load(other + d), set1(theirs), mul(load(sums + d), set1(mine))));
            }
            running = {top, running.sum * mine + other[dim + 1] * theirs};
        }
        write_output<Model, Order>(call, token, head, sums, running);
    }
}

}  // namespace
}  // namespace kvfold
