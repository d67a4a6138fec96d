# Sums: LANES accumulators side by side, and how elements are added to them.
#
# An accumulator takes TERMS terms at most; then its sum is put aside, to a second one, and it begins anew. So the
# error of a chunk does not depend on its length. The accumulators of float64 need no such thing: their second ones
# carry what the first have rounded off.

cdef inline void add_eight(const real* x, const real* dy, Py_ssize_t count, int k, const lanes[real]* shift,
                           LaneSums[real]* sums, bint statistics, double unit) noexcept nogil:
    """Adds the lanes of one half (`k`: 0 or 1) to their sums, or the first `count` of these: of float64."""
    cdef eight centered, rounded_off, delta
    if real is double:
        load_eight(centered, x + 8 * k, count)
        centered = two_sum_of(centered, eight_of((<lanes[real]*> shift)[0], k), &rounded_off, unit)
        if count < 8:  # there is no deviation where there is no element
            centered, rounded_off = first_of(centered, count), first_of(rounded_off, count)
        if not statistics:
            load_eight(delta, dy + 8 * k, count)
        add_term(&eight_of(sums.delta, k), &eight_of(sums.delta_lo, k), &eight_of(sums.product, k),
                 &eight_of(sums.product_lo, k), delta, centered, rounded_off, statistics, unit, <real> 0)


cdef inline void add_quarter(const real* x, const real* dy, const real* v, Py_ssize_t count, int k,
                             const lanes[real]* shift, const Bounds[real]* bounds, LaneSums[real]* sums,
                             bint statistics, bint masked, double unit) noexcept nogil:
    """Adds the first `count` lanes of quarter `k` to their sums: of the other types."""
    cdef quarter centered, delta
    if real is not double:
        load_quarter(centered, x + 4 * k, count)
        centered = centered + quarter_of((<lanes[real]*> shift)[0], k)
        if count < 4:
            centered = first_of(centered, count)
        if masked:
            quarter_between(delta, dy + 4 * k, v + 4 * k, count, k, bounds[0])
        elif not statistics:
            load_quarter(delta, dy + 4 * k, count)
        add_term(&quarter_of(sums.delta, k), NULL, &quarter_of(sums.product, k), NULL, delta, centered, centered,
                 statistics, unit, <real> 0)


cdef inline void add_lanes(const real* x, const real* dy, const real* v, const lanes[real]* shift,
                           const Bounds[real]* bounds, LaneSums[real]* sums, bint statistics, bint masked, double unit
                           ) noexcept nogil:
    """Adds LANES elements side by side to their sums; `shift` is the mean of each, negated.

    `masked`: dy counts as 0 where `v` is not between the bounds.
    """
    cdef real[16] line
    cdef lanes[real] centered, delta
    if real is double or (real is float and not (masked and MASKED_CONVERSION)):
        if masked:
            load_between(line, dy, v, LANES, bounds[0])
            dy = line
        # A part at a time: AVX2 has too few registers for all 16 at once. Accumulators would go through memory.
        add_rest(x, dy, v, LANES, shift, bounds, sums, statistics, False, unit)
    else:
        load_lanes(centered, x)
        centered = centered + shift[0]
        delta = centered
        if masked:
            widen_between(delta, dy, v, bounds[0])
        elif not statistics:
            load_lanes(delta, dy)
        sums.delta = plus(sums.delta, delta, unit)
        sums.product = plus(sums.product, delta * centered, unit)


cdef inline void add_rest(const real* x, const real* dy, const real* v, Py_ssize_t count, const lanes[real]* shift,
                          const Bounds[real]* bounds, LaneSums[real]* sums, bint statistics, bint masked, double unit
                          ) noexcept nogil:
    """Adds up to LANES elements, a part at a time: 49 elements are three times the lanes and one."""
    cdef real[16] line
    if real is double:
        if masked:
            load_between(line, dy, v, count, bounds[0])
            dy = line
        add_eight(x, dy, min(count, 8), 0, shift, sums, statistics, unit)
        if count > 8:
            add_eight(x, dy, count - 8, 1, shift, sums, statistics, unit)
    else:
        add_quarter(x, dy, v, min(count, 4), 0, shift, bounds, sums, statistics, masked, unit)
        if count > 4:
            add_quarter(x, dy, v, min(count - 4, 4), 1, shift, bounds, sums, statistics, masked, unit)
        if count > 8:
            add_quarter(x, dy, v, min(count - 8, 4), 2, shift, bounds, sums, statistics, masked, unit)
        if count > 12:
            add_quarter(x, dy, v, min(count - 12, 4), 3, shift, bounds, sums, statistics, masked, unit)


cdef inline void look_ahead(const real* x, const real* dy, Py_ssize_t ahead, bint both) noexcept nogil:
    """Asks for the LANES elements that come `ahead` elements later, if that is not 0."""
    if ahead:
        prefetch(x + ahead, LANES * sizeof(real))
        if both:
            prefetch(dy + ahead, LANES * sizeof(real))


cdef inline void look_ahead_to(const real* x, const real* dy, const real* v, Py_ssize_t ahead, bint both, bint masked
                               ) noexcept nogil:
    """The same with `v`, if that is a tensor of its own."""
    look_ahead(x, dy, ahead, both)
    if masked and ahead and v is not x:
        prefetch(v + ahead, LANES * sizeof(real))


cdef inline void clear_sums(LaneSums[real]* sums, real tag) noexcept nogil:
    fill(sums.delta, 0.0)
    fill(sums.product, 0.0)
    fill(sums.delta_lo, 0.0)
    fill(sums.product_lo, 0.0)


cdef inline void put_aside(LaneSums[real]* sums, real tag) noexcept nogil:
    """Adds the sums of the last few terms to what is kept beside them, and begins anew. Those of float64 go on."""
    if real is not double:
        sums.delta_lo = sums.delta_lo + sums.delta
        sums.product_lo = sums.product_lo + sums.product
        fill(sums.delta, 0.0)
        fill(sums.product, 0.0)


cdef inline void load_sums(LaneSums[real]* sums, const double* memory, bint all, real tag) noexcept nogil:
    load(sums.delta, memory)
    load(sums.product, memory + LANES)
    if all or real is double:
        load(sums.delta_lo, memory + 2 * LANES)
        load(sums.product_lo, memory + 3 * LANES)


cdef inline void store_sums(double* memory, const LaneSums[real]* sums, bint all, real tag) noexcept nogil:
    store(memory, sums.delta)
    store(memory + LANES, sums.product)
    if all or real is double:
        store(memory + 2 * LANES, sums.delta_lo)
        store(memory + 3 * LANES, sums.product_lo)


cdef inline void fold(double* hi, double* lo) noexcept nogil:
    """Adds the lanes of float64 in halves, into the first."""
    cdef Py_ssize_t lane
    for lane in range(8):
        add(&hi[lane], &lo[lane], hi[lane + 8], lo[lane + 8], 1.0)
    for lane in range(4):
        add(&hi[lane], &lo[lane], hi[lane + 4], lo[lane + 4], 1.0)
    for lane in range(2):
        add(&hi[lane], &lo[lane], hi[lane + 2], lo[lane + 2], 1.0)
    add(&hi[0], &lo[0], hi[1], lo[1], 1.0)
