"""The kernels: `reduce` and `apply` over (N, C, S) memoryviews, and the four operators made of them.

a. The view. A C-contiguous tensor whose channels are on axis k *is* an array of shape (N, C, S): N the product of the
   axes before k, S of those after it. NCHW has S = H*W; channels-last has S = 1. A channel's m = N*S elements are N
   contiguous runs of S. All kernels work on `const real[:, :, ::1]`, and no layout is copied.

b. Two passes. `reduce` reads the tensors and leaves sums for each channel; `apply` reads them again and writes the
   result, knowing the sums. Between them stands `finish`: a few operations for each channel.

       reduce   delta_sum          = sum dy_i                     beta_delta
                delta_centered_sum = sum dy_i (x_i - mean)        gamma_delta / inv_std
       apply    dx_i = gamma inv_std (dy_i - delta_sum/m - (x_i - mean) inv_std^2 delta_centered_sum/m)

c. Chunks. A channel is cut into chunks of about CHUNK elements: a piece of one run where runs are long, several whole
   runs where they are short. The cut depends on N and S alone. Each chunk's sums are written to their own place and
   combined in the order of the chunks, so the bits of the result do not depend on the number of threads.

d. Lanes. The sum of a run is kept in LANES accumulators, which are added in a fixed order at the end. LANES is part of
   the algorithm, not of the instruction set; GCC makes vector code of the literal inner loop.

e. Arithmetic is in float64, whatever `real` is. For float32 that is 29 bits more than the data has: the product of two
   is exact. For float64 there is nothing to spare, and the sums carry what each operation has rounded off (Ogita, Rump
   and Oishi, "Accurate sum and dot product", 2005): of the difference x_i - mean, of the product, and of the sum. The
   numbers of a channel are computed once, so they afford that too, for both types. The mean is subtracted first:
   a*dy + b*x + c with precomputed a, b, c would be cheaper and lose everything to cancellation when it is far from 0.

f. Statistics. A chunk is small enough to stay in cache, so its mean and its sum of squared deviations about that very
   mean (m2) are computed one after the other from one read of memory, and merged as in Chan, Golub and LeVeque (1983).

g. Borrowed views. The kernels are called through a C table with plain pointers and without the GIL, so the views have
   no Python object behind them: `VIEW` fills in address, shape and strides of a view that is None. With
   `initializedcheck` off nothing ever looks at the object.
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport prange
from libc.math cimport NAN, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset

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

ctypedef fused real:
    float
    double

cdef extern from *:
    """
    #define VIEW(view, memory, a, b, c, size) (                      \\
        (view).data = (char *)(memory),                              \\
        (view).shape[0] = (a), (view).strides[0] = (b) * (c) * (Py_ssize_t)(size), \\
        (view).shape[1] = (b), (view).strides[1] = (c) * (Py_ssize_t)(size),       \\
        (view).shape[2] = (c), (view).strides[2] = (Py_ssize_t)(size))
    #ifdef _OPENMP
    #define BNBP_OPENMP _OPENMP
    #else
    #define BNBP_OPENMP 0
    #endif
    #ifndef BNBP_ISA
    #define BNBP_ISA "baseline"
    #endif
    """
    void VIEW(const float[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size
              ) nogil
    void VIEW(const double[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size
              ) nogil
    const int BNBP_OPENMP
    const char* BNBP_ISA

cdef enum:
    CHUNK = 1024      # elements: 8 KiB of two float32 tensors, well inside L1; partial sums are 1.6 % of what is read
    LANES = 16        # two AVX-512 registers of float64 to each sum, enough to hide an addition's latency
    REGION = 32768    # elements below which a team of threads is not worth starting


# ---------------------------------------------------------------- arithmetic that loses nothing

cdef struct Twofold:  # the unevaluated sum of two float64 numbers, about 106 bits
    double hi
    double lo


cdef inline Twofold two_sum(double a, double b) noexcept nogil:
    """a + b exactly (Knuth)."""
    cdef Twofold r
    cdef double back
    r.hi = a + b
    back = r.hi - a
    r.lo = (a - (r.hi - back)) + (b - back)
    return r


cdef inline Twofold two_product(double a, double b) noexcept nogil:
    """a * b exactly (Dekker), short of overflow: each factor is split into halves of 26 bits."""
    cdef Twofold r
    cdef double a_big = 134217729.0 * a, b_big = 134217729.0 * b  # 2^27 + 1
    cdef double a_hi = a_big - (a_big - a), b_hi = b_big - (b_big - b)
    cdef double a_lo = a - a_hi, b_lo = b - b_hi
    r.hi = a * b
    r.lo = ((a_hi * b_hi - r.hi) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo
    return r


cdef inline Twofold whole(double hi, double lo) noexcept nogil:
    """hi + lo with no overlap. Where `hi` is infinite or a split overflowed, `lo` is NaN and has nothing to add."""
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


cdef inline void add(double* hi, double* lo, double value, double rest) noexcept nogil:
    """Adds value + rest to the sum hi + lo; `rest` is far below `value`."""
    cdef Twofold r = two_sum(hi[0], value)
    hi[0] = r.hi
    lo[0] += r.lo + rest


# ---------------------------------------------------------------- a channel's numbers

cdef struct Sums:  # of a chunk, then of a channel; the layout of a row of `partial`
    double delta          # sum dy_i           or, for statistics, the mean
    double delta_lo
    double product        # sum dy_i (x_i - mean)          or the sum of squared deviations
    double product_lo


cdef struct Channel:
    double mean
    Twofold inv_std
    double scale          # gamma * inv_std
    double shift          # beta
    double delta_mean     # delta_sum / m
    double slope          # inv_std^2 * delta_centered_sum / m


cdef inline double parameter(const real* vector, Py_ssize_t c, double absent) noexcept nogil:
    return absent if vector is NULL else vector[c]


cdef inline Channel channel(double mean, double variance, double epsilon, double gamma, double beta) noexcept nogil:
    cdef Channel ch
    ch.mean = mean
    ch.inv_std = inverse_square_root(two_sum(variance, epsilon))
    ch.scale = times(ch.inv_std, whole(gamma, 0.0)).hi
    ch.shift = beta
    ch.delta_mean = ch.slope = 0.0
    return ch


# ---------------------------------------------------------------- one contiguous run

cdef inline Sums term(real x, real dy, double mean, bint statistics) noexcept nogil:
    """What one element adds to the sums. For statistics the deviation x - mean takes the place of dy."""
    cdef Sums t
    cdef Twofold centered, product
    if real is float:
        centered.hi = x - mean
        t.delta = centered.hi if statistics else dy
        t.product = t.delta * centered.hi
        t.delta_lo = t.product_lo = 0.0
    else:
        centered = two_sum(x, -mean)
        t.delta = centered.hi if statistics else dy
        t.delta_lo = centered.lo if statistics else 0.0
        product = two_product(t.delta, centered.hi)
        t.product = product.hi
        t.product_lo = product.lo + (t.delta * centered.lo + t.delta_lo * centered.hi)
    return t


cdef inline void add_term(double* delta, double* delta_lo, double* product, double* product_lo, Sums t, real* tag
                          ) noexcept nogil:
    if real is float:
        delta[0] += t.delta
        product[0] += t.product
    else:
        add(delta, delta_lo, t.delta, t.delta_lo)
        add(product, product_lo, t.product, t.product_lo)


cdef inline void reduce_run(
    const real* x,      # IN  (length)
    const real* dy,     # IN  (length)
    Py_ssize_t length,
    double mean,
    bint statistics,    # sum the deviations x_i - mean and their squares; dy is not used
    Sums* sums,         # IN OUT
) noexcept nogil:
    cdef double delta[LANES]
    cdef double delta_lo[LANES]
    cdef double product[LANES]
    cdef double product_lo[LANES]
    cdef Py_ssize_t i, lane, whole_lanes = length - length % LANES
    if whole_lanes:
        for lane in range(16):  # a literal: with an enum as its bound GCC keeps the lanes out of registers
            delta[lane] = delta_lo[lane] = product[lane] = product_lo[lane] = 0.0
        for i in range(0, whole_lanes, 16):
            for lane in range(16):
                add_term(&delta[lane], &delta_lo[lane], &product[lane], &product_lo[lane],
                         term(x[i + lane], dy[i + lane], mean, statistics), <real*> NULL)
        for lane in range(16):
            add(&sums.delta, &sums.delta_lo, delta[lane], delta_lo[lane])
            add(&sums.product, &sums.product_lo, product[lane], product_lo[lane])
    for i in range(whole_lanes, length):
        add_term(&sums.delta, &sums.delta_lo, &sums.product, &sums.product_lo,
                 term(x[i], dy[i], mean, statistics), <real*> NULL)


cdef inline void apply_run(
    const real* x,      # IN  (length)
    const real* dy,     # IN  (length)
    real* dx,           # OUT (length), may be x or dy
    Py_ssize_t length,
    Channel ch,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(length):
        dx[i] = <real> (ch.scale * (dy[i] - ch.delta_mean - (x[i] - ch.mean) * ch.slope))


cdef inline void normalize_run(
    const real* x,      # IN  (length)
    real* y,            # OUT (length), may be x
    Py_ssize_t length,
    Channel ch,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(length):
        y[i] = <real> ((x[i] - ch.mean) * ch.scale + ch.shift)


# ---------------------------------------------------------------- chunks and tasks

cdef struct Grid:
    Py_ssize_t n, c, s
    Py_ssize_t rows       # runs in a chunk
    Py_ssize_t span       # elements of a run in a chunk
    Py_ssize_t per_run    # chunks in a run
    Py_ssize_t chunks     # chunks in a channel
    Py_ssize_t width      # channels in a task
    Py_ssize_t tasks      # (chunk, group of channels) pairs: what the threads share out
    int team


cdef struct Task:
    Py_ssize_t chunk, n0, n1, c0, c1, s0, s1


cdef Grid grid_of(const bnbp_arguments* a) noexcept nogil:
    cdef Grid g
    g.n, g.c, g.s = a.n, a.c, a.s
    g.rows = g.span = g.per_run = g.width = 1
    g.chunks = 0
    if g.n and g.s:
        g.span = min(g.s, CHUNK)
        g.per_run = (g.s + CHUNK - 1) // CHUNK
        g.rows = max(CHUNK // g.s, 1)
        g.chunks = (g.n + g.rows - 1) // g.rows * g.per_run
        g.width = max(64 // g.s, 1)  # at least a few cache lines of each row where runs are short
    g.tasks = g.chunks * ((g.c + g.width - 1) // g.width)
    g.team = 1 if kernels_.serial or g.n * g.c * g.s < REGION else a.num_threads
    if g.team > g.tasks:
        g.team = <int> g.tasks
    if g.team > 1:
        kernels_.region_entered = 1
    else:
        g.team = 1
    return g


cdef inline Task task_of(Grid g, Py_ssize_t index) noexcept nogil:
    cdef Task t
    cdef Py_ssize_t group = index // g.chunks
    t.chunk = index % g.chunks
    t.n0 = t.chunk // g.per_run * g.rows
    t.n1 = min(t.n0 + g.rows, g.n)
    t.s0 = t.chunk % g.per_run * g.span
    t.s1 = min(t.s0 + g.span, g.s)
    t.c0 = group * g.width
    t.c1 = min(t.c0 + g.width, g.c)
    return t


# ---------------------------------------------------------------- the passes

cdef inline void reduce_task(
    const real[:, :, ::1] x, const real[:, :, ::1] dy, const Channel* channels, double[:, :, ::1] partial, Task t
) noexcept nogil:
    cdef Py_ssize_t n, c
    memset(&partial[t.chunk, t.c0, 0], 0, (t.c1 - t.c0) * sizeof(Sums))
    for n in range(t.n0, t.n1):
        for c in range(t.c0, t.c1):
            reduce_run(&x[n, c, t.s0], &dy[n, c, t.s0], t.s1 - t.s0, channels[c].mean, False,
                       <Sums*> &partial[t.chunk, c, 0])


cdef void reduce(
    const real[:, :, ::1] x,        # IN
    const real[:, :, ::1] dy,       # IN
    const Channel* channels,        # IN  (C), the mean
    double[:, :, ::1] partial,      # OUT (chunks, C, 4), the Sums of each chunk
    Grid g,
) noexcept nogil:
    cdef Py_ssize_t index
    for index in prange(g.tasks, num_threads=g.team, use_threads_if=g.team > 1, schedule="static"):
        reduce_task(x, dy, channels, partial, task_of(g, index))


cdef inline void apply_task(
    const real[:, :, ::1] x, const real[:, :, ::1] dy, real[:, :, ::1] dx, const Channel* channels, Task t
) noexcept nogil:
    cdef Py_ssize_t n, c
    for n in range(t.n0, t.n1):
        for c in range(t.c0, t.c1):
            apply_run(&x[n, c, t.s0], &dy[n, c, t.s0], &dx[n, c, t.s0], t.s1 - t.s0, channels[c])


cdef void apply(
    const real[:, :, ::1] x,        # IN
    const real[:, :, ::1] dy,       # IN
    real[:, :, ::1] dx,             # OUT, may be x or dy
    const Channel* channels,        # IN  (C)
    Grid g,
) noexcept nogil:
    cdef Py_ssize_t index
    for index in prange(g.tasks, num_threads=g.team, use_threads_if=g.team > 1, schedule="static"):
        apply_task(x, dy, dx, channels, task_of(g, index))


cdef inline void reduce_statistics_task(const real[:, :, ::1] x, double[:, :, ::1] partial, Task t) noexcept nogil:
    cdef Py_ssize_t n, c
    cdef double mean, count = (t.n1 - t.n0) * (t.s1 - t.s0)
    cdef Sums* sums
    for c in range(t.c0, t.c1):
        sums = <Sums*> &partial[t.chunk, c, 0]
        # First about the chunk's first element, a guess that costs nothing: a constant gives exactly itself.
        memset(sums, 0, sizeof(Sums))
        for n in range(t.n0, t.n1):
            reduce_run(&x[n, c, t.s0], &x[n, c, t.s0], t.s1 - t.s0, x[t.n0, c, t.s0], True, sums)
        mean = x[t.n0, c, t.s0] + whole(sums.delta, sums.delta_lo).hi / count
        # Then about the mean. The deviations' own mean is what rounding the mean has lost; the squares are freed of it.
        memset(sums, 0, sizeof(Sums))
        for n in range(t.n0, t.n1):
            reduce_run(&x[n, c, t.s0], &x[n, c, t.s0], t.s1 - t.s0, mean, True, sums)
        sums.delta_lo = (sums.delta + sums.delta_lo) / count
        sums.delta = mean
        sums.product_lo -= sums.delta_lo * sums.delta_lo * count


cdef void reduce_statistics(
    const real[:, :, ::1] x,        # IN
    double[:, :, ::1] partial,      # OUT (chunks, C, 4), mean and m2 of each chunk, in the places of Sums
    Grid g,
) noexcept nogil:
    cdef Py_ssize_t index
    for index in prange(g.tasks, num_threads=g.team, use_threads_if=g.team > 1, schedule="static"):
        reduce_statistics_task(x, partial, task_of(g, index))


cdef void merge_statistics(
    const double[:, :, ::1] partial,    # IN  (chunks, C, 4)
    Py_ssize_t c,
    Grid g,
    Twofold* mean,                      # OUT
    Twofold* variance,                  # OUT
) noexcept nogil:
    """Chan, Golub and LeVeque: means move towards each other, and the squares grow by what lay between them."""
    cdef const Sums* sums
    cdef Task t
    cdef Twofold step
    cdef double count = 0, more, between
    cdef Py_ssize_t k
    mean.hi = mean.lo = variance.hi = variance.lo = 0.0 if g.chunks else NAN  # 0/0, the mean of nothing
    for k in range(g.chunks):
        sums = <const Sums*> &partial[k, c, 0]
        t = task_of(g, k)
        more = (t.n1 - t.n0) * (t.s1 - t.s0)
        if k == 0:
            mean.hi, mean.lo = sums.delta, sums.delta_lo
        step = two_sum(sums.delta, -mean.hi)
        between = step.hi + (step.lo + (sums.delta_lo - mean.lo))
        add(&variance.hi, &variance.lo, sums.product, sums.product_lo)
        add(&variance.hi, &variance.lo, between * between * (more / (count + more)) * count, 0.0)
        count += more
        add(&mean.hi, &mean.lo, between * (more / count), 0.0)
    mean[0] = whole(mean.hi, mean.lo)
    variance[0] = whole(max(variance.hi + variance.lo, 0.0) / count, 0.0)


cdef inline void normalize_task(
    const real[:, :, ::1] x, real[:, :, ::1] y, const Channel* channels, Task t
) noexcept nogil:
    cdef Py_ssize_t n, c
    for n in range(t.n0, t.n1):
        for c in range(t.c0, t.c1):
            normalize_run(&x[n, c, t.s0], &y[n, c, t.s0], t.s1 - t.s0, channels[c])


cdef void normalize(
    const real[:, :, ::1] x,        # IN
    real[:, :, ::1] y,              # OUT, may be x
    const Channel* channels,        # IN  (C)
    Grid g,
) noexcept nogil:
    cdef Py_ssize_t index
    for index in prange(g.tasks, num_threads=g.team, use_threads_if=g.team > 1, schedule="static"):
        normalize_task(x, y, channels, task_of(g, index))


# ---------------------------------------------------------------- the operators

cdef bnbp_status training(const bnbp_arguments* a, const real* input) noexcept nogil:
    cdef const real[:, :, ::1] x = None
    cdef real[:, :, ::1] y = None
    cdef double[:, :, ::1] partial = None
    cdef Grid g = grid_of(a)
    cdef void* workspace = malloc(g.chunks * g.c * sizeof(Sums) + g.c * sizeof(Channel))
    cdef Channel* channels = <Channel*> (<Sums*> workspace + g.chunks * g.c)
    cdef Twofold mean, m2
    cdef Py_ssize_t c
    if workspace is NULL:
        return BNBP_NO_MEMORY
    VIEW(x, input, g.n, g.c, g.s, sizeof(real))
    VIEW(y, a.normalized, g.n, g.c, g.s, sizeof(real))
    VIEW(partial, workspace, g.chunks, g.c, 4, sizeof(double))

    reduce_statistics(x, partial, g)
    for c in range(g.c):
        merge_statistics(partial, c, g, &mean, &m2)
        channels[c] = channel(
            mean.hi, m2.hi, a.epsilon, parameter(<const real*> a.gamma, c, 1.0), parameter(<const real*> a.beta, c, 0.0)
        )
        if a.batch_mean is not NULL:
            (<real*> a.batch_mean)[c] = <real> mean.hi
        if a.batch_variance is not NULL:
            (<real*> a.batch_variance)[c] = <real> m2.hi
    if a.normalized is not NULL:
        normalize(x, y, channels, g)
    free(workspace)
    return BNBP_OK


cdef bnbp_status inference(const bnbp_arguments* a, const real* input) noexcept nogil:
    cdef const real[:, :, ::1] x = None
    cdef real[:, :, ::1] y = None
    cdef Grid g = grid_of(a)
    cdef Channel* channels = <Channel*> malloc(g.c * sizeof(Channel))
    cdef Py_ssize_t c
    if channels is NULL:
        return BNBP_NO_MEMORY
    VIEW(x, input, g.n, g.c, g.s, sizeof(real))
    VIEW(y, a.normalized, g.n, g.c, g.s, sizeof(real))

    for c in range(g.c):
        channels[c] = channel(
            (<const real*> a.mean)[c], (<const real*> a.variance)[c], a.epsilon,
            parameter(<const real*> a.gamma, c, 1.0), parameter(<const real*> a.beta, c, 0.0),
        )
    if a.normalized is not NULL:
        normalize(x, y, channels, g)
    free(channels)
    return BNBP_OK


cdef bnbp_status backprop(const bnbp_arguments* a, const real* input, bint constant_statistics) noexcept nogil:
    cdef const real[:, :, ::1] x = None
    cdef const real[:, :, ::1] dy = None
    cdef real[:, :, ::1] dx = None
    cdef double[:, :, ::1] partial = None
    cdef Grid g = grid_of(a)
    cdef void* workspace = malloc(g.chunks * g.c * sizeof(Sums) + g.c * sizeof(Channel))
    cdef Channel* channels = <Channel*> (<Sums*> workspace + g.chunks * g.c)
    cdef Sums sums
    cdef Twofold delta_sum, delta_centered_sum
    cdef double m = <double> g.n * g.s
    cdef Py_ssize_t c, k
    if workspace is NULL:
        return BNBP_NO_MEMORY
    VIEW(x, input, g.n, g.c, g.s, sizeof(real))
    VIEW(dy, a.normalized_delta, g.n, g.c, g.s, sizeof(real))
    VIEW(dx, a.input_delta, g.n, g.c, g.s, sizeof(real))
    VIEW(partial, workspace, g.chunks, g.c, 4, sizeof(double))

    for c in range(g.c):
        channels[c] = channel(
            (<const real*> a.mean)[c], (<const real*> a.variance)[c], a.epsilon,
            parameter(<const real*> a.gamma, c, 1.0), 0.0,
        )
    reduce(x, dy, channels, partial, g)
    for c in range(g.c):
        memset(&sums, 0, sizeof(Sums))
        for k in range(g.chunks):
            add(&sums.delta, &sums.delta_lo, partial[k, c, 0], partial[k, c, 1])
            add(&sums.product, &sums.product_lo, partial[k, c, 2], partial[k, c, 3])
        delta_sum, delta_centered_sum = whole(sums.delta, sums.delta_lo), whole(sums.product, sums.product_lo)
        if m:  # without elements the sums are 0 even where inv_std is infinite
            delta_centered_sum = times(delta_centered_sum, channels[c].inv_std)
            channels[c].delta_mean = over(delta_sum, m).hi
            channels[c].slope = over(times(delta_centered_sum, channels[c].inv_std), m).hi
        if a.gamma_delta is not NULL:
            (<real*> a.gamma_delta)[c] = <real> delta_centered_sum.hi
        if a.beta_delta is not NULL:
            (<real*> a.beta_delta)[c] = <real> delta_sum.hi

    if a.input_delta is NULL:
        pass
    elif constant_statistics:
        for c in range(g.c):  # dx = (dy - 0) scale + -0: adding -0 changes no number, not even the sign of a zero
            channels[c].mean = 0.0
            channels[c].shift = -0.0
        normalize(dy, dx, channels, g)
    elif m == 1:
        for c in range(g.c):
            dx[0, c, 0] = 0  # the normalised value of a single element is beta, whatever the element is
    else:
        apply(x, dy, dx, channels, g)
    free(workspace)
    return BNBP_OK


# ---------------------------------------------------------------- the table

cdef bnbp_status run_training(const bnbp_arguments* a) noexcept nogil:
    return training(a, <const float*> a.input) if a.type == BNBP_F32 else training(a, <const double*> a.input)


cdef bnbp_status run_inference(const bnbp_arguments* a) noexcept nogil:
    return inference(a, <const float*> a.input) if a.type == BNBP_F32 else inference(a, <const double*> a.input)


cdef bnbp_status run_training_backprop(const bnbp_arguments* a) noexcept nogil:
    return (backprop(a, <const float*> a.input, False) if a.type == BNBP_F32
            else backprop(a, <const double*> a.input, False))


cdef bnbp_status run_inference_backprop(const bnbp_arguments* a) noexcept nogil:
    return (backprop(a, <const float*> a.input, True) if a.type == BNBP_F32
            else backprop(a, <const double*> a.input, True))


cdef bnbp_kernels kernels_
kernels_.abi = BNBP_KERNELS_ABI
kernels_.isa = BNBP_ISA
kernels_.openmp = BNBP_OPENMP
kernels_.default_num_threads = 1
kernels_.region_entered = kernels_.serial = 0
kernels_.training = run_training
kernels_.training_backprop = run_training_backprop
kernels_.inference = run_inference
kernels_.inference_backprop = run_inference_backprop

kernels = PyCapsule_New(&kernels_, BNBP_KERNELS_CAPSULE, NULL)
