// The rows of one call: many sequences, each with some rows, and how they can be divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "model.h"
#include "pool.h"

namespace gemma {

// Keys and values of one layer, each [groups, blocks, BLOCK_ROWS, d].
struct Cache {
    float* keys = nullptr;
    float* values = nullptr;
    size_t blocks = 0;
};

// Where a sequence's rows lie, for each kind of layers: its table of blocks, and cos and signed sin [positions, d]. The
// caller keeps the addresses valid.
struct View {
    const int32_t* table[LAYER_KINDS] = {};
    const float* cos[LAYER_KINDS] = {};
    const float* sin[LAYER_KINDS] = {};
};

// Rows of one sequence in a call, at positions `position`, `position` + 1, ... Hidden states are wanted for the last
// `keep` rows only.
struct Segment {
    const View* view = nullptr;
    size_t rows = 1, keep = 1;
    int64_t position = 0;
};

// Which rows of the cache a call's rows see: the target's rows see themselves, a drafter's see committed rows only.
enum class Sees { ITSELF, COMMITTED };

class Batch {
   public:
    struct Row {
        const View* view;
        int64_t position;
        size_t source;  // its place among all rows of the call
    };
    // Rows of one sequence whose queries share a pass over the cache.
    struct RowBlock {
        size_t begin, end;
    };
    std::vector<Row> rows;
    std::vector<RowBlock> blocks;
    const Cache* const caches;

    // Lists the rows of all segments, one segment after the other; with `kept_only`, those that are kept.
    Batch(const std::vector<Segment>& segments, const Cache* caches, size_t window, Sees sees, bool kept_only = false);

    size_t size() const { return rows.size(); }
    // Returns whether a block goes on with the sequence of the block before.
    bool continues(size_t block) const {
        return block && rows[blocks[block].begin].view == rows[blocks[block - 1].begin].view;
    }
    // Moves this batch's rows to the front of x, which holds `size` numbers for each row of the call.
    void keep(float* x, size_t size) const;

    // Returns the keys and values of a group that a block of rows attends to.
    HeadRows head_rows(const Layer& l, size_t group, size_t block) const {
        const Cache& cache = caches[l.cache];
        const size_t before = group * cache.blocks * BLOCK_ROWS * l.head_dim;
        const View& view = *rows[blocks[block].begin].view;
        return {cache.keys + before, cache.values + before, view.table[(size_t)l.kind], l.head_dim};
    }
    Visible visible(const Layer& l, const Row& row) const {
        const int64_t in_window = std::max((int64_t)0, row.position - (int64_t)window_ + 1);
        return {l.kind == LayerKind::SLIDING ? in_window : 0, row.position - (sees_ == Sees::COMMITTED)};
    }

    // Divides the sequences among threads, where each thread gets enough of them and none gets much more than its
    // share.
    void divide(int threads);
    bool divided() const { return !cuts_.empty(); }
    // Returns a thread's blocks and its rows of a divided batch.
    Part blocks_of(const Worker& me) const { return {cuts_[me.thread], cuts_[me.thread + 1]}; }
    Part rows_of(const Worker& me) const;

   private:
    std::vector<size_t> cuts_;  // the first block of each thread; empty where the batch is not divided
    const size_t window_;
    const Sees sees_;
};

}  // namespace gemma
