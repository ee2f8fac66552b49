// Holds the kernels of one instruction set to their rules, without Python: for machines that are only emulated.
//
//   * products equal double precision's within float32's error, and those of quantised weights the portable kernels';
//   * a row's result has the same bits whatever rows share its call, and so has a query row's attention;
//   * the other operators equal the portable ones.
//
// usage: kernels_check. Prints a line for each check that fails, then how many passed.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "../../src/native/dispatch.h"

using namespace gemma;

static std::mt19937 rng(1);
static int passed = 0, failed = 0;

static float gauss() { return std::normal_distribution<float>()(rng); }

static std::vector<float> gausses(size_t n) {
    std::vector<float> all(n);
    for (float& x : all) x = gauss();
    return all;
}

static uint16_t bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float wide(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float all;
    std::memcpy(&all, &bits, 4);
    return all;
}

static bool quiet = false;

static void hold(bool right, const char* isa, const char* what, size_t a, size_t b) {
    (right ? passed : failed)++;
    if (!right && !quiet) std::printf("%s: %s (%zu, %zu)\n", isa, what, a, b);
}

static bool close(const float* a, const float* b, size_t n, double share) {
    double size = 0, off = 0;
    for (size_t i = 0; i < n; i++)
        size = std::max(size, std::fabs((double)b[i])), off = std::max(off, std::fabs((double)a[i] - b[i]));
    return off <= share * size;  // false where anything is not a number
}

struct Stored {
    Weight weight;
    Buffer<uint8_t> data;
    Buffer<float> scales;
    std::vector<float> values;  // [rows, cols], of the types that have no scales
};

static Stored stored(WeightType type, size_t rows, size_t cols) {
    Stored s;
    s.weight.type = type, s.weight.rows = rows, s.weight.cols = cols;
    s.data.resize(s.weight.bytes() + 2 * LINE);
    s.weight.data = s.data.data();
    if (const size_t group = quantised_group(type)) {
        for (uint8_t& byte : s.data) byte = (uint8_t)rng();
        if (type != WeightType::INT4 && type != WeightType::INT2)
            for (uint8_t& byte : s.data)
                if (byte == 128) byte = 127;
        s.scales.resize(rows * cols / group);
        for (float& scale : s.scales) scale = 0.01f + 0.01f * std::fabs(gauss());
        s.weight.scales = s.scales.data();
        return s;
    }
    s.values = gausses(rows * cols);
    for (size_t n = 0; n < rows; n++)
        for (size_t k = 0; k < cols; k++) {
            float& value = s.values[n * cols + k];
            if (type == WeightType::F32) {
                ((float*)s.data.data())[n * cols + k] = value;
                continue;
            }
            const uint16_t narrow = bf16(value);
            value = wide(narrow);
            if (type == WeightType::BF16) ((uint16_t*)s.data.data())[n * cols + k] = narrow;
            else ((uint16_t*)(s.weight.panels(n / PANEL_ROWS * PANEL_ROWS, k / 2) + n % PANEL_ROWS))[k % 2] = narrow;
        }
    return s;
}

static std::vector<float> product(const Kernels& kernels, const Weight& w, size_t M, const float* x) {
    Activations in;
    std::vector<float> y(M * w.rows, NAN);
    kernels.prepare_all(w, M, x, w.cols, in);
    kernels.linear(w, in, M, 0, w.rows, y.data(), w.rows, Next());
    return y;
}

static void check_linear(const Kernels& kernels, WeightType type, const char* name, size_t rows, size_t cols) {
    constexpr size_t MOST = 9;
    const Stored s = stored(type, rows, cols);
    const std::vector<float> x = gausses(MOST * cols);
    std::vector<float> alone, expected;
    for (size_t m = 0; m < MOST; m++) {
        const std::vector<float> row = product(kernels, s.weight, 1, x.data() + m * cols);
        alone.insert(alone.end(), row.begin(), row.end());
        for (size_t n = 0; n < rows && !s.values.empty(); n++) {
            double sum = 0;
            for (size_t k = 0; k < cols; k++) sum += (double)s.values[n * cols + k] * x[m * cols + k];
            expected.push_back((float)sum);
        }
    }
    if (expected.empty()) expected = product(kernels_portable(), s.weight, MOST, x.data());
    hold(close(alone.data(), expected.data(), alone.size(), 2e-6 * std::sqrt((double)cols)), kernels.name, name, rows,
         cols);
    for (size_t M = 2; M <= MOST; M++) {
        const std::vector<float> together = product(kernels, s.weight, M, x.data());
        hold(!std::memcmp(together.data(), alone.data(), M * rows * sizeof(float)), kernels.name, name, M, cols);
    }
}

// Products that are rounded by static scales, part by part: whole steps of the last scale, and the same bits for a row.
static void check_rounding(const Kernels& kernels, WeightType type, const char* name, size_t rows, size_t cols) {
    constexpr size_t MOST = 9;
    Stored s = stored(type, rows, cols);
    const size_t middle = rows / 2 / PANEL_ROWS * PANEL_ROWS;
    s.weight.rounding = {{middle, 0.01f, 0.0f}, {rows, 0.04f, 0.5f}};
    const std::vector<float> x = gausses(MOST * cols);
    const std::vector<float> together = product(kernels, s.weight, MOST, x.data());
    const std::vector<float> expected = product(kernels_portable(), s.weight, MOST, x.data());
    bool whole = true;
    size_t apart = 0;
    for (size_t m = 0; m < MOST; m++) {
        const float *ours = &together[m * rows], *theirs = &expected[m * rows];
        const std::vector<float> row = product(kernels, s.weight, 1, x.data() + m * cols);
        hold(!std::memcmp(row.data(), ours, rows * sizeof(float)), kernels.name, name, m, cols);
        hold(close(ours, theirs, middle, 2e-6 * std::sqrt((double)cols)), kernels.name, name, m, cols);
        for (size_t n = middle; n < rows; n++) {
            whole &= std::fabs(ours[n]) <= 64.0f && ours[n] * 2 == std::nearbyint(ours[n] * 2);
            apart += ours[n] != theirs[n];  // halfway between steps
        }
    }
    hold(whole && 50 * apart <= MOST * rows, kernels.name, name, apart, cols);
}

static void check_attention(const Kernels& kernels, size_t d, int64_t length) {
    constexpr size_t Q = 5;
    const std::vector<float> q = gausses(Q * d), keys = gausses(4 * BLOCK_ROWS * d),
                             values = gausses(4 * BLOCK_ROWS * d);
    const int32_t table[] = {2, 0, 3, 1};
    const HeadRows rows{keys.data(), values.data(), table, d};
    std::vector<Visible> visible;
    for (size_t i = 0; i < Q; i++) visible.push_back({(int64_t)i, length - (int64_t)Q + (int64_t)i});
    std::vector<float> together(Q * d), alone(Q * d), expected(Q * d);
    kernels.attend(q.data(), d, Q, visible.data(), rows, together.data(), d);
    for (size_t i = 0; i < Q; i++) kernels.attend(&q[i * d], d, 1, &visible[i], rows, &alone[i * d], d);
    for (size_t i = 0; i < Q; i++) {
        std::vector<double> out(d);
        double total = 0;
        for (int64_t p = visible[i].first; p <= visible[i].last; p++) {
            double score = 0;
            for (size_t k = 0; k < d; k++) score += (double)q[i * d + k] * keys[rows.offset(p) + k];
            const double weight = std::exp(score);
            total += weight;
            for (size_t k = 0; k < d; k++) out[k] += weight * values[rows.offset(p) + k];
        }
        for (size_t k = 0; k < d; k++) expected[i * d + k] = (float)(out[k] / total);
    }
    hold(close(together.data(), expected.data(), Q * d, 1e-4), kernels.name, "attention", d, (size_t)length);
    hold(!std::memcmp(together.data(), alone.data(), Q * d * sizeof(float)), kernels.name, "attention by rows", d,
         (size_t)length);
}

static void check_elementwise(const Kernels& kernels, size_t n) {
    const Kernels& portable = kernels_portable();
    const std::vector<float> x = gausses(n), other = gausses(n);
    std::vector<float> a(n), b(n);
    const auto same = [&](const char* what) { hold(close(a.data(), b.data(), n, 2e-6), kernels.name, what, n, 0); };
    kernels.rms_norm(x.data(), other.data(), 1e-6f, n, a.data()),
        portable.rms_norm(x.data(), other.data(), 1e-6f, n, b.data());
    same("rms_norm");
    kernels.gated(x.data(), other.data(), n, a.data()), portable.gated(x.data(), other.data(), n, b.data());
    same("gated");
    a = b = x;
    kernels.softmax(a.data(), n), portable.softmax(b.data(), n);
    same("softmax");
    a = b = x;
    kernels.softcap(a.data(), 3.0f, n), portable.softcap(b.data(), 3.0f, n);
    same("softcap");
    a = b = x;
    kernels.axpy(a.data(), 0.3f, other.data(), n), portable.axpy(b.data(), 0.3f, other.data(), n);
    same("axpy");
    hold(kernels.largest(x.data(), n) == portable.largest(x.data(), n), kernels.name, "largest", n, 0);
}

// Returns whether the kernels with a fault in them are found out.
static bool sees_the_control() {
    quiet = true;
    check_linear(*kernels_named("control"), WeightType::F32, "float32", 37, 320);
    const bool seen = failed > 0;
    quiet = false, passed = failed = 0;
    return seen;
}

int main() {
    if (!sees_the_control()) return std::puts("the fault of the control kernels was not seen"), 1;
    for (const char* name : ISAS) {
        const Kernels* kernels = kernels_named(name);
        if (!kernels) continue;
        for (size_t cols : {64, 128, 320, 1088}) {
            check_linear(*kernels, WeightType::F32, "float32", 37, cols);
            check_linear(*kernels, WeightType::BF16, "bfloat16", 37, cols);
            check_linear(*kernels, WeightType::INT8, "int8", 37, cols);
            check_linear(*kernels, WeightType::INT8_32, "int8 by 32", 37, cols);
            check_linear(*kernels, WeightType::INT4, "int4", 37, cols);
            check_linear(*kernels, WeightType::INT2, "int2", 37, cols);
            check_linear(*kernels, WeightType::PANELS, "panels", 144, cols);
            check_rounding(*kernels, WeightType::F32, "float32, rounded", 37, cols);
            check_rounding(*kernels, WeightType::INT8, "int8, rounded", 37, cols);
            check_rounding(*kernels, WeightType::INT2, "int2, rounded", 37, cols);
            check_rounding(*kernels, WeightType::PANELS, "panels, rounded", 144, cols);
        }
        check_linear(*kernels, WeightType::F32, "float32", 5, 21);
        check_linear(*kernels, WeightType::BF16, "bfloat16", 5, 21);
        for (size_t d : {32, 64, 80})
            for (int64_t length : {6, 31, 33, 100}) check_attention(*kernels, d, length);
        for (size_t n : {1, 7, 8, 64, 321}) check_elementwise(*kernels, n);
        std::printf("%s: checked\n", kernels->name);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
