# Halves: sums of 16-bit numbers, of up to TOGETHER terms in float32 and from there on in float64.
#
# Each term is rounded twice and each of eight sums once, which is less than 2^-20 of the terms' magnitude. In the
# caches, a gradient of bfloat16 takes 0.65 to 0.72 of its time with all sums in float64 (AMD EPYC, Zen 4). Statistics
# are summed in float64 all the same: a variance is what is left of its terms, and the terms may be 2^16 times as large.

cdef inline void add_halves(const real* x, const real* dy, Py_ssize_t count, const float_lanes* shift,
                            float_lanes* delta, float_lanes* product) noexcept nogil:
    """Adds LANES elements side by side, or the first `count`, to their sums."""
    cdef float_lanes centered, deltas
    load_lanes(centered, x, count)
    load_lanes(deltas, dy, count)
    centered = centered + shift[0]
    if count < LANES:  # there is no deviation where there is no element
        centered = first_of(centered, count)
    delta[0] = delta[0] + deltas
    product[0] = product[0] + deltas * centered


cdef inline void add_widened(LaneSums[real]* sums, const float_lanes* delta, const float_lanes* product, real tag
                             ) noexcept nogil:
    add_floats(sums.delta, delta[0])
    add_floats(sums.product, product[0])


cdef inline void reduce_halves(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, float shift,
                               LaneSums[real]* sums) noexcept nogil:
    """Adds a part of a run, which begins TOGETHER * LANES elements after another one, if not first."""
    cdef float_lanes delta, product, shifts
    cdef Py_ssize_t i = 0, stop
    fill(shifts, shift)
    while i < count:
        fill(delta, <float> 0.0)
        fill(product, <float> 0.0)
        stop = min(i + TOGETHER * LANES, count)
        while i + LANES <= stop:
            look_ahead(x + i, dy + i, ahead, True)
            add_halves(x + i, dy + i, LANES, &shifts, &delta, &product)
            i += LANES
        if i < stop:
            add_halves(x + i, dy + i, stop - i, &shifts, &delta, &product)
            i = stop
        add_widened(sums, &delta, &product, <real> 0)
