# Apply: the output, from the tensors and the coefficients of the channels.

# ---- LANES elements side by side

cdef inline Py_ssize_t block_of(real tag) noexcept nogil:
    """Elements of a block: twice as many of 16 bits, which are as many bytes."""
    return 2 * BLOCK if sizeof(real) == 2 else BLOCK


cdef inline Py_ssize_t line_of(real tag) noexcept nogil:
    """Elements of a line: whole cache lines, and whole lanes."""
    return max(LANES, 64 // <Py_ssize_t> sizeof(real))


cdef inline Py_ssize_t past(const real* address, Py_ssize_t count) noexcept nogil:
    """Elements from where a line, or half of one, of `count` elements starts to an address in it."""
    return <uintptr_t> address % (count * sizeof(real)) // sizeof(real)


cdef inline Py_ssize_t past_line(const real* address) noexcept nogil:
    return past(address, line_of(<real> 0))


cdef inline void load_lanes(arith* to, const real* source, Py_ssize_t count) noexcept nogil:
    """LANES numbers in the type that apply computes in, or the first `count` of them."""
    if real is arith:
        if count == LANES:
            memcpy(to, source, LANES * sizeof(real))
        else:
            load_part(to, source, count)
    elif count == LANES:
        widen(to, source)
    else:
        widen_part(to, source, count)


cdef inline void apply_lanes(const real* x, const real* dy, real* to, Py_ssize_t count, const arith* a, const arith* b,
                             const arith* c, const arith* d, Py_ssize_t each, bint normalize, bint streams
                             ) noexcept nogil:
    """LANES elements, or the first `count`: past the caches or, as always with less than all, into them.

    `each` has its own coefficients (1), or all the same (0).
    """
    cdef real[LANES] lanes
    cdef arith[LANES] xs, dys, results
    cdef Py_ssize_t lane
    load_lanes(xs, x, count)
    load_lanes(dys, x if normalize else dy, count)
    for lane in range(16):
        results[lane] = value(xs[lane], dys[lane], a[lane * each], b[lane * each], c[lane * each], d[lane * each],
                              normalize)
    if real is arith:
        memcpy(lanes, results, LANES * sizeof(real))
    else:
        narrow(lanes, results)
    if count < LANES:
        store_part(to, lanes, count)
    elif not streams:
        memcpy(to, lanes, LANES * sizeof(real))
    elif real is double:
        stream_line(to, lanes)
        stream_line(to + 8, lanes + 8)
    elif real is float:
        stream_line(to, lanes)
    else:
        stream_half_line(to, lanes)


# ---- long runs

cdef inline void apply_line(const real* x, const real* dy, real* to, arith a, arith b, arith c, arith d,
                            bint normalize, bint streams) noexcept nogil:
    """A whole line of 16-bit numbers."""
    cdef float[32] xs, dys, results
    cdef real[32] line
    cdef Py_ssize_t k
    if (real is float16 or real is bfloat16) and arith is float:
        widen_line(xs, x)
        widen_line(dys, x if normalize else dy)
        for k in range(32):
            results[k] = value(xs[k], dys[k], a, b, c, d, normalize)
        narrow_line(line, results)
        if streams:
            stream_line(to, line)
        else:
            memcpy(to, line, 64)


cdef inline void apply_lines(const real* x, const real* dy, real* to, Py_ssize_t count, Py_ssize_t ahead,
                             const Channels* ch, Py_ssize_t q, bint normalize, bint streams, arith tag) noexcept nogil:
    """Whole lanes of a run. Asks for what comes `ahead` elements later."""
    cdef arith a = field(ch, 0, tag)[q], b = field(ch, 1, tag)[q], c = field(ch, 2, tag)[q], d = field(ch, 3, tag)[q]
    cdef Py_ssize_t i = 0
    if (real is float16 or real is bfloat16) and arith is float:
        if count >= 32 and (not streams or past_line(to) == 0):
            for i in range(0, count - 31, 32):
                look_ahead(x + i, dy + i, ahead, not normalize)
                apply_line(x + i, dy + i, to + i, a, b, c, d, normalize, streams)
            i = count - count % 32
    while i < count:
        look_ahead(x + i, dy + i, ahead, not normalize)
        apply_lanes(x + i, dy + i, to + i, LANES, &a, &b, &c, &d, 0, normalize, streams)
        i += LANES


cdef inline void apply_border(const real* x, const real* dy, real* to, Py_ssize_t border, const Channels* ch,
                              Py_ssize_t q, bint normalize, bint streams, arith tag) noexcept nogil:
    """The lanes of channel `q` and the next one, which begins at element `border`."""
    cdef arith[LANES] a, b, c, d
    cdef arith a0 = field(ch, 0, tag)[q], b0 = field(ch, 1, tag)[q], c0 = field(ch, 2, tag)[q]
    cdef arith d0 = field(ch, 3, tag)[q], a1 = field(ch, 0, tag)[q + 1], b1 = field(ch, 1, tag)[q + 1]
    cdef arith c1 = field(ch, 2, tag)[q + 1], d1 = field(ch, 3, tag)[q + 1]
    cdef Py_ssize_t lane
    for lane in range(16):
        a[lane] = a0 if lane < border else a1
        b[lane] = b0 if lane < border else b1
        c[lane] = c0 if lane < border else c1
        d[lane] = d0 if lane < border else d1
    apply_lanes(x, dy, to, LANES, a, b, c, d, 1, normalize, streams)


cdef inline void apply_rest(const real* x, const real* dy, real* to, Py_ssize_t count, const Channels* ch,
                            Py_ssize_t q, bint normalize, arith tag) noexcept nogil:
    """Less than the lanes."""
    cdef arith a = field(ch, 0, tag)[q], b = field(ch, 1, tag)[q], c = field(ch, 2, tag)[q], d = field(ch, 3, tag)[q]
    apply_lanes(x, dy, to, count, &a, &b, &c, &d, 0, normalize, False)


cdef struct Cursor:        # a place in a row of runs: element `at`, in channel `q`, whose run ends at `end`
    Py_ssize_t at, q, end


cdef inline void apply_part(const real* x, const real* dy, real* to, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                            const Channels* channels, bint normalize, bint streams, Cursor* cursor) noexcept nogil:
    cdef Py_ssize_t i = cursor.at, end = cursor.end, q = cursor.q, count, odd
    cdef bint single
    while i < stop:
        if i == end:
            q += 1
            end += s
        single = real is not double and channels.in_range[q]
        count = min(end, stop) - i
        odd = past(to + i, LANES)
        if odd == 0 and count >= LANES:
            count -= count % LANES
            if sizeof(real) == 2 and streams and past_line(to + i):  # up to the next whole line
                count = LANES
            if single:
                apply_lines(x + i, dy + i, to + i, count, ahead, channels, q, normalize, streams, <float> 0)
            else:
                apply_lines(x + i, dy + i, to + i, count, ahead, channels, q, normalize, streams, <double> 0)
        elif odd == 0 and stop - i >= LANES and (real is double or (single and channels.in_range[q + 1])):
            if single:
                apply_border(x + i, dy + i, to + i, count, channels, q, normalize, streams, <float> 0)
            else:
                apply_border(x + i, dy + i, to + i, count, channels, q, normalize, streams, <double> 0)
            count = LANES
            q += 1
            end += s
        else:
            count = min(count, LANES - odd)
            if single:
                apply_rest(x + i, dy + i, to + i, count, channels, q, normalize, <float> 0)
            else:
                apply_rest(x + i, dy + i, to + i, count, channels, q, normalize, <double> 0)
        i += count
    cursor.at, cursor.end, cursor.q = i, end, q


cdef void apply_block(const real* x, const real* dy, real* to, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                      const Channels* channels, bint normalize, bint streams, Cursor* cursor) noexcept nogil:
    """Applies to a row of runs from the cursor up to element `stop`, and asks for what comes `ahead` elements later."""
    if normalize:
        if streams:
            apply_part(x, dy, to, stop, s, ahead, channels, True, True, cursor)
        else:
            apply_part(x, dy, to, stop, s, ahead, channels, True, False, cursor)
    elif streams:
        apply_part(x, dy, to, stop, s, ahead, channels, False, True, cursor)
    else:
        apply_part(x, dy, to, stop, s, ahead, channels, False, False, cursor)


cdef inline Cursor start_of(const real* to, Py_ssize_t s0, Py_ssize_t s, bint follows) noexcept nogil:
    """Where a task begins in a row of runs: `follows` says that a line shared with what is before it is its own."""
    cdef Cursor cursor
    cursor.at, cursor.q, cursor.end = s0, 0, s
    if follows:
        cursor.at -= past_line(to + s0)
    if cursor.at < 0:
        cursor.q, cursor.end = -1, 0
    return cursor


cdef void apply_runs(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& dx,      # OUT, may be x or dy
    const Channels* channels,       # IN  (C)
    const Plan* p,
    Py_ssize_t chunk, Py_ssize_t c0, Py_ssize_t c1,
    bint follows, bint followed,    # whether the line that two units share goes with the second, at either end
) noexcept nogil:
    """A chunk of some channels with long runs, row by row."""
    cdef Py_ssize_t n0 = chunk // p.per_run * p.chunk_rows, s0 = chunk % p.per_run * p.length, n, last
    cdef Py_ssize_t length = min(p.s - s0, p.length) if p.per_run > 1 else (c1 - c0) * p.s
    cdef Py_ssize_t far = AHEAD // <Py_ssize_t> sizeof(real) if p.far else 0
    cdef Channels own = channels_from(channels, c0)
    cdef bint normalize = p.operator != BACKPROP, from_dy = p.operator == INFERENCE_BACKPROP
    cdef Cursor cursor
    cdef real* to
    for n in range(n0, min(n0 + p.chunk_rows, p.n)):
        to = <real*> &dx[n, c0, 0]
        cursor = start_of(to, s0, p.s, p.streams and (follows or s0 > 0))
        last = s0 + length
        if p.streams and (followed or last < (c1 - c0) * p.s):
            last -= past_line(to + last)
        apply_block(&dy[n, c0, 0] if from_dy else &x[n, c0, 0], &dy[n, c0, 0], to, last, p.s, far, &own, normalize,
                    p.streams, &cursor)


# ---- short runs: each position of a row has its coefficients

cdef inline void apply_columns(const real* x, const real* dy, real* to, Py_ssize_t rows, Py_ssize_t pitch,
                               Py_ssize_t ahead, const arith* a, const arith* b, const arith* c, const arith* d,
                               bint normalize, bint streams) noexcept nogil:
    """A few rows of COLUMNS positions, whose coefficients stay in registers."""
    cdef arith[COLUMNS] a0, b0, c0, d0
    cdef Py_ssize_t row, i
    for i in range(64):
        a0[i], b0[i], c0[i], d0[i] = a[i], b[i], c[i], d[i]
    for row in range(rows):
        for i in range(0, 64, 16):
            look_ahead(x + i, dy + i, ahead, not normalize)
            apply_lanes(x + i, dy + i, to + i, LANES, a0 + i, b0 + i, c0 + i, d0 + i, 1, normalize, streams)
        x += pitch
        dy += pitch
        to += pitch


cdef inline void apply_rectangle(const real* x, const real* dy, real* to, Py_ssize_t rows, Py_ssize_t pitch,
                                 Py_ssize_t count, Py_ssize_t ahead, const arith* a, const arith* b, const arith* c,
                                 const arith* d, bint normalize, bint streams) noexcept nogil:
    """Some rows of `count` positions. Asks for what comes `ahead` elements later."""
    cdef Py_ssize_t row, i, k, some
    for row in range(0, rows, 2):
        some = min(rows - row, 2)
        for i in range(0, count - 63, 64):
            apply_columns(x + i, dy + i, to + i, some, pitch, ahead, a + i, b + i, c + i, d + i, normalize, streams)
        for k in range(some):
            for i in range(count - count % COLUMNS, count, 16):
                if count - i >= LANES:
                    look_ahead(x + k * pitch + i, dy + k * pitch + i, ahead, not normalize)
                    apply_lanes(x + k * pitch + i, dy + k * pitch + i, to + k * pitch + i, LANES, a + i, b + i, c + i,
                                d + i, 1, normalize, streams)
                else:
                    apply_lanes(x + k * pitch + i, dy + k * pitch + i, to + k * pitch + i, count - i, a + i, b + i,
                                c + i, d + i, 1, normalize, False)
        x += 2 * pitch
        dy += 2 * pitch
        to += 2 * pitch


cdef void spread(arith* to, const arith* numbers, Py_ssize_t c0, Py_ssize_t channels, Py_ssize_t s, Py_ssize_t first,
                 Py_ssize_t count) noexcept nogil:
    """The numbers of a row's positions from `first` on; after the last channel comes c0, of the next row."""
    cdef Py_ssize_t q = first // s, left = (q + 1) * s - first, i = 0, k, some
    while i < count:
        if s == 1:  # as many as there are side by side
            some = min(channels - q, count - i)
            memcpy(to + i, numbers + q, some * sizeof(arith))
            q += some
        else:
            some = min(left, count - i)
            for k in range(some):
                to[i + k] = numbers[q]
            left = s
            q += 1
        i += some
        if q == channels:
            q = c0


cdef void apply_rows(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& dx,      # OUT, may be x or dy
    const Channels* channels,       # IN  (C)
    const Plan* p,
    Task t,
    bint normalize,
    bint whole_lines,               # a cache line that two tasks share goes with the second
    arith tag,
) noexcept nogil:
    """A task of short runs."""
    cdef arith[POSITIONS + 2 * 32] a, b, c, d  # a line more at either end
    cdef const real* x0 = &x[t.n0, 0, 0]
    cdef const real* dy0 = &dy[t.n0, 0, 0]
    cdef real* to = <real*> &dx[t.n0, 0, 0]
    cdef bint joined = whole_lines and t.pitch == t.length   # the rows follow each other in memory
    cdef Py_ssize_t first = t.c0 * p.s, last = t.c1 * p.s, line = line_of(<real> 0), head, rows, row, i, end
    cdef Py_ssize_t ahead = 0 if not p.far else AHEAD // <Py_ssize_t> sizeof(real) if joined else t.pitch
    if whole_lines and p.streams and p.merge == 1 and p.unit == p.c and t.pitch % line == 0:
        if t.c0 > 0:
            first -= past_line(to + first)
        if t.c1 < p.c:
            last -= past_line(to + last)
        t.length = t.last = last - first
    spread(a, field(channels, 0, tag), t.c0, p.c, p.s, first, t.length + line)
    spread(b, field(channels, 1, tag), t.c0, p.c, p.s, first, t.length + line)
    spread(c, field(channels, 2, tag), t.c0, p.c, p.s, first, t.length + line)
    spread(d, field(channels, 3, tag), t.c0, p.c, p.s, first, t.length + line)
    x0 += first
    dy0 += first
    to += first
    head = (line - past_line(to)) % line
    rows = t.rows - (t.last < t.length)
    if joined and t.pitch % line == 0 and t.rows > 1 and t.last >= line:
        # From one row's first line to the next one's: no line is written in two parts.
        apply_rectangle(x0, dy0, to, 1, t.pitch, head, 0, a, b, c, d, normalize, False)
        apply_rectangle(x0 + head, dy0 + head, to + head, t.rows - 1, t.pitch, t.length, ahead, a + head, b + head,
                        c + head, d + head, normalize, p.streams)
        i = (t.rows - 1) * t.pitch + head
        apply_rectangle(x0 + i, dy0 + i, to + i, 1, t.pitch, t.last - head, ahead, a + head, b + head, c + head,
                        d + head, normalize, p.streams)
        return
    if not p.streams or t.pitch % line == 0:
        if not p.streams:
            head = 0
        apply_rectangle(x0, dy0, to, rows, t.pitch, min(head, t.length), 0, a, b, c, d, normalize, False)
        apply_rectangle(x0 + head, dy0 + head, to + head, rows, t.pitch, t.length - head, ahead, a + head, b + head,
                        c + head, d + head, normalize, p.streams)
        if rows < t.rows:
            i = rows * t.pitch
            apply_rectangle(x0 + i, dy0 + i, to + i, 1, t.pitch, t.last, 0, a, b, c, d, normalize, False)
        return
    i = 0  # where a row begins that the line before it has not reached
    for row in range(t.rows):
        end = t.length if row + 1 < t.rows else t.last
        head = min((line - past_line(to + i)) % line, end - i)
        apply_rectangle(x0 + i, dy0 + i, to + i, 1, t.pitch, head, 0, a + i, b + i, c + i, d + i, normalize, False)
        i += head
        head = (end - i) // line * line
        if joined and i + head < end and row + 1 < t.rows and (row + 2 < t.rows or t.last >= line):
            head += line  # the line that goes on in the next row
        apply_rectangle(x0 + i, dy0 + i, to + i, 1, t.pitch, head, ahead, a + i, b + i, c + i, d + i, normalize, True)
        i += head
        if i < end:
            apply_rectangle(x0 + i, dy0 + i, to + i, 1, t.pitch, end - i, 0, a + i, b + i, c + i, d + i, normalize,
                            False)
            i = end
        i -= end
        x0 += t.pitch
        dy0 += t.pitch
        to += t.pitch


cdef void apply_task(const real[:, :, ::1]& x, const real[:, :, ::1]& dy, const real[:, :, ::1]& dx,
                     const Channels* channels, const Plan* p, Task t, bint normalize) noexcept nogil:
    """A task in the type of the data; if there are channels that need float64, channel by channel."""
    cdef Py_ssize_t c, c0 = t.c0, c1 = t.c1
    if real is double:
        apply_rows(x, dy, dx, channels, p, t, normalize, True, <double> 0)
    elif all_in_range(channels, 0 if p.unit == p.c else c0, p.c if p.unit == p.c else c1):
        if normalize:
            apply_rows(x, dy, dx, channels, p, t, True, True, <float> 0)
        else:
            apply_rows(x, dy, dx, channels, p, t, False, True, <float> 0)
    else:
        t.length = t.last = p.s
        t.rows = min(p.chunk_rows, p.n - t.n0)
        t.pitch = p.c * p.s
        for c in range(c0, c1):
            t.c0, t.c1 = c, c + 1
            if channels.in_range[c]:
                apply_rows(x, dy, dx, channels, p, t, normalize, False, <float> 0)
            else:
                apply_rows(x, dy, dx, channels, p, t, normalize, False, <double> 0)
