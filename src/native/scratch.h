// The buffers of a call, and the products that one thread computes with them.
#pragma once

#include <vector>

#include "best.h"
#include "dispatch.h"
#include "model.h"
#include "pool.h"

namespace gemma {

constexpr size_t UNIT = PANEL_ROWS;  // weight rows that are not divided among threads

// Buffers that threads write by parts. All threads read them after a barrier.
struct Shared {
    Buffer<float> qkv, attended, out, act, ple, ple_gate, ple_out, expert_act, expert_out, clusters, projected;
    // For the feed-forward products where threads divide the sequences: each thread prepares its own part.
    Activations mlp_rows, mlp_act;
    std::vector<Best> best;  // [threads, rows]
    size_t best_rows = 0;

    // Makes room for a call of so many rows.
    void reserve(const Config& config, const std::vector<Layer>& layers, size_t rows, int threads);
};

// One thread's own buffers. Every thread holds the residual stream x of its rows, so that norms need no barrier.
struct Scratch {
    Buffer<float> x, n, a, b, c, q, gathered;
    Buffer<float> weights;
    std::vector<size_t> chosen;
    std::vector<Visible> visible;
    Activations rows;
    Stretches later;  // keys or values to prefetch during the product under way

    static Scratch& here();  // returns the calling thread's

    // Prepares rows of `in`, which must not change before the product.
    void prepare(const Weight& w, const float* in, size_t ldx, size_t count) {
        kernels().prepare_all(w, count, in, ldx, rows);
    }
    // Computes columns p.begin .. p.end of the product with the prepared rows. `out` is where the first of them goes;
    // `then` is what this thread reads next.
    void multiply(const Weight& w, size_t count, Part p, float* out, size_t ldy, const void* then = nullptr) {
        kernels().linear(w, rows, count, p.begin, p.end, out, ldy, then);
    }
    void linear(const Weight& w, const float* in, size_t ldx, size_t count, Part p, float* out, size_t ldy,
                const void* then = nullptr) {
        if (p.begin == p.end) return;
        prepare(w, in, ldx, count);
        multiply(w, count, p, out, ldy, then);
    }
};

// One thread's place in a call.
struct Context {
    Worker& me;
    Scratch& own;
    Shared& all;
};

// Returns whether shares of whole heads give every thread nearly as much.
inline bool by_heads(size_t heads, int threads) { return heads % threads == 0 || heads >= 4 * (size_t)threads; }

// Prefetches what another thread may have written. One line takes as long from core to core as many lines at once.
inline void fetch(const float* x, size_t n) {
    for (size_t i = 0; i < n; i += LINE / sizeof(float)) __builtin_prefetch(x + i, 0, 3);
}

// Returns the weights that a thread reads first of a part; null where there are none.
inline const void* share_of(const Weight& w, Part p) {
    return w.data && p.begin < p.end ? w.first_read(p.begin) : nullptr;
}

// Returns how many columns of a product with so many rows a thread takes at once, in whole units.
size_t chunk_columns(const Weight& w, size_t rows, size_t unit);

// Computes columns of the product with prepared rows. Threads share them out in whole units. `out` is where column 0
// goes. The thread that has made some columns calls done(Part) for them.
template <class F>
void share_linear(Worker& me, const Weight& w, const Activations& rows, size_t count, Part columns, size_t unit,
                  float* out, size_t ldy, const Next& then, F done) {
    me.each(columns.end - columns.begin, unit, chunk_columns(w, count, unit), [&](Part p, bool last) {
        p.begin += columns.begin, p.end += columns.begin;
        const Next next(last ? then.weights : share_of(w, {p.end, columns.end}), then.also);
        kernels().linear(w, rows, count, p.begin, p.end, out + p.begin, ldy, next);
        done(p);
    });
}
// Computes all columns.
void share_linear(Worker& me, const Weight& w, const Activations& rows, size_t count, float* out, size_t ldy,
                  const Next& then = {});

}  // namespace gemma
