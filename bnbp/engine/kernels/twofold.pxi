# Arithmetic that loses nothing.

cdef struct Twofold:  # the unevaluated sum of two float64 numbers, about 106 bits
    double hi
    double lo


cdef inline Twofold two_sum(double a, double b, double unit=1.0) noexcept nogil:
    """a + b exactly (Knuth)."""
    cdef Twofold r
    cdef double back
    r.hi = a + b
    back = minus(r.hi, a, unit)
    r.lo = plus(minus(a, r.hi - back, unit), b - back, unit)
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


cdef inline void add(double* hi, double* lo, double value, double rest, double unit=1.0) noexcept nogil:
    """Adds value + rest to the sum hi + lo; `rest` is far below `value`."""
    cdef Twofold r = two_sum(hi[0], value, unit)
    hi[0] = r.hi
    lo[0] += plus(r.lo, rest, unit)
