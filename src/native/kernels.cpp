// Compiled once for each instruction set, with GEMMA_ISA naming the namespace and the function that gives them out.
#include "kernels.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace gemma {
namespace GEMMA_ISA {

// ---------------------------------------------------------------------------------------------- linear, floating point
//
// Every output element has one accumulator vector, filled in order of k and then summed by one tree, whatever the tile
// it is computed in. A format says how a step of weights meets a step of activations.

// accumulators stay in registers only where the loops over them are unrolled
#define UNROLL _Pragma("GCC unroll 64")

// Calls f(first row, rows) for the tiles of M rows: as even ones of at most `most` as there are, or fours.
template <class Call>
inline void each_tile(size_t M, size_t most, bool fours, Call f) {
    for (size_t m = 0, rows; m < M; m += rows) {
        const size_t left = M - m, tiles = (left + most - 1) / most;
        rows = (left + tiles - 1) / tiles;
        if (fours && left > most) rows = left % 4 == 3 && left > 7 ? 5 : 4;  // three take longest: left over of seven only
        f(m, rows);
    }
}

// Calls f with a count of at most MOST as a constant: loops over it are unrolled.
template <int MOST, class Call>
inline void with_constant(size_t count, Call f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_constant<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>());
}

// Keeps the compiler from loading a vector anew for each of its uses: loads are what these loops have least to spare of.
inline V held(V v) {
#if defined(GEMMA_AVX2)
    asm("" : "+x"(v));
#endif
    return v;
}

constexpr size_t padded_to(size_t n, size_t step) { return (n + step - 1) / step * step; }

constexpr int PANEL_VECTORS = PANEL_ROWS / W, GROUP_PANELS = GROUP_ROWS / PANEL_ROWS;

// Vector n of a pair of columns of panels that are `panel` numbers apart.
inline const uint32_t* vector_of(const uint32_t* w, int n, size_t panel) {
    return w + n / PANEL_VECTORS * panel + n % PANEL_VECTORS * W;
}

// Up to six rows, `apart` numbers from one another. Two pointers and the distance reach all of them in a load's address,
// where the compiler would spend more registers than there are.
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
    static Buffer<X>& place(Rows& rows) { return rows.wide; }
    static const Buffer<X>& place(const Rows& rows) { return rows.wide; }
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
    // Panels: a pair of columns of NP panels, `panel` numbers apart, and of MR rows, `ldx` apart.
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
    // A whole step's columns in order.
    static inline void convert_in_order(const float* x, X* out) { convert(x, STEP, out); }
    static Buffer<X>& place(Rows& rows) { return rows.half; }
    static const Buffer<X>& place(const Rows& rows) { return rows.half; }
};

#else

struct Half {  // bf16 weights, widened: the even columns of a step and then the odd ones, and activations in that order
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
    // Panels: a pair of columns of NP panels, `panel` numbers apart, and of MR rows, `ldx` apart.
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
    // A whole step's columns in order.
    static inline void convert_in_order(const float* x, X* out) { store(out, load(x)), store(out + W, load(x + W)); }
    static Buffer<X>& place(Rows& rows) { return rows.wide; }
    static const Buffer<X>& place(const Rows& rows) { return rows.wide; }
};

#endif

// y[m, n] = the sum of accumulator [m][n]'s lanes
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
        UNROLL for (; i < ALL; i += 4)
            sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], y + i / NR * ldy + i % NR);
    } else {
        float sums[ALL];
        UNROLL for (int i = 0; i < ALL / 4 * 4; i += 4) sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums + i);
        UNROLL for (int i = ALL / 4 * 4; i < ALL; i++) sums[i] = sum(acc[i]);
        UNROLL for (int m = 0; m < MR; m++)
            UNROLL for (int n = 0; n < NR; n++) y[m * ldy + n] = sums[m * NR + n];
    }
}

// What a tile does with its sums: a long row is gone through in parts, and the accumulators wait in memory in between.
struct Pass {
    bool first, last;
};

// MR rows, in turn in every step of x, by NR weight rows of K columns. `next` are weights to fetch meanwhile, of as many
// rows and columns, `beside` what lies as these weights do and is fetched with them; both may be null.
template <class F, int MR, int NR>
inline void tile(const typename F::T* w, size_t ldw, const typename F::X* x, size_t K, const typename F::T* next,
                 const typename F::T* beside, const Pass& pass, float* waiting, float* y, size_t ldy) {
    using T = typename F::T;
    V acc[MR * NR];
    if (pass.first) {
        UNROLL for (int i = 0; i < MR * NR; i++) acc[i] = zero();
    } else {
        UNROLL for (int i = 0; i < MR * NR; i++) acc[i] = load(waiting + i * W);
    }
    size_t k = 0;
#if defined(GEMMA_CONTROL)
    if constexpr (MR > 1) {  // the same products, summed from the row's end to its beginning
        const size_t whole = K / F::STEP;
        for (size_t i = whole; i-- > 0;) F::template step<MR, NR>(acc, w + i * F::STEP, ldw, x + i * MR * F::STEP);
        k = whole * F::STEP, x += whole * MR * F::STEP;
    }
#endif
    for (; k + F::STEP <= K; k += F::STEP, x += MR * F::STEP) {
        if (next && k * sizeof(T) % LINE == 0)
            UNROLL for (int n = 0; n < NR; n++) __builtin_prefetch(next + n * ldw + k, 0, 3);
        if (beside && k * sizeof(T) % LINE == 0)
            UNROLL for (int n = 0; n < NR; n++) __builtin_prefetch(beside + n * ldw + k, 0, 3);
        F::template step<MR, NR>(acc, w + k, ldw, x);
    }
    if (k < K) {  // fewer columns than a step: with zeros behind them
        T rest[NR * F::STEP] = {};
        for (int n = 0; n < NR; n++) std::copy_n(w + n * ldw + k, K - k, rest + n * F::STEP);
        F::template step<MR, NR>(acc, rest, F::STEP, x);
    }
    if (pass.last) return reduce<MR, NR>(acc, y, ldy);
    UNROLL for (int i = 0; i < MR * NR; i++) store(waiting + i * W, acc[i]);
}

// Rows to a tile, and weight rows: as many accumulators as registers hold beside the weights.
constexpr int MAX_ROWS = 6;
constexpr size_t PART_COLUMNS = 512;  // of a row that is gone through in parts
#if defined(GEMMA_AVX512)
constexpr int columns_for(int rows) { return rows <= 2 ? 8 : 4; }
// Where rows are short, the sums across lanes take long; those of sixteen accumulators cost least.
constexpr bool by_fours(size_t K) { return K <= PART_COLUMNS; }
#else
constexpr int columns_for(int rows) { return rows <= 2 ? 4 : 2; }
constexpr bool by_fours(size_t) { return false; }
#endif

// Calls f(first row, rows, begin, end) for the tiles of M rows that have some of the rows m0 .. m1: begin .. end.
template <class Call>
inline void each_tile_within(size_t M, size_t most, bool fours, size_t m0, size_t m1, Call f) {
    each_tile(M, most, fours, [&](size_t m, size_t rows) {
        const size_t begin = std::max(m, m0), end = std::min(m + rows, m1);
        if (begin < end) f(m, rows, begin, end);
    });
}

template <class T>
inline void grow(Buffer<T>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
}

// Rows as `tile` reads them: tile by tile, step by step, a step of each of the tile's rows in turn; zeros fill the last.
template <class F>
void prepare_dense(size_t M, size_t K, const Area& area, const float* x, size_t ldx, Rows& out) {
    const size_t padded = padded_to(K, F::STEP);
    auto* place = F::place(out).data();
    each_tile_within(M, MAX_ROWS, by_fours(K), area.m0, area.m1, [&](size_t m0, size_t rows, size_t begin, size_t end) {
        for (size_t k = area.k0; k < area.k1; k += F::STEP)
            for (size_t m = begin; m < end; m++)
                F::convert(x + (m - area.m0) * ldx + (k - area.k0), std::min(F::STEP, K - k),
                           place + m0 * padded + k * rows + (m - m0) * F::STEP);
    });
}

constexpr size_t FETCH_BYTES = 8 << 10;   // of weights that are on their way while others are multiplied
constexpr size_t ROWS_BYTES = 24 << 10;   // of activations that stay in the first-level cache beside them
constexpr size_t PASS_ROWS = 16;         // weight rows that all tiles of rows go through before the next ones

// Where to fetch from while a share of `size` units is gone through, `ahead` of its place: the share itself, and past its
// end what is read after it.
template <class T>
struct Ahead {
    const T* begin;
    size_t size, ahead;
    const T* then;
    const T* beside = nullptr;  // as much of it is fetched in step with the share; may be null

    // of the units from `at` on, where a step takes `step` units
    const T* operator()(size_t at, size_t step) const {
        if (at + ahead < size) return begin + at + ahead;
        const size_t inside = size > ahead ? (size - ahead + step - 1) / step * step : 0;  // first step that looks past the end
        return then ? then + (at - inside) : nullptr;
    }
};

// `count` weight rows from `w` on, columns k .. k + K of them, times MR rows; `fetch` only where it is not null.
template <class F, int MR>
void row_tile(const typename F::T* w, size_t ldw, size_t K, const typename F::X* x, size_t first, size_t count,
              const Ahead<typename F::T>* fetch, const Pass& pass, float* waiting, float* y, size_t ldy) {
    constexpr int NR = columns_for(MR);
    size_t n = 0;
    for (; n + NR <= count; n += NR)
        tile<F, MR, NR>(w + n * ldw, ldw, x, K, fetch ? (*fetch)((first + n) * ldw, NR * ldw) : nullptr,
                        fetch && fetch->beside ? fetch->beside + (first + n) * ldw : nullptr, pass, waiting + n * MR * W, y + n,
                        ldy);
    for (; n < count; n++)
        tile<F, MR, 1>(w + n * ldw, ldw, x, K, nullptr, nullptr, pass, waiting + n * MR * W, y + n, ldy);
}

// y[m, n] = x[m] . w[n] of `count` rows of w, x prepared. Where there is a `beside`, as many rows of it are fetched meanwhile.
template <class F>
void multiply(const typename F::T* w, size_t K, const typename F::X* x, size_t M, size_t count, float* y, size_t ldy,
              const void* then, const typename F::T* beside = nullptr) {
    static thread_local Buffer<float> waiting;
    using T = typename F::T;
    const size_t padded = padded_to(K, F::STEP);
    const bool parts = std::min(M, PASS_ROWS) * padded * sizeof(typename F::X) > ROWS_BYTES && K > PART_COLUMNS;
    const size_t part = parts ? PART_COLUMNS : K, block = parts || M > MAX_ROWS ? PASS_ROWS : count;
    if (parts) grow(waiting, block * M * W);
    // rows are fetched so far ahead that FETCH_BYTES are on their way; where parts are gone through, the next part
    const size_t ahead = part == K ? FETCH_BYTES / sizeof(T) : FETCH_BYTES / (PART_COLUMNS * sizeof(T)) * K;
    for (size_t n = 0; n < count; n += block)
        for (size_t k = 0; k < K; k += part) {
            const Pass pass{k == 0, k + part >= K};
            const Ahead<T> fetch{w + k, count * K, ahead, parts ? nullptr : (const T*)then, beside ? beside + k : nullptr};
            each_tile(M, MAX_ROWS, by_fours(K), [&](size_t m, size_t rows) {
                with_constant<MAX_ROWS>(rows, [&](auto constant) {
                    row_tile<F, constant>(w + n * K + k, K, std::min(part, K - k), x + m * padded + k * rows, n,
                                          std::min(block, count - n), m == 0 ? &fetch : nullptr, pass,
                                          waiting.data() + m * block * W, y + m * ldy + n, ldy);
                });
            });
        }
}

template <class F>
void linear_dense(const Weight& w, const Rows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy, const void* then) {
    multiply<F>((const typename F::T*)w.data + n0 * w.cols, w.cols, F::place(x).data(), M, n1 - n0, y, ldy, then);
}

// -------------------------------------------------------------------------------------------- linear, bf16 in panels
//
// Every output element has one lane of one accumulator for each part of columns, filled in order of k, whatever the tile it
// is computed in; the parts' sums are added in their order. The machine's own tiles go on from the sum of the parts before.

// Activations' rows are kept a line further apart than they are long: rows a multiple of SAME_SETS bytes apart would have
// every second one's columns in the same set of the first-level cache.
constexpr size_t apart_in_panels(size_t K) { return K + LINE / sizeof(Half::X); }
constexpr size_t SAME_SETS = 2048;
// Panels that a tile of so many rows goes through at once: as many accumulators as registers hold beside the weights.
#if defined(GEMMA_AVX512)
constexpr int panels_for(size_t) { return GROUP_PANELS; }
#else
constexpr int panels_for(size_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif

#if defined(GEMMA_AMX)

constexpr int MAX_PANEL_TILE = 16;  // rows of a tile

// What the machine's tiles hold while this lives: sums and activations so many rows, weights STEP columns of a panel.
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

// The rows that the tiles hold by a part of NP panels, added to y unless it is the first part. Sums stay in four tiles, which
// take the products of a step's even columns in order, and of its odd ones, and then both. Fetches FETCH lines from `next` on
// at every pair of columns.
template <int, int NP, int FETCH>
[[gnu::noinline]] void panel_tile(const uint32_t* w, const Half::X* x, size_t ldx, size_t pairs, const uint32_t* next,
                                  bool first, float* y, size_t ldy) {
    constexpr size_t STEP_PAIRS = Half::STEP / 2;
    const size_t panel = pairs * PANEL_ROWS, apart = ldx * sizeof *x, y_apart = ldy * sizeof *y;
    const auto fetch = [&](size_t i, int n) {  // a panel's share of a step's
        constexpr size_t LINES = FETCH * STEP_PAIRS;
        for (size_t l = LINES * n / NP; l < LINES * (n + 1) / NP; l++)
            __builtin_prefetch(next + (i * FETCH + l) * PANEL_ROWS, 0, 3);
    };
    asm volatile("" ::: "memory");  // the compiler does not see what tiles are loaded from
// tiles are named by literals
#define EACH_PANEL(f)                 \
    f(0);                             \
    if constexpr (NP > 1) { f(1); }   \
    if constexpr (NP > 2) { f(2); }   \
    if constexpr (NP > 3) { f(3); }
#define BEGIN(n)               \
    if (first) _tile_zero(n); \
    else _tile_loadd(n, y + n * PANEL_ROWS, y_apart)
#define ADD(n)                                            \
    fetch(i, n);                                          \
    _tile_loadd(5, w + n * panel + i * PANEL_ROWS, LINE); \
    _tile_dpbf16ps(n, 4, 5)
#define END(n) _tile_stored(n, y + n * PANEL_ROWS, y_apart)
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
#define PAIRS_AT_ONCE
#else
#define PAIRS_AT_ONCE _Pragma("GCC unroll 2")
#endif

struct Tiles {
    // Calls f for a tile of so many rows, which is a constant.
    template <class Call>
    void with(size_t rows, Call f) {
        with_constant<MAX_PANEL_TILE>(rows, f);
    }
};

// MR rows by a part of NP panels, added to y unless it is the first part. Fetches FETCH lines from `next` on at every pair
// of columns. A function of its own: among its callers' variables the loop has too few registers for its sums.
template <int MR, int NP, int FETCH>
[[gnu::noinline]] void panel_tile(const uint32_t* w, const Half::X* x, size_t ldx, size_t pairs, const uint32_t* next,
                                  bool first, float* y, size_t ldy) {
    constexpr int NV = NP * PANEL_VECTORS;
    V acc[MR * NV];
    UNROLL for (int i = 0; i < MR * NV; i++) acc[i] = zero();
    Spaced<Half::X> rows(x, ldx);
    PAIRS_AT_ONCE for (size_t i = 0; i < pairs; i++) {
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

// Rows as `panel_tile` reads them: one after the other, in order.
void prepare_panels(size_t K, const Area& area, const float* x, size_t ldx, Rows& out) {
    const size_t apart = apart_in_panels(K);
    auto* place = Half::place(out).data();
    for (size_t m = area.m0; m < area.m1; m++, x += ldx)
        for (size_t k = area.k0; k < area.k1; k += Half::STEP) Half::convert_in_order(x + (k - area.k0), place + m * apart + k);
}

// Whole panels n0 .. n1 of one group.
void multiply_panels(const Weight& w, const Rows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy, const uint32_t* then,
                     Stretches* also, Tiles& tiles) {
    const auto* from = x.borrowed ? (const Half::X*)x.borrowed : Half::place(x).data();
    const size_t ldx = x.borrowed ? x.apart : apart_in_panels(w.cols);
    const size_t pairs = w.cols / 2, group_end = std::min((n0 / GROUP_ROWS + 1) * GROUP_ROWS, w.rows);
    const size_t panels = (n1 - n0) / PANEL_ROWS, together = panels_for(M);
    const size_t passes = (M + MAX_PANEL_TILE - 1) / MAX_PANEL_TILE * ((panels + together - 1) / together);
    for (size_t k = 0; k < pairs; k += PART_PAIRS) {
        const size_t count = std::min(PART_PAIRS, pairs - k), panel = count * PANEL_ROWS;
        const uint32_t* part = w.panels(n0, k);
        // what is read after this part, and how many lines of it the first passes fetch at every pair of columns
        const size_t left = pairs - k - count, later = std::min(PART_PAIRS, left ? left : pairs);
        const uint32_t* next = left ? w.panels(n0, k + count) : then ? then : (const uint32_t*)w.data + group_end * pairs;
        const size_t lines = (left ? panels : GROUP_PANELS) * later, each = (lines + passes * count - 1) / (passes * count);
        const uint32_t* end = next + lines * PANEL_ROWS;
        each_tile(M, MAX_PANEL_TILE, false, [&](size_t m, size_t rows) {
            tiles.with(rows, [&](auto constant) {
                constexpr int NP = panels_for(constant);
                for (size_t n = 0; n < panels; n += NP)
                    with_constant<NP>(panels - n, [&](auto here) {
                        const auto tile = [&](auto fetch, const uint32_t* fetched) {
                            panel_tile<constant, here, fetch>(part + n * panel, from + m * ldx + 2 * k, ldx, count, fetched,
                                                              k == 0, y + m * ldy + n * PANEL_ROWS, ldy);
                        };
                        if (next >= end) {
                            const auto* other = also ? (const uint32_t*)also->take(count) : nullptr;
                            if (other) return tile(std::integral_constant<int, 1>(), other);
                            return tile(std::integral_constant<int, 0>(), next);
                        }
                        const size_t fetch = each <= 2 ? each : each <= 4 ? 4 : 8;
                        if (fetch == 1) tile(std::integral_constant<int, 1>(), next);
                        else if (fetch == 2) tile(std::integral_constant<int, 2>(), next);
                        else if (fetch == 4) tile(std::integral_constant<int, 4>(), next);
                        else tile(std::integral_constant<int, 8>(), next);
                        next += count * fetch * PANEL_ROWS;
                    });
            });
        });
    }
}

// The share's groups in turn; of a panel that is not wholly within it, the columns that are.
void linear_panels(const Weight& w, const Rows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy, const Next& then) {
    static thread_local Buffer<float> whole;
    Tiles tiles;
    for (size_t n = n0, end; n < n1; n = end) {
        const size_t begin = n / PANEL_ROWS * PANEL_ROWS, stop = std::min((n / GROUP_ROWS + 1) * GROUP_ROWS, w.rows);
        end = std::min(stop, n1);
        const auto* next = end == n1 ? (const uint32_t*)then.weights : nullptr;
        if (n == begin && end % PANEL_ROWS == 0) {
            multiply_panels(w, x, M, n, end, y + (n - n0), ldy, next, then.also, tiles);
            continue;
        }
        const size_t width = padded_to(end, PANEL_ROWS) - begin;
        grow(whole, M * width);
        multiply_panels(w, x, M, begin, begin + width, whole.data(), width, next, then.also, tiles);
        for (size_t m = 0; m < M; m++) std::copy_n(whole.data() + m * width + (n - begin), end - n, y + m * ldy + (n - n0));
    }
}

// ------------------------------------------------------------------------------------------------- linear, quantised

// Integer dot products of 64 columns, as W partial sums that are exact; then float: acc += partial * x scale * w scale.
// int8 has one scale for them; int4 two, of the even and of the odd four-column units (see `Weight`).
constexpr size_t BLOCK_COLS = 64;
static_assert(AREA_COLS % BLOCK_COLS == 0);

template <bool I8>
constexpr size_t SCALES = I8 ? 1 : 2;  // of a block

template <class T>
inline T read(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

#if defined(GEMMA_AVX512)

template <bool I8>
inline V spread(const float* scales) {
    if constexpr (I8) return set1(scales[0]);
    return _mm512_castpd_ps(_mm512_set1_pd(read<double>(scales)));
}

struct Block {
    __m512i v;
};
template <bool I8>
inline Block block(const uint8_t* w) {
    if constexpr (I8) return {_mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80))};  // w + 128, unsigned
    const __m256i b = _mm256_loadu_si256((const __m256i*)w), mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(b, mask), high = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}
// The unsigned weights' offset is taken off by what the lanes begin with: `start` a lane.
template <bool I8>
inline V partial(const Block& w, const int8_t* x, const int32_t* starts) {
    __m512i start;
    if constexpr (I8) start = _mm512_set1_epi32(starts[0]);
    else start = _mm512_set1_epi64(read<int64_t>(starts));
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, w.v, _mm512_loadu_si512(x)));
}

#elif defined(GEMMA_AVX2)

template <bool I8>
inline V spread(const float* scales) {
    if constexpr (I8) return set1(scales[0]);
    return _mm256_castpd_ps(_mm256_set1_pd(read<double>(scales)));
}

struct Block {
    __m256i low, high;
};
template <bool I8>
inline Block block(const uint8_t* w) {
    if constexpr (I8) return {_mm256_loadu_si256((const __m256i*)w), _mm256_loadu_si256((const __m256i*)(w + 32))};
    const __m256i b = _mm256_loadu_si256((const __m256i*)w), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(b, mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
}
template <bool I8>
inline V partial(const Block& w, const int8_t* x, const int32_t* starts) {
    const __m256i x0 = _mm256_loadu_si256((const __m256i*)x), x1 = _mm256_loadu_si256((const __m256i*)(x + 32));
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (I8) {  // |w| times x with w's sign: pairs stay below 2 ** 15 because x and w lie within 127
        const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(w.low), _mm256_sign_epi8(x0, w.low));
        const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(w.high), _mm256_sign_epi8(x1, w.high));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)));
    }
    // w + 8 lies within 15: four products stay below 2 ** 15
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, x0), _mm256_maddubs_epi16(w.high, x1));
    const __m256i start = _mm256_set1_epi64x(read<int64_t>(starts));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(pairs, ones), start));
}

#else

template <bool I8>
inline V spread(const float* scales) {
    V v;
    for (int i = 0; i < W; i++) v[i] = scales[i % SCALES<I8>];
    return v;
}

struct Block {
    int8_t v[64];
};
template <bool I8>
inline Block block(const uint8_t* w) {
    Block b;
    if constexpr (I8) std::memcpy(b.v, w, 64);
    else
        for (int i = 0; i < 32; i++) b.v[i] = (int8_t)((w[i] & 15) - 8), b.v[i + 32] = (int8_t)((w[i] >> 4) - 8);
    return b;
}
template <bool I8>
inline V partial(const Block& w, const int8_t* x, const int32_t*) {
    V out;
    for (int i = 0; i < W; i++) {
        int32_t total = 0;
        for (int j = 0; j < 4; j++)
            total += (int32_t)w.v[4 * i + j] * x[4 * i + j] + (int32_t)w.v[4 * i + j + 32] * x[4 * i + j + 32];
        out[i] = (float)total;
    }
    return out;
}

#endif

// What a lane begins with so that the weights' offset cancels: the group's sum times the offset over the group's lanes.
template <bool I8>
inline int32_t start_of(int32_t total) {
#if defined(GEMMA_AVX512)
    return I8 ? -8 * total : -total;  // 128 / 16 lanes, 8 / 8 lanes
#elif defined(GEMMA_AVX2)
    return I8 ? 0 : -2 * total;  // 8 / 4 lanes
#else
    return 0 * total;
#endif
}

template <bool I8, int MR, int NR>
inline void quantised_tile(const Weight& w, size_t n0, const Rows& x, size_t m0, const uint8_t* next, float* y, size_t ldy) {
    constexpr size_t S = SCALES<I8>;
    const size_t K = w.cols, blocks = K / BLOCK_COLS, bytes = w.row_bytes(), block_bytes = bytes / blocks;
    const uint8_t* data = (const uint8_t*)w.data + n0 * bytes;
    const float* scales = w.scales + n0 * blocks * S;
    const int8_t* values = x.values.data() + m0 * K;
    const float* x_scales = x.scales.data() + m0 * blocks * S;
    const int32_t* starts = x.starts.data() + m0 * blocks * S;
    V acc[MR * NR];
    UNROLL for (int i = 0; i < MR * NR; i++) acc[i] = zero();
    for (size_t b = 0; b < blocks; b++, values += MR * BLOCK_COLS, x_scales += MR * S, starts += MR * S) {
        Block wv[NR];
        V ws[NR];
        UNROLL for (int n = 0; n < NR; n++) {
            const uint8_t* wb = data + n * bytes + b * block_bytes;
            if (next && b * block_bytes % LINE == 0) __builtin_prefetch(next + n * bytes + b * block_bytes, 0, 3);
            wv[n] = block<I8>(wb);
            ws[n] = spread<I8>(scales + (n * blocks + b) * S);
        }
        UNROLL for (int m = 0; m < MR; m++) {
            const V xs = held(spread<I8>(x_scales + m * S));
            UNROLL for (int n = 0; n < NR; n++) {
                const V part = partial<I8>(wv[n], values + m * BLOCK_COLS, starts + m * S);
                acc[m * NR + n] = fma(mul(part, xs), ws[n], acc[m * NR + n]);
            }
        }
    }
    reduce<MR, NR>(acc, y, ldy);
}

#if defined(GEMMA_AVX512)
constexpr int MAX_QUANTISED_ROWS = 6;
constexpr int quantised_columns(int rows) { return rows <= 1 ? 8 : 4; }
#else
constexpr int MAX_QUANTISED_ROWS = 4;
constexpr int quantised_columns(int rows) { return rows <= 2 ? 4 : 2; }
#endif

template <bool I8, int MR>
void quantised_rows(const Weight& w, const Rows& x, size_t m0, size_t n0, size_t n1, const Ahead<uint8_t>& fetch, float* y,
                    size_t ldy) {
    constexpr int NR = quantised_columns(MR);
    const size_t bytes = w.row_bytes(), begin = (fetch.begin - (const uint8_t*)w.data) / bytes;
    size_t n = n0;
    for (; n + NR <= n1; n += NR) {
        const uint8_t* next = m0 == 0 ? fetch((n - begin) * bytes, NR * bytes) : nullptr;
        quantised_tile<I8, MR, NR>(w, n, x, m0, next, y + m0 * ldy + (n - n0), ldy);
    }
    for (; n < n1; n++) quantised_tile<I8, MR, 1>(w, n, x, m0, nullptr, y + m0 * ldy + (n - n0), ldy);
}

template <bool I8>
void linear_quantised(const Weight& w, const Rows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy, const void* then) {
    const size_t block = M <= MAX_QUANTISED_ROWS ? n1 - n0 : PASS_ROWS, bytes = w.row_bytes();
    const Ahead<uint8_t> fetch{(const uint8_t*)w.data + n0 * bytes, (n1 - n0) * bytes, FETCH_BYTES, (const uint8_t*)then};
    for (size_t n = n0; n < n1; n += block) {
        const size_t end = std::min(n + block, n1);
        float* out = y + (n - n0);
        each_tile(M, MAX_QUANTISED_ROWS, false, [&](size_t m, size_t rows) {
            with_constant<MAX_QUANTISED_ROWS>(rows, [&](auto constant) {
                quantised_rows<I8, constant>(w, x, m, n, end, fetch, out, ldy);
            });
        });
    }
}

void linear(const Weight& w, const Rows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy, const Next& then) {
    if (n0 >= n1) return;
    switch (w.type) {
        case Type::F32: return linear_dense<Wide>(w, x, M, n0, n1, y, ldy, then.weights);
        case Type::BF16: return linear_dense<Half>(w, x, M, n0, n1, y, ldy, then.weights);
        case Type::PANELS: return linear_panels(w, x, M, n0, n1, y, ldy, then);
        case Type::I8: return linear_quantised<true>(w, x, M, n0, n1, y, ldy, then.weights);
        default: return linear_quantised<false>(w, x, M, n0, n1, y, ldy, then.weights);
    }
}

// Where column k of a block of 64 goes in the order of int4 weights.
constexpr size_t int4_place(size_t k) { return k % 32 / 4 * 8 + k / 32 * 4 + k % 4; }

// One group of 32 or 64 columns of a row, into its places in the block: int8 in order, int4 in units of four columns.
template <bool I8>
inline void quantise_group(const float* v, size_t g, int8_t* block, float& scale, int32_t& start) {
    constexpr size_t GROUP = BLOCK_COLS / SCALES<I8>;
    V largest = zero();
    for (size_t i = 0; i < GROUP; i += W) {
        const V a = load(v + i);
        largest = max(largest, max(a, sub(zero(), a)));
    }
    const float top = maximum(largest);
    const V inverse = set1(top > 0 ? 127.0f / top : 0.0f);
    int8_t values[GROUP];
    V total = zero();  // exact: a sum of at most 64 integers within 127
    for (size_t i = 0; i < GROUP; i += W) {
        const V whole = round(mul(load(v + i), inverse));
        total = add(total, whole);
        narrow(whole, values + i);
    }
    if constexpr (I8) std::memcpy(block, values, GROUP);
    else
        for (size_t u = 0; u < GROUP / 4; u++) std::memcpy(block + int4_place(g * GROUP + 4 * u), values + 4 * u, 4);
    scale = top / 127.0f;
    start = start_of<I8>((int32_t)sum(total));
}

// Tile by tile, block by block, a block of each of the tile's rows in turn.
template <bool I8>
void quantise(size_t M, size_t cols, const Area& area, const float* x, size_t ldx, Rows& out) {
    constexpr size_t S = SCALES<I8>;
    const size_t blocks = cols / BLOCK_COLS;
    each_tile_within(M, MAX_QUANTISED_ROWS, false, area.m0, area.m1, [&](size_t m0, size_t rows, size_t begin, size_t end) {
        for (size_t k = area.k0; k < area.k1; k += BLOCK_COLS)
            for (size_t m = begin; m < end; m++) {
                const size_t at = m0 * blocks + k / BLOCK_COLS * rows + (m - m0);
                const float* from = x + (m - area.m0) * ldx + (k - area.k0);
                for (size_t g = 0; g < S; g++)
                    quantise_group<I8>(from + g * (BLOCK_COLS / S), g, out.values.data() + at * BLOCK_COLS,
                                       out.scales[at * S + g], out.starts[at * S + g]);
            }
    });
}

void reserve(const Weight& w, size_t M, Rows& out) {
    out.borrowed = nullptr;
    const size_t scales = M * w.cols / BLOCK_COLS * (w.type == Type::I8 ? SCALES<true> : SCALES<false>);
    switch (w.type) {
        case Type::F32: return grow(Wide::place(out), M * padded_to(w.cols, Wide::STEP));
        case Type::BF16: return grow(Half::place(out), M * padded_to(w.cols, Half::STEP));
        case Type::PANELS: return grow(Half::place(out), M * apart_in_panels(w.cols));
        default: grow(out.values, M * w.cols), grow(out.scales, scales), grow(out.starts, scales);
    }
}

void prepare(const Weight& w, size_t M, const Area& area, const float* x, size_t ldx, Rows& out) {
    switch (w.type) {
        case Type::F32: return prepare_dense<Wide>(M, w.cols, area, x, ldx, out);
        case Type::BF16: return prepare_dense<Half>(M, w.cols, area, x, ldx, out);
        case Type::PANELS: return prepare_panels(w.cols, area, x, ldx, out);
        case Type::I8: return quantise<true>(M, w.cols, area, x, ldx, out);
        default: return quantise<false>(M, w.cols, area, x, ldx, out);
    }
}

void prepare_all(const Weight& w, size_t M, const float* x, size_t ldx, Rows& out) {
    reserve(w, M, out);
    if (w.type == Type::PANELS && std::is_same_v<Half::X, float> && (M == 1 || ldx * sizeof(float) % SAME_SETS))
        out.borrowed = x, out.apart = ldx;
    else
        prepare(w, M, {0, M, 0, w.cols}, x, ldx, out);
}

// --------------------------------------------------------------------------------------------- element-wise operators

template <class F>
inline void each(size_t n, F f) {
    for (size_t i = 0; i + W <= n; i += W) f(i, W);
    if (n % W) f(n - n % W, (int)(n % W));
}
inline V take(const float* p, int n) { return n == W ? load(p) : load_part(p, n); }
inline void put(float* p, V v, int n) { n == W ? store(p, v) : store_part(p, v, n); }

inline float inverse_rms(const float* x, float eps, size_t n) {
    V squares = zero();
    each(n, [&](size_t i, int w) {
        V v = take(x + i, w);
        squares = fma(v, v, squares);
    });
    return 1.0f / std::sqrt(sum(squares) / (float)n + eps);
}

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
        V e = exp(sub(w == W ? load(x + i) : load_part(x + i, w, -std::numeric_limits<float>::infinity()), set1(top)));
        if (w < W) {
            float lanes[W] = {};
            store_part(lanes, e, w);
            e = load(lanes);
        }
        put(x + i, e, w);
        total = add(total, e);
    });
    scale(x, 1.0f / sum(total), n);
}

void gather(const Weight& table, size_t row, float factor, float* out) {
    const size_t n = table.cols;
    if (table.type == Type::F32) {
        const float* from = (const float*)table.data + row * n;
        each(n, [&](size_t i, int w) { put(out + i, mul(take(from + i, w), set1(factor)), w); });
    } else if (table.type == Type::BF16) {
        const uint16_t* from = (const uint16_t*)table.data + row * n;
        each(n, [&](size_t i, int w) {
            put(out + i, mul(w == W ? load(from + i) : load_part(from + i, w), set1(factor)), w);
        });
    } else if (table.type == Type::PANELS) {
        uint32_t pairs[W];
        for (size_t i = 0; i < n; i += 2 * W) {
            const uint32_t* from = table.panels(row, i / 2) + row % PANEL_ROWS;  // a part holds the next W pairs, too
            for (size_t k = 0; k < W; k++) pairs[k] = from[k * PANEL_ROWS];
            for (size_t k = 0; k < 2; k++) store(out + i + k * W, mul(load((const uint16_t*)pairs + k * W), set1(factor)));
        }
    } else {
        const uint8_t* from = (const uint8_t*)table.data + row * table.row_bytes();
        const size_t group = table.type == Type::I8 ? 64 : 32;
        const float* scales = table.scales + row * (n / group);
        for (size_t i = 0; i < n; i++) {
            int value;
            if (table.type == Type::I8) value = (int8_t)from[i];
            else {
                const size_t place = int4_place(i % BLOCK_COLS);
                const uint8_t byte = from[i / BLOCK_COLS * 32 + place % 32];
                value = (place < 32 ? byte & 15 : byte >> 4) - 8;
            }
            out[i] = (float)value * scales[i / group] * factor;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- attention

constexpr int64_t CHUNK = 256;  // positions whose scores are held at once; chunks begin at multiples of it
constexpr size_t MAX_QUERIES = 32;

// Vectors of a value that MQ queries take at once: as many sums under way as hide their latency and fit into registers.
#if defined(GEMMA_AVX512)
constexpr int vectors_for(int queries) { return queries == 8 ? 2 : 4; }
#else
constexpr int vectors_for(int queries) { return queries == 8 ? 1 : queries == 4 ? 2 : 4; }
#endif

// acc[q] += weights[q][j] * values[j] for j0 <= j < j1, in order of j
template <int MQ>
inline void weigh(const float* const* weights, const float* values, size_t j0, size_t j1, size_t d, float* const* acc) {
    constexpr int NV = vectors_for(MQ);
    if (j0 >= j1) return;
    size_t begin = 0;
    for (; begin + NV * W <= d; begin += NV * W) {
        V sums[MQ * NV];
        UNROLL for (int i = 0; i < MQ * NV; i++) sums[i] = load(acc[i / NV] + begin + i % NV * W);
        for (size_t j = j0; j < j1; j++) {
            V v[NV];
            UNROLL for (int n = 0; n < NV; n++) v[n] = load(values + j * d + begin + n * W);
            UNROLL for (int q = 0; q < MQ; q++) {
                const V weight = held(set1(weights[q][j]));
                UNROLL for (int n = 0; n < NV; n++) sums[q * NV + n] = fma(weight, v[n], sums[q * NV + n]);
            }
        }
        UNROLL for (int i = 0; i < MQ * NV; i++) store(acc[i / NV] + begin + i % NV * W, sums[i]);
    }
    each(d - begin, [&](size_t i, int w) {
        V sums[MQ];
        UNROLL for (int q = 0; q < MQ; q++) sums[q] = take(acc[q] + begin + i, w);
        for (size_t j = j0; j < j1; j++) {
            V v = take(values + j * d + begin + i, w);
            UNROLL for (int q = 0; q < MQ; q++) sums[q] = fma(set1(weights[q][j]), v, sums[q]);
        }
        UNROLL for (int q = 0; q < MQ; q++) put(acc[q] + begin + i, sums[q], w);
    });
}

inline void weigh_any(size_t Q, const float* const* weights, const float* values, size_t j0, size_t j1, size_t d,
                      float* const* acc) {
    size_t q = 0;
    for (; q + 8 <= Q; q += 8) weigh<8>(weights + q, values, j0, j1, d, acc + q);
    for (; q + 4 <= Q; q += 4) weigh<4>(weights + q, values, j0, j1, d, acc + q);
    for (; q + 2 <= Q; q += 2) weigh<2>(weights + q, values, j0, j1, d, acc + q);
    for (; q < Q; q++) weigh<1>(weights + q, values, j0, j1, d, acc + q);
}

// Positions of a chunk, counted from its beginning, whose rows lie one after the other.
struct Run {
    size_t begin, end;
    size_t offset;  // of position `begin` in keys and values
};

// The runs of positions begin .. end; returns how many. Blocks side by side make one run.
inline size_t runs_of(const HeadRows& rows, int64_t begin, int64_t end, Run* runs) {
    size_t count = 0;
    for (int64_t at = begin; at < end;) {
        const int64_t stop = std::min((at / BLOCK_ROWS + 1) * BLOCK_ROWS, end);
        const size_t offset = rows.offset(at), from = (size_t)(at - begin), to = (size_t)(stop - begin);
        if (count && runs[count - 1].offset + (from - runs[count - 1].begin) * rows.d == offset) runs[count - 1].end = to;
        else runs[count++] = {from, to, offset};
        at = stop;
    }
    return count;
}

void attend_some(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out, size_t ldo) {
    static thread_local Buffer<float> scores;
    static thread_local Rows queries;
    const size_t d = rows.d;
    scores.resize(MAX_QUERIES * CHUNK);
    grow(queries.wide, Q * padded_to(d, W));
    prepare_dense<Wide>(Q, d, {0, Q, 0, d}, q, ldq, queries);
    float top[MAX_QUERIES], total[MAX_QUERIES];
    float* acc[MAX_QUERIES];
    int64_t first = visible[0].first, last = visible[0].last;
    for (size_t i = 0; i < Q; i++) {
        top[i] = -std::numeric_limits<float>::infinity();
        total[i] = 0.0f;
        acc[i] = out + i * ldo;
        std::fill(acc[i], acc[i] + d, 0.0f);
        first = std::min(first, visible[i].first);
        last = std::max(last, visible[i].last);
    }
    for (int64_t base = first / CHUNK * CHUNK; base <= last; base += CHUNK) {
        const int64_t begin = std::max(base, first), end = std::min(base + CHUNK, last + 1);
        const size_t count = (size_t)(end - begin);
        Run runs[CHUNK / BLOCK_ROWS + 1];
        const size_t parts = runs_of(rows, begin, end, runs);
        for (size_t r = 0; r < parts; r++)
            multiply<Wide>(rows.keys + runs[r].offset, d, queries.wide.data(), Q, runs[r].end - runs[r].begin,
                           scores.data() + runs[r].begin, CHUNK, nullptr, rows.values + runs[r].offset);
        const float* weights[MAX_QUERIES];
        size_t from[MAX_QUERIES], to[MAX_QUERIES], common_from = 0, common_to = count;
        for (size_t i = 0; i < Q; i++) {
            float* s = scores.data() + i * CHUNK;
            weights[i] = s;
            from[i] = (size_t)std::clamp(visible[i].first - begin, (int64_t)0, (int64_t)count);
            to[i] = (size_t)std::clamp(visible[i].last + 1 - begin, (int64_t)from[i], (int64_t)count);
            common_from = std::max(common_from, from[i]);
            common_to = std::min(common_to, to[i]);
            if (from[i] == to[i]) continue;
            const float best = std::max(top[i], largest(s + from[i], to[i] - from[i]));
            const float shrink = total[i] > 0 ? std::exp(top[i] - best) : 1.0f;  // there is nothing yet at the first chunk
            V sums = zero();
            each(to[i] - from[i], [&](size_t j, int w) {
                float* p = s + from[i] + j;
                V e = exp(sub(take(p, w), set1(best)));
                if (w < W) {
                    float lanes[W] = {};
                    store_part(lanes, e, w);
                    e = load(lanes);
                }
                put(p, e, w);
                sums = add(sums, e);
            });
            total[i] = total[i] * shrink + sum(sums);
            if (shrink != 1.0f) scale(acc[i], shrink, d);
            top[i] = best;
        }
        for (size_t r = 0; r < parts; r++) {
            const float* v = rows.values + runs[r].offset - runs[r].begin * d;  // of the chunk's beginning, were it all one run
            const auto within = [&](size_t j) { return std::clamp(j, runs[r].begin, runs[r].end); };
            if (common_from >= common_to) {
                for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, within(from[i]), within(to[i]), d, acc + i);
                continue;
            }
            for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, within(from[i]), within(common_from), d, acc + i);
            weigh_any(Q, weights, v, within(common_from), within(common_to), d, acc);
            for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, within(common_to), within(to[i]), d, acc + i);
        }
    }
    for (size_t i = 0; i < Q; i++) scale(acc[i], total[i] > 0 ? 1.0f / total[i] : 0.0f, d);
}

void attend(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out, size_t ldo) {
    for (size_t i = 0; i < Q; i += MAX_QUERIES)
        attend_some(q + i * ldq, ldq, std::min(MAX_QUERIES, Q - i), visible + i, rows, out + i * ldo, ldo);
}

}  // namespace GEMMA_ISA

#define GEMMA_JOIN_(a, b) a##b
#define GEMMA_JOIN(a, b) GEMMA_JOIN_(a, b)
#define GEMMA_TEXT_(a) #a
#define GEMMA_TEXT(a) GEMMA_TEXT_(a)

const Kernels& GEMMA_JOIN(kernels_, GEMMA_ISA)() {
    using namespace GEMMA_ISA;
    static const Kernels all{GEMMA_TEXT(GEMMA_ISA), reserve, prepare, prepare_all, linear, rms_norm, add_rms_norm, rotate,
                             gated, scale, axpy, softcap, gather, attend, softmax, largest};
    return all;
}

}  // namespace gemma
