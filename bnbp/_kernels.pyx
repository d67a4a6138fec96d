"""The kernels: `reduce` and `apply` over (N, C, S) memoryviews, and the four operators made of them.

a. The view. A C-contiguous tensor whose channels are on axis k *is* an array of shape (N, C, S): N the product of the
   axes before k, S of those after it. NCHW has S = H*W; channels-last has S = 1. A channel's m = N*S elements are N
   contiguous runs of S. All kernels work on `const real[:, :, ::1]`, and no layout is copied.

b. Two passes. `reduce` reads the tensors and leaves sums for each channel; `apply` reads them again and writes the
   result, knowing the sums. Between them stands `finish`: a few operations for each channel.

       reduce   delta_sum          = sum dy_i                     beta_delta
                delta_centered_sum = sum dy_i (x_i - mean)        gamma_delta / inv_std
       apply    dx_i = gamma inv_std (dy_i - delta_sum/m - (x_i - mean) inv_std^2 delta_centered_sum/m)

   The forward operator is made of the same two: it reduces x - shift in the place of dy, and applies
   y_i = (x_i - mean) gamma inv_std + beta.

c. Chunks. A channel is cut into chunks, whose sums are written to their own places and combined in the order of the
   chunks. The cut depends on N, C and S alone, so the bits of the result do not depend on the number of threads.

d. Runs and rows. A long run (S >= RUN) is summed in LANES accumulators, which stay in registers. Where runs are short
   that would end before it has begun: there the elements of a row, that is of some neighbouring channels for one n, or
   of some whole rows of few channels, each have an accumulator of their own, which goes down the rows of the chunk. In
   both the order of the sum is part of the algorithm, not of the instruction set. GCC makes vector code of the inner
   loops, at any width.

e. Arithmetic. Sums are in float64, whatever `real` is. For float32 that is 29 bits more than the data has: the product
   of two is exact. For float64 there is nothing to spare, and the sums carry what each operation has rounded off
   (Ogita, Rump and Oishi, "Accurate sum and dot product", 2005): of the difference x_i - mean, of the product, and of
   the sum. The numbers of a channel are computed once, so they afford that too. `apply` is in the type of the data, and
   the mean is subtracted first: a*dy + b*x + c with precomputed a, b, c would be cheaper and lose everything to
   cancellation when the mean is far from 0. Only a float32 channel whose numbers are out of float32's range is computed
   in float64.

f. Statistics. The sums of d = x - shift and of d^2 about the chunk's first element as the shift give the chunk's mean
   and its sum of squared deviations, m2 = sum d^2 - (sum d)^2 / n, in one read. That cancels no more than a factor of
   n + 1, because the shift is one of the n elements and so within sqrt(n) standard deviations of their mean; float64
   sums have that to spare for float32, twofold sums for float64. A constant chunk has d = 0. The chunks are merged as
   in Chan, Golub and LeVeque (1983).

g. The schedule. What the second pass reads, the first should have left in a cache. So the threads take a *unit* at a
   time: a few neighbouring channels. As long as the caches can hold a unit for each thread, the units are shared out,
   and the threads do not wait for each other. A larger unit, or one of few, is worked on by all threads together:
   reduce, barrier, finish, barrier, apply, where a thread applies to the very tasks that it has reduced, the last one
   first, since that is in its cache for certain. Where rows hold all channels (channels-last) there is one unit,
   everything. Results larger than L2 are streamed past the caches, by the block.

h. Borrowed views. The kernels are called through a C table with plain pointers and without the GIL, so the views have
   no Python object behind them: `VIEW` fills in address, shape and strides of a view that is None. With
   `initializedcheck` off nothing ever looks at the object.
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange
from libc.math cimport NAN, fabs, sqrt
from libc.stdlib cimport free, malloc
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from bnbp.kernels cimport (
    BNBP_F32,
    BNBP_KERNELS_ABI,
    BNBP_KERNELS_CAPSULE,
    BNBP_NO_MEMORY,
    BNBP_OK,
    bnbp_arguments,
    bnbp_kernels,
    bnbp_status,
)

ctypedef fused real:   # the type of the tensors
    float
    double

ctypedef fused arith:  # the type that `apply` computes in
    float
    double

cdef extern from "_machine.h" nogil:
    void VIEW(const float[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const double[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void barrier()
    void prefetch(const void* address, size_t size)
    void prefetch_line(const void* address)
    void stream(void* to, const void* source, size_t size)
    void stream_fence()
    double product_error(double a, double b, double p)
    double one()
    double plus(double a, double b, double one)
    double minus(double a, double b, double one)
    const int BNBP_OPENMP
    const char* BNBP_ISA

# The reasons are times measured on two cores of an AMD EPYC (Zen 4, L2 1 MiB, L3 32 MiB), x86-64-v4, float32.
cdef enum:
    # Elements from which a run is long. From 128 on, 14 x 14 planes took a third longer: each of their runs has a tail.
    RUN = 512
    # Elements of a chunk of long runs. Its sums are 0.1 % of the bytes that it has read.
    CHUNK = 4096
    # Accumulators of a long run: 4 registers of 512 bits or 8 of 256 for both sums; twice as many AVX2 does not have.
    LANES = 16
    # Accumulators of a row: 12 KiB with the means. 1024 leave L1 no room for the data: with them, and with one row at a
    # time instead of four, `reduce` took 0.47 ns an element instead of 0.33.
    POSITIONS = 512
    # Rows in a chunk of short runs. Its sums are then 3 % of the bytes that it has read.
    ROWS = 128
    # Elements of a long run that are computed before they are streamed: 0.17 ns each; with 64 0.22, with 512 0.21.
    BLOCK = 128
    # Bytes asked for ahead in a long run. 56 x 56 planes reduce in 1.9 ms on one core; not asking ahead, in 3.1.
    AHEAD = 4096
    # Elements below which a team is not worth starting. 16384 take 10 us on one core and 17 on two, 32768 18 and 10.
    REGION = 32768
    # More threads than this were asked for by mistake. Where the system refuses one, GNU OpenMP ends the process.
    MAX_TEAM = 256


# ---------------------------------------------------------------- arithmetic that loses nothing

cdef struct Twofold:  # the unevaluated sum of two float64 numbers, about 106 bits
    double hi
    double lo


cdef inline Twofold two_sum(double a, double b, double unit=1.0) noexcept nogil:
    """a + b exactly (Knuth)."""
    cdef Twofold r
    cdef double back
    r.hi = a + b
    back = minus(r.hi, a, unit)
    r.lo = plus(minus(a, r.hi - back, unit), b - back, unit)
    return r


cdef inline Twofold two_product(double a, double b) noexcept nogil:
    """a * b exactly, short of underflow."""
    cdef Twofold r
    r.hi = a * b
    r.lo = product_error(a, b, r.hi)
    return r


cdef inline Twofold whole(double hi, double lo) noexcept nogil:
    """hi + lo with no overlap. Where `hi` has overflowed, `lo` is NaN and has nothing to add."""
    cdef Twofold r
    if lo != lo:
        lo = 0.0
    r.hi = hi + lo
    r.lo = lo - (r.hi - hi) if r.hi - r.hi == 0 else 0.0
    return r


cdef inline Twofold times(Twofold a, Twofold b) noexcept nogil:
    cdef Twofold r = two_product(a.hi, b.hi)
    return whole(r.hi, r.lo + (a.hi * b.lo + a.lo * b.hi))


cdef inline Twofold over(Twofold a, double b) noexcept nogil:
    cdef double q = a.hi / b
    cdef Twofold back = two_product(q, b)
    return whole(q, ((a.hi - back.hi) - back.lo + a.lo) / b)


cdef inline Twofold inverse_square_root(Twofold a) noexcept nogil:
    """One Newton step from the float64 result: r (3 - a r^2) / 2."""
    cdef Twofold r
    r.hi, r.lo = 1.0 / sqrt(a.hi), 0.0
    cdef Twofold product = times(a, times(r, r))
    return whole(r.hi, r.hi * 0.5 * ((1.0 - product.hi) - product.lo))


cdef inline void add(double* hi, double* lo, double value, double rest, double unit=1.0) noexcept nogil:
    """Adds value + rest to the sum hi + lo; `rest` is far below `value`."""
    cdef Twofold r = two_sum(hi[0], value, unit)
    hi[0] = r.hi
    lo[0] += plus(r.lo, rest, unit)


# ---------------------------------------------------------------- an element and a channel

cdef struct Sums:         # what reduce leaves of a chunk; a row of `partial`
    double delta          # sum dy_i                       or, for statistics, sum (x_i - shift)
    double delta_lo
    double product        # sum dy_i (x_i - mean)          or sum (x_i - shift)^2
    double product_lo


cdef struct Channel:
    double mean           # what reduce subtracts
    double a, b, c, d     # what apply computes with; see `value`
    bint in_range         # all four are numbers of full precision in float32


cdef inline void add_term(double* delta, double* delta_lo, double* product, double* product_lo, real x, real dy,
                          double mean, bint statistics, double unit) noexcept nogil:
    """Adds an element to the sums. For statistics the deviation x - mean takes the place of dy."""
    cdef Twofold centered, square
    cdef double d, d_lo = 0.0
    if real is float:
        centered.hi = x - mean
        d = centered.hi if statistics else dy
        delta[0] = plus(delta[0], d, unit)
        product[0] = plus(product[0], d * centered.hi, unit)
    else:
        centered = two_sum(x, -mean, unit)
        d = centered.hi if statistics else dy
        square = two_product(d, centered.hi)
        if statistics:
            d_lo = centered.lo
            square.lo += 2.0 * centered.hi * centered.lo
        else:
            square.lo += d * centered.lo
        add(delta, delta_lo, d, d_lo, unit)
        add(product, product_lo, square.hi, square.lo, unit)


cdef inline void add_part(double* hi, double* lo, double part, double part_lo, real tag) noexcept nogil:
    """Adds a part of a sum: for float32 plain float64 is enough, see e."""
    if real is float:
        hi[0] += part
    else:
        add(hi, lo, part, part_lo)


cdef inline void add_sums(Sums* sums, double delta, double delta_lo, double product, double product_lo, real tag
                          ) noexcept nogil:
    add_part(&sums.delta, &sums.delta_lo, delta, delta_lo, tag)
    add_part(&sums.product, &sums.product_lo, product, product_lo, tag)


cdef inline arith value(arith x, arith dy, arith a, arith b, arith c, arith d, bint normalize) noexcept nogil:
    """An element of the output."""
    if normalize:
        return ((x - a) - b) * c + d          # a + b the mean, c = scale, d = beta
    return ((dy - a) - (x - b) * c) * d       # a = delta_sum / m, b the mean, c = slope, d = scale


cdef inline bint in_range(double v) noexcept nogil:
    return v == 0 or (fabs(v) >= 1.1754943508222875e-38 and fabs(v) <= 3.4028234663852886e+38)


# ---------------------------------------------------------------- plan: who works on what, in which order

cdef enum Operator:
    TRAINING
    BACKPROP
    INFERENCE
    INFERENCE_BACKPROP


cdef struct Plan:
    Operator operator
    Py_ssize_t n, c, s
    bint long_runs
    Py_ssize_t merge       # rows of (C, S) that are taken as one, where they are very short
    Py_ssize_t chunk_rows  # rows of a chunk
    Py_ssize_t per_run     # chunks in a run
    Py_ssize_t chunks      # chunks in a channel
    Py_ssize_t width       # channels in a task
    Py_ssize_t unit        # channels in a unit
    Py_ssize_t units
    bint reduces, applies
    bint shared            # all threads work on a unit together
    bint far               # apply does not find its data in L2
    bint streams           # the output is written past the caches
    int team


cdef struct Task:          # a chunk of some channels: `rows` rows of `length` elements, the last one of `last`
    Py_ssize_t chunk, c0, c1
    Py_ssize_t n0, s0      # where it begins, in channel c0
    Py_ssize_t rows, length, last, pitch
    Py_ssize_t next        # elements to the same place in the thread's next unit, if its cache can hold two; or 0


cdef Plan plan_of(const bnbp_arguments* a, Operator operator, bint reduces, bint applies, bint in_place) noexcept nogil:
    cdef Plan p
    cdef Py_ssize_t size = 4 if a.type == BNBP_F32 else 8
    cdef Py_ssize_t bytes_read = size * (1 if operator == TRAINING else 2)
    cdef Py_ssize_t l2 = kernels_.l2_size, row, channel, most, segments
    cdef Py_ssize_t elements = a.n * a.c * a.s
    p.operator = operator
    p.n, p.c, p.s = a.n, a.c, a.s
    p.reduces, p.applies = reduces, applies
    p.streams = elements * size >= l2 and not in_place
    p.team = 1 if kernels_.serial or elements < REGION else min(a.num_threads, MAX_TEAM)
    p.merge = p.per_run = p.width = 1
    p.chunks = p.chunk_rows = 0
    p.long_runs = a.s >= RUN
    row = a.c * a.s
    channel = a.n * a.s * bytes_read      # bytes of a channel that reduce reads and apply reads again

    # What decides about bits: a function of the shape alone.
    if elements and p.long_runs:
        p.per_run = (a.s + CHUNK - 1) // CHUNK
        p.chunk_rows = max(CHUNK // a.s, 1)
        p.chunks = (a.n + p.chunk_rows - 1) // p.chunk_rows * p.per_run
    elif elements:
        if row <= POSITIONS // 2:
            p.merge = POSITIONS // row
        p.chunk_rows = ROWS * p.merge
        p.chunks = (a.n + p.chunk_rows - 1) // p.chunk_rows

    # What decides about speed: caches and threads.
    if not p.long_runs and elements:
        most = POSITIONS  # or fewer, if L2 can then keep them for all n
        while most > POSITIONS // 2 and a.n * most * bytes_read > l2 // 2:
            most //= 2
        if a.n * most * bytes_read > l2 // 2:
            most = POSITIONS
        p.width = p.c if p.merge > 1 else min(max(most // a.s, 1), p.c)
    segments = (p.c + p.width - 1) // p.width
    p.shared = p.team > 1 and (channel * p.width * p.team > kernels_.l3_size // 2 or segments < 4 * p.team)
    p.unit = p.width
    if not reduces or (not p.long_runs and channel * p.width > l2 // 2):
        p.unit = p.c
        p.shared = p.team > 1
    elif p.shared:
        p.unit = min(max(l2 // 2 * p.team // max(channel * p.width, 1), 1) * p.width, p.c)
    p.far = channel * p.unit > (l2 // 2) * (p.team if p.shared else 1) or not reduces
    p.units = (p.c + p.unit - 1) // p.unit
    if p.team > 1:
        kernels_.region_entered = 1
    return p


cdef inline Py_ssize_t tasks_in(Plan p, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    return p.chunks * ((c1 - c0 + p.width - 1) // p.width)


cdef inline Task task_of(Plan p, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t index) noexcept nogil:
    """Task `index` of the unit of channels [c0, c1), in the order of memory."""
    cdef Task t
    cdef Py_ssize_t segments = (c1 - c0 + p.width - 1) // p.width, n1, rows
    t.chunk = index // (segments * p.per_run) * p.per_run + index % p.per_run
    t.c0 = c0 + index // p.per_run % segments * p.width
    t.c1 = min(t.c0 + p.width, c1)
    t.n0 = t.chunk // p.per_run * p.chunk_rows
    n1 = min(t.n0 + p.chunk_rows, p.n)
    rows = n1 - t.n0
    t.s0 = t.chunk % p.per_run * CHUNK
    t.pitch = p.merge * p.c * p.s
    t.next = 0 if p.shared or p.far or c1 == p.c else p.unit * p.s
    t.rows = (rows + p.merge - 1) // p.merge
    if p.long_runs:
        t.length = t.last = min(p.s - t.s0, CHUNK)
    else:
        t.length = p.merge * (t.c1 - t.c0) * p.s
        t.last = t.length - (t.rows * p.merge - rows) * (t.c1 - t.c0) * p.s
        if t.rows == 1:
            t.length = t.last
    return t


cdef inline Py_ssize_t count_of(Plan p, Py_ssize_t chunk) noexcept nogil:
    """Elements of a channel in a chunk."""
    if p.per_run > 1:
        return min(CHUNK, p.s - chunk % p.per_run * CHUNK)
    return min(p.chunk_rows, p.n - chunk * p.chunk_rows) * p.s


# ---------------------------------------------------------------- reduce

cdef struct Lanes:
    double[16] delta, delta_lo, product, product_lo


cdef void reduce_lanes(const real* x, const real* dy, Py_ssize_t length, Py_ssize_t ahead, double mean, bint statistics,
                       bint both, Lanes* sums) noexcept nogil:
    """Adds a run, a multiple of LANES elements, to the lanes' sums.

    Asks for the x that comes `ahead` elements later, or for `both`.
    """
    cdef double[LANES] delta, delta_lo, product, product_lo  # local arrays, which become registers
    cdef Py_ssize_t i, lane
    cdef double unit = one()
    for lane in range(16):  # literal bounds: with an enum GCC keeps the lanes in memory
        delta[lane] = delta_lo[lane] = product[lane] = product_lo[lane] = 0.0
    for i in range(0, length, 16):
        prefetch_line(x + i + ahead)
        if both:
            prefetch_line(dy + i + ahead)
        for lane in range(16):
            add_term(&delta[lane], &delta_lo[lane], &product[lane], &product_lo[lane], x[i + lane], dy[i + lane], mean,
                     statistics, unit)
    for lane in range(16):
        add_part(&sums.delta[lane], &sums.delta_lo[lane], delta[lane], delta_lo[lane], <real> 0)
        add_part(&sums.product[lane], &sums.product_lo[lane], product[lane], product_lo[lane], <real> 0)


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


cdef void reduce_long(
    const real* x,          # IN
    const real* dy,         # IN
    Task t,
    Py_ssize_t s,
    double mean,
    bint statistics,
    Sums* sums,             # OUT
) noexcept nogil:
    """The sums of a chunk of long runs: LANES accumulators, folded in halves at the end."""
    cdef Lanes lanes
    cdef Py_ssize_t i, _row, near, ahead, wrapped, far = min(AHEAD // <Py_ssize_t> sizeof(real), s)
    cdef Py_ssize_t whole_lanes = t.length - t.length % LANES
    memset(&lanes, 0, sizeof(Lanes))
    for _row in range(t.rows):
        # What is asked for next: x at the same place in the thread's next unit (apply asks for its dy), or else both
        # further on in the same run, and near its end the start of the next one, which is in another page, where the
        # hardware does not look ahead.
        if t.next:
            near = ahead = 0
            wrapped = t.next
        else:
            near = whole_lanes if s - t.s0 - t.length >= far else max(s - t.s0 - far, 0) // LANES * LANES
            ahead, wrapped = far, far + t.pitch - s
        if statistics:
            reduce_lanes(x, dy, near, ahead, mean, True, False, &lanes)
            reduce_lanes(x + near, dy + near, whole_lanes - near, wrapped, mean, True, False, &lanes)
        else:
            reduce_lanes(x, dy, near, ahead, mean, False, t.next == 0, &lanes)
            reduce_lanes(x + near, dy + near, whole_lanes - near, wrapped, mean, False, t.next == 0, &lanes)
        for i in range(whole_lanes, t.length):
            add_term(&lanes.delta[i - whole_lanes], &lanes.delta_lo[i - whole_lanes], &lanes.product[i - whole_lanes],
                     &lanes.product_lo[i - whole_lanes], x[i], dy[i], mean, statistics, 1.0)
        x += t.pitch
        dy += t.pitch
    fold(lanes.delta, lanes.delta_lo, <real> 0)
    fold(lanes.product, lanes.product_lo, <real> 0)
    sums.delta, sums.delta_lo, sums.product, sums.product_lo = (
        lanes.delta[0], lanes.delta_lo[0], lanes.product[0], lanes.product_lo[0])


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
    cdef double d, d_lo, q, q_lo, unit = one()
    cdef Py_ssize_t i, _i, c, first, count, row = 0, position = 0, pitch = t.pitch
    cdef Py_ssize_t channels = t.c1 - t.c0, rows = t.rows - (t.last < t.length)
    while position < t.length:
        for c in range(channels):
            for _i in range(s):
                mean[position] = means[c * stride]
                position += 1
    for i in range(t.length):
        delta[i] = delta_lo[i] = product[i] = product_lo[i] = 0.0
    while row + 4 <= rows:  # four rows at a time, so that the accumulators are loaded and stored less often
        first = 0
        while first < t.length:  # a few cache lines of each row, while the same of the next four are on their way
            count = min(t.length - first, 64)
            for i in range(4, 8):
                prefetch(x + i * pitch + first, 64 * sizeof(real))
                if not statistics:
                    prefetch(dy + i * pitch + first, 64 * sizeof(real))
            for i in range(first, first + count):
                d, d_lo, q, q_lo = delta[i], delta_lo[i], product[i], product_lo[i]
                add_term(&d, &d_lo, &q, &q_lo, x[i], dy[i], mean[i], statistics, unit)
                add_term(&d, &d_lo, &q, &q_lo, x[i + pitch], dy[i + pitch], mean[i], statistics, unit)
                add_term(&d, &d_lo, &q, &q_lo, x[i + 2 * pitch], dy[i + 2 * pitch], mean[i], statistics, unit)
                add_term(&d, &d_lo, &q, &q_lo, x[i + 3 * pitch], dy[i + 3 * pitch], mean[i], statistics, unit)
                delta[i], delta_lo[i], product[i], product_lo[i] = d, d_lo, q, q_lo
            first += count
        x += 4 * pitch
        dy += 4 * pitch
        row += 4
    while row < t.rows:
        for i in range(t.length if row < rows else t.last):
            add_term(&delta[i], &delta_lo[i], &product[i], &product_lo[i], x[i], dy[i], mean[i], statistics, unit)
        x += pitch
        dy += pitch
        row += 1
    memset(sums, 0, channels * sizeof(Sums))
    position = 0
    while position < t.length:
        for c in range(channels):
            sum_positions(delta + position, delta_lo + position, s, &sums[c].delta, &sums[c].delta_lo, <real> 0)
            sum_positions(product + position, product_lo + position, s, &sums[c].product, &sums[c].product_lo, <real> 0)
            position += s


cdef inline void reduce_task(
    const real[:, :, ::1] x,        # IN
    const real[:, :, ::1] dy,       # IN
    const Channel* channels,        # IN  (C)
    double[:, :, ::1] partial,      # OUT (chunks, C, 4), the Sums of each chunk; of statistics, mean and m2
    Plan p,
    Task t,
) noexcept nogil:
    cdef const real* x0 = &x[t.n0, t.c0, t.s0]
    cdef const real* dy0 = &dy[t.n0, t.c0, t.s0]
    cdef Sums* sums = <Sums*> &partial[t.chunk, t.c0, 0]
    cdef double[POSITIONS] shift
    cdef Py_ssize_t c
    cdef bint statistics = p.operator == TRAINING
    if not statistics and p.long_runs:
        reduce_long(x0, dy0, t, p.s, channels[t.c0].mean, False, sums)
    elif not statistics:
        reduce_rows(x0, dy0, t, p.s, &channels[t.c0].mean, sizeof(Channel) // sizeof(double), False, sums)
    else:
        for c in range(t.c1 - t.c0):
            shift[c] = x0[c * p.s]
        if p.long_runs:
            reduce_long(x0, x0, t, p.s, shift[0], True, sums)
        else:
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


# ---------------------------------------------------------------- apply

cdef inline void compute(
    const real* x,          # IN  (count)
    const real* dy,         # IN  (count)
    real* block,            # OUT (count)
    const arith* a,         # IN  the coefficients: (count), or (1)
    const arith* b,
    const arith* c,
    const arith* d,
    Py_ssize_t count,
    bint normalize,
    bint constant,          # the coefficients are (1)
) noexcept nogil:
    cdef Py_ssize_t i, k
    for i in range(count):
        k = 0 if constant else i
        block[i] = <real> value(<arith> x[i], <arith> dy[i], a[k], b[k], c[k], d[k], normalize)


cdef void apply_task(
    const real[:, :, ::1] x,        # IN
    const real[:, :, ::1] dy,       # IN
    const real[:, :, ::1] dx,       # OUT, may be x or dy
    const Channel* channels,        # IN  (C)
    Plan p,
    Task t,
    arith tag,
) noexcept nogil:
    cdef arith[POSITIONS] a, b, c, d
    cdef real[POSITIONS] block
    cdef const real* x0 = &x[t.n0, t.c0, t.s0]
    cdef const real* dy0 = &dy[t.n0, t.c0, t.s0]
    cdef real* dx0 = <real*> &dx[t.n0, t.c0, t.s0]
    cdef Channel ch
    cdef bint normalize = p.operator != BACKPROP
    cdef bint scattered = p.far and not p.long_runs and t.pitch != t.length
    cdef Py_ssize_t row, i, _i, q, count, most, length, position = 0
    # The coefficients of each position of a row; in a long run they are all the same.
    while position < (1 if p.long_runs else t.length):
        for q in range(t.c0, t.c1):
            ch = channels[q]
            for _i in range(1 if p.long_runs else p.s):
                a[position], b[position], c[position], d[position] = ch.a, ch.b, ch.c, ch.d
                position += 1
    for row in range(t.rows):
        length = t.length if row + 1 < t.rows else t.last
        i = 0
        most = BLOCK if p.long_runs else POSITIONS
        count = most - (<uintptr_t> dx0 % 64 // sizeof(real) if p.streams else 0)  # so that blocks end where lines do
        while i < length:
            count = min(length - i, count)
            if scattered:
                prefetch(x0 + t.pitch + i, count * sizeof(real))
                if not normalize:
                    prefetch(dy0 + t.pitch + i, count * sizeof(real))
            if t.next:  # the memory is free for what reduce has not asked for itself
                if not p.long_runs:
                    prefetch(x0 + t.next + i, count * sizeof(real))
                if not normalize:
                    prefetch(dy0 + t.next + i, count * sizeof(real))
            if normalize and p.long_runs:
                compute(x0 + i, dy0 + i, block, a, b, c, d, count, True, True)
            elif normalize:
                compute(x0 + i, dy0 + i, block, a + i, b + i, c + i, d + i, count, True, False)
            elif p.long_runs:
                compute(x0 + i, dy0 + i, block, a, b, c, d, count, False, True)
            else:
                compute(x0 + i, dy0 + i, block, a + i, b + i, c + i, d + i, count, False, False)
            if p.streams:
                stream(dx0 + i, block, count * sizeof(real))
            else:
                memcpy(dx0 + i, block, count * sizeof(real))
            i += count
            count = most
        x0 += t.pitch
        dy0 += t.pitch
        dx0 += t.pitch


cdef void apply_as_needed(const real[:, :, ::1] x, const real[:, :, ::1] dy, const real[:, :, ::1] dx,
                          const Channel* channels, Plan p, Task t) noexcept nogil:
    """A task in the type of the data; if there are channels that need float64, channel by channel."""
    cdef Py_ssize_t c, c0 = t.c0, c1 = t.c1
    cdef bint fits = True
    if real is double:
        apply_task(x, dy, dx, channels, p, t, <double> 0)
    else:
        for c in range(c0, c1):
            fits = fits and channels[c].in_range
        if fits:
            apply_task(x, dy, dx, channels, p, t, <float> 0)
            return
        if not p.long_runs:
            t.length = t.last = p.s
            t.rows = min(p.chunk_rows, p.n - t.n0)
            t.pitch = p.c * p.s
        for c in range(c0, c1):
            t.c0, t.c1 = c, c + 1
            if channels[c].in_range:
                apply_task(x, dy, dx, channels, p, t, <float> 0)
            else:
                apply_task(x, dy, dx, channels, p, t, <double> 0)


# ---------------------------------------------------------------- finish: from sums to outputs and coefficients

cdef inline void set_coefficients(Channel* ch, double a, double b, double c, double d) noexcept nogil:
    ch.a, ch.b, ch.c, ch.d = a, b, c, d
    ch.in_range = in_range(a) and in_range(b) and in_range(c) and in_range(d)


cdef inline void normalize_with(Channel* ch, Twofold mean, double scale, double beta, real tag) noexcept nogil:
    """The mean is subtracted in two steps, so that a float32 difference keeps what the mean has beyond float32."""
    cdef double hi = <real> mean.hi
    set_coefficients(ch, hi, (mean.hi - hi) + mean.lo, scale, beta)


cdef inline Twofold inverse_std(double variance, double epsilon, real tag) noexcept nogil:
    """1 / sqrt(variance + epsilon); for float64 with what it has rounded off."""
    cdef Twofold r
    if real is float:
        r.hi, r.lo = 1.0 / sqrt(variance + epsilon), 0.0
    else:
        r = inverse_square_root(two_sum(variance, epsilon))
    return r


cdef inline double scale_of(double gamma, Twofold inv_std, real tag) noexcept nogil:
    """gamma * inv_std, rounded once."""
    if real is float:
        return gamma * inv_std.hi
    else:
        return times(inv_std, whole(gamma, 0.0)).hi


cdef inline double parameter(const real* vector, Py_ssize_t c, double absent) noexcept nogil:
    return absent if vector is NULL else vector[c]


cdef void finish(
    const bnbp_arguments* a,
    Plan p,
    const double[:, :, ::1] partial,    # IN  (chunks, C, 4)
    Channel* channels,                  # IN OUT (C)
    Py_ssize_t c,
    real tag,
) noexcept nogil:
    """One channel: combine the chunks in their order, write its outputs, and prepare `apply`."""
    cdef const Sums* chunk
    cdef Channel* ch = &channels[c]
    cdef Sums sums
    cdef Twofold mean, step, delta, product, inv_std
    cdef double m = <double> p.n * p.s, count = 0, more, between, scale
    cdef double gamma = parameter(<const real*> a.gamma, c, 1.0), beta = parameter(<const real*> a.beta, c, 0.0)
    cdef Py_ssize_t k
    memset(&sums, 0, sizeof(Sums))
    if p.operator == TRAINING:
        # Chan, Golub and LeVeque: means move towards each other, and the squares grow by what lay between them.
        for k in range(p.chunks):
            chunk = <const Sums*> &partial[k, c, 0]
            more = count_of(p, k)
            if k == 0:
                sums.delta, sums.delta_lo = chunk.delta, chunk.delta_lo
            step = two_sum(chunk.delta, -sums.delta)
            between = step.hi + (step.lo + (chunk.delta_lo - sums.delta_lo))
            add_sums(&sums, between * (more / (count + more)), 0.0, chunk.product, chunk.product_lo, <double> 0)
            add(&sums.product, &sums.product_lo, between * between * (more / (count + more)) * count, 0.0)
            count += more
        mean = whole(sums.delta, sums.delta_lo)
        product = whole(max(sums.product + sums.product_lo, 0.0) / count, 0.0)
        if count == 0:
            mean.hi = product.hi = NAN  # the mean of nothing
        if a.batch_mean is not NULL:
            (<real*> a.batch_mean)[c] = <real> mean.hi
        if a.batch_variance is not NULL:
            (<real*> a.batch_variance)[c] = <real> product.hi
        scale = scale_of(gamma, inverse_std(product.hi, a.epsilon, tag), tag)
        normalize_with(ch, mean, scale, beta, tag)
        return

    for k in range(p.chunks if p.reduces else 0):
        chunk = <const Sums*> &partial[k, c, 0]
        add_sums(&sums, chunk.delta, chunk.delta_lo, chunk.product, chunk.product_lo, <double> 0)
    delta, product = whole(sums.delta, sums.delta_lo), whole(sums.product, sums.product_lo)
    inv_std = inverse_std((<const real*> a.variance)[c], a.epsilon, tag)
    scale = scale_of(gamma, inv_std, tag)
    if m:  # without elements the sums are 0 even where inv_std is infinite
        product = times(product, inv_std)
    if a.gamma_delta is not NULL:
        (<real*> a.gamma_delta)[c] = <real> product.hi
    if a.beta_delta is not NULL:
        (<real*> a.beta_delta)[c] = <real> delta.hi

    mean.hi, mean.lo = ch.mean, 0.0
    if p.operator == BACKPROP:
        set_coefficients(ch, over(delta, m).hi, ch.mean, over(times(product, inv_std), m).hi, scale)
    elif p.operator == INFERENCE:
        normalize_with(ch, mean, scale, beta, tag)
    else:  # dx = (dy - 0) scale + -0: adding -0 changes no number, not even the sign of a zero
        set_coefficients(ch, 0.0, 0.0, scale, -0.0)


# ---------------------------------------------------------------- the schedule

cdef void reduce_share(const real[:, :, ::1] x, const real[:, :, ::1] dy, Channel* channels, double[:, :, ::1] partial,
                       Plan p, Py_ssize_t unit, int thread, int team) noexcept nogil:
    """What `thread` reduces of a unit."""
    cdef Py_ssize_t c0 = unit * p.unit, c1 = min(c0 + p.unit, p.c), tasks = tasks_in(p, c0, c1), index
    for index in range(tasks * thread // team, tasks * (thread + 1) // team):
        reduce_task(x, dy, channels, partial, p, task_of(p, c0, c1, index))


cdef void finish_share(const bnbp_arguments* a, Channel* channels, const double[:, :, ::1] partial, Plan p,
                       Py_ssize_t unit, int thread, int team, real tag) noexcept nogil:
    cdef Py_ssize_t c0 = unit * p.unit, c1 = min(c0 + p.unit, p.c), c
    for c in range(c0 + (c1 - c0) * thread // team, c0 + (c1 - c0) * (thread + 1) // team):
        finish(a, p, partial, channels, c, tag)


cdef void apply_share(const real[:, :, ::1] x, const real[:, :, ::1] dy, const real[:, :, ::1] dx, Channel* channels,
                      Plan p, Py_ssize_t unit, int thread, int team) noexcept nogil:
    """What `thread` applies to: the tasks that it has reduced, the last one first."""
    cdef Py_ssize_t c0 = unit * p.unit, c1 = min(c0 + p.unit, p.c), tasks = tasks_in(p, c0, c1)
    cdef Py_ssize_t first = tasks * thread // team, index = tasks * (thread + 1) // team
    cdef Py_ssize_t k
    for k in range(first, index):
        apply_as_needed(x, dy, dx, channels, p, task_of(p, c0, c1, k if p.unit == p.c else first + index - 1 - k))


cdef bnbp_status run(const bnbp_arguments* a, Operator operator, const real* input, real* output) noexcept nogil:
    cdef const real[:, :, ::1] x = None, dy = None, dx = None
    cdef double[:, :, ::1] partial = None
    cdef bint reduces = operator == TRAINING or (
        operator != INFERENCE and (a.gamma_delta is not NULL or a.beta_delta is not NULL or operator == BACKPROP))
    cdef bint in_place = output is input or output is a.normalized_delta
    cdef bint single = operator == BACKPROP and a.n * a.s == 1
    cdef Plan p = plan_of(a, operator, reduces, output is not NULL and not single, in_place)
    cdef void* workspace = malloc((p.chunks if reduces else 0) * p.c * sizeof(Sums) + p.c * sizeof(Channel))
    cdef Channel* channels = <Channel*> workspace
    cdef const real* second = <const real*> a.normalized_delta
    cdef Py_ssize_t unit = 0, c
    cdef int thread, team = p.team
    if workspace is NULL:
        return BNBP_NO_MEMORY
    VIEW(x, input, p.n, p.c, p.s, sizeof(real))
    VIEW(dy, input if second is NULL else second, p.n, p.c, p.s, sizeof(real))
    VIEW(dx, output, p.n, p.c, p.s, sizeof(real))
    VIEW(partial, channels + p.c, p.chunks, p.c, 4, sizeof(double))
    if operator != TRAINING:
        for c in range(p.c):
            channels[c].mean = (<const real*> a.mean)[c]

    if p.shared:
        with parallel(num_threads=team):
            for unit in range(p.units):
                if p.reduces:
                    for thread in prange(team, schedule="static", chunksize=1):
                        reduce_share(x, dy, channels, partial, p, unit, thread, team)
                    barrier()
                for thread in prange(team, schedule="static", chunksize=1):
                    finish_share(a, channels, partial, p, unit, thread, team, <real> 0)
                barrier()
                if p.applies:
                    for thread in prange(team, schedule="static", chunksize=1):
                        apply_share(dy if operator == INFERENCE_BACKPROP else x, dy, dx, channels, p, unit, thread,
                                    team)
            stream_fence()
    elif team > 1:
        for thread in prange(team, num_threads=team, schedule="static", chunksize=1):
            run_units(a, x, dy, dx, channels, partial, p, thread, team)
    else:
        run_units(a, x, dy, dx, channels, partial, p, 0, 1)

    if single and output is not NULL:  # the normalised value of a single element is beta, whatever it is
        memset(output, 0, p.c * sizeof(real))
    free(workspace)
    return BNBP_OK


cdef void run_units(const bnbp_arguments* a, const real[:, :, ::1] x, const real[:, :, ::1] dy,
                    const real[:, :, ::1] dx, Channel* channels, double[:, :, ::1] partial, Plan p, int thread,
                    int team) noexcept nogil:
    """The units of one thread, from start to end."""
    cdef Py_ssize_t unit
    for unit in range(p.units * thread // team, p.units * (thread + 1) // team):
        if p.reduces:
            reduce_share(x, dy, channels, partial, p, unit, 0, 1)
        finish_share(a, channels, partial, p, unit, 0, 1, <real> 0)
        if p.applies:
            apply_share(dy if p.operator == INFERENCE_BACKPROP else x, dy, dx, channels, p, unit, 0, 1)
    stream_fence()


# ---------------------------------------------------------------- the table

cdef bnbp_status run_typed(const bnbp_arguments* a, Operator operator, void* output) noexcept nogil:
    if a.type == BNBP_F32:
        return run(a, operator, <const float*> a.input, <float*> output)
    return run(a, operator, <const double*> a.input, <double*> output)


cdef bnbp_status training(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, TRAINING, a.normalized)


cdef bnbp_status training_backprop(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, BACKPROP, a.input_delta)


cdef bnbp_status inference(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, INFERENCE, a.normalized)


cdef bnbp_status inference_backprop(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, INFERENCE_BACKPROP, a.input_delta)


cdef bnbp_kernels kernels_
kernels_.abi = BNBP_KERNELS_ABI
kernels_.isa = BNBP_ISA
kernels_.openmp = BNBP_OPENMP
kernels_.l2_size = 1 << 20
kernels_.l3_size = 16 << 20
kernels_.default_num_threads = 1
kernels_.region_entered = kernels_.serial = 0
kernels_.training = training
kernels_.training_backprop = training_backprop
kernels_.inference = inference
kernels_.inference_backprop = inference_backprop

kernels = PyCapsule_New(&kernels_, BNBP_KERNELS_CAPSULE, NULL)
