#include "share.h"

#include <algorithm>

namespace gemma {
namespace {

constexpr size_t REPEATED_BYTES = 32 << 10;  // every thread multiplies a smaller matrix, which spares a barrier
constexpr size_t LEAST_SHARED = 4;           // blocks a thread from which on attention is shared out by blocks

class ByColumns : public Share {
   public:
    ByColumns(const Batch& batch, const Config& config, const Context& context)
        : Share(batch, {0, batch.size()}, config, context) {}

    Part columns(size_t count, size_t unit) const override { return me_.part(count, unit); }

    const void* first_read(const Weight& w, size_t unit) const override { return share_of(w, me_.part(w.rows, unit)); }

    bool repeats(const Weight& w) const override { return w.bytes() <= REPEATED_BYTES; }

    // All threads hold the same states.
    Part handed_out() const override { return me_.thread == 0 ? rows : Part{0, 0}; }

    void meet(const float* written, size_t n) override {
        me_.wait();
        fetch(written, n);
    }

    void product(const Weight& w, const float* in, float* out, const void* then) override {
        own_.prepare(w, in, w.cols, count());
        share_linear(me_, w, own_.rows, count(), out, w.rows, then);
        meet(out, count() * w.rows);
    }

    // Shares of whole heads need no barrier before their norms.
    void project(const Layer& l, Part heads, const float* in, const void* then, const FinishHead& finish) override {
        const size_t d = l.head_dim, head_count = heads.end - heads.begin;
        const Part columns{heads.begin * d, heads.end * d};
        float* out = all_.qkv.data();
        if (heads.begin == 0) list_cached(l, &HeadRows::keys, l.qkv, KEY_BYTES);
        const Next next(then, &own_.later);
        own_.prepare(l.qkv, in, hidden_, count());
        if (by_heads(head_count, me_.threads)) {
            share_linear(me_, l.qkv, own_.rows, count(), columns, d, out, l.qkv.rows, next, [&](Part p) {
                for (size_t m = 0; m < count(); m++)
                    for (size_t h = p.begin / d; h < p.end / d; h++) finish(m, h);
            });
            return;
        }
        share_linear(me_, l.qkv, own_.rows, count(), columns, UNIT, out, l.qkv.rows, next, [](Part) {});
        me_.wait();
        const Part tasks = me_.part(count() * head_count, 1);
        for (size_t t = tasks.begin; t < tasks.end; t++) finish(t / head_count, heads.begin + t % head_count);
    }

    // Few blocks are shared out by heads, which is even. Many are shared out by blocks, so that one thread reads a
    // sequence's rows once.
    void attention(const Layer& l, const Attend& attend) override {
        const size_t per_group = l.heads_per_group(), blocks = batch.blocks.size(), few = LEAST_SHARED * me_.threads;
        if (by_heads(l.heads, me_.threads) && blocks < few) {
            const Part heads = me_.part(l.heads, 1);
            for (size_t h = heads.begin; h < heads.end;) {
                const size_t count = std::min(per_group - h % per_group, heads.end - h);
                for (size_t b = 0; b < blocks; b++) attend(h, count, b);
                h += count;
            }
            return;
        }
        const size_t unit = l.groups * blocks < few ? 1 : per_group;
        me_.each(l.groups * blocks * per_group, unit, unit, [&](Part tasks, bool) {
            for (size_t t = tasks.begin; t < tasks.end;) {
                const size_t group = t / (blocks * per_group), block = t / per_group % blocks, h = t % per_group;
                const size_t count = std::min(per_group - h, tasks.end - t);
                attend(group * per_group + h, count, block);
                t += count;
            }
        });
    }

    const Activations& mlp_rows(const Layer& l, const float* in) override {
        own_.prepare(l.gate_up, in, hidden_, count());
        return own_.rows;
    }

    size_t mlp_unit() const override { return UNIT; }

    void keep_gated(const Layer& l, Part columns, float* gate, const float* up) override {
        const size_t width = columns.end - columns.begin;
        for (size_t m = 0; m < count(); m++)
            kernels().gated(gate + m * width, up + m * width, width, all_.act.data() + m * l.down.cols + columns.begin);
    }

    void mlp_down(const Layer& l, float* out, const void* then) override {
        fetch(all_.act.data(), count() * l.down.cols);
        own_.prepare(l.down, all_.act.data(), l.down.cols, count());
        share_linear(me_, l.down, own_.rows, count(), out, hidden_, then);
    }

   protected:
    void each_cached(const Layer& l, const Note& note) const override {
        const size_t blocks = batch.blocks.size();
        const Part mine = me_.part(l.groups * blocks, 1);
        for (size_t t = mine.begin; t < mine.end; t++) note(t / blocks, t % blocks);
    }
};

class BySequences : public Share {
   public:
    BySequences(const Batch& batch, const Config& config, const Context& context)
        : Share(batch, batch.rows_of(context.me), config, context) {}

    Part columns(size_t count, size_t) const override { return {0, count}; }

    const void* first_read(const Weight& w, size_t) const override { return w.data; }

    bool repeats(const Weight&) const override { return true; }

    Part handed_out() const override { return rows; }

    void meet(const float*, size_t) override {}

    void product(const Weight& w, const float* in, float* out, const void* then) override {
        own_.linear(w, in, w.cols, count(), {0, w.rows}, out, w.rows, then);
    }

    void project(const Layer& l, Part heads, const float* in, const void* then, const FinishHead& finish) override {
        const Part columns{heads.begin * l.head_dim, heads.end * l.head_dim};
        float* out = all_.qkv.data() + rows.begin * l.qkv.rows + columns.begin;
        own_.linear(l.qkv, in + rows.begin * hidden_, hidden_, count(), columns, out, l.qkv.rows, then);
        for (size_t m = rows.begin; m < rows.end; m++)
            for (size_t h = heads.begin; h < heads.end; h++) finish(m, h);
    }

    void attention(const Layer& l, const Attend& attend) override {
        const Part blocks = batch.blocks_of(me_);
        for (size_t b = blocks.begin; b < blocks.end; b++)
            for (size_t g = 0; g < l.groups; g++) attend(g * l.heads_per_group(), l.heads_per_group(), b);
    }

    const Activations& mlp_rows(const Layer& l, const float* in) override {
        kernels().prepare(l.gate_up, batch.size(), {rows.begin, rows.end, 0, hidden_}, in + rows.begin * hidden_,
                          hidden_, all_.mlp_rows);
        me_.wait();
        return all_.mlp_rows;
    }

    size_t mlp_unit() const override { return AREA_COLS; }

    void keep_gated(const Layer& l, Part columns, float* gate, const float* up) override {
        const size_t width = columns.end - columns.begin;
        for (size_t m = 0; m < batch.size(); m++)
            kernels().gated(gate + m * width, up + m * width, width, gate + m * width);
        kernels().prepare(l.down, batch.size(), {0, batch.size(), columns.begin, columns.end}, gate, width,
                          all_.mlp_act);
    }

    void mlp_down(const Layer& l, float* out, const void* then) override {
        share_linear(me_, l.down, all_.mlp_act, batch.size(), out, hidden_, then);
    }

   protected:
    void each_cached(const Layer& l, const Note& note) const override {
        const Part blocks = batch.blocks_of(me_);
        for (size_t b = blocks.begin; b < blocks.end; b++)
            for (size_t g = 0; g < l.groups; g++) note(g, b);
    }
};

}  // namespace

std::unique_ptr<Share> Share::of(const Batch& batch, const Config& config, const Context& context) {
    if (batch.divided()) return std::make_unique<BySequences>(batch, config, context);
    return by_columns(batch, config, context);
}

std::unique_ptr<Share> Share::by_columns(const Batch& batch, const Config& config, const Context& context) {
    return std::make_unique<ByColumns>(batch, config, context);
}

// Few blocks' keys and values are not listed: they would wait for one another with the weights.
void Share::list_cached(const Layer& l, const float* HeadRows::* which, const Weight& during, size_t most_bytes) {
    const size_t row_lines = l.head_dim * sizeof(float) / LINE;
    own_.later.clear();
    if (during.type != WeightType::PANELS || batch.blocks.size() < LEAST_SHARED * me_.threads) return;
    size_t left = most_bytes / LINE;
    each_cached(l, [&](size_t group, size_t block) {
        const Batch::Row& row = batch.rows[batch.blocks[block].begin];
        if (batch.continues(block)) return;  // listed with the block before
        const HeadRows rows = batch.head_rows(l, group, block);
        for (int64_t at = batch.visible(l, row).first; at < row.position && left;) {
            const int64_t stop = std::min((at / BLOCK_ROWS + 1) * BLOCK_ROWS, row.position);
            const size_t lines = std::min((size_t)(stop - at) * row_lines, left);
            own_.later.add(rows.*which + rows.offset(at), lines);
            left -= lines;
            at = stop;
        }
    });
}

}  // namespace gemma
