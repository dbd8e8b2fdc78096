// 2^x and tanh to about one unit in the last place of fp32, and the logits' way to the softmax.
//
// Logits are kept times log2(e), so that their exponentials are powers of two.
#pragma once

#include <cmath>

#include "kernels.h"
// A path includes its simd_*.h first.

namespace kvfold {
namespace {

constexpr float NO_LOGIT = -INFINITY;
constexpr float LOG2_E = 1.44269504088896341f;

// 2^x for x <= 0: the whole part of x goes into the exponent, and a polynomial that is off by 2e-9 at most makes the
// rest; 0 where the result is below the normal numbers.
inline Vec exp2_of_nonpositive(Vec x) {
    x = max(set1(-150.0f), x);
    const Vec power = round(x);
    const Vec rest = sub(x, power);
    Vec series = set1(1.5353360504e-4f);
    series = fma(series, rest, set1(1.3398875017e-3f));
    series = fma(series, rest, set1(9.6184369177e-3f));
    series = fma(series, rest, set1(5.5503323674e-2f));
    series = fma(series, rest, set1(2.4022647738e-1f));
    series = fma(series, rest, set1(6.9314718246e-1f));
    return scale_by_power(fma(series, rest, set1(1.0f)), power);
}

inline float exp2_of_nonpositive_number(float x) {
    float lanes[LANES];
    store(lanes, exp2_of_nonpositive(set1(x)));
    return lanes[0];
}

// Cephes' polynomial near 0, where the other form would cancel.
inline Vec tanh(Vec x) {
    const Vec size = abs(x);
    const Vec e = exp2_of_nonpositive(mul(size, set1(-2.0f * LOG2_E)));
    const Vec large = div(sub(set1(1.0f), e), add(set1(1.0f), e));
    const Vec square = mul(x, x);
    Vec series = set1(-5.70498872745e-3f);
    series = fma(series, square, set1(2.06390887954e-2f));
    series = fma(series, square, set1(-5.37397155531e-2f));
    series = fma(series, square, set1(1.33314422036e-1f));
    series = fma(series, square, set1(-3.33332819422e-1f));
    const Vec small = fma(mul(series, square), x, x);
    return select_less(size, set1(0.625f), small, with_sign_of(large, x));
}

// Not inlined: what it keeps in registers would cost the callers that cap nothing.
__attribute__((noinline)) static void products_to_capped_logits(const Call &call, float *logits, int count) {
    const Vec scaling = set1(call.scaling);
    const Vec cap = set1(call.softcap);
    const Vec capped = set1(call.softcap * LOG2_E);
    for (int i = 0; i < count; i += LANES) {
        store(logits + i, mul(capped, tanh(div(mul(load(logits + i), scaling), cap))));
    }
}

// Makes logits of `count` dot products (a multiple of LANES) in place.
inline void products_to_logits(const Call &call, float *logits, int count) {
    if (call.softcap == 0.0f) {
        const Vec scaling = set1(call.scaling * LOG2_E);
        for (int i = 0; i < count; i += LANES) store(logits + i, mul(load(logits + i), scaling));
        return;
    }
    products_to_capped_logits(call, logits, count);
}

// Removes the logits of `count` slots from `slot` on that are outside `visible`.
inline void mask_logits(float *logits, int64_t slot, int64_t count, SlotRange visible) {
    const int64_t first = visible.first - slot;
    const int64_t stop = visible.stop - slot;
    for (int64_t i = 0; i < (first < count ? first : count); ++i) logits[i] = NO_LOGIT;
    for (int64_t i = stop > 0 ? stop : 0; i < count; ++i) logits[i] = NO_LOGIT;
}

// The running softmax of one query row: the largest logit so far and the sum of 2^(logit - top).
struct Running {
    float top;
    float sum;
};

// Turns logits into 2^(logit - top), adds them to the sum, and returns the factor for what was summed under the former
// top. Rows that have seen nothing yet keep a sum of 0.
template <int COUNT>
inline float update(Running &running, float (&logits)[COUNT]) {
    Vec largest = load(logits);
    for (int i = LANES; i < COUNT; i += LANES) largest = max(largest, load(logits + i));
    float correction = 1.0f;
    if (any_greater(largest, set1(running.top))) {
        const float top = reduce_max(largest);
        correction = exp2_of_nonpositive_number(running.top - top);
        running = {top, running.sum * correction};
    }
    const Vec base = set1(running.top == NO_LOGIT ? 0.0f : running.top);
    Vec sum = set1(0.0f);
    for (int i = 0; i < COUNT; i += LANES) {
        const Vec weights = exp2_of_nonpositive(sub(load(logits + i), base));
        store(logits + i, weights);
        sum = add(sum, weights);
    }
    running.sum += reduce_add(sum);
    return correction;
}

}  // namespace
}  // namespace kvfold
