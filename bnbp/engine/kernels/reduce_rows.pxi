# Reduce, short runs: the sums of a chunk, with an accumulator for each position of a row.
#
# Short runs would end before lanes have begun. There the elements of a row, that is of neighbouring channels for one
# n, or of some whole rows of few channels, each have an accumulator of their own, which goes down the rows of the
# chunk. From the caches it stays in a register for GROUP rows. From memory, NEARBY bytes are read at a time, one row or
# a few: the CPU then sees what comes next, and to ask for it ahead gains nothing. 256 channels take 0.35 ns an element
# so, and 0.72 with eight rows at a time; 64 channels take 0.23 with four rows, and 0.45 with one. Of rows of a page or
# more, whose accumulators leave little room in L1, eight are better again, asked for ahead. So they are for statistics,
# which read one tensor: a network's take 15 % less. With an activation's comparisons in between, the CPU sees less far,
# and four rows asked for ahead take up to 40 % less (AMD EPYC, Zen 4).

cdef struct Accumulators:  # of the positions of a row, LANES of them in registers on their way down the rows
    double* delta
    double* product
    double* delta_lo
    double* product_lo
    const double* shift      # the means, negated
    void* low                # the bounds of `v`, in the type of the data or float32
    void* high
    float* half_delta        # of 16-bit numbers: the sums of the last few rows
    float* half_product
    float* half_shift


cdef inline void begin_columns(LaneSums[real]* sums, lanes[real]* shift, const Accumulators* a, Py_ssize_t i,
                               bint begins, real tag) noexcept nogil:
    """Takes up the sums of LANES positions; the first rows begin with 0."""
    load(shift[0], a.shift + i)
    if begins:
        clear_sums(sums, tag)
        return
    load(sums.delta, a.delta + i)
    load(sums.product, a.product + i)
    if real is double:
        load(sums.delta_lo, a.delta_lo + i)
        load(sums.product_lo, a.product_lo + i)


cdef inline void end_columns(LaneSums[real]* sums, const Accumulators* a, Py_ssize_t i, bint ends, real tag
                             ) noexcept nogil:
    """Puts the sums of LANES positions down; with some rows end the terms that are summed together."""
    if ends and real is not double:
        load(sums.delta_lo, a.delta_lo + i)
        load(sums.product_lo, a.product_lo + i)
        put_aside(sums, tag)
    store(a.delta + i, sums.delta)
    store(a.product + i, sums.product)
    if ends or real is double:
        store(a.delta_lo + i, sums.delta_lo)
        store(a.product_lo + i, sums.product_lo)


cdef inline void reduce_columns(
    const real* x,          # IN  (rows, count), with a pitch
    const real* dy,         # IN
    const real* v,          # IN
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count, Py_ssize_t ahead,
    const Accumulators* a,  # IN OUT (count)
    bint statistics, bint masked, bint begins, bint ends,
) noexcept nogil:
    """Adds a few rows to the accumulators of their positions."""
    cdef LaneSums[real] sums, more
    cdef lanes[real] shift, shift_more
    cdef Bounds[real] bounds, bounds_more
    cdef Py_ssize_t i = 0, row, at, some
    cdef double unit = one()
    while i + 2 * LANES <= count:
        begin_columns(&sums, &shift, a, i, begins, <real> 0)
        begin_columns(&more, &shift_more, a, i + LANES, begins, <real> 0)
        if masked:
            load_bounds(bounds, a.low, a.high, i)
            load_bounds(bounds_more, a.low, a.high, i + LANES)
        for row in range(rows):
            at = row * pitch + i
            look_ahead_to(x + at, dy + at, v + at, ahead, not statistics, masked)
            add_lanes(x + at, dy + at, v + at, &shift, &bounds, &sums, statistics, masked, unit)
            at += LANES
            look_ahead_to(x + at, dy + at, v + at, ahead, not statistics, masked)
            add_lanes(x + at, dy + at, v + at, &shift_more, &bounds_more, &more, statistics, masked, unit)
        end_columns(&sums, a, i, ends, <real> 0)
        end_columns(&more, a, i + LANES, ends, <real> 0)
        i += 2 * LANES
    while i < count:
        some = min(count - i, LANES)
        begin_columns(&sums, &shift, a, i, begins, <real> 0)
        if masked:
            load_bounds(bounds, a.low, a.high, i)
        if some == LANES:
            for row in range(rows):
                at = row * pitch + i
                look_ahead_to(x + at, dy + at, v + at, ahead, not statistics, masked)
                add_lanes(x + at, dy + at, v + at, &shift, &bounds, &sums, statistics, masked, unit)
        else:
            for row in range(rows):
                at = row * pitch + i
                add_rest(x + at, dy + at, v + at, some, &shift, &bounds, &sums, statistics, masked, unit)
        end_columns(&sums, a, i, ends, <real> 0)
        i += LANES


cdef inline void begin_halves(Chain* chain, float_lanes* shift, const Accumulators* a, Py_ssize_t i, bint begins
                              ) noexcept nogil:
    """Takes up the sums of LANES positions."""
    load(shift[0], a.half_shift + i)
    if begins:
        begin_chain(chain)
    else:
        load(chain.delta, a.half_delta + i)
        load(chain.product, a.half_product + i)


cdef inline void end_halves(Chain* chain, const Accumulators* a, Py_ssize_t i, bint second, bint ends) noexcept nogil:
    """Puts them down, or adds them, if they are the second of two, with the first to the sums in float64."""
    cdef lanes[double] sums
    cdef Chain first
    if not ends:
        store(a.half_delta + i, chain.delta)
        store(a.half_product + i, chain.product)
        return
    if second:
        load(first.delta, a.half_delta - POSITIONS - LANES + i)
        load(first.product, a.half_product - POSITIONS - LANES + i)
        join_chains(chain, &first)
    load(sums, a.delta + i)
    add_floats(sums, chain.delta)
    store(a.delta + i, sums)
    load(sums, a.product + i)
    add_floats(sums, chain.product)
    store(a.product + i, sums)


cdef inline void reduce_halves_columns(
    const real* x,          # IN  (rows, count), with a pitch
    const real* dy,         # IN
    const real* v,          # IN
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count,
    const Accumulators* a,  # IN OUT (count)
    bint masked, bint begins, bint second, bint ends,
) noexcept nogil:
    """The same for 16-bit numbers, a few of the rows that a chain adds up: the `second` of two, or the first."""
    cdef Chain chain, more
    cdef float_lanes shift, shift_more
    cdef Bounds[real] bounds, bounds_more
    cdef Py_ssize_t i = 0, row, at, some
    while i + 2 * LANES <= count:
        begin_halves(&chain, &shift, a, i, begins)
        begin_halves(&more, &shift_more, a, i + LANES, begins)
        if masked:
            load_bounds(bounds, a.low, a.high, i)
            load_bounds(bounds_more, a.low, a.high, i + LANES)
        for row in range(rows):
            at = row * pitch + i
            add_halves(x + at, dy + at, v + at, LANES, &shift, &bounds, masked, &chain)
            at += LANES
            add_halves(x + at, dy + at, v + at, LANES, &shift_more, &bounds_more, masked, &more)
        end_halves(&chain, a, i, second, ends)
        end_halves(&more, a, i + LANES, second, ends)
        i += 2 * LANES
    while i < count:
        some = min(count - i, LANES)
        begin_halves(&chain, &shift, a, i, begins)
        if masked:
            load_bounds(bounds, a.low, a.high, i)
        for row in range(rows):
            at = row * pitch + i
            add_halves(x + at, dy + at, v + at, some, &shift, &bounds, masked, &chain)
        end_halves(&chain, a, i, second, ends)
        i += LANES


cdef inline void halves_of(const real* x, const real* dy, const real* v, Py_ssize_t rows, Py_ssize_t pitch,
                           Py_ssize_t count, const Accumulators* a, bint masked, bint begins, bint second, bint ends
                           ) noexcept nogil:
    if real is float16 or real is bfloat16:
        if masked:
            reduce_halves_columns(x, dy, v, rows, pitch, count, a, True, begins, second, ends)
        else:
            reduce_halves_columns(x, dy, x, rows, pitch, count, a, False, begins, second, ends)


cdef void reduce_rows(
    const real* x,          # IN
    const real* dy,         # IN
    const real* v,          # IN
    Task t,
    const Plan* p,
    const double* means,    # IN  (t.c1 - t.c0), and room for LANES more
    const Channels* own,    # IN  (t.c1 - t.c0)
    bint statistics,
    double[:, :, ::1]& partial,  # OUT
) noexcept nogil:
    """The sums of a chunk of short runs: an accumulator for each position of a row, folded by channel at the end."""
    cdef double[POSITIONS + 16] delta, delta_lo, product, product_lo, shift
    cdef bint halves = sizeof(real) == 2 and not statistics
    cdef float[POSITIONS + 16] half_shift
    cdef double[POSITIONS + 16] low, high
    cdef Accumulators a
    cdef Py_ssize_t i, k, c, count, length, row = 0, position = 0, left = TERMS, ahead = 0, s = p.s
    cdef Py_ssize_t channels = t.c1 - t.c0, rows = t.rows - (t.last < t.length), repeat = channels * s
    cdef Py_ssize_t group = GROUP
    cdef bint ends, second
    cdef float* half_delta = <float*> delta_lo
    cdef float* half_product = <float*> product_lo
    cdef bint aside = real is not double and t.rows >= TERMS and not halves
    a.delta, a.delta_lo, a.product, a.product_lo = delta, delta_lo, product, product_lo
    a.shift, a.half_shift = shift, half_shift
    a.low, a.high = low, high
    if p.far and not halves and (statistics or p.masked or t.length * sizeof(real) >= PAGE):
        if p.masked and t.length * sizeof(real) < PAGE:
            group //= 2
        ahead = group * t.pitch
    elif p.far:
        while group > 1 and group * t.pitch * max(<Py_ssize_t> sizeof(real), 4) > NEARBY:
            group //= 2
    if s == 1:
        for c in range(channels):
            shift[c] = -means[c]
        position = channels
    else:
        for c in range(channels):
            for i in range(s):
                shift[position] = -means[c]
                position += 1
    while position < t.length:
        shift[position] = shift[position - repeat]
        position += 1
    if p.masked:
        position = 0
        while position < t.length:
            for c in range(channels):
                for i in range(s):
                    set_own(low, position, own.wide[LOW][c], <real> 0)
                    set_own(high, position, own.wide[HIGH][c], <real> 0)
                    position += 1
    if aside or real is double:
        memset(delta_lo, 0, t.length * sizeof(double))
        memset(product_lo, 0, t.length * sizeof(double))
    if halves:
        memset(delta, 0, (t.length + LANES) * sizeof(double))
        memset(product, 0, (t.length + LANES) * sizeof(double))
        for i in range(t.length):
            half_shift[i] = <float> shift[i]
    while row < t.rows:
        count, length = 1, t.last
        if row < rows:
            count, length = min(rows - row, group), t.length
        left -= count
        ends = left == 0
        if ends:
            left = TERMS
        if halves:
            second = row // TOGETHER % 2 == 1 and row < rows
            a.half_delta = half_delta + second * (POSITIONS + LANES)
            a.half_product = half_product + second * (POSITIONS + LANES)
            halves_of(x, dy, v, count, t.pitch, length, &a, p.masked, row % TOGETHER == 0 or row == rows, second,
                      (row + count) % (2 * TOGETHER) == 0 or row + count == rows or row + count == t.rows)
        elif statistics:
            reduce_columns(x, x, x, count, t.pitch, length, ahead, &a, True, False, row == 0, ends)
        elif p.masked:
            reduce_columns(x, dy, v, count, t.pitch, length, ahead, &a, False, True, row == 0, ends)
        else:
            reduce_columns(x, dy, x, count, t.pitch, length, ahead, &a, False, False, row == 0, ends)
        x += count * t.pitch
        dy += count * t.pitch
        v += count * t.pitch
        row += count
    # First what was put aside, then rows that were taken as one, then the positions of a channel.
    if aside:
        for i in range(t.length):
            delta[i] += delta_lo[i]
            product[i] += product_lo[i]
    position = repeat
    while position < t.length:
        for i in range(repeat):
            add_part(&delta[i], &delta_lo[i], delta[position + i], delta_lo[position + i], <real> 0)
            add_part(&product[i], &product_lo[i], product[position + i], product_lo[position + i], <real> 0)
        position += repeat
    for k in range(1, s):
        for c in range(channels):
            i = c * s
            add_part(&delta[i], &delta_lo[i], delta[i + k], delta_lo[i + k], <real> 0)
            add_part(&product[i], &product_lo[i], product[i + k], product_lo[i + k], <real> 0)
    for c in range(channels):
        i = c * s
        set_sums(partial, t.chunk, t.c0 + c, delta[i], product[i], delta_lo[i] if real is double else 0.0,
                 product_lo[i] if real is double else 0.0)


cdef void reduce_task(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& v,       # IN
    const Channels* channels,       # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, 4, C), as of `reduce_runs`
    const Plan* p,
    Task t,
) noexcept nogil:
    cdef const real* x0 = &x[t.n0, t.c0, 0]
    cdef const real* dy0 = &dy[t.n0, t.c0, 0]
    cdef double[POSITIONS] shift
    cdef Channels own = channels_from(channels, t.c0)
    cdef Py_ssize_t c, elements = count_of(p, t.chunk)
    if p.operator != TRAINING:
        reduce_rows(x0, dy0, &v[t.n0, t.c0, 0], t, p, own.mean, &own, False, partial)
        if real is float16 or real is bfloat16:
            redo_overflown(x, dy, v, channels, partial, p, t.chunk, t.c0, t.c1)
        return
    for c in range(t.c1 - t.c0):
        shift[c] = x0[c * p.s]
    reduce_rows(x0, x0, x0, t, p, shift, &own, True, partial)
    for c in range(t.c1 - t.c0):
        finish_chunk(partial, t.chunk, t.c0 + c, shift[c], elements)
