# Halves: sums of 16-bit numbers, of up to 2 TOGETHER terms in float32 and from there on in float64.
#
# Each term is rounded twice, each of the eight sums of a chain once, and two chains are added up: ten roundings, which
# are less than 2^-20 of the terms' magnitude. In the caches, a gradient of bfloat16 takes half of its time with all
# sums in float64 (AMD EPYC, Zen 4). Statistics are summed in float64 all the same: a variance is what is left of its
# terms, and the terms may be 2^16 times as large.

cdef struct Chain:         # the sums of LANES accumulators in float32
    float_lanes delta
    float_lanes product


cdef inline void begin_chain(Chain* chain) noexcept nogil:
    fill(chain.delta, <float> 0.0)
    fill(chain.product, <float> 0.0)


cdef inline void join_chains(Chain* chain, const Chain* other) noexcept nogil:
    chain.delta = chain.delta + other.delta
    chain.product = chain.product + other.product


cdef inline void add_halves(const real* x, const real* dy, const real* v, Py_ssize_t count, const float_lanes* shift,
                            const Bounds[real]* bounds, bint masked, Chain* chain) noexcept nogil:
    """Adds LANES elements side by side, or the first `count`, to their sums."""
    cdef float_lanes centered, delta
    cdef real[16] line
    load_lanes(centered, x, count)
    if masked:
        load_between(line, dy, v, count, bounds[0])
        dy = line
    load_lanes(delta, dy, count)
    centered = centered + shift[0]
    if count < LANES:  # there is no deviation where there is no element
        centered = first_of(centered, count)
    chain.delta = chain.delta + delta
    chain.product = chain.product + delta * centered


cdef inline void reduce_halves(const real* x, const real* dy, const real* v, Py_ssize_t count, Py_ssize_t ahead,
                               float shift, const Bounds[real]* bounds, bint masked, LaneSums[real]* sums
                               ) noexcept nogil:
    """Adds a part of a run, which begins a multiple of 2 TOGETHER * LANES elements after another one, if not first."""
    cdef Chain chain, more
    cdef float_lanes shifts
    cdef Py_ssize_t i = 0, stop
    fill(shifts, shift)
    while i < count:
        begin_chain(&chain)
        begin_chain(&more)
        stop = min(i + 2 * TOGETHER * LANES, count)
        while i + 2 * LANES <= stop:
            look_ahead_to(x + i, dy + i, v + i, ahead, True, masked)
            add_halves(x + i, dy + i, v + i, LANES, &shifts, bounds, masked, &chain)
            i += LANES
            look_ahead_to(x + i, dy + i, v + i, ahead, True, masked)
            add_halves(x + i, dy + i, v + i, LANES, &shifts, bounds, masked, &more)
            i += LANES
        if i + LANES <= stop:
            add_halves(x + i, dy + i, v + i, LANES, &shifts, bounds, masked, &chain)
            i += LANES
        if i < stop:
            add_halves(x + i, dy + i, v + i, stop - i, &shifts, bounds, masked, &more)
            i = stop
        join_chains(&chain, &more)
        add_floats(sums.delta, chain.delta)
        add_floats(sums.product, chain.product)
