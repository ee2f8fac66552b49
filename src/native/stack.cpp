#include "stack.h"

#include <algorithm>
#include <cstdio>

#include "head.h"
#include "layer.h"

namespace gemma {
namespace {

constexpr size_t LARGE_BYTES = 1 << 20;  // one thread runs a smaller model faster than several that wait

// Returns the bytes of the last-level cache, as Linux says, or what many processors have. A smaller model is read from
// there, so that each thread may read all of a layer's weights for its sequences.
size_t cached_bytes() {
    size_t kib = 32 << 10;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        if (std::fscanf(file, "%zuK", &kib) != 1) kib = 32 << 10;
        std::fclose(file);
    }
    return kib << 10;
}

size_t bytes_of(const Config& config, const std::vector<Layer>& layers) {
    size_t bytes = config.head.bytes();
    for (const Layer& l : layers)
        for (const Weight* w : {&l.qkv, &l.o, &l.gate_up, &l.down, &l.moe.gate_up, &l.moe.down}) bytes += w->bytes();
    return bytes;
}

}  // namespace

Stack::Stack(const Config& config, const std::vector<Layer>& layers)
    : config(config), layers(layers), shared_(std::make_unique<Shared>()) {
    const size_t bytes = bytes_of(config, layers);
    const bool sparse = std::any_of(layers.begin(), layers.end(), [](const Layer& l) { return l.moe.experts; });
    large_ = bytes >= LARGE_BYTES;
    divisible_ = bytes < cached_bytes() && !sparse;
}

void Stack::run(const Prepare& prepare, const FunctionRef<void(const Context&)>& work) {
    Pool::instance().run(
        [&](Worker& me) {
            if (me.thread == 0) prepare(*shared_, me.threads);
            me.wait();
            work({me, Scratch::here(), *shared_});
        },
        large_);
}

void Stack::forward(const int64_t* tokens, const std::vector<Segment>& segments, const Cache* caches, float* hidden) {
    Batch every(segments, caches, config.window, Sees::ITSELF);
    const Batch kept(segments, caches, config.window, Sees::ITSELF, true);
    const bool all_kept = kept.size() == every.size();
    const auto prepare = [&](Shared& all, int threads) {
        all.reserve(config, layers, every.size(), threads);
        if (divisible_ && all_kept) every.divide(threads);
    };
    run(prepare, [&](const Context& context) {
        const size_t D = config.hidden;
        const auto whole = Share::of(every, config, context);
        const auto wanted = all_kept ? nullptr : Share::of(kept, config, context);
        Share& last = all_kept ? *whole : *wanted;
        LayerRun layer_run(config, layers, context);
        layer_run.embed(tokens, *whole);
        // From the last layer that has keys and values of its own, only kept rows go on.
        const size_t shared_from = std::min(config.first_shared, layers.size());
        for (size_t i = 0; i < layers.size(); i++)
            layer_run.layer(i, i < shared_from ? *whole : last, i + 1 < shared_from ? *whole : last);
        const Part rows = last.handed_out();
        for (size_t m = rows.begin; m < rows.end; m++)
            kernels().rms_norm(context.own.x.data() + m * D, config.norm, config.eps, D, hidden + m * D);
    });
}

void Stack::logits(const float* hidden, size_t rows, float* out) {
    const auto nothing = [](Shared&, int) {};
    run(nothing, [&](const Context& context) { Head(config, context).logits(hidden, rows, out); });
}

void Stack::choose(const std::vector<const float*>& states, const Choice* choices, int64_t* tokens) {
    const auto prepare = [&](Shared& all, int threads) { all.reserve(config, layers, states.size(), threads); };
    run(prepare, [&](const Context& context) {
        Head head(config, context);
        head.best(states, choices, false);
        context.me.wait();
        if (context.me.thread == 0)
            for (size_t m = 0; m < states.size(); m++) tokens[m] = head.combined(m).id;
    });
}

}  // namespace gemma
