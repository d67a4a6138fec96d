# The plan: who works on what, in which order.
#
# What decides about bits is a function of the shape and the type alone, and stands first. What decides about speed
# follows from the caches and the threads. Where the caches hold everything, the work goes by units of a few channels,
# reduced and then applied to while they are in L1; each thread has units, or columns, of its own, and waits for
# nobody. From memory, long runs are swept (see sweep.pxi), in units that fit L2; a unit that does not is worked on by
# all threads together, each on its own chunks, with a barrier between the passes. Short runs are reduced and then
# applied to, unit by unit, and where a row holds all channels (channels-last) there is one unit, everything.

cdef enum Operator:
    TRAINING
    BACKPROP
    INFERENCE
    INFERENCE_BACKPROP


cdef enum Extra:           # what an activation or an addend adds to `apply`
    MASKS = 1              # a gradient is taken where the activation is not flat
    RETURNS = 2            # and is an output itself
    ADDS = 4               # the forward operator adds a tensor
    CLAMPS = 8             # and applies the activation
    STREAMS_BOTH = 16      # both outputs go past the caches: see `extras_of`


cdef struct Plan:
    Operator operator
    int extras             # the second pass's
    bint masked            # the first pass takes the gradient where the activation is not flat
    bint third             # a tensor is read besides `input` and `normalized_delta`
    Py_ssize_t n, c, s
    bint runs              # S is long enough for lanes
    Py_ssize_t together    # rows whose terms are summed together, TERMS at most to an accumulator
    Py_ssize_t merge       # rows of (C, S) that are taken as one, where they are very short
    Py_ssize_t sample_rows  # rows that chunks do not go beyond: all, or those of a sample
    Py_ssize_t chunk_rows  # rows of a chunk
    Py_ssize_t per_run     # chunks in a run
    Py_ssize_t length      # elements of a run in a chunk; the last one may have fewer
    Py_ssize_t chunks      # chunks in a channel
    Py_ssize_t width       # channels in a task
    Py_ssize_t unit        # channels in a unit
    Py_ssize_t units
    bint reduces, applies
    bint shared            # all threads work on a unit together
    bint private           # each thread has numbers of the channels to itself
    bint fused             # a unit is applied to while the next one is reduced
    bint far               # the data comes from memory
    bint streams           # the output is written past the caches
    bint tiled             # the tensors are gathered, a tile at a time
    Py_ssize_t scratch     # bytes for the tiles of a thread
    int team


cdef struct Task:          # a chunk of some channels: `rows` rows of `length` elements, the last one of `last`
    Py_ssize_t chunk, c0, c1
    Py_ssize_t n0          # where it begins, in channel c0
    Py_ssize_t rows, length, last, pitch


cdef Plan plan_of(const bnbp_arguments* a, Operator operator, bint reduces, bint applies, bint in_place) noexcept nogil:
    cdef Plan p
    cdef Py_ssize_t size = 8 if a.type == BNBP_F64 else 4 if a.type == BNBP_F32 else 2
    cdef bint forward = operator == TRAINING or operator == INFERENCE, masked = (
        not forward and a.activation != BNBP_IDENTITY)
    cdef Py_ssize_t third = a.addend is not NULL if forward else a.forward_output is not NULL
    cdef Py_ssize_t bytes_read = size * (1 if operator == TRAINING else 2 + third)
    cdef Py_ssize_t l2 = kernels_.l2_size, elements = a.n * a.c * a.s, group, most
    cdef bint cached
    p.operator, p.masked, p.third = operator, masked, third
    p.extras = MASKS if masked else 0
    if a.addend_delta is not NULL:
        p.extras |= RETURNS
    if forward and third:
        p.extras |= ADDS
    if forward and a.activation != BNBP_IDENTITY:
        p.extras |= CLAMPS
    p.n, p.c, p.s = a.n, a.c, a.s
    p.reduces, p.applies = reduces, applies
    p.streams = elements * size >= STREAMED * l2 and not in_place
    p.team = 1
    if elements >= REGION and not kernels_.serial:
        p.team = min(a.num_threads if a.num_threads > 0 else default_team(), MAX_TEAM)
    cached = elements * size * ((2 if operator == TRAINING else 3) + third + (a.addend_delta is not NULL)
                                ) <= CACHED * l2
    p.runs = a.s >= max(RUN, 64 // size)  # a cache line has no more than two channels
    p.far = not cached
    p.merge = p.per_run = p.width = p.length = p.together = 1
    p.sample_rows = a.n if a.exact is NULL else max(a.n // max(a.samples, 1), 1)
    p.chunks = p.chunk_rows = 0
    p.shared = p.fused = False
    p.tiled = elements and a.lengths is not NULL
    p.scratch = 0

    # What decides about bits: a function of the shape and the type alone.
    if elements and p.runs:
        p.per_run = (a.s + CHUNK - 1) // CHUNK
        p.length = ((a.s + p.per_run - 1) // p.per_run + LANES - 1) // LANES * LANES
        p.per_run = (a.s + p.length - 1) // p.length
        p.chunk_rows = min(max(CHUNK // a.s, 1), p.sample_rows)
        p.chunks = chunks_of(&p) * p.per_run
        p.together = max(TERMS // ((a.s + LANES - 1) // LANES), 1)
    elif elements:
        if a.c * a.s < COLUMNS:
            p.merge = SPAN // (a.c * a.s)
            if p.merge > LANES:
                p.merge -= p.merge % LANES  # whole lanes
        p.chunks = min(max(p.sample_rows // (ROWS * p.merge), 1), CHUNKS)
        most = min(MOST * p.merge, (1 << 16) // a.s)  # see element.pxi and reduce_runs.pxi
        if p.merge > 1:
            most = min(most, (1 << 18) // (a.c * a.s))  # a tile has all channels, and should not be much larger than L2
        p.chunks = max(p.chunks, (p.sample_rows + most - 1) // most)
        if p.chunks > 1:
            p.chunks += (4 - p.chunks % 4) % 4  # shared out evenly among a few threads
        group = GROUP * p.merge
        p.chunk_rows = ((p.sample_rows + p.chunks - 1) // p.chunks + group - 1) // group * group
        p.chunks = chunks_of(&p)

    # What decides about speed: caches and threads.
    p.unit = p.c
    if p.tiled:
        plan_tiles(&p, size)
    elif elements and p.runs:
        plan_runs(&p, a.n * a.s * bytes_read, 64 // size, cached)
    elif elements:
        plan_rows(&p, a.n * a.s * bytes_read, cached)
    p.units = (p.c + p.unit - 1) // p.unit
    p.private = p.shared and p.runs and p.reduces and a.exact is NULL
    return p


cdef inline void plan_runs(Plan* p, Py_ssize_t channel, Py_ssize_t line, bint cached) noexcept nogil:
    """Units of channels with long runs; `channel` is the bytes that one of them is read from."""
    cdef Py_ssize_t l2 = kernels_.l2_size, aligned = 1, unit
    if not p.reduces:  # nothing is read twice, and long stretches of memory are best
        if p.n >= 4 * p.team:
            p.per_run, p.length, p.chunks = 1, p.s, (p.n + p.chunk_rows - 1) // p.chunk_rows
        p.shared = p.team > 1 and (p.chunks >= 4 * p.team if p.per_run == 1 else p.c < 4 * p.team)
        if p.per_run > 1:
            p.unit = 1
        elif p.team > 1 and not p.shared:
            p.unit = max(p.c // (4 * p.team), 1)
        return
    if cached:
        unit = max(min(max(UNIT // channel, SEGMENT // p.s, 4), l2 // 4 // channel), 1)
        if unit > FEW:
            unit -= unit % FEW
        if p.per_run > 1:  # `apply_runs` takes a part of a run, of one channel
            unit = 1
        if p.team > 1 and p.c >= 2 * p.team:
            p.unit = min(unit, (p.c + p.team - 1) // p.team)
            return
        if p.team == 1 or p.chunks < 2 * p.team:
            p.unit, p.team = min(unit, p.c), 1
            return
    while aligned * p.s % line:
        aligned *= 2
    unit = aligned
    while unit * p.s < SEGMENT:
        unit += aligned
    if p.per_run > 1:
        unit = 1
    # Narrower, if a unit would not fit the cache, or there were too few for the team.
    unit = max(min(unit, WIDTH, l2 // 4 // channel, p.c // (4 * p.team) if p.team > 1 else p.c), 1)
    p.shared = p.team > 1 and p.chunks >= 2 * p.team and (unit * channel > l2 // 4 or p.c < 4 * p.team)
    if p.shared and p.per_run == 1:
        unit = max(min(WIDTH, p.c, l2 // 4 * p.team // channel), 1)
    p.unit = unit
    p.fused = p.applies and unit * channel <= l2 // 2 * (p.team if p.shared else 1)


cdef inline void plan_rows(Plan* p, Py_ssize_t channel, bint cached) noexcept nogil:
    """Tasks and units of channels with short runs; `channel` is the bytes that one of them is read from."""
    cdef Py_ssize_t l2 = kernels_.l2_size
    if cached and p.merge == 1:
        p.width = min(POSITIONS // p.s, p.c)
        if p.chunks < p.team and p.c * p.s >= COLUMNS * p.team:  # to each its own columns
            p.unit = ((p.c + p.team - 1) // p.team + 15) // 16 * 16
            p.width = min(p.width, p.unit)
            return
        if p.chunks < p.team:
            p.team = 1
        p.shared = p.team > 1
        return
    p.width = p.c if p.merge > 1 else max(min(SPAN // p.s, p.c, l2 // 2 // channel), SPAN // 2 // p.s, 1)
    if p.reduces and p.width * channel <= l2 // 2 and p.width < p.c:
        p.unit = p.width
        p.shared = p.team > 1 and p.c < 4 * p.team * p.unit
        if p.shared:
            p.unit = min(l2 // 2 * p.team // (p.width * channel) * p.width, p.c)
        p.far = False
        return
    if p.merge == 1:
        p.width = min(POSITIONS // p.s, p.c)
    p.shared = p.team > 1


cdef inline void plan_tiles(Plan* p, Py_ssize_t size) noexcept nogil:
    """Tiles of one chunk: as many channels as leave room in L2."""
    cdef Py_ssize_t length = min(p.length, p.s) if p.runs else p.s
    cdef Py_ssize_t channel = (2 + p.third) * size * min(p.chunk_rows, p.n) * length
    if p.merge > 1:  # rows of all channels
        p.width = p.c
    else:
        p.width = min(max(kernels_.l2_size // 2 // channel, 1), WIDTH if p.runs else SPAN // p.s, p.c)
    p.scratch = (p.width * channel + 127) // 64 * 64
    p.shared = p.team > 1


cdef inline Py_ssize_t chunks_of(const Plan* p) noexcept nogil:
    """Chunks of all rows, where a run is not cut."""
    return p.n // p.sample_rows * ((p.sample_rows + p.chunk_rows - 1) // p.chunk_rows)


cdef inline Py_ssize_t first_row(const Plan* p, Py_ssize_t chunk) noexcept nogil:
    """Where a chunk begins."""
    cdef Py_ssize_t of_sample = (p.sample_rows + p.chunk_rows - 1) // p.chunk_rows
    chunk //= p.per_run
    return chunk // of_sample * p.sample_rows + chunk % of_sample * p.chunk_rows


cdef inline Py_ssize_t rows_of(const Plan* p, Py_ssize_t chunk) noexcept nogil:
    """Its rows: of a sample the last one may have fewer."""
    return min(p.chunk_rows, p.sample_rows - first_row(p, chunk) % p.sample_rows)


cdef inline Task task_of(const Plan* p, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t index) noexcept nogil:
    """Task `index` of short runs in the unit of channels [c0, c1), in the order of memory."""
    cdef Task t
    cdef Py_ssize_t segments = (c1 - c0 + p.width - 1) // p.width, rows
    t.chunk = index // segments
    t.c0 = c0 + index % segments * p.width
    t.c1 = min(t.c0 + p.width, c1)
    t.n0 = first_row(p, t.chunk)
    rows = rows_of(p, t.chunk)
    t.pitch = p.merge * p.c * p.s
    t.rows = (rows + p.merge - 1) // p.merge
    t.length = p.merge * (t.c1 - t.c0) * p.s
    t.last = t.length - (t.rows * p.merge - rows) * (t.c1 - t.c0) * p.s
    if t.rows == 1:
        t.length = t.last
    return t


cdef inline Py_ssize_t count_of(const Plan* p, Py_ssize_t chunk) noexcept nogil:
    """Elements of a channel in a chunk."""
    if p.per_run > 1:
        return min(p.length, p.s - chunk % p.per_run * p.length)
    return rows_of(p, chunk) * p.s
