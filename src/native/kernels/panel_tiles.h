// Tiles of a product with panels, in vector registers or in the machine's own tiles (AMX).
#pragma once

#include "formats.h"

namespace gemma {
namespace GEMMA_ISA {

// Returns the panels that a tile of so many rows reads at once: as many accumulators as registers hold beside the
// weights.
#if defined(GEMMA_AVX512)
constexpr int panels_for(size_t) { return GROUP_PANELS; }
#else
constexpr int panels_for(size_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif

#if defined(GEMMA_AMX)

constexpr int MAX_PANEL_TILE = 16;  // rows of a tile

// Configures the machine's tiles while it lives: sums and activations have so many rows, weights STEP columns of a
// panel.
class Tiles {
   public:
    ~Tiles() {
        if (rows_) _tile_release();
    }
    // Calls f for a tile of so many rows.
    template <class Call>
    void with(size_t rows, Call f) {
        if (rows != rows_) hold(rows);
        f(std::integral_constant<int, MAX_PANEL_TILE>());
    }

   private:
    void hold(size_t rows) {
        struct alignas(LINE) {  // the operand of LDTILECFG
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int t = 0; t < 6; t++) shapes.row_bytes[t] = LINE, shapes.rows[t] = t < 5 ? (uint8_t)rows : PANEL_ROWS;
        _tile_loadconfig(&shapes);
        rows_ = rows;
    }
    size_t rows_ = 0;
};

// Multiplies the configured rows with a part of NP panels. Adds to y unless it is the first part. Sums stay in four
// tiles. They take the products of a step's even columns in order, and of its odd ones, and then both. FETCH lines from
// `next` on are prefetched at every column pair.
template <int, int NP, int FETCH>
[[gnu::noinline]] void panel_tile(const uint32_t* w, const Half::X* x, size_t ldx, size_t pairs, const uint32_t* next,
                                  bool first, float* y, size_t ldy) {
    constexpr size_t STEP_PAIRS = Half::STEP / 2;
    const size_t panel = pairs * PANEL_ROWS, apart = ldx * sizeof *x, y_apart = ldy * sizeof *y;
    const auto fetch = [&](size_t i, int n) {  // one panel's share of what a step prefetches
        constexpr size_t LINES = FETCH * STEP_PAIRS;
        for (size_t l = LINES * n / NP; l < LINES * (n + 1) / NP; l++)
            __builtin_prefetch(next + (i * FETCH + l) * PANEL_ROWS, 0, 3);
    };
    asm volatile("" ::: "memory");  // the compiler does not see what tiles are loaded from
    // clang-format off
// tiles are named by literals
#define EACH_PANEL(f)                 \
    f(0);                             \
    if constexpr (NP > 1) { f(1); }   \
    if constexpr (NP > 2) { f(2); }   \
    if constexpr (NP > 3) { f(3); }
#define BEGIN(n)              \
    if (first) _tile_zero(n); \
    else _tile_loadd(n, y + n * PANEL_ROWS, y_apart)
#define ADD(n)                                            \
    fetch(i, n);                                          \
    _tile_loadd(5, w + n * panel + i * PANEL_ROWS, LINE); \
    _tile_dpbf16ps(n, 4, 5)
#define END(n) _tile_stored(n, y + n * PANEL_ROWS, y_apart)
    // clang-format on
    EACH_PANEL(BEGIN)
    for (size_t i = 0; i < pairs; i += STEP_PAIRS) {
        _tile_loadd(4, x + 2 * i, apart);
        EACH_PANEL(ADD)
    }
    EACH_PANEL(END)
#undef EACH_PANEL
#undef BEGIN
#undef ADD
#undef END
    asm volatile("" ::: "memory");
}

#else

constexpr int MAX_PANEL_TILE = 6;  // rows of a tile
#if defined(GEMMA_AVX512)
#define UNROLL_TWO
#else
#define UNROLL_TWO _Pragma("GCC unroll 2")
#endif

struct Tiles {
    // Calls f for a tile of so many rows, as a constant.
    template <class Call>
    void with(size_t rows, Call f) {
        with_constant<MAX_PANEL_TILE>(rows, f);
    }
};

// Multiplies MR rows with a part of NP panels. Adds to y unless it is the first part. FETCH lines from `next` on are
// prefetched at every column pair. It is a function of its own: among its callers' variables, the loop would have too
// few registers for its sums.
template <int MR, int NP, int FETCH>
[[gnu::noinline]] void panel_tile(const uint32_t* w, const Half::X* x, size_t ldx, size_t pairs, const uint32_t* next,
                                  bool first, float* y, size_t ldy) {
    constexpr int NV = NP * PANEL_VECTORS;
    V acc[MR * NV];
    UNROLL for (int i = 0; i < MR * NV; i++) acc[i] = zero();
    Spaced<Half::X> rows(x, ldx);
    UNROLL_TWO for (size_t i = 0; i < pairs; i++) {
        UNROLL for (int n = 0; n < FETCH; n++) __builtin_prefetch(next + (i * FETCH + n) * PANEL_ROWS, 0, 3);
#if defined(GEMMA_CONTROL)
        const size_t k = MR > 1 ? pairs - 1 - i : i;  // the same products, summed from the part's end to its beginning
        Half::pair<MR, NP>(acc, w + k * PANEL_ROWS, pairs * PANEL_ROWS, Spaced<Half::X>(x + 2 * k, ldx));
#else
        Half::pair<MR, NP>(acc, w + i * PANEL_ROWS, pairs * PANEL_ROWS, rows);
        rows.advance(2);
#endif
    }
    UNROLL for (int i = 0; i < MR * NV; i++) {
        float* to = y + i / NV * ldy + i % NV * W;
        store(to, first ? acc[i] : add(load(to), acc[i]));
    }
}

#endif

}  // namespace GEMMA_ISA
}  // namespace gemma
