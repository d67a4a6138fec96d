/* Numbers side by side, in as many registers as the level of the instruction set needs for them.

   A pack of N numbers is a register or two packs of half as many, so that all operations are written once, in halves,
   and once for a register. The order of a sum follows from N alone: every level computes the same bits. */
#ifndef BNBP_LANES_H
#define BNBP_LANES_H

#include "machine.h"

#if defined(__GNUC__)
#define BNBP_INLINE inline __attribute__((always_inline))
#else
#define BNBP_INLINE inline
#endif

/* How many float64 a register holds, and the type of one: an extension that GCC and Clang have in common. */
#if defined(__AVX512F__)
enum { BNBP_REGISTER = 8 };
#elif defined(__AVX__)
enum { BNBP_REGISTER = 4 };
#elif defined(__GNUC__)
enum { BNBP_REGISTER = 2 };
#else
enum { BNBP_REGISTER = 1 };
#endif
#if defined(__GNUC__)
typedef double register_type __attribute__((vector_size(8 * BNBP_REGISTER)));
typedef long long register_mask __attribute__((vector_size(8 * BNBP_REGISTER)));
#else
typedef double register_type;
#endif

template <int N> struct pack {
    pack<N / 2> low, high;
};
template <> struct pack<BNBP_REGISTER> {
    register_type at;
};

typedef pack<16> lanes;

/* The sums of LANES accumulators: of float64 with what was rounded off, of others with what was put aside. */
struct LaneSums {
    lanes delta, delta_lo, product, product_lo;
};

/* ---- the same number everywhere; from memory, and back */

BNBP_INLINE void fill(pack<BNBP_REGISTER>& p, double value) { p.at = value - register_type{}; }
template <int N> BNBP_INLINE void fill(pack<N>& p, double value) {
    fill(p.low, value);
    p.high = p.low;
}
BNBP_INLINE void load(pack<BNBP_REGISTER>& p, const double* from) { memcpy(&p.at, from, sizeof p.at); }
template <int N> BNBP_INLINE void load(pack<N>& p, const double* from) {
    load(p.low, from);
    load(p.high, from + N / 2);
}
BNBP_INLINE void store(double* to, const pack<BNBP_REGISTER>& p) { memcpy(to, &p.at, sizeof p.at); }
template <int N> BNBP_INLINE void store(double* to, const pack<N>& p) {
    store(to, p.low);
    store(to + N / 2, p.high);
}

/* ---- arithmetic */

#define BNBP_ELEMENTWISE(name, expression)                                                                             \
    BNBP_INLINE pack<BNBP_REGISTER> name(const pack<BNBP_REGISTER>& a, const pack<BNBP_REGISTER>& b) {                 \
        return {expression};                                                                                           \
    }                                                                                                                  \
    template <int N> BNBP_INLINE pack<N> name(const pack<N>& a, const pack<N>& b) {                                    \
        return {name(a.low, b.low), name(a.high, b.high)};                                                             \
    }
BNBP_ELEMENTWISE(operator+, a.at + b.at)
BNBP_ELEMENTWISE(operator-, a.at - b.at)
BNBP_ELEMENTWISE(operator*, a.at* b.at)

BNBP_INLINE pack<BNBP_REGISTER> operator-(const pack<BNBP_REGISTER>& a) { return {-a.at}; }
template <int N> BNBP_INLINE pack<N> operator-(const pack<N>& a) { return {-a.low, -a.high}; }

/* a + b and a - b by the units that multiply, see machine.h. */
BNBP_INLINE register_type fused(register_type a, register_type b, register_type c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}
BNBP_INLINE pack<BNBP_REGISTER> plus(const pack<BNBP_REGISTER>& a, const pack<BNBP_REGISTER>& b, double one) {
#if defined(__FMA__)
    pack<BNBP_REGISTER> unit;
    fill(unit, one);
    return {fused(a.at, unit.at, b.at)};
#else
    (void)one;
    return a + b;
#endif
}
template <int N> BNBP_INLINE pack<N> plus(const pack<N>& a, const pack<N>& b, double one) {
    return {plus(a.low, b.low, one), plus(a.high, b.high, one)};
}
BNBP_INLINE pack<BNBP_REGISTER> minus(const pack<BNBP_REGISTER>& a, const pack<BNBP_REGISTER>& b, double one) {
#if defined(__FMA__)
    pack<BNBP_REGISTER> unit;
    fill(unit, one);
    return {fused(a.at, unit.at, -b.at)};
#else
    (void)one;
    return a - b;
#endif
}
template <int N> BNBP_INLINE pack<N> minus(const pack<N>& a, const pack<N>& b, double one) {
    return {minus(a.low, b.low, one), minus(a.high, b.high, one)};
}

/* a * b + c, of factors whose product is exact. */
BNBP_INLINE pack<BNBP_REGISTER> plus_exact_product(const pack<BNBP_REGISTER>& a, const pack<BNBP_REGISTER>& b,
                                                   const pack<BNBP_REGISTER>& c) {
    return {fused(a.at, b.at, c.at)};
}
template <int N> BNBP_INLINE pack<N> plus_exact_product(const pack<N>& a, const pack<N>& b, const pack<N>& c) {
    return {plus_exact_product(a.low, b.low, c.low), plus_exact_product(a.high, b.high, c.high)};
}

/* The rounding error of p = a * b, see machine.h. */
BNBP_INLINE pack<BNBP_REGISTER> product_error(const pack<BNBP_REGISTER>& a, const pack<BNBP_REGISTER>& b,
                                              const pack<BNBP_REGISTER>& p) {
    pack<BNBP_REGISTER> error;
#if defined(__FMA__)
    error.at = fused(a.at, b.at, -p.at);
    const register_type tiny = 0x1p-960 - register_type{};
    const register_mask large = (p.at >= tiny) | (p.at <= -tiny) | (p.at != p.at);
    error.at = (register_type)((register_mask)error.at & large);
#else
    double x[BNBP_REGISTER], y[BNBP_REGISTER], z[BNBP_REGISTER];
    store(x, a), store(y, b), store(z, p);
    for (int i = 0; i < BNBP_REGISTER; ++i)
        z[i] = product_error(x[i], y[i], z[i]);
    load(error, z);
#endif
    return error;
}
template <int N> BNBP_INLINE pack<N> product_error(const pack<N>& a, const pack<N>& b, const pack<N>& p) {
    return {product_error(a.low, b.low, p.low), product_error(a.high, b.high, p.high)};
}

/* ---- the first `count` of the numbers, and 0 for the others */

BNBP_INLINE pack<BNBP_REGISTER> first_of(const pack<BNBP_REGISTER>& p, ptrdiff_t count) {
#if defined(__AVX512F__)
    const unsigned mask = count >= 8 ? 0xff : count <= 0 ? 0 : (1u << count) - 1;
    return {_mm512_maskz_mov_pd((__mmask8)mask, p.at)};
#elif defined(__AVX2__)
    return {_mm256_and_pd(p.at, _mm256_castsi256_pd(first_of_four(count)))};
#else
    double x[BNBP_REGISTER];
    pack<BNBP_REGISTER> some;
    store(x, p);
    for (int i = 0; i < BNBP_REGISTER; ++i)
        x[i] = i < count ? x[i] : 0.0;
    load(some, x);
    return some;
#endif
}
template <int N> BNBP_INLINE pack<N> first_of(const pack<N>& p, ptrdiff_t count) {
    return {first_of(p.low, count), first_of(p.high, count - N / 2)};
}
/* The same of those at even places, which are in the first half, and those at odd ones. */
BNBP_INLINE lanes first_of_pairs(const lanes& p, ptrdiff_t count) {
    return {first_of(p.low, (count + 1) / 2), first_of(p.high, count / 2)};
}

/* ---- the sum, in halves: 16 to 8 to 4 to 2 to 1 */

BNBP_INLINE double sum(const pack<BNBP_REGISTER>& p) {
    double x[BNBP_REGISTER];
    store(x, p);
    for (int half = BNBP_REGISTER / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            x[i] += x[i + half];
    return x[0];
}
#if defined(__AVX512F__)
BNBP_INLINE __m256d to_four(const pack<8>& p) {
    return _mm256_add_pd(_mm512_castpd512_pd256(p.at), _mm512_extractf64x4_pd(p.at, 1));
}
#elif defined(__AVX__)
BNBP_INLINE __m256d to_four(const pack<4>& p) { return p.at; }
#endif
template <int N> BNBP_INLINE double sum(const pack<N>& p) { return sum(p.low + p.high); }

/* The sums of the lanes of four channels, which are `apart` doubles from each other. */
#if defined(__AVX__)
template <int N> BNBP_INLINE __m256d to_four(const pack<N>& p) { return to_four(p.low + p.high); }
#endif
static BNBP_INLINE void sum_of_four(double* to, const double* from, ptrdiff_t apart) {
#if defined(__AVX__)
    __m256d four[4];
    for (int i = 0; i < 4; ++i) {
        lanes p;
        load(p, from + i * apart);
        four[i] = to_four(p);
    }
    const __m256d ac = _mm256_add_pd(_mm256_permute2f128_pd(four[0], four[2], 0x20),
                                     _mm256_permute2f128_pd(four[0], four[2], 0x31));
    const __m256d bd = _mm256_add_pd(_mm256_permute2f128_pd(four[1], four[3], 0x20),
                                     _mm256_permute2f128_pd(four[1], four[3], 0x31));
    _mm256_storeu_pd(to, _mm256_hadd_pd(ac, bd));
#else
    for (int i = 0; i < 4; ++i) {
        lanes p;
        load(p, from + i * apart);
        to[i] = sum(p);
    }
#endif
}

#endif /* BNBP_LANES_H */
