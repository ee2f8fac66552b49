// The experts of a layer, beside its dense feed-forward network.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "layer.h"

namespace gemma {
namespace {

// Returns the slots of an expert: places in `chosen` [rows, top_k] that name it.
std::vector<size_t> slots_of(const std::vector<size_t>& chosen, size_t count, size_t expert) {
    std::vector<size_t> slots;
    for (size_t i = 0; i < count; i++)
        if (chosen[i] == expert) slots.push_back(i);
    return slots;
}

}  // namespace

// Chooses top_k experts for each row: `own.chosen` and `own.weights` [rows, top_k]. Leaves the experts' input in `in`
// [rows, hidden], which has room for as many scores.
void LayerRun::choose_experts(const MoE& moe, size_t rows, float* in) {
    const size_t D = config_.hidden, E = moe.experts, T = moe.top_k;
    float* scores = grown(own_.b, E * rows);
    for (size_t m = 0; m < rows; m++) {
        float* r = in + m * D;
        k_.rms_norm(own_.x.data() + m * D, moe.router_scale, config_.eps, D, r);
        k_.scale(r, 1.0f / std::sqrt((float)D), D);
    }
    own_.linear(moe.router, in, D, rows, {0, E}, scores, E);
    float* weights = grown(own_.weights, rows * T);
    size_t* chosen = grown(own_.chosen, rows * T);
    std::vector<size_t> order(E);
    for (size_t m = 0; m < rows; m++) {
        float* s = scores + m * E;
        k_.softmax(s, E);
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
    for (size_t m = 0; m < rows; m++) k_.rms_norm(own_.x.data() + m * D, moe.pre_sparse, config_.eps, D, in + m * D);
}

// Leaves the sum of the dense and the sparse branch in `own.n`. `all.out` holds the dense one.
void LayerRun::experts(const Layer& l, size_t rows) {
    const MoE& moe = l.moe;
    const size_t D = config_.hidden, E = moe.experts, T = moe.top_k, I = moe.width;
    float* in = grown(own_.a, std::max(D, E) * rows);
    choose_experts(moe, rows, in);
    const Part wide = me_.part(I, UNIT), narrow = me_.part(D, UNIT);
    for (size_t e = 0; e < E; e++) {
        const auto slots = slots_of(own_.chosen, rows * T, e);
        const size_t n = wide.end - wide.begin, base = e * 2 * I;
        if (slots.empty() || !n) continue;
        float* x = grown(own_.gathered, slots.size() * std::max(D, I));
        for (size_t i = 0; i < slots.size(); i++) std::copy_n(in + slots[i] / T * D, D, x + i * D);
        float* gate = grown(own_.c, 2 * slots.size() * n);
        float* up = gate + slots.size() * n;
        own_.prepare(moe.gate_up, x, D, slots.size());
        own_.multiply(moe.gate_up, slots.size(), {base + wide.begin, base + wide.end}, gate, n);
        own_.multiply(moe.gate_up, slots.size(), {base + I + wide.begin, base + I + wide.end}, up, n);
        for (size_t i = 0; i < slots.size(); i++)
            k_.gated(gate + i * n, up + i * n, n, all_.expert_act.data() + slots[i] * I + wide.begin);
    }
    me_.wait();
    for (size_t e = 0; e < E; e++) {
        const auto slots = slots_of(own_.chosen, rows * T, e);
        const size_t n = narrow.end - narrow.begin, base = e * D;
        if (slots.empty() || !n) continue;
        float* x = grown(own_.gathered, slots.size() * std::max(D, I));
        float* y = grown(own_.c, slots.size() * n);
        for (size_t i = 0; i < slots.size(); i++) std::copy_n(all_.expert_act.data() + slots[i] * I, I, x + i * I);
        own_.linear(moe.down, x, I, slots.size(), {base + narrow.begin, base + narrow.end}, y, n);
        for (size_t i = 0; i < slots.size(); i++)
            std::copy_n(y + i * n, n, all_.expert_out.data() + slots[i] * D + narrow.begin);
    }
    me_.wait();
    // each branch has a norm of its own; their sum then takes the layer's norm
    float* dense = grown(own_.n, rows * D);
    float* sparse = grown(own_.a, std::max(D, E) * rows);
    for (size_t m = 0; m < rows; m++) {
        k_.rms_norm(all_.out.data() + m * D, moe.post_dense, config_.eps, D, dense + m * D);
        std::fill_n(sparse, D, 0.0f);
        for (size_t j = 0; j < T; j++)
            k_.axpy(sparse, own_.weights[m * T + j], all_.expert_out.data() + (m * T + j) * D, D);
        k_.rms_norm(sparse, moe.post_sparse, config_.eps, D, sparse);
        k_.axpy(dense + m * D, 1.0f, sparse, D);
    }
}

}  // namespace gemma
