// The best candidate for a row's token, found in parts and merged.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma {

// How a row's token is chosen. At temperature 0 it is the arg max of the row's logits, else the arg max of logits /
// temperature + Gumbel noise (decoding/noise.py). `key` is what noise.py calls the row's key.
struct Choice {
    double temperature = 0;
    uint64_t key = 0;
};

// The best token among some of a row's candidates, and what its softmax needs. Of equals, the lowest id is the best.
struct Best {
    double value;      // what was compared: score plus noise
    int64_t id;
    float score;       // its logit / temperature
    float top, total;  // the highest score, and the sum of exp(score - top)

    void clear();
    void take(double other_value, int64_t other_id, float other_score);
    void merge(const Best& other);
    float probability() const;

    // Takes the best of `count` candidates. Their ids are `ids`, or begin at `first`. Scores become scaled ones.
    void take_best(float* scores, size_t count, const int64_t* ids, int64_t first, const Choice& choice);
    // Adds scaled scores to the softmax. Spoils them.
    void take_total(float* scores, size_t count);
};

}  // namespace gemma
