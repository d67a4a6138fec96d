/// \file
/// \brief The statistics of a whole batch from those of parts of one size, as in _statistics.py. Not an interface.
///
/// A number is the unevaluated sum of two, about 106 bits: T. J. Dekker, "A floating-point technique for extending the
/// available precision", Numerische Mathematik 18 (1971), 224-242. Compile without contraction of a*b+c.
#ifndef BNBP_JAX_MERGE_H
#define BNBP_JAX_MERGE_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bnbp/tensor.hpp"

namespace bnbp {
namespace merge {

struct Twofold {
    double high = 0, low = 0;
};

/// Adds exactly (Knuth).
inline Twofold two_sum(double a, double b) {
    const double s = a + b, back = s - a;
    return {s, (a - (s - back)) + (b - back)};
}

/// Two numbers of 26 bits, whose sum is a.
inline Twofold halves(double a) {
    const double big = 134217729.0 * a, high = big - (big - a);
    return {high, a - high};
}

/// Multiplies exactly, short of overflow and underflow.
inline Twofold two_product(double a, double b) {
    const double p = a * b;
    const Twofold x = halves(a), y = halves(b);
    return {p, ((x.high * y.high - p) + x.high * y.low + x.low * y.high) + x.low * y.low};
}

inline Twofold add(Twofold a, Twofold b) {
    const Twofold s = two_sum(a.high, b.high);
    return two_sum(s.high, s.low + (a.low + b.low));
}

inline Twofold times(Twofold a, double b) {
    const Twofold p = two_product(a.high, b);
    return two_sum(p.high, p.low + a.low * b);
}

inline Twofold square(Twofold a) {
    const Twofold p = two_product(a.high, a.high);
    return two_sum(p.high, p.low + 2 * a.high * a.low);
}

inline Twofold over(Twofold a, double b) {
    const double q = a.high / b;
    const Twofold p = two_product(q, b);
    return two_sum(q, ((a.high - p.high) - p.low + a.low) / b);
}

struct Statistics {
    double mean, variance;
};

/// One channel of `parts` parts of `count` elements. A part's mean is at `means[k * step]`, its squared deviations are
/// at `m2s[k * step]`. The sums are carried in the order of the parts and rounded once.
inline Statistics merge(const double* means, const double* m2s, std::size_t parts, std::size_t step, double count) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (!(count > 0)) {
        return {nan, nan};
    }
    const double whole = count * static_cast<double>(parts), first = means[0];
    Twofold total, m2;
    double plain = 0;
    for (std::size_t k = 0; k < parts; ++k) { // as distances from the first: equal means are then exactly at 0
        total = add(total, times(two_sum(means[k * step], -first), count));
        plain += means[k * step] * count;
    }
    const Twofold offset = over(total, whole);
    for (std::size_t k = 0; k < parts; ++k) {
        const Twofold apart = add(two_sum(means[k * step], -first), {-offset.high, -offset.low});
        m2 = add(m2, add({m2s[k * step], 0}, times(square(apart), count)));
    }
    const Twofold sum = two_sum(first, offset.high);
    const double mean = sum.high + (sum.low + offset.low);
    if (!std::isfinite(mean)) { // a channel with a NaN or an infinity has no more than that to say
        return {plain / whole, nan};
    }
    return {mean, (m2.high + m2.low) / whole};
}

/// A number of `bits` bits (without the first, which is 1) whose exponents start at `least`; rounded to nearest, even.
inline double rounded(double value, int bits, int least) {
    if (value == 0 || !std::isfinite(value)) {
        return value;
    }
    int exponent = std::ilogb(value);
    exponent = exponent < least ? least : exponent;
    return std::ldexp(std::nearbyint(std::ldexp(value, bits - exponent)), exponent - bits);
}

/// Writes `value`, rounded once, as element `k` of a vector.
inline void store(void* data, std::size_t k, ElementType type, double value) {
    if (type == ElementType::f64) {
        static_cast<double*>(data)[k] = value;
    } else if (type == ElementType::f32) {
        static_cast<float*>(data)[k] = static_cast<float>(value);
    } else {
        const bool brain = type == ElementType::bf16;
        const float single = static_cast<float>(brain ? rounded(value, 7, -126) : rounded(value, 10, -14));
        std::uint32_t bits;
        std::memcpy(&bits, &single, sizeof bits);
        if (!brain) {
            const std::uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
            bits = (size >= 0x47800000 // 65536 and more, and NaN
                        ? 0x7c00 | (size > 0x7f800000 ? 0x200 : 0)
                        : size < 0x38800000 // below 2^-14
                              ? static_cast<std::uint32_t>(std::ldexp(std::fabs(single), 24))
                              : (size >> 13) - (112 << 10)) |
                   sign;
        } else {
            bits = bits >> 16 | (std::isnan(single) ? 0x40 : 0);
        }
        static_cast<std::uint16_t*>(data)[k] = static_cast<std::uint16_t>(bits);
    }
}

} // namespace merge
} // namespace bnbp

#endif // BNBP_JAX_MERGE_H
