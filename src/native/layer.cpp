#include "layer.h"

#include <algorithm>
#include <cmath>

namespace gemma {

void LayerRun::embed(const int64_t* tokens, Share& share) {
    const size_t D = config_.hidden, P = config_.ple, L = layers_.size();
    const Part rows = share.rows;
    float* x = grown(own_.x, share.batch.size() * D);
    for (size_t m = rows.begin; m < rows.end; m++)
        k_.gather(config_.table, (size_t)tokens[m], config_.embed_scale, x + m * D);
    if (!P) return;
    // shares are of whole layers' columns, so that no barrier is needed before the norms
    const Part here = share.columns(L, 1), columns{here.begin * P, here.end * P};
    own_.linear(config_.ple_model_projection, x + rows.begin * D, D, share.count(), columns,
                all_.ple.data() + rows.begin * L * P + columns.begin, L * P);
    float* own_row = grown(own_.a, P);
    for (size_t m = rows.begin; m < rows.end; m++) {
        float* table_row = grown(own_.b, L * P);
        k_.gather(config_.ple_table, (size_t)tokens[m], config_.ple_embed_scale, table_row);
        for (size_t l = here.begin; l < here.end; l++) {
            float* p = all_.ple.data() + (m * L + l) * P;
            k_.scale(p, 1.0f / std::sqrt((float)D), P);
            k_.rms_norm(p, config_.ple_model_norm, config_.eps, P, own_row);
            k_.axpy(own_row, 1.0f, table_row + l * P, P);
            std::copy(own_row, own_row + P, p);
            k_.scale(p, 0.70710678118654752f, P);
        }
    }
    share.meet();
}

void LayerRun::layer(size_t index, Share& before, Share& share) {
    const Layer& l = layers_[index];
    const size_t D = config_.hidden;
    const float eps = config_.eps;
    const Part rows = share.rows;
    const void* next_layer = after(index, share);
    float *x = own_.x.data(), *n = grown(own_.n, before.batch.size() * D), *out = all_.out.data();

    for (size_t m = before.rows.begin; m < before.rows.end; m++)
        k_.rms_norm(x + m * D, l.input_norm, eps, D, n + m * D);
    project(l, share.first_read(l.o, UNIT), before, share);
    share.meet();
    share.attention(
        l, [this, &l, &share](size_t head, size_t count, size_t block) { attend(l, share.batch, head, count, block); });
    const float* attended = all_.attended.data() + rows.begin * l.o.cols;
    share.meet(attended, share.count() * l.o.cols);
    share.product(l.o, attended, out + rows.begin * D, share_of(l.gate_up, me_.part(l.down.cols, AREA_COLS)));

    for (size_t m = rows.begin; m < rows.end; m++) {
        k_.add_rms_norm(x + m * D, out + m * D, l.post_attention, eps, D);
        k_.rms_norm(x + m * D, l.pre_feedforward, eps, D, n + m * D);
    }
    mlp(index, config_.ple ? nullptr : next_layer, share);
    const float* summed = out;
    if (l.moe.experts) {
        experts(l, share.batch.size());
        summed = own_.n.data();
    }
    fetch(summed + rows.begin * D, share.count() * D);
    for (size_t m = rows.begin; m < rows.end; m++)
        k_.add_rms_norm(x + m * D, summed + m * D, l.post_feedforward, eps, D);
    if (config_.ple) add_ple(index, next_layer, share);
    if (l.scalar != 1.0f) k_.scale(x + rows.begin * D, l.scalar, share.count() * D);
}

// Leaves the product with `down` in `all.out`, for all rows. Threads have met afterwards.
void LayerRun::mlp(size_t index, const void* then, Share& share) {
    const Layer& l = layers_[index];
    const size_t I = l.down.cols, rows = share.batch.size(), unit = share.mlp_unit();
    const void* down = share_of(l.down, me_.part(config_.hidden, UNIT));
    if (index + 1 < layers_.size()) share.list_cached(layers_[index + 1], &HeadRows::values, l.gate_up, VALUE_BYTES);
    else own_.later.clear();
    const Activations& ready = share.mlp_rows(l, own_.n.data());
    me_.each(I, unit, chunk_columns(l.gate_up, 2 * rows, unit), [&](Part p, bool last) {
        const size_t width = p.end - p.begin;
        const Part up_part{I + p.begin, I + p.end};
        float* gate = grown(own_.a, 2 * rows * width);
        float* up = gate + rows * width;
        const void* next = last ? down : share_of(l.gate_up, {p.end, I});
        k_.linear(l.gate_up, ready, rows, p.begin, p.end, gate, width, {share_of(l.gate_up, up_part), &own_.later});
        k_.linear(l.gate_up, ready, rows, up_part.begin, up_part.end, up, width, {next, &own_.later});
        share.keep_gated(l, p, gate, up);
    });
    me_.wait();
    share.mlp_down(l, all_.out.data(), then);
    me_.wait();
}

// Adds the branch of the per-layer embedding to the residual stream. This thread reads `then` after it.
void LayerRun::add_ple(size_t index, const void* then, Share& share) {
    const Layer& l = layers_[index];
    const size_t P = config_.ple, D = config_.hidden, rows = share.count(), first = share.rows.begin;
    const bool repeated = share.repeats(l.ple_gate);
    const Part gates = repeated ? Part{0, P} : me_.part(P, UNIT);
    float *x = own_.x.data() + first * D, *gated = repeated ? grown(own_.a, rows * P) : all_.ple_gate.data();
    own_.linear(l.ple_gate, x, D, rows, gates, gated + gates.begin, P, share.first_read(l.ple_projection, UNIT));
    for (size_t m = 0; m < rows; m++) {
        const size_t source = share.batch.rows[first + m].source;
        const float* ple = all_.ple.data() + (source * layers_.size() + index) * P;
        float* row = gated + m * P + gates.begin;
        k_.gated(row, ple + gates.begin, gates.end - gates.begin, row);
    }
    if (!repeated) share.meet();
    // not to `all.out`: another thread may still read what the feed-forward network left there
    float* out = all_.ple_out.data() + first * D;
    share.product(l.ple_projection, gated, out, then);
    for (size_t m = 0; m < rows; m++) k_.add_rms_norm(x + m * D, out + m * D, l.ple_norm, config_.eps, D);
}

// Returns what this thread reads first in the layer after `index`, or in the head.
const void* LayerRun::after(size_t index, const Share& share) const {
    if (index + 1 >= layers_.size()) return share_of(config_.head, me_.part(config_.vocab, UNIT));
    const Layer& l = layers_[index + 1];
    return share.first_read(l.qkv, by_heads(l.all_heads(), me_.threads) ? l.head_dim : UNIT);
}

}  // namespace gemma
