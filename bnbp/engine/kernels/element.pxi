# An element: its terms in the sums, and its value in the output.
#
# Sums are in float64. For float32 that is 29 bits more than the data has: the product of two is exact, and a sum of
# 256 terms is off by at most half a unit in the last place of float32 at a condition number of 2^20. For float64 there
# is nothing to spare, and the sums carry what each operation has rounded off: of the difference x - mean, of the
# product, and of the sum. `apply` is in the type of the data, and the mean is subtracted first: a*dy + b*x + c with
# precomputed a, b, c would be cheaper and lose everything to cancellation when the mean is far from 0. Only a channel
# whose coefficients are out of float32's range is computed in float64. 16-bit numbers are float32 in `apply`, and the
# result is rounded once.

cdef inline void add_term(number* delta, number* delta_lo, number* product, number* product_lo, number dy,
                          number centered, number rounded_off, bint statistics, double unit, real tag
                          ) noexcept nogil:
    """Adds elements to their sums; `centered` is x - mean, and for float64 `rounded_off` belongs to it.

    For statistics the deviation takes the place of dy.
    """
    cdef number square
    if statistics:
        dy = centered
    if real is double:
        square = dy * centered
        if statistics:
            add(product, product_lo, square,
                product_error(dy, centered, square) + (centered + centered) * rounded_off, unit)
            add(delta, delta_lo, dy, rounded_off, unit)
        else:
            add(product, product_lo, square, product_error(dy, centered, square) + dy * rounded_off, unit)
            add_exact(delta, delta_lo, dy, unit)
    else:
        delta[0] = plus(delta[0], dy, unit)
        product[0] = plus(product[0], dy * centered, unit)


cdef inline void add_part(number* hi, number* lo, number part, number part_lo, real tag) noexcept nogil:
    """Adds a part of a sum: but for float64, plain float64 is enough, see e."""
    if real is double:
        add(hi, lo, part, part_lo, 1.0)
    else:
        hi[0] = hi[0] + part


cdef inline arith value(arith x, arith dy, arith a, arith b, arith c, arith d, bint normalize) noexcept nogil:
    """Elements of the output."""
    if normalize:
        return ((x - a) - b) * c + d          # a + b the mean, c = scale, d = beta
    return ((dy - a) - (x - b) * c) * d       # a = delta_sum / m, b the mean, c = slope, d = scale
