// What the products of all weight types share: how rows are cut into tiles, and how weights are prefetched.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

// Accumulators stay in registers only where the loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 64")

namespace gemma {
namespace GEMMA_ISA {

constexpr size_t FETCH_BYTES = 8 << 10;  // weights that are on their way while others are multiplied
constexpr size_t PASS_ROWS = 16;         // weight rows that all tiles of rows go through before the next ones

constexpr size_t padded_to(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Calls f(first row, rows) for the tiles of M rows. Tiles are as even as they can be and have at most `most` rows. With
// `fours`, they have four rows each.
template <class Call>
inline void each_tile(size_t M, size_t most, bool fours, Call f) {
    for (size_t m = 0, rows; m < M; m += rows) {
        const size_t left = M - m, tiles = (left + most - 1) / most;
        rows = (left + tiles - 1) / tiles;
        // three rows take longest, so they are left over of seven only
        if (fours && left > most) rows = left % 4 == 3 && left > 7 ? 5 : 4;
        f(m, rows);
    }
}

// Calls f(first row, rows, begin, end) for the tiles of M rows that hold some of the rows m0 .. m1: begin .. end.
template <class Call>
inline void each_tile_within(size_t M, size_t most, bool fours, size_t m0, size_t m1, Call f) {
    each_tile(M, most, fours, [&](size_t m, size_t rows) {
        const size_t begin = std::max(m, m0), end = std::min(m + rows, m1);
        if (begin < end) f(m, rows, begin, end);
    });
}

// Calls f with a count of at most MOST as a constant, so that loops over it are unrolled.
template <int MOST, class Call>
inline void with_constant(size_t count, Call f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_constant<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>());
}

// Keeps a vector in its register. Else the compiler loads it anew for each use, and these loops have no loads to spare.
inline V held(V v) {
#if defined(GEMMA_AVX2)
    asm("" : "+x"(v));
#endif
    return v;
}

// y[m, n] = the sum of the lanes of accumulator [m][n]
template <int MR, int NR>
inline void reduce(const V* acc, float* y, size_t ldy) {
    constexpr int ALL = MR * NR;
    if constexpr (NR % 4 == 0) {
        int i = 0;
#if defined(GEMMA_AVX512)
        UNROLL for (; i + 16 <= ALL; i += 16) {
            float* out[4];
            UNROLL for (int g = 0; g < 4; g++) out[g] = y + (i + 4 * g) / NR * ldy + (i + 4 * g) % NR;
            sum16(acc + i, out);
        }
        UNROLL for (; i + 8 <= ALL; i += 8) {
            float* const out[] = {y + i / NR * ldy + i % NR, y + (i + 4) / NR * ldy + (i + 4) % NR};
            sum8(acc + i, out);
        }
#endif
        UNROLL for (; i < ALL; i += 4) sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], y + i / NR * ldy + i % NR);
    } else {
        float sums[ALL];
        UNROLL for (int i = 0; i < ALL / 4 * 4; i += 4) sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums + i);
        UNROLL for (int i = ALL / 4 * 4; i < ALL; i++) sums[i] = sum(acc[i]);
        UNROLL for (int m = 0; m < MR; m++) UNROLL for (int n = 0; n < NR; n++) y[m * ldy + n] = sums[m * NR + n];
    }
}

// Where to prefetch from while a share of `size` elements is read: `ahead` of the place that is read. Past the end of
// the share lies what is read after it.
template <class T>
struct Ahead {
    const T* begin;
    size_t size, ahead;
    const T* then;
    const T* beside = nullptr;  // as much of it is prefetched in step with the share; may be null

    // Returns the place for the elements from `at` on. A step takes `step` elements.
    const T* operator()(size_t at, size_t step) const {
        if (at + ahead < size) return begin + at + ahead;
        const size_t inside = size > ahead ? (size - ahead + step - 1) / step * step : 0;  // first step past the end
        return then ? then + (at - inside) : nullptr;
    }
};

}  // namespace GEMMA_ISA
}  // namespace gemma
