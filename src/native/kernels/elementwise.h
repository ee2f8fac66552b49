// Operators on single vectors, and how they go through one.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gemma {
namespace GEMMA_ISA {

// Calls f(first element, elements) for each whole vector, and for what is left.
template <class F>
inline void each(size_t n, F f) {
    for (size_t i = 0; i + W <= n; i += W) f(i, W);
    if (n % W) f(n - n % W, (int)(n % W));
}
inline V take(const float* p, int n) { return n == W ? load(p) : load_part(p, n); }
inline void put(float* p, V v, int n) { n == W ? store(p, v) : store_part(p, v, n); }

// Returns the first n lanes, and 0 in the others.
inline V only(V v, int n) {
    if (n == W) return v;
    float lanes[W] = {};
    store_part(lanes, v, n);
    return load(lanes);
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* out);
void add_rms_norm(float* residual, const float* x, const float* weight, float eps, size_t n);
void rotate(float* x, const float* cos, const float* sin, size_t n);
void gated(const float* gate, const float* up, size_t n, float* out);
void scale(float* x, float factor, size_t n);
// out = clamp(round(x / scale), -128, 127)
void steps(const float* x, float scale, size_t n, float* out);
// x = clamp(round(x * factor / scale), -128, 127) * scale, or x * factor where the scale is 0
void rounded(float* x, float factor, float scale, size_t n);
void axpy(float* y, float factor, const float* x, size_t n);
void softcap(float* x, float cap, size_t n);
float largest(const float* x, size_t n);
void softmax(float* x, size_t n);

}  // namespace GEMMA_ISA
}  // namespace gemma
