# Sweep: long runs that come from memory, both passes at once.
#
# What the second pass reads, the first should have left in L2. So a sweep applies to one unit while it reduces the
# next, block by block: the memory then reads and writes at the same time, as the floor does. A unit too large for all
# L2 caches together is reduced first and then applied to, the last chunk first.

cdef void sweep(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& v,       # IN
    const real[:, :, ::1]& dx,      # OUT, may be one of them
    const real[:, :, ::1]& da,      # OUT, may be one of them
    const Channels* channels,       # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, 4, C), as of `reduce_runs`
    const Plan* p,
    Py_ssize_t chunk,
    Py_ssize_t a0, Py_ssize_t a1,   # the channels that it applies to
    Py_ssize_t r0, Py_ssize_t r1,   # the channels that it reduces
    bint follows, bint followed,    # whether the line that two units share goes with the second, at either end
) noexcept nogil:
    """A chunk of long runs: applies to one unit while it reduces another, block by block."""
    cdef double[WIDTH * 4 * LANES] memory
    cdef double[WIDTH] shift
    cdef bint statistics = p.operator == TRAINING, normalize = p.operator != BACKPROP, ends, row_ends
    cdef Py_ssize_t n0 = first_row(p, chunk), s0 = chunk % p.per_run * p.length
    cdef Py_ssize_t length = min(p.s - s0, p.length), pitch = p.c * p.s, segment = (r1 - r0) * p.s
    cdef Py_ssize_t n, q, i, count, last, stop, ahead, near, block = block_of(<real> 0)
    cdef Py_ssize_t far = (AHEAD - 1408 * p.third) // <Py_ssize_t> sizeof(real) if p.far else 0
    cdef Channels applied = channels_from(channels, a0)
    cdef Channels reduced = channels_from(channels, r0)
    cdef Cursor cursor
    cdef int extras
    cdef Tensors[real] at
    cdef const real* rx
    cdef const real* rdy
    cdef const real* rv
    memset(memory, 0, (r1 - r0 + 3) // 4 * 4 * 4 * LANES * sizeof(double))
    for q in range(r1 - r0):
        shift[q] = x[n0, r0 + q, s0] if statistics else reduced.mean[q]
    for n in range(n0, n0 + rows_of(p, chunk)):
        rx = &x[n, 0, 0] + r0 * p.s + s0
        rdy = &dy[n, 0, 0] + r0 * p.s + s0
        rv = &v[n, 0, 0] + r0 * p.s + s0
        at.x = &dy[n, 0, 0] if p.operator == INFERENCE_BACKPROP else &x[n, 0, 0]
        at.dy, at.v = &dy[n, 0, 0], &v[n, 0, 0]
        at.to, at.also = <real*> &dx[n, 0, 0], <real*> &da[n, 0, 0]
        advance(at, a0 * p.s)
        extras = extras_of(at, p)
        # What it applies to, in elements of the row from channel a0 on.
        cursor = start_of(at.to, s0, p.s, p.streams and a0 < a1 and (follows or s0 > 0))
        last = 0 if a0 == a1 else s0 + length if p.per_run > 1 else (a1 - a0) * p.s
        if p.streams and a0 < a1 and (followed or last < (a1 - a0) * p.s):
            last -= past_line(at.to + last)
        stop = cursor.at + block - past_line(at.to + cursor.at)  # so that blocks end where lines do
        # What it asks for ahead. Past the end of the unit's row comes its next one, or the first of the next unit.
        ahead = min(far, segment)
        near = segment - s0 - ahead
        row_ends = (n - n0 + 1) % p.together == 0
        q = i = 0
        while cursor.at < last or q < r1 - r0:
            if cursor.at < last:
                apply_block(at, min(stop, last), p.s, 0, &applied, normalize, extras, p.streams, &cursor)
                stop += block
            if q < r1 - r0:
                count = min(length - i, block)
                if near <= 0 and far:  # once in a row
                    near = p.c * p.s
                    ahead += pitch - segment if n + 1 < p.n else -(p.n - 1) * pitch
                ends = (i + count) % PIECE == 0 if i + count < length else row_ends
                reduce_block(rx, rdy, rv, count, ahead, shift[q], reduced.wide[LOW][q], reduced.wide[HIGH][q],
                             statistics, p.masked, ends, memory + q * 4 * LANES)
                rx += count
                rdy += count
                rv += count
                near -= count
                i += count
                if i == length:
                    q += 1
                    i = 0
    for q in range(0, r1 - r0, 4):
        for i in range(q, q + 4):
            collect(memory + i * 4 * LANES, <real> 0)
        fold_channels(memory + q * 4 * LANES, min(r1 - r0 - q, 4), partial, p, chunk, r0 + q, &shift[q],
                      rows_of(p, chunk) * length, <real> 0)
    if real is float16 or real is bfloat16:
        redo_overflown(x, dy, v, channels, partial, p, chunk, r0, r1)
