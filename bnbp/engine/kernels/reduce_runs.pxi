# Reduce, long runs: the sums of a chunk, with an accumulator for each place modulo LANES.
#
# Where the caches hold everything, a channel's accumulators are in registers from its first run in the chunk to its
# last (`reduce_channels`). A sweep has them in memory between its blocks (`reduce_block`). Both add up the same terms
# in the same order, and fold the lanes in halves at the end.
#
# Statistics: the sums of d = x - shift and of d^2 about the chunk's first element as the shift give the chunk's mean
# and its sum of squared deviations, m2 = sum d^2 - (sum d)^2 / n, in one read. That cancels no more than a factor of n
# + 1, because the shift is one of the n elements and so within sqrt(n) standard deviations of their mean; chunks of
# 2^16 elements at most have that to spare, in float64 sums for float32, in twofold sums for float64. A constant chunk
# has d = 0. `finish` merges the chunks.

cdef inline void set_sums(double[:, :, ::1]& partial, Py_ssize_t chunk, Py_ssize_t c, double delta, double product,
                          double delta_lo, double product_lo) noexcept nogil:
    partial[chunk, 0, c], partial[chunk, 1, c] = delta, product
    partial[chunk, 2, c], partial[chunk, 3, c] = delta_lo, product_lo


cdef inline void finish_chunk(double[:, :, ::1]& partial, Py_ssize_t chunk, Py_ssize_t c, double shift, double count
                              ) noexcept nogil:
    """From the sums of d = x - shift and d^2 to the mean, and m2 = sum d^2 - (sum d)^2 / count."""
    cdef Twofold delta, offset, square, mean
    if count == 1:  # no deviation, unless from what is no number
        set_sums(partial, chunk, c, shift + (shift - shift), 0.0, 0.0, shift - shift)
        return
    delta = whole(partial[chunk, 0, c], partial[chunk, 2, c])
    offset = over(delta, count)
    square, mean = times(delta, offset), two_sum(shift, offset.hi)
    set_sums(partial, chunk, c, mean.hi, 0.0, mean.lo + offset.lo,
             (partial[chunk, 1, c] - square.hi) + (partial[chunk, 3, c] - square.lo))


cdef inline void reduce_part(const real* x, const real* dy, const real* v, Py_ssize_t count, Py_ssize_t ahead,
                             double mean, const lanes[real]* shift, const Bounds[real]* bounds, LaneSums[real]* sums,
                             bint statistics, bint masked, bint wide, double unit) noexcept nogil:
    """Adds a part of a run: whole lanes and, if it is the end, the rest. `wide`: 16-bit numbers in float64 as well."""
    cdef Py_ssize_t i, whole_lanes = count - count % LANES
    if real is float16 or real is bfloat16:
        if not (statistics or wide):
            reduce_halves(x, dy, v, count, ahead, <float> -mean, bounds, masked, sums)
            return
    for i in range(0, whole_lanes, 16):
        look_ahead_to(x + i, dy + i, v + i, ahead, not statistics, masked)
        add_lanes(x + i, dy + i, v + i, shift, bounds, sums, statistics, masked, unit)
    if whole_lanes < count:
        i = whole_lanes
        add_rest(x + i, dy + i, v + i, count - i, shift, bounds, sums, statistics, masked, unit)


cdef inline void reduce_block_as(const real* x, const real* dy, const real* v, Py_ssize_t count, Py_ssize_t ahead,
                                 double mean, double low, double high, bint statistics, bint masked, bint ends,
                                 double* memory) noexcept nogil:
    cdef LaneSums[real] sums
    cdef lanes[real] shift
    cdef Bounds[real] bounds
    fill(shift, -mean)
    if masked:
        fill_bounds(bounds, low, high)
    load_sums(&sums, memory, False, <real> 0)
    reduce_part(x, dy, v, count, ahead, mean, &shift, &bounds, &sums, statistics, masked, False, one())
    store_sums(memory, &sums, False, <real> 0)
    if ends:
        load_sums(&sums, memory, True, <real> 0)
        put_aside(&sums, <real> 0)
        store_sums(memory, &sums, True, <real> 0)


cdef void reduce_block(const real* x, const real* dy, const real* v, Py_ssize_t count, Py_ssize_t ahead, double mean,
                       double low, double high, bint statistics, bint masked, bint ends, double* memory
                       ) noexcept nogil:
    """Adds a block of a run, or less, to the lanes' sums, and asks for what comes `ahead` elements later.

    `ends`: with it the terms that are summed together end.
    """
    if statistics:
        reduce_block_as(x, x, x, count, ahead, mean, low, high, True, False, ends, memory)
    elif masked:
        reduce_block_as(x, dy, v, count, ahead, mean, low, high, False, True, ends, memory)
    else:
        reduce_block_as(x, dy, x, count, ahead, mean, low, high, False, False, ends, memory)


cdef inline void keep_sums(double* memory, const LaneSums[real]* sums, real tag) noexcept nogil:
    """What `fold_channels` makes the sums of a channel of: all lanes of float64, of others a quarter."""
    if real is double:
        store_sums(memory, sums, True, tag)
    else:
        half_sum(memory, sums.delta_lo + sums.delta)
        half_sum(memory + LANES, sums.product_lo + sums.product)


cdef inline void reduce_channels_as(const real* x, const real* dy, const real* v, Py_ssize_t rows, Py_ssize_t pitch,
                                    Py_ssize_t count, Py_ssize_t ahead, Py_ssize_t step, Py_ssize_t together,
                                    Py_ssize_t channels, const double* mean, const double* low, const double* high,
                                    bint statistics, bint masked, bint wide, double* memory) noexcept nogil:
    cdef LaneSums[real] sums
    cdef lanes[real] shift
    cdef Bounds[real] bounds
    cdef Py_ssize_t q, row, i, at, left
    cdef double unit = one()
    for q in range(channels):
        fill(shift, -mean[q])
        if masked:
            fill_bounds(bounds, low[q], high[q])
        clear_sums(&sums, <real> 0)
        left = together
        at = q * step
        for row in range(rows):
            i = 0
            while count - i > PIECE:
                reduce_part(x + at + i, dy + at + i, v + at + i, PIECE, ahead, mean[q], &shift, &bounds, &sums,
                            statistics, masked, wide, unit)
                put_aside(&sums, <real> 0)
                i += PIECE
            reduce_part(x + at + i, dy + at + i, v + at + i, count - i, ahead, mean[q], &shift, &bounds, &sums,
                        statistics, masked, wide, unit)
            at += pitch
            left -= 1
            if left == 0:
                left = together
                put_aside(&sums, <real> 0)
        keep_sums(memory + q * 4 * LANES, &sums, <real> 0)


cdef void reduce_channels(
    const real* x,          # IN  (rows, channels, count), with a pitch and a step
    const real* dy,         # IN
    const real* v,          # IN
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count, Py_ssize_t ahead, Py_ssize_t step, Py_ssize_t together,
    Py_ssize_t channels,
    const double* mean,     # IN  (channels)
    const double* low,      # IN  (channels): the bounds of `v`, if masked
    const double* high,     # IN  (channels)
    bint statistics, bint masked, bint wide,
    double* memory,         # OUT (channels, 4, LANES)
) noexcept nogil:
    """The sums of a few channels in a chunk, each in registers from start to end."""
    if statistics:
        reduce_channels_as(x, x, x, rows, pitch, count, ahead, step, together, channels, mean, low, high, True, False,
                           False, memory)
    elif wide:
        reduce_channels_as(x, dy, v, rows, pitch, count, ahead, step, together, channels, mean, low, high, False,
                           masked, True, memory)
    elif masked:
        reduce_channels_as(x, dy, v, rows, pitch, count, ahead, step, together, channels, mean, low, high, False, True,
                           False, memory)
    else:
        reduce_channels_as(x, dy, x, rows, pitch, count, ahead, step, together, channels, mean, low, high, False, False,
                           False, memory)


cdef inline void collect(double* memory, real tag) noexcept nogil:
    cdef LaneSums[real] sums
    load_sums(&sums, memory, True, tag)
    keep_sums(memory, &sums, tag)


cdef inline void finish_four(double* delta, double* product, double* rest, const double* shift, double count
                             ) noexcept nogil:
    """The same for four channels side by side, of the types whose sums have no rest: mean and m2 take their places."""
    cdef double[4] offset, square, lo
    cdef double back, hi, mean
    cdef Py_ssize_t k
    for k in range(4):
        offset[k] = delta[k] / count
    for k in range(4):
        back = offset[k] * count
        rest[k] = ((delta[k] - back) - product_error(offset[k], count, back)) / count
    for k in range(4):
        square[k] = delta[k] * offset[k]
        lo[k] = product_error(delta[k], offset[k], square[k]) + delta[k] * rest[k]
    for k in range(4):
        hi = square[k] + lo[k]
        product[k] = (product[k] - hi) - (lo[k] - (hi - square[k]))
    for k in range(4):
        mean = shift[k] + offset[k]
        back = mean - shift[k]
        rest[k] += (shift[k] - (mean - back)) + (offset[k] - back)
        delta[k] = mean


cdef inline void fold_channels(double* memory, Py_ssize_t count, double[:, :, ::1]& partial, const Plan* p,
                               Py_ssize_t chunk, Py_ssize_t c, const double* shift, Py_ssize_t elements, real tag
                               ) noexcept nogil:
    """The sums of up to four channels in a chunk of so many elements from those of their lanes."""
    cdef double[4] delta, product, rest
    cdef double* at
    cdef Py_ssize_t k
    if real is not double:
        sum_of_four(delta, memory, 4 * LANES)
        sum_of_four(product, memory + LANES, 4 * LANES)
    if real is not double and p.operator == TRAINING:
        finish_four(delta, product, rest, shift, elements)
        for k in range(count):
            set_sums(partial, chunk, c + k, delta[k], 0.0, rest[k], product[k])
        return
    for k in range(count):
        at = memory + k * 4 * LANES
        if real is double:
            fold(at, at + 2 * LANES)
            fold(at + LANES, at + 3 * LANES)
            set_sums(partial, chunk, c + k, at[0], at[LANES], at[2 * LANES], at[3 * LANES])
        else:
            set_sums(partial, chunk, c + k, delta[k], product[k], 0.0, 0.0)
        if p.operator == TRAINING:
            finish_chunk(partial, chunk, c + k, shift[k], elements)


cdef void redo_overflown(const real[:, :, ::1]& x, const real[:, :, ::1]& dy, const real[:, :, ::1]& v,
                         const Channels* channels, double[:, :, ::1]& partial, const Plan* p, Py_ssize_t chunk,
                         Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Computes again, all in float64, the sums of a chunk that float32 has had no number for."""
    cdef double[4 * 4 * LANES] memory
    cdef Py_ssize_t c, n0 = first_row(p, chunk), s0 = chunk % p.per_run * p.length
    if p.operator == TRAINING:
        return
    for c in range(c0, c1):
        if partial[chunk, 0, c] - partial[chunk, 0, c] != 0 or partial[chunk, 1, c] - partial[chunk, 1, c] != 0:
            memset(memory, 0, sizeof(memory))
            reduce_channels(&x[n0, c, s0], &dy[n0, c, s0], &v[n0, c, s0], rows_of(p, chunk), p.c * p.s,
                            min(p.s - s0, p.length) if p.runs else p.s, 0, 0, p.together, 1, channels.mean + c,
                            channels.wide[LOW] + c, channels.wide[HIGH] + c, False, p.masked, True, memory)
            fold_channels(memory, 1, partial, p, chunk, c, memory, 0, <real> 0)


cdef void reduce_runs(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& v,       # IN
    const Channels* channels,       # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, 4, C): the sums of each chunk and their rest; of statistics, mean, m2
    const Plan* p,
    Py_ssize_t chunk, Py_ssize_t c0, Py_ssize_t c1,
) noexcept nogil:
    """A chunk of some channels with long runs, one after the other."""
    cdef Py_ssize_t n0 = first_row(p, chunk), s0 = chunk % p.per_run * p.length
    cdef Py_ssize_t rows = rows_of(p, chunk), length = min(p.s - s0, p.length), c, k, count
    cdef Py_ssize_t far = AHEAD // <Py_ssize_t> sizeof(real) if p.far else 0
    cdef const real* x0 = &x[n0, c0, s0]
    cdef const real* dy0 = &dy[n0, c0, s0]
    cdef const real* v0 = &v[n0, c0, s0]
    cdef double[4 * 4 * LANES] memory
    cdef double[4] shift
    for c in range(c0, c1, 4):
        if c1 - c < 4:
            memset(memory, 0, sizeof(memory))
            memset(shift, 0, sizeof(shift))
        count = min(c1 - c, 4)
        for k in range(count):
            shift[k] = x0[k * p.s] if p.operator == TRAINING else channels.mean[c + k]
        reduce_channels(x0, dy0, v0, rows, p.c * p.s, length, far, p.s, p.together, count, shift,
                        channels.wide[LOW] + c, channels.wide[HIGH] + c, p.operator == TRAINING, p.masked, False,
                        memory)
        fold_channels(memory, count, partial, p, chunk, c, shift, rows * length, <real> 0)
        x0 += 4 * p.s
        dy0 += 4 * p.s
        v0 += 4 * p.s
    if real is float16 or real is bfloat16:
        redo_overflown(x, dy, v, channels, partial, p, chunk, c0, c1)
