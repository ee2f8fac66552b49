#include "drafter.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "head.h"
#include "layer.h"

namespace gemma {

// decoding/early_stop.py is the reference
bool StopRule::goes_on(size_t made, double& reach, float confidence) const {
    constexpr double extreme = 6;
    double odds = -extreme;
    if (confidence >= 1) odds = extreme;
    else if (confidence > 0) odds = std::clamp(std::log(confidence / (1.0 - confidence)), -extreme, extreme);
    reach /= 1 + std::exp(-(bias + slope * odds));
    return made < least.size() && reach >= least[made];
}

DraftStack::DraftStack(const Config& config, const std::vector<Layer>& layers, const DraftConfig& draft)
    : config(draft), stack_(config, layers) {}

size_t DraftStack::candidates() const {
    const Centroids& c = config.centroids;
    return c.clusters ? c.top_k * (stack_.config.vocab / c.clusters) : stack_.config.vocab;
}

void DraftStack::one_step(const Batch& batch, float* input, float* state, float* projected,
                          const Context& context) const {
    auto& [me, own, all] = context;
    const size_t D = stack_.config.hidden, rows = batch.size();
    own.prepare(config.pre_projection, input, 2 * config.backbone, rows);
    share_linear(me, config.pre_projection, own.rows, rows, all.out.data(), D);
    me.wait();
    std::copy_n(all.out.data(), rows * D, grown(own.x, rows * D));
    const std::unique_ptr<Share> share = Share::by_columns(batch, stack_.config, context);
    LayerRun layer_run(stack_.config, stack_.layers, context);
    for (size_t i = 0; i < stack_.layers.size(); i++) layer_run.layer(i, *share, *share);
    for (size_t m = 0; m < rows; m++)
        kernels().rms_norm(own.x.data() + m * D, stack_.config.norm, stack_.config.eps, D, state + m * D);
    own.prepare(config.post_projection, state, D, rows);
    share_linear(me, config.post_projection, own.rows, rows, projected, config.backbone);
}

// Scores the tokens of the best clusters. The head's rows are stored cluster by cluster. Ends with a barrier.
void DraftStack::score_clusters(const float* state, float* logits, int64_t* ids, const Context& context) const {
    auto& [me, own, all] = context;
    const Centroids& c = config.centroids;
    const size_t C = c.clusters, size = stack_.config.vocab / C, D = stack_.config.hidden;
    const Part mine = me.part(C, UNIT), best = me.part(c.top_k, 1);
    const float* clusters = all.clusters.data();
    own.linear(c.table, state, D, 1, mine, all.clusters.data() + mine.begin, C);
    me.wait();
    size_t* order = grown(own.chosen, C);
    std::iota(order, order + C, 0);
    std::partial_sort(order, order + c.top_k, order + C, [&](size_t a, size_t b) {
        return clusters[a] > clusters[b] || (clusters[a] == clusters[b] && a < b);
    });
    const Head head(stack_.config, context);
    own.prepare(stack_.config.head, state, D, 1);
    for (size_t i = best.begin; i < best.end; i++) {
        const size_t first = order[i] * size;
        own.multiply(stack_.config.head, 1, {first, first + size}, logits + i * size, size);
        std::copy_n(c.ordering + first, size, ids + i * size);
        head.cap(logits + i * size, size);
    }
    me.wait();
}

void DraftStack::step(const float* input, const std::vector<Segment>& segments, const Cache* caches, float* state,
                      float* projected) {
    const Batch batch(segments, caches, stack_.config.window, Sees::COMMITTED);
    const size_t rows = batch.size(), D = stack_.config.hidden, backbone = config.backbone;
    const auto prepare = [&](Shared& all, int threads) { all.reserve(stack_.config, stack_.layers, rows, threads); };
    stack_.run(prepare, [&](const Context& context) {
        float* in = grown(context.own.gathered, rows * (2 * backbone + D));
        std::copy_n(input, rows * 2 * backbone, in);
        float* here = in + rows * 2 * backbone;
        one_step(batch, in, here, projected, context);
        if (context.me.thread == 0) std::copy_n(here, rows * D, state);
    });
}

void DraftStack::score(const float* state, size_t rows, float* logits, int64_t* ids) {
    const size_t D = stack_.config.hidden;
    if (!config.centroids.clusters) return stack_.logits(state, rows, logits);
    const auto prepare = [&](Shared& all, int) { grown(all.clusters, config.centroids.clusters); };
    stack_.run(prepare, [&](const Context& context) {
        for (size_t m = 0; m < rows; m++)
            score_clusters(state + m * D, logits + m * candidates(), ids + m * candidates(), context);
    });
}

// One thread's way through a call of `DraftStack::draft`. Every thread comes to the same drafts.
class DraftRun {
   public:
    DraftRun(const DraftStack& drafter, const DraftRequest& request, const Drafts& drafts, Buffer<float>& logits,
             std::vector<int64_t>& ids, const Context& context)
        : drafter_(drafter), asked_(request), out_(drafts), logits_(logits), ids_(ids), context_(context),
          head_(drafter.stack_.config, context), D_(drafter.stack_.config.hidden), backbone_(drafter.config.backbone),
          most_(*std::max_element(request.counts.begin(), request.counts.end())) {
        for (size_t s = 0; s < asked_.segments.size(); s++)
            if (asked_.counts[s]) going_.push_back({s, s, asked_.last[s], 1.0});
    }
    void run() {
        for (size_t step = 0; step < most_ && !going_.empty(); step++) {
            begin(step);
            draft_states(step);
            for (Draft& d : going_) finish(d, step);
            std::erase_if(going_, [](const Draft& d) { return d.done; });
        }
    }

   private:
    struct Draft {  // of a sequence that still drafts
        size_t sequence, row;  // its row in the step before
        int64_t token;
        double reach;
        bool done = false;
    };
    const StopRule& rule(const Draft& d) const { return asked_.stops[d.sequence]; }
    bool clustered() const { return drafter_.config.centroids.clusters; }

    // Lists one row and its choice for each sequence that still drafts.
    void begin(size_t step) {
        rows_.clear(), choices_.clear();
        for (const Draft& d : going_) {
            rows_.push_back(asked_.segments[d.sequence]);
            choices_.push_back(asked_.choices[d.sequence * most_ + step]);
        }
    }
    // Computes the states for the head, and finds the best tokens where all tokens are candidates.
    void draft_states(size_t step) {
        const Batch batch(rows_, asked_.caches, drafter_.stack_.config.window, Sees::COMMITTED);
        float* projected = context_.all.projected.data();
        float* input = grown(context_.own.gathered, rows_.size() * (2 * backbone_ + D_));
        state_ = input + rows_.size() * 2 * backbone_;
        bool totals = false;
        for (size_t m = 0; m < going_.size(); m++) {
            Draft& d = going_[m];
            float* to = input + m * 2 * backbone_;
            const float* hidden = step == 0 ? asked_.states[d.sequence] : projected + d.row * backbone_;
            kernels().gather(drafter_.config.target_table, (size_t)d.token, drafter_.config.target_scale, to);
            std::copy_n(hidden, backbone_, to + backbone_);
            d.row = m;
            totals |= !rule(d).least.empty();
        }
        drafter_.one_step(batch, input, state_, projected, context_);
        if (clustered()) return;
        states_.clear();
        for (size_t m = 0; m < rows_.size(); m++) states_.push_back(state_ + m * D_);
        head_.best(states_, choices_.data(), totals);
        context_.me.wait();
    }
    // Returns the best token of the sequence's best clusters.
    Best best_of_clusters(const Draft& d) {
        drafter_.score_clusters(state_ + d.row * D_, logits_.data(), ids_.data(), context_);
        float* scaled = grown(context_.own.b, logits_.size());
        std::copy(logits_.begin(), logits_.end(), scaled);
        Best best;
        best.clear();
        best.take_best(scaled, logits_.size(), ids_.data(), 0, choices_[d.row]);
        if (!rule(d).least.empty()) best.take_total(scaled, logits_.size());
        context_.me.wait();  // nobody scores the next sequence while another thread still compares
        return best;
    }
    // Writes the sequence's draft of this step, and decides whether it goes on.
    void finish(Draft& d, size_t step) {
        const Best best = clustered() ? best_of_clusters(d) : head_.combined(d.row);
        const bool stops = !rule(d).least.empty();
        const float confidence = stops ? best.probability() : 0.0f;
        d.token = best.id;
        if (context_.me.thread == 0) {
            out_.tokens[d.sequence * most_ + step] = d.token;
            out_.confidences[d.sequence * most_ + step] = confidence;
            out_.made[d.sequence] = (int64_t)step + 1;
        }
        d.done = step + 1 == asked_.counts[d.sequence] || (stops && !rule(d).goes_on(step + 1, d.reach, confidence));
    }

    const DraftStack& drafter_;
    const DraftRequest& asked_;
    const Drafts& out_;
    Buffer<float>& logits_;  // of one sequence's candidates; all threads write them
    std::vector<int64_t>& ids_;
    const Context& context_;
    Head head_;
    const size_t D_, backbone_, most_;
    float* state_ = nullptr;  // [rows, hidden] of this step
    std::vector<Draft> going_;
    std::vector<Segment> rows_;
    std::vector<Choice> choices_;
    std::vector<const float*> states_;
};

void DraftStack::draft(const DraftRequest& request, const Drafts& drafts) {
    const size_t C = config.centroids.clusters ? candidates() : 0, rows = request.segments.size();
    Buffer<float> logits(C);
    std::vector<int64_t> ids(C);
    const auto prepare = [&](Shared& all, int threads) {
        all.reserve(stack_.config, stack_.layers, rows, threads);
        grown(all.projected, rows * config.backbone);
        grown(all.clusters, config.centroids.clusters);
    };
    stack_.run(prepare, [&](const Context& context) { DraftRun(*this, request, drafts, logits, ids, context).run(); });
}

}  // namespace gemma
