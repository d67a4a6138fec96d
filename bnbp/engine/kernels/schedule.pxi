# The schedule: units from first to last, by one thread or a team.

cdef struct Memory:        # what a call works on besides its arguments
    void* output           # null: an output is not wanted
    char* channels         # of all threads, or of each its own; see `channels_at`
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
                     const real[:, :, ::1]& v, const real[:, :, ::1]& dx, const real[:, :, ::1]& da,
                     const Channels* channels, Memory* memory, double[:, :, ::1]& partial, const Plan* p,
                     Py_ssize_t* patience, Py_ssize_t applied, Py_ssize_t reduced, bint follows, bint followed,
                     int thread, int team) noexcept nogil:
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
        elif p.fused and r0 < r1:
            sweep(x, dy, v, dx, da, channels, partial, p, index, a0, a1, r0, r1, follows, followed)
        elif p.runs and r0 < r1:
            reduce_runs(x, dy, v, channels, partial, p, index, r0, r1)
        elif p.runs:
            apply_runs(x, dy, v, dx, da, channels, p, index, a0, a1, follows, followed)
        elif r0 < r1:
            reduce_task(x, dy, v, channels, partial, p, task_of(p, r0, r1, index))
        elif p.operator == INFERENCE_BACKPROP:
            apply_task(dy, dy, v, dx, da, channels, p, task_of(p, a0, a1, index), True)
        else:
            apply_task(x, dy, v, dx, da, channels, p, task_of(p, a0, a1, index), p.operator != BACKPROP)


cdef inline void prepare_all(const bnbp_arguments* a, const Plan* p, const Channels* channels, real tag
                             ) noexcept nogil:
    if p.extras or (p.reduces and p.operator != TRAINING):
        prepare(a, p, channels, tag)


cdef inline void finish_share(const bnbp_arguments* a, const Plan* p, const Channels* channels,
                              const double[:, :, ::1]& partial, Py_ssize_t first, Py_ssize_t last, bint writes,
                              real tag) noexcept nogil:
    """In one code for all types but float64, which is a tenth of the module."""
    if a.exact is not NULL:
        collect_exactly(a, p, partial, first, last, real is double)
    elif real is double:
        finish(a, p, channels, partial, first, last, writes, <double> 0)
    else:
        finish(a, p, channels, partial, first, last, writes, <float> 0)


cdef void run_units(const bnbp_arguments* a, const real[:, :, ::1]& x, const real[:, :, ::1]& dy,
                    const real[:, :, ::1]& v, const real[:, :, ::1]& dx, const real[:, :, ::1]& da, Memory* memory,
                    double[:, :, ::1]& partial, const Plan* p, Py_ssize_t first, Py_ssize_t last, int thread, int team
                    ) noexcept nogil:
    """The units [first, last), from start to end, as one of the `team` that works on each."""
    cdef Py_ssize_t unit, patience = PATIENCE
    cdef Py_ssize_t c0, c1
    cdef Channels channels = channels_at(memory.channels + (thread * channels_size(p.c) if p.private else 0), p.c)
    if p.private:
        prepare_all(a, p, &channels, <real> 0)
    for unit in range(first, last):
        c0, c1 = unit * p.unit, min(unit * p.unit + p.unit, p.c)
        if p.reduces:
            pass_share(a, x, dy, v, dx, da, &channels, memory, partial, p, &patience,
                       unit - 1 if p.fused and unit > first else p.units, unit, unit - 1 > first, True, thread, team)
            if team > 1:
                barrier()
        if flag_is_up(&memory.stopped):  # some sums are missing; the others wait at the barriers nevertheless
            if team > 1 and not p.private:
                barrier()
            continue
        if p.private:  # each does it for itself, which is faster than to wait once more
            finish_share(a, p, &channels, partial, c0, c1, thread == 0, <real> 0)
        else:
            finish_share(a, p, &channels, partial, c0 + (c1 - c0) * thread // team,
                         c0 + (c1 - c0) * (thread + 1) // team, True, <real> 0)
            if team > 1:
                barrier()
        if p.applies and (not p.fused or unit + 1 == last):
            pass_share(a, x, dy, v, dx, da, &channels, memory, partial, p, &patience, unit, p.units, unit > first,
                       unit + 1 < last, thread, team)
    stream_fence()


cdef bnbp_status run(const bnbp_arguments* a, Operator operator, const real* input, real* output) noexcept nogil:
    cdef const real[:, :, ::1] x = None, dy = None, v = None, dx = None, da = None
    cdef double[:, :, ::1] partial = None
    cdef real* also = <real*> a.addend_delta
    cdef real* to = output if output is not NULL else also
    cdef const real* second = <const real*> a.normalized_delta
    cdef const real* third = <const real*> (a.addend if a.addend is not NULL else a.forward_output)
    cdef bint reduces = a.delta_sum is NULL and operator != INFERENCE and (
        operator != INFERENCE_BACKPROP or a.gamma_delta is not NULL or a.beta_delta is not NULL)
    cdef bint single = operator == BACKPROP and a.count == 1
    cdef Plan p = plan_of(a, operator, reduces, also is not NULL or (output is not NULL and not single),
                          is_one_of(to, input, second, third) or (also is not NULL and (
                              to == also or is_one_of(also, input, second, third))))
    cdef Py_ssize_t sums = (p.chunks if reduces else 0) * 4 * p.c * sizeof(double) // 64 * 64 + 64
    cdef Py_ssize_t each = (p.team if p.private else 1) * channels_size(p.c)
    cdef char* workspace = <char*> malloc(sums + each + p.team * p.scratch + 64)
    cdef char* aligned = workspace + 64 - <uintptr_t> workspace % 64
    cdef Memory memory
    cdef Channels channels
    cdef int thread, team = p.team
    if workspace is NULL:
        return BNBP_NO_MEMORY
    memory.stopped = 0
    memory.output, memory.channels, memory.scratch = output, aligned + sums, aligned + sums + each
    VIEW(x, input, p.n, p.c, p.s, sizeof(real))
    VIEW(dy, input if second is NULL else second, p.n, p.c, p.s, sizeof(real))
    VIEW(v, input if third is NULL else third, p.n, p.c, p.s, sizeof(real))
    VIEW(dx, to, p.n, p.c, p.s, sizeof(real))
    VIEW(da, also, p.n, p.c, p.s, sizeof(real))
    VIEW(partial, aligned, p.chunks, 4, p.c, sizeof(double))
    channels = channels_at(memory.channels, p.c)
    if not p.private:
        prepare_all(a, &p, &channels, <real> 0)

    if p.shared:
        with parallel(num_threads=team):
            run_units(a, x, dy, v, dx, da, &memory, partial, &p, 0, p.units, threadid(), team_size())
    elif team > 1:
        for thread in prange(team, num_threads=team, schedule="static", chunksize=1):
            run_units(a, x, dy, v, dx, da, &memory, partial, &p, p.units * thread // team,
                      p.units * (thread + 1) // team, 0, 1)
    else:
        run_units(a, x, dy, v, dx, da, &memory, partial, &p, 0, p.units, 0, 1)

    if single and output is not NULL and a.n * a.s:  # the normalised value of a single element is beta, whatever it is
        set_zero(a, output)
    free(workspace)
    return BNBP_INTERRUPTED if memory.stopped else BNBP_OK


cdef inline bint is_one_of(const real* output, const real* x, const real* dy, const real* v) noexcept nogil:
    return output == x or output == dy or output == v


cdef void set_zero(const bnbp_arguments* a, real* output) noexcept nogil:
    """One element for each channel."""
    cdef Py_ssize_t pitch = sizeof(real) if a.lengths is NULL else a.output_strides[a.before + a.after], c
    for c in range(a.c):
        memset(<char*> output + c * pitch, 0, sizeof(real))
