# Reduce: the sums of a chunk.

# ---- LANES elements side by side

cdef inline void add_quarter(const real* x, const real* dy, Py_ssize_t count, int k, const lanes* shift, LaneSums* sums,
                             bint statistics, double unit) noexcept nogil:
    """Adds the lanes of quarter `k` to their sums, or the first `count` of these."""
    cdef quarter centered, rounded_off, delta, mean = quarter_of((<lanes*> shift)[0], k)
    load_quarter(centered, x + 4 * k, count)
    if real is double:
        centered = two_sum_of(centered, mean, &rounded_off, unit)
        if count < 4:
            rounded_off = first_of(rounded_off, count)
    else:
        centered = centered + mean
    if count < 4:  # there is no deviation where there is no element
        centered = first_of(centered, count)
    if not statistics:
        load_quarter(delta, dy + 4 * k, count)
    add_term(&quarter_of(sums.delta, k), &quarter_of(sums.delta_lo, k), &quarter_of(sums.product, k),
             &quarter_of(sums.product_lo, k), delta, centered, rounded_off, statistics,
             real is float16 and not statistics, unit, <real> 0)


cdef inline void add_lanes(const real* x, const real* dy, Py_ssize_t count, bint each, const lanes* shift,
                           LaneSums* sums, bint statistics, double unit) noexcept nogil:
    """Adds LANES elements side by side, or the first `count`, to their sums; `shift` is the mean of each, negated.

    `each` has its own accumulator; otherwise bfloat16 of even places come before those of odd ones.
    """
    cdef lanes centered, rounded_off, delta
    if real is double:  # all 16 at once would need more registers than there are
        add_quarter(x, dy, 4, 0, shift, sums, statistics, unit)
        add_quarter(x, dy, 4, 1, shift, sums, statistics, unit)
        add_quarter(x, dy, 4, 2, shift, sums, statistics, unit)
        add_quarter(x, dy, 4, 3, shift, sums, statistics, unit)
        return
    if each:
        load_lanes(centered, x, count)
    else:
        load_any(centered, x, count)
    centered = centered + shift[0]
    if count < LANES:  # there is no deviation where there is no element
        if real is bfloat16:
            centered = first_of(centered, count) if each else first_of_pairs(centered, count)
        else:
            centered = first_of(centered, count)
    if not statistics and each:
        load_lanes(delta, dy, count)
    elif not statistics:
        load_any(delta, dy, count)
    add_term(&sums.delta, &sums.delta_lo, &sums.product, &sums.product_lo, delta, centered, rounded_off, statistics,
             real is float16 and not statistics, unit, <real> 0)


cdef inline void add_rest(const real* x, const real* dy, Py_ssize_t count, bint each, const lanes* shift,
                          LaneSums* sums, bint statistics, double unit) noexcept nogil:
    """Adds less than the lanes, a quarter at a time: 49 elements are three times the lanes and one."""
    if real is bfloat16:
        if not each:
            add_lanes(x, dy, count, each, shift, sums, statistics, unit)
            return
    add_quarter(x, dy, min(count, 4), 0, shift, sums, statistics, unit)
    if count > 4:
        add_quarter(x, dy, min(count - 4, 4), 1, shift, sums, statistics, unit)
    if count > 8:
        add_quarter(x, dy, min(count - 8, 4), 2, shift, sums, statistics, unit)
    if count > 12:
        add_quarter(x, dy, min(count - 12, 4), 3, shift, sums, statistics, unit)


cdef inline void look_ahead(const real* x, const real* dy, Py_ssize_t ahead, bint both) noexcept nogil:
    """Asks for the LANES elements that come `ahead` elements later, if that is not 0."""
    if ahead:
        prefetch(x + ahead, LANES * sizeof(real))
        if both:
            prefetch(dy + ahead, LANES * sizeof(real))


cdef inline void clear_sums(LaneSums* sums) noexcept nogil:
    fill(sums.delta, 0.0)
    fill(sums.product, 0.0)
    fill(sums.delta_lo, 0.0)
    fill(sums.product_lo, 0.0)


cdef inline void put_aside(LaneSums* sums, real tag) noexcept nogil:
    """Adds the sums of the last few terms to what is kept beside them, and begins anew. Those of float64 go on."""
    if real is not double:
        sums.delta_lo = sums.delta_lo + sums.delta
        sums.product_lo = sums.product_lo + sums.product
        fill(sums.delta, 0.0)
        fill(sums.product, 0.0)


cdef inline void load_sums(LaneSums* sums, const double* memory, bint all, real tag) noexcept nogil:
    load(sums.delta, memory)
    load(sums.product, memory + LANES)
    if all or real is double:
        load(sums.delta_lo, memory + 2 * LANES)
        load(sums.product_lo, memory + 3 * LANES)


cdef inline void store_sums(double* memory, const LaneSums* sums, bint all, real tag) noexcept nogil:
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


cdef inline void set_sums(double[:, :, ::1]& partial, Py_ssize_t chunk, Py_ssize_t c, double delta, double product,
                          double delta_lo, double product_lo) noexcept nogil:
    partial[chunk, 0, c], partial[chunk, 1, c] = delta, product
    partial[chunk, 2, c], partial[chunk, 3, c] = delta_lo, product_lo


cdef inline void finish_chunk(double[:, :, ::1]& partial, Py_ssize_t chunk, Py_ssize_t c, double shift, double count
                              ) noexcept nogil:
    """From the sums of d = x - shift and d^2 to the mean, and m2 = sum d^2 - (sum d)^2 / count."""
    cdef Twofold delta = whole(partial[chunk, 0, c], partial[chunk, 2, c]), offset = over(delta, count)
    cdef Twofold square = times(delta, offset), mean = two_sum(shift, offset.hi)
    set_sums(partial, chunk, c, mean.hi, 0.0, mean.lo + offset.lo,
             (partial[chunk, 1, c] - square.hi) + (partial[chunk, 3, c] - square.lo))


# ---- long runs: an accumulator for each place modulo LANES

cdef inline void reduce_part(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, const lanes* shift,
                             LaneSums* sums, bint statistics, double unit) noexcept nogil:
    """Adds a part of a run: whole lanes and, if it is the end, the rest."""
    cdef Py_ssize_t i, whole_lanes = count - count % LANES
    for i in range(0, whole_lanes, 16):
        look_ahead(x + i, dy + i, ahead, not statistics)
        add_lanes(x + i, dy + i, LANES, False, shift, sums, statistics, unit)
    if whole_lanes < count:
        add_rest(x + whole_lanes, dy + whole_lanes, count - whole_lanes, False, shift, sums, statistics, unit)


cdef inline void reduce_block_as(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, double mean,
                                 bint statistics, bint ends, double* memory) noexcept nogil:
    cdef LaneSums sums
    cdef lanes shift
    fill(shift, -mean)
    load_sums(&sums, memory, False, <real> 0)
    reduce_part(x, dy, count, ahead, &shift, &sums, statistics, one())
    store_sums(memory, &sums, False, <real> 0)
    if ends:
        load_sums(&sums, memory, True, <real> 0)
        put_aside(&sums, <real> 0)
        store_sums(memory, &sums, True, <real> 0)


cdef void reduce_block(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, double mean, bint statistics,
                       bint ends, double* memory) noexcept nogil:
    """Adds a block of a run, or less, to the lanes' sums, and asks for what comes `ahead` elements later.

    `ends`: with it the terms that are summed together end.
    """
    if statistics:
        reduce_block_as(x, x, count, ahead, mean, True, ends, memory)
    else:
        reduce_block_as(x, dy, count, ahead, mean, False, ends, memory)


cdef inline void keep_sums(double* memory, const LaneSums* sums, real tag) noexcept nogil:
    """What `fold_channels` makes the sums of a channel of: all lanes of float64, of others a quarter."""
    if real is double:
        store_sums(memory, sums, True, tag)
    else:
        half_sum(memory, sums.delta_lo + sums.delta)
        half_sum(memory + LANES, sums.product_lo + sums.product)


cdef inline void reduce_channels_as(const real* x, const real* dy, Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count,
                                    Py_ssize_t ahead, Py_ssize_t step, Py_ssize_t together, Py_ssize_t channels,
                                    const double* mean, bint statistics, double* memory) noexcept nogil:
    cdef LaneSums sums
    cdef lanes shift
    cdef Py_ssize_t q, row, i, at, left
    cdef double unit = one()
    for q in range(channels):
        fill(shift, -mean[q])
        clear_sums(&sums)
        left = together
        at = q * step
        for row in range(rows):
            i = 0
            while count - i > PIECE:
                reduce_part(x + at + i, dy + at + i, PIECE, ahead, &shift, &sums, statistics, unit)
                put_aside(&sums, <real> 0)
                i += PIECE
            reduce_part(x + at + i, dy + at + i, count - i, ahead, &shift, &sums, statistics, unit)
            at += pitch
            left -= 1
            if left == 0:
                left = together
                put_aside(&sums, <real> 0)
        keep_sums(memory + q * 4 * LANES, &sums, <real> 0)


cdef void reduce_channels(
    const real* x,          # IN  (rows, channels, count), with a pitch and a step
    const real* dy,         # IN
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count, Py_ssize_t ahead, Py_ssize_t step, Py_ssize_t together,
    Py_ssize_t channels,
    const double* mean,     # IN  (channels)
    bint statistics,
    double* memory,         # OUT (channels, 4, LANES)
) noexcept nogil:
    """The sums of a few channels in a chunk, each in registers from start to end."""
    if statistics:
        reduce_channels_as(x, x, rows, pitch, count, ahead, step, together, channels, mean, True, memory)
    else:
        reduce_channels_as(x, dy, rows, pitch, count, ahead, step, together, channels, mean, False, memory)


cdef inline void collect(double* memory, real tag) noexcept nogil:
    cdef LaneSums sums
    load_sums(&sums, memory, True, tag)
    keep_sums(memory, &sums, tag)


cdef inline void fold_channels(double* memory, Py_ssize_t count, double[:, :, ::1]& partial, const Plan* p,
                               Py_ssize_t chunk, Py_ssize_t c, const double* shift, real tag) noexcept nogil:
    """The sums of up to four channels in a chunk from those of their lanes."""
    cdef double[4] delta, product
    cdef double* at
    cdef Py_ssize_t k
    if real is not double:
        sum_of_four(delta, memory, 4 * LANES)
        sum_of_four(product, memory + LANES, 4 * LANES)
    for k in range(count):
        at = memory + k * 4 * LANES
        if real is double:
            fold(at, at + 2 * LANES)
            fold(at + LANES, at + 3 * LANES)
            set_sums(partial, chunk, c + k, at[0], at[LANES], at[2 * LANES], at[3 * LANES])
        else:
            set_sums(partial, chunk, c + k, delta[k], product[k], 0.0, 0.0)
        if p.operator == TRAINING:
            finish_chunk(partial, chunk, c + k, shift[k], count_of(p, chunk))


cdef void reduce_runs(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const Channels* channels,       # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, 4, C): the sums of each chunk and their rest; of statistics, mean, m2
    const Plan* p,
    Py_ssize_t chunk, Py_ssize_t c0, Py_ssize_t c1,
) noexcept nogil:
    """A chunk of some channels with long runs, one after the other."""
    cdef Py_ssize_t n0 = chunk // p.per_run * p.chunk_rows, s0 = chunk % p.per_run * p.length
    cdef Py_ssize_t rows = min(p.chunk_rows, p.n - n0), length = min(p.s - s0, p.length), c, k, count
    cdef Py_ssize_t far = AHEAD // <Py_ssize_t> sizeof(real) if p.far else 0
    cdef const real* x0 = &x[n0, c0, s0]
    cdef const real* dy0 = &dy[n0, c0, s0]
    cdef double[4 * 4 * LANES] memory
    cdef double[4] shift
    for c in range(c0, c1, 4):
        if c1 - c < 4:
            memset(memory, 0, sizeof(memory))
        count = min(c1 - c, 4)
        for k in range(count):
            shift[k] = x0[k * p.s] if p.operator == TRAINING else channels.mean[c + k]
        reduce_channels(x0, dy0, rows, p.c * p.s, length, far, p.s, p.together, count, shift, p.operator == TRAINING,
                        memory)
        fold_channels(memory, count, partial, p, chunk, c, shift, <real> 0)
        x0 += 4 * p.s
        dy0 += 4 * p.s


# ---- short runs: an accumulator for each position of a row

cdef struct Accumulators:  # of the positions of a row, LANES of them in registers on their way down the rows
    double* delta
    double* product
    double* delta_lo
    double* product_lo
    const double* shift      # the means, negated


cdef inline void begin_columns(LaneSums* sums, lanes* shift, const Accumulators* a, Py_ssize_t i, bint begins, real tag
                               ) noexcept nogil:
    """Takes up the sums of LANES positions; the first rows begin with 0."""
    load(shift[0], a.shift + i)
    if begins:
        clear_sums(sums)
        return
    load(sums.delta, a.delta + i)
    load(sums.product, a.product + i)
    if real is double:
        load(sums.delta_lo, a.delta_lo + i)
        load(sums.product_lo, a.product_lo + i)


cdef inline void end_columns(LaneSums* sums, const Accumulators* a, Py_ssize_t i, bint ends, real tag) noexcept nogil:
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
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count, Py_ssize_t ahead,
    const Accumulators* a,  # IN OUT (count)
    bint statistics, bint begins, bint ends,
) noexcept nogil:
    """Adds a few rows to the accumulators of their positions, and asks for what comes `ahead` elements later."""
    cdef LaneSums sums, more
    cdef lanes shift, shift_more
    cdef Py_ssize_t i = 0, row, at, some
    cdef double unit = one()
    while i + 2 * LANES <= count:
        begin_columns(&sums, &shift, a, i, begins, <real> 0)
        begin_columns(&more, &shift_more, a, i + LANES, begins, <real> 0)
        for row in range(rows):
            at = row * pitch + i
            look_ahead(x + at, dy + at, ahead, not statistics)
            add_lanes(x + at, dy + at, LANES, True, &shift, &sums, statistics, unit)
            at += LANES
            look_ahead(x + at, dy + at, ahead, not statistics)
            add_lanes(x + at, dy + at, LANES, True, &shift_more, &more, statistics, unit)
        end_columns(&sums, a, i, ends, <real> 0)
        end_columns(&more, a, i + LANES, ends, <real> 0)
        i += 2 * LANES
    while i < count:
        some = min(count - i, LANES)
        begin_columns(&sums, &shift, a, i, begins, <real> 0)
        if some == LANES:
            for row in range(rows):
                at = row * pitch + i
                look_ahead(x + at, dy + at, ahead, not statistics)
                add_lanes(x + at, dy + at, LANES, True, &shift, &sums, statistics, unit)
        else:
            for row in range(rows):
                at = row * pitch + i
                add_rest(x + at, dy + at, some, True, &shift, &sums, statistics, unit)
        end_columns(&sums, a, i, ends, <real> 0)
        i += LANES


cdef void reduce_rows(
    const real* x,          # IN
    const real* dy,         # IN
    Task t,
    const Plan* p,
    const double* means,    # IN  (t.c1 - t.c0), and room for LANES more
    bint statistics,
    double[:, :, ::1]& partial,  # OUT
) noexcept nogil:
    """The sums of a chunk of short runs: an accumulator for each position of a row, folded by channel at the end."""
    cdef double[POSITIONS + 16] delta, delta_lo, product, product_lo, shift
    cdef Accumulators a
    cdef Py_ssize_t i, k, c, count, length, row = 0, position = 0, left = TERMS, ahead, s = p.s
    cdef Py_ssize_t channels = t.c1 - t.c0, rows = t.rows - (t.last < t.length), repeat = channels * s
    cdef bint linear = real is not double and p.far and t.length <= POSITIONS // 2, ends
    cdef bint aside = real is not double and t.rows >= TERMS
    a.delta, a.delta_lo, a.product, a.product_lo, a.shift = delta, delta_lo, product, product_lo, shift
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
    if aside or real is double:
        memset(delta_lo, 0, t.length * sizeof(double))
        memset(product_lo, 0, t.length * sizeof(double))
    while row < t.rows:
        count, length = 1, t.last
        if row < rows:
            count, length = min(min(rows - row, 1 if linear else GROUP), left), t.length
        left -= count
        ends = left == 0
        if ends:
            left = TERMS
        ahead = 0 if linear or not p.far else count * t.pitch
        if statistics:
            reduce_columns(x, x, count, t.pitch, length, ahead, &a, True, row == 0, ends)
        else:
            reduce_columns(x, dy, count, t.pitch, length, ahead, &a, False, row == 0, ends)
        x += count * t.pitch
        dy += count * t.pitch
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
    const Channels* channels,       # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, 4, C), as of `reduce_runs`
    const Plan* p,
    Task t,
) noexcept nogil:
    cdef const real* x0 = &x[t.n0, t.c0, 0]
    cdef const real* dy0 = &dy[t.n0, t.c0, 0]
    cdef double[POSITIONS] shift
    cdef Py_ssize_t c
    if p.operator != TRAINING:
        reduce_rows(x0, dy0, t, p, channels.mean + t.c0, False, partial)
        return
    for c in range(t.c1 - t.c0):
        shift[c] = x0[c * p.s]
    reduce_rows(x0, x0, t, p, shift, True, partial)
    for c in range(t.c1 - t.c0):
        finish_chunk(partial, t.chunk, t.c0 + c, shift[c], count_of(p, t.chunk))
