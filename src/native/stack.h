// Gemma 4 decoder layers run as one piece of work for all threads (model/layers.py is the reference).
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace gemma {

struct MoE {
    size_t experts = 0, top_k = 0, width = 0;
    Weight router, gate_up, down;  // experts' matrices one below the other
    const float *router_scale = nullptr, *expert_scale = nullptr;
    const float *post_dense = nullptr, *pre_sparse = nullptr, *post_sparse = nullptr;
};

struct Layer {
    bool sliding = false, key_is_value = false;
    size_t heads = 0;     // query heads
    size_t kv_heads = 0;  // key-value heads of its own; 0 where it reads a donor's
    size_t groups = 0;    // key-value heads of the cache it attends to
    size_t head_dim = 0;
    size_t cache = 0;  // which of the call's caches it attends to
    float scalar = 1.0f;
    Weight qkv, o, gate_up, down;
    const float *q_norm = nullptr, *k_norm = nullptr, *input_norm = nullptr, *post_attention = nullptr;
    const float *pre_feedforward = nullptr, *post_feedforward = nullptr;
    Weight ple_gate, ple_projection;
    const float* ple_norm = nullptr;
    MoE moe;
};

// Keys and values of one layer, [groups, blocks, BLOCK_ROWS, d] each.
struct Cache {
    float* keys = nullptr;
    float* values = nullptr;
    size_t blocks = 0;
};

// Where a sequence's rows are: the block of every BLOCK_ROWS positions in sliding and in full layers, and cos and signed
// sin [positions, d] of both. The caller keeps the addresses valid.
struct View {
    const int32_t* table[2] = {};
    const float* cos[2] = {};
    const float* sin[2] = {};
};

// Rows of one sequence in a call, at positions `position`, `position` + 1, ...; of the hidden states only the last `keep`
// are wanted.
struct Segment {
    const View* view = nullptr;
    size_t rows = 1, keep = 1;
    int64_t position = 0;
};

// The rows of all segments, one after the other. A drafter's rows see committed rows only.
struct Batch {
    struct Row {
        const View* view;
        int64_t position;
        size_t source;  // its place among all the call's rows
    };
    std::vector<Row> rows;
    std::vector<std::pair<size_t, size_t>> blocks;  // rows of one sequence whose queries share a pass over the cache
    const Cache* caches = nullptr;
    bool drafting = false;
    std::vector<size_t> cuts;  // where it is divided among threads: each one's first block; empty if it is not

    Batch(const std::vector<Segment>& segments, const Cache* caches, bool drafting, bool kept_only = false);
    size_t size() const { return rows.size(); }

    // Whether a block's rows are of the same sequence as those of the block before.
    bool continues(size_t block) const {
        return block && rows[blocks[block].first].view == rows[blocks[block - 1].first].view;
    }
    // Of all the call's rows, of so many numbers, those of this batch to the front.
    void keep(float* x, size_t size) const;
    // Divide the sequences among so many threads where each gets enough of them, and none much more than its share. What a
    // sequence costs is counted in positions that are attended to, of the last `window` ones.
    void divide(int threads, size_t window);
    bool divided() const { return !cuts.empty(); }
    Part blocks_of(const Worker& me) const { return {cuts[me.thread], cuts[me.thread + 1]}; }
    // The rows whose residual stream a thread holds: its sequences', or all.
    Part rows_of(const Worker& me) const {
        if (!divided()) return {0, size()};
        const auto first = [&](size_t b) { return b < blocks.size() ? blocks[b].first : size(); };
        const Part mine = blocks_of(me);
        return {first(mine.begin), first(mine.end)};
    }
};

struct Config {
    size_t hidden = 0, vocab = 0, window = 0, ple = 0;
    float eps = 1e-6f, embed_scale = 1.0f, ple_embed_scale = 1.0f, softcap = 0.0f;
    size_t first_shared = 0;  // layers from here on have no keys and values of their own
    Weight table, head, ple_table, ple_model_projection;
    const float *norm = nullptr, *ple_model_norm = nullptr;
};

// How a row's token is chosen: the arg max of its logits at temperature 0, else of logits / temperature + Gumbel noise
// (decoding/noise.py). `key` is what noise.py calls the row's key.
struct Choice {
    float temperature = 0.0f;
    uint64_t key = 0;
};

// The best token of a part of a row's candidates, the lowest id among equals, and what its softmax needs.
struct Best {
    float value;  // what was compared: score, and noise
    int64_t id;
    float score;  // its logit / temperature
    float top, total;  // the highest score, and the sum of exp(score - top)

    void clear();
    void take(float other_value, int64_t other_id, float other_score);
    void merge(const Best& other);
    float probability() const;
};

class Stack {
   public:
    Config config;
    std::vector<Layer> layers;

    void prepare();  // once all layers are there

    // Target: hidden states after the final norm of the rows that are kept, [rows, hidden].
    void forward(const int64_t* tokens, const std::vector<Segment>& segments, const Cache* caches, float* hidden);
    // Soft-capped logits [rows, vocab].
    void logits(const float* hidden, size_t rows, float* out);
    // The token of each state, by its own choice; no logits are stored.
    void choose(const std::vector<const float*>& states, const Choice* choices, int64_t* tokens);

   private:
    friend class DraftStack;
    struct Shared;
    struct Private;

    void embed(const int64_t* tokens, const Batch& batch, Private& own, Shared& all, Worker& me);
    void layer(const Layer& l, size_t index, const Batch& all_rows, const Batch& batch, Private& own, Shared& all, Worker& me);
    void project(const Layer& l, const Batch& batch, Part heads, const float* in, const void* then, Private& own, Shared& all,
                 Worker& me);
    void finish_head(const Layer& l, const Batch& batch, size_t m, size_t h, Shared& all);
    void attention(const Layer& l, const Batch& batch, Shared& all, Private& own, Worker& me);
    HeadRows head_rows(const Layer& l, const Batch& batch, size_t group, size_t block) const;
    Visible visible(const Layer& l, const Batch::Row& row, const Batch& batch) const;
    void list_cached(const Layer& l, const Batch& batch, const float* HeadRows::*which, const Weight& during, size_t most,
                     Private& own, const Worker& me) const;
    void attend(const Layer& l, const Batch& batch, size_t head, size_t count, size_t block, Shared& all, Private& own);
    void gate(const Layer& l, const Batch& batch, const float* in, Private& own, Shared& all, Worker& me);
    void add_ple(const Layer& l, size_t index, const Batch& batch, const void* then, Private& own, Shared& all, Worker& me);
    const void* after(size_t index, const Batch& batch, const Worker& me) const;
    void experts(const Layer& l, size_t rows, Private& own, Shared& all, Worker& me);
    void head(const float* hidden, size_t rows, float* out, size_t ldo, Private& own, Worker& me);
    void best(const std::vector<const float*>& states, const Choice* choices, bool totals, Private& own, Shared& all,
              Worker& me);
    Best combined(size_t row, const Shared& all, int threads) const;
    Shared& shared(size_t rows, int threads);

    std::shared_ptr<Shared> shared_;
    bool large_ = true;  // large enough for more than one thread
    bool divisible_ = false;  // whether threads may divide sequences among them, see `Batch::divide`
    size_t widest_qkv_ = 0, widest_heads_ = 0, widest_mlp_ = 0;
};

struct Centroids {
    size_t clusters = 0, top_k = 0;
    Weight table;
    const int64_t* ordering = nullptr;  // token ids, cluster by cluster
};

// When drafting ends before the count that was asked for; never, and nothing is computed for it, without `least`.
struct StopRule {
    std::vector<double> least;  // the chance that all drafts so far are accepted which one more needs, by their number
    double bias = 0, slope = 1;  // log-odds of a draft's acceptance from those of its confidence

    // After `made` drafts, the last with this confidence; `reach` becomes the chance that all of them are accepted.
    bool goes_on(size_t made, double& reach, float confidence) const;
};

class DraftStack {
   public:
    Stack stack;
    Weight pre_projection, post_projection;
    Weight target_table;
    float target_scale = 1.0f;
    Centroids centroids;
    size_t backbone = 0;

    // One step of several sequences: concat(embedding, hidden) [rows, 2 * backbone] in, the states for the head and the
    // projected states out.
    void step(const float* input, const std::vector<Segment>& segments, const Cache* caches, float* state, float* projected);
    // Drafts of several sequences, each from its last token and the target's state that produced it, [backbone], and at most
    // `counts` of them; `made` says how many. `choices`, `tokens` and `confidences` are [sequences, the highest count]; a
    // draft's confidence is its probability among the drafter's candidates, and known where there is a stop rule.
    void draft(const int64_t* last, const std::vector<const float*>& states, const std::vector<Segment>& segments,
               const Cache* caches, const std::vector<size_t>& counts, const std::vector<StopRule>& stops,
               const Choice* choices, int64_t* tokens, float* confidences, int64_t* made);
    size_t candidates() const;
    // Logits of the candidates of each row, and their ids where there is a centroid head, [rows, candidates].
    void score(const float* state, size_t rows, float* logits, int64_t* ids);

   private:
    void one_step(const Batch& batch, Stack::Private& own, Stack::Shared& all, float* input, float* state, float* projected,
                  Worker& me);
    void scores(const float* state, float* logits, int64_t* ids, Stack::Private& own, Buffer<float>& clusters,
                Worker& me);
};

}  // namespace gemma
