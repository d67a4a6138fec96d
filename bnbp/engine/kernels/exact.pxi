# Exact sums: the sums of the chunks, collected without rounding; see exact.h.
#
# A chunk then has elements of one sample only, so its sums do not depend on what else is in the batch. The exact sum
# does not depend on the order in which it is collected, nor on which process has which samples.
#
# To take a number apart into digits costs some 10 ns. So the sums of many chunks are first added as three numbers, each
# of which takes what the one before it has rounded off. Where the third one rounds off something as well, the channel's
# chunks are added to the digits one by one. Both ways are exact, and lead to the same digits.

cdef extern from "exact.h" namespace "bnbp::exact" nogil:
    const int SECOND, POINT

    cppclass Row:
        pass

    struct Digits:
        int64_t* first
        int64_t* second
        int64_t* flags

    Row row_of(bint statistics, bint wide)
    Digits digits_of(int64_t* rows, const Row& row, Py_ssize_t channel)
    void add_sums(const Digits& to, double delta, double delta_lo, double product, double product_lo)
    void add_statistics(const Digits& to, double mean, double rest, double m2, unsigned long long count)
    void add_three(int64_t* sum, int64_t* flags, int second, const double* first, const double* middle,
                   const double* last, unsigned long long times)


cdef struct Three:         # exact sums of FEW channels, as long as `lost` is 0
    double[8] first, middle, last, lost


cdef inline void clear_three(Three* t) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(8):
        t.first[k] = t.middle[k] = t.last[k] = t.lost[k] = 0.0


cdef inline void add_to_three(Three* t, const double* numbers) noexcept nogil:
    cdef double a, b, total, back
    cdef Py_ssize_t k
    for k in range(8):
        a = numbers[k]
        total = t.first[k] + a
        back = total - t.first[k]
        b = (t.first[k] - (total - back)) + (a - back)
        t.first[k] = total
        total = t.middle[k] + b
        back = total - t.middle[k]
        a = (t.middle[k] - (total - back)) + (b - back)
        t.middle[k] = total
        total = t.last[k] + a
        back = total - t.last[k]
        t.lost[k] += abs((t.last[k] - (total - back)) + (a - back))
        t.last[k] = total


cdef inline void add_products_to_three(Three* t, const double* a, const double* b) noexcept nogil:
    """Adds products with what they round off, which is a number unless they are next to nothing."""
    cdef double[8] product, rounded_off
    cdef double smaller
    cdef Py_ssize_t k
    for k in range(8):
        product[k] = a[k] * b[k]
    for k in range(8):
        rounded_off[k] = product_error(a[k], b[k], product[k])
    for k in range(8):
        smaller = abs(a[k]) if abs(a[k]) < abs(b[k]) else abs(b[k])  # 0 is the one whose product is exact
        t.lost[k] += smaller if abs(product[k]) < 1e-250 else 0.0
    add_to_three(t, product)
    add_to_three(t, rounded_off)


cdef void collect_sums(int64_t* rows, bint wide, const Plan* p, const double[:, :, ::1]& partial, Py_ssize_t c0,
                       Py_ssize_t count) noexcept nogil:
    """The gradient's sums, of up to FEW channels."""
    cdef Three[2] sums
    cdef double[8] numbers
    cdef Digits to
    cdef Py_ssize_t k, chunk, row
    for row in range(2):
        clear_three(&sums[row])
    for chunk in range(p.chunks):
        for row in range(4 if wide else 2):
            load_few(numbers, &partial[chunk, row, c0], count)
            add_to_three(&sums[row % 2], numbers)
    for k in range(count):
        to = digits_of(rows, row_of(False, wide), c0 + k)
        if sums[0].lost[k] + sums[1].lost[k] == 0:
            add_three(to.first, to.flags, 0, &sums[0].first[k], &sums[0].middle[k], &sums[0].last[k], 1)
            add_three(to.second, to.flags, SECOND, &sums[1].first[k], &sums[1].middle[k], &sums[1].last[k], 1)
            continue
        for chunk in range(p.chunks):
            add_sums(to, partial[chunk, 0, c0 + k], partial[chunk, 2, c0 + k] if wide else 0.0,
                     partial[chunk, 1, c0 + k], partial[chunk, 3, c0 + k] if wide else 0.0)


cdef void collect_statistics(int64_t* rows, bint wide, const Plan* p, const double[:, :, ::1]& partial, Py_ssize_t c0,
                             Py_ssize_t count) noexcept nogil:
    """Mean and m2 of the chunks, of up to FEW channels. Those of as many elements are collected together."""
    cdef Three of_mean, of_squares, of_m2
    cdef double[8] mean, rest, twice, m2
    cdef Digits to
    cdef Py_ssize_t k, chunk = 0, again, first, elements
    cdef bint alike = p.chunks * p.sample_rows == p.n and p.per_run == 1
    while chunk < p.chunks:
        first, elements = chunk, count_of(p, chunk)
        clear_three(&of_mean)
        clear_three(&of_squares)
        clear_three(&of_m2)
        while chunk < p.chunks and (alike or count_of(p, chunk) == elements):
            load_few(mean, &partial[chunk, 0, c0], count)
            load_few(m2, &partial[chunk, 3, c0], count)
            add_to_three(&of_mean, mean)
            add_products_to_three(&of_squares, mean, mean)
            if elements > 1:
                add_to_three(&of_m2, m2)
            if wide:  # beside the 24 bits of a float32 element, what its mean rounds off in float64 is nothing
                load_few(rest, &partial[chunk, 2, c0], count)
                for k in range(8):
                    twice[k] = 2 * mean[k]
                add_to_three(&of_mean, rest)
                add_products_to_three(&of_squares, twice, rest)
                add_products_to_three(&of_squares, rest, rest)
            chunk += 1
        for k in range(count):
            to = digits_of(rows, row_of(True, wide), c0 + k)
            if of_mean.lost[k] + of_squares.lost[k] + of_m2.lost[k] == 0:
                add_three(to.first, to.flags, 0, &of_mean.first[k], &of_mean.middle[k], &of_mean.last[k], elements)
                add_three(to.second + POINT // 32, to.flags, SECOND, &of_squares.first[k], &of_squares.middle[k],
                          &of_squares.last[k], elements)
                add_three(to.second + POINT // 32, to.flags, SECOND, &of_m2.first[k], &of_m2.middle[k],
                          &of_m2.last[k], 1)
                continue
            for again in range(first, chunk):
                add_statistics(to, partial[again, 0, c0 + k], partial[again, 2, c0 + k] if wide else 0.0,
                               partial[again, 3, c0 + k], elements)


cdef void collect_exactly(const bnbp_arguments* a, const Plan* p, const double[:, :, ::1]& partial, Py_ssize_t first,
                          Py_ssize_t last, bint wide) noexcept nogil:
    """Adds the sums of all chunks of the channels [first, last)."""
    cdef Py_ssize_t c
    for c in range(first, last, 8):
        if p.operator == TRAINING:
            collect_statistics(a.exact, wide, p, partial, c, min(last - c, FEW))
        else:
            collect_sums(a.exact, wide, p, partial, c, min(last - c, FEW))
