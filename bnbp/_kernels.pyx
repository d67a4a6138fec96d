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

e. Arithmetic is in float64 throughout, whatever `real` is: the product of two float32 numbers is exact in it. The mean
   is subtracted first. (a*dy + b*x + c with precomputed a, b, c would be cheaper and lose everything to cancellation
   when the mean is far from zero.)

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
    void VIEW(const float[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size) nogil
    void VIEW(const double[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size) nogil
    const int BNBP_OPENMP
    const char* BNBP_ISA

cdef enum:
    CHUNK = 1024      # elements: 8 KiB of two float32 tensors, well inside L1; partial sums are 1.6 % of what is read
    LANES = 16        # two AVX-512 registers of float64 to each sum, enough to hide an addition's latency
    REGION = 32768    # elements below which a team of threads is not worth starting


# ---------------------------------------------------------------- a channel's numbers

cdef struct Channel:
    double mean
    double scale        # gamma * inv_std
    double shift        # beta
    double inv_std
    double mean_delta   # delta_sum / m
    double slope        # inv_std^2 * delta_centered_sum / m


cdef inline double parameter(const real* vector, Py_ssize_t c, double absent) noexcept nogil:
    return absent if vector is NULL else vector[c]


cdef inline Channel channel(double mean, double variance, double epsilon, double gamma, double beta) noexcept nogil:
    cdef Channel ch
    ch.mean = mean
    ch.inv_std = 1.0 / sqrt(variance + epsilon)
    ch.scale = gamma * ch.inv_std
    ch.shift = beta
    ch.mean_delta = ch.slope = 0.0
    return ch


# ---------------------------------------------------------------- one contiguous run

cdef inline void reduce_run(
    const real* x,      # IN  (length)
    const real* dy,     # IN  (length), or NULL: the deviations x_i - mean take its place
    Py_ssize_t length,
    double mean,
    double* sums,       # IN OUT  sum dy_i, sum dy_i (x_i - mean)
) noexcept nogil:
    cdef double delta[LANES]
    cdef double product[LANES]
    cdef double centered, d
    cdef Py_ssize_t i, lane, whole = length - length % LANES
    if whole:
        for lane in range(16):  # a literal: an enum as the bound of `range` keeps the lanes out of registers
            delta[lane] = product[lane] = 0.0
        for i in range(0, whole, 16):
            for lane in range(16):
                centered = x[i + lane] - mean
                d = centered if dy is NULL else dy[i + lane]
                delta[lane] += d
                product[lane] += d * centered
        for lane in range(16):
            sums[0] += delta[lane]
            sums[1] += product[lane]
    for i in range(whole, length):
        centered = x[i] - mean
        d = centered if dy is NULL else dy[i]
        sums[0] += d
        sums[1] += d * centered


cdef inline void apply_run(
    const real* x,      # IN  (length)
    const real* dy,     # IN  (length)
    real* dx,           # OUT (length), may be x or dy
    Py_ssize_t length,
    Channel ch,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(length):
        dx[i] = <real> (ch.scale * (dy[i] - ch.mean_delta - (x[i] - ch.mean) * ch.slope))


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
    for c in range(t.c0, t.c1):
        partial[t.chunk, c, 0] = partial[t.chunk, c, 1] = 0.0
    for n in range(t.n0, t.n1):
        for c in range(t.c0, t.c1):
            reduce_run(&x[n, c, t.s0], &dy[n, c, t.s0], t.s1 - t.s0, channels[c].mean, &partial[t.chunk, c, 0])


cdef void reduce(
    const real[:, :, ::1] x,        # IN
    const real[:, :, ::1] dy,       # IN
    const Channel* channels,        # IN  (C), the mean
    double[:, :, ::1] partial,      # OUT (chunks, C, 2), delta_sum and delta_centered_sum of each chunk
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
    cdef double count = (t.n1 - t.n0) * (t.s1 - t.s0)
    cdef double sums[2]
    for c in range(t.c0, t.c1):
        # First about the chunk's first element, which costs nothing and is a good guess: a constant gives exactly itself.
        sums[0] = sums[1] = 0.0
        for n in range(t.n0, t.n1):
            reduce_run(&x[n, c, t.s0], <const real*> NULL, t.s1 - t.s0, x[t.n0, c, t.s0], sums)
        partial[t.chunk, c, 0] = x[t.n0, c, t.s0] + sums[0] / count
        # Then about the mean. What rounding the mean has added to the squares is in sums[0], and comes off again.
        sums[0] = sums[1] = 0.0
        for n in range(t.n0, t.n1):
            reduce_run(&x[n, c, t.s0], <const real*> NULL, t.s1 - t.s0, partial[t.chunk, c, 0], sums)
        partial[t.chunk, c, 1] = sums[1] - sums[0] * sums[0] / count


cdef void reduce_statistics(
    const real[:, :, ::1] x,        # IN
    double[:, :, ::1] partial,      # OUT (chunks, C, 2), mean and m2 of each chunk
    Grid g,
) noexcept nogil:
    cdef Py_ssize_t index
    for index in prange(g.tasks, num_threads=g.team, use_threads_if=g.team > 1, schedule="static"):
        reduce_statistics_task(x, partial, task_of(g, index))


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
    cdef double* workspace = <double*> malloc(g.chunks * g.c * 2 * sizeof(double) + g.c * sizeof(Channel))
    cdef Channel* channels = <Channel*> (workspace + g.chunks * g.c * 2)
    cdef double mean, m2, count, more, step
    cdef Py_ssize_t c, k
    cdef Task t
    if workspace is NULL:
        return BNBP_NO_MEMORY
    VIEW(x, input, g.n, g.c, g.s, sizeof(real))
    VIEW(y, a.normalized, g.n, g.c, g.s, sizeof(real))
    VIEW(partial, workspace, g.chunks, g.c, 2, sizeof(double))

    reduce_statistics(x, partial, g)
    for c in range(g.c):
        mean = m2 = count = 0.0
        for k in range(g.chunks):
            t = task_of(g, k)
            more = (t.n1 - t.n0) * (t.s1 - t.s0)
            step = partial[k, c, 0] - mean
            count += more
            mean += step * (more / count)
            m2 += partial[k, c, 1] + step * step * (more / count) * (count - more)
        if count == 0:
            mean = m2 = NAN  # 0/0, the mean of nothing
        elif m2 < 0:
            m2 = 0.0  # the correction of a chunk may be larger than its squares by a rounding
        m2 /= count
        channels[c] = channel(
            mean, m2, a.epsilon, parameter(<const real*> a.gamma, c, 1.0), parameter(<const real*> a.beta, c, 0.0)
        )
        if a.batch_mean is not NULL:
            (<real*> a.batch_mean)[c] = <real> mean
        if a.batch_variance is not NULL:
            (<real*> a.batch_variance)[c] = <real> m2
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
    cdef double* workspace = <double*> malloc(g.chunks * g.c * 2 * sizeof(double) + g.c * sizeof(Channel))
    cdef Channel* channels = <Channel*> (workspace + g.chunks * g.c * 2)
    cdef double delta_sum, delta_centered_sum, m = <double> g.n * g.s
    cdef Py_ssize_t c, k
    if workspace is NULL:
        return BNBP_NO_MEMORY
    VIEW(x, input, g.n, g.c, g.s, sizeof(real))
    VIEW(dy, a.normalized_delta, g.n, g.c, g.s, sizeof(real))
    VIEW(dx, a.input_delta, g.n, g.c, g.s, sizeof(real))
    VIEW(partial, workspace, g.chunks, g.c, 2, sizeof(double))

    for c in range(g.c):
        channels[c] = channel(
            (<const real*> a.mean)[c], (<const real*> a.variance)[c], a.epsilon,
            parameter(<const real*> a.gamma, c, 1.0), 0.0,
        )
    reduce(x, dy, channels, partial, g)
    for c in range(g.c):
        delta_sum = delta_centered_sum = 0.0
        for k in range(g.chunks):
            delta_sum += partial[k, c, 0]
            delta_centered_sum += partial[k, c, 1]
        if m:
            channels[c].mean_delta = delta_sum / m
            channels[c].slope = channels[c].inv_std * channels[c].inv_std * (delta_centered_sum / m)
            delta_centered_sum *= channels[c].inv_std  # gamma_delta; an infinite inv_std must not make 0 sums NaN
        if a.gamma_delta is not NULL:
            (<real*> a.gamma_delta)[c] = <real> delta_centered_sum
        if a.beta_delta is not NULL:
            (<real*> a.beta_delta)[c] = <real> delta_sum

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
