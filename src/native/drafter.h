// The drafter: a stack that drafts several tokens of many sequences in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "stack.h"

namespace gemma {

// A head that scores clusters of tokens first, and then the tokens of the best clusters.
struct Centroids {
    size_t clusters = 0, top_k = 0;  // 0 clusters: there is no such head
    Weight table;
    const int64_t* ordering = nullptr;  // token ids, cluster by cluster
};

// When drafting ends before the count that was asked for. Without `least`, it does not, and nothing is computed for it.
struct StopRule {
    std::vector<double> least;  // the reach that one more draft needs, by the number of drafts so far
    double bias = 0, slope = 1;  // log-odds of a draft's acceptance from those of its confidence

    // Returns whether drafting goes on after `made` drafts, the last with this confidence. `reach` becomes the chance
    // that all of them are accepted.
    bool goes_on(size_t made, double& reach, float confidence) const;
};

// What is asked for: drafts of several sequences, each from its last token and the target's state that produced it,
// [backbone]. Sequence s gets at most counts[s] drafts. `choices` is [sequences, highest count].
struct DraftRequest {
    const int64_t* last;
    const std::vector<const float*>& states;
    const std::vector<Segment>& segments;
    const Cache* caches;
    const std::vector<size_t>& counts;
    const std::vector<StopRule>& stops;
    const Choice* choices;
};

// What comes of it: [sequences, highest count] each, and how many drafts each sequence got. A draft's confidence is its
// probability among the drafter's candidates; it is known where there is a stop rule.
struct Drafts {
    int64_t* tokens;
    float* confidences;
    int64_t* made;
};

struct DraftConfig {
    Weight pre_projection, post_projection;
    Weight target_table;
    float target_scale = 1.0f;
    size_t backbone = 0;  // the target's hidden size
    Centroids centroids;
};

class DraftStack {
   public:
    DraftStack(const Config& config, const std::vector<Layer>& layers, const DraftConfig& draft);
    const DraftConfig config;

    // Runs one step of several sequences from concat(embedding, hidden) [rows, 2 * backbone]. Writes the states for the
    // head and the projected states.
    void step(const float* input, const std::vector<Segment>& segments, const Cache* caches, float* state,
              float* projected);
    // Returns the candidates of a row.
    size_t candidates() const;
    // Writes the logits of each row's candidates [rows, candidates], and their ids where there is a centroid head.
    void score(const float* state, size_t rows, float* logits, int64_t* ids);
    void draft(const DraftRequest& request, const Drafts& drafts);

   private:
    friend class DraftRun;
    void one_step(const Batch& batch, float* input, float* state, float* projected, const Context& context) const;
    void score_clusters(const float* state, float* logits, int64_t* ids, const Context& context) const;

    Stack stack_;
};

}  // namespace gemma
