# Edges: from which inputs on the activation is flat.
#
# The forward output of a channel is monotone in its input, in floating point as well: every operation rounds to the
# nearest number, and a nearest number never overtakes another one. So the gradient of a channel passes between two
# inputs, and to compare with these takes the place of computing the output again. They are found by bisection over the
# numbers of the input's type, with the forward operator's own arithmetic. Nearly always a guess is off by less than two
# numbers, so that three outputs, which are computed side by side, confirm it.
#
# An edge that there is not is NaN, of which no comparison is true. Only an infinite input in a channel of scale 0 has
# no place in this: its output is NaN, and it counts as all numbers do there.

cdef extern from "numbers.h" nogil:
    void numbers_at[R](double* to, const long long* places, R tag)
    void places_of[R](long long* to, const double* numbers, R tag)
    long long place_of[R](double number, R tag)


cdef struct Coefficients:  # of FEW channels of the forward operator
    double[4][8] wide
    float[4][8] narrow
    long long[8] in_range


cdef inline void set_bounds(const Channels* ch, Py_ssize_t c, Py_ssize_t count, double low, double high, real tag
                            ) noexcept nogil:
    """The same bounds for some channels."""
    cdef Py_ssize_t k
    for k in range(c, c + count):
        ch.wide[LOW][k], ch.wide[HIGH][k] = low, high
        if real is not double:
            ch.narrow[LOW][k], ch.narrow[HIGH][k] = <float> low, <float> high


cdef inline void outputs_at(double* y, const double* x, const Coefficients* k, real tag) noexcept nogil:
    """The forward operator's output for an input of each of FEW channels, rounded to the type of the data."""
    cdef Py_ssize_t q
    cdef real[8] memory
    cdef float[8] narrow
    for q in range(8):
        y[q] = ((x[q] - k.wide[0][q]) - k.wide[1][q]) * k.wide[2][q] + k.wide[3][q]
    if real is not double:
        for q in range(8):
            narrow[q] = ((<float> x[q] - k.narrow[0][q]) - k.narrow[1][q]) * k.narrow[2][q] + k.narrow[3][q]
        for q in range(8):
            y[q] = narrow[q] if k.in_range[q] else y[q]
        store_few(memory, y, 8)
        load_few(y, memory, 8)


cdef inline void guess(double* x, const Coefficients* k, double level, bint reaches, const double* sign, real tag
                       ) noexcept nogil:
    """The last inputs before the output is above the level, or `reaches` it, but for the last rounding.

    The difference from the mean is found to the last bit, because it is rounded too: all inputs up to half way to the
    next difference have the same one. A number and 0.74 * 2^-23 of it round to the next number.
    """
    cdef Py_ssize_t q
    cdef double[8] difference
    cdef float here, up, down, size, above, at, d, last
    if reaches:  # what is half a unit in the last place of 6 below rounds to it
        level -= 0.015625 if real is bfloat16 else 0.001953125 if real is float16 else (
            2.384185791015625e-07 if real is float else 4.440892098500626e-16)
    last = <float> level
    for q in range(8):
        difference[q] = (level - k.wide[3][q]) / (sign[q] * k.wide[2][q])
    if real is not double:
        for q in range(8):
            size, d = <float> sign[q] * k.narrow[2][q], k.narrow[3][q]
            here = <float> difference[q]
            up, down = here + abs(here) * <float> 8.82e-8, here - abs(here) * <float> 8.82e-8
            above, at = up * size + d, here * size + d
            here = up if (above < last if reaches else above <= last) else (
                here if (at < last if reaches else at <= last) else down)
            up = here + abs(here) * <float> 8.82e-8
            difference[q] = 0.5 * (<double> here + <double> up)
    for q in range(8):
        x[q] = sign[q] * (k.wide[0][q] + k.wide[1][q]) + difference[q]


cdef inline void compare_at(long long* beyond, const long long* places, const Coefficients* k, double level,
                            bint reaches, const double* sign, real tag) noexcept nogil:
    """Whether the output at a place is above the level, or `reaches` it, for each of FEW channels: 1 or 0."""
    cdef double[8] x, y
    cdef Py_ssize_t q
    numbers_at(x, places, tag)
    for q in range(8):
        x[q] = sign[q] * x[q]
    outputs_at(y, x, k, tag)
    for q in range(8):
        beyond[q] = y[q] >= level if reaches else not y[q] <= level


cdef void search_edges(long long* edges, Py_ssize_t count, const Coefficients* k, double level, bint reaches,
                       const double* sign, real tag) noexcept nogil:
    """`find_edges` from a guess that is far off: in growing steps, and when there is a place on either side, halves."""
    cdef long long[8] beyond, probe
    cdef long long least, most, below, above, step, middle
    cdef Py_ssize_t q
    for q in range(8):
        probe[q] = 0
    least, most = place_of(-INFINITY, tag), place_of(INFINITY, tag)
    for q in range(count):
        if k.wide[2][q] == 0:
            continue
        below, above, step = least - 1, most + 1, 1
        probe[q] = min(max(edges[q], least), most)
        while above != below + 1:
            compare_at(beyond, probe, k, level, reaches, sign, tag)
            if beyond[q]:
                above = probe[q]
            else:
                below = probe[q]
            middle = (below >> 1) + (above >> 1) + (below & above & 1)  # their difference may overflow
            if below == least - 1:
                middle = max(above - min(step, above - middle), least)
            elif above == most + 1:
                middle = min(below + min(step, middle - below), most)
            probe[q] = middle
            step = 2 * min(step, <long long> 1 << 61)
        edges[q] = above


cdef inline void find_edges(long long* edges, Py_ssize_t count, const Coefficients* k, double level, bint reaches,
                            const double* sign, real tag) noexcept nogil:
    """For each of FEW channels, the first place from which on the output is above the level, or `reaches` it.

    A place is that of a number in the order of its type. In a channel of negative scale, that of the negated input. One
    of scale 0 has none.
    """
    cdef double[8] x
    cdef long long[8] before, after, beyond_before, beyond, beyond_after
    cdef long long found = 0
    cdef Py_ssize_t q
    guess(x, k, level, reaches, sign, tag)
    places_of(edges, x, tag)
    for q in range(8):
        before[q], after[q] = edges[q] - 1, edges[q] + 1
    compare_at(beyond_before, before, k, level, reaches, sign, tag)
    compare_at(beyond, edges, k, level, reaches, sign, tag)
    compare_at(beyond_after, after, k, level, reaches, sign, tag)
    for q in range(8):
        found += 1 if q >= count or k.wide[2][q] == 0 else beyond_after[q] & ~beyond_before[q]
    if found == 8:
        for q in range(8):
            edges[q] += 1 - beyond[q]
    else:
        search_edges(edges, count, k, level, reaches, sign, tag)


cdef void set_edges(const bnbp_arguments* a, const Channels* ch, Py_ssize_t c, Py_ssize_t count, real tag
                    ) noexcept nogil:
    """The bounds of FEW channels, between which their gradient passes, from the forward operator's coefficients."""
    cdef Coefficients k
    cdef double[8] sign, low, high, zero, y
    cdef long long[8] edges
    cdef Py_ssize_t q
    cdef int field
    for field in range(4):
        load_few(k.wide[field], ch.wide[field] + c, count)
        if real is not double:
            memset(k.narrow[field], 0, sizeof(k.narrow[field]))
            memcpy(k.narrow[field], ch.narrow[field] + c, count * sizeof(float))
    for q in range(8):
        k.in_range[q] = ch.in_range[c + min(q, count - 1)]
        sign[q] = -1.0 if k.wide[2][q] < 0 else 1.0
        high[q], zero[q] = NAN, 0.0
    find_edges(edges, count, &k, 0.0, False, sign, tag)
    for q in range(8):
        edges[q] -= 1
    numbers_at(low, edges, tag)
    if a.activation == BNBP_RELU6:
        find_edges(edges, count, &k, 6.0, True, sign, tag)
        numbers_at(high, edges, tag)
    outputs_at(y, zero, &k, tag)
    for q in range(8):
        if k.wide[2][q] == 0:  # all inputs have the same output
            low[q] = INFINITY if y[q] <= 0 or (a.activation == BNBP_RELU6 and y[q] >= 6) else NAN
            high[q] = NAN
    for q in range(8):
        k.wide[0][q] = low[q] if sign[q] > 0 else -high[q]
        k.wide[1][q] = high[q] if sign[q] > 0 else -low[q]
    store_few(ch.wide[LOW] + c, k.wide[0], count)
    store_few(ch.wide[HIGH] + c, k.wide[1], count)
    if real is not double:
        store_few(ch.narrow[LOW] + c, k.wide[0], count)
        store_few(ch.narrow[HIGH] + c, k.wide[1], count)
