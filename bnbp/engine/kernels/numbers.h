/* The types of tensors: two of 16 bits, and conversions of 16 numbers, of the first few, and of a cache line. */
#ifndef BNBP_NUMBERS_H
#define BNBP_NUMBERS_H

#include "machine.h"

/* The 16-bit types. To Cython they are integers that behave as numbers: read as float32, and rounded once, to nearest
   with ties to even, when they are made of float32 or float64. The integer code and the instructions give the same
   bits. */
static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* float32 that rounds to any type of at most 22 bits as the float64 would: what is lost makes the last bit odd. */
static inline float odd_float(double value) {
    const float nearest = (float)value;
    const uint32_t bits = bits_of(nearest);
    if (nearest == value || value != value)
        return nearest;
    return float_of((bits - (fabs(nearest) > fabs(value))) | 1);
}

static inline float float_of_half(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t magnitude = half & 0x7fff, exponent = magnitude >> 10, sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t normal = (magnitude << 13) + ((exponent == 31 ? 224u : 112u) << 23);
    const uint32_t quiet = exponent == 31 && (magnitude & 0x3ff) ? 0x400000 : 0;
    return float_of((exponent ? normal | quiet : bits_of((float)(int32_t)magnitude * 0x1p-24f)) | sign);
#endif
}
static inline uint16_t half_of_float(float value) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t tiny = bits_of(float_of(magnitude < 0x38800000 ? magnitude : 0) + 0.5f) - 0x3f000000;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00;
    return (uint16_t)((magnitude < 0x38800000 ? tiny : magnitude < 0x47800000 ? normal : large) | sign);
#endif
}
static inline uint16_t bfloat_of_bits(uint32_t bits) {
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

/* Made of an int they are but tags, and the comparison is there because Cython asks at compile time whether -1 < 0. */
struct float16 {
    uint16_t bits;
    float16() = default;
    explicit constexpr float16(int) : bits(0) {}
    explicit float16(float value) : bits(half_of_float(value)) {}
    explicit float16(double value) : float16(odd_float(value)) {}
    friend constexpr bool operator<(float16, float16) { return false; }
    operator float() const { return float_of_half(bits); }
};

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit constexpr bfloat16(int) : bits(0) {}
    explicit bfloat16(float value) : bits(bfloat_of_bits(bits_of(value))) {}
    explicit bfloat16(double value) : bfloat16(odd_float(value)) {}
    friend constexpr bool operator<(bfloat16, bfloat16) { return false; }
    operator float() const { return float_of((uint32_t)bits << 16); }
};

/* 16 numbers one by one, each rounded once: where there are no instructions for it, and where it does not matter.
   Apart, because these loops, written out everywhere, would be a seventh of the module. */
template <typename To, typename From> static BNBP_APART void convert(To* to, const From* from) {
    for (int i = 0; i < 16; ++i)
        to[i] = To(from[i]);
}
/* 16 numbers in a wider type. Where `to` is an array that nothing else looks at, they stay in registers; left to
   itself, GCC loads a whole register of float32 and takes it apart, which costs a quarter more than to convert while
   loading. */
static inline void widen(float* to, const float16* from) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(__F16C__)
    for (int i = 0; i < 16; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#else
    convert(to, from);
#endif
}
#if defined(__AVX512BW__)
static inline __m512i words_in_high_halves(void) {
    return _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000, 0x70000, 0x60000,
                            0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
}
/* The numbers of the high halves of 32 places: those of a register, then those of another. */
static inline __m512i high_halves(void) {
    return _mm512_set_epi32(0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d,
                            0x1b0019, 0x170015, 0x130011, 0xf000d, 0xb0009, 0x70005, 0x30001);
}
#endif
static inline void widen(float* to, const bfloat16* from) {
#if defined(__AVX512BW__) /* word k to the high half of place k, and 0 to the low one */
    const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
    _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words_in_high_halves(), words));
#elif defined(__AVX2__)
    for (int i = 0; i < 16; i += 8) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + i)));
        _mm256_storeu_si256((__m256i*)(to + i), _mm256_slli_epi32(bits, 16));
    }
#elif defined(__SSE2__)
    for (int i = 0; i < 16; i += 8) {
        const __m128i words = _mm_loadu_si128((const __m128i*)(from + i));
        _mm_storeu_si128((__m128i*)(to + i), _mm_unpacklo_epi16(_mm_setzero_si128(), words));
        _mm_storeu_si128((__m128i*)(to + i + 4), _mm_unpackhi_epi16(_mm_setzero_si128(), words));
    }
#else
    convert(to, from);
#endif
}
static inline void widen(double* to, const float* from) {
#if defined(__AVX__)
    for (int i = 0; i < 16; i += 4)
        _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm_loadu_ps(from + i)));
#elif defined(__SSE2__)
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)
        _mm_storeu_pd(to + i, _mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd((const double*)(from + i)))));
#else
    for (int i = 0; i < 16; ++i)
        to[i] = from[i];
#endif
}
static inline void widen(double* to, const float16* from) {
#if defined(__F16C__)
    for (int i = 0; i < 16; i += 4)
        _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)(from + i)))));
#else
    convert(to, from);
#endif
}
static inline void widen(double* to, const bfloat16* from) {
#if defined(__AVX2__)
    for (int i = 0; i < 16; i += 4) {
        const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)(from + i)));
        _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16))));
    }
#else
    convert(to, from);
#endif
}

/* Not called: the two types of float32 and float64 that the kernels are written for are one, or the other way round. */
static inline void widen(float* to, const double* from) { convert(to, from); }

/* The first `count` (1 to 15) of 16 numbers, then zeros; and back. Nothing past them is read or written. */
#if defined(__AVX2__)
static inline __m256i first_of_eight(ptrdiff_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline __m256i first_of_four(ptrdiff_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif
template <typename T> static inline void load_some(T* to, const T* from, ptrdiff_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 2) {
        _mm256_storeu_si256((__m256i*)to, _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from));
        return;
    }
#endif
    memset((void*)to, 0, 16 * sizeof(T));
    memcpy((void*)to, from, (size_t)count * sizeof(T));
}
static inline void load_part(float* to, const float* from, ptrdiff_t count) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from));
#elif defined(__AVX2__)
    _mm256_storeu_ps(to, _mm256_maskload_ps(from, first_of_eight(count)));
    _mm256_storeu_ps(to + 8, _mm256_maskload_ps(from + 8, first_of_eight(count - 8)));
#else
    load_some(to, from, count);
#endif
}
static inline void load_part(double* to, const double* from, ptrdiff_t count) {
#if defined(__AVX512F__)
    const unsigned mask = (1u << count) - 1;
    _mm512_storeu_pd(to, _mm512_maskz_loadu_pd((__mmask8)mask, from));
    _mm512_storeu_pd(to + 8, _mm512_maskz_loadu_pd((__mmask8)(mask >> 8), from + 8));
#elif defined(__AVX2__)
    for (int i = 0; i < 16; i += 4)
        _mm256_storeu_pd(to + i, _mm256_maskload_pd(from + i, first_of_four(count - i)));
#else
    load_some(to, from, count);
#endif
}
static inline void widen_part(double* to, const float* from, ptrdiff_t count) {
#if defined(__AVX512VL__)
    const unsigned mask = (1u << count) - 1;
    for (int i = 0; i < 16; i += 4)
        _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm_maskz_loadu_ps((__mmask8)(mask >> i & 15), from + i)));
#elif defined(__AVX2__)
    for (int i = 0; i < 16; i += 8) {
        const __m256 some = _mm256_maskload_ps(from + i, first_of_eight(count - i));
        _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm256_castps256_ps128(some)));
        _mm256_storeu_pd(to + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(some, 1)));
    }
#else
    float some[16];
    load_some(some, from, count);
    widen(to, some);
#endif
}
template <typename To, typename From> static inline void widen_part(To* to, const From* from, ptrdiff_t count) {
    From some[16];
    load_some(some, from, count);
    widen(to, some);
}
static inline void store_part(float* to, const float* from, ptrdiff_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), _mm512_loadu_ps(from));
#elif defined(__AVX2__)
    _mm256_maskstore_ps(to, first_of_eight(count), _mm256_loadu_ps(from));
    _mm256_maskstore_ps(to + 8, first_of_eight(count - 8), _mm256_loadu_ps(from + 8));
#else
    memcpy(to, from, (size_t)count * sizeof *to);
#endif
}
static inline void store_part(double* to, const double* from, ptrdiff_t count) {
#if defined(__AVX512F__)
    const unsigned mask = (1u << count) - 1;
    _mm512_mask_storeu_pd(to, (__mmask8)mask, _mm512_loadu_pd(from));
    _mm512_mask_storeu_pd(to + 8, (__mmask8)(mask >> 8), _mm512_loadu_pd(from + 8));
#elif defined(__AVX2__)
    for (int i = 0; i < 16; i += 4)
        _mm256_maskstore_pd(to + i, first_of_four(count - i), _mm256_loadu_pd(from + i));
#else
    memcpy(to, from, (size_t)count * sizeof *to);
#endif
}
template <typename T> static inline void store_part(T* to, const T* from, ptrdiff_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 2) {
        _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1), _mm256_loadu_si256((const __m256i*)from));
        return;
    }
#endif
    memcpy(to, from, (size_t)count * sizeof(T));
}

/* The first `count` (1 to 8) of 8 numbers as float64, then zeros; and back. */
template <typename T> static inline void load_few(double* to, const T* from, ptrdiff_t count) {
#if defined(__AVX512F__)
    const __mmask8 mask = (__mmask8)((1u << count) - 1);
    if constexpr (sizeof(T) == 8) {
        _mm512_storeu_pd(to, _mm512_maskz_loadu_pd(mask, from));
        return;
    } else if constexpr (sizeof(T) == 4) {
        _mm512_storeu_pd(to, _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, (const float*)from)));
        return;
    }
#endif
    if (count == 8) {
        for (int i = 0; i < 8; ++i)
            to[i] = from[i];
    } else {
        for (int i = 0; i < 8; ++i)
            to[i] = i < count ? (double)from[i] : 0.0;
    }
}
template <typename T> static inline void store_few(T* to, const double* from, ptrdiff_t count) {
#if defined(__AVX512F__)
    const __mmask8 mask = (__mmask8)((1u << count) - 1);
    if constexpr (sizeof(T) == 8) {
        _mm512_mask_storeu_pd(to, mask, _mm512_loadu_pd(from));
        return;
    } else if constexpr (sizeof(T) == 4) {
        _mm256_mask_storeu_ps((float*)to, mask, _mm512_cvtpd_ps(_mm512_loadu_pd(from)));
        return;
    }
#endif
    if (count == 8) {
        for (int i = 0; i < 8; ++i)
            to[i] = T(from[i]);
    } else {
        for (int i = 0; i < 8; ++i)
            if (i < count)
                to[i] = T(from[i]);
    }
}

/* Whether 8 numbers are 0 or have a normal float32: a byte for each of the first `count`. */
static inline void all_in_range(char* to, const double* a, const double* b, const double* c, const double* d,
                                ptrdiff_t count) {
    const double* const fields[] = {a, b, c, d};
    const double least = 0x1p-126, most = 3.4028234663852886e+38;
    char fits[8];
#if defined(__AVX512F__)
    unsigned mask = 0xff;
    for (const double* field : fields) {
        const __m512d size = _mm512_abs_pd(_mm512_loadu_pd(field));
        mask &= _mm512_cmp_pd_mask(size, _mm512_setzero_pd(), _CMP_EQ_OQ) |
                (_mm512_cmp_pd_mask(size, _mm512_set1_pd(least), _CMP_GE_OQ) &
                 _mm512_cmp_pd_mask(size, _mm512_set1_pd(most), _CMP_LE_OQ));
    }
    const unsigned long long bytes = _pdep_u64(mask, 0x0101010101010101);
    memcpy(fits, &bytes, 8);
#else
    for (int i = 0; i < 8; ++i) {
        int all = 1;
        for (const double* field : fields) {
            const double size = fabs(field[i]);
            all &= (size == 0) | ((size >= least) & (size <= most));
        }
        fits[i] = (char)all;
    }
#endif
    if (count == 8)
        memcpy(to, fits, 8);
    else
        memcpy(to, fits, (size_t)count);
}

/* 16 numbers in a 16-bit type. */
static inline void narrow(float16* to, const float* from) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    const __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(from + 8), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i*)to, _mm256_set_m128i(high, low)); /* at once, as it is loaded next */
#else
    convert(to, from);
#endif
}
/* Not for every NaN: one whose last 16 bits are not 0 might round to a number. Arithmetic with bfloat16 makes none. */
static inline void narrow(bfloat16* to, const float* from) {
#if defined(__AVX512BW__)
    const __m512i bits = _mm512_loadu_si512(from), even = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), even);
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, half), odd);
    const __m512i words = _mm512_permutexvar_epi16(high_halves(), rounded);
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(words));
#elif defined(__AVX2__)
    __m256i top[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i bits = _mm256_loadu_si256((const __m256i*)(from + 8 * i));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        top[i] = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    }
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(top[0], top[1]), 0xd8));
#else
    convert(to, from);
#endif
}
static inline void narrow(float16* to, const double* from) { convert(to, from); }
static inline void narrow(bfloat16* to, const double* from) { convert(to, from); }
static inline void narrow(float* to, const double* from) {
    for (int i = 0; i < 16; ++i)
        to[i] = (float)from[i];
}
static inline void narrow(double* to, const float* from) { convert(to, from); } /* not called */

/* The 32 numbers of a cache line as float32, and back. */
template <typename T> static inline void widen_line(float* to, const T* from) {
    widen(to, from);
    widen(to + 16, from + 16);
}
static inline void narrow_line(bfloat16* to, const float* from) {
#if defined(__AVX512BW__) /* rounded in words: 1 is added where what is cut off, plus 0x7fff or 0x8000, has a carry */
    const __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 16), high = high_halves();
    const __m512i kept = _mm512_permutex2var_epi16(first, high, second);
    const __m512i cut = _mm512_permutex2var_epi16(first, _mm512_sub_epi16(high, _mm512_set1_epi16(1)), second);
    const __m512i more = _mm512_ternarylogic_epi32(kept, _mm512_set1_epi16(1), _mm512_set1_epi16(0x7ffe), 0xea);
    const __m512i carry = _mm512_srli_epi16(_mm512_avg_epu16(cut, more), 15); /* (cut + more + 1) >> 16 */
    _mm512_storeu_si512(to, _mm512_add_epi16(kept, carry));
#else
    narrow(to, from);
    narrow(to + 16, from + 16);
#endif
}
static inline void narrow_line(float16* to, const float* from) {
#if defined(__AVX512F__)
    const __m256i low = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    const __m256i high = _mm512_cvtps_ph(_mm512_loadu_ps(from + 16), _MM_FROUND_TO_NEAREST_INT);
    _mm512_storeu_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
    narrow(to, from);
    narrow(to + 16, from + 16);
#endif
}

/* ---- the numbers of a type in their order */

/* The bits of a type as an integer that grows with the number; NaN is beyond the infinities. */
template <typename T> using order_of = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;

template <typename T> static inline void places_of(long long* to, const double* numbers, T) {
    T rounded[8];
    order_of<T> bits[8];
    store_few(rounded, numbers, 8);
    memcpy(bits, rounded, sizeof bits);
    for (int k = 0; k < 8; ++k)
        to[k] = bits[k] < 0 ? bits[k] ^ std::numeric_limits<order_of<T>>::max() : bits[k];
}
template <typename T> static inline long long place_of(double number, T tag) {
    const double numbers[8] = {number};
    long long places[8];
    places_of(places, numbers, tag);
    return places[0];
}
template <typename T> static inline void numbers_at(double* to, const long long* places, T) {
    order_of<T> bits[8];
    T numbers[8];
    for (int k = 0; k < 8; ++k)
        bits[k] = (order_of<T>)(places[k] < 0 ? places[k] ^ std::numeric_limits<order_of<T>>::max() : places[k]);
    memcpy(numbers, bits, sizeof bits);
    load_few(to, numbers, 8);
}

#endif /* BNBP_NUMBERS_H */
