# Apply.

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


cdef inline void apply_lanes(const real* x, const real* dy, real* to, const arith* a, const arith* b, const arith* c,
                             const arith* d, Py_ssize_t each, bint normalize, bint streams) noexcept nogil:
    """LANES elements: `each` has its own coefficients (1), or all the same (0). Past the caches or into them."""
    cdef real[LANES] lanes
    cdef arith[LANES] xs, dys, results
    cdef Py_ssize_t lane
    if real is float or real is double:
        for lane in range(16):
            lanes[lane] = <real> value(<arith> x[lane], <arith> dy[lane], a[lane * each], b[lane * each],
                                       c[lane * each], d[lane * each], normalize)
    else:
        widen(xs, x)
        widen(dys, x if normalize else dy)
        for lane in range(16):
            results[lane] = value(xs[lane], dys[lane], a[lane * each], b[lane * each], c[lane * each], d[lane * each],
                                  normalize)
        narrow(lanes, results)
    if not streams:
        memcpy(to, lanes, LANES * sizeof(real))
    elif real is double:
        stream_line(to, lanes)
        stream_line(to + 8, lanes + 8)
    elif real is float:
        stream_line(to, lanes)
    else:
        stream_half_line(to, lanes)


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
                             const Channel* channel, bint normalize, bint streams, arith tag) noexcept nogil:
    """Whole lanes of a run. Asks for what comes `ahead` elements later."""
    cdef arith a = <arith> channel.a, b = <arith> channel.b, c = <arith> channel.c, d = <arith> channel.d
    cdef Py_ssize_t i = 0
    if (real is float16 or real is bfloat16) and arith is float:
        if count >= 32 and (not streams or past_line(to) == 0):
            for i in range(0, count - 31, 32):
                look_ahead(x + i, dy + i, ahead, not normalize)
                apply_line(x + i, dy + i, to + i, a, b, c, d, normalize, streams)
            i = count - count % 32
    while i < count:
        look_ahead(x + i, dy + i, ahead, not normalize)
        apply_lanes(x + i, dy + i, to + i, &a, &b, &c, &d, 0, normalize, streams)
        i += LANES


cdef inline void apply_border(const real* x, const real* dy, real* to, Py_ssize_t border, const Channel* left,
                              bint normalize, bint streams, arith tag) noexcept nogil:
    """The lanes of two channels, the second of which begins at element `border`."""
    cdef const Channel* right = left + 1
    cdef arith a = <arith> left.a, b = <arith> left.b, c = <arith> left.c, d = <arith> left.d
    cdef arith e = <arith> right.a, f = <arith> right.b, g = <arith> right.c, h = <arith> right.d
    cdef arith[LANES] first, second, third, fourth
    cdef Py_ssize_t lane
    for lane in range(16):
        first[lane] = a if lane < border else e
        second[lane] = b if lane < border else f
        third[lane] = c if lane < border else g
        fourth[lane] = d if lane < border else h
    apply_lanes(x, dy, to, first, second, third, fourth, 1, normalize, streams)


cdef inline void apply_rest(const real* x, const real* dy, real* to, Py_ssize_t count, const Channel* channel,
                            bint normalize, arith tag) noexcept nogil:
    """Less than the lanes."""
    cdef arith a = <arith> channel.a, b = <arith> channel.b, c = <arith> channel.c, d = <arith> channel.d
    cdef Py_ssize_t i
    for i in range(count):
        to[i] = <real> value(<arith> x[i], <arith> dy[i], a, b, c, d, normalize)


cdef struct Cursor:        # a place in a row of runs: element `at`, in channel `q`, whose run ends at `end`
    Py_ssize_t at, q, end


cdef inline void apply_part(const real* x, const real* dy, real* to, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                            const Channel* channels, bint normalize, bint streams, Cursor* cursor) noexcept nogil:
    cdef Py_ssize_t i = cursor.at, end = cursor.end, count, odd
    cdef const Channel* channel = channels + cursor.q
    cdef bint single
    while i < stop:
        if i == end:
            channel += 1
            end += s
        single = real is not double and channel.in_range
        count = min(end, stop) - i
        odd = past(to + i, LANES) if streams else 0
        if odd == 0 and count >= LANES:
            count -= count % LANES
            if sizeof(real) == 2 and streams and past_line(to + i):  # up to the next whole line
                count = LANES
            if single:
                apply_lines(x + i, dy + i, to + i, count, ahead, channel, normalize, streams, <float> 0)
            else:
                apply_lines(x + i, dy + i, to + i, count, ahead, channel, normalize, streams, <double> 0)
        elif odd == 0 and stop - i >= LANES and (real is double or (single and channel[1].in_range)):
            if single:
                apply_border(x + i, dy + i, to + i, count, channel, normalize, streams, <float> 0)
            else:
                apply_border(x + i, dy + i, to + i, count, channel, normalize, streams, <double> 0)
            count = LANES
            channel += 1
            end += s
        else:
            count = min(count, LANES - odd)
            if single:
                apply_rest(x + i, dy + i, to + i, count, channel, normalize, <float> 0)
            else:
                apply_rest(x + i, dy + i, to + i, count, channel, normalize, <double> 0)
        i += count
    cursor.at, cursor.end, cursor.q = i, end, <Py_ssize_t> (channel - channels)


cdef void apply_block(const real* x, const real* dy, real* to, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                      const Channel* channels, bint normalize, bint streams, Cursor* cursor) noexcept nogil:
    """Applies to a row of runs from the cursor up to element `stop`, and asks for what comes `ahead` elements later."""
    if normalize:
        apply_part(x, dy, to, stop, s, ahead, channels, True, streams, cursor)
    else:
        apply_part(x, dy, to, stop, s, ahead, channels, False, streams, cursor)


cdef inline void apply_row(const real* x, const real* dy, real* to, const arith* a, const arith* b, const arith* c,
                           const arith* d, Py_ssize_t count, Py_ssize_t ahead, bint normalize, bint streams
                           ) noexcept nogil:
    """A part of a row: whole lanes, unless it is less. Asks for what comes `ahead` elements later."""
    cdef Py_ssize_t i, whole_lanes = count - count % LANES
    for i in range(0, whole_lanes, 16):
        look_ahead(x + i, dy + i, ahead, not normalize)
        apply_lanes(x + i, dy + i, to + i, a + i, b + i, c + i, d + i, 1, normalize, streams)
    for i in range(whole_lanes, count):
        to[i] = <real> value(<arith> x[i], <arith> dy[i], a[i], b[i], c[i], d[i], normalize)


cdef void apply_rows(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& dx,      # OUT, may be x or dy
    const Channel* channels,        # IN  (C)
    const Plan* p,
    Task t,
    bint normalize,
    bint whole_lines,               # a cache line that two tasks share goes with the second
    arith tag,
) noexcept nogil:
    """A task of short runs: each position of a row has its coefficients."""
    cdef arith[POSITIONS + 2 * 32] a, b, c, d  # a line more at either end
    cdef const real* x0 = &x[t.n0, 0, 0]
    cdef const real* dy0 = &dy[t.n0, 0, 0]
    cdef real* dx0 = <real*> &dx[t.n0, 0, 0]
    cdef Channel ch
    cdef bint joined = whole_lines and t.pitch == t.length   # the rows follow each other in memory
    cdef Py_ssize_t first = t.c0 * p.s, last = t.c1 * p.s, row, length, following, i, count, position, q, left
    cdef Py_ssize_t line = line_of(<real> 0)
    cdef Py_ssize_t ahead = 0 if not p.far else AHEAD // <Py_ssize_t> sizeof(real) if joined else t.pitch
    if whole_lines and p.streams and p.merge == 1 and p.unit == p.c and t.pitch % line == 0:
        if t.c0 > 0:
            first -= past_line(dx0 + first)
        if t.c1 < p.c:
            last -= past_line(dx0 + last)
        t.length = t.last = last - first
    # The coefficients of the positions, and those that a line finds past the end of a row: the next row's.
    q = first // p.s
    left = (q + 1) * p.s - first
    for position in range(t.length + line):
        if left == 0:
            left = p.s
            q = t.c0 if q + 1 == (t.c1 if joined else p.c) else q + 1
        ch = channels[q]
        a[position], b[position], c[position], d[position] = ch.a, ch.b, ch.c, ch.d
        left -= 1
    x0 += first
    dy0 += first
    dx0 += first
    i = 0  # where a row begins that the line before it has not reached
    for row in range(t.rows):
        length = t.length if row + 1 < t.rows else t.last
        following = 0 if row + 1 == t.rows else t.length if row + 2 < t.rows else t.last
        if p.streams:  # up to where a line begins
            count = min((line - past_line(dx0 + i)) % line, length - i)
            apply_row(x0 + i, dy0 + i, dx0 + i, a + i, b + i, c + i, d + i, count, 0, normalize, False)
            i += count
        count = (length - i) // line * line
        if joined and following >= line and i + count < length:
            count += line  # the line that goes on in the next row
        apply_row(x0 + i, dy0 + i, dx0 + i, a + i, b + i, c + i, d + i, count, ahead, normalize, p.streams)
        i += count
        if i < length:
            apply_row(x0 + i, dy0 + i, dx0 + i, a + i, b + i, c + i, d + i, length - i, 0, normalize, False)
            i = length
        i -= length
        x0 += t.pitch
        dy0 += t.pitch
        dx0 += t.pitch


cdef void apply_task(const real[:, :, ::1]& x, const real[:, :, ::1]& dy, const real[:, :, ::1]& dx,
                     const Channel* channels, const Plan* p, Task t, bint normalize) noexcept nogil:
    """A task in the type of the data; if there are channels that need float64, channel by channel."""
    cdef Py_ssize_t c, c0 = t.c0, c1 = t.c1
    cdef bint fits = True
    if real is double:
        apply_rows(x, dy, dx, channels, p, t, normalize, True, <double> 0)
    else:
        for c in range(0 if p.unit == p.c else c0, p.c if p.unit == p.c else c1):
            fits = fits and channels[c].in_range
        if fits:
            apply_rows(x, dy, dx, channels, p, t, normalize, True, <float> 0)
            return
        t.length = t.last = p.s
        t.rows = min(p.chunk_rows, p.n - t.n0)
        t.pitch = p.c * p.s
        for c in range(c0, c1):
            t.c0, t.c1 = c, c + 1
            if channels[c].in_range:
                apply_rows(x, dy, dx, channels, p, t, normalize, False, <float> 0)
            else:
                apply_rows(x, dy, dx, channels, p, t, normalize, False, <double> 0)
