#include "best.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"

namespace gemma {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

uint64_t mixed(uint64_t word) {  // the finaliser of splitmix64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

// Returns standard Gumbel noise as decoding/noise.py defines it. `bits` are the 52 bits of a uniform number.
float gumbel(uint64_t bits) {
    const double uniform = (double)(2 * bits + 1) * 0x1p-53;
    return (float)-std::log(-std::log(uniform));
}

// Returns a bound of gumbel(bits) without a logarithm: a uniform number above 1 - 2 ** -n has a noise of at most
// (n + 1) ln 2.
double gumbel_bound(uint64_t bits) {
    const uint64_t below_one = ~bits & ((uint64_t(1) << 52) - 1);
    const int n = below_one ? __builtin_clzll(below_one) - 11 : 54;
    return 0.6932 * (n + 1);
}

}  // namespace

void Best::clear() {
    score = top = LOWEST;
    value = LOWEST;
    id = std::numeric_limits<int64_t>::max();
    total = 0;
}

void Best::take(double other_value, int64_t other_id, float other_score) {
    if (other_value > value || (other_value == value && other_id < id))
        value = other_value, id = other_id, score = other_score;
}

void Best::merge(const Best& other) {
    take(other.value, other.id, other.score);
    if (other.total > 0) {
        const float highest = std::max(top, other.top);
        total = (total > 0 ? total * std::exp(top - highest) : 0.0f) + other.total * std::exp(other.top - highest);
        top = highest;
    }
}

float Best::probability() const { return std::exp(score - top) / total; }

void Best::take_best(float* scores, size_t count, const int64_t* ids, int64_t first, const Choice& choice) {
    if (choice.temperature == 0) {
        if (!ids && count && !(kernels().largest(scores, count) > value)) return;  // of equals the first stays
        size_t highest = 0;
        for (size_t i = 1; i < count; i++)
            if (scores[i] > scores[highest] || (ids && scores[i] == scores[highest] && ids[i] < ids[highest]))
                highest = i;
        if (count && scores[highest] > LOWEST)
            take(scores[highest], ids ? ids[highest] : first + (int64_t)highest, scores[highest]);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        const double scaled = scores[i] / choice.temperature;  // in double: noise beside a large score still counts
        scores[i] = (float)scaled;
        const int64_t token = ids ? ids[i] : first + (int64_t)i;
        const uint64_t bits = mixed(choice.key + ((uint64_t)token + 1) * 0x9E3779B97F4A7C15u) >> 12;
        if (scaled + gumbel_bound(bits) < value) continue;  // most candidates need no logarithm
        take(scaled + gumbel(bits), token, scores[i]);
    }
}

void Best::take_total(float* scores, size_t count) {
    if (!count) return;
    const float highest = kernels().largest(scores, count);
    if (!(highest > LOWEST)) return;
    kernels().softmax(scores, count);
    Best these;
    these.clear();
    these.top = highest, these.total = 1 / kernels().largest(scores, count);  // of the softmax that is exp(0) / total
    merge(these);
}

}  // namespace gemma
