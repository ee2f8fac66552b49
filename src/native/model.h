// A model as Python hands it in: weights, sizes and options of its layers. Python keeps the memory alive.
#pragma once

#include <cstddef>

#include "weight.h"

namespace gemma {

struct MoE {
    size_t experts = 0, top_k = 0, width = 0;
    Weight router, gate_up, down;  // the matrices of the experts lie one below the other
    const float *router_scale = nullptr, *expert_scale = nullptr;
    const float *post_dense = nullptr, *pre_sparse = nullptr, *post_sparse = nullptr;
};

// Layers come in two kinds. Each kind has its own rotary tables and its own blocks of the cache.
enum class LayerKind : int { SLIDING, FULL };
constexpr size_t LAYER_KINDS = 2;

struct Layer {
    LayerKind kind = LayerKind::FULL;
    bool key_is_value = false;  // a value is its key's projection
    bool value_norm = true;     // values are normalised
    size_t heads = 0;           // query heads
    size_t kv_heads = 0;        // key-value heads of its own; 0 where it reads a donor's
    size_t groups = 0;          // key-value heads of the cache it attends to
    size_t head_dim = 0;
    size_t cache = 0;          // which of the call's caches it attends to
    float score_scale = 1.0f;  // of a query's scores
    float scalar = 1.0f;       // of the layer's output
    Weight qkv, o, gate_up, down;
    const float *q_norm = nullptr, *k_norm = nullptr, *input_norm = nullptr, *post_attention = nullptr;
    const float *pre_feedforward = nullptr, *post_feedforward = nullptr;
    Weight ple_gate, ple_projection;
    const float* ple_norm = nullptr;
    MoE moe;

    size_t all_heads() const { return qkv.rows / head_dim; }  // queries, keys and values
    size_t heads_per_group() const { return heads / groups; }
};

struct Config {
    size_t hidden = 0, vocab = 0, window = 0, ple = 0;
    float eps = 1e-6f, embed_scale = 1.0f, ple_embed_scale = 1.0f;
    float softcap = 0.0f;      // of the logits; 0 for none
    size_t first_shared = 0;  // layers from here on have no keys and values of their own
    Weight table, head, ple_table, ple_model_projection;
    const float *norm = nullptr, *ple_model_norm = nullptr;
};

}  // namespace gemma
