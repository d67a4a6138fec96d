/* The activation, and where it is flat: numbers side by side between two bounds.

   What clamps an output are the numbers themselves, what masks a gradient are others beside them, see edges.pxi. */
#ifndef BNBP_BOUNDS_H
#define BNBP_BOUNDS_H

#include "lanes.h"

/* The numbers between two bounds, and the bounds in the place of others; NaN stays. */
template <typename T, int N, int W>
BNBP_INLINE pack<T, N, W> clamped(const pack<T, N, W>& y, const pack<T, N, W>& low, const pack<T, N, W>& high) {
    if constexpr (N == W) {
        const auto above = low.at > y.at ? low.at : y.at;
        return {high.at < above ? high.at : above};
    } else {
        return {clamped(y.low, low.low, high.low), clamped(y.high, low.high, high.high)};
    }
}

/* 0 in the place of the numbers whose `v` is at one of the bounds or beyond; a bound that is NaN is none. */
template <typename T, int N, int W>
BNBP_INLINE pack<T, N, W> between(const pack<T, N, W>& p, const pack<T, N, W>& v, const pack<T, N, W>& low,
                                  const pack<T, N, W>& high) {
    if constexpr (N == W) {
        const auto some = v.at <= low.at ? decltype(p.at){} : p.at;
        return {v.at >= high.at ? decltype(p.at){} : some};
    } else {
        return {between(p.low, v.low, low.low, high.low), between(p.high, v.high, low.high, high.high)};
    }
}

/* Bounds in what the numbers of a tensor are compared in: float32, or float64 for data of that type. */
template <typename R> using own_type = std::conditional_t<sizeof(R) == 8, double, float>;
template <typename R> struct Bounds {
    pack<own_type<R>, 16, widest<own_type<R>>> low, high;
};

/* LANES numbers of a tensor, or the first `count`, with 0 in the place of those whose `v` is not between the bounds. */
template <typename R>
BNBP_INLINE void load_between(R* to, const R* from, const R* v, ptrdiff_t count, const Bounds<R>& bounds) {
    decltype(bounds.low) vs;
    load_lanes(vs, v, count);
    if constexpr (sizeof(R) >= 4) {
        decltype(bounds.low) numbers;
        load_lanes(numbers, from, count);
        store((own_type<R>*)to, between(numbers, vs, bounds.low, bounds.high));
    } else {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        const __mmask16 beyond = _mm512_cmp_ps_mask(vs.at, bounds.low.at, _CMP_LE_OQ) |
                                 _mm512_cmp_ps_mask(vs.at, bounds.high.at, _CMP_GE_OQ);
        const __mmask16 there = (__mmask16)((1u << count) - 1);
        _mm256_storeu_si256((__m256i*)to, _mm256_maskz_loadu_epi16(there & ~beyond, from));
#elif defined(__AVX2__)
        __m256i beyond[2], bits;
        for (int k = 0; k < 2; ++k) {
            const auto v8 = k ? vs.high.at : vs.low.at, low = k ? bounds.low.high.at : bounds.low.low.at;
            const auto high = k ? bounds.high.high.at : bounds.high.low.at;
            beyond[k] = _mm256_castps_si256(
                _mm256_or_ps(_mm256_cmp_ps(v8, low, _CMP_LE_OQ), _mm256_cmp_ps(v8, high, _CMP_GE_OQ)));
        }
        if (count == 16) {
            bits = _mm256_loadu_si256((const __m256i*)from);
        } else {
            load_some(to, from, count);
            bits = _mm256_loadu_si256((const __m256i*)to);
        }
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(beyond[0], beyond[1]), 0xd8);
        _mm256_storeu_si256((__m256i*)to, _mm256_andnot_si256(words, bits));
#else
        float x[16], low[16], high[16];
        uint16_t bits[16] = {};
        store(x, vs);
        store(low, bounds.low);
        store(high, bounds.high);
        memcpy(bits, from, (size_t)count * 2);
        for (int i = 0; i < 16; ++i)
            bits[i] &= (uint16_t)-(!(x[i] <= low[i]) & !(x[i] >= high[i]));
        memcpy((void*)to, bits, sizeof bits);
#endif
    }
}

/* Whether an instruction converts float32 to float64 and puts 0 in the place of what a comparison rules out. */
#if defined(__AVX512VL__)
#define BNBP_MASKED_CONVERSION 1
#else
#define BNBP_MASKED_CONVERSION 0
#endif

/* The same as float64, for sums. */
template <typename R> BNBP_INLINE void widen_between(lanes<R>& to, const R* from, const R* v, const Bounds<R>& bounds) {
#if BNBP_MASKED_CONVERSION
    /* The conversion leaves out what the comparison of eight says: no register is cut up. */
    if constexpr (sizeof(R) == 4) {
        quarter* const parts[] = {&to.low.low, &to.low.high, &to.high.low, &to.high.high};
        const __m256 low[] = {_mm512_castps512_ps256(bounds.low.at), _mm512_extractf32x8_ps(bounds.low.at, 1)};
        const __m256 high[] = {_mm512_castps512_ps256(bounds.high.at), _mm512_extractf32x8_ps(bounds.high.at, 1)};
        for (int k = 0; k < 2; ++k, from += 8, v += 8) {
            const __m256 vs = _mm256_loadu_ps(v);
            const __mmask8 above = _mm256_cmp_ps_mask(vs, low[k], _CMP_NLE_UQ);
            const __mmask8 some = _mm256_mask_cmp_ps_mask(above, vs, high[k], _CMP_NGE_UQ);
            parts[2 * k]->at = _mm256_maskz_cvtps_pd(some, _mm_loadu_ps(from));
            parts[2 * k + 1]->at = _mm256_maskz_cvtps_pd((__mmask8)(some >> 4), _mm_loadu_ps(from + 4));
        }
        return;
    }
#endif
    R line[16];
    load_between(line, from, v, 16, bounds);
    load_lanes(to, line, 16);
}

/* The first `count` (1 to 4) of quarter `k` of them, and 0 for the others. */
template <typename R>
BNBP_INLINE void quarter_between(quarter& to, const R* from, const R* v, ptrdiff_t count, int k,
                                 const Bounds<R>& bounds) {
#if defined(__AVX512VL__)
    if constexpr (sizeof(R) == 4) {
        const __mmask8 there = (__mmask8)((1u << count) - 1);
        const __m512 low = bounds.low.at, high = bounds.high.at;
        const __m128 vs = _mm_maskz_loadu_ps(there, v);
        const __m128 lows[] = {_mm512_castps512_ps128(low), _mm512_extractf32x4_ps(low, 1),
                               _mm512_extractf32x4_ps(low, 2), _mm512_extractf32x4_ps(low, 3)};
        const __m128 highs[] = {_mm512_castps512_ps128(high), _mm512_extractf32x4_ps(high, 1),
                                _mm512_extractf32x4_ps(high, 2), _mm512_extractf32x4_ps(high, 3)};
        const __mmask8 above = _mm_mask_cmp_ps_mask(there, vs, lows[k], _CMP_NLE_UQ);
        const __mmask8 some = _mm_mask_cmp_ps_mask(above, vs, highs[k], _CMP_NGE_UQ);
        to.at = _mm256_maskz_cvtps_pd(some, _mm_maskz_loadu_ps(some, from));
        return;
    }
#endif
    own_type<R> low[16], high[16];
    double x[4] = {0, 0, 0, 0};
    store(low, bounds.low);
    store(high, bounds.high);
    for (int i = 0; i < 4; ++i)
        if (i < count && !(own_type<R>(v[i]) <= low[4 * k + i]) && !(own_type<R>(v[i]) >= high[4 * k + i]))
            x[i] = from[i];
    load(to, x);
}

/* The same bounds everywhere; those of LANES positions. */
template <typename R> BNBP_INLINE void fill_bounds(Bounds<R>& bounds, double low, double high) {
    fill(bounds.low, (own_type<R>)low);
    fill(bounds.high, (own_type<R>)high);
}
template <typename R> BNBP_INLINE void load_bounds(Bounds<R>& bounds, const void* low, const void* high, ptrdiff_t i) {
    load(bounds.low, (const own_type<R>*)low + i);
    load(bounds.high, (const own_type<R>*)high + i);
}
template <typename R> BNBP_INLINE void set_own(void* to, ptrdiff_t i, double value, R) {
    ((own_type<R>*)to)[i] = (own_type<R>)value;
}

#endif /* BNBP_BOUNDS_H */
