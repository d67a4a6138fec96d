# Reduce.

cdef struct Lanes:         # the sums of a channel's runs: lane i % LANES has those of element i of each
    double[16] delta, product, delta_lo, product_lo


cdef inline void add_lanes(const real* x, const real* dy, const double* mean, Py_ssize_t each, double* delta,
                           double* delta_lo, double* product, double* product_lo, bint statistics, bint exact,
                           double unit) noexcept nogil:
    """Adds LANES elements side by side to their sums; `each` has its own mean (1), or all the same (0)."""
    cdef double[LANES] xs, dys
    cdef Py_ssize_t lane
    if real is double:
        for lane in range(16):  # literal bounds: with an enum GCC keeps the lanes in memory
            add_term(&delta[lane], &delta_lo[lane], &product[lane], &product_lo[lane], x[lane], dy[lane],
                     mean[lane * each], statistics, exact, unit, <real> 0)
    else:
        if each:
            widen(xs, x)
            widen(dys, x if statistics else dy)
        else:
            widen_any(xs, x)
            widen_any(dys, x if statistics else dy)
        for lane in range(16):
            add_term(&delta[lane], &delta_lo[lane], &product[lane], &product_lo[lane], xs[lane], dys[lane],
                     mean[lane * each], statistics, exact, unit, <real> 0)


cdef inline void look_ahead(const real* x, const real* dy, Py_ssize_t ahead, bint both) noexcept nogil:
    """Asks for the LANES elements that come `ahead` elements later, if that is not 0."""
    if ahead:
        prefetch(x + ahead, LANES * sizeof(real))
        if both:
            prefetch(dy + ahead, LANES * sizeof(real))


cdef inline void reduce_lanes(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, double mean,
                              bint statistics, bint exact, bint pairs, Lanes* sums) noexcept nogil:
    """`pairs`: the lanes of even places come before those of odd ones."""
    cdef double[LANES] delta, delta_lo, product, product_lo  # local arrays, which become registers
    cdef Py_ssize_t i, lane, whole_lanes = count - count % LANES
    cdef double unit = one()
    for lane in range(16):
        delta[lane] = delta_lo[lane] = product[lane] = product_lo[lane] = 0.0
    for i in range(0, whole_lanes, 16):
        look_ahead(x + i, dy + i, ahead, not statistics)
        add_lanes(x + i, dy + i, &mean, 0, delta, delta_lo, product, product_lo, statistics, exact, unit)
    for lane in range(16):
        add_part(&sums.delta[lane], &sums.delta_lo[lane], delta[lane], delta_lo[lane], <real> 0)
        add_part(&sums.product[lane], &sums.product_lo[lane], product[lane], product_lo[lane], <real> 0)
    for i in range(whole_lanes, count):
        lane = i - whole_lanes
        if pairs:
            lane = lane % 2 * 8 + lane // 2
        add_term(&sums.delta[lane], &sums.delta_lo[lane], &sums.product[lane], &sums.product_lo[lane], x[i], dy[i],
                 mean, statistics, exact, 1.0, <real> 0)


cdef inline void widen_block(float* to, const real* source, Py_ssize_t count, Py_ssize_t ahead) noexcept nogil:
    """16-bit numbers as float32; asks for what comes `ahead` elements later, unless that is 0."""
    cdef Py_ssize_t i, whole_lanes = count - count % LANES
    if real is float16 or real is bfloat16:
        if ahead:
            prefetch(source + ahead, count * sizeof(real))
        for i in range(0, whole_lanes, 16):
            widen_any(to + i, source + i)
        for i in range(whole_lanes, count):
            to[i] = source[i]


cdef void reduce_block(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, double mean, bint statistics,
                       Lanes* sums) noexcept nogil:
    """Adds a block of a run, or less, to the lanes' sums, and asks for what comes `ahead` elements later."""
    cdef wide_block xs, dys
    cdef bint pairs = real is bfloat16
    if sizeof(real) > 2 or BNBP_WIDENS_AT_ONCE:
        if statistics:
            reduce_lanes(x, x, count, ahead, mean, True, False, pairs, sums)
        else:
            reduce_lanes(x, dy, count, ahead, mean, False, real is float16, pairs, sums)
    else:
        widen_block(xs.at, x, count, ahead)
        if statistics:
            reduce_lanes(<const float*> xs.at, <const float*> xs.at, count, 0, mean, True, False, pairs, sums)
        else:
            widen_block(dys.at, dy, count, ahead)
            reduce_lanes(<const float*> xs.at, <const float*> dys.at, count, 0, mean, False, real is float16, pairs,
                         sums)


cdef inline double center(double mean, real tag) noexcept nogil:
    """What `reduce` subtracts in the place of the mean, so that products of float16 are exact, see e."""
    if real is float16:
        if fabs(mean) < 131072.0:
            mean = (mean + 402653184.0) - 402653184.0  # 1.5 * 2^28: to a multiple of 2^-24
        elif mean - mean == 0:
            mean = 0.0
    return mean


cdef inline void fold(double* hi, double* lo, real tag) noexcept nogil:
    """Adds the lanes in halves, into the first."""
    cdef Py_ssize_t lane
    for lane in range(8):
        add_part(&hi[lane], &lo[lane], hi[lane + 8], lo[lane + 8], tag)
    for lane in range(4):
        add_part(&hi[lane], &lo[lane], hi[lane + 4], lo[lane + 4], tag)
    for lane in range(2):
        add_part(&hi[lane], &lo[lane], hi[lane + 2], lo[lane + 2], tag)
    add_part(&hi[0], &lo[0], hi[1], lo[1], tag)


cdef inline void sum_positions(const double* values, const double* values_lo, Py_ssize_t count, double* hi, double* lo,
                               real tag) noexcept nogil:
    """Adds the accumulators of one channel's positions to its sum."""
    cdef double[LANES] lane_hi, lane_lo
    cdef Py_ssize_t i, lane, whole_lanes = count - count % LANES
    if whole_lanes:
        for lane in range(16):
            lane_hi[lane] = values[lane]
            lane_lo[lane] = values_lo[lane]
        for i in range(16, whole_lanes, 16):
            for lane in range(16):
                add_part(&lane_hi[lane], &lane_lo[lane], values[i + lane], values_lo[i + lane], tag)
        fold(lane_hi, lane_lo, tag)
        add_part(hi, lo, lane_hi[0], lane_lo[0], tag)
    for i in range(whole_lanes, count):
        add_part(hi, lo, values[i], values_lo[i], tag)


cdef inline void widen_in_order(float* to, const real* source) noexcept nogil:
    if real is float16 or real is bfloat16:
        widen(to, source)


cdef inline void reduce_columns(
    const real* x,          # IN  (rows, count), with a pitch
    const real* dy,         # IN
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count, Py_ssize_t ahead,
    const double* mean,     # IN  (count)
    double* delta,          # IN OUT (count), the accumulators
    double* delta_lo,
    double* product,
    double* product_lo,
    bint statistics,
) noexcept nogil:
    """Adds a few rows to the accumulators of their positions, and asks for what comes `ahead` elements later.

    LANES positions at a time, whose accumulators are in registers on their way down the rows.
    """
    cdef double[LANES] d, d_lo, q, q_lo, means  # local arrays, which become registers
    cdef wide_block xs, dys
    cdef Py_ssize_t i, at, row, lane, whole_lanes = count - count % LANES
    cdef double unit = one()
    for i in range(0, whole_lanes, 16):
        if sizeof(real) == 2 and not BNBP_WIDENS_AT_ONCE:
            for row in range(rows):
                at = row * pitch + i
                look_ahead(x + at, dy + at, ahead, not statistics)
                widen_in_order(xs.at + row * 16, x + at)
                if not statistics:
                    widen_in_order(dys.at + row * 16, dy + at)
        for lane in range(16):
            means[lane] = mean[i + lane]
            d[lane] = d_lo[lane] = q[lane] = q_lo[lane] = 0.0
        for row in range(rows):
            if sizeof(real) == 2 and not BNBP_WIDENS_AT_ONCE:
                add_lanes(<const float*> xs.at + row * 16, <const float*> dys.at + row * 16, means, 1, d, d_lo, q,
                          q_lo, statistics, real is float16 and not statistics, unit)
            else:
                at = row * pitch + i
                look_ahead(x + at, dy + at, ahead, not statistics)
                add_lanes(x + at, dy + at, means, 1, d, d_lo, q, q_lo, statistics,
                          real is float16 and not statistics, unit)
        for lane in range(16):
            add_part(&delta[i + lane], &delta_lo[i + lane], d[lane], d_lo[lane], <real> 0)
            add_part(&product[i + lane], &product_lo[i + lane], q[lane], q_lo[lane], <real> 0)
    for i in range(whole_lanes, count):  # in the same order
        d[0] = d_lo[0] = q[0] = q_lo[0] = 0.0
        for row in range(rows):
            at = row * pitch + i
            add_term(d, d_lo, q, q_lo, x[at], dy[at], mean[i], statistics, real is float16 and not statistics, unit,
                     <real> 0)
        add_part(&delta[i], &delta_lo[i], d[0], d_lo[0], <real> 0)
        add_part(&product[i], &product_lo[i], q[0], q_lo[0], <real> 0)


cdef void reduce_rows(
    const real* x,          # IN
    const real* dy,         # IN
    Task t,
    Py_ssize_t s,
    const double* means,    # IN  (t.c1 - t.c0), with a stride
    Py_ssize_t stride,
    bint statistics,
    Sums* sums,             # OUT (t.c1 - t.c0)
) noexcept nogil:
    """The sums of a chunk of short runs: an accumulator for each position of a row, folded by channel at the end."""
    cdef double[POSITIONS] delta, delta_lo, product, product_lo, mean
    cdef Py_ssize_t i, _i, c, count, length, row = 0, position = 0
    cdef Py_ssize_t channels = t.c1 - t.c0, rows = t.rows - (t.last < t.length)
    while position < t.length:
        for c in range(channels):
            for _i in range(s):
                mean[position] = means[c * stride] if statistics else center(means[c * stride], <real> 0)
                position += 1
    for i in range(t.length):
        delta[i] = product[i] = 0.0
        if real is double:
            delta_lo[i] = product_lo[i] = 0.0
    while row < t.rows:
        count, length = 1, t.last
        if row < rows:
            count, length = min(rows - row, GROUP), t.length
        if statistics:
            reduce_columns(x, x, count, t.pitch, length, count * t.pitch, mean, delta, delta_lo, product, product_lo,
                           True)
        else:
            reduce_columns(x, dy, count, t.pitch, length, count * t.pitch, mean, delta, delta_lo, product, product_lo,
                           False)
        x += count * t.pitch
        dy += count * t.pitch
        row += count
    if t.length == channels:
        for c in range(channels):
            sums[c].delta, sums[c].product = delta[c], product[c]
            sums[c].delta_lo = delta_lo[c] if real is double else 0.0
            sums[c].product_lo = product_lo[c] if real is double else 0.0
        return
    memset(sums, 0, channels * sizeof(Sums))
    position = 0
    while position < t.length:
        for c in range(channels):
            sum_positions(delta + position, delta_lo + position, s, &sums[c].delta, &sums[c].delta_lo, <real> 0)
            sum_positions(product + position, product_lo + position, s, &sums[c].product, &sums[c].product_lo, <real> 0)
            position += s


cdef void reduce_task(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const Channel* channels,        # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, C, 4), the Sums of each chunk; of statistics, mean and m2
    const Plan* p,
    Task t,
) noexcept nogil:
    cdef const real* x0 = &x[t.n0, t.c0, 0]
    cdef const real* dy0 = &dy[t.n0, t.c0, 0]
    cdef Sums* sums = <Sums*> &partial[t.chunk, t.c0, 0]
    cdef double[POSITIONS] shift
    cdef Py_ssize_t c
    if p.operator != TRAINING:
        reduce_rows(x0, dy0, t, p.s, &channels[t.c0].mean, sizeof(Channel) // sizeof(double), False, sums)
        return
    for c in range(t.c1 - t.c0):
        shift[c] = x0[c * p.s]
    reduce_rows(x0, x0, t, p.s, shift, 1, True, sums)
    for c in range(t.c1 - t.c0):
        finish_chunk(&sums[c], shift[c], count_of(p, t.chunk))


cdef inline void finish_chunk(Sums* sums, double shift, double count) noexcept nogil:
    """From the sums of d = x - shift and d^2 to the mean, and m2 = sum d^2 - (sum d)^2 / count."""
    cdef Twofold delta = whole(sums.delta, sums.delta_lo), offset = over(delta, count)
    cdef Twofold square = times(delta, offset), mean = two_sum(shift, offset.hi)
    sums.product_lo = (sums.product - square.hi) + (sums.product_lo - square.lo)
    sums.product = 0.0
    sums.delta, sums.delta_lo = mean.hi, mean.lo + offset.lo
