// The products with each weight type. `table.cpp` chooses among them.
#pragma once

#include "formats.h"

namespace gemma {
namespace GEMMA_ISA {

// dense.cpp: floating-point weights, row by row. F is Wide or Half.
template <class F>
void reserve_dense(size_t M, size_t K, Activations& out);
template <class F>
void prepare_dense(size_t M, size_t K, const Area& area, const float* x, size_t ldx, Activations& out);
template <class F>
void linear_dense(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                  const void* then);
// y[m, n] = x[m] . w[n] for `count` rows of w. x is prepared. As many rows of `beside`, which may be null, are
// prefetched meanwhile.
template <class F>
void multiply(const typename F::T* w, size_t K, const typename F::X* x, size_t M, size_t count, float* y, size_t ldy,
              const void* then, const typename F::T* beside);

// panels.cpp: bf16 weights in panels
void reserve_panels(size_t M, size_t K, Activations& out);
void prepare_panels(size_t K, const Area& area, const float* x, size_t ldx, Activations& out);
bool panels_read_in_place(size_t M, size_t ldx);
void linear_panels(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                   const Next& then);

// quantised.cpp: INT8, INT8_32, INT4 and INT2 weights. `whole`: the activations are whole numbers from -128 to 127.
template <WeightType T>
void reserve_quantised(size_t M, size_t K, Activations& out);
template <WeightType T>
void prepare_quantised(size_t M, size_t K, const Area& area, bool whole, const float* x, size_t ldx, Activations& out);
template <WeightType T>
void linear_quantised(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, bool whole, float* y,
                      size_t ldy, const void* then);
// out[i] = a row of the table as floats, times factor
template <WeightType T>
void gather_quantised(const Weight& table, size_t row, float factor, float* out);

}  // namespace GEMMA_ISA
}  // namespace gemma
