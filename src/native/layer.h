// One thread's way through the layers of a stack (model/layers.py is the reference).
#pragma once

#include <vector>

#include "scratch.h"
#include "share.h"

namespace gemma {

class LayerRun {
   public:
    LayerRun(const Config& config, const std::vector<Layer>& layers, const Context& context)
        : config_(config), layers_(layers), k_(kernels()), me_(context.me), own_(context.own), all_(context.all) {}

    // Fills the residual stream with the tokens' embeddings, and the per-layer embeddings.
    void embed(const int64_t* tokens, Share& share);
    // Runs layer `index`: keys and values of the rows of `before`, and the layer's output of the rows of `share`. Where
    // all rows are kept, both are the same.
    void layer(size_t index, Share& before, Share& share);

   private:
    void project(const Layer& l, const void* then, Share& before, Share& share);
    void finish_head(const Layer& l, const Batch& batch, size_t m, size_t h);
    void finish_value(const Layer& l, float* from, float* to);
    void attend(const Layer& l, const Batch& batch, size_t head, size_t count, size_t block);
    void mlp(size_t index, const void* then, Share& share);
    void experts(const Layer& l, size_t rows);
    void choose_experts(const MoE& moe, size_t rows, float* in);
    void add_ple(size_t index, const void* then, Share& share);
    const void* after(size_t index, const Share& share) const;

    const Config& config_;
    const std::vector<Layer>& layers_;
    const Kernels& k_;
    Worker& me_;
    Scratch& own_;
    Shared& all_;
};

}  // namespace gemma
