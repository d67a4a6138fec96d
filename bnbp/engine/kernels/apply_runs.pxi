# Apply, long runs: the output, from the tensors and the coefficients of the channels.
#
# Results that do not fit the caches are streamed past them. That wants whole cache lines: a line that was written in
# two parts would be read from memory, and every write after it would wait; at 28 x 28, where NumPy's arrays begin in
# the middle of a line, that cost a quarter of the time. So lanes always begin where a line, or a part of one, does;
# those that two channels share are computed with the coefficients of both, and a line that two units or tasks share is
# left to the second.

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


cdef inline void apply_lanes(const real* x, const real* dy, real* to, Py_ssize_t count, const arith* a, const arith* b,
                             const arith* c, const arith* d, bint normalize, bint streams) noexcept nogil:
    """LANES elements, or the first `count`: past the caches or, as always with less than all, into them."""
    cdef arith xs, dys
    load_lanes(xs, x, count)
    if normalize:
        store_lanes(to, value(xs, xs, a[0], b[0], c[0], d[0], True), count, streams)
    else:
        load_lanes(dys, dy, count)
        store_lanes(to, value(xs, dys, a[0], b[0], c[0], d[0], False), count, streams)


cdef inline void apply_line(const real* x, const real* dy, real* to, const float_lanes* left, const float_lanes* right,
                            bint normalize, bint streams) noexcept nogil:
    """A whole line of 16-bit numbers, which is twice the lanes, with a, b, c and d of either half."""
    cdef float[32] xs, dys, results
    cdef real[32] line
    cdef float_lanes first, second, delta
    if real is float16 or real is bfloat16:
        widen_line(xs, x)
        widen_line(dys, x if normalize else dy)
        load(first, xs)
        load(delta, dys)
        first = value(first, delta, left[0], left[1], left[2], left[3], normalize)
        load(second, &xs[16])
        load(delta, &dys[16])
        second = value(second, delta, right[0], right[1], right[2], right[3], normalize)
        store(results, first)
        store(&results[16], second)
        narrow_line(line, results)
        if streams:
            stream_line(to, line)
        else:
            memcpy(to, line, 64)


cdef inline void apply_lines(const real* x, const real* dy, real* to, Py_ssize_t count, Py_ssize_t ahead,
                             const Channels* ch, Py_ssize_t q, bint normalize, bint streams, arith tag) noexcept nogil:
    """Whole lanes of a run, or less than one. Asks for what comes `ahead` elements later."""
    cdef arith a = everywhere(ch, 0, q, tag), b = everywhere(ch, 1, q, tag), c = everywhere(ch, 2, q, tag)
    cdef arith d = everywhere(ch, 3, q, tag)
    cdef float_lanes[4] all_four
    cdef Py_ssize_t i = 0
    if count < LANES:
        apply_lanes(x, dy, to, count, &a, &b, &c, &d, normalize, False)
        return
    if (real is float16 or real is bfloat16) and arith is float_lanes:
        if count >= 32 and (not streams or past_line(to) == 0):
            all_four = [a, b, c, d]
            for i in range(0, count - 31, 32):
                look_ahead(x + i, dy + i, ahead, not normalize)
                apply_line(x + i, dy + i, to + i, all_four, all_four, normalize, streams)
            i = count - count % 32
    while i < count:
        look_ahead(x + i, dy + i, ahead, not normalize)
        apply_lanes(x + i, dy + i, to + i, LANES, &a, &b, &c, &d, normalize, streams)
        i += LANES


cdef inline void apply_border(const real* x, const real* dy, real* to, Py_ssize_t border, const Channels* ch,
                              Py_ssize_t q, bint normalize, bint streams, arith tag) noexcept nogil:
    """The lanes of channel `q` and the next one, which begins at element `border`."""
    cdef arith a = on_both_sides(ch, 0, q, border, tag), b = on_both_sides(ch, 1, q, border, tag)
    cdef arith c = on_both_sides(ch, 2, q, border, tag), d = on_both_sides(ch, 3, q, border, tag)
    apply_lanes(x, dy, to, LANES, &a, &b, &c, &d, normalize, streams)


cdef struct Cursor:        # a place in a row of runs: element `at`, in channel `q`, whose run ends at `end`
    Py_ssize_t at, q, end


cdef inline void apply_part(const real* x, const real* dy, real* to, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                            const Channels* channels, bint normalize, bint streams, Cursor* cursor) noexcept nogil:
    cdef Py_ssize_t i = cursor.at, end = cursor.end, q = cursor.q, count, odd
    cdef bint single
    cdef float_lanes in_float
    cdef lanes[double] in_double
    while i < stop:
        if i == end:
            q += 1
            end += s
        single = real is not double and channels.in_range[q]
        count = min(end, stop) - i
        odd = past(to + i, LANES)
        if odd == 0 and count < LANES and stop - i >= LANES and (
                real is double or (single and channels.in_range[q + 1])):
            if single:
                apply_border(x + i, dy + i, to + i, count, channels, q, normalize, streams, in_float)
            else:
                apply_border(x + i, dy + i, to + i, count, channels, q, normalize, streams, in_double)
            i += LANES
            q += 1
            end += s
            continue
        if odd == 0 and count >= LANES:
            count -= count % LANES
            if sizeof(real) == 2 and streams and past_line(to + i):  # up to the next whole line
                count = LANES
        else:
            count = min(count, LANES - odd)
        if single:
            apply_lines(x + i, dy + i, to + i, count, ahead, channels, q, normalize, streams, in_float)
        else:
            apply_lines(x + i, dy + i, to + i, count, ahead, channels, q, normalize, streams, in_double)
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
