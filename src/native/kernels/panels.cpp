// Products with bf16 weights in panels.
//
// Every output element has one lane of one accumulator for each part of columns. It is filled in order of k, whatever
// the tile it is computed in. The sums of the parts are added in their order. The machine's own tiles go on from the
// sum of the parts before.
#include "panel_tiles.h"
#include "products.h"

namespace gemma {
namespace GEMMA_ISA {
namespace {

// Prepared rows lie a line further apart than they are long. Rows a multiple of SAME_SETS bytes apart would have every
// second row's columns in the same set of the first-level cache.
constexpr size_t apart_in_panels(size_t K) { return K + LINE / sizeof(Half::X); }
constexpr size_t SAME_SETS = 2048;

// What a product prefetches while it reads a part: `lines` lines from `next` on, then other memory.
struct Fetch {
    const uint32_t* next;
    const uint32_t* end;
    size_t each;  // lines at every column pair, so that the first passes fetch all
    Stretches* also;

    // Calls f(lines at every column pair as a constant, where they begin) for a pass of `pairs` column pairs.
    template <class Call>
    void step(size_t pairs, Call f) {
        if (next >= end) {
            const auto* other = also ? (const uint32_t*)also->take(pairs) : nullptr;
            if (other) return f(std::integral_constant<int, 1>(), other);
            return f(std::integral_constant<int, 0>(), next);
        }
        const size_t lines = each <= 2 ? each : each <= 4 ? 4 : 8;
        if (lines == 1) f(std::integral_constant<int, 1>(), next);
        else if (lines == 2) f(std::integral_constant<int, 2>(), next);
        else if (lines == 4) f(std::integral_constant<int, 4>(), next);
        else f(std::integral_constant<int, 8>(), next);
        next += pairs * lines * PANEL_ROWS;
    }
};

// Multiplies with the whole panels n0 .. n1 of one group.
void multiply_panels(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                     const uint32_t* then, Stretches* also, Tiles& tiles) {
    const auto* from = x.borrowed ? (const Half::X*)x.borrowed : Half::place(x).data();
    const size_t ldx = x.borrowed ? x.apart : apart_in_panels(w.cols);
    const size_t pairs = w.cols / 2, group_end = std::min((n0 / GROUP_ROWS + 1) * GROUP_ROWS, w.rows);
    const size_t panels = (n1 - n0) / PANEL_ROWS, together = panels_for(M);
    const size_t passes = (M + MAX_PANEL_TILE - 1) / MAX_PANEL_TILE * ((panels + together - 1) / together);
    for (size_t k = 0; k < pairs; k += PART_PAIRS) {
        const size_t count = std::min(PART_PAIRS, pairs - k), panel = count * PANEL_ROWS;
        const uint32_t* part = w.panels(n0, k);
        // after this part, the next part of the group is read, or the next group
        const size_t left = pairs - k - count, later = std::min(PART_PAIRS, left ? left : pairs);
        const auto* next = left ? w.panels(n0, k + count) : then ? then : (const uint32_t*)w.data + group_end * pairs;
        const size_t lines = (left ? panels : GROUP_PANELS) * later;
        Fetch fetch{next, next + lines * PANEL_ROWS, (lines + passes * count - 1) / (passes * count), also};
        each_tile(M, MAX_PANEL_TILE, false, [&](size_t m, size_t rows) {
            tiles.with(rows, [&](auto constant) {
                constexpr int NP = panels_for(constant);
                for (size_t n = 0; n < panels; n += NP)
                    with_constant<NP>(panels - n, [&](auto here) {
                        fetch.step(count, [&](auto lines_each, const uint32_t* fetched) {
                            panel_tile<constant, here, lines_each>(part + n * panel, from + m * ldx + 2 * k, ldx, count,
                                                                   fetched, k == 0, y + m * ldy + n * PANEL_ROWS, ldy);
                        });
                    });
            });
        });
    }
}

}  // namespace

void reserve_panels(size_t M, size_t K, Activations& out) { grown(Half::place(out), M * apart_in_panels(K)); }

// Writes the rows as `panel_tile` reads them: one after the other, in order.
void prepare_panels(size_t K, const Area& area, const float* x, size_t ldx, Activations& out) {
    const size_t apart = apart_in_panels(K);
    auto* place = Half::place(out).data();
    for (size_t m = area.m0; m < area.m1; m++, x += ldx)
        for (size_t k = area.k0; k < area.k1; k += Half::STEP)
            Half::convert_in_order(x + (k - area.k0), place + m * apart + k);
}

// Returns whether rows can be multiplied where they lie.
bool panels_read_in_place(size_t M, size_t ldx) {
    return std::is_same_v<Half::X, float> && (M == 1 || ldx * sizeof(float) % SAME_SETS);
}

// Goes through the groups of the share in turn. Of a panel that is only partly within the share, it keeps the columns
// that are.
void linear_panels(const Weight& w, const Activations& x, size_t M, size_t n0, size_t n1, float* y, size_t ldy,
                   const Next& then) {
    static thread_local Buffer<float> whole;
    Tiles tiles;
    for (size_t n = n0, end; n < n1; n = end) {
        const size_t begin = n / PANEL_ROWS * PANEL_ROWS;
        const size_t stop = std::min((n / GROUP_ROWS + 1) * GROUP_ROWS, w.rows);
        end = std::min(stop, n1);
        const auto* next = end == n1 ? (const uint32_t*)then.weights : nullptr;
        if (n == begin && end % PANEL_ROWS == 0) {
            multiply_panels(w, x, M, n, end, y + (n - n0), ldy, next, then.also, tiles);
            continue;
        }
        const size_t width = padded_to(end, PANEL_ROWS) - begin;
        grown(whole, M * width);
        multiply_panels(w, x, M, begin, begin + width, whole.data(), width, next, then.also, tiles);
        for (size_t m = 0; m < M; m++)
            std::copy_n(whole.data() + m * width + (n - begin), end - n, y + m * ldy + (n - n0));
    }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
