// The hot operators on one thread's share of the work, chosen at run time for the machine's instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace gemma {

constexpr size_t LINE = 64;  // bytes of a cache line

// Memory that begins at a cache line: no vector within is spread over two, which would take two loads.
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

enum class Type : int { F32 = 0, BF16 = 1, I8 = 2, I4 = 3, PANELS = 4 };

// Where the type is PANELS: weight rows of a panel, of a group of panels, and pairs of columns of a part.
constexpr size_t PANEL_ROWS = 16, GROUP_ROWS = 64, PART_PAIRS = 64;

// A weight matrix [rows, cols], row by row. Quantised types have whole blocks of 64 columns, and float scales in order:
//   I8  int8, value = data * scale; one scale a block
//   I4  32 bytes a block, each value stored as value / scale + 8, two a byte. A block is two groups of 32 columns with a
//       scale each; place 8 u + 4 g + j holds column 4 u + j of group g; byte i holds place i in its low and place
//       i + 32 in its high half. So one vector holds both groups in turn, four columns at a time.
// PANELS is bf16 in another order, of whole panels of rows and whole steps of 32 columns: GROUP_ROWS rows after one another,
// or fewer at the end; of them PART_PAIRS pairs of columns, or fewer at the end; of this part panel by panel, and of a panel
// the first two columns, row by row, then the next two. So a vector holds two columns of some rows, and sums of products
// with it have a row to each lane, which BF16's need to be summed across lanes for; and what rows of activations go through
// together lies in one piece.
struct Weight {
    Type type = Type::F32;
    const void* data = nullptr;
    const float* scales = nullptr;  // [rows, cols / 64], I4 [rows, cols / 32]
    size_t rows = 0, cols = 0;

    size_t row_bytes() const {
        switch (type) {
            case Type::F32: return cols * 4;
            case Type::BF16: case Type::PANELS: return cols * 2;
            case Type::I8: return cols;
            default: return cols / 2;
        }
    }
    // PANELS: two columns of the rows of `row`'s panel.
    const uint32_t* panels(size_t row, size_t pair) const {
        const size_t group = row / GROUP_ROWS * GROUP_ROWS, part = pair / PART_PAIRS * PART_PAIRS, pairs = cols / 2;
        return (const uint32_t*)data + group * pairs + part * std::min(GROUP_ROWS, rows - group)
             + (row - group) / PANEL_ROWS * std::min(PART_PAIRS, pairs - part) * PANEL_ROWS + (pair - part) * PANEL_ROWS;
    }
    // Where a share of the rows that begins with one is read first.
    const void* first_read(size_t row) const {
        return type == Type::PANELS ? (const void*)panels(row, 0) : (const char*)data + row * row_bytes();
    }
};

// Rows of activations in the form that a type of weights is multiplied with, made by `prepare`.
struct Rows {
    const float* borrowed = nullptr;  // where `prepare_all` left them as they are: the rows, `apart` from one another
    size_t apart = 0;
    Buffer<float> wide;      // floating point; for PANELS row by row, as `half` is
    Buffer<uint16_t> half;   // bf16, in place of `wide` where the machine multiplies it
    Buffer<int8_t> values;   // I8, I4: quantised by row and group, in the weights' order
    Buffer<float> scales;    // a group's
    Buffer<int32_t> starts;  // where the sum of a lane begins for a group, see `start_of`
};

// Rows and columns of activations; the columns in blocks of AREA_COLS, but for what is left of the last.
constexpr size_t AREA_COLS = 64;
struct Area {
    size_t m0, m1, k0, k1;
};

// What one query row sees: positions first .. last, and where they lie.
struct Visible {
    int64_t first, last;
};

// Keys and values of one head: positions in blocks of BLOCK_ROWS, [d] each; block i of a sequence lies at table[i].
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

// Stretches of memory to fetch, one after the other.
class Stretches {
   public:
    void clear() { all_.clear(), at_ = 0; }
    void add(const void* begin, size_t lines) { all_.push_back({(const char*)begin, lines}); }
    // Where the next `lines` or fewer are, which are taken for fetched; null where nothing is left.
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

// What a thread reads after a product: weights, fetched at its end, and what else there is time to fetch throughout, which
// PANELS have where they are multiplied by many rows. Both may be null.
struct Next {
    Next(const void* weights = nullptr, Stretches* also = nullptr) : weights(weights), also(also) {}
    const void* weights;
    Stretches* also;
};

struct Kernels {
    const char* name;

    // Room for M rows made ready for weights of w's type and columns
    void (*reserve)(const Weight& w, size_t M, Rows& out);
    // An area of M such rows made ready, where there is room; x is where it begins
    void (*prepare)(const Weight& w, size_t M, const Area& area, const float* x, size_t ldx, Rows& out);
    // Both for all M rows, which may be left where they are: they must stay as they are until they have been multiplied
    void (*prepare_all)(const Weight& w, size_t M, const float* x, size_t ldx, Rows& out);
    // y[m, n - n0] = x[m] . w[n] for n0 <= n < n1
    void (*linear)(const Weight& w, const Rows& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy, const Next& then);
    // out = x / rms(x) * weight; weight may be null; out may be x
    void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* out);
    // residual += x / rms(x) * weight
    void (*add_rms_norm)(float* residual, const float* x, const float* weight, float eps, size_t n);
    // x[i] = x[i] cos[i] + x[(i + n / 2) % n] sin[i]; the first half of sin is negated
    void (*rotate)(float* x, const float* cos, const float* sin, size_t n);
    // out = gelu(gate) * up
    void (*gated)(const float* gate, const float* up, size_t n, float* out);
    void (*scale)(float* x, float factor, size_t n);
    void (*axpy)(float* y, float factor, const float* x, size_t n);
    // x = tanh(x / cap) * cap
    void (*softcap)(float* x, float cap, size_t n);
    // out[i] = table row as floats, times factor
    void (*gather)(const Weight& table, size_t row, float factor, float* out);
    // Softmax attention of Q query rows [Q, d] (stride ldq) over one head; results to out (stride ldo).
    void (*attend)(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out, size_t ldo);
    void (*softmax)(float* x, size_t n);
    float (*largest)(const float* x, size_t n);
};

const Kernels& kernels_portable();
// The portable ones with one fault, for tests that must see it: several rows are summed in another order than one.
const Kernels& kernels_control();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();  // where the compiler knows it: GEMMA_WITH_AMX
#endif

}  // namespace gemma
