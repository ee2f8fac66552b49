// Products with INT8, INT8_32, INT4 and INT2 weights. Activations are quantised to 8 bits by row and group, unless they
// are whole numbers of 8 bits already.
#include "dots.h"
#include "products.h"

namespace gemma {
namespace GEMMA_ISA {
namespace {

#if defined(GEMMA_AVX512)
constexpr int MAX_ROWS = 6;  // rows of a tile
constexpr int columns_for(int rows) { return rows <= 1 ? 8 : 4; }
#else
constexpr int MAX_ROWS = 4;
constexpr int columns_for(int rows) { return rows <= 2 ? 4 : 2; }
#endif

// What to prefetch while a tile is multiplied: as much data as the tile has, and their scales. Both may be null.
struct Next {
    const uint8_t* data = nullptr;
    const float* scales = nullptr;
};

// Multiplies MR rows from m0 on with NR weight rows from n0 on.
template <WeightType T, bool FULL, int MR, int NR>
inline void tile(const Weight& w, size_t n0, const Activations& x, size_t m0, Next next, float* y, size_t ldy) {
    constexpr size_t S = SCALES<T>;
    const size_t K = w.cols, blocks = K / QUANTISED_BLOCK, bytes = w.row_bytes(), block_bytes = bytes / blocks;
    const uint8_t* data = (const uint8_t*)w.data + n0 * bytes;
    const float* scales = w.scales + n0 * blocks * S;
    const int8_t* values = x.values.data() + m0 * K;
    const float* x_scales = x.scales.data() + m0 * blocks * S;
    const int32_t* starts = x.starts.data() + m0 * blocks * S;
    V acc[MR * NR];
    UNROLL for (int i = 0; i < MR * NR; i++) acc[i] = zero();
    for (size_t b = 0; b < blocks; b++, values += MR * QUANTISED_BLOCK, x_scales += MR * S, starts += MR * S) {
        Block wv[NR];
        V ws[NR];
        if (next.scales) __builtin_prefetch(next.scales + b * NR * S, 0, 3);  // rows' scales lie in one piece
        UNROLL for (int n = 0; n < NR; n++) {
            const uint8_t* wb = data + n * bytes + b * block_bytes;
            // line by line, not row by row as they are multiplied: so the processor's own prefetching goes along
            if (next.data && b * block_bytes % LINE == 0)
                __builtin_prefetch(next.data + (b * block_bytes / LINE * NR + n) * LINE, 0, 3);
            wv[n] = block<T>(wb);
            ws[n] = spread<T>(scales + (n * blocks + b) * S);
        }
        UNROLL for (int m = 0; m < MR; m++) {
            const V xs = held(spread<T>(x_scales + m * S));
            UNROLL for (int n = 0; n < NR; n++) {
                const V part = partial<T, FULL>(wv[n], values + m * QUANTISED_BLOCK, starts + m * S);
                acc[m * NR + n] = fma(mul(part, xs), ws[n], acc[m * NR + n]);
            }
        }
    }
    reduce<MR, NR>(acc, y, ldy);
}

template <WeightType T, bool FULL, int MR>
void row_tile(const Weight& w, const Activations& x, size_t m0, size_t n0, size_t n1, const Ahead<uint8_t>& fetch,
              float* y, size_t ldy) {
    constexpr int NR = columns_for(MR);
    const size_t bytes = w.row_bytes(), begin = (fetch.begin - (const uint8_t*)w.data) / bytes;
    const size_t row_scales = w.cols / GROUP<T>, end = begin + fetch.size / bytes;
    size_t n = n0;
    for (; n + NR <= n1; n += NR) {
        Next next;
        if (m0 == 0) {
            next.data = fetch((n - begin) * bytes, NR * bytes);
            // of what is read after the share, where the scales are is not known
            if (const size_t row = n + fetch.ahead / bytes; row < end) next.scales = w.scales + row * row_scales;
        }
        tile<T, FULL, MR, NR>(w, n, x, m0, next, y + m0 * ldy + (n - n0), ldy);
    }
    for (; n < n1; n++) tile<T, FULL, MR, 1>(w, n, x, m0, {}, y + m0 * ldy + (n - n0), ldy);
}

// Returns the place in a block of two groups of its column k.
constexpr size_t place_of(size_t k) { return k % 32 / 4 * 8 + k / 32 * 4 + k % 4; }

// Returns the value of column k of a row of weights, before its scale.
template <WeightType T>
inline int value_at(const uint8_t* row, size_t k) {
    if constexpr (T == WeightType::INT2) {
        const size_t column = k % QUANTISED_BLOCK;
        return (row[k / QUANTISED_BLOCK * 16 + column % 16] >> column / 16 * 2 & 3) - 2;
    }
    if constexpr (SCALES<T> == 1) return (int8_t)row[k];
    const size_t place = place_of(k % QUANTISED_BLOCK);
    if constexpr (BYTES<T>) return (int8_t)row[k / QUANTISED_BLOCK * QUANTISED_BLOCK + place];
    const uint8_t byte = row[k / QUANTISED_BLOCK * 32 + place % 32];
    return (place < 32 ? byte & 15 : byte >> 4) - 8;
}

// Returns what a group is divided by so that it lies within 127.
template <size_t COUNT>
inline float largest_of(const float* v) {
    V largest = zero();
    for (size_t i = 0; i < COUNT; i += W) {
        const V a = load(v + i);
        largest = max(largest, max(a, sub(zero(), a)));
    }
    return maximum(largest);
}

// Quantises one group of a row into its places in the block, or takes it as it is where it is `whole` already. Blocks
// of one group keep the order of the columns; the others have units of four columns.
template <WeightType T>
inline void quantise_group(const float* v, size_t g, bool whole, int8_t* block, float& scale, int32_t& start) {
    constexpr size_t COUNT = GROUP<T>;
    const float top = whole ? 127.0f : largest_of<COUNT>(v);
    const V inverse = set1(top > 0 ? 127.0f / top : 0.0f);
    int8_t values[COUNT];
    V total = zero();  // exact: a sum of at most 64 integers within 128
    for (size_t i = 0; i < COUNT; i += W) {
        const V numbers = round(mul(load(v + i), inverse));
        total = add(total, numbers);
        narrow(numbers, values + i);
    }
    if constexpr (SCALES<T> == 1) std::memcpy(block, values, COUNT);
    else
        for (size_t u = 0; u < COUNT / 4; u++) std::memcpy(block + place_of(g * COUNT + 4 * u), values + 4 * u, 4);
    scale = top / 127.0f;
    start = start_of<T>((int32_t)sum(total));
}

}  // namespace

template <WeightType T>
void reserve_quantised(size_t M, size_t K, Activations& out) {
    const size_t groups = M * K / QUANTISED_BLOCK * SCALES<T>;
    grown(out.values, M * K), grown(out.scales, groups), grown(out.starts, groups);
}

// Writes the rows as `tile` reads them: tile by tile, block by block, a block of each of the tile's rows in turn.
template <WeightType T>
void prepare_quantised(size_t M, size_t K, const Area& area, bool whole, const float* x, size_t ldx, Activations& out) {
    constexpr size_t S = SCALES<T>;
    const size_t blocks = K / QUANTISED_BLOCK;
    each_tile_within(M, MAX_ROWS, false, area.m0, area.m1, [&](size_t m0, size_t rows, size_t begin, size_t end) {
        for (size_t k = area.k0; k < area.k1; k += QUANTISED_BLOCK)
            for (size_t m = begin; m < end; m++) {
                const size_t at = m0 * blocks + k / QUANTISED_BLOCK * rows + (m - m0);
                const float* from = x + (m - area.m0) * ldx + (k - area.k0);
                for (size_t g = 0; g < S; g++)
                    quantise_group<T>(from + g * GROUP<T>, g, whole, out.values.data() + at * QUANTISED_BLOCK,
                                      out.scales[at * S + g], out.starts[at * S + g]);
            }
    });
}

template <WeightType T, bool FULL>
void linear_rows(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                 const void* then) {
    const size_t block = M <= MAX_ROWS ? n1 - n0 : PASS_ROWS, bytes = w.row_bytes();
    const Ahead<uint8_t> fetch{(const uint8_t*)w.data + n0 * bytes, (n1 - n0) * bytes, FETCH_BYTES,
                               (const uint8_t*)then};
    for (size_t n = n0; n < n1; n += block) {
        const size_t end = std::min(n + block, n1);
        float* out = y + (n - n0);
        each_tile(M, MAX_ROWS, false, [&](size_t m, size_t rows) {
            with_constant<MAX_ROWS>(
                rows, [&](auto constant) { row_tile<T, FULL, constant>(w, x, m, n, end, fetch, out, ldy); });
        });
    }
}

template <WeightType T>
void linear_quantised(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, bool whole, float* y,
                      size_t ldy, const void* then) {
    if constexpr (FULL_APART<T>)
        if (whole) return linear_rows<T, true>(w, x, M, n0, n1, y, ldy, then);
    linear_rows<T, false>(w, x, M, n0, n1, y, ldy, then);
}

template <WeightType T>
void gather_quantised(const Weight& table, size_t row, float factor, float* out) {
    const uint8_t* from = (const uint8_t*)table.data + row * table.row_bytes();
    const float* scales = table.scales + row * (table.cols / GROUP<T>);
    for (size_t i = 0; i < table.cols; i++) out[i] = (float)value_at<T>(from, i) * scales[i / GROUP<T>] * factor;
}

#define FOR_TYPE(T)                                                                                                    \
    template void reserve_quantised<T>(size_t, size_t, Activations&);                                                  \
    template void prepare_quantised<T>(size_t, size_t, const Area&, bool, const float*, size_t, Activations&);         \
    template void linear_quantised<T>(const Weight&, const Activations&, size_t, size_t, size_t, bool, float*, size_t, \
                                      const void*);                                                                    \
    template void gather_quantised<T>(const Weight&, size_t, float, float*);
FOR_TYPE(WeightType::INT8)
FOR_TYPE(WeightType::INT8_32)
FOR_TYPE(WeightType::INT4)
FOR_TYPE(WeightType::INT2)

}  // namespace GEMMA_ISA
}  // namespace gemma
