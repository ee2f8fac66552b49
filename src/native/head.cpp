#include "head.h"

#include <algorithm>
#include <limits>

namespace gemma {
namespace {

constexpr size_t HEAD_CHUNK = 256;  // rows of the head that are scored at once

}  // namespace

void Head::logits(const float* states, size_t rows, float* out) {
    const size_t V = config_.vocab;
    own_.prepare(config_.head, states, config_.hidden, rows);
    share_linear(me_, config_.head, own_.rows, rows, {0, V}, UNIT, out, V, nullptr, [&](Part p) {
        for (size_t m = 0; m < rows; m++) cap(out + m * V + p.begin, p.end - p.begin);
    });
}

void Head::best(const std::vector<const float*>& states, const Choice* choices, bool totals) {
    const size_t rows = states.size(), D = config_.hidden;
    float* scores = grown(own_.b, rows * HEAD_CHUNK);
    Best* mine = all_.best.data() + me_.thread * all_.best_rows;
    for (size_t m = 0; m < rows; m++) mine[m].clear();
    k_.reserve(config_.head, rows, own_.rows);
    for (size_t m = 0; m < rows; m++) k_.prepare(config_.head, rows, {m, m + 1, 0, D}, states[m], D, own_.rows);
    const auto score = [&](Part p, bool) {
        for (size_t n = p.begin; n < p.end; n += HEAD_CHUNK) {
            const size_t count = std::min(HEAD_CHUNK, p.end - n);
            const void* then = share_of(config_.head, {n + count, config_.vocab});
            own_.multiply(config_.head, rows, {n, n + count}, scores, HEAD_CHUNK, then);
            for (size_t m = 0; m < rows; m++) {
                float* s = scores + m * HEAD_CHUNK;
                cap(s, count);
                mine[m].take_best(s, count, nullptr, (int64_t)n, choices[m]);
                if (totals) mine[m].take_total(s, count);
            }
        }
    };
    if (totals) score(me_.part(config_.vocab, UNIT), true);  // a total depends on the order of its parts
    else me_.each(config_.vocab, UNIT, HEAD_CHUNK, score);
}

Best Head::combined(size_t row) const {
    Best best = all_.best[row];
    for (int t = 1; t < me_.threads; t++) best.merge(all_.best[t * all_.best_rows + row]);
    if (best.id == std::numeric_limits<int64_t>::max()) best.id = 0;  // all NaN
    return best;
}

}  // namespace gemma
