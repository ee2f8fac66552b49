// One vector type for each instruction set. The kernels are compiled once for each of them.
//
// Every function works lane by lane, or reduces by one fixed tree. So a result depends on the values alone, and never
// on how many rows or columns share a call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(GEMMA_AVX512) || defined(GEMMA_AVX2)
#include <immintrin.h>
#elif defined(GEMMA_NEON)
#include <arm_neon.h>
#endif

namespace gemma {
namespace GEMMA_ISA {

#if defined(GEMMA_AVX512)

constexpr int W = 16;  // lanes
using V = __m512;

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const uint16_t* p) {  // bf16
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// the even and the odd numbers of 2 W
inline V even(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline V odd(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)));
}
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V round(V a) { return _mm512_roundscale_ps(a, 0); }
inline V exponent(V n) {  // 2 ** n of whole numbers
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline void narrow(V whole, int8_t* out) {
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole)));
}
inline __m128 quarter(V v) {  // lanes i, i + 4, i + 8, i + 12 summed: ((i + (i + 8)) + ((i + 4) + (i + 12)))
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif defined(GEMMA_AVX2)

constexpr int W = 8;
using V = __m256;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline V even(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
inline V odd(const uint16_t* p) {
    // Loads and masks in one. The compiler would keep what `even` loaded in a register, and loops over tiles have none
    // left.
    __m256i v;
    asm("vpand %1, %2, %0" : "=x"(v) : "m"(*(const __m256i_u*)p), "x"(_mm256_set1_epi32((int)0xffff0000)));
    return _mm256_castsi256_ps(v);
}
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V exponent(V n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline void narrow(V whole, int8_t* out) {
    const __m256i wide = _mm256_cvtps_epi32(whole);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i*)out, _mm_packs_epi16(half, half));
}
inline __m128 quarter(V v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

#elif defined(GEMMA_NEON)

constexpr int W = 8;
struct V {  // lanes 0 .. 3 and 4 .. 7
    float32x4_t low, high;
};

inline V zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
inline V set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline float32x4_t widened(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
inline V load(const uint16_t* p) {
    const uint16x8_t bits = vld1q_u16(p);
    return {widened(vget_low_u16(bits)), widened(vget_high_u16(bits))};
}
inline V even(const uint16_t* p) {
    const uint32x4_t a = vreinterpretq_u32_u16(vld1q_u16(p)), b = vreinterpretq_u32_u16(vld1q_u16(p + 8));
    return {vreinterpretq_f32_u32(vshlq_n_u32(a, 16)), vreinterpretq_f32_u32(vshlq_n_u32(b, 16))};
}
inline V odd(const uint16_t* p) {
    const uint32x4_t a = vreinterpretq_u32_u16(vld1q_u16(p)), b = vreinterpretq_u32_u16(vld1q_u16(p + 8));
    const uint32x4_t mask = vdupq_n_u32(0xffff0000);
    return {vreinterpretq_f32_u32(vandq_u32(a, mask)), vreinterpretq_f32_u32(vandq_u32(b, mask))};
}
inline void store(float* p, V v) { vst1q_f32(p, v.low), vst1q_f32(p + 4, v.high); }
inline V fma(V a, V b, V c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
inline V add(V a, V b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline V sub(V a, V b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline V mul(V a, V b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline V div(V a, V b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline V max(V a, V b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
inline V min(V a, V b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
inline V round(V a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
inline float32x4_t power_of_two(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline V exponent(V n) { return {power_of_two(n.low), power_of_two(n.high)}; }
inline void narrow(V whole, int8_t* out) {
    const int16x8_t half = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(whole.low)), vqmovn_s32(vcvtnq_s32_f32(whole.high)));
    vst1_s8(out, vqmovn_s16(half));
}

#else  // portable: the vector extensions of GCC and Clang become NEON, SSE or whatever the machine has

constexpr int W = 8;
typedef float V __attribute__((vector_size(32)));
typedef int32_t VI __attribute__((vector_size(32)));

inline V zero() { return V{}; }
inline V set1(float x) { return V{x, x, x, x, x, x, x, x}; }
inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline V load(const uint16_t* p) {
    VI bits;
    for (int i = 0; i < W; i++) bits[i] = (int32_t)((uint32_t)p[i] << 16);
    return (V)bits;
}
inline V even(const uint16_t* p) {
    VI bits;
    for (int i = 0; i < W; i++) bits[i] = (int32_t)((uint32_t)p[2 * i] << 16);
    return (V)bits;
}
inline V odd(const uint16_t* p) {
    VI bits;
    for (int i = 0; i < W; i++) bits[i] = (int32_t)((uint32_t)p[2 * i + 1] << 16);
    return (V)bits;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V round(V a) {
    for (int i = 0; i < W; i++) a[i] = std::nearbyint(a[i]);
    return a;
}
inline void narrow(V whole, int8_t* out) {
    for (int i = 0; i < W; i++) out[i] = (int8_t)whole[i];
}
inline V exponent(V n) {
    VI bits;
    for (int i = 0; i < W; i++) bits[i] = ((int32_t)n[i] + 127) << 23;
    return (V)bits;
}

#endif

// sum += a * b, in place. The compiler alone would move sums from register to register, and spill some of them where a
// loop over a tile is unrolled.
inline void accumulate(V& sum, V a, V b) {
#if defined(GEMMA_AVX2)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
    sum = fma(a, b, sum);
#endif
}

#if defined(GEMMA_AVX512)

// Computes `sum` of sixteen vectors by the same tree. Those of the vectors 4 g .. 4 g + 3 go to out[g].
inline void sum16(const V* v, float* const* out) {
    V q[4];
    for (int j = 0; j < 4; j++) {  // the quarters of vectors j, j + 4, j + 8, j + 12, side by side
        V ab = add(_mm512_shuffle_f32x4(v[j], v[j + 4], 0x44), _mm512_shuffle_f32x4(v[j], v[j + 4], 0xee));
        V cd = add(_mm512_shuffle_f32x4(v[j + 8], v[j + 12], 0x44), _mm512_shuffle_f32x4(v[j + 8], v[j + 12], 0xee));
        q[j] = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    V low = add(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
    V high = add(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
    V all = add(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
    _mm_storeu_ps(out[0], _mm512_castps512_ps128(all));
    _mm_storeu_ps(out[1], _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(out[2], _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(out[3], _mm512_extractf32x4_ps(all, 3));
}

// Does the same for eight vectors.
inline void sum8(const V* v, float* const* out) {
    V ab[4];
    for (int j = 0; j < 4; j++)
        ab[j] = add(_mm512_shuffle_f32x4(v[j], v[j + 4], 0x44), _mm512_shuffle_f32x4(v[j], v[j + 4], 0xee));
    V q01 = add(_mm512_shuffle_f32x4(ab[0], ab[1], 0x88),
                _mm512_shuffle_f32x4(ab[0], ab[1], 0xdd));  // of vectors 0, 4, 1, 5
    V q23 = add(_mm512_shuffle_f32x4(ab[2], ab[3], 0x88), _mm512_shuffle_f32x4(ab[2], ab[3], 0xdd));
    V low = add(_mm512_unpacklo_ps(q01, q23), _mm512_unpackhi_ps(q01, q23));
    V all = add(low, _mm512_shuffle_ps(low, low, 0x4e));
    const __m512i places = _mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256 sums = _mm512_castps512_ps256(_mm512_permutexvar_ps(places, all));
    _mm_storeu_ps(out[0], _mm256_castps256_ps128(sums));
    _mm_storeu_ps(out[1], _mm256_extractf128_ps(sums, 1));
}

#endif

#if defined(GEMMA_AVX512) || defined(GEMMA_AVX2)

inline float sum(V v) {
    __m128 q = quarter(v);
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline void sum4(V a, V b, V c, V d, float* out) {  // `sum` of four vectors, by the same tree
    __m128 qa = quarter(a), qb = quarter(b), qc = quarter(c), qd = quarter(d);
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(qa, qb), _mm_unpackhi_ps(qa, qb));
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(qc, qd), _mm_unpackhi_ps(qc, qd));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

#elif defined(GEMMA_NEON)

inline float sum(V v) {
    const float32x4_t q = vaddq_f32(v.low, v.high);
    const float32x2_t pairs = vadd_f32(vget_low_f32(q), vget_high_f32(q));
    return vget_lane_f32(vpadd_f32(pairs, pairs), 0);
}

inline void sum4(V a, V b, V c, V d, float* out) {  // `sum` of four vectors, by the same tree
    const float32x4_t qa = vaddq_f32(a.low, a.high), qb = vaddq_f32(b.low, b.high);
    const float32x4_t qc = vaddq_f32(c.low, c.high), qd = vaddq_f32(d.low, d.high);
    const float32x2_t pa = vadd_f32(vget_low_f32(qa), vget_high_f32(qa)),
                      pb = vadd_f32(vget_low_f32(qb), vget_high_f32(qb));
    const float32x2_t pc = vadd_f32(vget_low_f32(qc), vget_high_f32(qc)),
                      pd = vadd_f32(vget_low_f32(qd), vget_high_f32(qd));
    vst1_f32(out, vpadd_f32(pa, pb)), vst1_f32(out + 2, vpadd_f32(pc, pd));
}

#else

inline float sum(V v) {
    float q[4];
    for (int i = 0; i < 4; i++) q[i] = v[i] + v[i + 4];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

inline void sum4(V a, V b, V c, V d, float* out) { out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d); }

#endif

#if defined(GEMMA_AVX512)
inline float maximum(V v) { return _mm512_reduce_max_ps(v); }
#else
inline float maximum(V v) {
    float lanes[W];
    store(lanes, v);
    float best = lanes[0];
    for (int i = 1; i < W; i++) best = lanes[i] > best ? lanes[i] : best;
    return best;
}
#endif

inline V load_part(const float* p, int n, float rest = 0.0f) {
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = i < n ? p[i] : rest;
    return load(lanes);
}
inline V load_part(const uint16_t* p, int n) {
    uint16_t lanes[W] = {};
    std::memcpy(lanes, p, n * sizeof(uint16_t));
    return load(lanes);
}
inline void store_part(float* p, V v, int n) {
    float lanes[W];
    store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(float));
}

// Returns e ** x, with an error below 2 ulp: x = n ln 2 + r, and a polynomial of degree 6 gives e ** r (Cephes expf).
// Numbers below -87.3 count as -87.3.
inline V exp(V x) {
    x = max(x, set1(-87.3f));
    V n = round(mul(x, set1(1.44269504088896341f)));
    V r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return mul(p, exponent(n));
}

// Returns tanh within 1e-7, as 1 - 2 / (e ** 2x + 1).
inline V tanh(V x) {
    x = min(max(x, set1(-10.0f)), set1(10.0f));
    V e = exp(add(x, x));
    return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

// gelu_pytorch_tanh
inline V gelu(V x) {
    V inner = mul(set1(0.7978845608028654f), fma(mul(set1(0.044715f), mul(x, x)), x, x));
    return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

}  // namespace GEMMA_ISA
}  // namespace gemma
