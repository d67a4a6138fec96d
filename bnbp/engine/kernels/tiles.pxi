# Tiles: tensors that are not dense in the order of the input's memory.
#
# A task gathers its chunk of all of them, of as many channels as leave room in L2, runs the same kernels on the
# copies, and scatters the result. Chunks and their order are those of dense tensors, and so are the bits. Nothing is
# streamed, and both passes gather; nothing is ever copied as a whole.

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


cdef void tile_task(const bnbp_arguments* a, real* scratch, void* output, const Channels* channels,
                    double[:, :, ::1]& partial, const Plan* p, Py_ssize_t index, bint reduces) noexcept nogil:
    """Reduces a chunk of some channels, or applies to it: in a copy that is no larger, as a batch of its own."""
    cdef Plan q = p[0]
    cdef Tile t
    cdef Py_ssize_t segments = (p.c + p.width - 1) // p.width, chunk = index // segments
    cdef bint forward = p.operator == TRAINING or p.operator == INFERENCE
    cdef bint from_dy = p.operator == INFERENCE_BACKPROP and not reduces
    cdef bint from_x = not from_dy or (p.masked and not p.third), from_third = p.third and not (forward and reduces)
    cdef const real[:, :, ::1] x = None, dy = None, v = None
    cdef double[:, :, ::1] sums = None
    cdef Channels own
    cdef real* second
    cdef real* third
    t.n0, t.s0 = first_row(p, chunk), chunk % p.per_run * p.length
    t.rows = rows_of(p, chunk)
    t.length = min(p.length, p.s - t.s0) if p.runs else p.s
    t.c0 = index % segments * p.width
    t.width = min(p.width, p.c - t.c0)
    q.n, q.c, q.s = q.chunk_rows, q.unit, q.length = t.rows, t.width, t.length
    q.sample_rows = t.rows
    q.width = t.width
    q.chunks = q.per_run = q.units = 1
    q.far = q.streams = q.fused = q.tiled = False

    second = scratch + t.rows * t.width * t.length
    third = second + t.rows * t.width * t.length if p.third else scratch
    if from_x:
        move_tile(scratch, <void*> a.input, a.input_strides, a, &t, True)
    if not forward:
        move_tile(second, <void*> a.normalized_delta, a.normalized_delta_strides, a, &t, True)
    if from_third:
        move_tile(third, <void*> (a.addend if forward else a.forward_output), a.third_strides, a, &t, True)
    VIEW(x, scratch, t.rows, t.width, t.length, sizeof(real))
    VIEW(dy, scratch if forward else second, t.rows, t.width, t.length, sizeof(real))
    VIEW(v, third, t.rows, t.width, t.length, sizeof(real))
    own = channels_from(channels, t.c0)
    if reduces:
        VIEW(sums, &partial[chunk, 0, t.c0], 1, 4, p.c, sizeof(double))
        if p.runs:
            reduce_runs(x, dy, v, &own, sums, &q, 0, 0, t.width)
        else:
            reduce_task(x, dy, v, &own, sums, &q, task_of(&q, 0, t.width, 0))
        return
    if p.runs:
        apply_runs(x, dy, v, x, dy, &own, &q, 0, 0, t.width, False, False)
    else:
        apply_task(dy if from_dy else x, dy, v, x, dy, &own, &q, task_of(&q, 0, t.width, 0), p.operator != BACKPROP)
    if output is not NULL:
        move_tile(<real*> &x[0, 0, 0], output, a.output_strides, a, &t, False)
    if p.extras & RETURNS:
        move_tile(<real*> &dy[0, 0, 0], a.addend_delta, a.addend_delta_strides, a, &t, False)
