// Integer dot products of 64 columns of a quantised weight with quantised activations.
//
// A vector holds W partial sums, which are exact. They then become floats: acc += partial * x scale * w scale. INT8 has
// one scale for the 64 columns, and so has INT2. INT8_32 and INT4 have two: of the even and of the odd units of four
// columns (see `Weight`).
//
// Activations lie within 127. Only those that a static scale has rounded (`FULL`) may be -128, too.
#pragma once

#include "tiles.h"

namespace gemma {
namespace GEMMA_ISA {

static_assert(AREA_COLS % QUANTISED_BLOCK == 0);

template <WeightType T>
constexpr size_t GROUP = quantised_group(T);
template <WeightType T>
constexpr size_t SCALES = QUANTISED_BLOCK / GROUP<T>;  // of a block
template <WeightType T>
constexpr bool BYTES = T == WeightType::INT8 || T == WeightType::INT8_32;  // a value takes a byte

// whether products of activations that may be -128 are computed in another way
#if defined(GEMMA_AVX2)
template <WeightType T>
constexpr bool FULL_APART = BYTES<T>;
#else
template <WeightType T>
constexpr bool FULL_APART = false;
#endif

template <class N>
inline N read(const void* p) {
    N value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

#if defined(GEMMA_AVX512)

template <WeightType T>
inline V spread(const float* scales) {
    if constexpr (SCALES<T> == 1) return set1(scales[0]);
    return _mm512_castpd_ps(_mm512_set1_pd(read<double>(scales)));
}

struct Block {
    __m512i v;
};
template <WeightType T>
inline Block block(const uint8_t* w) {
    if constexpr (BYTES<T>) return {_mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80))};  // w + 128
    if constexpr (T == WeightType::INT2) {
        const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)w));
        const __m512i shifts = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
        return {_mm512_and_si512(_mm512_srlv_epi32(all, shifts), _mm512_set1_epi8(3))};
    }
    const __m256i b = _mm256_loadu_si256((const __m256i*)w), mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(b, mask), high = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}
// The weights are unsigned: they carry an offset. What the lanes begin with, `starts`, takes it off.
template <WeightType T, bool FULL>
inline V partial(const Block& w, const int8_t* x, const int32_t* starts) {
    __m512i start;
    if constexpr (T == WeightType::INT2) start = _mm512_zextsi128_si512(_mm_cvtsi32_si128(starts[0]));
    else if constexpr (SCALES<T> == 1) start = _mm512_set1_epi32(starts[0]);
    else start = _mm512_set1_epi64(read<int64_t>(starts));
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, w.v, _mm512_loadu_si512(x)));
}

#elif defined(GEMMA_AVX2)

template <WeightType T>
inline V spread(const float* scales) {
    if constexpr (SCALES<T> == 1) return set1(scales[0]);
    return _mm256_castpd_ps(_mm256_set1_pd(read<double>(scales)));
}

struct Block {
    __m256i low, high;
};
template <WeightType T>
inline Block block(const uint8_t* w) {
    if constexpr (BYTES<T>)
        return {_mm256_loadu_si256((const __m256i*)w), _mm256_loadu_si256((const __m256i*)(w + 32))};
    if constexpr (T == WeightType::INT2) {
        const __m128i all = _mm_loadu_si128((const __m128i*)w);
        const __m256i mask2 = _mm256_set1_epi8(3);
        return {_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(all, 2), all), mask2),
                _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(all, 6), _mm_srli_epi16(all, 4)), mask2)};
    }
    const __m256i b = _mm256_loadu_si256((const __m256i*)w), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(b, mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
}
// Returns the sums of four products each, of any bytes.
inline __m256i fours(__m256i w, __m256i x) {
    const auto even = [](__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
    const auto odd = [](__m256i v) { return _mm256_srai_epi16(v, 8); };
    return _mm256_add_epi32(_mm256_madd_epi16(even(w), even(x)), _mm256_madd_epi16(odd(w), odd(x)));
}
template <WeightType T, bool FULL>
inline V partial(const Block& w, const int8_t* x, const int32_t* starts) {
    const __m256i x0 = _mm256_loadu_si256((const __m256i*)x), x1 = _mm256_loadu_si256((const __m256i*)(x + 32));
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (BYTES<T> && FULL) return _mm256_cvtepi32_ps(_mm256_add_epi32(fours(w.low, x0), fours(w.high, x1)));
    if constexpr (BYTES<T>) {  // |w| times x with the sign of w: pairs stay below 2 ** 15 because x lies within 127 and
                               // w within 128
        const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(w.low), _mm256_sign_epi8(x0, w.low));
        const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(w.high), _mm256_sign_epi8(x1, w.high));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)));
    }
    // w + 8 lies within 15, w + 2 within 3: four products stay below 2 ** 15
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, x0), _mm256_maddubs_epi16(w.high, x1));
    __m256i start;
    if constexpr (T == WeightType::INT2) start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(starts[0]));
    else start = _mm256_set1_epi64x(read<int64_t>(starts));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(pairs, ones), start));
}

#elif defined(GEMMA_NEON)

template <WeightType T>
inline V spread(const float* scales) {
    if constexpr (SCALES<T> == 1) return set1(scales[0]);
    const float32x2_t both = vld1_f32(scales);
    return {vcombine_f32(both, both), vcombine_f32(both, both)};
}

struct Block {
    int8x16_t v[4];
};
template <WeightType T>
inline Block block(const uint8_t* w) {
    if constexpr (BYTES<T>) {
        const int8_t* p = (const int8_t*)w;
        return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
    }
    if constexpr (T == WeightType::INT2) {
        const uint8x16_t all = vld1q_u8(w), mask2 = vdupq_n_u8(3);
        const auto of = [&](uint8x16_t stored) {
            return vsubq_s8(vreinterpretq_s8_u8(vandq_u8(stored, mask2)), vdupq_n_s8(2));
        };
        return {{of(all), of(vshrq_n_u8(all, 2)), of(vshrq_n_u8(all, 4)), of(vshrq_n_u8(all, 6))}};
    }
    const uint8x16_t a = vld1q_u8(w), b = vld1q_u8(w + 16), mask = vdupq_n_u8(15);
    const auto value = [](uint8x16_t stored) { return vsubq_s8(vreinterpretq_s8_u8(stored), vdupq_n_s8(8)); };
    return {{value(vandq_u8(a, mask)), value(vandq_u8(b, mask)), value(vshrq_n_u8(a, 4)), value(vshrq_n_u8(b, 4))}};
}
// Returns the sums of four products each. A product lies within 2 ** 14 in size, a pair of them within an int32.
inline int32x4_t fours(int8x16_t w, int8x16_t x) {
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}
template <WeightType T, bool FULL>
inline V partial(const Block& w, const int8_t* x, const int32_t*) {
    const int32x4_t low = vaddq_s32(fours(w.v[0], vld1q_s8(x)), fours(w.v[2], vld1q_s8(x + 32)));
    const int32x4_t high = vaddq_s32(fours(w.v[1], vld1q_s8(x + 16)), fours(w.v[3], vld1q_s8(x + 48)));
    return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
}

#else

template <WeightType T>
inline V spread(const float* scales) {
    V v;
    for (int i = 0; i < W; i++) v[i] = scales[i % SCALES<T>];
    return v;
}

struct Block {
    int8_t v[64];
};
template <WeightType T>
inline Block block(const uint8_t* w) {
    Block b;
    if constexpr (BYTES<T>) std::memcpy(b.v, w, 64);
    else if constexpr (T == WeightType::INT2)
        for (int i = 0; i < 64; i++) b.v[i] = (int8_t)((w[i % 16] >> i / 16 * 2 & 3) - 2);
    else
        for (int i = 0; i < 32; i++) b.v[i] = (int8_t)((w[i] & 15) - 8), b.v[i + 32] = (int8_t)((w[i] >> 4) - 8);
    return b;
}
template <WeightType T, bool FULL>
inline V partial(const Block& w, const int8_t* x, const int32_t*) {
    V out;
    for (int i = 0; i < W; i++) {
        int32_t total = 0;
        for (int j = 0; j < 4; j++)
            total += (int32_t)w.v[4 * i + j] * x[4 * i + j] + (int32_t)w.v[4 * i + j + 32] * x[4 * i + j + 32];
        out[i] = (float)total;
    }
    return out;
}

#endif

// Returns what a lane begins with so that the weights' offset cancels: the sum of the group's activations times the
// offset, divided among the group's lanes. The offset of INT2 is smaller than there are lanes: the first one takes it.
template <WeightType T>
inline int32_t start_of(int32_t total) {
#if defined(GEMMA_AVX512)
    constexpr int32_t OFFSET = BYTES<T> ? 128 : 8, LANES = W / SCALES<T>;
    return T == WeightType::INT2 ? -2 * total : -OFFSET / LANES * total;
#elif defined(GEMMA_AVX2)
    return BYTES<T> ? 0 : -2 * total;  // INT4: 8 / 4 lanes
#else
    return 0 * total;
#endif
}

}  // namespace GEMMA_ISA
}  // namespace gemma
