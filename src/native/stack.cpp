#include "stack.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

namespace gemma {

namespace {

constexpr size_t SHARED_BYTES = 1 << 20;  // models below are run faster by one thread than by several that wait
constexpr size_t UNIT = PANEL_ROWS;  // weight rows that are not divided among threads
constexpr size_t PASS = 16;          // weight rows that a product with many rows goes through at once: few left over
constexpr size_t CHUNK = 1 << 20;  // multiply-adds that a thread takes at once, about: some microseconds
constexpr size_t ROW_BLOCK = 4;   // rows whose queries share a pass over the cache
constexpr size_t HEAD_BLOCK = 256;  // rows of the head scored at once
constexpr size_t REPEATED_BYTES = 32 << 10;  // a matrix below is multiplied by every thread, which spares a barrier
// Of sequences, and of blocks of their rows, so many for each thread at least where sequences are divided among threads.
constexpr size_t LEAST_SEQUENCES = 2, LEAST_BLOCKS = 4;
constexpr size_t LEAST_SHARED = 4;  // blocks a thread from which on attention is shared out by blocks
// A thread fetches so much of a layer's keys ahead, at most, so that its second-level cache holds them, and of its values,
// earlier, so that the last level does.
constexpr size_t KEY_BYTES = 256 << 10, VALUE_BYTES = 1 << 20;
constexpr size_t ROW_POSITIONS = 64;  // positions that are attended to while a row's other work is done, about

// Bytes of the last-level cache: smaller models are read from there, so that each thread may read all of a layer's weights for
// its sequences. As Linux says, or what many processors have.
size_t cached_bytes() {
    size_t kib = 32 << 10;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        if (std::fscanf(file, "%zuK", &kib) != 1) kib = 32 << 10;
        std::fclose(file);
    }
    return kib << 10;
}

// Shares of whole heads, where that gives every thread nearly as much.
bool by_heads(size_t heads, int threads) { return heads % threads == 0 || heads >= 4 * (size_t)threads; }

// Asks for what another thread may have written: one line's way from core to core takes as long as many lines' at once.
void fetch(const float* x, size_t n) {
    for (size_t i = 0; i < n; i += LINE / sizeof(float)) __builtin_prefetch(x + i, 0, 3);
}

// Weights that a thread reads next, fetched while it is still at others; null where there are none.
const void* share_of(const Weight& w, Part p) {
    return w.data && p.begin < p.end ? w.first_read(p.begin) : nullptr;
}

// Columns of a product with so many rows that a thread takes at once, in whole units. A few rows take as long as one,
// for they wait for the weights; a column's sums take a while, too.
size_t chunk(const Weight& w, size_t rows, size_t unit) {
    const size_t column = (w.cols + 64) * std::max<size_t>(rows, 4);
    const size_t whole = std::lcm(unit, w.type == WeightType::PANELS ? GROUP_ROWS : PASS);
    return std::max<size_t>(CHUNK / column / whole, 1) * whole;
}

}  // namespace

// Written by parts, read by all threads after a barrier.
struct Stack::Shared {
    Buffer<float> qkv, attended, out, act, ple, ple_gate, ple_out, expert_act, expert_out, clusters, projected;
    Activations ready, ready_act;  // for the feed-forward products where threads divide the rows: each one's, made ready by it
    std::vector<Best> best;  // [threads, rows]
    size_t best_rows = 0;
};

// Every thread holds the same residual stream, so that norms need no barrier.
struct Stack::Private {
    Buffer<float> x, n, a, b, c, q, gathered;
    Buffer<float> weights;
    std::vector<size_t> chosen;
    std::vector<Visible> visible;
    Activations rows;
    Stretches later;  // keys or values that this thread attends to after the product under way or a later one

    // `in` stays as it is until the product.
    void prepare(const Weight& w, const float* in, size_t ldx, size_t count) {
        kernels().prepare_all(w, count, in, ldx, rows);
    }
    // Columns p.begin .. p.end of the product with the prepared rows; `out` is where the first of them goes, `then` what
    // this thread reads next.
    void multiply(const Weight& w, size_t count, Part p, float* out, size_t ldy, const void* then = nullptr) {
        kernels().linear(w, rows, count, p.begin, p.end, out, ldy, then);
    }
    void linear(const Weight& w, const float* in, size_t ldx, size_t count, Part p, float* out, size_t ldy,
                const void* then = nullptr) {
        if (p.begin == p.end) return;
        prepare(w, in, ldx, count);
        multiply(w, count, p, out, ldy, then);
    }
    // Columns of the product, shared out among the threads in whole units; `then` as above, `out` for column 0. Who has made
    // columns calls done(Part) for them.
    template <class F>
    static void shared_linear(Worker& me, const Weight& w, const Activations& ready, size_t count, Part columns, size_t unit,
                              float* out, size_t ldy, const Next& then, F done) {
        me.each(columns.end - columns.begin, unit, chunk(w, count, unit), [&](Part p, bool last) {
            p.begin += columns.begin, p.end += columns.begin;
            const Next next(last ? then.weights : share_of(w, {p.end, columns.end}), then.also);
            kernels().linear(w, ready, count, p.begin, p.end, out + p.begin, ldy, next);
            done(p);
        });
    }
    // All of them.
    void shared_linear(Worker& me, const Weight& w, const float* in, size_t ldx, size_t count, float* out, size_t ldy,
                       const void* then = nullptr) {
        prepare(w, in, ldx, count);
        shared_linear(me, w, rows, count, {0, w.rows}, UNIT, out, ldy, then, [](Part) {});
    }
    static Private& here() {
        static thread_local Private own;
        return own;
    }
};

Batch::Batch(const std::vector<Segment>& segments, const Cache* caches, bool drafting, bool kept_only)
    : caches(caches), drafting(drafting) {
    size_t source = 0;
    for (const Segment& s : segments) {
        const size_t first = rows.size(), skip = kept_only ? s.rows - s.keep : 0;
        for (size_t i = skip; i < s.rows; i++) rows.push_back({s.view, s.position + (int64_t)i, source + i});
        for (size_t m = first; m < rows.size(); m += ROW_BLOCK) blocks.emplace_back(m, std::min(rows.size(), m + ROW_BLOCK));
        source += s.rows;
    }
}

void Batch::keep(float* x, size_t size) const {
    for (size_t m = 0; m < rows.size(); m++)  // rows move towards the front only
        if (rows[m].source != m) std::copy_n(x + rows[m].source * size, size, x + m * size);
}

void Batch::divide(int threads, size_t window) {
    cuts.clear();
    if (threads == 1 || blocks.size() < LEAST_BLOCKS * threads) return;
    struct Whole {  // sequence
        size_t block, cost;  // its first one
    };
    std::vector<Whole> sequences;
    size_t total = 0;
    for (size_t b = 0; b < blocks.size(); b++) {
        const auto [begin, end] = blocks[b];
        const size_t cost = (ROW_POSITIONS + std::min<size_t>(rows[begin].position, window)) * (end - begin);
        if (!continues(b)) sequences.push_back({b, 0});
        sequences.back().cost += cost;
        total += cost;
    }
    if (sequences.size() < LEAST_SEQUENCES * threads) return;
    size_t sum = 0, before = 0, most = 0;
    cuts.push_back(0);
    for (const Whole& s : sequences) {  // a cut goes to the nearer end of the sequence it falls into
        const size_t half = 2 * sum + s.cost;
        while (cuts.size() < (size_t)threads && half * threads > 2 * total * cuts.size()) {
            cuts.push_back(s.block);
            most = std::max(most, sum - before);
            before = sum;
        }
        sum += s.cost;
    }
    cuts.resize(threads + 1, blocks.size());
    most = std::max(most, sum - before);
    if (4 * most * threads > 5 * total) cuts.clear();  // one would wait too long for another
}

void Stack::prepare() {
    for (const Layer& l : layers) {
        widest_qkv_ = std::max(widest_qkv_, l.qkv.rows);
        widest_heads_ = std::max(widest_heads_, l.heads * l.head_dim);
        widest_mlp_ = std::max(widest_mlp_, l.down.cols);
    }
    shared_ = std::make_shared<Shared>();
    size_t bytes = config.head.rows * config.head.row_bytes();
    for (const Layer& l : layers)
        for (const Weight* w : {&l.qkv, &l.o, &l.gate_up, &l.down, &l.moe.gate_up, &l.moe.down})
            bytes += w->rows * w->row_bytes();
    large_ = bytes >= SHARED_BYTES;
    const bool sparse = std::any_of(layers.begin(), layers.end(), [](const Layer& l) { return l.moe.experts; });
    divisible_ = bytes < cached_bytes() && !sparse;
}

Stack::Shared& Stack::shared(size_t rows, int threads) {
    Shared& all = *shared_;
    grown(all.qkv, rows * widest_qkv_);
    grown(all.attended, rows * widest_heads_);
    grown(all.out, rows * config.hidden);
    grown(all.act, rows * widest_mlp_);
    for (const Layer& l : layers) {
        kernels().reserve(l.gate_up, rows, all.ready);
        kernels().reserve(l.down, rows, all.ready_act);
    }
    grown(all.ple, rows * layers.size() * config.ple);
    grown(all.ple_gate, rows * config.ple);
    if (config.ple) grown(all.ple_out, rows * config.hidden);
    for (const Layer& l : layers)
        if (l.moe.experts) {
            grown(all.expert_act, rows * l.moe.top_k * l.moe.width);
            grown(all.expert_out, rows * l.moe.top_k * config.hidden);
        }
    grown(all.best, rows * threads);
    all.best_rows = rows;
    return all;
}

void Stack::embed(const int64_t* tokens, const Batch& batch, Private& own, Shared& all, Worker& me) {
    const Kernels& k = kernels();
    const size_t D = config.hidden, P = config.ple, L = layers.size();
    const Part mine = batch.rows_of(me);
    float* x = grown(own.x, batch.size() * D);
    for (size_t m = mine.begin; m < mine.end; m++) k.gather(config.table, (size_t)tokens[m], config.embed_scale, x + m * D);
    if (!P) return;
    // of these rows all columns, or of all rows a share of whole layers' columns: no barrier in between
    const Part here = batch.divided() ? Part{0, L} : me.part(L, 1), columns{here.begin * P, here.end * P};
    own.linear(config.ple_model_projection, x + mine.begin * D, D, mine.end - mine.begin, columns,
               all.ple.data() + mine.begin * L * P + columns.begin, L * P);
    float* own_row = grown(own.a, P);
    for (size_t m = mine.begin; m < mine.end; m++) {
        float* table_row = grown(own.b, L * P);
        k.gather(config.ple_table, (size_t)tokens[m], config.ple_embed_scale, table_row);
        for (size_t l = here.begin; l < here.end; l++) {
            float* p = all.ple.data() + (m * L + l) * P;
            k.scale(p, 1.0f / std::sqrt((float)D), P);
            k.rms_norm(p, config.ple_model_norm, config.eps, P, own_row);
            k.axpy(own_row, 1.0f, table_row + l * P, P);
            std::copy(own_row, own_row + P, p);
            k.scale(p, 0.70710678118654752f, P);
        }
    }
    if (!batch.divided()) me.wait();
}

void Stack::attention(const Layer& l, const Batch& batch, Shared& all, Private& own, Worker& me) {
    const size_t per_group = l.heads / l.groups, blocks = batch.blocks.size(), few = LEAST_SHARED * me.threads;
    if (batch.divided()) {
        const Part mine = batch.blocks_of(me);
        for (size_t b = mine.begin; b < mine.end; b++)
            for (size_t g = 0; g < l.groups; g++) attend(l, batch, g * per_group, per_group, b, all, own);
        return;
    }
    // few blocks are shared out by heads, which is even; many by blocks, so that one thread reads a sequence's rows once
    if (by_heads(l.heads, me.threads) && blocks < few) {
        const Part heads = me.part(l.heads, 1);
        for (size_t h = heads.begin; h < heads.end;) {
            const size_t count = std::min(per_group - h % per_group, heads.end - h);
            for (size_t b = 0; b < blocks; b++) attend(l, batch, h, count, b, all, own);
            h += count;
        }
        return;
    }
    const size_t unit = l.groups * blocks < few ? 1 : per_group;
    me.each(l.groups * blocks * per_group, unit, unit, [&](Part tasks, bool) {
        for (size_t t = tasks.begin; t < tasks.end;) {
            const size_t group = t / (blocks * per_group), block = t / per_group % blocks, h = t % per_group;
            const size_t count = std::min(per_group - h, tasks.end - t);
            attend(l, batch, group * per_group + h, count, block, all, own);
            t += count;
        }
    });
}

// Keys and values of a group that a block of rows attends to.
HeadRows Stack::head_rows(const Layer& l, const Batch& batch, size_t group, size_t block) const {
    const Cache& cache = batch.caches[l.cache];
    const size_t before = group * cache.blocks * BLOCK_ROWS * l.head_dim;
    return {cache.keys + before, cache.values + before, batch.rows[batch.blocks[block].first].view->table[l.sliding ? 0 : 1],
            l.head_dim};
}

Visible Stack::visible(const Layer& l, const Batch::Row& row, const Batch& batch) const {
    return {l.sliding ? std::max((int64_t)0, row.position - (int64_t)config.window + 1) : 0, row.position - batch.drafting};
}

// Of keys or of values those that are there already and that this thread's blocks attend to, to be fetched during a product
// with `during`. Few blocks' are not: they would only wait for one another with the weights.
void Stack::list_cached(const Layer& l, const Batch& batch, const float* HeadRows::*which, const Weight& during, size_t most,
                        Private& own, const Worker& me) const {
    const size_t blocks = batch.blocks.size(), row_lines = l.head_dim * sizeof(float) / LINE;
    own.later.clear();
    if (during.type != WeightType::PANELS || blocks < LEAST_SHARED * me.threads) return;
    size_t left = most / LINE;
    const auto add = [&](size_t group, size_t block) {
        const Batch::Row& row = batch.rows[batch.blocks[block].first];
        if (batch.continues(block)) return;  // listed with the block before
        const HeadRows rows = head_rows(l, batch, group, block);
        for (int64_t at = visible(l, row, batch).first; at < row.position && left;) {
            const int64_t stop = std::min((at / BLOCK_ROWS + 1) * BLOCK_ROWS, row.position);
            const size_t lines = std::min((size_t)(stop - at) * row_lines, left);
            own.later.add(rows.*which + rows.offset(at), lines);
            left -= lines;
            at = stop;
        }
    };
    if (batch.divided()) {
        const Part mine = batch.blocks_of(me);
        for (size_t b = mine.begin; b < mine.end; b++)
            for (size_t g = 0; g < l.groups; g++) add(g, b);
    } else {
        const Part mine = me.part(l.groups * blocks, 1);
        for (size_t t = mine.begin; t < mine.end; t++) add(t / blocks, t % blocks);
    }
}

// `count` heads of one group from `head` on, of a block of rows.
void Stack::attend(const Layer& l, const Batch& batch, size_t head, size_t count, size_t block, Shared& all, Private& own) {
    const auto [begin, end] = batch.blocks[block];
    const size_t d = l.head_dim, queries = count * (end - begin);
    float* q = grown(own.q, 2 * queries * d);
    float* out = q + queries * d;
    own.visible.resize(queries);
    for (size_t h = 0, i = 0; h < count; h++)
        for (size_t m = begin; m < end; m++, i++) {
            std::copy_n(all.qkv.data() + m * l.qkv.rows + (head + h) * d, d, q + i * d);
            own.visible[i] = visible(l, batch.rows[m], batch);
        }
    const HeadRows rows = head_rows(l, batch, head / (l.heads / l.groups), block);
    kernels().attend(q, d, queries, own.visible.data(), rows, out, d);
    for (size_t h = 0, i = 0; h < count; h++)
        for (size_t m = begin; m < end; m++, i++)
            std::copy_n(out + i * d, d, all.attended.data() + m * l.heads * d + (head + h) * d);
}

void Stack::experts(const Layer& l, size_t rows, Private& own, Shared& all, Worker& me) {
    const Kernels& k = kernels();
    const MoE& moe = l.moe;
    const size_t D = config.hidden, E = moe.experts, T = moe.top_k, I = moe.width;
    float* in = grown(own.a, std::max(D, E) * rows);
    float* scores = grown(own.b, E * rows);
    for (size_t m = 0; m < rows; m++) {
        float* r = in + m * D;
        k.rms_norm(own.x.data() + m * D, moe.router_scale, config.eps, D, r);
        k.scale(r, 1.0f / std::sqrt((float)D), D);
    }
    own.linear(moe.router, in, D, rows, {0, E}, scores, E);
    float* weights = grown(own.weights, rows * T);
    size_t* chosen = grown(own.chosen, rows * T);
    std::vector<size_t> order(E);
    for (size_t m = 0; m < rows; m++) {
        float* s = scores + m * E;
        k.softmax(s, E);
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + T, order.end(),
                          [&](size_t a, size_t b) { return s[a] > s[b] || (s[a] == s[b] && a < b); });
        float total = 0;
        for (size_t j = 0; j < T; j++) total += s[order[j]];
        for (size_t j = 0; j < T; j++) {
            chosen[m * T + j] = order[j];
            weights[m * T + j] = s[order[j]] / total * moe.expert_scale[order[j]];
        }
    }
    for (size_t m = 0; m < rows; m++) k.rms_norm(own.x.data() + m * D, moe.pre_sparse, config.eps, D, in + m * D);
    const Part wide = me.part(I, UNIT), narrow = me.part(D, UNIT);
    const auto slots_of = [&](size_t expert) {
        std::vector<size_t> slots;
        for (size_t i = 0; i < rows * T; i++)
            if (chosen[i] == expert) slots.push_back(i);
        return slots;
    };
    for (size_t e = 0; e < E; e++) {
        const auto slots = slots_of(e);
        if (slots.empty()) continue;
        float* x = grown(own.gathered, slots.size() * std::max(D, I));
        for (size_t i = 0; i < slots.size(); i++) std::copy_n(in + slots[i] / T * D, D, x + i * D);
        const size_t n = wide.end - wide.begin;
        if (!n) continue;
        float* gate = grown(own.c, 2 * slots.size() * n);
        float* up = gate + slots.size() * n;
        const size_t base = e * 2 * I;
        own.prepare(moe.gate_up, x, D, slots.size());
        own.multiply(moe.gate_up, slots.size(), {base + wide.begin, base + wide.end}, gate, n);
        own.multiply(moe.gate_up, slots.size(), {base + I + wide.begin, base + I + wide.end}, up, n);
        for (size_t i = 0; i < slots.size(); i++)
            k.gated(gate + i * n, up + i * n, n, all.expert_act.data() + slots[i] * I + wide.begin);
    }
    me.wait();
    for (size_t e = 0; e < E; e++) {
        const auto slots = slots_of(e);
        const size_t n = narrow.end - narrow.begin;
        if (slots.empty() || !n) continue;
        float* x = grown(own.gathered, slots.size() * std::max(D, I));
        float* y = grown(own.c, slots.size() * n);
        for (size_t i = 0; i < slots.size(); i++) std::copy_n(all.expert_act.data() + slots[i] * I, I, x + i * I);
        const size_t base = e * D;
        own.linear(moe.down, x, I, slots.size(), {base + narrow.begin, base + narrow.end}, y, n);
        for (size_t i = 0; i < slots.size(); i++)
            std::copy_n(y + i * n, n, all.expert_out.data() + slots[i] * D + narrow.begin);
    }
    me.wait();
    // dense and sparse branches, each with its own norm; the sum takes the layer's post-feedforward norm
    float* dense = grown(own.n, rows * D);
    float* sparse = grown(own.a, std::max(D, E) * rows);
    for (size_t m = 0; m < rows; m++) {
        k.rms_norm(all.out.data() + m * D, moe.post_dense, config.eps, D, dense + m * D);
        std::fill_n(sparse, D, 0.0f);
        for (size_t j = 0; j < T; j++)
            k.axpy(sparse, weights[m * T + j], all.expert_out.data() + (m * T + j) * D, D);
        k.rms_norm(sparse, moe.post_sparse, config.eps, D, sparse);
        k.axpy(dense + m * D, 1.0f, sparse, D);
    }
}

// Norm and rotation of one head of one row, in place; a key's and a value's result goes to the cache.
void Stack::finish_head(const Layer& l, const Batch& batch, size_t m, size_t h, Shared& all) {
    const Kernels& k = kernels();
    const size_t d = l.head_dim, kind = l.sliding ? 0 : 1;
    const auto& [view, position, source] = batch.rows[m];
    float* v = all.qkv.data() + m * l.qkv.rows + h * d;
    const float* cos = view->cos[kind] + (size_t)position * d;
    const float* sin = view->sin[kind] + (size_t)position * d;
    if (h < l.heads) {
        k.rms_norm(v, l.q_norm, config.eps, d, v);
        k.rotate(v, cos, sin, d);
        return;
    }
    const Cache& cache = batch.caches[l.cache];
    const size_t g = (h - l.heads) % l.kv_heads;
    const HeadRows rows{cache.keys, cache.values, view->table[kind], d};
    const size_t row = g * cache.blocks * BLOCK_ROWS * d + rows.offset(position);
    if (h < l.heads + l.kv_heads) {
        float* key = cache.keys + row;
        if (l.key_is_value) k.rms_norm(v, nullptr, config.eps, d, cache.values + row);
        k.rms_norm(v, l.k_norm, config.eps, d, key);
        k.rotate(key, cos, sin, d);
    } else {
        k.rms_norm(v, nullptr, config.eps, d, cache.values + row);
    }
}

// Those of queries, keys and values whose heads these are, of `in`, every row's. Shares of whole heads need no barrier before
// their norms, nor do whole rows.
void Stack::project(const Layer& l, const Batch& batch, Part heads, const float* in, const void* then, Private& own,
                    Shared& all, Worker& me) {
    const size_t rows = batch.size(), d = l.head_dim, count = heads.end - heads.begin, D = config.hidden;
    const Part columns{heads.begin * d, heads.end * d};
    if (batch.divided()) {
        const Part mine = batch.rows_of(me);
        own.linear(l.qkv, in + mine.begin * D, D, mine.end - mine.begin, columns,
                   all.qkv.data() + mine.begin * l.qkv.rows + columns.begin, l.qkv.rows, then);
        for (size_t m = mine.begin; m < mine.end; m++)
            for (size_t h = heads.begin; h < heads.end; h++) finish_head(l, batch, m, h, all);
        return;
    }
    if (heads.begin == 0) list_cached(l, batch, &HeadRows::keys, l.qkv, KEY_BYTES, own, me);
    const Next next(then, &own.later);
    own.prepare(l.qkv, in, D, rows);
    if (!by_heads(count, me.threads)) {
        own.shared_linear(me, l.qkv, own.rows, rows, columns, UNIT, all.qkv.data(), l.qkv.rows, next, [](Part) {});
        me.wait();
        const Part tasks = me.part(rows * count, 1);
        for (size_t t = tasks.begin; t < tasks.end; t++) finish_head(l, batch, t / count, heads.begin + t % count, all);
        return;
    }
    own.shared_linear(me, l.qkv, own.rows, rows, columns, d, all.qkv.data(), l.qkv.rows, next, [&](Part p) {
        for (size_t m = 0; m < rows; m++)
            for (size_t h = p.begin / d; h < p.end / d; h++) finish_head(l, batch, m, h, all);
    });
}

// Gelu(gate) * up, to `all.act`, or made ready for the next product.
void Stack::gate(const Layer& l, const Batch& batch, const float* in, Private& own, Shared& all, Worker& me) {
    const size_t I = l.down.cols, D = config.hidden, rows = batch.size(), unit = batch.divided() ? AREA_COLS : UNIT;
    const void* then = share_of(l.down, me.part(D, UNIT));
    if (batch.divided()) {
        const Part mine = batch.rows_of(me);
        kernels().prepare(l.gate_up, rows, {mine.begin, mine.end, 0, D}, in + mine.begin * D, D, all.ready);
        me.wait();
    } else {
        own.prepare(l.gate_up, in, D, rows);
    }
    const Activations& ready = batch.divided() ? all.ready : own.rows;
    me.each(I, unit, chunk(l.gate_up, 2 * rows, unit), [&](Part p, bool last) {
        const size_t width = p.end - p.begin;
        const Part up_part{I + p.begin, I + p.end};
        float* gate = grown(own.a, 2 * rows * width);
        float* up = gate + rows * width;
        kernels().linear(l.gate_up, ready, rows, p.begin, p.end, gate, width, {share_of(l.gate_up, up_part), &own.later});
        kernels().linear(l.gate_up, ready, rows, up_part.begin, up_part.end, up, width,
                         {last ? then : share_of(l.gate_up, {p.end, I}), &own.later});
        for (size_t m = 0; m < rows; m++)
            kernels().gated(gate + m * width, up + m * width, width,
                            batch.divided() ? gate + m * width : all.act.data() + m * I + p.begin);
        if (batch.divided()) kernels().prepare(l.down, rows, {0, rows, p.begin, p.end}, gate, width, all.ready_act);
    });
}

// The per-layer embedding's branch, added to the residual stream. `then`: what this thread reads after it.
void Stack::add_ple(const Layer& l, size_t index, const Batch& batch, const void* then, Private& own, Shared& all, Worker& me) {
    const size_t P = config.ple, D = config.hidden;
    const Part mine = batch.rows_of(me);
    const size_t rows = mine.end - mine.begin;
    const bool repeated = batch.divided() || P * l.ple_gate.row_bytes() <= REPEATED_BYTES;
    const Part gates = repeated ? Part{0, P} : me.part(P, UNIT);
    float *x = own.x.data() + mine.begin * D, *gated = repeated ? grown(own.a, rows * P) : all.ple_gate.data();
    own.linear(l.ple_gate, x, D, rows, gates, gated + gates.begin, P, batch.divided() ? l.ple_projection.data : nullptr);
    for (size_t m = 0; m < rows; m++) {
        const float* ple = all.ple.data() + (batch.rows[mine.begin + m].source * layers.size() + index) * P;
        float* row = gated + m * P + gates.begin;
        kernels().gated(row, ple + gates.begin, gates.end - gates.begin, row);
    }
    // not to `all.out`: another thread may still read what the feed-forward left there
    float* out = all.ple_out.data() + mine.begin * D;
    if (batch.divided()) {
        own.linear(l.ple_projection, gated, P, rows, {0, D}, out, D, then);
    } else {
        if (!repeated) me.wait();
        own.shared_linear(me, l.ple_projection, gated, P, rows, out, D, then);
        me.wait();
        fetch(out, rows * D);
    }
    for (size_t m = 0; m < rows; m++) kernels().add_rms_norm(x + m * D, out + m * D, l.ple_norm, config.eps, D);
}

// What this thread reads first in the layer after `index`, or in the head.
const void* Stack::after(size_t index, const Batch& batch, const Worker& me) const {
    if (index + 1 >= layers.size()) return share_of(config.head, me.part(config.vocab, UNIT));
    const Layer& l = layers[index + 1];
    if (batch.divided()) return l.qkv.data;
    return share_of(l.qkv, me.part(l.qkv.rows, by_heads(l.qkv.rows / l.head_dim, me.threads) ? l.head_dim : UNIT));
}

// Keys and values of `all_rows`, and the layer's output of those that are kept, `batch`; often they are the same.
void Stack::layer(const Layer& l, size_t index, const Batch& all_rows, const Batch& batch, Private& own, Shared& all,
                  Worker& me) {
    const Kernels& k = kernels();
    const size_t rows = batch.size(), D = config.hidden, heads = l.qkv.rows / l.head_dim;
    const Part mine = batch.rows_of(me), before = all_rows.rows_of(me);
    const float eps = config.eps;
    const void* next_layer = after(index, batch, me);
    float *x = own.x.data(), *n = grown(own.n, all_rows.size() * D), *out = all.out.data();

    for (size_t m = before.begin; m < before.end; m++) k.rms_norm(x + m * D, l.input_norm, eps, D, n + m * D);
    const void* o = batch.divided() ? l.o.data : share_of(l.o, me.part(D, UNIT));
    if (rows == all_rows.size()) {
        project(l, batch, {0, heads}, n, o, own, all, me);
    } else {
        project(l, all_rows, {l.heads, heads}, n, share_of(l.qkv, me.part(l.heads * l.head_dim, l.head_dim)), own, all, me);
        batch.keep(x, D), batch.keep(n, D);
        project(l, batch, {0, l.heads}, n, o, own, all, me);
    }
    if (!batch.divided()) me.wait();
    attention(l, batch, all, own, me);
    const void* then = share_of(l.gate_up, me.part(l.down.cols, AREA_COLS));
    if (batch.divided()) {
        own.linear(l.o, all.attended.data() + mine.begin * l.o.cols, l.o.cols, mine.end - mine.begin, {0, D},
                   out + mine.begin * D, D, then);
    } else {
        me.wait();
        fetch(all.attended.data(), rows * l.o.cols);
        own.shared_linear(me, l.o, all.attended.data(), l.o.cols, rows, out, D, then);
        me.wait();
        fetch(out, rows * D);
    }

    for (size_t m = mine.begin; m < mine.end; m++) {
        k.add_rms_norm(x + m * D, out + m * D, l.post_attention, eps, D);
        k.rms_norm(x + m * D, l.pre_feedforward, eps, D, n + m * D);
    }
    if (index + 1 < layers.size()) list_cached(layers[index + 1], batch, &HeadRows::values, l.gate_up, VALUE_BYTES, own, me);
    else own.later.clear();
    gate(l, batch, n, own, all, me);
    me.wait();
    then = config.ple ? nullptr : next_layer;
    if (batch.divided()) {
        own.shared_linear(me, l.down, all.ready_act, rows, {0, D}, UNIT, out, D, then, [](Part) {});
    } else {
        fetch(all.act.data(), rows * l.down.cols);
        own.shared_linear(me, l.down, all.act.data(), l.down.cols, rows, out, D, then);
    }
    me.wait();
    const float* mlp = out;
    if (l.moe.experts) {
        experts(l, rows, own, all, me);
        mlp = own.n.data();
    }
    fetch(mlp + mine.begin * D, (mine.end - mine.begin) * D);
    for (size_t m = mine.begin; m < mine.end; m++) k.add_rms_norm(x + m * D, mlp + m * D, l.post_feedforward, eps, D);
    if (config.ple) add_ple(l, index, batch, next_layer, own, all, me);
    if (l.scalar != 1.0f) k.scale(x + mine.begin * D, l.scalar, (mine.end - mine.begin) * D);
}

void Stack::head(const float* hidden, size_t rows, float* out, size_t ldo, Private& own, Worker& me) {
    own.prepare(config.head, hidden, config.hidden, rows);
    own.shared_linear(me, config.head, own.rows, rows, {0, config.vocab}, UNIT, out, ldo, nullptr, [&](Part p) {
        if (config.softcap > 0)
            for (size_t m = 0; m < rows; m++) kernels().softcap(out + m * ldo + p.begin, config.softcap, p.end - p.begin);
    });
}

void Best::clear() {
    value = score = top = -std::numeric_limits<float>::infinity();
    id = std::numeric_limits<int64_t>::max();
    total = 0;
}

void Best::take(float other_value, int64_t other_id, float other_score) {
    if (other_value > value || (other_value == value && other_id < id)) value = other_value, id = other_id, score = other_score;
}

void Best::merge(const Best& other) {
    take(other.value, other.id, other.score);
    if (other.total > 0) {
        const float highest = std::max(top, other.top);
        total = (total > 0 ? total * std::exp(top - highest) : 0.0f) + other.total * std::exp(other.top - highest);
        top = highest;
    }
}

float Best::probability() const { return std::exp(score - top) / total; }

namespace {

uint64_t mixed(uint64_t word) {  // splitmix64's finaliser
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

// Standard Gumbel noise of a token, as decoding/noise.py defines it. `bits`: of its uniform number, 52 of them.
float gumbel(uint64_t bits) {
    const double uniform = (double)(2 * bits + 1) * 0x1p-53;
    return (float)-std::log(-std::log(uniform));
}

// The best of `count` candidates, whose ids are `ids` or begin at `first`, taken into `best`; `scores` become scaled ones.
void take_best(float* scores, size_t count, const int64_t* ids, int64_t first, const Choice& choice, Best& best) {
    if (choice.temperature == 0) {
        if (!ids && count && !(kernels().largest(scores, count) > best.value)) return;  // of equals the first stays
        size_t top = 0;
        for (size_t i = 1; i < count; i++)
            if (scores[i] > scores[top] || (ids && scores[i] == scores[top] && ids[i] < ids[top])) top = i;
        if (count && scores[top] > -std::numeric_limits<float>::infinity())
            best.take(scores[top], ids ? ids[top] : first + (int64_t)top, scores[top]);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        const float score = scores[i] /= choice.temperature;
        const int64_t id = ids ? ids[i] : first + (int64_t)i;
        const uint64_t bits = mixed(choice.key + ((uint64_t)id + 1) * 0x9E3779B97F4A7C15u) >> 12;
        // a uniform number above 1 - 2 ** -n has a noise of at most (n + 1) ln 2: most candidates need no logarithm
        const uint64_t below_one = ~bits & ((uint64_t(1) << 52) - 1);
        const int n = below_one ? __builtin_clzll(below_one) - 11 : 54;
        if (score + 0.6932f * (float)(n + 1) < best.value) continue;
        best.take(score + gumbel(bits), id, score);
    }
}

// Adds the block's share to the softmax of all scores; `scores` are spoilt.
void take_total(float* scores, size_t count, Best& best) {
    if (!count) return;
    float top = scores[0];
    for (size_t i = 1; i < count; i++) top = std::max(top, scores[i]);
    if (top == -std::numeric_limits<float>::infinity()) return;
    const size_t at = std::find(scores, scores + count, top) - scores;
    kernels().softmax(scores, count);  // 1 / scores[at] is now the block's own total
    Best block;
    block.clear();
    block.top = top, block.total = 1 / scores[at];
    best.merge(block);
}

}  // namespace

// This thread's best token of each row. With `totals` also what its softmax is divided by.
void Stack::best(const std::vector<const float*>& states, const Choice* choices, bool totals, Private& own, Shared& all,
                 Worker& me) {
    const size_t rows = states.size();
    float* scores = grown(own.b, rows * HEAD_BLOCK);
    Best* mine = all.best.data() + me.thread * all.best_rows;
    for (size_t m = 0; m < rows; m++) mine[m].clear();
    kernels().reserve(config.head, rows, own.rows);
    for (size_t m = 0; m < rows; m++)
        kernels().prepare(config.head, rows, {m, m + 1, 0, config.hidden}, states[m], config.hidden, own.rows);
    const auto score = [&](Part p, bool) {
        for (size_t n = p.begin; n < p.end; n += HEAD_BLOCK) {
            const size_t count = std::min(HEAD_BLOCK, p.end - n);
            const void* then = share_of(config.head, {n + count, config.vocab});
            own.multiply(config.head, rows, {n, n + count}, scores, HEAD_BLOCK, then);
            for (size_t m = 0; m < rows; m++) {
                float* s = scores + m * HEAD_BLOCK;
                if (config.softcap > 0) kernels().softcap(s, config.softcap, count);
                take_best(s, count, nullptr, (int64_t)n, choices[m], mine[m]);
                if (totals) take_total(s, count, mine[m]);
            }
        }
    };
    if (totals) score(me.part(config.vocab, UNIT), true);  // a total depends on what was added before
    else me.each(config.vocab, UNIT, HEAD_BLOCK, score);
}

Best Stack::combined(size_t row, const Shared& all, int threads) const {
    Best best = all.best[row];
    for (int t = 1; t < threads; t++) best.merge(all.best[t * all.best_rows + row]);
    if (best.id == std::numeric_limits<int64_t>::max()) best.id = 0;  // all NaN
    return best;
}

void Stack::forward(const int64_t* tokens, const std::vector<Segment>& segments, const Cache* caches, float* hidden) {
    Batch whole(segments, caches, false), kept(segments, caches, false, true);
    const size_t D = config.hidden, rows = kept.size();
    Pool::instance().run([&](Worker& me) {
        if (me.thread == 0) {
            shared(whole.size(), me.threads);
            if (divisible_ && rows == whole.size())
                for (Batch* batch : {&whole, &kept}) batch->divide(me.threads, config.window);
        }
        me.wait();
        Shared& all = *shared_;
        Private& own = Private::here();
        embed(tokens, whole, own, all, me);
        // of the last layer with keys and values of its own, and those after it, no rows are needed but those that are wanted
        const size_t shared_from = std::min(config.first_shared, layers.size());
        for (size_t i = 0; i < layers.size(); i++)
            layer(layers[i], i, i < shared_from ? whole : kept, i + 1 < shared_from ? whole : kept, own, all, me);
        const Part mine = kept.rows_of(me);
        if (!kept.divided() && me.thread > 0) return;  // all have the same
        for (size_t m = mine.begin; m < mine.end; m++)
            kernels().rms_norm(own.x.data() + m * D, config.norm, config.eps, D, hidden + m * D);
    }, large_);
}

void Stack::logits(const float* hidden, size_t rows, float* out) {
    Pool::instance().run([&](Worker& me) {
        head(hidden, rows, out, config.vocab, Private::here(), me);
    }, large_);
}

void Stack::choose(const std::vector<const float*>& states, const Choice* choices, int64_t* tokens) {
    Pool::instance().run([&](Worker& me) {
        if (me.thread == 0) shared(states.size(), me.threads);
        me.wait();
        best(states, choices, false, Private::here(), *shared_, me);
        me.wait();
        if (me.thread == 0)
            for (size_t m = 0; m < states.size(); m++) tokens[m] = combined(m, *shared_, me.threads).id;
    }, large_);
}

// ------------------------------------------------------------------------------------------------------------ drafter

void DraftStack::one_step(const Batch& batch, Stack::Private& own, Stack::Shared& all, float* input, float* state,
                          float* projected, Worker& me) {
    const size_t D = stack.config.hidden, rows = batch.size();
    own.shared_linear(me, pre_projection, input, 2 * backbone, rows, all.out.data(), D);
    me.wait();
    std::copy_n(all.out.data(), rows * D, grown(own.x, rows * D));
    for (size_t i = 0; i < stack.layers.size(); i++) stack.layer(stack.layers[i], i, batch, batch, own, all, me);
    for (size_t m = 0; m < rows; m++)
        kernels().rms_norm(own.x.data() + m * D, stack.config.norm, stack.config.eps, D, state + m * D);
    own.shared_linear(me, post_projection, state, D, rows, projected, backbone);
}

size_t DraftStack::candidates() const {
    return centroids.clusters ? centroids.top_k * (stack.config.vocab / centroids.clusters) : stack.config.vocab;
}

// Scores of the tokens of the best clusters, the head's rows being stored cluster by cluster. Ends with a barrier.
void DraftStack::scores(const float* state, float* logits, int64_t* ids, Stack::Private& own, Buffer<float>& clusters,
                        Worker& me) {
    const size_t C = centroids.clusters, size = stack.config.vocab / C, D = stack.config.hidden;
    const Part mine = me.part(C, UNIT), best = me.part(centroids.top_k, 1);
    own.linear(centroids.table, state, D, 1, mine, clusters.data() + mine.begin, C);
    me.wait();
    size_t* order = grown(own.chosen, C);
    std::iota(order, order + C, 0);
    std::partial_sort(order, order + centroids.top_k, order + C, [&](size_t a, size_t b) {
        return clusters[a] > clusters[b] || (clusters[a] == clusters[b] && a < b);
    });
    own.prepare(stack.config.head, state, D, 1);
    for (size_t i = best.begin; i < best.end; i++) {
        const size_t first = order[i] * size;
        own.multiply(stack.config.head, 1, {first, first + size}, logits + i * size, size);
        std::copy_n(centroids.ordering + first, size, ids + i * size);
        if (stack.config.softcap > 0) kernels().softcap(logits + i * size, stack.config.softcap, size);
    }
    me.wait();
}

void DraftStack::step(const float* input, const std::vector<Segment>& segments, const Cache* caches, float* state,
                      float* projected) {
    const Batch batch(segments, caches, true);
    const size_t rows = batch.size(), D = stack.config.hidden;
    Pool::instance().run([&](Worker& me) {
        if (me.thread == 0) stack.shared(rows, me.threads);
        me.wait();
        Stack::Private& own = Stack::Private::here();
        float* in = grown(own.gathered, rows * (2 * backbone + D));
        std::copy_n(input, rows * 2 * backbone, in);
        float* here = in + rows * 2 * backbone;
        one_step(batch, own, *stack.shared_, in, here, projected, me);
        if (me.thread == 0) std::copy_n(here, rows * D, state);
    }, stack.large_);
}

void DraftStack::score(const float* state, size_t rows, float* logits, int64_t* ids) {
    Pool::instance().run([&](Worker& me) {
        Stack::Private& own = Stack::Private::here();
        if (!centroids.clusters) return stack.head(state, rows, logits, stack.config.vocab, own, me);
        if (me.thread == 0) grown(stack.shared_->clusters, centroids.clusters);
        me.wait();
        for (size_t m = 0; m < rows; m++)
            scores(state + m * stack.config.hidden, logits + m * candidates(), ids + m * candidates(), own,
                   stack.shared_->clusters, me);
    }, stack.large_);
}

// decoding/early_stop.py is the reference
bool StopRule::goes_on(size_t made, double& reach, float confidence) const {
    constexpr double extreme = 6;
    double odds = -extreme;
    if (confidence >= 1) odds = extreme;
    else if (confidence > 0) odds = std::clamp(std::log(confidence / (1.0 - confidence)), -extreme, extreme);
    reach /= 1 + std::exp(-(bias + slope * odds));
    return made < least.size() && reach >= least[made];
}

void DraftStack::draft(const int64_t* last, const std::vector<const float*>& states, const std::vector<Segment>& segments,
                       const Cache* caches, const std::vector<size_t>& counts, const std::vector<StopRule>& stops,
                       const Choice* choices, int64_t* tokens, float* confidences, int64_t* made) {
    const size_t most = *std::max_element(counts.begin(), counts.end()), C = centroids.clusters ? candidates() : 0;
    Buffer<float> logits(C);
    std::vector<int64_t> ids(C);
    Pool::instance().run([&](Worker& me) {
        if (me.thread == 0) {
            Stack::Shared& all = stack.shared(segments.size(), me.threads);
            grown(all.projected, segments.size() * backbone);
            grown(all.clusters, centroids.clusters);
        }
        me.wait();
        Stack::Shared& all = *stack.shared_;
        Stack::Private& own = Stack::Private::here();
        struct Draft {  // of one sequence that still drafts; every thread comes to the same
            size_t sequence, row;  // its row in the step before
            int64_t token;
            double reach;
        };
        std::vector<Draft> going;
        for (size_t s = 0; s < segments.size(); s++)
            if (counts[s]) going.push_back({s, s, last[s], 1.0});
        std::vector<Segment> rows;
        std::vector<Choice> chosen_by;
        std::vector<const float*> made_states;
        for (size_t step = 0; step < most && !going.empty(); step++) {
            rows.clear(), chosen_by.clear();
            for (const Draft& d : going) {
                rows.push_back(segments[d.sequence]);
                chosen_by.push_back(choices[d.sequence * most + step]);
            }
            const Batch batch(rows, caches, true);
            float* input = grown(own.gathered, rows.size() * (2 * backbone + stack.config.hidden));
            float* state = input + rows.size() * 2 * backbone;
            bool stop = false;
            for (size_t m = 0; m < going.size(); m++) {
                Draft& d = going[m];
                float* to = input + m * 2 * backbone;
                kernels().gather(target_table, (size_t)d.token, target_scale, to);
                std::copy_n(step == 0 ? states[d.sequence] : all.projected.data() + d.row * backbone, backbone, to + backbone);
                d.row = m;
                stop |= !stops[d.sequence].least.empty();
            }
            one_step(batch, own, all, input, state, all.projected.data(), me);
            if (!C) {
                made_states.clear();
                for (size_t m = 0; m < rows.size(); m++) made_states.push_back(state + m * stack.config.hidden);
                stack.best(made_states, chosen_by.data(), stop, own, all, me);
                me.wait();
            }
            for (Draft& d : going) {
                const StopRule& rule = stops[d.sequence];
                Best best;
                if (C) {
                    scores(state + d.row * stack.config.hidden, logits.data(), ids.data(), own, all.clusters, me);
                    best.clear();
                    float* scaled = grown(own.b, C);
                    std::copy(logits.begin(), logits.end(), scaled);
                    take_best(scaled, C, ids.data(), 0, chosen_by[d.row], best);
                    if (!rule.least.empty()) take_total(scaled, C, best);
                    me.wait();  // nobody scores the next one while another still compares
                } else {
                    best = stack.combined(d.row, all, me.threads);
                }
                d.token = best.id;
                const float confidence = rule.least.empty() ? 0.0f : best.probability();
                const size_t place = d.sequence * most + step;
                if (me.thread == 0) {
                    tokens[place] = d.token;
                    confidences[place] = confidence;
                    made[d.sequence] = (int64_t)step + 1;
                }
                const bool goes_on = step + 1 < counts[d.sequence] &&
                                     (rule.least.empty() || rule.goes_on(step + 1, d.reach, confidence));
                if (!goes_on) d.sequence = segments.size();
            }
            going.erase(std::remove_if(going.begin(), going.end(),
                                       [&](const Draft& d) { return d.sequence == segments.size(); }), going.end());
        }
    }, stack.large_);
}

}  // namespace gemma
