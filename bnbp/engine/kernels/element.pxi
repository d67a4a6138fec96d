# An element and a channel.

cdef struct Sums:         # what reduce leaves of a chunk; a row of `partial`
    double delta          # sum dy_i                       or, for statistics, sum (x_i - shift)
    double delta_lo
    double product        # sum dy_i (x_i - mean)          or sum (x_i - shift)^2
    double product_lo


cdef struct Channel:
    double mean           # what reduce subtracts
    double a, b, c, d     # what apply computes with; see `value`
    bint in_range         # all four are numbers of full precision in float32


cdef inline void add_term(double* delta, double* delta_lo, double* product, double* product_lo, double x, double dy,
                          double mean, bint statistics, bint exact, double unit, real tag) noexcept nogil:
    """Adds an element to the sums. For statistics the deviation x - mean takes the place of dy.

    `exact` says that no product rounds, see e.
    """
    cdef Twofold centered, square
    cdef double d, d_lo = 0.0
    if real is double:
        centered = two_sum(x, -mean, unit)
        d = centered.hi if statistics else dy
        square = two_product(d, centered.hi)
        if statistics:
            d_lo = centered.lo
            square.lo += 2.0 * centered.hi * centered.lo
        else:
            square.lo += d * centered.lo
        add(delta, delta_lo, d, d_lo, unit)
        add(product, product_lo, square.hi, square.lo, unit)
    else:
        centered.hi = x - mean
        d = centered.hi if statistics else dy
        delta[0] += d
        product[0] = plus_exact_product(d, centered.hi, product[0]) if exact else product[0] + d * centered.hi


cdef inline void add_part(double* hi, double* lo, double part, double part_lo, real tag) noexcept nogil:
    """Adds a part of a sum: but for float64, plain float64 is enough, see e."""
    if real is double:
        add(hi, lo, part, part_lo)
    else:
        hi[0] += part


cdef inline void add_sums(Sums* sums, double delta, double delta_lo, double product, double product_lo, real tag
                          ) noexcept nogil:
    add_part(&sums.delta, &sums.delta_lo, delta, delta_lo, tag)
    add_part(&sums.product, &sums.product_lo, product, product_lo, tag)


cdef inline arith value(arith x, arith dy, arith a, arith b, arith c, arith d, bint normalize) noexcept nogil:
    """An element of the output."""
    if normalize:
        return ((x - a) - b) * c + d          # a + b the mean, c = scale, d = beta
    return ((dy - a) - (x - b) * c) * d       # a = delta_sum / m, b the mean, c = slope, d = scale


cdef inline bint in_range(double v) noexcept nogil:
    return v == 0 or (fabs(v) >= 1.1754943508222875e-38 and fabs(v) <= 3.4028234663852886e+38)
