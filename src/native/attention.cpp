// A layer's attention over the rows of a batch.
#include <algorithm>

#include "layer.h"

namespace gemma {

// Projects queries, keys and values. Rows that are not kept end here, with their keys and values.
void LayerRun::project(const Layer& l, const void* then, Share& before, Share& share) {
    const size_t D = config_.hidden, heads = l.all_heads();
    float *x = own_.x.data(), *n = own_.n.data();
    const auto finish = [this, &l](const Batch& batch) {
        return [this, &l, &batch](size_t m, size_t h) { finish_head(l, batch, m, h); };
    };
    if (&before == &share) return share.project(l, {0, heads}, n, then, finish(share.batch));
    const void* queries = share_of(l.qkv, me_.part(l.heads * l.head_dim, l.head_dim));
    before.project(l, {l.heads, heads}, n, queries, finish(before.batch));
    share.batch.keep(x, D), share.batch.keep(n, D);
    share.project(l, {0, l.heads}, n, then, finish(share.batch));
}

// Normalises and rotates head h of row m. Queries stay in place and carry the scale of their scores. Keys and values go
// to the cache.
void LayerRun::finish_head(const Layer& l, const Batch& batch, size_t m, size_t h) {
    const size_t d = l.head_dim, kind = (size_t)l.kind;
    const auto& [view, position, source] = batch.rows[m];
    float* head = all_.qkv.data() + m * l.qkv.rows + h * d;
    const float* cos = view->cos[kind] + (size_t)position * d;
    const float* sin = view->sin[kind] + (size_t)position * d;
    if (h < l.heads) {
        k_.rms_norm(head, l.q_norm, config_.eps, d, head);
        k_.rotate(head, cos, sin, d);
        if (l.score_scale != 1.0f) k_.scale(head, l.score_scale, d);
        return;
    }
    const Cache& cache = batch.caches[l.cache];
    const size_t g = (h - l.heads) % l.kv_heads;
    const HeadRows rows{cache.keys, cache.values, view->table[kind], d};
    const size_t row = g * cache.blocks * BLOCK_ROWS * d + rows.offset(position);
    if (h < l.heads + l.kv_heads) {
        float* key = cache.keys + row;
        if (l.key_is_value) finish_value(l, head, cache.values + row);
        k_.rms_norm(head, l.k_norm, config_.eps, d, key);
        k_.rotate(key, cos, sin, d);
    } else {
        finish_value(l, head, cache.values + row);
    }
}

void LayerRun::finish_value(const Layer& l, float* from, float* to) {
    if (l.value_norm) k_.rms_norm(from, nullptr, config_.eps, l.head_dim, to);
    else std::copy_n(from, l.head_dim, to);
}

// Attends with `count` heads of one group from `head` on, for a block of rows.
void LayerRun::attend(const Layer& l, const Batch& batch, size_t head, size_t count, size_t block) {
    const auto [begin, end] = batch.blocks[block];
    const size_t d = l.head_dim, queries = count * (end - begin);
    float* q = grown(own_.q, 2 * queries * d);
    float* out = q + queries * d;
    own_.visible.resize(queries);
    for (size_t h = 0, i = 0; h < count; h++)
        for (size_t m = begin; m < end; m++, i++) {
            std::copy_n(all_.qkv.data() + m * l.qkv.rows + (head + h) * d, d, q + i * d);
            own_.visible[i] = batch.visible(l, batch.rows[m]);
        }
    const HeadRows rows = batch.head_rows(l, head / l.heads_per_group(), block);
    k_.attend(q, d, queries, own_.visible.data(), rows, out, d);
    for (size_t h = 0, i = 0; h < count; h++)
        for (size_t m = begin; m < end; m++, i++)
            std::copy_n(out + i * d, d, all_.attended.data() + m * l.heads * d + (head + h) * d);
}

}  // namespace gemma
