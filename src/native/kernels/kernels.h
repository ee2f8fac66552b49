// The operators that one thread runs on its share of the work. Each instruction set has a table of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../weight.h"

namespace gemma {

// Rows of activations in the form that a weight type is multiplied with. `prepare` and `prepare_all` make them.
struct Activations {
    const float* borrowed = nullptr;  // the caller's own rows, where `prepare_all` left them in place
    size_t apart = 0;                 // floats from one borrowed row to the next
    Buffer<float> wide;               // floating point
    Buffer<uint16_t> half;            // bf16, in place of `wide` where the machine multiplies it
    Buffer<int8_t> values;            // quantised by row and group, in the order of the quantised weights
    Buffer<float> scales;             // one for each group
    Buffer<int32_t> starts;           // what a lane's sum begins with, for each group; see `start_of`
    std::vector<Activations> more;    // the same rows in the other ways that a weight wants, see `Weight::inputs`
};

// A rectangle of activations: rows m0 .. m1 and columns k0 .. k1. Columns come in blocks of AREA_COLS; the last block
// of a row may be smaller.
constexpr size_t AREA_COLS = 64;
struct Area {
    size_t m0, m1, k0, k1;
};

// The positions that one query row sees: first .. last.
struct Visible {
    int64_t first, last;
};

// Keys and values of one head. Positions lie in blocks of BLOCK_ROWS rows [d]; block i of a sequence lies at table[i].
constexpr int64_t BLOCK_ROWS = 32;
struct HeadRows {
    const float* keys;
    const float* values;
    const int32_t* table;
    size_t d;

    size_t offset(int64_t position) const {
        return ((size_t)table[position / BLOCK_ROWS] * BLOCK_ROWS + (size_t)(position % BLOCK_ROWS)) * d;
    }
};

// A queue of memory ranges to prefetch.
class Stretches {
   public:
    void clear() { all_.clear(), at_ = 0; }
    void add(const void* begin, size_t lines) { all_.push_back({(const char*)begin, lines}); }
    // Removes up to `lines` lines from the front. Returns where they begin, or null where the queue is empty.
    const void* take(size_t lines) {
        if (at_ == all_.size()) return nullptr;
        Stretch& s = all_[at_];
        const char* begin = s.begin;
        if (lines < s.lines) s.begin += lines * LINE, s.lines -= lines;
        else at_++;
        return begin;
    }

   private:
    struct Stretch {
        const char* begin;
        size_t lines;
    };
    std::vector<Stretch> all_;
    size_t at_ = 0;
};

// What a thread reads after a product. Either part may be null.
struct Next {
    Next(const void* weights = nullptr, Stretches* also = nullptr) : weights(weights), also(also) {}
    const void* weights;  // prefetched at the end of the product
    Stretches* also;      // prefetched throughout, where a product of PANELS with many rows has time for it
};

struct Kernels {
    const char* name;

    // Makes room in `out` for M rows that are to be multiplied with a weight like w.
    void (*reserve)(const Weight& w, size_t M, Activations& out);
    // Prepares an area of M such rows. `out` has room already. x is where the area begins.
    void (*prepare)(const Weight& w, size_t M, const Area& area, const float* x, size_t ldx, Activations& out);
    // Reserves and prepares all M rows. It may leave them in place, so x must not change before the product.
    void (*prepare_all)(const Weight& w, size_t M, const float* x, size_t ldx, Activations& out);
    // y[m, n - n0] = x[m] . w[n] for n0 <= n < n1, rounded where the weight says so
    void (*linear)(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                   const Next& then);
    // out = x / rms(x) * weight. `weight` may be null; `out` may be x.
    void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* out);
    // residual += x / rms(x) * weight
    void (*add_rms_norm)(float* residual, const float* x, const float* weight, float eps, size_t n);
    // x[i] = x[i] cos[i] + x[(i + n / 2) % n] sin[i]. The first half of `sin` is negated.
    void (*rotate)(float* x, const float* cos, const float* sin, size_t n);
    // out = gelu(gate) * up
    void (*gated)(const float* gate, const float* up, size_t n, float* out);
    void (*scale)(float* x, float factor, size_t n);
    void (*axpy)(float* y, float factor, const float* x, size_t n);
    // x = tanh(x / cap) * cap
    void (*softcap)(float* x, float cap, size_t n);
    // out[i] = a row of the table as floats, times factor
    void (*gather)(const Weight& table, size_t row, float factor, float* out);
    // Softmax attention of Q query rows [Q, d] (stride ldq) over one head. Results go to `out` (stride ldo).
    void (*attend)(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out,
                   size_t ldo);
    void (*softmax)(float* x, size_t n);
    float (*largest)(const float* x, size_t n);
};

const Kernels& kernels_portable();
// The portable kernels with one fault, for tests that must see it: several rows are summed in another order than one.
const Kernels& kernels_control();
#if defined(__aarch64__)
const Kernels& kernels_neon();  // which every 64-bit ARM has
#endif
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();  // defined where the compiler knows AMX: GEMMA_WITH_AMX
#endif

}  // namespace gemma
