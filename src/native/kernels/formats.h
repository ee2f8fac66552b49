// How floating-point weights meet activations. A format says what one step of a sum multiplies.
#pragma once

#include "tiles.h"

namespace gemma {
namespace GEMMA_ISA {

constexpr int PANEL_VECTORS = PANEL_ROWS / W, GROUP_PANELS = GROUP_ROWS / PANEL_ROWS;

// Returns vector n of a column pair. The panels lie `panel` numbers apart.
inline const uint32_t* vector_of(const uint32_t* w, int n, size_t panel) {
    return w + n / PANEL_VECTORS * panel + n % PANEL_VECTORS * W;
}

// Up to six rows, `apart` numbers from one another. Two pointers and the distance reach all of them in the address of a
// load. The compiler would spend more registers than there are.
template <class X>
struct Spaced {
    const X *first, *fourth;
    size_t apart;

    Spaced(const X* x, size_t apart) : first(x), fourth(x + 3 * apart), apart(apart) { asm("" : "+r"(fourth)); }
    const X* row(int m) const { return (m < 3 ? first : fourth) + m % 3 * apart; }
    void advance(size_t n) { first += n, fourth += n; }
};

struct Wide {  // fp32 weights and activations
    using T = float;
    using X = float;
    static constexpr size_t STEP = W;

    template <int MR, int NR>
    static inline void step(V* acc, const T* w, size_t ldw, const X* x) {
        V wv[NR];
        UNROLL for (int n = 0; n < NR; n++) wv[n] = load(w + n * ldw);
        UNROLL for (int m = 0; m < MR; m++) {
            const V xv = held(load(x + m * STEP));
            UNROLL for (int n = 0; n < NR; n++) acc[m * NR + n] = fma(xv, wv[n], acc[m * NR + n]);
        }
    }
    static inline void convert(const float* x, size_t count, X* out) {
        for (size_t i = 0; i < STEP; i++) out[i] = i < count ? x[i] : 0.0f;
    }
    static Buffer<X>& place(Activations& rows) { return rows.wide; }
    static const Buffer<X>& place(const Activations& rows) { return rows.wide; }
};

#if defined(GEMMA_BF16)

struct Half {  // bf16 weights and activations, multiplied in pairs and summed in fp32
    using T = uint16_t;
    using X = uint16_t;
    static constexpr size_t STEP = 2 * W;

    template <int MR, int NR>
    static inline void step(V* acc, const T* w, size_t ldw, const X* x) {
        __m512bh wv[NR];
        UNROLL for (int n = 0; n < NR; n++) wv[n] = (__m512bh)_mm512_loadu_si512(w + n * ldw);
        UNROLL for (int m = 0; m < MR; m++) {
            const __m512bh xv = (__m512bh)_mm512_loadu_si512(x + m * STEP);
            UNROLL for (int n = 0; n < NR; n++) acc[m * NR + n] = _mm512_dpbf16_ps(acc[m * NR + n], xv, wv[n]);
        }
    }
    static inline void convert(const float* x, size_t count, X* out) {
        const V low = count >= W ? load(x) : load_part(x, (int)count);
        const V high = count >= STEP ? load(x + W) : count > W ? load_part(x + W, (int)(count - W)) : zero();
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    // PANELS: multiplies a column pair of NP panels, `panel` numbers apart, with MR rows.
    template <int MR, int NP>
    static inline void pair(V* acc, const uint32_t* w, size_t panel, const Spaced<X>& x) {
        constexpr int NV = NP * PANEL_VECTORS;
        __m512bh wv[NV];
        UNROLL for (int n = 0; n < NV; n++) wv[n] = (__m512bh)_mm512_loadu_si512(vector_of(w, n, panel));
        UNROLL for (int m = 0; m < MR; m++) {
            int both;
            std::memcpy(&both, x.row(m), sizeof both);
            const __m512bh xv = (__m512bh)held((V)_mm512_set1_epi32(both));
            UNROLL for (int n = 0; n < NV; n++) acc[m * NV + n] = _mm512_dpbf16_ps(acc[m * NV + n], xv, wv[n]);
        }
    }
    // Converts the columns of a whole step and keeps their order.
    static inline void convert_in_order(const float* x, X* out) { convert(x, STEP, out); }
    static Buffer<X>& place(Activations& rows) { return rows.half; }
    static const Buffer<X>& place(const Activations& rows) { return rows.half; }
};

#else

struct Half {  // bf16 weights, widened. A step holds its even columns and then its odd ones; activations do, too.
    using T = uint16_t;
    using X = float;
    static constexpr size_t STEP = 2 * W;

    template <int MR, int NR>
    static inline void step(V* acc, const T* w, size_t ldw, const X* x) {
        V wv[NR];
        UNROLL for (int n = 0; n < NR; n++) wv[n] = even(w + n * ldw);
        UNROLL for (int m = 0; m < MR; m++) {
            const V xv = held(load(x + m * STEP));
            UNROLL for (int n = 0; n < NR; n++) acc[m * NR + n] = fma(xv, wv[n], acc[m * NR + n]);
        }
        UNROLL for (int n = 0; n < NR; n++) wv[n] = odd(w + n * ldw);
        UNROLL for (int m = 0; m < MR; m++) {
            const V xv = held(load(x + m * STEP + W));
            UNROLL for (int n = 0; n < NR; n++) acc[m * NR + n] = fma(xv, wv[n], acc[m * NR + n]);
        }
    }
    static inline void convert(const float* x, size_t count, X* out) {
        for (size_t i = 0; i < STEP; i++) out[i % 2 * W + i / 2] = i < count ? x[i] : 0.0f;
    }
    // PANELS: multiplies a column pair of NP panels, `panel` numbers apart, with MR rows.
    template <int MR, int NP>
    static inline void pair(V* acc, const uint32_t* w, size_t panel, const Spaced<X>& x) {
        constexpr int NV = NP * PANEL_VECTORS;
        UNROLL for (int i = 0; i < 2; i++) {
            const auto weights = [&](int n) {
                const auto* from = (const uint16_t*)vector_of(w, n, panel);
                return i ? odd(from) : even(from);
            };
            if constexpr (MR >= NV) {
                V wv[NV];
                UNROLL for (int n = 0; n < NV; n++) wv[n] = weights(n);
                UNROLL for (int m = 0; m < MR; m++) {
                    const V xv = held(set1(x.row(m)[i]));
                    UNROLL for (int n = 0; n < NV; n++) accumulate(acc[m * NV + n], xv, wv[n]);
                }
            } else {
                V xv[MR];
                UNROLL for (int m = 0; m < MR; m++) xv[m] = held(set1(x.row(m)[i]));
                UNROLL for (int n = 0; n < NV; n++) {
                    const V wv = held(weights(n));
                    UNROLL for (int m = 0; m < MR; m++) accumulate(acc[m * NV + n], xv[m], wv);
                }
            }
        }
    }
    // Converts the columns of a whole step and keeps their order.
    static inline void convert_in_order(const float* x, X* out) { store(out, load(x)), store(out + W, load(x + W)); }
    static Buffer<X>& place(Activations& rows) { return rows.wide; }
    static const Buffer<X>& place(const Activations& rows) { return rows.wide; }
};

#endif

}  // namespace GEMMA_ISA
}  // namespace gemma
