// Python's view of single operators, for tests and benchmarks.
#pragma once

#include <nanobind/nanobind.h>

namespace gemma {

void bind_operators(nanobind::module_& m);

}  // namespace gemma
