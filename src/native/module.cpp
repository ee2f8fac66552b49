// Python's view of the native operators. `_native.pyi` is made from it (tools/native_stub.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "address.h"
#include "dispatch.h"
#include "drafter.h"
#include "operators.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gemma;

namespace {

using release = nb::call_guard<nb::gil_scoped_release>;
using Numbers = std::vector<size_t>;
using Views = std::vector<const View*>;
using Positions = std::vector<int64_t>;

// Keys and values of the layers, in the order in which a stack's layers number them.
struct Caches {
    std::vector<Cache> layers;
};

// Adds an attribute that holds the address of a vector.
template <class C>
void address(nb::class_<C>& in, const char* name, const float* C::* member) {
    in.def_prop_rw(
        name, [member](const C& c) { return At<const float>{c.*member}; },
        [member](C& c, At<const float> at) { c.*member = at; });
}

std::vector<Segment> segments_of(const Views& views, const Numbers& rows, const Numbers& keep,
                                 const Positions& positions) {
    std::vector<Segment> all;
    all.reserve(views.size());
    for (size_t i = 0; i < views.size(); i++) all.push_back({views[i], rows.at(i), keep.at(i), positions.at(i)});
    return all;
}

// One row of every sequence.
std::vector<Segment> segments_of(const Views& views, const Positions& positions) {
    const Numbers ones(views.size(), 1);
    return segments_of(views, ones, ones, positions);
}

// Of so many rows, which have no noise where nothing is given.
std::vector<Choice> choices_of(size_t rows, const std::vector<double>& temperatures,
                               const std::vector<uint64_t>& keys) {
    std::vector<Choice> all(rows);
    for (size_t i = 0; i < keys.size(); i++) all.at(i) = {temperatures.at(i), keys[i]};
    return all;
}

std::vector<int64_t> choose(Stack& s, At<const float> hidden, const Numbers& rows,
                            const std::vector<double>& temperatures, const std::vector<uint64_t>& keys) {
    std::vector<const float*> states;
    for (size_t row : rows) states.push_back(hidden + row * s.config.hidden);
    std::vector<int64_t> tokens(rows.size());
    s.choose(states, choices_of(rows.size(), temperatures, keys).data(), tokens.data());
    return tokens;
}

void draft(DraftStack& d, const std::vector<int64_t>& last, const std::vector<At<const float>>& hidden,
           const Caches& caches, const Views& views, const Positions& positions, const Numbers& counts,
           const std::vector<StopRule>& stops, const std::vector<double>& temperatures,
           const std::vector<uint64_t>& keys, At<int64_t> tokens, At<float> confidences, At<int64_t> made) {
    const std::vector<const float*> states(hidden.begin(), hidden.end());
    const std::vector<Segment> segments = segments_of(views, positions);
    const std::vector<Choice> choices = choices_of(keys.size(), temperatures, keys);
    d.draft({last.data(), states, segments, caches.layers.data(), counts, stops, choices.data()},
            {tokens, confidences, made});
}

// Copies rows of a matrix to the places of another one, which has as many columns.
void copy_rows(At<const float> source, const Numbers& rows, At<float> target, const Numbers& places, size_t columns) {
    for (size_t i = 0; i < rows.size(); i++)
        std::copy_n(source + rows[i] * columns, columns, target + places.at(i) * columns);
}

void bind_constants(nb::module_& m) {
    m.def("isa", [] { return std::string(kernels().name); }, "Returns the instruction set in use.");
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (const char* name : ISAS)
                if (kernels_named(name)) names.emplace_back(name);
            return names;
        },
        "Returns the instruction sets of this machine, the best first.");
    m.def("threads", [] { return Pool::instance().threads(); });
    m.def("set_threads", [](int threads) { Pool::instance().set_threads(threads); }, "threads"_a);
    m.attr("BLOCK_ROWS") = (int)BLOCK_ROWS;
    m.attr("QUANTISED_BLOCK") = (int)QUANTISED_BLOCK;
    m.attr("PANEL_ROWS") = (int)PANEL_ROWS;
    m.attr("GROUP_ROWS") = (int)GROUP_ROWS;
    m.attr("PART_PAIRS") = (int)PART_PAIRS;
    nb::enum_<WeightType>(m, "WeightType")
        .value("F32", WeightType::F32)
        .value("BF16", WeightType::BF16)
        .value("INT8", WeightType::INT8)
        .value("INT4", WeightType::INT4)
        .value("PANELS", WeightType::PANELS)
        .value("INT8_32", WeightType::INT8_32)
        .value("INT2", WeightType::INT2);
    m.def("quantised_group", &quantised_group, "type"_a,
          "Returns how many columns of a quantised weight share a scale; 0 where the type has no scales.");
    nb::enum_<LayerKind>(m, "LayerKind").value("SLIDING", LayerKind::SLIDING).value("FULL", LayerKind::FULL);
}

void bind_model(nb::module_& m) {
    nb::class_<Rounding>(m, "Rounding")
        .def(
            "__init__",
            [](Rounding* r, size_t end, float input, float output) { new (r) Rounding{end, input, output}; }, "end"_a,
            "input"_a, "output"_a);
    nb::class_<Weight>(m, "Weight")
        .def(
            "__init__",
            [](Weight* w, WeightType type, At<const void> data, At<const float> scales, size_t rows, size_t cols,
               const std::vector<Rounding>& rounding) { new (w) Weight{type, data, scales, rows, cols, rounding}; },
            "type"_a, "data"_a, "scales"_a, "rows"_a, "cols"_a, "rounding"_a = std::vector<Rounding>{});

    nb::class_<MoE> moe(m, "MoE");
    moe.def(nb::init<>())
        .def_rw("experts", &MoE::experts)
        .def_rw("top_k", &MoE::top_k)
        .def_rw("width", &MoE::width)
        .def_rw("router", &MoE::router)
        .def_rw("gate_up", &MoE::gate_up)
        .def_rw("down", &MoE::down);
    address(moe, "router_scale", &MoE::router_scale);
    address(moe, "expert_scale", &MoE::expert_scale);
    address(moe, "post_dense", &MoE::post_dense);
    address(moe, "pre_sparse", &MoE::pre_sparse);
    address(moe, "post_sparse", &MoE::post_sparse);

    nb::class_<Layer> layer(m, "Layer");
    layer.def(nb::init<>())
        .def_rw("kind", &Layer::kind)
        .def_rw("key_is_value", &Layer::key_is_value)
        .def_rw("value_norm", &Layer::value_norm)
        .def_rw("heads", &Layer::heads)
        .def_rw("kv_heads", &Layer::kv_heads)
        .def_rw("groups", &Layer::groups)
        .def_rw("head_dim", &Layer::head_dim)
        .def_rw("cache", &Layer::cache)
        .def_rw("score_scale", &Layer::score_scale)
        .def_rw("scalar", &Layer::scalar)
        .def_rw("qkv", &Layer::qkv)
        .def_rw("o", &Layer::o)
        .def_rw("gate_up", &Layer::gate_up)
        .def_rw("down", &Layer::down)
        .def_rw("ple_gate", &Layer::ple_gate)
        .def_rw("ple_projection", &Layer::ple_projection)
        .def_rw("moe", &Layer::moe);
    address(layer, "q_norm", &Layer::q_norm);
    address(layer, "k_norm", &Layer::k_norm);
    address(layer, "input_norm", &Layer::input_norm);
    address(layer, "post_attention", &Layer::post_attention);
    address(layer, "pre_feedforward", &Layer::pre_feedforward);
    address(layer, "post_feedforward", &Layer::post_feedforward);
    address(layer, "ple_norm", &Layer::ple_norm);

    nb::class_<Config> config(m, "Config");
    config.def(nb::init<>())
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
        .def_rw("ple_model_projection", &Config::ple_model_projection);
    address(config, "norm", &Config::norm);
    address(config, "ple_model_norm", &Config::ple_model_norm);

    nb::class_<Centroids>(m, "Centroids")
        .def(
            "__init__",
            [](Centroids* c, size_t clusters, size_t top_k, const Weight& table, At<const int64_t> ordering) {
                new (c) Centroids{clusters, top_k, table, ordering};
            },
            "clusters"_a, "top_k"_a, "table"_a, "ordering"_a);
    nb::class_<DraftConfig>(m, "DraftConfig")
        .def(nb::init<>())
        .def_rw("pre_projection", &DraftConfig::pre_projection)
        .def_rw("post_projection", &DraftConfig::post_projection)
        .def_rw("target_table", &DraftConfig::target_table)
        .def_rw("target_scale", &DraftConfig::target_scale)
        .def_rw("backbone", &DraftConfig::backbone)
        .def_rw("centroids", &DraftConfig::centroids);
}

void bind_calls(nb::module_& m) {
    nb::class_<Caches>(m, "Caches")
        .def(nb::init<>())
        .def(
            "add",
            [](Caches& c, At<float> keys, At<float> values, size_t blocks) {
                c.layers.push_back({keys, values, blocks});
            },
            "keys"_a, "values"_a, "blocks"_a);
    nb::class_<View>(m, "View").def(
        "__init__",
        [](View* view, At<const int32_t> sliding, At<const int32_t> full, At<const float> sliding_cos,
           At<const float> sliding_sin, At<const float> full_cos, At<const float> full_sin) {
            new (view) View{{sliding, full}, {sliding_cos, full_cos}, {sliding_sin, full_sin}};
        },
        "sliding"_a, "full"_a, "sliding_cos"_a, "sliding_sin"_a, "full_cos"_a, "full_sin"_a);
    m.def("copy_rows", &copy_rows, "source"_a, "rows"_a, "target"_a, "places"_a, "columns"_a);
    nb::class_<StopRule>(m, "StopRule")
        .def(
            "__init__",
            [](StopRule* rule, const std::vector<double>& least, double bias, double slope) {
                new (rule) StopRule{least, bias, slope};
            },
            "least"_a, "bias"_a, "slope"_a);

    nb::class_<Stack>(m, "Stack")
        .def(nb::init<const Config&, const std::vector<Layer>&>(), "config"_a, "layers"_a)
        .def(
            "forward",
            [](Stack& s, const std::vector<int64_t>& tokens, const Caches& caches, const Views& views,
               const Numbers& rows, const Numbers& keep, const Positions& positions, At<float> hidden) {
                s.forward(tokens.data(), segments_of(views, rows, keep, positions), caches.layers.data(), hidden);
            },
            "tokens"_a, "caches"_a, "views"_a, "rows"_a, "keep"_a, "positions"_a, "hidden"_a, release())
        .def(
            "logits", [](Stack& s, At<const float> hidden, size_t rows, At<float> out) { s.logits(hidden, rows, out); },
            "hidden"_a, "rows"_a, "out"_a, release())
        .def("choose", &choose, "hidden"_a, "rows"_a, "temperatures"_a, "keys"_a, release());

    nb::class_<DraftStack>(m, "DraftStack")
        .def(nb::init<const Config&, const std::vector<Layer>&, const DraftConfig&>(), "config"_a, "layers"_a,
             "draft"_a)
        .def("candidates", &DraftStack::candidates)
        .def(
            "step",
            [](DraftStack& d, At<const float> input, const Caches& caches, const Views& views,
               const Positions& positions, At<float> state, At<float> projected) {
                d.step(input, segments_of(views, positions), caches.layers.data(), state, projected);
            },
            "input"_a, "caches"_a, "views"_a, "positions"_a, "state"_a, "projected"_a, release())
        .def(
            "score",
            [](DraftStack& d, At<const float> state, size_t rows, At<float> logits, At<int64_t> ids) {
                d.score(state, rows, logits, ids);
            },
            "state"_a, "rows"_a, "logits"_a, "ids"_a, release())
        .def("draft", &draft, "last"_a, "hidden"_a, "caches"_a, "views"_a, "positions"_a, "counts"_a, "stops"_a,
             "temperatures"_a, "keys"_a, "tokens"_a, "confidences"_a, "made"_a, release());
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // of a process that ends while a thread still holds models
    bind_constants(m);
    bind_model(m);
    bind_calls(m);
    bind_operators(m);
}
