"""The kernels: `reduce` and `apply` over (N, C, S) memoryviews, and the operators made of them.

a. The view. A dense tensor whose channels are on axis k of its memory *is* an array of shape (N, C, S): N the product
   of the axes before k, S of those after it. NCHW has S = H*W; channels-last has S = 1. A channel's m = N*S elements
   are N contiguous runs of S. All kernels work on `const real[:, :, ::1]`. Tensors of any other layout are gathered a
   *tile* at a time, a chunk of some channels that fits L2, which is then a small batch of its own; see i.

b. Two passes. `reduce` reads the tensors and leaves sums for each channel; `apply` reads them again and writes the
   result, knowing the sums. Between them stands `finish`: a few operations for each channel.

       reduce   delta_sum          = sum dy_i                     beta_delta
                delta_centered_sum = sum dy_i (x_i - mean)        gamma_delta / inv_std
       apply    dx_i = gamma inv_std (dy_i - delta_sum/m - (x_i - mean) inv_std^2 delta_centered_sum/m)

   The forward operator is made of the same two: it reduces x - shift in the place of dy, and applies
   y_i = (x_i - mean) gamma inv_std + beta. Whoever has the tensors in parts takes the sums out after `reduce`, and
   gives those of the whole to `apply`.

c. Chunks. A channel is cut into chunks, whose sums are written to their own places and combined in the order of the
   chunks. The cut depends on N, C and S alone, so the bits of the result do not depend on the number of threads.

d. Runs and rows. A run (S >= RUN) is summed in LANES accumulators, one for each place modulo LANES. Shorter runs would
   end before that has begun: there the elements of a row, that is of neighbouring channels for one n, or of some whole
   rows of few channels, each have an accumulator of their own, which goes down the rows of the chunk. In both the order
   of the sum is part of the algorithm, not of the instruction set. GCC makes vector code of the inner loops, at any
   width, and keeps in registers the small arrays that start and end in a function.

e. Arithmetic. Sums are in float64, whatever `real` is. For float32 that is 29 bits more than the data has: the product
   of two is exact. Eight numbers at a time are added up for themselves, and these sums, no more than MOST / 8 of them,
   to the accumulator; so a chunk's sum is off by at most 256 times 2^-53 of the sum of the magnitudes, which is half a
   unit in the last place of float32 at a condition number of 2^20. For float64 there is nothing to spare, and the sums
   carry what each operation has rounded off (Ogita, Rump and Oishi, "Accurate sum and dot product", 2005): of the
   difference x_i - mean, of the product, and of the sum. The numbers of a channel are computed once, so they afford
   that too. `apply` is in the type of the data, and the mean is subtracted first: a*dy + b*x + c with precomputed a, b,
   c would be cheaper and lose everything to cancellation when the mean is far from 0. Only a channel whose coefficients
   are out of float32's range is computed in float64.

   16-bit numbers are float32 in `apply`, and the result is rounded once. Their sums are those of float32. Of float16,
   the products are exact even with a difference: `center` takes the place of the mean, a multiple of 2^-24 as x_i is,
   so that x_i - center has 42 bits, and dy_i 11. Then one instruction that multiplies and adds gives the bits of two.
   The rest, (center - mean) sum dy_i, is added in `finish`; it cancels nothing, because x_i - center is 0 or at least
   twice as large as center - mean.

f. Statistics. The sums of d = x - shift and of d^2 about the chunk's first element as the shift give the chunk's mean
   and its sum of squared deviations, m2 = sum d^2 - (sum d)^2 / n, in one read. That cancels no more than a factor of n
   + 1, because the shift is one of the n elements and so within sqrt(n) standard deviations of their mean; chunks of
   2^16 elements at most have that to spare, in float64 sums for float32, in twofold sums for float64. A constant chunk
   has d = 0. The chunks are merged as in Chan, Golub and LeVeque (1983).

g. The schedule. What the second pass reads, the first should have left in L2. So the work goes by *units*, a few
   neighbouring channels, and a `sweep` applies to one unit while it reduces the next, block by block: the memory then
   reads and writes at the same time, as the floor does. Where L2 holds them, each thread has units of its own and waits
   for nobody; a larger unit is worked on by all threads together, each on its own chunks, with a barrier between the
   sweeps. A unit too large for all L2 caches together is reduced first and then applied to, the last chunk first. Short
   runs have no sweep: they are reduced and then applied to, unit by unit, and where a row holds all channels
   (channels-last) there is one unit, everything.

   Results that do not fit L2 are streamed past the caches. That wants whole cache lines. A line that was written in two
   parts would be read from memory, and every write after it would wait: at 28 x 28, where NumPy's arrays begin in the
   middle of a line, that cost a quarter of the time. So a line that two channels share is computed with the
   coefficients of both, and one that two units or tasks share is left to the second.

h. Borrowed views. The kernels are called through a C table with plain pointers and without the GIL, so the views have
   no Python object behind them: `VIEW` fills in address, shape and strides of a view that is None. With
   `initializedcheck` off nothing ever looks at the object.

i. Tiles. Where a tensor is not dense in the order of the input's memory, a task gathers its chunk of all of them,
   runs the same kernels on the copies, and scatters the result. Chunks and their order are those of dense tensors, and
   so are the bits. Nothing is streamed, and both passes gather; nothing is ever copied as a whole.
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport NAN, fabs, sqrt
from libc.stdlib cimport free, malloc
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from bnbp.kernels cimport (
    BNBP_F16,
    BNBP_F32,
    BNBP_F64,
    BNBP_INTERRUPTED,
    BNBP_KERNELS_ABI,
    BNBP_KERNELS_CAPSULE,
    BNBP_NO_MEMORY,
    BNBP_OK,
    bnbp_arguments,
    bnbp_kernels,
    bnbp_status,
    bnbp_type,
)

cdef extern from "_machine.h" nogil:
    ctypedef short float16
    ctypedef unsigned short bfloat16
    ctypedef struct wide_block:
        float[256] at

ctypedef fused real:   # the type of the tensors
    float16
    bfloat16
    float
    double

ctypedef fused arith:  # the type that `apply` computes in
    float
    double

cdef extern from "_machine.h" nogil:
    void VIEW(const float16[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const bfloat16[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const float[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const double[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void barrier()
    int team_size()
    int thread_number()
    int openmp_threads()
    bint flag_is_up(const int* flag)
    void raise_flag(int* flag)
    void prefetch(const void* address, size_t size)
    void widen(double* to, const float16* source)
    void widen(double* to, const bfloat16* source)
    void widen(double* to, const float* source)
    void widen_any(double* to, const float16* source)
    void widen_any(double* to, const bfloat16* source)
    void widen_any(double* to, const float* source)
    void widen_any(float* to, const float16* source)
    void widen_any(float* to, const bfloat16* source)
    const int BNBP_WIDENS_AT_ONCE
    void widen(float* to, const float16* source)
    void widen(float* to, const bfloat16* source)
    void widen_line(float* to, const float16* source)
    void widen_line(float* to, const bfloat16* source)
    void narrow_line(float16* to, const float* source)
    void narrow_line(bfloat16* to, const float* source)
    void narrow(float16* to, const float* source)
    void narrow(bfloat16* to, const float* source)
    void narrow(float16* to, const double* source)
    void narrow(bfloat16* to, const double* source)
    void stream_half_line(void* to, const void* source)
    void stream_line(void* to, const void* source)
    void stream_fence()
    double product_error(double a, double b, double p)
    double plus_exact_product(double a, double b, double c)
    double one()
    double plus(double a, double b, double one)
    double minus(double a, double b, double one)
    const int BNBP_OPENMP
    const char* BNBP_ISA

# The reasons are times measured on two cores of an Intel Xeon (Sapphire Rapids or later, L2 2 MiB), x86-64-v4, float32.
cdef enum:
    # Elements from which a run is summed in lanes. 7 x 7 planes take 0.29 ns an element so and 0.46 by rows, 4 x 4 0.57
    # and 0.31.
    RUN = 32
    # Elements of a channel that are summed together: 5 % faster than 4096, and 16384 leave too few for a team.
    CHUNK = 8192
    # Accumulators of a run: 4 registers of 512 bits or 8 of 256 for both sums; twice as many AVX2 does not have.
    LANES = 16
    # Channels of a unit; the lanes of these are 16 KiB.
    WIDTH = 32
    # Elements of a unit's row, at least, where L2 allows it: less would be read in bits and pieces.
    SEGMENT = 512
    # Elements that are applied to, or reduced, at a time. 64 are slower, 512 read and write less at the same time:
    # 256 x 56 x 56 takes 9.0 ms instead of 8.6.
    BLOCK = 128
    # Positions of a row that are taken together: the accumulators are in L1, with room for the data. 1024 are 10 %
    # slower.
    SPAN = 512
    # Positions of a row that has all channels, at most: 2048 channels in four parts take 1.53 ms, in one 1.41.
    POSITIONS = 2048
    # Rows whose sums stay in registers before they go back to the accumulators. 4 and 16 are 5 to 10 % slower.
    GROUP = 8
    # Rows in a chunk of short runs, at least: 64 cost 10 % for their sums.
    ROWS = 128
    # Chunks of short runs, about, where there are more rows than that: those of 128 rows took as long to combine as to
    # read, for 25088 rows of 512 channels.
    CHUNKS = 64
    # Rows in a chunk of short runs, at most.
    MOST = 1920
    # Bytes asked for ahead, line by line, into L1: 64 x 112 x 112 reduce in 5.2 ms instead of 7.6 for it, and into L2
    # only, 256 x 56 x 56 take 9.6 ms instead of 9.0. 2048 and 8192 are as good. Asking only where a page begins, or for
    # every other line, and leaving the rest to the hardware, costs 10 and 30 %.
    AHEAD = 4096
    # Elements below which a team is not worth starting. 16384 take 9 us on one core and 11 on two, 32768 15 and 15,
    # 65536 29 and 20.
    REGION = 32768
    # More threads than this were asked for by mistake. Where the system refuses one, GNU OpenMP ends the process.
    MAX_TEAM = 256
    # Elements that the calling thread goes through before it asks whether to end the call: 20 to 100 ms. To ask takes
    # the GIL, for which it may wait 5 ms.
    PATIENCE = 1 << 26


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


cdef inline void add_term(double* delta, double* delta_lo, double* product, double* product_lo, double x, double dy,
                          double mean, bint statistics, bint exact, double unit, real tag) noexcept nogil:
    """Adds an element to the sums. For statistics the deviation x - mean takes the place of dy.

    `exact` says that no product rounds, see e.
    """
    cdef Twofold centered, square
    cdef double d, d_lo = 0.0
    if real is double:
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
    else:
        centered.hi = x - mean
        d = centered.hi if statistics else dy
        delta[0] += d
        product[0] = plus_exact_product(d, centered.hi, product[0]) if exact else product[0] + d * centered.hi


cdef inline void add_part(double* hi, double* lo, double part, double part_lo, real tag) noexcept nogil:
    """Adds a part of a sum: but for float64, plain float64 is enough, see e."""
    if real is double:
        add(hi, lo, part, part_lo)
    else:
        hi[0] += part


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
    bint runs              # S is long enough for lanes
    Py_ssize_t merge       # rows of (C, S) that are taken as one, where they are very short
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
    bint far               # the data is asked for ahead, which is 10 % faster even out of L2
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
    cdef Py_ssize_t bytes_read = size * (1 if operator == TRAINING else 2)
    cdef Py_ssize_t l2 = kernels_.l2_size, elements = a.n * a.c * a.s, group, most
    p.operator = operator
    p.n, p.c, p.s = a.n, a.c, a.s
    p.reduces, p.applies = reduces, applies
    p.streams = elements * size >= l2 and not in_place
    p.team = 1
    if elements >= REGION and not kernels_.serial:
        p.team = min(a.num_threads if a.num_threads > 0 else default_team(), MAX_TEAM)
    p.runs = a.s >= RUN
    p.far = True
    p.merge = p.per_run = p.width = p.length = 1
    p.chunks = p.chunk_rows = 0
    p.shared = p.fused = False
    p.tiled = elements and a.lengths is not NULL
    p.scratch = 0

    # What decides about bits: a function of the shape alone.
    if elements and p.runs:
        p.per_run = (a.s + CHUNK - 1) // CHUNK
        p.length = ((a.s + p.per_run - 1) // p.per_run + LANES - 1) // LANES * LANES
        p.per_run = (a.s + p.length - 1) // p.length
        p.chunk_rows = max(CHUNK // a.s, 1)
        p.chunks = (a.n + p.chunk_rows - 1) // p.chunk_rows * p.per_run
    elif elements:
        if a.c * a.s <= SPAN // 2:
            p.merge = SPAN // (a.c * a.s)
            if p.merge > LANES:
                p.merge -= p.merge % LANES  # whole lanes
        p.chunks = min(max(a.n // (ROWS * p.merge), 1), CHUNKS)
        most = min(MOST * p.merge, (1 << 16) // a.s)  # see e and f
        if p.merge > 1:
            most = min(most, (1 << 18) // (a.c * a.s))  # a tile has all channels, and should not be much larger than L2
        p.chunks = max(p.chunks, (a.n + most - 1) // most)
        if p.chunks > 4:
            p.chunks += (4 - p.chunks % 4) % 4  # shared out evenly among a few threads
        group = GROUP * p.merge
        p.chunk_rows = ((a.n + p.chunks - 1) // p.chunks + group - 1) // group * group
        p.chunks = (a.n + p.chunk_rows - 1) // p.chunk_rows

    # What decides about speed: caches and threads.
    p.unit = p.c
    if p.tiled:
        plan_tiles(&p, size)
    elif elements and p.runs:
        plan_runs(&p, a.n * a.s * bytes_read, 64 // size)
    elif elements:
        plan_rows(&p, a.n * a.s * bytes_read)
    p.units = (p.c + p.unit - 1) // p.unit
    p.private = p.shared and p.runs and p.reduces
    return p


cdef inline void plan_runs(Plan* p, Py_ssize_t channel, Py_ssize_t line) noexcept nogil:
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


cdef inline void plan_rows(Plan* p, Py_ssize_t channel) noexcept nogil:
    """Tasks and units of channels with short runs; `channel` is the bytes that one of them is read from."""
    cdef Py_ssize_t l2 = kernels_.l2_size
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
    cdef Py_ssize_t channel = 2 * size * min(p.chunk_rows, p.n) * length
    if p.merge > 1:  # rows of all channels
        p.width = p.c
    else:
        p.width = min(max(kernels_.l2_size // 2 // channel, 1), WIDTH if p.runs else SPAN // p.s, p.c)
    p.scratch = (p.width * channel + 127) // 64 * 64
    p.shared = p.team > 1


cdef inline Task task_of(const Plan* p, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t index) noexcept nogil:
    """Task `index` of short runs in the unit of channels [c0, c1), in the order of memory."""
    cdef Task t
    cdef Py_ssize_t segments = (c1 - c0 + p.width - 1) // p.width, rows
    t.chunk = index // segments
    t.c0 = c0 + index % segments * p.width
    t.c1 = min(t.c0 + p.width, c1)
    t.n0 = t.chunk * p.chunk_rows
    rows = min(p.chunk_rows, p.n - t.n0)
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
    return min(p.chunk_rows, p.n - chunk * p.chunk_rows) * p.s


# ---------------------------------------------------------------- reduce

cdef struct Lanes:         # the sums of a channel's runs: lane i % LANES has those of element i of each
    double[16] delta, product, delta_lo, product_lo


cdef inline void add_lanes(const real* x, const real* dy, const double* mean, Py_ssize_t each, double* delta,
                           double* delta_lo, double* product, double* product_lo, bint statistics, bint exact,
                           double unit) noexcept nogil:
    """Adds LANES elements side by side to their sums; `each` has its own mean (1), or all the same (0)."""
    cdef double[LANES] xs, dys
    cdef Py_ssize_t lane
    if real is double:
        for lane in range(16):  # literal bounds: with an enum GCC keeps the lanes in memory
            add_term(&delta[lane], &delta_lo[lane], &product[lane], &product_lo[lane], x[lane], dy[lane],
                     mean[lane * each], statistics, exact, unit, <real> 0)
    else:
        if each:
            widen(xs, x)
            widen(dys, x if statistics else dy)
        else:
            widen_any(xs, x)
            widen_any(dys, x if statistics else dy)
        for lane in range(16):
            add_term(&delta[lane], &delta_lo[lane], &product[lane], &product_lo[lane], xs[lane], dys[lane],
                     mean[lane * each], statistics, exact, unit, <real> 0)


cdef inline void look_ahead(const real* x, const real* dy, Py_ssize_t ahead, bint both) noexcept nogil:
    """Asks for the LANES elements that come `ahead` elements later, if that is not 0."""
    if ahead:
        prefetch(x + ahead, LANES * sizeof(real))
        if both:
            prefetch(dy + ahead, LANES * sizeof(real))


cdef inline void reduce_lanes(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, double mean,
                              bint statistics, bint exact, bint pairs, Lanes* sums) noexcept nogil:
    """`pairs`: the lanes of even places come before those of odd ones."""
    cdef double[LANES] delta, delta_lo, product, product_lo  # local arrays, which become registers
    cdef Py_ssize_t i, lane, whole_lanes = count - count % LANES
    cdef double unit = one()
    for lane in range(16):
        delta[lane] = delta_lo[lane] = product[lane] = product_lo[lane] = 0.0
    for i in range(0, whole_lanes, 16):
        look_ahead(x + i, dy + i, ahead, not statistics)
        add_lanes(x + i, dy + i, &mean, 0, delta, delta_lo, product, product_lo, statistics, exact, unit)
    for lane in range(16):
        add_part(&sums.delta[lane], &sums.delta_lo[lane], delta[lane], delta_lo[lane], <real> 0)
        add_part(&sums.product[lane], &sums.product_lo[lane], product[lane], product_lo[lane], <real> 0)
    for i in range(whole_lanes, count):
        lane = i - whole_lanes
        if pairs:
            lane = lane % 2 * 8 + lane // 2
        add_term(&sums.delta[lane], &sums.delta_lo[lane], &sums.product[lane], &sums.product_lo[lane], x[i], dy[i],
                 mean, statistics, exact, 1.0, <real> 0)


cdef inline void widen_block(float* to, const real* source, Py_ssize_t count, Py_ssize_t ahead) noexcept nogil:
    """16-bit numbers as float32; asks for what comes `ahead` elements later, unless that is 0."""
    cdef Py_ssize_t i, whole_lanes = count - count % LANES
    if real is float16 or real is bfloat16:
        if ahead:
            prefetch(source + ahead, count * sizeof(real))
        for i in range(0, whole_lanes, 16):
            widen_any(to + i, source + i)
        for i in range(whole_lanes, count):
            to[i] = source[i]


cdef void reduce_block(const real* x, const real* dy, Py_ssize_t count, Py_ssize_t ahead, double mean, bint statistics,
                       Lanes* sums) noexcept nogil:
    """Adds a block of a run, or less, to the lanes' sums, and asks for what comes `ahead` elements later."""
    cdef wide_block xs, dys
    cdef bint pairs = real is bfloat16
    if sizeof(real) > 2 or BNBP_WIDENS_AT_ONCE:
        if statistics:
            reduce_lanes(x, x, count, ahead, mean, True, False, pairs, sums)
        else:
            reduce_lanes(x, dy, count, ahead, mean, False, real is float16, pairs, sums)
    else:
        widen_block(xs.at, x, count, ahead)
        if statistics:
            reduce_lanes(<const float*> xs.at, <const float*> xs.at, count, 0, mean, True, False, pairs, sums)
        else:
            widen_block(dys.at, dy, count, ahead)
            reduce_lanes(<const float*> xs.at, <const float*> dys.at, count, 0, mean, False, real is float16, pairs,
                         sums)


cdef inline double center(double mean, real tag) noexcept nogil:
    """What `reduce` subtracts in the place of the mean, so that products of float16 are exact, see e."""
    if real is float16:
        if fabs(mean) < 131072.0:
            mean = (mean + 402653184.0) - 402653184.0  # 1.5 * 2^28: to a multiple of 2^-24
        elif mean - mean == 0:
            mean = 0.0
    return mean


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


cdef inline void widen_in_order(float* to, const real* source) noexcept nogil:
    if real is float16 or real is bfloat16:
        widen(to, source)


cdef inline void reduce_columns(
    const real* x,          # IN  (rows, count), with a pitch
    const real* dy,         # IN
    Py_ssize_t rows, Py_ssize_t pitch, Py_ssize_t count, Py_ssize_t ahead,
    const double* mean,     # IN  (count)
    double* delta,          # IN OUT (count), the accumulators
    double* delta_lo,
    double* product,
    double* product_lo,
    bint statistics,
) noexcept nogil:
    """Adds a few rows to the accumulators of their positions, and asks for what comes `ahead` elements later.

    LANES positions at a time, whose accumulators are in registers on their way down the rows.
    """
    cdef double[LANES] d, d_lo, q, q_lo, means  # local arrays, which become registers
    cdef wide_block xs, dys
    cdef Py_ssize_t i, at, row, lane, whole_lanes = count - count % LANES
    cdef double unit = one()
    for i in range(0, whole_lanes, 16):
        if sizeof(real) == 2 and not BNBP_WIDENS_AT_ONCE:
            for row in range(rows):
                at = row * pitch + i
                look_ahead(x + at, dy + at, ahead, not statistics)
                widen_in_order(xs.at + row * 16, x + at)
                if not statistics:
                    widen_in_order(dys.at + row * 16, dy + at)
        for lane in range(16):
            means[lane] = mean[i + lane]
            d[lane] = d_lo[lane] = q[lane] = q_lo[lane] = 0.0
        for row in range(rows):
            if sizeof(real) == 2 and not BNBP_WIDENS_AT_ONCE:
                add_lanes(<const float*> xs.at + row * 16, <const float*> dys.at + row * 16, means, 1, d, d_lo, q,
                          q_lo, statistics, real is float16 and not statistics, unit)
            else:
                at = row * pitch + i
                look_ahead(x + at, dy + at, ahead, not statistics)
                add_lanes(x + at, dy + at, means, 1, d, d_lo, q, q_lo, statistics,
                          real is float16 and not statistics, unit)
        for lane in range(16):
            add_part(&delta[i + lane], &delta_lo[i + lane], d[lane], d_lo[lane], <real> 0)
            add_part(&product[i + lane], &product_lo[i + lane], q[lane], q_lo[lane], <real> 0)
    for i in range(whole_lanes, count):  # in the same order
        d[0] = d_lo[0] = q[0] = q_lo[0] = 0.0
        for row in range(rows):
            at = row * pitch + i
            add_term(d, d_lo, q, q_lo, x[at], dy[at], mean[i], statistics, real is float16 and not statistics, unit,
                     <real> 0)
        add_part(&delta[i], &delta_lo[i], d[0], d_lo[0], <real> 0)
        add_part(&product[i], &product_lo[i], q[0], q_lo[0], <real> 0)


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
    cdef Py_ssize_t i, _i, c, count, length, row = 0, position = 0
    cdef Py_ssize_t channels = t.c1 - t.c0, rows = t.rows - (t.last < t.length)
    while position < t.length:
        for c in range(channels):
            for _i in range(s):
                mean[position] = means[c * stride] if statistics else center(means[c * stride], <real> 0)
                position += 1
    for i in range(t.length):
        delta[i] = product[i] = 0.0
        if real is double:
            delta_lo[i] = product_lo[i] = 0.0
    while row < t.rows:
        count, length = 1, t.last
        if row < rows:
            count, length = min(rows - row, GROUP), t.length
        if statistics:
            reduce_columns(x, x, count, t.pitch, length, count * t.pitch, mean, delta, delta_lo, product, product_lo,
                           True)
        else:
            reduce_columns(x, dy, count, t.pitch, length, count * t.pitch, mean, delta, delta_lo, product, product_lo,
                           False)
        x += count * t.pitch
        dy += count * t.pitch
        row += count
    if t.length == channels:
        for c in range(channels):
            sums[c].delta, sums[c].product = delta[c], product[c]
            sums[c].delta_lo = delta_lo[c] if real is double else 0.0
            sums[c].product_lo = product_lo[c] if real is double else 0.0
        return
    memset(sums, 0, channels * sizeof(Sums))
    position = 0
    while position < t.length:
        for c in range(channels):
            sum_positions(delta + position, delta_lo + position, s, &sums[c].delta, &sums[c].delta_lo, <real> 0)
            sum_positions(product + position, product_lo + position, s, &sums[c].product, &sums[c].product_lo, <real> 0)
            position += s


cdef void reduce_task(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const Channel* channels,        # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, C, 4), the Sums of each chunk; of statistics, mean and m2
    const Plan* p,
    Task t,
) noexcept nogil:
    cdef const real* x0 = &x[t.n0, t.c0, 0]
    cdef const real* dy0 = &dy[t.n0, t.c0, 0]
    cdef Sums* sums = <Sums*> &partial[t.chunk, t.c0, 0]
    cdef double[POSITIONS] shift
    cdef Py_ssize_t c
    if p.operator != TRAINING:
        reduce_rows(x0, dy0, t, p.s, &channels[t.c0].mean, sizeof(Channel) // sizeof(double), False, sums)
        return
    for c in range(t.c1 - t.c0):
        shift[c] = x0[c * p.s]
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


# ---------------------------------------------------------------- sweep: long runs, both passes at once

cdef void sweep(
    const real[:, :, ::1]& x,       # IN
    const real[:, :, ::1]& dy,      # IN
    const real[:, :, ::1]& dx,      # OUT, may be x or dy
    const Channel* channels,        # IN  (C)
    double[:, :, ::1]& partial,     # OUT (chunks, C, 4), the Sums of each chunk; of statistics, mean and m2
    const Plan* p,
    Py_ssize_t chunk,
    Py_ssize_t a0, Py_ssize_t a1,   # the channels that it applies to
    Py_ssize_t r0, Py_ssize_t r1,   # the channels that it reduces
    bint follows, bint followed,    # whether the line that two units share goes with the second, at either end
) noexcept nogil:
    """A chunk of long runs: applies to one unit while it reduces another, block by block."""
    cdef Lanes[WIDTH] lanes
    cdef double[WIDTH] shift
    cdef bint statistics = p.operator == TRAINING, normalize = p.operator != BACKPROP
    cdef bint from_dy = p.operator == INFERENCE_BACKPROP
    cdef Py_ssize_t n0 = chunk // p.per_run * p.chunk_rows, s0 = chunk % p.per_run * p.length
    cdef Py_ssize_t length = min(p.s - s0, p.length), pitch = p.c * p.s, segment = (r1 - r0) * p.s
    cdef Py_ssize_t n, q, i, count, first, last, stop, ahead, near, block = block_of(<real> 0)
    cdef Py_ssize_t far = AHEAD // <Py_ssize_t> sizeof(real) if p.far else 0
    cdef Cursor cursor
    cdef const real* ax
    cdef const real* ady
    cdef const real* rx
    cdef const real* rdy
    cdef real* to
    cdef Sums* sums
    if r0 < r1:
        memset(lanes, 0, (r1 - r0) * sizeof(Lanes))
    for q in range(r1 - r0):
        shift[q] = x[n0, r0 + q, s0] if statistics else center(channels[r0 + q].mean, <real> 0)
    for n in range(n0, min(n0 + p.chunk_rows, p.n)):
        rx = &x[n, 0, 0] + r0 * p.s + s0
        rdy = &dy[n, 0, 0] + r0 * p.s + s0
        ady = &dy[n, 0, 0] + a0 * p.s
        ax = ady if from_dy else &x[n, 0, 0] + a0 * p.s
        to = <real*> &dx[n, 0, 0] + a0 * p.s
        # What it applies to, in elements of the row from channel a0 on.
        first = s0
        last = 0 if a0 == a1 else s0 + length if p.per_run > 1 else (a1 - a0) * p.s
        if p.streams and a0 < a1 and (follows or first > 0):
            first -= past_line(to + first)
        if p.streams and a0 < a1 and (followed or last < (a1 - a0) * p.s):
            last -= past_line(to + last)
        cursor.at = first
        cursor.q = -1 if first < 0 else 0
        cursor.end = 0 if first < 0 else p.s
        stop = first + block - (past_line(to + first) if p.streams else 0)  # so that blocks end where lines do
        # What it asks for ahead. Past the end of the unit's row comes its next one, or the first of the next unit.
        ahead = min(far, segment)
        near = segment - s0 - ahead
        q = i = 0
        while cursor.at < last or q < r1 - r0:
            if cursor.at < last:
                apply_block(ax, ady, to, min(stop, last), p.s, 0 if p.fused else far, channels + a0, normalize,
                            p.streams, &cursor)
                stop += block
            if q < r1 - r0:
                count = min(length - i, block)
                if near <= 0 and far:  # once in a row
                    near = p.c * p.s
                    ahead += pitch - segment if n + 1 < p.n else -(p.n - 1) * pitch
                reduce_block(rx, rdy, count, ahead, shift[q], statistics, &lanes[q])
                rx += count
                rdy += count
                near -= count
                i += count
                if i == length:
                    q += 1
                    i = 0
    for q in range(r1 - r0):
        sums = <Sums*> &partial[chunk, r0 + q, 0]
        fold(lanes[q].delta, lanes[q].delta_lo, <real> 0)
        fold(lanes[q].product, lanes[q].product_lo, <real> 0)
        sums.delta, sums.delta_lo = lanes[q].delta[0], lanes[q].delta_lo[0]
        sums.product, sums.product_lo = lanes[q].product[0], lanes[q].product_lo[0]
        if statistics:
            finish_chunk(sums, shift[q], count_of(p, chunk))


# ---------------------------------------------------------------- finish: from sums to outputs and coefficients

cdef inline void set_coefficients(Channel* ch, double a, double b, double c, double d) noexcept nogil:
    ch.a, ch.b, ch.c, ch.d = a, b, c, d
    ch.in_range = in_range(a) and in_range(b) and in_range(c) and in_range(d)


cdef inline void normalize_with(Channel* ch, Twofold mean, double scale, double beta, real tag) noexcept nogil:
    """The mean is subtracted in two steps, so that a float32 difference keeps what the mean has beyond float32."""
    cdef double hi = mean.hi if real is double else <float> mean.hi
    set_coefficients(ch, hi, (mean.hi - hi) + mean.lo, scale, beta)


cdef inline Twofold inverse_std(double variance, double epsilon, real tag) noexcept nogil:
    """1 / sqrt(variance + epsilon); for float64 with what it has rounded off."""
    cdef Twofold r
    if real is double:
        r = inverse_square_root(two_sum(variance, epsilon))
    else:
        r.hi, r.lo = 1.0 / sqrt(variance + epsilon), 0.0
    return r


cdef inline double scale_of(double gamma, Twofold inv_std, real tag) noexcept nogil:
    """gamma * inv_std, rounded once."""
    if real is double:
        return times(inv_std, whole(gamma, 0.0)).hi
    else:
        return gamma * inv_std.hi


cdef double number(const void* vector, Py_ssize_t c, bnbp_type type, double absent) noexcept nogil:
    """Element `c` of a vector that may be left out."""
    if vector is NULL:
        return absent
    if type == BNBP_F32:
        return (<const float*> vector)[c]
    if type == BNBP_F64:
        return (<const double*> vector)[c]
    if type == BNBP_F16:
        return (<const float16*> vector)[c]
    return (<const bfloat16*> vector)[c]


cdef void put(void* vector, Py_ssize_t c, bnbp_type type, double value) noexcept nogil:
    """Sets element `c` of a vector that may be left out, rounding once."""
    if vector is NULL:
        return
    if type == BNBP_F32:
        (<float*> vector)[c] = <float> value
    elif type == BNBP_F64:
        (<double*> vector)[c] = value
    elif type == BNBP_F16:
        (<float16*> vector)[c] = <float16> value
    else:
        (<bfloat16*> vector)[c] = <bfloat16> value


cdef void combine(
    const Plan* p,
    const double[:, :, ::1]& partial,   # IN  (chunks, C, 4)
    Py_ssize_t c0, Py_ssize_t c1,
    Sums* sums,                         # OUT (c1 - c0)
) noexcept nogil:
    """The sums of a few channels, from those of their chunks in their order; of statistics, mean and m2."""
    cdef const Sums* chunk
    cdef Sums* total
    cdef Twofold step
    cdef double count = 0, more, between, share
    cdef Py_ssize_t k, c
    memset(sums, 0, (c1 - c0) * sizeof(Sums))
    for k in range(p.chunks):
        more = count_of(p, k)
        share = more / (count + more)
        for c in range(c0, c1):
            chunk, total = <const Sums*> &partial[k, c, 0], &sums[c - c0]
            if p.operator != TRAINING:
                add_sums(total, chunk.delta, chunk.delta_lo, chunk.product, chunk.product_lo, <double> 0)
                continue
            # Chan, Golub and LeVeque: means move towards each other, and the squares grow by what lay between them.
            if k == 0:
                total.delta, total.delta_lo = chunk.delta, chunk.delta_lo
            step = two_sum(chunk.delta, -total.delta)
            between = step.hi + (step.lo + (chunk.delta_lo - total.delta_lo))
            add_sums(total, between * share, 0.0, chunk.product, chunk.product_lo, <double> 0)
            add(&total.product, &total.product_lo, between * between * share * count, 0.0)
        count += more


cdef void finish(const bnbp_arguments* a, const Plan* p, Sums sums, Channel* ch, Py_ssize_t c, bint writes, real tag
                 ) noexcept nogil:
    """One channel: prepare `apply`, and write its outputs."""
    cdef Twofold mean, delta, product, inv_std
    cdef bnbp_type type = a.parameter_type
    cdef double m = a.count, scale, m2
    cdef double gamma = number(a.gamma, c, type, 1.0), beta = number(a.beta, c, type, 0.0)
    if p.operator == TRAINING:
        mean = whole(sums.delta, sums.delta_lo)
        m2 = max(sums.product + sums.product_lo, 0.0)
        product = whole(m2 / m, 0.0)
        if m == 0:
            mean.hi = product.hi = NAN  # the mean of nothing
        if writes:
            put(a.batch_mean, c, type, mean.hi)
            put(a.batch_variance, c, type, product.hi)
            put(a.statistics_mean, c, BNBP_F64, mean.hi)
            put(a.statistics_m2, c, BNBP_F64, m2)
        scale = scale_of(gamma, inverse_std(product.hi, a.epsilon, tag), tag)
        normalize_with(ch, mean, scale, beta, tag)
        return

    delta, product = whole(sums.delta, sums.delta_lo), whole(sums.product, sums.product_lo)
    if real is float16:
        if ch.mean - ch.mean == 0:  # sum dy (x - mean) = sum dy (x - center) + (center - mean) sum dy
            product.hi += (center(ch.mean, <real> 0) - ch.mean) * delta.hi
    if a.delta_sum is not NULL:
        delta = whole(number(a.delta_sum, c, BNBP_F64, 0.0), 0.0)
        product = whole(number(a.delta_centered_sum, c, BNBP_F64, 0.0), 0.0)
    if writes:
        put(a.reduced_delta, c, BNBP_F64, delta.hi)
        put(a.reduced_product, c, BNBP_F64, product.hi)
    inv_std = inverse_std(number(a.variance, c, type, 1.0), a.epsilon, tag)
    scale = scale_of(gamma, inv_std, tag)
    if m or product.hi:  # the sum of nothing is 0, even where inv_std is infinite
        product = times(product, inv_std)
    if writes:
        put(a.gamma_delta, c, type, product.hi)
        put(a.beta_delta, c, type, delta.hi)

    mean.hi, mean.lo = ch.mean, 0.0
    if p.operator == BACKPROP:
        set_coefficients(ch, over(delta, m).hi, ch.mean, over(times(product, inv_std), m).hi, scale)
    elif p.operator == INFERENCE:
        normalize_with(ch, mean, scale, beta, tag)
    else:  # dx = (dy - 0) scale + -0: adding -0 changes no number, not even the sign of a zero
        set_coefficients(ch, 0.0, 0.0, scale, -0.0)


# ---------------------------------------------------------------- tiles: tensors that are not dense in this order

cdef struct Tile:          # some rows and positions of some channels, and where their elements are
    Py_ssize_t n0, rows
    Py_ssize_t c0, width
    Py_ssize_t s0, length


cdef inline Py_ssize_t offset_of(Py_ssize_t index, const Py_ssize_t* lengths, const Py_ssize_t* strides, int axes
                                 ) noexcept nogil:
    """Bytes from the first element to that of a number, counted along some axes."""
    cdef Py_ssize_t offset = 0
    cdef int axis
    for axis in range(axes - 1, -1, -1):
        offset += index % lengths[axis] * strides[axis]
        index //= lengths[axis]
    return offset


cdef inline void move_elements(real* packed, char* memory, Py_ssize_t count, Py_ssize_t stride, bint gathers
                               ) noexcept nogil:
    """Elements with a distance in bytes, to or from their places side by side. They need not be aligned."""
    cdef Py_ssize_t i
    cdef real value
    if stride == sizeof(real):
        memcpy(packed if gathers else <void*> memory, memory if gathers else <const void*> packed, count * sizeof(real))
    elif stride == 0:  # of an input: no output repeats an element
        memcpy(&value, memory, sizeof(real))
        for i in range(count):
            packed[i] = value
    elif gathers:
        for i in range(count):
            memcpy(packed + i, memory + i * stride, sizeof(real))
    else:
        for i in range(count):
            memcpy(memory + i * stride, packed + i, sizeof(real))


cdef void move_tile(real* packed, void* tensor, const Py_ssize_t* strides, const bnbp_arguments* a, const Tile* t,
                    bint gathers) noexcept nogil:
    """Gathers a tile of a tensor, or scatters it; `packed` has the shape (rows, width, length)."""
    cdef const Py_ssize_t* inner = a.lengths + a.before
    cdef Py_ssize_t run = inner[a.after - 1] if a.after else 1
    cdef Py_ssize_t step = strides[a.before + a.after - 1] if a.after else <Py_ssize_t> sizeof(real)
    cdef Py_ssize_t pitch = strides[a.before + a.after], n, s, c, count
    cdef char* row
    cdef char* place
    for n in range(t.n0, t.n0 + t.rows):
        row = <char*> tensor + offset_of(n, a.lengths, strides, a.before) + t.c0 * pitch
        s = t.s0
        while s < t.s0 + t.length:
            place = row + offset_of(s, inner, strides + a.before, a.after)
            if t.length == 1:
                move_elements(packed, place, t.width, pitch, gathers)
                break
            # The elements of neighbouring channels may share cache lines, which are in L1 until the last has its turn.
            count = min(run - s % run, t.s0 + t.length - s)
            if step != sizeof(real):
                count = min(count, BLOCK)
            for c in range(t.width):
                move_elements(packed + c * t.length + s - t.s0, place + c * pitch, count, step, gathers)
            s += count
        packed += t.width * t.length


cdef void tile_task(const bnbp_arguments* a, real* scratch, void* output, const Channel* channels,
                    double[:, :, ::1]& partial, const Plan* p, Py_ssize_t index, bint reduces) noexcept nogil:
    """Reduces a chunk of some channels, or applies to it: in a copy that is no larger, as a batch of its own."""
    cdef Plan q = p[0]
    cdef Tile t
    cdef Py_ssize_t segments = (p.c + p.width - 1) // p.width, chunk = index // segments
    cdef bint from_dy = p.operator == INFERENCE_BACKPROP and not reduces
    cdef bint from_x = p.operator == TRAINING or p.operator == INFERENCE
    cdef const real[:, :, ::1] x = None, dy = None
    cdef double[:, :, ::1] sums = None
    cdef real* second
    t.n0, t.s0 = chunk // p.per_run * p.chunk_rows, chunk % p.per_run * p.length
    t.rows = min(p.chunk_rows, p.n - t.n0)
    t.length = min(p.length, p.s - t.s0) if p.runs else p.s
    t.c0 = index % segments * p.width
    t.width = min(p.width, p.c - t.c0)
    q.n, q.c, q.s = q.chunk_rows, q.unit, q.length = t.rows, t.width, t.length
    q.width = t.width
    q.chunks = q.per_run = q.units = 1
    q.far = q.streams = q.fused = q.tiled = False

    second = scratch + t.rows * t.width * t.length
    if not from_dy:
        move_tile(scratch, <void*> a.input, a.input_strides, a, &t, True)
    if not from_x:
        move_tile(second, <void*> a.normalized_delta, a.normalized_delta_strides, a, &t, True)
    VIEW(x, second if from_dy else scratch, t.rows, t.width, t.length, sizeof(real))
    VIEW(dy, scratch if from_x else second, t.rows, t.width, t.length, sizeof(real))
    channels += t.c0
    if reduces:
        VIEW(sums, &partial[chunk, t.c0, 0], 1, t.width, 4, sizeof(double))
        if p.runs:
            sweep(x, dy, x, channels, sums, &q, 0, 0, 0, 0, t.width, False, False)
        else:
            reduce_task(x, dy, channels, sums, &q, task_of(&q, 0, t.width, 0))
        return
    if p.runs:
        sweep(x, dy, x, channels, sums, &q, 0, 0, t.width, 0, 0, False, False)
    else:
        apply_task(x, dy, x, channels, &q, task_of(&q, 0, t.width, 0), p.operator != BACKPROP)
    move_tile(<real*> &x[0, 0, 0], output, a.output_strides, a, &t, False)


# ---------------------------------------------------------------- the schedule

cdef struct Memory:        # what a call works on besides its arguments
    void* output
    Channel* channels      # (C), or one for each thread
    char* scratch          # one for each thread, if there are tiles
    int stopped            # 1: the call is to end


cdef inline bint stops(Memory* memory, Py_ssize_t* patience, Py_ssize_t elements) noexcept nogil:
    """Whether the call is to end here, before so many elements more.

    The patience, how many it still goes through without asking, is each thread's own: written where others read, it
    costs 4 %.
    """
    if kernels_.interrupted is NULL:
        return False
    if thread_number() == 0:
        patience[0] -= elements
        if patience[0] < 0:
            patience[0] = PATIENCE
            if kernels_.interrupted():
                raise_flag(&memory.stopped)
    return flag_is_up(&memory.stopped)


cdef void pass_share(const bnbp_arguments* a, const real[:, :, ::1]& x, const real[:, :, ::1]& dy,
                     const real[:, :, ::1]& dx, const Channel* channels, Memory* memory,
                     double[:, :, ::1]& partial, const Plan* p, Py_ssize_t* patience, Py_ssize_t applied,
                     Py_ssize_t reduced, bint follows, bint followed, int thread, int team) noexcept nogil:
    """What `thread` does of a pass that applies to one unit and reduces another; `p.units` is the empty one."""
    cdef Py_ssize_t a0 = min(applied * p.unit, p.c), a1 = min(a0 + p.unit, p.c)
    cdef Py_ssize_t r0 = min(reduced * p.unit, p.c), r1 = min(r0 + p.unit, p.c)
    cdef Py_ssize_t segments = 1 if p.runs and not p.tiled else (max(a1 - a0, r1 - r0) + p.width - 1) // p.width
    cdef Py_ssize_t tasks = p.chunks * segments
    cdef Py_ssize_t first = tasks * thread // team, last = tasks * (thread + 1) // team, index, k
    cdef Py_ssize_t elements = p.n * p.s * max(a1 - a0, r1 - r0) // max(tasks, 1)
    for k in range(first, last):
        if stops(memory, patience, elements):
            return
        # What a thread has reduced last is in its cache for certain, and applied to first.
        index = k if r0 < r1 or not p.reduces else first + last - 1 - k
        if p.tiled:
            tile_task(a, <real*> (memory.scratch + thread * p.scratch), memory.output, channels, partial, p, index,
                      r0 < r1)
        elif p.runs:
            sweep(x, dy, dx, channels, partial, p, index, a0, a1, r0, r1, follows, followed)
        elif r0 < r1:
            reduce_task(x, dy, channels, partial, p, task_of(p, r0, r1, index))
        elif p.operator == BACKPROP:
            apply_task(x, dy, dx, channels, p, task_of(p, a0, a1, index), False)
        elif p.operator == INFERENCE_BACKPROP:
            apply_task(dy, dy, dx, channels, p, task_of(p, a0, a1, index), True)
        else:
            apply_task(x, dy, dx, channels, p, task_of(p, a0, a1, index), True)


cdef void finish_share(const bnbp_arguments* a, Channel* channels, const double[:, :, ::1]& partial, const Plan* p,
                       Py_ssize_t unit, int thread, int team, bint writes, real tag) noexcept nogil:
    cdef Sums[LANES] sums
    cdef Py_ssize_t c0 = unit * p.unit, c1 = min(c0 + p.unit, p.c), first, last, c
    first, last = c0 + (c1 - c0) * thread // team, c0 + (c1 - c0) * (thread + 1) // team
    memset(sums, 0, sizeof(sums))
    for c in range(first, last):
        if p.reduces and (c - first) % LANES == 0:
            combine(p, partial, c, min(c + LANES, last), sums)
        finish(a, p, sums[(c - first) % LANES], &channels[c], c, writes, tag)


cdef void run_units(const bnbp_arguments* a, const real[:, :, ::1]& x, const real[:, :, ::1]& dy,
                    const real[:, :, ::1]& dx, Memory* memory, double[:, :, ::1]& partial, const Plan* p,
                    Py_ssize_t first, Py_ssize_t last, int thread, int team) noexcept nogil:
    """The units [first, last), from start to end, as one of the `team` that works on each."""
    cdef Py_ssize_t unit, patience = PATIENCE
    cdef Channel* channels = memory.channels + (thread * p.c if p.private else 0)
    for unit in range(first, last):
        if p.reduces:
            pass_share(a, x, dy, dx, channels, memory, partial, p, &patience,
                       unit - 1 if p.fused and unit > first else p.units, unit, unit - 1 > first, True, thread, team)
            if team > 1:
                barrier()
        if flag_is_up(&memory.stopped):  # some sums are missing; the others wait at the barriers nevertheless
            if team > 1 and not p.private:
                barrier()
            continue
        if p.private:  # each does it for itself, which is faster than to wait once more
            finish_share(a, channels, partial, p, unit, 0, 1, thread == 0, <real> 0)
        else:
            finish_share(a, channels, partial, p, unit, thread, team, True, <real> 0)
            if team > 1:
                barrier()
        if p.applies and (not p.fused or unit + 1 == last):
            pass_share(a, x, dy, dx, channels, memory, partial, p, &patience, unit, p.units, unit > first,
                       unit + 1 < last, thread, team)
    stream_fence()


cdef bnbp_status run(const bnbp_arguments* a, Operator operator, const real* input, real* output) noexcept nogil:
    cdef const real[:, :, ::1] x = None, dy = None, dx = None
    cdef double[:, :, ::1] partial = None
    cdef bint reduces = a.delta_sum is NULL and operator != INFERENCE and (
        operator != INFERENCE_BACKPROP or a.gamma_delta is not NULL or a.beta_delta is not NULL)
    cdef bint in_place = output is input or output is a.normalized_delta
    cdef bint single = operator == BACKPROP and a.count == 1
    cdef Plan p = plan_of(a, operator, reduces, output is not NULL and not single, in_place)
    cdef Py_ssize_t copies = p.team if p.private else 1, c
    cdef Py_ssize_t sums = (p.chunks if reduces else 0) * p.c * sizeof(Sums), each = copies * p.c * sizeof(Channel)
    cdef char* workspace = <char*> malloc(sums + each + p.team * p.scratch)
    cdef Memory memory
    cdef const real* second = <const real*> a.normalized_delta
    cdef int thread, team = p.team
    if workspace is NULL:
        return BNBP_NO_MEMORY
    memory.stopped = 0
    memory.output, memory.channels, memory.scratch = output, <Channel*> (workspace + sums), workspace + sums + each
    VIEW(x, input, p.n, p.c, p.s, sizeof(real))
    VIEW(dy, input if second is NULL else second, p.n, p.c, p.s, sizeof(real))
    VIEW(dx, output, p.n, p.c, p.s, sizeof(real))
    VIEW(partial, workspace, p.chunks, p.c, 4, sizeof(double))
    if operator != TRAINING:
        for c in range(copies * p.c):
            memory.channels[c].mean = number(a.mean, c % p.c, a.parameter_type, 0.0)

    if p.shared:
        with parallel(num_threads=team):
            run_units(a, x, dy, dx, &memory, partial, &p, 0, p.units, threadid(), team_size())
    elif team > 1:
        for thread in prange(team, num_threads=team, schedule="static", chunksize=1):
            run_units(a, x, dy, dx, &memory, partial, &p, p.units * thread // team, p.units * (thread + 1) // team, 0,
                      1)
    else:
        run_units(a, x, dy, dx, &memory, partial, &p, 0, p.units, 0, 1)

    if single and output is not NULL and a.n * a.s:  # the normalised value of a single element is beta, whatever it is
        set_zero(a, output)
    free(workspace)
    return BNBP_INTERRUPTED if memory.stopped else BNBP_OK


cdef void set_zero(const bnbp_arguments* a, real* output) noexcept nogil:
    """One element for each channel."""
    cdef Py_ssize_t pitch = sizeof(real) if a.lengths is NULL else a.output_strides[a.before + a.after], c
    for c in range(a.c):
        memset(<char*> output + c * pitch, 0, sizeof(real))


# ---------------------------------------------------------------- the table

cdef bnbp_status run_typed(const bnbp_arguments* a, Operator operator, void* output) noexcept nogil:
    if not (output or a.batch_mean or a.batch_variance or a.gamma_delta or a.beta_delta or a.statistics_mean
            or a.statistics_m2 or a.reduced_delta or a.reduced_product):
        return BNBP_OK
    if a.type == BNBP_F32:
        return run(a, operator, <const float*> a.input, <float*> output)
    if a.type == BNBP_F64:
        return run(a, operator, <const double*> a.input, <double*> output)
    if a.type == BNBP_F16:
        return run(a, operator, <const float16*> a.input, <float16*> output)
    return run(a, operator, <const bfloat16*> a.input, <bfloat16*> output)


cdef bnbp_status training(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, TRAINING, a.normalized)


cdef bnbp_status training_backprop(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, BACKPROP, a.input_delta)


cdef bnbp_status inference(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, INFERENCE, a.normalized)


cdef bnbp_status inference_backprop(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, INFERENCE_BACKPROP, a.input_delta)


cdef int default_team() noexcept nogil:
    cdef int limit = openmp_threads()
    # LLVM's OpenMP makes a negative number of an OMP_NUM_THREADS that is none.
    return limit if 0 < limit < min(kernels_.openmp_num_threads, kernels_.default_num_threads) else (
        kernels_.default_num_threads)


cdef bnbp_kernels kernels_
kernels_.abi = BNBP_KERNELS_ABI
kernels_.isa = BNBP_ISA
kernels_.openmp = BNBP_OPENMP
kernels_.l2_size = 1 << 20
kernels_.default_num_threads = 1
kernels_.openmp_num_threads = 1
kernels_.serial = 0
kernels_.default_team = default_team
kernels_.interrupted = NULL
kernels_.training = training
kernels_.training_backprop = training_backprop
kernels_.inference = inference
kernels_.inference_backprop = inference_backprop

kernels = PyCapsule_New(&kernels_, BNBP_KERNELS_CAPSULE, NULL)
