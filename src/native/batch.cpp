#include "batch.h"

#include <algorithm>

namespace gemma {
namespace {

constexpr size_t BLOCK_QUERIES = 4;  // rows whose queries share a pass over the cache
// Sequences are divided where each thread gets at least so many sequences, and so many blocks of their rows.
constexpr size_t LEAST_SEQUENCES = 2, LEAST_BLOCKS = 4;
constexpr size_t ROW_POSITIONS = 64;  // a row's other work takes about as long as attention to so many positions

struct Whole {  // a sequence
    size_t block, cost;  // its first block
};

}  // namespace

Batch::Batch(const std::vector<Segment>& segments, const Cache* caches, size_t window, Sees sees, bool kept_only)
    : caches(caches), window_(window), sees_(sees) {
    size_t source = 0;
    for (const Segment& s : segments) {
        const size_t first = rows.size(), skip = kept_only ? s.rows - s.keep : 0;
        for (size_t i = skip; i < s.rows; i++) rows.push_back({s.view, s.position + (int64_t)i, source + i});
        for (size_t m = first; m < rows.size(); m += BLOCK_QUERIES)
            blocks.push_back({m, std::min(rows.size(), m + BLOCK_QUERIES)});
        source += s.rows;
    }
}

void Batch::keep(float* x, size_t size) const {
    for (size_t m = 0; m < rows.size(); m++)  // rows move towards the front only
        if (rows[m].source != m) std::copy_n(x + rows[m].source * size, size, x + m * size);
}

void Batch::divide(int threads) {
    cuts_.clear();
    if (threads == 1 || blocks.size() < LEAST_BLOCKS * threads) return;
    std::vector<Whole> sequences;
    size_t total = 0;
    for (size_t b = 0; b < blocks.size(); b++) {
        const auto [begin, end] = blocks[b];
        const size_t cost = (ROW_POSITIONS + std::min<size_t>(rows[begin].position, window_)) * (end - begin);
        if (!continues(b)) sequences.push_back({b, 0});
        sequences.back().cost += cost;
        total += cost;
    }
    if (sequences.size() < LEAST_SEQUENCES * threads) return;
    size_t sum = 0, before = 0, most = 0;
    cuts_.push_back(0);
    for (const Whole& s : sequences) {  // a cut goes to the nearer end of the sequence it falls into
        const size_t half = 2 * sum + s.cost;
        while (cuts_.size() < (size_t)threads && half * threads > 2 * total * cuts_.size()) {
            cuts_.push_back(s.block);
            most = std::max(most, sum - before);
            before = sum;
        }
        sum += s.cost;
    }
    cuts_.resize(threads + 1, blocks.size());
    most = std::max(most, sum - before);
    if (4 * most * threads > 5 * total) cuts_.clear();  // one thread would wait too long for another
}

Part Batch::rows_of(const Worker& me) const {
    const auto first = [&](size_t b) { return b < blocks.size() ? blocks[b].begin : size(); };
    const Part mine = blocks_of(me);
    return {first(mine.begin), first(mine.end)};
}

}  // namespace gemma
