// A stack of decoder layers with its embedding and its head. Each call is one piece of work for all threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "batch.h"
#include "function_ref.h"
#include "scratch.h"

namespace gemma {

class Stack {
   public:
    Stack(const Config& config, const std::vector<Layer>& layers);
    const Config config;
    const std::vector<Layer> layers;

    // Target: writes hidden states after the final norm [rows, hidden], of the rows that are kept.
    void forward(const int64_t* tokens, const std::vector<Segment>& segments, const Cache* caches, float* hidden);
    // Writes soft-capped logits [rows, vocab].
    void logits(const float* hidden, size_t rows, float* out);
    // Writes the token of each state, by the state's own choice. No logits are stored.
    void choose(const std::vector<const float*>& states, const Choice* choices, int64_t* tokens);

    // Runs a piece of work on every thread, or on the caller alone where the model is small. First, `prepare` makes
    // room in the shared buffers.
    using Prepare = FunctionRef<void(Shared& all, int threads)>;
    void run(const Prepare& prepare, const FunctionRef<void(const Context&)>& work);

   private:
    std::unique_ptr<Shared> shared_;
    bool large_;      // large enough for more than one thread
    bool divisible_;  // threads may divide sequences among them, see `Batch::divide`
};

}  // namespace gemma
