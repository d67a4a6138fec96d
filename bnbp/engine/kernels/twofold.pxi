# Arithmetic that loses nothing: sums and products of float64 with what they have rounded off.
#
# Ogita, Rump and Oishi, "Accurate sum and dot product", 2005.

cdef struct Twofold:  # the unevaluated sum of two float64 numbers, about 106 bits
    double hi
    double lo


cdef inline number two_sum_of(number a, number b, number* error, double unit) noexcept nogil:
    """a + b, and what it has rounded off (Knuth)."""
    cdef number hi = a + b, back = minus(hi, a, unit)
    error[0] = plus(minus(a, hi - back, unit), b - back, unit)
    return hi


cdef inline Twofold two_sum(double a, double b) noexcept nogil:
    """a + b exactly."""
    cdef Twofold r
    r.hi = two_sum_of(a, b, &r.lo, 1.0)
    return r


cdef inline Twofold two_product(double a, double b) noexcept nogil:
    """a * b exactly, short of underflow."""
    cdef Twofold r
    r.hi = a * b
    r.lo = product_error(a, b, r.hi)
    return r


cdef inline Twofold whole(double hi, double lo) noexcept nogil:
    """hi + lo with no overlap. Where `hi` has overflowed, `lo` is NaN and has nothing to add."""
    cdef Twofold r
    if lo != lo:
        lo = 0.0
    r.hi = hi + lo
    r.lo = lo - (r.hi - hi) if r.hi - r.hi == 0 else 0.0
    return r


cdef inline Twofold times(Twofold a, Twofold b) noexcept nogil:
    cdef Twofold r = two_product(a.hi, b.hi)
    return whole(r.hi, r.lo + (a.hi * b.lo + a.lo * b.hi))


cdef inline Twofold over(Twofold a, double b) noexcept nogil:
    cdef double q = a.hi / b
    cdef Twofold back = two_product(q, b)
    return whole(q, ((a.hi - back.hi) - back.lo + a.lo) / b)


cdef inline Twofold inverse_square_root(Twofold a) noexcept nogil:
    """One Newton step from the float64 result: r (3 - a r^2) / 2."""
    cdef Twofold r
    r.hi, r.lo = 1.0 / sqrt(a.hi), 0.0
    cdef Twofold product = times(a, times(r, r))
    return whole(r.hi, r.hi * 0.5 * ((1.0 - product.hi) - product.lo))


cdef inline void add(number* hi, number* lo, number value, number rest, double unit) noexcept nogil:
    """Adds value + rest to the sum hi + lo; `rest` is far below `value`."""
    cdef number error
    hi[0] = two_sum_of(hi[0], value, &error, unit)
    lo[0] = lo[0] + plus(error, rest, unit)


cdef inline void add_exact(number* hi, number* lo, number value, double unit) noexcept nogil:
    """Adds a value that nothing was rounded off."""
    cdef number error
    hi[0] = two_sum_of(hi[0], value, &error, unit)
    lo[0] = lo[0] + error
