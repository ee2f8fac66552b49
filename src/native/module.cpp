// Python's view of the native operators. Tensors come as addresses: the caller (ops/native.py) keeps them alive, checks
// their shapes and hands in contiguous memory only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "stack.h"

namespace nb = nanobind;
using namespace gemma;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Weight make_weight(int type, uintptr_t data, uintptr_t scales, size_t rows, size_t cols) {
    Weight w;
    w.type = (WeightType)type;
    w.data = at<const void>(data);
    w.scales = at<const float>(scales);
    w.rows = rows, w.cols = cols;
    return w;
}

// Keys and values of the layers, in the order in which a stack's layers number them.
struct Caches {
    std::vector<Cache> layers;
};
using Numbers = std::vector<size_t>;

// Of every sequence: its view, how many rows it has in the call and how many of them are kept, and the first one's position.
std::vector<Segment> segments(const std::vector<const View*>& views, const Numbers& rows, const Numbers& keep,
                              const std::vector<int64_t>& positions) {
    std::vector<Segment> all;
    all.reserve(views.size());
    for (size_t i = 0; i < views.size(); i++) all.push_back({views[i], rows.at(i), keep.at(i), positions.at(i)});
    return all;
}

std::vector<Choice> choices(const std::vector<float>& temperatures, const std::vector<uint64_t>& keys) {
    std::vector<Choice> all;
    all.reserve(keys.size());
    for (size_t i = 0; i < keys.size(); i++) all.push_back({temperatures.at(i), keys[i]});
    return all;
}

// One row of every sequence.
std::vector<Segment> segments(const std::vector<const View*>& views, const std::vector<int64_t>& positions) {
    const Numbers ones(views.size(), 1);
    return segments(views, ones, ones, positions);
}

const Kernels& named(const std::string& isa) {
    const Kernels* k = kernels_named(isa.c_str());
    if (!k) throw std::invalid_argument("this machine has no " + isa);
    return *k;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // of a process that ends while a thread still holds models
    using release = nb::call_guard<nb::gil_scoped_release>;

    m.def("isa", [] { return std::string(kernels().name); }, "Instruction set in use.");
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const char* name : ISAS)
            if (kernels_named(name)) names.emplace_back(name);
        return names;
    });
    m.attr("BLOCK_ROWS") = (int)BLOCK_ROWS;
    m.def("threads", [] { return Pool::instance().threads(); });
    m.def("set_threads", [](int n) { Pool::instance().set_threads(n); });

    nb::class_<Weight>(m, "Weight").def(nb::new_(&make_weight));

    nb::class_<MoE>(m, "MoE")
        .def(nb::init<>())
        .def_rw("experts", &MoE::experts)
        .def_rw("top_k", &MoE::top_k)
        .def_rw("width", &MoE::width)
        .def_rw("router", &MoE::router)
        .def_rw("gate_up", &MoE::gate_up)
        .def_rw("down", &MoE::down)
        .def("set_vectors", [](MoE& e, uintptr_t router_scale, uintptr_t expert_scale, uintptr_t post_dense,
                               uintptr_t pre_sparse, uintptr_t post_sparse) {
            e.router_scale = at<const float>(router_scale), e.expert_scale = at<const float>(expert_scale);
            e.post_dense = at<const float>(post_dense), e.pre_sparse = at<const float>(pre_sparse);
            e.post_sparse = at<const float>(post_sparse);
        });

    nb::class_<Layer>(m, "Layer")
        .def(nb::init<>())
        .def_rw("sliding", &Layer::sliding)
        .def_rw("key_is_value", &Layer::key_is_value)
        .def_rw("heads", &Layer::heads)
        .def_rw("kv_heads", &Layer::kv_heads)
        .def_rw("groups", &Layer::groups)
        .def_rw("head_dim", &Layer::head_dim)
        .def_rw("cache", &Layer::cache)
        .def_rw("scalar", &Layer::scalar)
        .def_rw("qkv", &Layer::qkv)
        .def_rw("o", &Layer::o)
        .def_rw("gate_up", &Layer::gate_up)
        .def_rw("down", &Layer::down)
        .def_rw("ple_gate", &Layer::ple_gate)
        .def_rw("ple_projection", &Layer::ple_projection)
        .def_rw("moe", &Layer::moe)
        .def("set_norms", [](Layer& l, uintptr_t q, uintptr_t k, uintptr_t input, uintptr_t post_attention,
                             uintptr_t pre_feedforward, uintptr_t post_feedforward, uintptr_t ple) {
            l.q_norm = at<const float>(q), l.k_norm = at<const float>(k), l.input_norm = at<const float>(input);
            l.post_attention = at<const float>(post_attention), l.pre_feedforward = at<const float>(pre_feedforward);
            l.post_feedforward = at<const float>(post_feedforward), l.ple_norm = at<const float>(ple);
        });

    nb::class_<Config>(m, "Config")
        .def(nb::init<>())
        .def_rw("hidden", &Config::hidden)
        .def_rw("vocab", &Config::vocab)
        .def_rw("window", &Config::window)
        .def_rw("ple", &Config::ple)
        .def_rw("eps", &Config::eps)
        .def_rw("embed_scale", &Config::embed_scale)
        .def_rw("ple_embed_scale", &Config::ple_embed_scale)
        .def_rw("softcap", &Config::softcap)
        .def_rw("first_shared", &Config::first_shared)
        .def_rw("table", &Config::table)
        .def_rw("head", &Config::head)
        .def_rw("ple_table", &Config::ple_table)
        .def_rw("ple_model_projection", &Config::ple_model_projection)
        .def("set_norms", [](Config& c, uintptr_t norm, uintptr_t ple) {
            c.norm = at<const float>(norm), c.ple_model_norm = at<const float>(ple);
        });

    nb::class_<Caches>(m, "Caches")
        .def(nb::init<>())
        .def("add", [](Caches& c, uintptr_t keys, uintptr_t values, size_t blocks) {
            c.layers.push_back({at<float>(keys), at<float>(values), blocks});
        });

    nb::class_<View>(m, "View").def(nb::new_([](uintptr_t sliding, uintptr_t full, uintptr_t sliding_cos, uintptr_t sliding_sin,
                                                uintptr_t full_cos, uintptr_t full_sin) {
        return View{{at<const int32_t>(sliding), at<const int32_t>(full)},
                    {at<const float>(sliding_cos), at<const float>(full_cos)},
                    {at<const float>(sliding_sin), at<const float>(full_sin)}};
    }));

    nb::class_<Stack>(m, "Stack")
        .def("__init__", [](Stack* s, const Config& config, const std::vector<Layer>& layers) {
            new (s) Stack();
            s->config = config;
            s->layers = layers;
            s->prepare();
        })
        .def("forward", [](Stack& s, uintptr_t tokens, const Caches& caches, const std::vector<const View*>& views,
                           const Numbers& rows, const Numbers& keep, const std::vector<int64_t>& positions, uintptr_t hidden) {
            s.forward(at<const int64_t>(tokens), segments(views, rows, keep, positions), caches.layers.data(),
                      at<float>(hidden));
        }, release())
        .def("logits", [](Stack& s, uintptr_t hidden, size_t rows, uintptr_t out) {
            s.logits(at<const float>(hidden), rows, at<float>(out));
        }, release())
        .def("choose", [](Stack& s, uintptr_t hidden, const Numbers& rows, const std::vector<float>& temperatures,
                          const std::vector<uint64_t>& keys) {
            std::vector<const float*> states;
            for (size_t row : rows) states.push_back(at<const float>(hidden) + row * s.config.hidden);
            std::vector<int64_t> tokens(rows.size());
            s.choose(states, choices(temperatures, keys).data(), tokens.data());
            return tokens;
        }, release());

    nb::class_<DraftStack>(m, "DraftStack")
        .def("__init__", [](DraftStack* d, const Config& config, const std::vector<Layer>& layers, const Weight& pre,
                            const Weight& post, size_t backbone, const Weight& target_table, float target_scale,
                            size_t clusters, size_t top_k, const Weight& centroids, uintptr_t ordering) {
            new (d) DraftStack();
            d->stack.config = config;
            d->stack.layers = layers;
            d->stack.prepare();
            d->pre_projection = pre, d->post_projection = post, d->backbone = backbone;
            d->target_table = target_table, d->target_scale = target_scale;
            d->centroids.clusters = clusters, d->centroids.top_k = top_k, d->centroids.table = centroids;
            d->centroids.ordering = at<const int64_t>(ordering);
        })
        .def("candidates", &DraftStack::candidates)
        .def("step", [](DraftStack& d, uintptr_t input, const Caches& caches, const std::vector<const View*>& views,
                        const std::vector<int64_t>& positions, uintptr_t state, uintptr_t projected) {
            d.step(at<const float>(input), segments(views, positions), caches.layers.data(), at<float>(state),
                   at<float>(projected));
        }, release())
        .def("score", [](DraftStack& d, uintptr_t state, size_t rows, uintptr_t logits, uintptr_t ids) {
            d.score(at<const float>(state), rows, at<float>(logits), at<int64_t>(ids));
        }, release())
        .def("draft", [](DraftStack& d, const std::vector<int64_t>& last, const std::vector<uintptr_t>& hidden,
                         const Caches& caches, const std::vector<const View*>& views, const std::vector<int64_t>& positions,
                         const Numbers& counts, const std::vector<StopRule>& stops, const std::vector<float>& temperatures,
                         const std::vector<uint64_t>& keys, uintptr_t tokens, uintptr_t confidences, uintptr_t made) {
            std::vector<const float*> states;
            for (uintptr_t address : hidden) states.push_back(at<const float>(address));
            d.draft(last.data(), states, segments(views, positions), caches.layers.data(), counts, stops,
                    choices(temperatures, keys).data(), at<int64_t>(tokens), at<float>(confidences), at<int64_t>(made));
        }, release());

    nb::class_<StopRule>(m, "StopRule").def(nb::new_([](const std::vector<double>& least, double bias, double slope) {
        return StopRule{least, bias, slope};
    }));

    // single operators, on the calling thread or all of them, for tests and benchmarks
    m.def("linear", [](const std::string& isa, const Weight& w, uintptr_t x, size_t rows, uintptr_t y) {
        const Kernels& k = named(isa);
        Pool::instance().run([&](Worker& me) {
            static thread_local Activations prepared;
            const Part p = me.part(w.rows, 8);
            k.prepare_all(w, rows, at<const float>(x), w.cols, prepared);
            k.linear(w, prepared, rows, p.begin, p.end, at<float>(y) + p.begin, w.rows, nullptr);
        });
    }, release());
    m.def("rms_norm", [](const std::string& isa, uintptr_t x, uintptr_t weight, float eps, size_t n, uintptr_t out) {
        named(isa).rms_norm(at<const float>(x), at<const float>(weight), eps, n, at<float>(out));
    });
    m.def("rotate", [](const std::string& isa, uintptr_t x, uintptr_t cos, uintptr_t sin, size_t n) {
        named(isa).rotate(at<float>(x), at<const float>(cos), at<const float>(sin), n);
    });
    m.def("gated", [](const std::string& isa, uintptr_t gate, uintptr_t up, size_t n, uintptr_t out) {
        named(isa).gated(at<const float>(gate), at<const float>(up), n, at<float>(out));
    });
    m.def("softcap", [](const std::string& isa, uintptr_t x, float cap, size_t n) {
        named(isa).softcap(at<float>(x), cap, n);
    });
    m.def("softmax", [](const std::string& isa, uintptr_t x, size_t n) { named(isa).softmax(at<float>(x), n); });
    m.def("gather", [](const std::string& isa, const Weight& table, size_t row, float factor, uintptr_t out) {
        named(isa).gather(table, row, factor, at<float>(out));
    });
    m.def("attend", [](const std::string& isa, uintptr_t q, size_t queries, const std::vector<int64_t>& first,
                       const std::vector<int64_t>& last, uintptr_t keys, uintptr_t values,
                       const std::vector<int32_t>& table, size_t d, uintptr_t out) {
        std::vector<Visible> visible;
        for (size_t i = 0; i < queries; i++) visible.push_back({first.at(i), last.at(i)});
        named(isa).attend(at<const float>(q), d, queries, visible.data(),
                          {at<const float>(keys), at<const float>(values), table.data(), d}, at<float>(out), d);
    });
}
