// Products with floating-point weights that lie row by row.
//
// Every output element has one accumulator vector. It is filled in order of k and then summed by one tree, whatever the
// tile it is computed in.
#include "products.h"

namespace gemma {
namespace GEMMA_ISA {
namespace {

constexpr int MAX_ROWS = 6;  // rows of a tile
constexpr size_t CHUNK_COLUMNS = 512;  // columns of a long row that are read at once
constexpr size_t ROWS_BYTES = 24 << 10;  // activations that stay in the first-level cache beside the weights

// Returns the weight rows of a tile: as many accumulators as registers hold beside the weights.
#if defined(GEMMA_AVX512)
constexpr int columns_for(int rows) { return rows <= 2 ? 8 : 4; }
// Sums across lanes take long where rows are short. Those of sixteen accumulators cost least.
constexpr bool by_fours(size_t K) { return K <= CHUNK_COLUMNS; }
#else
constexpr int columns_for(int rows) { return rows <= 2 ? 4 : 2; }
constexpr bool by_fours(size_t) { return false; }
#endif

// Which chunk of a long row a tile reads. Between chunks, the accumulators wait in memory.
struct Chunk {
    bool first, last;
};

// Multiplies MR rows with NR weight rows of K columns. Each step of x holds the rows in turn. `next` is what to
// prefetch meanwhile: as many rows and columns. `beside` lies as these weights do and is prefetched with them. Both may
// be null.
template <class F, int MR, int NR>
inline void tile(const typename F::T* w, size_t ldw, const typename F::X* x, size_t K, const typename F::T* next,
                 const typename F::T* beside, const Chunk& chunk, float* waiting, float* y, size_t ldy) {
    using T = typename F::T;
    V acc[MR * NR];
    if (chunk.first) {
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
    if (k < K) {  // fewer columns than a step: zeros follow them
        T rest[NR * F::STEP] = {};
        for (int n = 0; n < NR; n++) std::copy_n(w + n * ldw + k, K - k, rest + n * F::STEP);
        F::template step<MR, NR>(acc, rest, F::STEP, x);
    }
    if (chunk.last) return reduce<MR, NR>(acc, y, ldy);
    UNROLL for (int i = 0; i < MR * NR; i++) store(waiting + i * W, acc[i]);
}

// Multiplies MR rows with K columns of `count` weight rows from `w` on. `fetch` may be null.
template <class F, int MR>
void row_tile(const typename F::T* w, size_t ldw, size_t K, const typename F::X* x, size_t first, size_t count,
              const Ahead<typename F::T>* fetch, const Chunk& chunk, float* waiting, float* y, size_t ldy) {
    constexpr int NR = columns_for(MR);
    size_t n = 0;
    for (; n + NR <= count; n += NR)
        tile<F, MR, NR>(w + n * ldw, ldw, x, K, fetch ? (*fetch)((first + n) * ldw, NR * ldw) : nullptr,
                        fetch && fetch->beside ? fetch->beside + (first + n) * ldw : nullptr, chunk,
                        waiting + n * MR * W, y + n, ldy);
    for (; n < count; n++)
        tile<F, MR, 1>(w + n * ldw, ldw, x, K, nullptr, nullptr, chunk, waiting + n * MR * W, y + n, ldy);
}

}  // namespace

template <class F>
void reserve_dense(size_t M, size_t K, Activations& out) {
    grown(F::place(out), M * padded_to(K, F::STEP));
}

// Writes the rows as `tile` reads them: tile by tile, step by step, a step of each of the tile's rows in turn. Zeros
// fill the last step.
template <class F>
void prepare_dense(size_t M, size_t K, const Area& area, const float* x, size_t ldx, Activations& out) {
    const size_t padded = padded_to(K, F::STEP);
    auto* place = F::place(out).data();
    each_tile_within(M, MAX_ROWS, by_fours(K), area.m0, area.m1, [&](size_t m0, size_t rows, size_t begin, size_t end) {
        for (size_t k = area.k0; k < area.k1; k += F::STEP)
            for (size_t m = begin; m < end; m++)
                F::convert(x + (m - area.m0) * ldx + (k - area.k0), std::min(F::STEP, K - k),
                           place + m0 * padded + k * rows + (m - m0) * F::STEP);
    });
}

template <class F>
void multiply(const typename F::T* w, size_t K, const typename F::X* x, size_t M, size_t count, float* y, size_t ldy,
              const void* then, const typename F::T* beside) {
    static thread_local Buffer<float> waiting;
    using T = typename F::T;
    const size_t padded = padded_to(K, F::STEP);
    const bool chunked = std::min(M, PASS_ROWS) * padded * sizeof(typename F::X) > ROWS_BYTES && K > CHUNK_COLUMNS;
    const size_t columns = chunked ? CHUNK_COLUMNS : K, block = chunked || M > MAX_ROWS ? PASS_ROWS : count;
    if (chunked) grown(waiting, block * M * W);
    // FETCH_BYTES are on their way: of the rows that follow, or of the next chunk
    const size_t ahead = columns == K ? FETCH_BYTES / sizeof(T) : FETCH_BYTES / (CHUNK_COLUMNS * sizeof(T)) * K;
    for (size_t n = 0; n < count; n += block)
        for (size_t k = 0; k < K; k += columns) {
            const Chunk chunk{k == 0, k + columns >= K};
            const Ahead<T> fetch{w + k, count * K, ahead, chunked ? nullptr : (const T*)then,
                                 beside ? beside + k : nullptr};
            each_tile(M, MAX_ROWS, by_fours(K), [&](size_t m, size_t rows) {
                with_constant<MAX_ROWS>(rows, [&](auto constant) {
                    row_tile<F, constant>(w + n * K + k, K, std::min(columns, K - k), x + m * padded + k * rows, n,
                                          std::min(block, count - n), m == 0 ? &fetch : nullptr, chunk,
                                          waiting.data() + m * block * W, y + m * ldy + n, ldy);
                });
            });
        }
}

template <class F>
void linear_dense(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                  const void* then) {
    const auto* rows = (const typename F::T*)w.data + n0 * w.cols;
    multiply<F>(rows, w.cols, F::place(x).data(), M, n1 - n0, y, ldy, then, nullptr);
}

#define FOR_FORMAT(F)                                                                                        \
    template void reserve_dense<F>(size_t, size_t, Activations&);                                            \
    template void prepare_dense<F>(size_t, size_t, const Area&, const float*, size_t, Activations&);         \
    template void multiply<F>(const F::T*, size_t, const F::X*, size_t, size_t, float*, size_t, const void*, \
                              const F::T*);                                                                  \
    template void linear_dense<F>(const Weight&, const Activations&, size_t, size_t, size_t, float*, size_t, \
                                  const void*);
FOR_FORMAT(Wide)
FOR_FORMAT(Half)

}  // namespace GEMMA_ISA
}  // namespace gemma
