// Weight matrices as they lie in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace gemma {

constexpr size_t LINE = 64;  // bytes of a cache line

// Allocates memory that begins at a cache line. No vector in it crosses two lines, which would take two loads.
template <class T>
struct LineAllocator {
    using value_type = T;

    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t{LINE}); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{LINE}); }
    bool operator==(const LineAllocator&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

// Makes room for n elements; a buffer never shrinks. Returns the first element.
template <class V>
typename V::value_type* grown(V& buffer, size_t n) {
    if (buffer.size() < n) buffer.resize(n);
    return buffer.data();
}

// How a weight is stored. Python reads these numbers from the module.
enum class WeightType : int { F32, BF16, INT8, INT4, PANELS, INT8_32, INT2 };

// Columns of a block of a quantised weight.
constexpr size_t QUANTISED_BLOCK = 64;

// Returns how many columns of a quantised weight share a scale; 0 where the type has no scales.
constexpr size_t quantised_group(WeightType type) {
    switch (type) {
        case WeightType::INT8:
        case WeightType::INT2: return 64;
        case WeightType::INT8_32:
        case WeightType::INT4: return 32;
        default: return 0;
    }
}

// The layout of PANELS: weight rows of a panel, weight rows of a group of panels, column pairs of a part.
constexpr size_t PANEL_ROWS = 16, GROUP_ROWS = 64, PART_PAIRS = 64;

// How the products of some rows of a weight are rounded, up to row `end`: activations x become
// clamp(round(x / scale), -128, 127) * scale, with `input` as the scale before the product and `output` after it. A
// scale of 0 rounds nothing. Checkpoints that were trained with activations of 8 bits store such scales.
struct Rounding {
    size_t end;
    float input, output;
};

// A weight matrix [rows, cols], row by row.
//
// A quantised weight has whole blocks of 64 columns. Its float scales lie in the order of the columns.
//   INT8     A value is data * scale. A block has one scale.
//   INT8_32  A value is data * scale. A block is two groups of 32 columns with a scale each. Place 8 u + 4 g + j holds
//            column 4 u + j of group g. So one vector holds both groups in turn, four columns at a time.
//   INT4     A block takes 32 bytes. Each value is stored as value / scale + 8, two to a byte. The places are those of
//            INT8_32. Byte i holds place i in its low half and place i + 32 in its high half.
//   INT2     A block takes 16 bytes and has one scale. Each value is stored as value / scale + 2, four to a byte. Byte
//   i
//            holds columns i, i + 16, i + 32 and i + 48, from its lowest bits on.
//
// PANELS is bf16 in another order. It has whole panels of rows and whole steps of 32 columns. Groups of GROUP_ROWS rows
// follow one another; the last may be smaller. Inside a group, parts of PART_PAIRS column pairs follow one another; the
// last may be smaller. Inside a part, panels follow one another. Inside a panel, the first two columns come row by row,
// then the next two. So a vector holds two columns of some rows, and each row sums in a lane of its own. BF16 needs a
// sum across lanes instead. A part lies in one piece, which several rows of activations read together.
struct Weight {
    WeightType type = WeightType::F32;
    const void* data = nullptr;
    const float* scales = nullptr;  // [rows, cols / group]
    size_t rows = 0, cols = 0;
    std::vector<Rounding> rounding;  // of all rows, part by part; empty where nothing is rounded

    // Returns in how many ways activations are prepared: one, unless parts of the rows round them differently.
    size_t inputs() const {
        const auto other = [this](const Rounding& r) { return r.input != rounding[0].input; };
        return std::any_of(rounding.begin(), rounding.end(), other) ? rounding.size() : 1;
    }
    // Returns the scale that the activations of way i are rounded by.
    float input(size_t i) const { return rounding.empty() ? 0.0f : rounding[i].input; }

    size_t row_bytes() const {
        switch (type) {
            case WeightType::F32: return cols * 4;
            case WeightType::BF16:
            case WeightType::PANELS: return cols * 2;
            case WeightType::INT8:
            case WeightType::INT8_32: return cols;
            case WeightType::INT2: return cols / 4;
            default: return cols / 2;
        }
    }
    size_t bytes() const { return rows * row_bytes(); }

    // PANELS only: returns where a column pair of the panel of `row` begins.
    const uint32_t* panels(size_t row, size_t pair) const {
        const size_t group = row / GROUP_ROWS * GROUP_ROWS, part = pair / PART_PAIRS * PART_PAIRS, pairs = cols / 2;
        return (const uint32_t*)data + group * pairs + part * std::min(GROUP_ROWS, rows - group) +
               (row - group) / PANEL_ROWS * std::min(PART_PAIRS, pairs - part) * PANEL_ROWS +
               (pair - part) * PANEL_ROWS;
    }
    // Returns what is read first of a share of the rows that begins with `row`.
    const void* first_read(size_t row) const {
        return type == WeightType::PANELS ? (const void*)panels(row, 0) : (const char*)data + row * row_bytes();
    }
};

}  // namespace gemma
