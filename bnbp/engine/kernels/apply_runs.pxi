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


cdef inline void apply_lanes(const Tensors[real]& at, Py_ssize_t i, Py_ssize_t count, const arith* k, bint normalize,
                             int extras, bint streams) noexcept nogil:
    """LANES elements, or the first `count`: past the caches or, as always with less than all, into them.

    `k` has the coefficients a, b, c and d and, for what `extras` names, the bounds.
    """
    cdef arith xs, dys, more, result
    load_lanes(xs, at.x + i, count)
    if not normalize:
        load_lanes(dys, at.dy + i, count)
    if extras & (MASKS | ADDS):
        load_lanes(more, at.v + i, count)
    if extras & MASKS:
        if normalize:
            xs = between(xs, more, k[LOW], k[HIGH])
        else:
            dys = between(dys, more, k[LOW], k[HIGH])
    if normalize:
        result = value(xs, xs, k[0], k[1], k[2], k[3], True)
        if extras & ADDS:
            result = result + more
        if extras & CLAMPS:
            result = clamped(result, k[LOW], k[HIGH])
    else:
        result = value(xs, dys, k[0], k[1], k[2], k[3], False)
    store_lanes(at.to + i, result, count, streams)
    if extras & RETURNS:
        store_beside(at.also + i, xs if normalize else dys, count, streams and extras & STREAMS_BOTH != 0)


cdef inline void apply_line(const Tensors[real]& at, Py_ssize_t i, const float_lanes* left, const float_lanes* right,
                            bint normalize, bint streams) noexcept nogil:
    """A whole line of 16-bit numbers, which is twice the lanes, with a, b, c and d of either half."""
    cdef float[32] xs, dys, results
    cdef real[32] line
    cdef float_lanes first, second, delta
    if real is float16 or real is bfloat16:
        widen_line(xs, at.x + i)
        widen_line(dys, at.x + i if normalize else at.dy + i)
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
            stream_line(at.to + i, line)
        else:
            put_line(at.to + i, line)


cdef inline void take_everywhere(arith* k, const Channels* ch, Py_ssize_t q, int extras, arith tag) noexcept nogil:
    """The coefficients of a channel, for LANES of its elements."""
    k[0], k[1] = everywhere(ch, 0, q, tag), everywhere(ch, 1, q, tag)
    k[2], k[3] = everywhere(ch, 2, q, tag), everywhere(ch, 3, q, tag)
    if extras:
        k[LOW], k[HIGH] = everywhere(ch, LOW, q, tag), everywhere(ch, HIGH, q, tag)


cdef inline void apply_lines(const Tensors[real]& at, Py_ssize_t i, Py_ssize_t count, Py_ssize_t ahead,
                             const Channels* ch, Py_ssize_t q, bint normalize, int extras, bint streams, arith tag
                             ) noexcept nogil:
    """Whole lanes of a run, or less than one. Asks for what comes `ahead` elements later."""
    cdef arith[6] k
    cdef float_lanes[4] all_four
    cdef Py_ssize_t end = i + count
    take_everywhere(k, ch, q, extras, tag)
    if count < LANES:
        apply_lanes(at, i, count, k, normalize, extras, False)
        return
    if (real is float16 or real is bfloat16) and arith is float_lanes and not extras:
        if count >= 32 and (not streams or past_line(at.to + i) == 0):
            all_four = [k[0], k[1], k[2], k[3]]
            while i + 32 <= end:
                look_ahead(at.x + i, at.dy + i, ahead, not normalize)
                apply_line(at, i, all_four, all_four, normalize, streams)
                i += 32
    while i < end:
        if extras:
            look_ahead_to(at.x + i, at.dy + i, at.v + i, ahead, not normalize, True)
        else:
            look_ahead(at.x + i, at.dy + i, ahead, not normalize)
        apply_lanes(at, i, LANES, k, normalize, extras, streams)
        i += LANES


cdef inline void apply_border(const Tensors[real]& at, Py_ssize_t i, Py_ssize_t border, const Channels* ch,
                              Py_ssize_t q, bint normalize, int extras, bint streams, arith tag) noexcept nogil:
    """The lanes of channel `q` and the next one, which begins at element `border`."""
    cdef arith[6] k
    k[0], k[1] = on_both_sides(ch, 0, q, border, tag), on_both_sides(ch, 1, q, border, tag)
    k[2], k[3] = on_both_sides(ch, 2, q, border, tag), on_both_sides(ch, 3, q, border, tag)
    if extras:
        k[LOW], k[HIGH] = on_both_sides(ch, LOW, q, border, tag), on_both_sides(ch, HIGH, q, border, tag)
    apply_lanes(at, i, LANES, k, normalize, extras, streams)


cdef struct Cursor:        # a place in a row of runs: element `at`, in channel `q`, whose run ends at `end`
    Py_ssize_t at, q, end


cdef inline void apply_part(const Tensors[real]& at, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                            const Channels* channels, bint normalize, int extras, bint streams, Cursor* cursor
                            ) noexcept nogil:
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
        odd = past(at.to + i, LANES)
        if odd == 0 and count < LANES and stop - i >= LANES and (
                real is double or (single and channels.in_range[q + 1])):
            if single:
                apply_border(at, i, count, channels, q, normalize, extras, streams, in_float)
            else:
                apply_border(at, i, count, channels, q, normalize, extras, streams, in_double)
            i += LANES
            q += 1
            end += s
            continue
        if odd == 0 and count >= LANES:
            count -= count % LANES
            if sizeof(real) == 2 and streams and past_line(at.to + i):  # up to the next whole line
                count = LANES
        else:
            count = min(count, LANES - odd)
        if single:
            apply_lines(at, i, count, ahead, channels, q, normalize, extras, streams, in_float)
        else:
            apply_lines(at, i, count, ahead, channels, q, normalize, extras, streams, in_double)
        i += count
    cursor.at, cursor.end, cursor.q = i, end, q


cdef void apply_block(const Tensors[real]& at, Py_ssize_t stop, Py_ssize_t s, Py_ssize_t ahead,
                      const Channels* channels, bint normalize, int extras, bint streams, Cursor* cursor
                      ) noexcept nogil:
    """Applies to a row of runs from the cursor up to element `stop`, and asks for what comes `ahead` elements later."""
    if extras:
        if normalize:
            apply_part(at, stop, s, ahead, channels, True, extras, streams, cursor)
        else:
            apply_part(at, stop, s, ahead, channels, False, extras, streams, cursor)
    elif normalize:
        if streams:
            apply_part(at, stop, s, ahead, channels, True, 0, True, cursor)
        else:
            apply_part(at, stop, s, ahead, channels, True, 0, False, cursor)
    elif streams:
        apply_part(at, stop, s, ahead, channels, False, 0, True, cursor)
    else:
        apply_part(at, stop, s, ahead, channels, False, 0, False, cursor)


cdef inline Cursor start_of(const real* to, Py_ssize_t s0, Py_ssize_t s, bint follows) noexcept nogil:
    """Where a task begins in a row of runs: `follows` says that a line shared with what is before it is its own."""
    cdef Cursor cursor
    cursor.at, cursor.q, cursor.end = s0, 0, s
    if follows:
        cursor.at -= past_line(to + s0)
    if cursor.at < 0:
        cursor.q, cursor.end = -1, 0
    return cursor


cdef inline bint is_just_before(const real* source, const Tensors[real]& at) noexcept nogil:
    """Whether both outputs begin at most 255 bytes after an input, counted modulo a page."""
    cdef uintptr_t to = (<uintptr_t> at.to - <uintptr_t> source) % PAGE
    cdef uintptr_t also = (<uintptr_t> at.also - <uintptr_t> source) % PAGE
    return 0 < to < PAGE // 16 and 0 < also < PAGE // 16


cdef inline int extras_of(const Tensors[real]& at, const Plan* p) noexcept nogil:
    """The plan's extras for one row of runs, and STREAMS_BOTH unless an input lies just before both outputs.

    There, two streams take four times as long as one stream and one output in the caches: 57 ms instead of 14, for
    32 x 128 x 56 x 56 in float32 on Zen 3. Distances of 16 to 144 bytes were slow, 256 bytes were not. The loads seem
    to wait for earlier stores whose addresses have the same last twelve bits.
    """
    if not p.extras & RETURNS or is_just_before(at.x, at) or is_just_before(at.dy, at) or is_just_before(at.v, at):
        return p.extras
    return p.extras | STREAMS_BOTH


cdef void apply_runs(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& v,       # IN
    const real[:, :, ::1]& dx,      # OUT, may be one of them
    const real[:, :, ::1]& da,      # OUT, may be one of them
    const Channels* channels,       # IN  (C)
    const Plan* p,
    Py_ssize_t chunk, Py_ssize_t c0, Py_ssize_t c1,
    bint follows, bint followed,    # whether the line that two units share goes with the second, at either end
) noexcept nogil:
    """A chunk of some channels with long runs, row by row."""
    cdef Py_ssize_t n0 = first_row(p, chunk), s0 = chunk % p.per_run * p.length, n, last
    cdef Py_ssize_t length = min(p.s - s0, p.length) if p.per_run > 1 else (c1 - c0) * p.s
    cdef Py_ssize_t far = AHEAD // <Py_ssize_t> sizeof(real) if p.far else 0
    cdef Channels own = channels_from(channels, c0)
    cdef bint normalize = p.operator != BACKPROP, from_dy = p.operator == INFERENCE_BACKPROP
    cdef Cursor cursor
    cdef Tensors[real] at
    for n in range(n0, n0 + rows_of(p, chunk)):
        at.x = &dy[n, c0, 0] if from_dy else &x[n, c0, 0]
        at.dy, at.v = &dy[n, c0, 0], &v[n, c0, 0]
        at.to, at.also = <real*> &dx[n, c0, 0], <real*> &da[n, c0, 0]
        cursor = start_of(at.to, s0, p.s, p.streams and (follows or s0 > 0))
        last = s0 + length
        if p.streams and (followed or last < (c1 - c0) * p.s):
            last -= past_line(at.to + last)
        apply_block(at, last, p.s, far, &own, normalize, extras_of(at, p), p.streams, &cursor)
