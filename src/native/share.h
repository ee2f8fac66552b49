// One thread's share of a batch's work in a layer. This is the one place that knows how the work is divided.
//
// By columns: every thread holds the residual stream of all rows. Threads divide the columns of each product, and meet
// after it.
// By sequences: every thread holds the residual stream of its own sequences and computes whole products for them, but
// for the feed-forward products, which are large: threads divide their columns.
#pragma once

#include <memory>

#include "batch.h"
#include "function_ref.h"
#include "scratch.h"

namespace gemma {

class Share {
   public:
    // Finishes one head of one row of queries, keys or values after its projection.
    using FinishHead = FunctionRef<void(size_t row, size_t head)>;
    // Attends with `count` heads of one group from `head` on, for a block of rows.
    using Attend = FunctionRef<void(size_t head, size_t count, size_t block)>;
    // Notes the keys or values of a group that a block of rows attends to.
    using Note = FunctionRef<void(size_t group, size_t block)>;

    const Batch& batch;
    const Part rows;  // whose residual stream this thread holds

    // Returns the calling thread's share, by sequences where the batch is divided.
    static std::unique_ptr<Share> of(const Batch& batch, const Config& config, const Context& context);
    static std::unique_ptr<Share> by_columns(const Batch& batch, const Config& config, const Context& context);
    virtual ~Share() = default;

    size_t count() const { return rows.end - rows.begin; }
    // Returns the columns that this thread computes of a product that it computes alone for its rows.
    virtual Part columns(size_t count, size_t unit) const = 0;
    // Returns the weights that this thread reads first of a product with its rows.
    virtual const void* first_read(const Weight& w, size_t unit) const = 0;
    // Returns whether this thread computes all columns of a small product for its rows, though others do, too.
    virtual bool repeats(const Weight& w) const = 0;
    // Returns the rows whose final states this thread hands out.
    virtual Part handed_out() const = 0;

    // Waits for the threads that write what this thread's rows need, and prefetches n numbers of it.
    virtual void meet(const float* written = nullptr, size_t n = 0) = 0;
    // Multiplies w with this thread's rows of `in`. Its rows of `out` can be read afterwards. `then` is read next.
    virtual void product(const Weight& w, const float* in, float* out, const void* then) = 0;
    // Projects all rows `in` [rows, hidden] to some of the heads of queries, keys and values, and finishes each head.
    virtual void project(const Layer& l, Part heads, const float* in, const void* then, const FinishHead& finish) = 0;
    virtual void attention(const Layer& l, const Attend& attend) = 0;

    // The feed-forward network takes three steps. First, all rows `in` are prepared for gate_up.
    virtual const Activations& mlp_rows(const Layer& l, const float* in) = 0;
    // Then gelu(gate) * up is kept for some columns of all rows, which begin and end at multiples of `mlp_unit`.
    virtual size_t mlp_unit() const = 0;
    virtual void keep_gated(const Layer& l, Part columns, float* gate, const float* up) = 0;
    // Then threads divide the columns of the product with `down` for all rows.
    virtual void mlp_down(const Layer& l, float* out, const void* then) = 0;

    // Lists keys or values that are in the cache and that this thread attends to in a layer. They are prefetched during
    // a product with `during`.
    void list_cached(const Layer& l, const float* HeadRows::* which, const Weight& during, size_t most_bytes);

   protected:
    Share(const Batch& batch, Part rows, const Config& config, const Context& context)
        : batch(batch), rows(rows), hidden_(config.hidden), me_(context.me), own_(context.own), all_(context.all) {}
    // Calls `note` for what this thread is likely to attend to.
    virtual void each_cached(const Layer& l, const Note& note) const = 0;

    const size_t hidden_;
    Worker& me_;
    Scratch& own_;
    Shared& all_;
};

// Keys of a layer that a thread prefetches, at most, so that its second-level cache holds them; and values, earlier, so
// that the last level does.
constexpr size_t KEY_BYTES = 256 << 10, VALUE_BYTES = 1 << 20;

}  // namespace gemma
