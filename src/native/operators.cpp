#include "operators.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "address.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace gemma {
namespace {

const Kernels& named(const std::string& isa) {
    const Kernels* k = kernels_named(isa.c_str());
    if (!k) throw std::invalid_argument("this machine has no " + isa);
    return *k;
}

void linear(const std::string& isa, const Weight& w, At<const float> x, size_t rows, At<float> y) {
    const Kernels& k = named(isa);
    Pool::instance().run([&](Worker& me) {
        static thread_local Activations prepared;
        const Part p = me.part(w.rows, 8);
        k.prepare_all(w, rows, x, w.cols, prepared);
        k.linear(w, prepared, rows, p.begin, p.end, y + p.begin, w.rows, nullptr);
    });
}

void attend(const std::string& isa, At<const float> q, size_t queries, const std::vector<int64_t>& first,
            const std::vector<int64_t>& last, At<const float> keys, At<const float> values,
            const std::vector<int32_t>& table, size_t d, At<float> out) {
    std::vector<Visible> visible;
    for (size_t i = 0; i < queries; i++) visible.push_back({first.at(i), last.at(i)});
    named(isa).attend(q, d, queries, visible.data(), {keys, values, table.data(), d}, out, d);
}

}  // namespace

void bind_operators(nb::module_& m) {
    m.def("linear", &linear, "isa"_a, "w"_a, "x"_a, "rows"_a, "y"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def("attend", &attend, "isa"_a, "q"_a, "queries"_a, "first"_a, "last"_a, "keys"_a, "values"_a, "table"_a, "d"_a,
          "out"_a);
    m.def(
        "rms_norm",
        [](const std::string& isa, At<const float> x, At<const float> weight, float eps, size_t n, At<float> out) {
            named(isa).rms_norm(x, weight, eps, n, out);
        },
        "isa"_a, "x"_a, "weight"_a, "eps"_a, "n"_a, "out"_a);
    m.def(
        "rotate",
        [](const std::string& isa, At<float> x, At<const float> cos, At<const float> sin, size_t n) {
            named(isa).rotate(x, cos, sin, n);
        },
        "isa"_a, "x"_a, "cos"_a, "sin"_a, "n"_a);
    m.def(
        "gated",
        [](const std::string& isa, At<const float> gate, At<const float> up, size_t n, At<float> out) {
            named(isa).gated(gate, up, n, out);
        },
        "isa"_a, "gate"_a, "up"_a, "n"_a, "out"_a);
    m.def(
        "softcap", [](const std::string& isa, At<float> x, float cap, size_t n) { named(isa).softcap(x, cap, n); },
        "isa"_a, "x"_a, "cap"_a, "n"_a);
    m.def(
        "softmax", [](const std::string& isa, At<float> x, size_t n) { named(isa).softmax(x, n); }, "isa"_a, "x"_a,
        "n"_a);
    m.def(
        "gather",
        [](const std::string& isa, const Weight& table, size_t row, float factor, At<float> out) {
            named(isa).gather(table, row, factor, out);
        },
        "isa"_a, "table"_a, "row"_a, "factor"_a, "out"_a);
}

}  // namespace gemma
