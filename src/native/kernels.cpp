// Compiled once for each instruction set, with GEMMA_ISA naming the namespace and the function that gives them out.
#include "kernels.h"

#include <algorithm>
#include <limits>

#include "simd.h"

namespace gemma {
namespace GEMMA_ISA {

// ---------------------------------------------------------------------------------------------- linear, floating point

constexpr size_t PREFETCH_BLOCK = 8192, PREFETCH_BYTES = 1024;

// y[m, n] = the sum of accumulator [m][n]'s lanes, four at a time
template <int MR, int NR>
inline void reduce(const V* acc, float* y, size_t ldy) {
    constexpr int WHOLE = MR * NR / 4 * 4;
    float sums[MR * NR];
    for (int i = 0; i < WHOLE; i += 4) sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums + i);
    for (int i = WHOLE; i < MR * NR; i++) sums[i] = sum(acc[i]);
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NR; n++) y[m * ldy + n] = sums[m * NR + n];
}

// MR rows by NR weight rows: one accumulator vector each, lanes summed in order of k, then by one tree.
template <int MR, int NR, class T>
inline void tile(const T* w, size_t ldw, const float* x, size_t ldx, size_t K, float* y, size_t ldy) {
    V acc[MR * NR];
    for (V& a : acc) a = zero();
    // Many rows' arithmetic hides few loads: without these the stream of weights stalls. Short rows are fetched a block
    // ahead, long ones a few lines ahead.
    const size_t ahead = NR * ldw * sizeof(T) <= PREFETCH_BLOCK ? NR * ldw : PREFETCH_BYTES / sizeof(T);
    size_t k = 0;
    for (; k + W <= K; k += W) {
        V wv[NR];
        for (int n = 0; n < NR; n++) {
            wv[n] = load(w + n * ldw + k);
            if (k * sizeof(T) % 64 == 0) __builtin_prefetch(w + n * ldw + k + ahead, 0, 3);
        }
        for (int m = 0; m < MR; m++) {
            V xv = load(x + m * ldx + k);
            for (int n = 0; n < NR; n++) acc[m * NR + n] = fma(xv, wv[n], acc[m * NR + n]);
        }
    }
    if (k < K) {
        for (int n = 0; n < NR; n++) {
            V wv = load_part(w + n * ldw + k, (int)(K - k));
            for (int m = 0; m < MR; m++)
                acc[m * NR + n] = fma(load_part(x + m * ldx + k, (int)(K - k)), wv, acc[m * NR + n]);
        }
    }
    reduce<MR, NR>(acc, y, ldy);
}

#if defined(GEMMA_AVX512)
constexpr int MAX_ROWS = 6;
constexpr int columns_for(int rows) { return rows <= 2 ? 8 : 4; }
#else
constexpr int MAX_ROWS = 6;
constexpr int columns_for(int rows) { return rows == 1 ? 8 : rows <= 2 ? 4 : rows == 3 ? 4 : 2; }
#endif

template <int MR, class T>
void row_tile(const T* w, size_t K, const float* x, size_t ldx, size_t count, float* y, size_t ldy) {
    constexpr int NR = columns_for(MR);
    size_t n = 0;
    for (; n + NR <= count; n += NR) tile<MR, NR>(w + n * K, K, x, ldx, K, y + n, ldy);
    for (; n < count; n++) tile<MR, 1>(w + n * K, K, x, ldx, K, y + n, ldy);
}

template <class T>
void rows_by_block(const T* w, size_t K, const float* x, size_t ldx, size_t M, size_t count, float* y, size_t ldy) {
    size_t tiles = (M + MAX_ROWS - 1) / MAX_ROWS;
    size_t m = 0;
    for (size_t t = 0; t < tiles; t++) {
        size_t rows = M / tiles + (t < M % tiles);
        const float* xt = x + m * ldx;
        float* yt = y + m * ldy;
        switch (rows) {
            case 1: row_tile<1>(w, K, xt, ldx, count, yt, ldy); break;
            case 2: row_tile<2>(w, K, xt, ldx, count, yt, ldy); break;
            case 3: row_tile<3>(w, K, xt, ldx, count, yt, ldy); break;
            case 4: row_tile<4>(w, K, xt, ldx, count, yt, ldy); break;
            case 5: row_tile<5>(w, K, xt, ldx, count, yt, ldy); break;
            default: row_tile<6>(w, K, xt, ldx, count, yt, ldy); break;
        }
        m += rows;
    }
}

constexpr size_t BLOCK_BYTES = 24 << 10;  // of weights that stay in the first-level cache for all row tiles
constexpr size_t WIDEN_ROWS = 24;         // from so many rows on, a block of bf16 weights is widened once for all of them

// Weight rows to a block: as many as fit, a multiple of what a tile takes.
inline size_t block_rows(size_t row_bytes) {
    return std::clamp(BLOCK_BYTES / std::max((size_t)1, row_bytes) / 4 * 4, (size_t)4, (size_t)16);
}

template <class T>
void linear_dense(const T* w, size_t K, const float* x, size_t ldx, size_t M, size_t n0, size_t n1, float* y, size_t ldy) {
    if (M <= MAX_ROWS) return rows_by_block(w + n0 * K, K, x, ldx, M, n1 - n0, y, ldy);
    static thread_local std::vector<float> wide;
    const bool widen = sizeof(T) == 2 && M >= WIDEN_ROWS;
    const size_t rows = block_rows(K * (widen ? 4 : sizeof(T)));
    if (widen) wide.resize(rows * K);
    for (size_t n = n0; n < n1; n += rows) {
        const size_t count = std::min(rows, n1 - n);
        const T* block = w + n * K;
        if constexpr (sizeof(T) == 2) {
            if (widen) {
                size_t i = 0, total = count * K;
                for (; i + W <= total; i += W) store(wide.data() + i, load(block + i));
                if (i < total) store_part(wide.data() + i, load_part(block + i, (int)(total - i)), (int)(total - i));
                rows_by_block(wide.data(), K, x, ldx, M, count, y + (n - n0), ldy);
                continue;
            }
        }
        rows_by_block(block, K, x, ldx, M, count, y + (n - n0), ldy);
    }
}

// ------------------------------------------------------------------------------------------------- linear, quantised

// Integer dot products of one group, as W partial sums that are exact; then float: acc += partial * x scale * w scale.
constexpr size_t BLOCK_COLS = 64;

#if defined(GEMMA_AVX512)

struct Group {  // 64 columns: one group of 64, or two of 32 in the two halves
    __m512i v;
};
inline Group group_i8(const int8_t* w) {  // as w + 128, unsigned
    return {_mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80))};
}
inline Group group_i4(const uint8_t* w) {
    __m256i b = _mm256_loadu_si256((const __m256i*)w), mask = _mm256_set1_epi8(15);
    __m256i low = _mm256_and_si256(b, mask), high = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}
// sum of (unsigned - offset) * x; lane 0 of each group starts at -offset * the group's total
template <size_t G>
inline V partial(const Group& w, const int8_t* x, const int32_t* totals, int offset) {
    __m512i start;
    if constexpr (G == 64) start = _mm512_maskz_set1_epi32(1, -offset * totals[0]);
    else
        start = _mm512_mask_set1_epi32(_mm512_maskz_set1_epi32(1, -offset * totals[0]), 1 << 8, -offset * totals[1]);
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, w.v, _mm512_loadu_si512(x)));
}
template <size_t G>
inline V spread(const float* scales) {
    if constexpr (G == 64) return set1(scales[0]);
    return _mm512_insertf32x8(set1(scales[0]), _mm256_set1_ps(scales[1]), 1);
}
template <size_t G>
struct Scales {
    V v;
    explicit Scales(const float* s) : v(spread<G>(s)) {}
};
template <size_t G>
inline V step(V acc, const Group& w, const int8_t* x, const float* xs, const int32_t* totals, int offset,
              const Scales<G>& ws) {
    return fma(mul(partial<G>(w, x, totals, offset), spread<G>(xs)), ws.v, acc);
}
template <bool I8>
constexpr int OFFSET = I8 ? 128 : 8;

#elif defined(GEMMA_AVX2)

struct Group {
    __m256i low, high;  // 32 columns each
};
inline Group group_i8(const int8_t* w) {
    return {_mm256_loadu_si256((const __m256i*)w), _mm256_loadu_si256((const __m256i*)(w + 32))};
}
inline Group group_i4(const uint8_t* w) {
    __m256i b = _mm256_loadu_si256((const __m256i*)w), mask = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    return {_mm256_sub_epi8(_mm256_and_si256(b, mask), eight),
            _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(b, 4), mask), eight)};
}
// |w| times x with w's sign: pairs stay below 2 ** 15 because x and w lie within 127
inline __m256i dot32(__m256i w, const int8_t* x) {
    __m256i xv = _mm256_loadu_si256((const __m256i*)x);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xv, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
template <size_t G>
struct Scales {
    float v[2];
    explicit Scales(const float* s) : v{s[0], G == 32 ? s[1] : 0.0f} {}
};
template <size_t G>
inline V step(V acc, const Group& w, const int8_t* x, const float* xs, const int32_t*, int, const Scales<G>& ws) {
    __m256i low = dot32(w.low, x), high = dot32(w.high, x + 32);
    if constexpr (G == 64)
        return fma(mul(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)), set1(xs[0])), set1(ws.v[0]), acc);
    acc = fma(mul(_mm256_cvtepi32_ps(low), set1(xs[0])), set1(ws.v[0]), acc);
    return fma(mul(_mm256_cvtepi32_ps(high), set1(xs[1])), set1(ws.v[1]), acc);
}
template <bool I8>
constexpr int OFFSET = 0;

#else

struct Group {
    int8_t v[64];
};
inline Group group_i8(const int8_t* w) {
    Group g;
    std::memcpy(g.v, w, 64);
    return g;
}
inline Group group_i4(const uint8_t* w) {
    Group g;
    for (int i = 0; i < 32; i++) g.v[i] = (int8_t)((w[i] & 15) - 8), g.v[i + 32] = (int8_t)((w[i] >> 4) - 8);
    return g;
}
template <size_t G>
struct Scales {
    float v[2];
    explicit Scales(const float* s) : v{s[0], G == 32 ? s[1] : 0.0f} {}
};
template <size_t G>
inline V step(V acc, const Group& w, const int8_t* x, const float* xs, const int32_t*, int, const Scales<G>& ws) {
    for (size_t g = 0; g < 64 / G; g++) {
        V part = zero();
        for (int i = 0; i < W; i++) {
            int32_t total = 0;
            for (size_t j = 0; j < G / W; j++) total += (int32_t)w.v[g * G + j * W + i] * x[g * G + j * W + i];
            part[i] = (float)total;
        }
        acc = fma(mul(part, set1(xs[g])), set1(ws.v[g]), acc);
    }
    return acc;
}
template <bool I8>
constexpr int OFFSET = 0;

#endif

template <bool I8, size_t G, int MR, int NR>
inline void quantised_tile(const Weight& w, size_t n0, const QuantisedRows& x, size_t m0, float* y, size_t ldy) {
    const size_t K = w.cols, groups = K / G, bytes = w.row_bytes();
    const uint8_t* data = (const uint8_t*)w.data + n0 * bytes;
    const float* scales = w.scales + n0 * groups;
    V acc[MR * NR];
    for (V& a : acc) a = zero();
    for (size_t k = 0; k < K; k += BLOCK_COLS) {
        const size_t g = k / G;
        for (int n = 0; n < NR; n++) {
            const Group wg = I8 ? group_i8((const int8_t*)data + n * bytes + k) : group_i4(data + n * bytes + k / 2);
            const Scales<G> ws(scales + n * groups + g);
            for (int m = 0; m < MR; m++) {
                const size_t row = m0 + m;
                acc[m * NR + n] = step<G>(acc[m * NR + n], wg, x.values.data() + row * K + k, x.scales.data() + row * groups + g,
                                    x.totals.data() + row * groups + g, OFFSET<I8>, ws);
            }
        }
    }
    reduce<MR, NR>(acc, y, ldy);
}

#if defined(GEMMA_AVX512)
constexpr int quantised_columns(int rows) { return rows <= 1 ? 8 : 4; }
#else
constexpr int quantised_columns(int rows) { return rows <= 2 ? 4 : 2; }
#endif

template <bool I8, size_t G, int MR>
void quantised_rows(const Weight& w, const QuantisedRows& x, size_t m0, size_t n0, size_t n1, float* y, size_t ldy) {
    constexpr int NR = quantised_columns(MR);
    size_t n = n0;
    for (; n + NR <= n1; n += NR) quantised_tile<I8, G, MR, NR>(w, n, x, m0, y + m0 * ldy + (n - n0), ldy);
    for (; n < n1; n++) quantised_tile<I8, G, MR, 1>(w, n, x, m0, y + m0 * ldy + (n - n0), ldy);
}

constexpr size_t MAX_QUANTISED_ROWS = 4;

template <bool I8, size_t G>
void linear_quantised(const Weight& w, const QuantisedRows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy) {
    size_t tiles = (M + MAX_QUANTISED_ROWS - 1) / MAX_QUANTISED_ROWS;
    const size_t block = tiles == 1 ? n1 - n0 : block_rows(w.row_bytes());
    for (size_t n = n0; n < n1; n += block) {
        size_t end = std::min(n + block, n1), m = 0;
        for (size_t t = 0; t < tiles; t++) {
            size_t rows = M / tiles + (t < M % tiles);
            switch (rows) {
                case 1: quantised_rows<I8, G, 1>(w, x, m, n, end, y + (n - n0), ldy); break;
                case 2: quantised_rows<I8, G, 2>(w, x, m, n, end, y + (n - n0), ldy); break;
                case 3: quantised_rows<I8, G, 3>(w, x, m, n, end, y + (n - n0), ldy); break;
                default: quantised_rows<I8, G, 4>(w, x, m, n, end, y + (n - n0), ldy); break;
            }
            m += rows;
        }
    }
}

void linear(const Weight& w, const float* x, size_t ldx, const QuantisedRows* q, size_t M, size_t n0, size_t n1, float* y,
            size_t ldy) {
    if (n0 >= n1) return;
    switch (w.type) {
        case Type::F32: return linear_dense((const float*)w.data, w.cols, x, ldx, M, n0, n1, y, ldy);
        case Type::BF16: return linear_dense((const uint16_t*)w.data, w.cols, x, ldx, M, n0, n1, y, ldy);
        case Type::I8:
            return w.group == 64 ? linear_quantised<true, 64>(w, *q, M, n0, n1, y, ldy)
                                 : linear_quantised<true, 32>(w, *q, M, n0, n1, y, ldy);
        default:
            return w.group == 64 ? linear_quantised<false, 64>(w, *q, M, n0, n1, y, ldy)
                                 : linear_quantised<false, 32>(w, *q, M, n0, n1, y, ldy);
    }
}

void quantise(const float* x, size_t ldx, size_t M, size_t cols, size_t group, QuantisedRows& out) {
    const size_t groups = cols / group;
    out.values.resize(M * cols);
    out.scales.resize(M * groups);
    out.totals.resize(M * groups);
    for (size_t m = 0; m < M; m++)
        for (size_t g = 0; g < groups; g++) {
            const float* v = x + m * ldx + g * group;
            V largest = zero();
            for (size_t i = 0; i < group; i += W) {
                V a = load(v + i);
                largest = max(largest, max(a, sub(zero(), a)));
            }
            const float top = maximum(largest);
            const float inverse = top > 0 ? 127.0f / top : 0.0f;
            int8_t* to = out.values.data() + m * cols + g * group;
            int32_t total = 0;
            for (size_t i = 0; i < group; i += W) {
                float lanes[W];
                store(lanes, round(mul(load(v + i), set1(inverse))));
                for (int j = 0; j < W; j++) {
                    to[i + j] = (int8_t)lanes[j];
                    total += to[i + j];
                }
            }
            out.scales[m * groups + g] = top / 127.0f;
            out.totals[m * groups + g] = total;
        }
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

void softmax(float* x, size_t n) {
    float top = x[0];
    for (size_t i = 1; i < n; i++) top = std::max(top, x[i]);
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
    } else {
        const float* scales = table.scales + row * (n / table.group);
        const uint8_t* from = (const uint8_t*)table.data + row * table.row_bytes();
        for (size_t i = 0; i < n; i++) {
            int value;
            if (table.type == Type::I8) value = ((const int8_t*)from)[i];
            else {
                uint8_t byte = from[i / 64 * 32 + i % 32];
                value = (i % 64 < 32 ? byte & 15 : byte >> 4) - 8;
            }
            out[i] = (float)value * scales[i / table.group] * factor;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- attention

constexpr int64_t CHUNK = 256;  // positions whose scores are held at once; chunks begin at multiples of it
constexpr size_t MAX_QUERIES = 32;

// acc[q] += weights[q][j] * values[j] for j0 <= j < j1, in order of j
template <int MQ>
inline void weigh(const float* const* weights, const float* values, size_t j0, size_t j1, size_t d, float* const* acc) {
    each(d, [&](size_t i, int w) {
        V sums[MQ];
        for (int q = 0; q < MQ; q++) sums[q] = take(acc[q] + i, w);
        for (size_t j = j0; j < j1; j++) {
            V v = take(values + j * d + i, w);
            for (int q = 0; q < MQ; q++) sums[q] = fma(set1(weights[q][j]), v, sums[q]);
        }
        for (int q = 0; q < MQ; q++) put(acc[q] + i, sums[q], w);
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

void attend_some(const float* q, size_t ldq, size_t Q, const Visible* visible, const float* keys, const float* values,
                 int64_t origin, size_t d, float* out, size_t ldo) {
    static thread_local std::vector<float> scores;
    scores.resize(MAX_QUERIES * CHUNK);
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
        const float* k = keys + (size_t)(begin - origin) * d;
        const float* v = values + (size_t)(begin - origin) * d;
        rows_by_block(k, d, q, ldq, Q, count, scores.data(), CHUNK);
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
            float best = top[i];
            for (size_t j = from[i]; j < to[i]; j++) best = std::max(best, s[j]);
            const float shrink = std::exp(top[i] - best);  // 0 at the first chunk
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
        if (common_from >= common_to) {
            for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, from[i], to[i], d, acc + i);
            continue;
        }
        for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, from[i], common_from, d, acc + i);
        weigh_any(Q, weights, v, common_from, common_to, d, acc);
        for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, common_to, to[i], d, acc + i);
    }
    for (size_t i = 0; i < Q; i++) scale(acc[i], total[i] > 0 ? 1.0f / total[i] : 0.0f, d);
}

void attend(const float* q, size_t ldq, size_t Q, const Visible* visible, const float* keys, const float* values,
            int64_t origin, size_t d, float* out, size_t ldo) {
    for (size_t i = 0; i < Q; i += MAX_QUERIES)
        attend_some(q + i * ldq, ldq, std::min(MAX_QUERIES, Q - i), visible + i, keys, values, origin, d, out + i * ldo, ldo);
}

}  // namespace GEMMA_ISA

#define GEMMA_JOIN_(a, b) a##b
#define GEMMA_JOIN(a, b) GEMMA_JOIN_(a, b)
#define GEMMA_TEXT_(a) #a
#define GEMMA_TEXT(a) GEMMA_TEXT_(a)

const Kernels& GEMMA_JOIN(kernels_, GEMMA_ISA)() {
    using namespace GEMMA_ISA;
    static const Kernels all{GEMMA_TEXT(GEMMA_ISA), linear, quantise, rms_norm, add_rms_norm, rotate, gated, scale, axpy,
                             softcap, gather, attend, softmax};
    return all;
}

}  // namespace gemma
