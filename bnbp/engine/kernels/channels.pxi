# The channels: what `finish` leaves of each for the second pass, an array for each field.

cdef struct Channels:
    double* mean           # what reduce subtracts
    double* wide[6]        # a, b, c, d: what apply computes with, see `value`; and two bounds, see edges.pxi
    float* narrow[6]       # the same, rounded; not for float64
    char* in_range         # whether a to d are numbers of full precision in float32


cdef enum:                 # the bounds among the fields
    LOW = 4
    HIGH = 5


cdef inline Py_ssize_t channels_size(Py_ssize_t c) noexcept nogil:
    """Bytes of the arrays for `c` channels, each of whole cache lines."""
    cdef Py_ssize_t padded = (c + 63) // 64 * 64
    return padded * (7 * sizeof(double) + 6 * sizeof(float) + 1)


cdef inline Channels channels_at(char* memory, Py_ssize_t c) noexcept nogil:
    cdef Channels ch
    cdef Py_ssize_t padded = (c + 63) // 64 * 64
    cdef double* wide = <double*> memory
    cdef float* narrow = <float*> (wide + 7 * padded)
    cdef int k
    ch.mean = wide
    for k in range(6):
        ch.wide[k] = wide + (k + 1) * padded
        ch.narrow[k] = narrow + k * padded
    ch.in_range = <char*> (narrow + 6 * padded)
    return ch


cdef inline arith everywhere(const Channels* ch, int k, Py_ssize_t q, arith tag) noexcept nogil:
    """Field `k` of a channel, for LANES of its elements."""
    cdef arith field
    if arith is float_lanes:
        fill(field, ch.narrow[k][q])
    else:
        fill(field, ch.wide[k][q])
    return field


cdef inline arith on_both_sides(const Channels* ch, int k, Py_ssize_t q, Py_ssize_t border, arith tag) noexcept nogil:
    """Field `k` of a channel, and from element `border` on that of the next one."""
    cdef arith field
    if arith is float_lanes:
        join(field, ch.narrow[k][q], ch.narrow[k][q + 1], border)
    else:
        join(field, ch.wide[k][q], ch.wide[k][q + 1], border)
    return field


cdef inline bint are_in_range(const Channels* ch, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    return memchr(ch.in_range + first, 0, last - first) is NULL


cdef inline Channels channels_from(const Channels* channels, Py_ssize_t first) noexcept nogil:
    """The channels from number `first` on."""
    cdef Channels ch = channels[0]
    cdef int k
    ch.mean += first
    ch.in_range += first
    for k in range(6):
        ch.wide[k] += first
        ch.narrow[k] += first
    return ch
