#include "elementwise.h"

#include <algorithm>
#include <limits>

namespace gemma {
namespace GEMMA_ISA {
namespace {

inline float inverse_rms(const float* x, float eps, size_t n) {
    V squares = zero();
    each(n, [&](size_t i, int w) {
        V v = take(x + i, w);
        squares = fma(v, v, squares);
    });
    return 1.0f / std::sqrt(sum(squares) / (float)n + eps);
}

// What is no number stays none: so it is the second operand.
inline V whole_steps(V v, V scale) { return min(set1(127.0f), max(set1(-128.0f), round(div(v, scale)))); }

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* out) {
    const V factor = set1(inverse_rms(x, eps, n));
    each(n, [&](size_t i, int w) {
        V v = mul(take(x + i, w), factor);
        put(out + i, weight ? mul(v, take(weight + i, w)) : v, w);
    });
}

void add_rms_norm(float* residual, const float* x, const float* weight, float eps, size_t n) {
    const V factor = set1(inverse_rms(x, eps, n));
    each(n, [&](size_t i, int w) {
        put(residual + i, add(take(residual + i, w), mul(mul(take(x + i, w), factor), take(weight + i, w))), w);
    });
}

void rotate(float* x, const float* cos, const float* sin, size_t n) {
    const size_t half = n / 2;
    each(half, [&](size_t i, int w) {
        V a = take(x + i, w), b = take(x + half + i, w);
        put(x + i, fma(b, take(sin + i, w), mul(a, take(cos + i, w))), w);
        put(x + half + i, fma(a, take(sin + half + i, w), mul(b, take(cos + half + i, w))), w);
    });
}

void gated(const float* gate, const float* up, size_t n, float* out) {
    each(n, [&](size_t i, int w) { put(out + i, mul(gelu(take(gate + i, w)), take(up + i, w)), w); });
}

void scale(float* x, float factor, size_t n) {
    each(n, [&](size_t i, int w) { put(x + i, mul(take(x + i, w), set1(factor)), w); });
}

void steps(const float* x, float scale, size_t n, float* out) {
    each(n, [&](size_t i, int w) { put(out + i, whole_steps(take(x + i, w), set1(scale)), w); });
}

void rounded(float* x, float factor, float scale, size_t n) {
    each(n, [&](size_t i, int w) {
        V v = mul(take(x + i, w), set1(factor));
        if (scale != 0) v = mul(whole_steps(v, set1(scale)), set1(scale));
        put(x + i, v, w);
    });
}

void axpy(float* y, float factor, const float* x, size_t n) {
    each(n, [&](size_t i, int w) { put(y + i, fma(set1(factor), take(x + i, w), take(y + i, w)), w); });
}

void softcap(float* x, float cap, size_t n) {
    each(n, [&](size_t i, int w) { put(x + i, mul(tanh(div(take(x + i, w), set1(cap))), set1(cap)), w); });
}

float largest(const float* x, size_t n) {
    V best = set1(x[0]);
    size_t i = 0;
    for (; i + W <= n; i += W) best = max(best, load(x + i));
    float result = maximum(best);
    for (; i < n; i++) result = std::max(result, x[i]);
    return result;
}

void softmax(float* x, size_t n) {
    const float top = largest(x, n);
    V total = zero();
    each(n, [&](size_t i, int w) {
        const V v = w == W ? load(x + i) : load_part(x + i, w, -std::numeric_limits<float>::infinity());
        const V e = only(exp(sub(v, set1(top))), w);
        put(x + i, e, w);
        total = add(total, e);
    });
    scale(x, 1.0f / sum(total), n);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
