/* Numbers side by side, in as many registers as the level of the instruction set needs for them.

   A pack of N numbers is a register of W, or two packs of half as many: every operation is written once, for a register
   and in halves. The order of a sum follows from N alone, so that all levels compute the same bits. */
#ifndef BNBP_LANES_H
#define BNBP_LANES_H

#include "numbers.h"

/* Bytes of a register, and the types of one: an extension that GCC and Clang have in common. */
#if defined(__AVX512F__)
#define BNBP_BYTES 64
#elif defined(__AVX2__)
#define BNBP_BYTES 32
#elif defined(__GNUC__)
#define BNBP_BYTES 16
#endif
#if defined(BNBP_BYTES)
template <typename T, int W> struct register_of {
    typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <typename T> constexpr int widest = BNBP_BYTES / sizeof(T);
#else
template <typename T, int W> struct register_of {
    typedef T type;
};
template <typename T> constexpr int widest = 1;
#endif
/* The sums of data that is not float64 take 256 bits at most: Zen 4 takes twice as long to convert float32 to 512 bits
   at once, and a sum 0.16 ns an element instead of 0.11. Data of float64 is not converted, and its sums want as few
   instructions as there can be: with 512 bits a gradient takes 14 to 35 % less time in the caches. */
constexpr int narrower = widest<double> < 4 ? widest<double> : 4;

template <typename T, int N, int W> struct pack {
    pack<T, N / 2, W> low, high;
};
template <typename T, int W> struct pack<T, W, W> {
    typename register_of<T, W>::type at;
};

/* What the kernels take at a time: LANES numbers, of float64 for data of type R. */
template <typename R> using lanes = pack<double, 16, sizeof(R) == 8 ? widest<double> : narrower>;
typedef pack<float, 16, widest<float>> float_lanes;
typedef pack<double, 8, widest<double>> eight;
typedef pack<double, 4, narrower> quarter;

/* The sums of LANES accumulators: of float64 with what was rounded off, of others with what was put aside. */
template <typename R> struct LaneSums {
    lanes<R> delta, delta_lo, product, product_lo;
};

/* The tensors of the second pass: what it reads and, at the end, what it writes. */
template <typename R> struct Tensors {
    const R *x, *dy, *v;
    R *to, *also;
};
template <typename R> BNBP_INLINE void advance(Tensors<R>& at, ptrdiff_t elements) {
    at = {at.x + elements, at.dy + elements, at.v + elements, at.to + elements, at.also + elements};
}

/* ---- the same number everywhere; from memory, and back */

template <typename T, int N, int W> BNBP_INLINE void fill(pack<T, N, W>& p, T value) {
    if constexpr (N == W) {
        p.at = value - decltype(p.at){};
    } else {
        fill(p.low, value);
        p.high = p.low;
    }
}
template <typename T, int N, int W> BNBP_INLINE void load(pack<T, N, W>& p, const T* from) {
    if constexpr (N == W) {
        memcpy(&p.at, from, sizeof p.at);
    } else {
        load(p.low, from);
        load(p.high, from + N / 2);
    }
}
template <typename T, int N, int W> BNBP_INLINE void store(T* to, const pack<T, N, W>& p) {
    if constexpr (N == W) {
        memcpy(to, &p.at, sizeof p.at);
    } else {
        store(to, p.low);
        store(to + N / 2, p.high);
    }
}

/* ---- arithmetic */

template <typename T, int N, int W>
BNBP_INLINE pack<T, N, W> operator+(const pack<T, N, W>& a, const pack<T, N, W>& b) {
    if constexpr (N == W)
        return {a.at + b.at};
    else
        return {a.low + b.low, a.high + b.high};
}
template <typename T, int N, int W>
BNBP_INLINE pack<T, N, W> operator-(const pack<T, N, W>& a, const pack<T, N, W>& b) {
    if constexpr (N == W)
        return {a.at - b.at};
    else
        return {a.low - b.low, a.high - b.high};
}
template <typename T, int N, int W>
BNBP_INLINE pack<T, N, W> operator*(const pack<T, N, W>& a, const pack<T, N, W>& b) {
    if constexpr (N == W)
        return {a.at * b.at};
    else
        return {a.low * b.low, a.high * b.high};
}
template <typename T, int N, int W> BNBP_INLINE pack<T, N, W> operator-(const pack<T, N, W>& a) {
    if constexpr (N == W)
        return {-a.at};
    else
        return {-a.low, -a.high};
}

/* a * b + c in one rounding, where there is an instruction for it; otherwise in two. */
template <int N, int W>
BNBP_INLINE pack<double, N, W> fused(const pack<double, N, W>& a, const pack<double, N, W>& b,
                                     const pack<double, N, W>& c) {
    if constexpr (N == W) {
#if defined(__AVX512F__)
        if constexpr (W == 8)
            return {_mm512_fmadd_pd(a.at, b.at, c.at)};
#endif
#if defined(__FMA__)
        if constexpr (W == 4)
            return {_mm256_fmadd_pd(a.at, b.at, c.at)};
#endif
        return {a.at * b.at + c.at};
    } else {
        return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
    }
}

/* The functions of machine.h, for packs: a + b and a - b by the units that multiply, and the rounding error of p = a *
 * b. */
template <int N, int W>
BNBP_INLINE pack<double, N, W> plus(const pack<double, N, W>& a, const pack<double, N, W>& b, double one) {
#if defined(__FMA__)
    pack<double, N, W> unit;
    fill(unit, one);
    return fused(a, unit, b);
#else
    (void)one;
    return a + b;
#endif
}
template <int N, int W>
BNBP_INLINE pack<double, N, W> minus(const pack<double, N, W>& a, const pack<double, N, W>& b, double one) {
    return plus(a, -b, one);
}
/* `scale` for large numbers, 1 for others: see `product_error` of machine.h. */
template <typename Register> BNBP_INLINE Register if_large(Register a, double scale) {
    const Register one = 1.0 - Register{}, size = a < 0 ? -a : a;
    return size > 0x1p990 ? scale - Register{} : one;
}
template <int N, int W>
BNBP_INLINE pack<double, N, W> product_error(const pack<double, N, W>& a, const pack<double, N, W>& b,
                                             const pack<double, N, W>& p) {
    if constexpr (N != W) {
        return {product_error(a.low, b.low, p.low), product_error(a.high, b.high, p.high)};
    } else {
        const auto zero = decltype(p.at){}, size = p.at < 0 ? -p.at : p.at;
#if defined(__FMA__)
        const auto error = fused(a, b, -p).at;
#else
        const auto sa = if_large(a.at, 0x1p-60), sb = if_large(b.at, 0x1p-60), u = a.at * sa, v = b.at * sb;
        const auto big_u = 134217729.0 * u, big_v = 134217729.0 * v;
        const auto u1 = big_u - (big_u - u), v1 = big_v - (big_v - v), u2 = u - u1, v2 = v - v1;
        const auto scaled = ((u1 * v1 - p.at * sa * sb) + u1 * v2 + u2 * v1) + u2 * v2;
        const auto error = scaled * if_large(a.at, 0x1p60) * if_large(b.at, 0x1p60);
#endif
        return {size < 0x1p-960 ? zero : error};
    }
}
#if !defined(__FMA__)
/* A function of its own: written out wherever it is called, it would be a sixth of the module. */
static BNBP_APART eight product_error(const eight& a, const eight& b, const eight& p) {
    return product_error<8, widest<double>>(a, b, p);
}
#endif

/* ---- the first `count` of the numbers, and 0 for the others */

template <int N, int W> BNBP_INLINE pack<double, N, W> first_of(const pack<double, N, W>& p, ptrdiff_t count) {
    if constexpr (N != W) {
        return {first_of(p.low, count), first_of(p.high, count - N / 2)};
    } else {
#if defined(__AVX512VL__)
        if constexpr (W == 8)
            return {_mm512_maskz_mov_pd((__mmask8)((1u << count) - 1), p.at)};
        else
            return {_mm256_maskz_mov_pd((__mmask8)(count >= 4 ? 0xf : count <= 0 ? 0 : (1u << count) - 1), p.at)};
#elif defined(__AVX2__)
        return {_mm256_and_pd(p.at, _mm256_castsi256_pd(first_of_four(count)))};
#else
        double x[N];
        store(x, p);
        for (int i = 0; i < N; ++i)
            x[i] = i < count ? x[i] : 0.0;
        pack<double, N, W> some;
        load(some, x);
        return some;
#endif
    }
}
BNBP_INLINE float_lanes first_of(const float_lanes& p, ptrdiff_t count) {
#if defined(__AVX512F__)
    return {_mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), p.at)};
#else
    float x[16];
    store(x, p);
    for (int i = 0; i < 16; ++i)
        x[i] = i < count ? x[i] : 0.0f;
    float_lanes some;
    load(some, x);
    return some;
#endif
}

/* A part of the lanes, to be changed in place; `k` is a constant. */
BNBP_INLINE eight& eight_of(lanes<double>& p, int k) { return k ? p.high : p.low; }
template <typename R> BNBP_INLINE quarter& quarter_of(lanes<R>& p, int k) {
    auto& part = k < 2 ? p.low : p.high;
    return k % 2 ? part.high : part.low;
}

/* The first `count` of eight numbers (1 to 8), or of four, of a tensor, and 0 for the others. */
BNBP_INLINE void load_eight(eight& p, const double* from, ptrdiff_t count) {
    if (count == 8) {
        load(p, from);
        return;
    }
#if defined(__AVX512F__)
    p.at = _mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), from);
#elif defined(__AVX2__)
    p.low.at = _mm256_maskload_pd(from, first_of_four(count));
    p.high.at = _mm256_maskload_pd(from + 4, first_of_four(count - 4));
#else
    double x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    memcpy(x, from, (size_t)count * sizeof(double));
    load(p, x);
#endif
}
template <typename T> BNBP_INLINE void load_quarter(quarter& p, const T* from, ptrdiff_t count) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        if (count == 4) {
            p.at = _mm256_cvtps_pd(_mm_loadu_ps((const float*)from));
            return;
        }
#if defined(__AVX512VL__)
        p.at = _mm256_cvtps_pd(_mm_maskz_loadu_ps((__mmask8)((1u << count) - 1), (const float*)from));
#else
        const __m128i some = _mm_cmpgt_epi32(_mm_set1_epi32((int)count), _mm_setr_epi32(0, 1, 2, 3));
        p.at = _mm256_cvtps_pd(_mm_maskload_ps((const float*)from, some));
#endif
        return;
    }
#endif
    double x[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; ++i)
        if (i < count)
            x[i] = from[i];
    load(p, x);
}

/* The first `border` numbers of one pack, the others from another. */
template <typename T, int W> BNBP_INLINE void join(pack<T, 16, W>& p, T left, T right, ptrdiff_t border) {
    T x[16];
    for (int i = 0; i < 16; ++i)
        x[i] = i < border ? left : right;
    load(p, x);
}

/* ---- the sum, in halves: 16 to 8 to 4 to 2 to 1 */

/* The sum of the lanes in two steps: first for each channel, then for four channels side by side. */
template <typename R> BNBP_INLINE void half_sum(double* to, const lanes<R>& p) {
    const auto half = p.low + p.high;
    store(to, half.low + half.high);
}
BNBP_INLINE void sum_of_four(double* to, const double* from, ptrdiff_t apart) {
#if defined(__AVX2__)
    __m256d four[4];
    for (int i = 0; i < 4; ++i)
        four[i] = _mm256_loadu_pd(from + i * apart);
    const __m256d even =
        _mm256_add_pd(_mm256_permute2f128_pd(four[0], four[2], 0x20), _mm256_permute2f128_pd(four[0], four[2], 0x31));
    const __m256d odd =
        _mm256_add_pd(_mm256_permute2f128_pd(four[1], four[3], 0x20), _mm256_permute2f128_pd(four[1], four[3], 0x31));
    _mm256_storeu_pd(to, _mm256_hadd_pd(even, odd));
#else
    for (int i = 0; i < 4; ++i, from += apart)
        to[i] = (from[0] + from[2]) + (from[1] + from[3]);
#endif
}

/* ---- LANES numbers of a tensor, or the first `count` of them, in the type that is computed in */

template <typename T, int W> BNBP_INLINE void load_lanes(pack<T, 16, W>& p, const T* from, ptrdiff_t count) {
    if (count == 16) {
        load(p, from);
    } else {
        T x[16];
        load_part(x, from, count);
        load(p, x);
    }
}
template <typename T, int W, typename From>
BNBP_INLINE void load_lanes(pack<T, 16, W>& p, const From* from, ptrdiff_t count) {
    T x[16];
    if (count == 16)
        widen(x, from);
    else
        widen_part(x, from, count);
    load(p, x);
}

/* Adds float32 to float64. */
template <typename R> BNBP_INLINE void add_floats(lanes<R>& to, const float_lanes& more) {
#if defined(__AVX512F__)
    if constexpr (sizeof(R) == 8) {
        to.low.at += _mm512_cvtps_pd(_mm512_castps512_ps256(more.at));
        to.high.at += _mm512_cvtps_pd(_mm512_extractf32x8_ps(more.at, 1));
        return;
    }
#endif
    float x[16];
    double y[16];
    lanes<R> wide;
    store(x, more);
    widen(y, x);
    load(wide, y);
    to = to + wide;
}

/* LANES numbers back to a tensor, rounded once: into the caches or, if they are all, past them. */
template <typename To, typename T, int W>
BNBP_INLINE void store_lanes(To* to, const pack<T, 16, W>& p, ptrdiff_t count, bool streams) {
    alignas(64) To x[16];
    if constexpr (sizeof(To) == sizeof(T)) {
        store((T*)x, p);
    } else {
        T y[16];
        store(y, p);
        narrow(x, y);
    }
    if (count < 16) {
        store_part(to, x, count);
    } else if constexpr (sizeof(To) == 2) {
        if (streams)
            stream_half_line(to, x);
        else
            put_half_line(to, x);
    } else {
        for (int i = 0; i < 16; i += 64 / (int)sizeof(To))
            if (streams)
                stream_line(to + i, x + i);
            else
                put_line(to + i, x + i);
    }
}

/* The same for a tensor whose lines begin elsewhere than those of the other output. */
template <typename To, typename T, int W>
BNBP_INLINE void store_beside(To* to, const pack<T, 16, W>& p, ptrdiff_t count, bool streams) {
    To x[16];
    if (sizeof(To) == 2 || count < 16 || !streams) { /* a half line may begin where no instruction could stream it */
        store_lanes(to, p, count, false);
    } else {
        store_lanes(x, p, 16, false);
        for (int i = 0; i < 16; i += 64 / (int)sizeof(To))
            stream_anywhere(to + i, x + i);
    }
}

/* ---- some of it again, for callers that name the type of the data */

template <typename R> BNBP_INLINE void fill_for(lanes<R>& p, double value) { fill(p, value); }
template <typename R> BNBP_INLINE void load_for(lanes<R>& p, const double* from) { load(p, from); }
template <typename R> BNBP_INLINE void store_for(double* to, const lanes<R>& p) { store(to, p); }
template <typename R> BNBP_INLINE void load_lanes_for(lanes<R>& p, const R* from) { load_lanes(p, from, 16); }
template <typename R> BNBP_INLINE lanes<R> plus_for(const lanes<R>& a, const lanes<R>& b, double one) {
    return plus(a, b, one);
}

#endif /* BNBP_LANES_H */
