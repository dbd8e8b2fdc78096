// exp and tanh to about one unit in the last place of fp32, and the logits' way to the softmax.
#pragma once

#include <cmath>

#include "kernels.h"
// A path includes its simd_*.h first.

namespace kvfold {
namespace {

constexpr float NO_LOGIT = -INFINITY;

// e^x for x <= 0 (Cephes' polynomial after taking out the power of two); 0 where the result is below the normal
// numbers.
inline Vec exp_of_nonpositive(Vec x) {
    x = max(set1(-104.0f), x);
    const Vec power = round(mul(x, set1(1.44269504088896341f)));
    Vec rest = fma(power, set1(-0.693359375f), x);
    rest = fma(power, set1(2.12194440e-4f), rest);
    Vec series = set1(1.9875691500e-4f);
    series = fma(series, rest, set1(1.3981999507e-3f));
    series = fma(series, rest, set1(8.3334519073e-3f));
    series = fma(series, rest, set1(4.1665795894e-2f));
    series = fma(series, rest, set1(1.6666665459e-1f));
    series = fma(series, rest, set1(5.0000001201e-1f));
    return scale_by_power(add(fma(series, mul(rest, rest), rest), set1(1.0f)), power);
}

inline float exp_of_nonpositive_number(float x) {
    float lanes[LANES];
    store(lanes, exp_of_nonpositive(set1(x)));
    return lanes[0];
}

// Cephes' polynomial near 0, where the other form would cancel.
inline Vec tanh(Vec x) {
    const Vec size = abs(x);
    const Vec e = exp_of_nonpositive(mul(size, set1(-2.0f)));
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

// Scales and caps `count` dot products (a multiple of LANES) in place.
inline void products_to_logits(const Call &call, float *logits, int count) {
    const Vec scaling = set1(call.scaling);
    for (int i = 0; i < count; i += LANES) store(logits + i, mul(load(logits + i), scaling));
    if (call.softcap == 0.0f) return;
    const Vec cap = set1(call.softcap);
    for (int i = 0; i < count; i += LANES) {
        store(logits + i, mul(cap, tanh(div(load(logits + i), cap))));
    }
}

// Removes the logits of `count` slots from `slot` on that are outside `visible`.
inline void mask_logits(float *logits, int64_t slot, int64_t count, SlotRange visible) {
    const int64_t first = visible.first - slot;
    const int64_t stop = visible.stop - slot;
    for (int64_t i = 0; i < (first < count ? first : count); ++i) logits[i] = NO_LOGIT;
    for (int64_t i = stop > 0 ? stop : 0; i < count; ++i) logits[i] = NO_LOGIT;
}

// The running softmax of one query row: the largest logit so far and the sum of exp(logit - top).
struct Running {
    float top;
    float sum;
};

// Turns `count` logits (a multiple of LANES) into exp(logit - top), adds them to the sum, and returns the factor for
// what was summed under the former top. Rows that have seen nothing yet keep a sum of 0.
inline float update(Running &running, float *logits, int count) {
    Vec largest = load(logits);
    for (int i = LANES; i < count; i += LANES) largest = max(largest, load(logits + i));
    const float tile_top = reduce_max(largest);
    const float top = tile_top > running.top ? tile_top : running.top;
    const float base = top == NO_LOGIT ? 0.0f : top;
    Vec sum = set1(0.0f);
    for (int i = 0; i < count; i += LANES) {
        const Vec weights = exp_of_nonpositive(sub(load(logits + i), set1(base)));
        store(logits + i, weights);
        sum = add(sum, weights);
    }
    const float correction = top == running.top ? 1.0f : exp_of_nonpositive_number(running.top - base);
    running = {top, running.sum * correction + reduce_add(sum)};
    return correction;
}

}  // namespace
}  // namespace kvfold
