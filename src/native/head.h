// The head: logits of states, or the best token of each without storing them.
#pragma once

#include <vector>

#include "scratch.h"

namespace gemma {

class Head {
   public:
    Head(const Config& config, const Context& context)
        : config_(config), k_(kernels()), me_(context.me), own_(context.own), all_(context.all) {}

    // Soft-caps `count` logits where the model does.
    void cap(float* logits, size_t count) const {
        if (config_.softcap > 0) k_.softcap(logits, config_.softcap, count);
    }
    // Writes soft-capped logits [rows, vocab]. Threads share them out.
    void logits(const float* states, size_t rows, float* out);
    // Finds this thread's best token of each state, by the state's own choice. With `totals`, also what its softmax is
    // divided by.
    void best(const std::vector<const float*>& states, const Choice* choices, bool totals);
    // Returns the best of all threads for a row. Threads must have met.
    Best combined(size_t row) const;

   private:
    const Config& config_;
    const Kernels& k_;
    Worker& me_;
    Scratch& own_;
    Shared& all_;
};

}  // namespace gemma
