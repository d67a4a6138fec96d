# Apply, short runs: each position of a row has its coefficients.
#
# A task is a rectangle, some rows of some positions. Two columns of LANES positions at a time, whose coefficients are
# in registers for two rows.
#
# The second output is never streamed. With both streamed, a call took a third longer where both have the same place in
# their pages, and elsewhere the gain was within the noise (32 x 56 x 56 x 128, float32, Zen 3).

cdef struct Positions:     # the coefficients of the positions of a row
    double* wide[6]
    float* narrow[6]


cdef inline arith side_by_side(const Positions* at, int k, Py_ssize_t i, arith tag) noexcept nogil:
    """Field `k` of LANES positions from `i` on."""
    cdef arith field
    if arith is float_lanes:
        load(field, at.narrow[k] + i)
    else:
        load(field, at.wide[k] + i)
    return field


cdef inline void take_side_by_side(arith* k, const Positions* at, Py_ssize_t i, int extras, arith tag) noexcept nogil:
    """The coefficients of LANES positions from `i` on."""
    k[0], k[1] = side_by_side(at, 0, i, tag), side_by_side(at, 1, i, tag)
    k[2], k[3] = side_by_side(at, 2, i, tag), side_by_side(at, 3, i, tag)
    if extras:
        k[LOW], k[HIGH] = side_by_side(at, LOW, i, tag), side_by_side(at, HIGH, i, tag)


cdef inline void apply_columns(const Tensors[real]& at, Py_ssize_t rows, Py_ssize_t pitch, const Positions* positions,
                               Py_ssize_t i, Py_ssize_t ahead, bint normalize, int extras, bint streams, arith tag
                               ) noexcept nogil:
    """Two columns of LANES positions, whose coefficients stay in registers, from position `i` on."""
    cdef arith[6] k, l
    cdef float_lanes[4] left, right
    cdef Py_ssize_t row
    take_side_by_side(k, positions, i, extras, tag)
    take_side_by_side(l, positions, i + LANES, extras, tag)
    if (real is float16 or real is bfloat16) and arith is float_lanes and not extras:
        left, right = [k[0], k[1], k[2], k[3]], [l[0], l[1], l[2], l[3]]
        for row in range(rows):
            apply_line(at, i, left, right, normalize, streams)
            i += pitch
    else:
        for row in range(rows):
            look_ahead(at.x + i, at.dy + i, ahead, False)
            apply_lanes(at, i, LANES, k, normalize, extras, streams)
            look_ahead(at.x + i + LANES, at.dy + i + LANES, ahead, False)
            apply_lanes(at, i + LANES, LANES, l, normalize, extras, streams)
            i += pitch


cdef inline void apply_rest(const Tensors[real]& at, Py_ssize_t count, const Positions* positions, Py_ssize_t i,
                            Py_ssize_t offset, bint normalize, int extras, bint streams, arith tag) noexcept nogil:
    """LANES positions or less of one row, from position `i` on."""
    cdef arith[6] k
    take_side_by_side(k, positions, i, extras, tag)
    if count < LANES:
        apply_lanes(at, i + offset, count, k, normalize, extras, False)
    else:
        apply_lanes(at, i + offset, LANES, k, normalize, extras, streams)


cdef inline void apply_rectangle_as(const Tensors[real]& tensors, Py_ssize_t rows, Py_ssize_t pitch,
                                    Py_ssize_t first, Py_ssize_t last, bint linear, const Positions* positions,
                                    bint normalize, int extras, bint streams, arith tag) noexcept nogil:
    # From memory, `linear` is the order in which the CPU sees what comes next: 0.6 ns an element instead of 1.1. To ask
    # for it ahead costs 5 % of two tensors, and gains 10 % of one. A few short rows are as good to see, and 64 channels
    # of bfloat16 take 0.15 ns instead of 0.23. Of rows a multiple of a page apart what is read passes for what was just
    # written. (A)
    cdef Tensors[real] at = tensors
    cdef Py_ssize_t row = 0, i, k, some, whole = (last - first) // (2 * LANES) * (2 * LANES) + first
    cdef Py_ssize_t together = 1 if pitch * sizeof(real) % PAGE == 0 else 2
    cdef Py_ssize_t ahead = AHEAD // <Py_ssize_t> sizeof(real) if linear and normalize else 0
    if linear:
        together = max(NEARBY // 2 // (pitch * <Py_ssize_t> sizeof(real)), 1)
    while row < rows:
        some = min(rows - row, together)
        for i in range(first, whole, 32):
            apply_columns(at, some, pitch, positions, i, ahead, normalize, extras, streams, tag)
        for k in range(some):
            for i in range(whole, last, 16):
                apply_rest(at, min(last - i, LANES), positions, i, k * pitch, normalize, extras, streams, tag)
        advance(at, some * pitch)
        row += some


cdef void apply_rectangle(const Tensors[real]& at, Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t first,
                          Py_ssize_t last, bint linear, const Positions* positions, bint normalize, int extras,
                          bint streams, arith tag) noexcept nogil:
    """The positions [first, last) of some rows; one row after the other, if `linear` says so."""
    if real is not double and arith is not float_lanes:  # rare, and not worth a code for each case
        apply_rectangle_as(at, rows, pitch, first, last, linear, positions, normalize, extras, False, tag)
    elif extras:
        if normalize:
            apply_rectangle_as(at, rows, pitch, first, last, linear, positions, True, extras, streams, tag)
        else:
            apply_rectangle_as(at, rows, pitch, first, last, linear, positions, False, extras, streams, tag)
    elif normalize:
        if streams:
            apply_rectangle_as(at, rows, pitch, first, last, linear, positions, True, 0, True, tag)
        else:
            apply_rectangle_as(at, rows, pitch, first, last, linear, positions, True, 0, False, tag)
    elif streams:
        apply_rectangle_as(at, rows, pitch, first, last, linear, positions, False, 0, True, tag)
    else:
        apply_rectangle_as(at, rows, pitch, first, last, linear, positions, False, 0, False, tag)


ctypedef fused scalar:
    float
    double


cdef void spread(scalar* to, const scalar* numbers, Py_ssize_t c0, Py_ssize_t channels, Py_ssize_t s, Py_ssize_t first,
                 Py_ssize_t count) noexcept nogil:
    """The numbers of a row's positions from `first` on; after the last channel comes c0, of the next row."""
    cdef Py_ssize_t q = first // s, left = (q + 1) * s - first, i = 0, k, some
    while i < count:
        if s == 1:  # as many as there are side by side
            some = min(channels - q, count - i)
            memcpy(to + i, numbers + q, some * sizeof(scalar))
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
    const real[:, :, ::1]& v,       # IN
    const real[:, :, ::1]& dx,      # OUT, may be one of them
    const real[:, :, ::1]& da,      # OUT, may be one of them
    const Channels* channels,       # IN  (C)
    const Plan* p,
    Task t,
    bint normalize,
    bint whole_lines,               # a cache line that two tasks share goes with the second
    arith tag,
) noexcept nogil:
    """A task of short runs."""
    cdef double[6 * (POSITIONS + 2 * 32)] memory  # a line more at either end
    cdef Positions k
    cdef Tensors[real] at
    cdef bint joined = whole_lines and t.pitch == t.length   # the rows follow each other in memory
    cdef Py_ssize_t first = t.c0 * p.s, last = t.c1 * p.s, line = line_of(<real> 0), head, rows, row, i, end
    cdef int field
    at.x, at.dy, at.v = &x[t.n0, 0, 0], &dy[t.n0, 0, 0], &v[t.n0, 0, 0]
    at.to, at.also = <real*> &dx[t.n0, 0, 0], <real*> &da[t.n0, 0, 0]
    if whole_lines and p.streams and p.merge == 1 and p.unit == p.c and t.pitch % line == 0:
        if t.c0 > 0:
            first -= past_line(at.to + first)
        if t.c1 < p.c:
            last -= past_line(at.to + last)
        t.length = t.last = last - first
    for field in range(6 if p.extras else 4):
        k.wide[field] = memory + field * (POSITIONS + 64)
        k.narrow[field] = <float*> k.wide[field]
        if arith is float_lanes:
            spread(k.narrow[field], channels.narrow[field], t.c0, p.c, p.s, first, t.length + line)
        else:
            spread(k.wide[field], channels.wide[field], t.c0, p.c, p.s, first, t.length + line)
    advance(at, first)
    head = (line - past_line(at.to)) % line
    rows = t.rows - (t.last < t.length)
    if joined and t.pitch % line == 0 and t.rows > 1 and t.last >= line:
        # From one row's first line to the next one's: no line is written in two parts.
        apply_rectangle(at, 1, t.pitch, 0, head, p.far, &k, normalize, p.extras, False, tag)
        apply_rectangle(at, t.rows - 1, t.pitch, head, head + t.length, p.far, &k, normalize, p.extras, p.streams, tag)
        advance(at, (t.rows - 1) * t.pitch)
        apply_rectangle(at, 1, t.pitch, head, t.last, p.far, &k, normalize, p.extras, p.streams, tag)
    elif not p.streams or t.pitch % line == 0:
        head = min(head, t.length) if p.streams else 0
        apply_rectangle(at, rows, t.pitch, 0, head, p.far, &k, normalize, p.extras, False, tag)
        apply_rectangle(at, rows, t.pitch, head, t.length, p.far, &k, normalize, p.extras, p.streams, tag)
        advance(at, rows * t.pitch)
        apply_rectangle(at, t.rows - rows, t.pitch, 0, t.last, p.far, &k, normalize, p.extras, False, tag)
    else:
        i = 0  # where a row begins that the line before it has not reached
        for row in range(t.rows):
            end = t.length if row + 1 < t.rows else t.last
            head = min(i + (line - past_line(at.to + i)) % line, end)
            apply_rectangle(at, 1, t.pitch, i, head, p.far, &k, normalize, p.extras, False, tag)
            i = head + (end - head) // line * line
            if joined and i < end and row + 1 < t.rows and (row + 2 < t.rows or t.last >= line):
                i += line  # the line that goes on in the next row
            apply_rectangle(at, 1, t.pitch, head, i, p.far, &k, normalize, p.extras, True, tag)
            if i < end:
                apply_rectangle(at, 1, t.pitch, i, end, p.far, &k, normalize, p.extras, False, tag)
                i = end
            i -= end
            advance(at, t.pitch)


cdef void apply_task(const real[:, :, ::1]& x, const real[:, :, ::1]& dy, const real[:, :, ::1]& v,
                     const real[:, :, ::1]& dx, const real[:, :, ::1]& da, const Channels* channels, const Plan* p,
                     Task t, bint normalize) noexcept nogil:
    """A task in the type of the data; if there are channels that need float64, channel by channel."""
    cdef Py_ssize_t c, c0 = t.c0, c1 = t.c1
    cdef float_lanes in_float
    cdef lanes[double] in_double
    if real is double:
        apply_rows(x, dy, v, dx, da, channels, p, t, normalize, True, in_double)
    elif are_in_range(channels, 0 if p.unit == p.c else c0, p.c if p.unit == p.c else c1):
        apply_rows(x, dy, v, dx, da, channels, p, t, normalize, True, in_float)
    else:
        t.length = t.last = p.s
        t.rows = min(p.chunk_rows, p.n - t.n0)
        t.pitch = p.c * p.s
        for c in range(c0, c1):
            t.c0, t.c1 = c, c + 1
            if channels.in_range[c]:
                apply_rows(x, dy, v, dx, da, channels, p, t, normalize, False, in_float)
            else:
                apply_rows(x, dy, v, dx, da, channels, p, t, normalize, False, in_double)
