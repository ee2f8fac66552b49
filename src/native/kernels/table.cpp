// The table of one instruction set's operators, and the choice among weight types. GEMMA_ISA names the namespace and
// the function that returns the table.
#include "attention.h"
#include "elementwise.h"
#include "products.h"

namespace gemma {
namespace GEMMA_ISA {
namespace {

void reserve_one(const Weight& w, size_t M, Activations& out) {
    out.borrowed = nullptr;
    switch (w.type) {
        case WeightType::F32: return reserve_dense<Wide>(M, w.cols, out);
        case WeightType::BF16: return reserve_dense<Half>(M, w.cols, out);
        case WeightType::PANELS: return reserve_panels(M, w.cols, out);
        case WeightType::INT8: return reserve_quantised<WeightType::INT8>(M, w.cols, out);
        case WeightType::INT8_32: return reserve_quantised<WeightType::INT8_32>(M, w.cols, out);
        case WeightType::INT4: return reserve_quantised<WeightType::INT4>(M, w.cols, out);
        case WeightType::INT2: return reserve_quantised<WeightType::INT2>(M, w.cols, out);
    }
}

void prepare_one(const Weight& w, size_t M, const Area& area, bool whole, const float* x, size_t ldx,
                 Activations& out) {
    switch (w.type) {
        case WeightType::F32: return prepare_dense<Wide>(M, w.cols, area, x, ldx, out);
        case WeightType::BF16: return prepare_dense<Half>(M, w.cols, area, x, ldx, out);
        case WeightType::PANELS: return prepare_panels(w.cols, area, x, ldx, out);
        case WeightType::INT8: return prepare_quantised<WeightType::INT8>(M, w.cols, area, whole, x, ldx, out);
        case WeightType::INT8_32: return prepare_quantised<WeightType::INT8_32>(M, w.cols, area, whole, x, ldx, out);
        case WeightType::INT4: return prepare_quantised<WeightType::INT4>(M, w.cols, area, whole, x, ldx, out);
        case WeightType::INT2: return prepare_quantised<WeightType::INT2>(M, w.cols, area, whole, x, ldx, out);
    }
}

void multiply_one(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, bool whole, float* y,
                  size_t ldy, const Next& then) {
    const void* next = then.weights;
    switch (w.type) {
        case WeightType::F32: return linear_dense<Wide>(w, x, M, n0, n1, y, ldy, next);
        case WeightType::BF16: return linear_dense<Half>(w, x, M, n0, n1, y, ldy, next);
        case WeightType::PANELS: return linear_panels(w, x, M, n0, n1, y, ldy, then);
        case WeightType::INT8: return linear_quantised<WeightType::INT8>(w, x, M, n0, n1, whole, y, ldy, next);
        case WeightType::INT8_32: return linear_quantised<WeightType::INT8_32>(w, x, M, n0, n1, whole, y, ldy, next);
        case WeightType::INT4: return linear_quantised<WeightType::INT4>(w, x, M, n0, n1, whole, y, ldy, next);
        case WeightType::INT2: return linear_quantised<WeightType::INT2>(w, x, M, n0, n1, whole, y, ldy, next);
    }
}

// Returns the rows as way i prepares them.
Activations& way(Activations& x, size_t i) { return i == 0 ? x : x.more[i - 1]; }
const Activations& way(const Activations& x, size_t i) { return i == 0 ? x : x.more[i - 1]; }

void reserve(const Weight& w, size_t M, Activations& out) {
    if (out.more.size() + 1 < w.inputs()) out.more.resize(w.inputs() - 1);
    for (size_t i = 0; i < w.inputs(); i++) reserve_one(w, M, way(out, i));
}

// Rounded activations are multiplied as whole numbers of steps, which every weight type holds exactly. `linear`
// multiplies with the scale afterwards.
void prepare(const Weight& w, size_t M, const Area& area, const float* x, size_t ldx, Activations& out) {
    static thread_local Buffer<float> row;
    const size_t n = area.k1 - area.k0;
    for (size_t i = 0; i < w.inputs(); i++) {
        const float scale = w.input(i);
        if (scale == 0) {
            prepare_one(w, M, area, false, x, ldx, way(out, i));
            continue;
        }
        for (size_t m = area.m0; m < area.m1; m++) {
            steps(x + (m - area.m0) * ldx, scale, n, grown(row, n));
            prepare_one(w, M, {m, m + 1, area.k0, area.k1}, true, row.data(), n, way(out, i));
        }
    }
}

void prepare_all(const Weight& w, size_t M, const float* x, size_t ldx, Activations& out) {
    reserve(w, M, out);
    const bool as_it_is = w.type == WeightType::PANELS && w.inputs() == 1 && w.input(0) == 0;
    if (as_it_is && panels_read_in_place(M, ldx)) out.borrowed = x, out.apart = ldx;
    else prepare(w, M, {0, M, 0, w.cols}, x, ldx, out);
}

void linear(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
            const Next& then) {
    if (n0 >= n1) return;
    const bool apart = w.inputs() > 1;
    if (!apart) multiply_one(w, x, M, n0, n1, w.input(0) != 0, y, ldy, then);
    size_t begin = n0;
    for (size_t i = 0; i < w.rounding.size() && begin < n1; i++) {
        const Rounding& r = w.rounding[i];
        const size_t end = std::min(r.end, n1);
        if (begin >= end) continue;
        float* out = y + (begin - n0);
        if (apart) multiply_one(w, way(x, i), M, begin, end, r.input != 0, out, ldy, end == n1 ? then : Next());
        if (r.input != 0 || r.output != 0)
            for (size_t m = 0; m < M; m++) rounded(out + m * ldy, r.input != 0 ? r.input : 1.0f, r.output, end - begin);
        begin = end;
    }
}

template <class T>
void gather_dense(const T* from, float factor, size_t n, float* out) {
    each(n, [&](size_t i, int w) {
        put(out + i, mul(w == W ? load(from + i) : load_part(from + i, w), set1(factor)), w);
    });
}

void gather_panels(const Weight& table, size_t row, float factor, float* out) {
    uint32_t pairs[W];
    for (size_t i = 0; i < table.cols; i += 2 * W) {
        const uint32_t* from = table.panels(row, i / 2) + row % PANEL_ROWS;  // a part holds the next W pairs, too
        for (size_t k = 0; k < W; k++) pairs[k] = from[k * PANEL_ROWS];
        for (size_t k = 0; k < 2; k++) store(out + i + k * W, mul(load((const uint16_t*)pairs + k * W), set1(factor)));
    }
}

void gather(const Weight& table, size_t row, float factor, float* out) {
    const size_t n = table.cols;
    switch (table.type) {
        case WeightType::F32: return gather_dense((const float*)table.data + row * n, factor, n, out);
        case WeightType::BF16: return gather_dense((const uint16_t*)table.data + row * n, factor, n, out);
        case WeightType::PANELS: return gather_panels(table, row, factor, out);
        case WeightType::INT8: return gather_quantised<WeightType::INT8>(table, row, factor, out);
        case WeightType::INT8_32: return gather_quantised<WeightType::INT8_32>(table, row, factor, out);
        case WeightType::INT4: return gather_quantised<WeightType::INT4>(table, row, factor, out);
        case WeightType::INT2: return gather_quantised<WeightType::INT2>(table, row, factor, out);
    }
}

}  // namespace
}  // namespace GEMMA_ISA

#define GEMMA_JOIN_(a, b) a##b
#define GEMMA_JOIN(a, b) GEMMA_JOIN_(a, b)
#define GEMMA_TEXT_(a) #a
#define GEMMA_TEXT(a) GEMMA_TEXT_(a)

const Kernels& GEMMA_JOIN(kernels_, GEMMA_ISA)() {
    using namespace GEMMA_ISA;
    static const Kernels all{GEMMA_TEXT(GEMMA_ISA),
                             reserve,
                             prepare,
                             prepare_all,
                             linear,
                             rms_norm,
                             add_rms_norm,
                             rotate,
                             gated,
                             scale,
                             axpy,
                             softcap,
                             gather,
                             attend,
                             softmax,
                             largest};
    return all;
}

}  // namespace gemma
