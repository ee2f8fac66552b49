// Attention goes through the positions in chunks. Chunks begin at fixed positions, so that a query's sums have one
// order whatever the queries beside it.
#include "attention.h"

#include <limits>

#include "elementwise.h"
#include "products.h"

namespace gemma {
namespace GEMMA_ISA {
namespace {

constexpr int64_t CHUNK_ROWS = 256;  // positions whose scores are held at once; chunks begin at multiples of it
constexpr size_t MAX_QUERIES = 32;

// Returns how many vectors of a value MQ queries take at once: as many sums as hide their latency and fit into
// registers.
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

inline void weigh_all(size_t Q, const float* const* weights, const float* values, size_t j0, size_t j1, size_t d,
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
    size_t offset;  // where position `begin` lies in keys and values
};

// Finds the runs of positions begin .. end. Blocks side by side make one run. Returns how many there are.
inline size_t runs_of(const HeadRows& rows, int64_t begin, int64_t end, Run* runs) {
    size_t count = 0;
    for (int64_t at = begin; at < end;) {
        const int64_t stop = std::min((at / BLOCK_ROWS + 1) * BLOCK_ROWS, end);
        const size_t offset = rows.offset(at), from = (size_t)(at - begin), to = (size_t)(stop - begin);
        if (count && runs[count - 1].offset + (from - runs[count - 1].begin) * rows.d == offset)
            runs[count - 1].end = to;
        else runs[count++] = {from, to, offset};
        at = stop;
    }
    return count;
}

// The softmax of some queries, as far as their chunks have been read. acc[q] is the sum of exp(score - top) * value.
struct Softmax {
    float top[MAX_QUERIES], total[MAX_QUERIES];
    float* acc[MAX_QUERIES];

    Softmax(size_t Q, size_t d, float* out, size_t ldo) {
        for (size_t i = 0; i < Q; i++) {
            top[i] = -std::numeric_limits<float>::infinity();
            total[i] = 0.0f;
            acc[i] = out + i * ldo;
            std::fill(acc[i], acc[i] + d, 0.0f);
        }
    }
    // Turns `count` scores of query i into exp(score - top), and shrinks what was there for the new top.
    void add_scores(size_t i, float* scores, size_t count, size_t d) {
        const float best = std::max(top[i], largest(scores, count));
        const float shrink = total[i] > 0 ? std::exp(top[i] - best) : 1.0f;  // nothing is there at the first chunk
        V sums = zero();
        each(count, [&](size_t j, int w) {
            const V e = only(exp(sub(take(scores + j, w), set1(best))), w);
            put(scores + j, e, w);
            sums = add(sums, e);
        });
        total[i] = total[i] * shrink + sum(sums);
        if (shrink != 1.0f) scale(acc[i], shrink, d);
        top[i] = best;
    }
    void finish(size_t Q, size_t d) {
        for (size_t i = 0; i < Q; i++) scale(acc[i], total[i] > 0 ? 1.0f / total[i] : 0.0f, d);
    }
};

void attend_some(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out,
                 size_t ldo) {
    static thread_local Buffer<float> scores;
    static thread_local Activations queries;
    const size_t d = rows.d;
    scores.resize(MAX_QUERIES * CHUNK_ROWS);
    reserve_dense<Wide>(Q, d, queries);
    prepare_dense<Wide>(Q, d, {0, Q, 0, d}, q, ldq, queries);
    Softmax softmax(Q, d, out, ldo);
    int64_t first = visible[0].first, last = visible[0].last;
    for (size_t i = 1; i < Q; i++) first = std::min(first, visible[i].first), last = std::max(last, visible[i].last);
    for (int64_t base = first / CHUNK_ROWS * CHUNK_ROWS; base <= last; base += CHUNK_ROWS) {
        const int64_t begin = std::max(base, first), end = std::min(base + CHUNK_ROWS, last + 1);
        const size_t count = (size_t)(end - begin);
        Run runs[CHUNK_ROWS / BLOCK_ROWS + 1];
        const size_t run_count = runs_of(rows, begin, end, runs);
        for (size_t r = 0; r < run_count; r++)
            multiply<Wide>(rows.keys + runs[r].offset, d, queries.wide.data(), Q, runs[r].end - runs[r].begin,
                           scores.data() + runs[r].begin, CHUNK_ROWS, nullptr, rows.values + runs[r].offset);
        // each query sees from .. to of the chunk, and all of them common_from .. common_to
        const float* weights[MAX_QUERIES];
        size_t from[MAX_QUERIES], to[MAX_QUERIES], common_from = 0, common_to = count;
        for (size_t i = 0; i < Q; i++) {
            float* s = scores.data() + i * CHUNK_ROWS;
            weights[i] = s;
            from[i] = (size_t)std::clamp(visible[i].first - begin, (int64_t)0, (int64_t)count);
            to[i] = (size_t)std::clamp(visible[i].last + 1 - begin, (int64_t)from[i], (int64_t)count);
            common_from = std::max(common_from, from[i]);
            common_to = std::min(common_to, to[i]);
            if (from[i] < to[i]) softmax.add_scores(i, s + from[i], to[i] - from[i], d);
        }
        float* const* acc = softmax.acc;
        for (size_t r = 0; r < run_count; r++) {
            const float* v =
                rows.values + runs[r].offset - runs[r].begin * d;  // of the chunk's beginning, were it one run
            const auto within = [&](size_t j) { return std::clamp(j, runs[r].begin, runs[r].end); };
            if (common_from >= common_to) {
                for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, within(from[i]), within(to[i]), d, acc + i);
                continue;
            }
            for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, within(from[i]), within(common_from), d, acc + i);
            weigh_all(Q, weights, v, within(common_from), within(common_to), d, acc);
            for (size_t i = 0; i < Q; i++) weigh<1>(weights + i, v, within(common_to), within(to[i]), d, acc + i);
        }
    }
    softmax.finish(Q, d);
}

}  // namespace

void attend(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out,
            size_t ldo) {
    for (size_t i = 0; i < Q; i += MAX_QUERIES)
        attend_some(q + i * ldq, ldq, std::min(MAX_QUERIES, Q - i), visible + i, rows, out + i * ldo, ldo);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
