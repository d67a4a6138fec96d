# Edges: from which inputs on the activation is flat.
#
# The forward output of a channel is monotone in its input, in floating point as well: every operation rounds to the
# nearest number, and a nearest number never overtakes another one. So the gradient of a channel passes between two
# inputs, and to compare with these takes the place of computing the output again. They are found by bisection over the
# numbers of the input's type, with the forward operator's own arithmetic: what it computes is asked, not guessed.
#
# An edge that there is not is NaN, which no comparison is true of. Only an infinite input in a channel of scale 0 has no
# place in this: its output is NaN, and it counts as the largest numbers do.

cdef extern from "numbers.h" nogil:
    void numbers_at[R](double* to, const long long* places, R tag)
    long long place_of[R](double number, R tag)


cdef inline void set_bounds(const Channels* ch, Py_ssize_t c, Py_ssize_t count, double low, double high, real tag
                            ) noexcept nogil:
    """The same bounds for some channels."""
    cdef Py_ssize_t k
    for k in range(c, c + count):
        ch.wide[LOW][k], ch.wide[HIGH][k] = low, high
        if real is not double:
            ch.narrow[LOW][k], ch.narrow[HIGH][k] = <float> low, <float> high


cdef inline void outputs_at(double* y, const double* x, const Channels* ch, Py_ssize_t c, real tag) noexcept nogil:
    """The forward operator's output for an input of each of FEW channels, rounded to the type of the data."""
    cdef Py_ssize_t k
    cdef double[8] a, b, scale, d
    cdef real[8] memory
    cdef float f
    for k in range(8):
        y[k] = ((x[k] - ch.wide[0][c + k]) - ch.wide[1][c + k]) * ch.wide[2][c + k] + ch.wide[3][c + k]
        if real is not double:
            f = ((<float> x[k] - ch.narrow[0][c + k]) - ch.narrow[1][c + k]) * ch.narrow[2][c + k] + ch.narrow[3][c + k]
            y[k] = f if ch.in_range[c + k] else y[k]
    if real is not double:
        store_few(memory, y, 8)
        load_few(y, memory, 8)


cdef inline void find_edges(long long* edges, const Channels* ch, Py_ssize_t c, Py_ssize_t count, double level,
                            bint reaches, const double* sign, real tag) noexcept nogil:
    """For each of some channels, the first place from which on the output is above the level, or `reaches` it.

    A place is that of a number in the order of its type. In a channel of negative scale, that of the negated input.
    """
    cdef long long least = place_of(-INFINITY, tag), most = place_of(INFINITY, tag)
    cdef long long[8] below, above, probe, step
    cdef double[8] x, y
    cdef bint done = False
    cdef Py_ssize_t k
    cdef long long middle
    for k in range(8):
        below[k], above[k], step[k] = least - 1, most + 1, 1
        probe[k] = least
        if k < count:
            x[k] = sign[k] * ((ch.wide[0][c + k] + ch.wide[1][c + k]) + (level - ch.wide[3][c + k]) / ch.wide[2][c + k])
            probe[k] = place_of(x[k], tag) if x[k] == x[k] else 0
    while not done:
        numbers_at(x, probe, tag)
        for k in range(8):
            x[k] = sign[k] * x[k]
        outputs_at(y, x, ch, c, tag)
        done = True
        for k in range(8):
            if not y[k] >= level if reaches else y[k] <= level:
                below[k] = probe[k]
            else:
                above[k] = probe[k]
            # From a guess in growing steps, until there is a place on either side; then halfway between them.
            middle = (below[k] >> 1) + (above[k] >> 1) + (below[k] & above[k] & 1)  # their difference may overflow
            probe[k] = middle
            if below[k] == least - 1:
                probe[k] = above[k] - min(step[k], above[k] - middle)
            elif above[k] == most + 1:
                probe[k] = below[k] + min(step[k], middle - below[k])
            step[k] = 2 * min(step[k], <long long> 1 << 61)
            if k < count and above[k] != below[k] + 1:
                done = False
            else:
                probe[k] = min(max(below[k], least), most)
    for k in range(8):
        edges[k] = above[k]


cdef void set_edges(const bnbp_arguments* a, const Channels* ch, Py_ssize_t c, Py_ssize_t count, real tag
                    ) noexcept nogil:
    """The bounds of some channels, between which their gradient passes, from the forward operator's coefficients."""
    cdef double[8] sign, low, high
    cdef long long[8] edges
    cdef Py_ssize_t k
    for k in range(8):
        sign[k] = -1.0 if k < count and ch.wide[2][c + k] < 0 else 1.0
        high[k] = NAN
    find_edges(edges, ch, c, count, 0.0, False, sign, tag)
    for k in range(8):
        edges[k] -= 1
    numbers_at(low, edges, tag)
    if a.activation == BNBP_RELU6:
        find_edges(edges, ch, c, count, 6.0, True, sign, tag)
        numbers_at(high, edges, tag)
    for k in range(count):
        if sign[k] > 0:
            set_bounds(ch, c + k, 1, low[k], high[k], tag)
        else:
            set_bounds(ch, c + k, 1, -high[k], -low[k], tag)
