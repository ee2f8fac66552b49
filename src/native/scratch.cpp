#include "scratch.h"

#include <algorithm>
#include <numeric>

namespace gemma {
namespace {

constexpr size_t PASS = 16;        // weight rows that a product with many rows reads at once: few are left over
constexpr size_t CHUNK = 1 << 20;  // multiply-adds that a thread takes at once, about: some microseconds

}  // namespace

void Shared::reserve(const Config& config, const std::vector<Layer>& layers, size_t rows, int threads) {
    const Kernels& k = kernels();
    grown(out, rows * config.hidden);
    for (const Layer& l : layers) {
        grown(qkv, rows * l.qkv.rows);
        grown(attended, rows * l.heads * l.head_dim);
        grown(act, rows * l.down.cols);
        k.reserve(l.gate_up, rows, mlp_rows);
        k.reserve(l.down, rows, mlp_act);
        grown(expert_act, rows * l.moe.top_k * l.moe.width);
        grown(expert_out, rows * l.moe.top_k * config.hidden);
    }
    grown(ple, rows * layers.size() * config.ple);
    grown(ple_gate, rows * config.ple);
    if (config.ple) grown(ple_out, rows * config.hidden);
    grown(best, rows * threads);
    best_rows = rows;
}

Scratch& Scratch::here() {
    static thread_local Scratch own;
    return own;
}

// A few rows take as long as one, for they wait for the weights. The sums of a column take a while, too.
size_t chunk_columns(const Weight& w, size_t rows, size_t unit) {
    const size_t column = (w.cols + 64) * std::max<size_t>(rows, 4);
    const size_t whole = std::lcm(unit, w.type == WeightType::PANELS ? GROUP_ROWS : PASS);
    return std::max<size_t>(CHUNK / column / whole, 1) * whole;
}

void share_linear(Worker& me, const Weight& w, const Activations& rows, size_t count, float* out, size_t ldy,
                  const Next& then) {
    share_linear(me, w, rows, count, {0, w.rows}, UNIT, out, ldy, then, [](Part) {});
}

}  // namespace gemma
