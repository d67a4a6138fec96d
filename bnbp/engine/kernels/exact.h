/// \file
/// \brief Exact sums: numbers of float64 are added without rounding, in any order, and their sum is rounded once.
///
/// A sum is a row of digits in base 2^32, from the smallest subnormal to beyond the largest number: a number adds to
/// three of them, and carries wait. Kulisch's long accumulator, in the form of R. M. Neal, "Fast exact summation using
/// small and large superaccumulators", arXiv:1505.05571 (2015). Digits of a row are 64 bits wide while numbers are
/// added. `settle` then carries, and leaves balanced digits, from -2^31 to 2^31 - 1. These are the same for the same
/// sum, whatever it was added up from.
#ifndef BNBP_ENGINE_KERNELS_EXACT_H
#define BNBP_ENGINE_KERNELS_EXACT_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace bnbp {
namespace exact {

/// The weight of a sum's first digit is 2^-POINT, that of a sum of squares 2^-(2 POINT).
constexpr int POINT = 1088;
/// Flags of what is not a number; those of the second sum are further up.
enum Flag { PLUS_INFINITY = 1, MINUS_INFINITY = 2, NOT_A_NUMBER = 4, SECOND = 3 };

/// Which digits of two sums a channel's row has, one after the other, and after them the flags. A sum is of numbers, or
/// of products of two numbers. Wide rows are for what comes of float64: they have all digits, enough for 2^30 of the
/// largest numbers. What comes of smaller types is between 2^-300 and 2^300, its squares between 2^-640 and 2^400.
struct Row {
    std::ptrdiff_t first_low, first_count, second_low, second_count;
    std::ptrdiff_t size() const { return first_count + second_count + 1; }
};

inline Row row_of(bool statistics, bool wide) {
    return wide ? (statistics ? Row{0, 70, 0, 140} : Row{0, 70, 0, 70})
                : (statistics ? Row{22, 24, 48, 36} : Row{22, 24, 22, 24});
}

/// The digits of a channel, as if they were all there.
struct Digits {
    std::int64_t *first, *second, *flags;
};

inline Digits digits_of(std::int64_t* rows, const Row& row, std::ptrdiff_t channel) {
    std::int64_t* const begin = rows + channel * row.size();
    return {begin - row.first_low, begin + row.first_count - row.second_low, begin + row.size() - 1};
}

/// A number as three digits of one sign.
struct Parts {
    std::uint64_t digit[3];
    std::ptrdiff_t first;
    bool negative;
    /// The digits of 0 would be the first ones of all, which a narrow row does not have.
    bool is_zero() const { return !(digit[0] | digit[1] | digit[2]); }
};

/// Takes a number apart; false if it is infinite or none.
inline bool take_apart(double number, Parts& parts) {
    std::uint64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
    if (exponent == 0x7ff) {
        return false;
    }
    const std::uint64_t mantissa = (bits & ((1ull << 52) - 1)) | (exponent ? 1ull << 52 : 0);
    const int place = std::max(exponent, 1) - 1075 + POINT, shift = place & 31;
    parts.first = place >> 5;
    parts.digit[0] = mantissa << shift & 0xffffffff;
    parts.digit[1] = mantissa << shift >> 32;
    parts.digit[2] = shift ? mantissa >> (64 - shift) : 0;
    parts.negative = bits >> 63;
    return true;
}

inline std::int64_t with_sign(std::uint64_t digit, bool negative) {
    const auto value = static_cast<std::int64_t>(digit);
    return negative ? -value : value;
}

inline int flag_of(double number) {
    return std::isnan(number) ? NOT_A_NUMBER : number > 0 ? PLUS_INFINITY : MINUS_INFINITY;
}

/// Adds a number `times` times, at most 2^31.
inline void add(std::int64_t* sum, std::int64_t* flags, int second, double number, std::uint64_t times) {
    Parts parts;
    if (!take_apart(number, parts)) {
        *flags |= static_cast<std::int64_t>(flag_of(number)) << second;
        return;
    }
    if (parts.is_zero()) {
        return;
    }
    std::int64_t* const at = sum + parts.first;
    std::uint64_t carry = 0;
    for (int k = 0; k < 3; ++k) {
        carry += parts.digit[k] * times;
        at[k] += with_sign(carry & 0xffffffff, parts.negative);
        carry >>= 32;
    }
    at[3] += with_sign(carry, parts.negative);
}

/// Adds the product of two numbers `times` times.
inline void add_product(std::int64_t* squares, const Parts& a, const Parts& b, std::uint64_t times) {
    if (a.is_zero() || b.is_zero()) {
        return;
    }
    std::uint64_t column[8] = {}, carry = 0, factor[4];
    for (int k = 0; k < 3; ++k) {
        carry += a.digit[k] * times;
        factor[k] = carry & 0xffffffff;
        carry >>= 32;
    }
    factor[3] = carry;
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 3; ++j) {
            const std::uint64_t product = factor[i] * b.digit[j];
            column[i + j] += product & 0xffffffff;
            column[i + j + 1] += product >> 32;
        }
    }
    std::int64_t* const at = squares + a.first + b.first;
    for (int k = 0; k < 8; ++k) {
        at[k] += with_sign(column[k], a.negative != b.negative);
    }
}

/// Adds what the gradient's sums of a chunk are, each a number and what it has rounded off. An infinity rounds off what
/// is no number.
inline void add_sums(const Digits& to, double delta, double delta_lo, double product, double product_lo) {
    add(to.first, to.flags, 0, delta, 1);
    add(to.second, to.flags, SECOND, product, 1);
    if (std::isfinite(delta)) {
        add(to.first, to.flags, 0, delta_lo, 1);
    }
    if (std::isfinite(product)) {
        add(to.second, to.flags, SECOND, product_lo, 1);
    }
}

/// Adds what statistics of `count` elements say: their sum, and the sum of their squares. The mean is `mean + rest`.
inline void add_statistics(const Digits& to, double mean, double rest, double m2, std::uint64_t count) {
    Parts of_mean, of_rest;
    if (!take_apart(mean, of_mean) || !take_apart(rest, of_rest)) {
        *to.flags |= (std::isfinite(mean) ? NOT_A_NUMBER : flag_of(mean)) | NOT_A_NUMBER << SECOND;
        return;
    }
    add(to.first, to.flags, 0, mean, count);
    add_product(to.second, of_mean, of_mean, count);
    if (rest != 0) {
        add(to.first, to.flags, 0, rest, count);
        add_product(to.second, of_mean, of_rest, 2 * count);
        add_product(to.second, of_rest, of_rest, count);
    }
    add(to.second + POINT / 32, to.flags, SECOND, m2, 1);
}

/// Adds an exact sum that three numbers are.
inline void add_three(std::int64_t* sum, std::int64_t* flags, int second, const double* first, const double* middle,
                      const double* last, std::uint64_t times) {
    add(sum, flags, second, *first, times);
    if (*middle != 0 || *last != 0) {
        add(sum, flags, second, *middle, times);
        add(sum, flags, second, *last, times);
    }
}

/// Carries, and leaves balanced digits. The first and the last that are not 0 are taken into `low` and `high`.
inline void settle(std::int64_t* digits, std::ptrdiff_t count, std::ptrdiff_t& low, std::ptrdiff_t& high) {
    std::int64_t carry = 0;
    for (std::ptrdiff_t k = 0; k < count; ++k) {
        const std::int64_t value = digits[k] + carry;
        if (value == 0) {
            digits[k] = carry = 0;
            continue;
        }
        const auto digit = static_cast<std::int32_t>(static_cast<std::uint32_t>(value));
        carry = (value - digit) >> 32;
        digits[k] = digit;
        if (digit) {
            low = std::min(low, k);
            high = std::max(high, k + 1);
        }
    }
}

/// A number in twice the precision of float64, and times 2^exponent.
struct Wide {
    double hi, lo;
    int exponent;
};

inline void add_to(Wide& sum, double number) {
    const double whole = sum.hi + number, back = whole - sum.hi;
    sum.lo += (sum.hi - (whole - back)) + (number - back);
    sum.hi = whole;
}

/// The leading digits of a sum whose first digit has the weight 2^exponent: 160 bits of it, which are the same for the
/// same sum.
inline Wide leading(const std::int64_t* digits, std::ptrdiff_t count, int exponent) {
    while (count > 0 && digits[count - 1] == 0) {
        --count;
    }
    const std::ptrdiff_t first = std::max<std::ptrdiff_t>(count - 6, 0);
    static const double scale[] = {0x1p0, 0x1p32, 0x1p64, 0x1p96, 0x1p128, 0x1p160};
    Wide sum{0, 0, exponent + static_cast<int>(32 * first)};
    for (std::ptrdiff_t k = count; k-- > first;) {
        add_to(sum, static_cast<double>(digits[k]) * scale[k - first]);
    }
    const double whole = sum.hi + sum.lo;
    sum.lo = sum.lo - (whole - sum.hi);
    sum.hi = whole;
    return sum;
}

/// Bits before the leading one of a digit that is not 0.
inline int leading_zeros(std::uint32_t digit) {
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_clz(digit);
#else
    int count = 0;
    for (; !(digit & 0x80000000); digit <<= 1) {
        ++count;
    }
    return count;
#endif
}

/// The nearest number to a sum whose first digit has the weight 2^exponent, of balanced digits, which are used up.
inline double nearest(std::int64_t* digits, std::ptrdiff_t count, int exponent) {
    while (count > 0 && digits[count - 1] == 0) {
        --count;
    }
    if (count == 0) {
        return 0;
    }
    const bool negative = digits[count - 1] < 0;
    std::int64_t borrowed = 0; // the magnitude, in digits that are not negative
    for (std::ptrdiff_t k = 0; k < count; ++k) {
        const std::int64_t digit = (negative ? -digits[k] : digits[k]) - borrowed;
        borrowed = digit < 0;
        digits[k] = digit + (borrowed << 32);
    }
    while (digits[count - 1] == 0) {
        --count;
    }
    // 64 bits from the leading one on. What is below is no more than a last bit that is set: it breaks ties.
    const auto digit = [&](std::ptrdiff_t k) { return k < 0 ? 0 : static_cast<std::uint64_t>(digits[k]); };
    const int shift = leading_zeros(static_cast<std::uint32_t>(digit(count - 1)));
    std::uint64_t bits = (digit(count - 1) << 32 | digit(count - 2)) << shift;
    const std::uint64_t next = digit(count - 3) << shift;
    bits |= next >> 32;
    bool more = (next & 0xffffffff) != 0;
    for (std::ptrdiff_t k = 0; k < count - 3; ++k) {
        more |= digits[k] != 0;
    }
    const double rounded = static_cast<double>(bits | (more ? 1 : 0));
    return std::ldexp(negative ? -rounded : rounded, exponent + static_cast<int>(32 * (count - 2)) - shift);
}

/// A quotient, to within a little more than half a unit in the last place.
inline double round_over(const Wide& sum, double count) {
    const double quotient = sum.hi / count;
    const double left = std::fma(-quotient, count, sum.hi) + sum.lo;
    return std::ldexp(quotient + left / count, sum.exponent);
}

/// What stands for a sum with these flags.
inline double special(std::int64_t flags) {
    using Limits = std::numeric_limits<double>;
    return flags == PLUS_INFINITY    ? Limits::infinity()
           : flags == MINUS_INFINITY ? -Limits::infinity()
                                     : Limits::quiet_NaN();
}

/// Mean and m2 from the sum of `count` elements and that of their squares, balanced digits of the weights from
/// 2^(32 first - POINT) and 2^(32 first - 2 POINT): m2 = (count squares - sum^2) / count, where nothing cancels that
/// was rounded. `work` is room for digits.
inline void round_statistics(const std::int32_t* sum, std::ptrdiff_t sums, std::ptrdiff_t first_of_sum,
                             const std::int32_t* squares, std::ptrdiff_t count_of_squares,
                             std::ptrdiff_t first_of_squares, std::int64_t count, std::vector<std::int64_t>& work,
                             double& mean, double& m2) {
    const std::ptrdiff_t first = std::min(2 * first_of_sum, first_of_squares);
    const std::ptrdiff_t last = std::max(2 * (first_of_sum + sums), first_of_squares + count_of_squares) + 4;
    work.assign(static_cast<std::size_t>(last - first), 0);
    std::int64_t* const difference = work.data();
    const auto put = [&](std::ptrdiff_t place, std::int64_t product) {
        difference[place - first] += product & 0xffffffff;
        difference[place - first + 1] += product >> 32;
    };
    for (std::ptrdiff_t k = 0; k < count_of_squares; ++k) {
        put(first_of_squares + k, squares[k] * (count & 0xffffffff));
        put(first_of_squares + k + 1, squares[k] * (count >> 32));
    }
    for (std::ptrdiff_t i = 0; i < sums; ++i) {
        for (std::ptrdiff_t j = 0; j < sums; ++j) {
            put(2 * first_of_sum + i + j, -(static_cast<std::int64_t>(sum[i]) * sum[j]));
        }
    }
    std::ptrdiff_t low = last, high = 0;
    settle(difference, last - first, low, high);
    m2 = std::max(round_over(leading(difference, last - first, static_cast<int>(32 * first) - 2 * POINT),
                             static_cast<double>(count)),
                  0.0);
    work.assign(sum, sum + sums);
    mean =
        round_over(leading(work.data(), sums, static_cast<int>(32 * first_of_sum) - POINT), static_cast<double>(count));
}

} // namespace exact
} // namespace bnbp

#endif // BNBP_ENGINE_KERNELS_EXACT_H
