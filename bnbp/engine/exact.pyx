"""Exact sums after they are collected: how they are kept, merged, and rounded. The digits are those of kernels/exact.h.

The kernels add to a row of 64-bit digits for each channel. What is kept of it are balanced digits of 32 bits, those of
all channels from the first that is not 0 in any of them to the last: a pair `(first, digits)`, where `digits` has the
shape (C, W). Two pairs of the same numbers are the same, however these were collected.
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t
from libcpp.vector cimport vector


cdef extern from "exact.h" namespace "bnbp::exact" nogil:
    const int POINT

    cppclass Row:
        Py_ssize_t first_low
        Py_ssize_t first_count
        Py_ssize_t second_low
        Py_ssize_t second_count
        Py_ssize_t size()

    Row row_of(bint statistics, bint wide)
    void settle(int64_t* digits, Py_ssize_t count, Py_ssize_t& low, Py_ssize_t& high)
    double nearest(int64_t* digits, Py_ssize_t count, int exponent)
    double special_number "bnbp::exact::special" (int64_t flags)
    void round_statistics_of "bnbp::exact::round_statistics" (
        const int32_t* sum, Py_ssize_t sums, Py_ssize_t first_of_sum, const int32_t* squares,
        Py_ssize_t count_of_squares, Py_ssize_t first_of_squares, int64_t count, vector[int64_t]& work, double& mean,
        double& m2)


def blank(Py_ssize_t channels, bint statistics, bint wide):
    """Rows of digits to collect in, wide ones for float64: shape (C, ...)."""
    return np.zeros((channels, row_of(statistics, wide).size()), np.int64)


def split(int64_t[:, ::1] rows, bint statistics, bint wide):
    """The two sums of the rows, as pairs, and the flags of the channels, or None. The rows are used up."""
    cdef Row row = row_of(statistics, wide)
    cdef Py_ssize_t last = rows.shape[1] - 1, c, any_flag = 0
    for c in range(rows.shape[0]):
        any_flag |= rows[c, last] != 0
    flags = np.asarray(rows)[:, last].astype(np.uint8) if any_flag else None
    first, of_first = packed(rows, 0, row.first_count)
    second, of_second = packed(rows, row.first_count, row.second_count)
    return (
        (first + row.first_low if of_first.shape[1] else 0, of_first),
        (second + row.second_low if of_second.shape[1] else 0, of_second),
        flags,
    )


cdef tuple packed(int64_t[:, ::1] rows, Py_ssize_t begin, Py_ssize_t count):
    """Some columns, settled, as a pair."""
    cdef Py_ssize_t low = count, high = 0, c, k
    cdef int32_t[:, ::1] digits
    with nogil:
        for c in range(rows.shape[0]):
            settle(&rows[c, begin], count, low, high)
    result = np.empty((rows.shape[0], max(high - low, 0)), np.int32)
    digits = result
    for c in range(digits.shape[0]):
        for k in range(digits.shape[1]):
            digits[c, k] = <int32_t> rows[c, begin + low + k]
    return (low if high else 0), result


def merge(list pairs):
    """The sum of some pairs of the same number of channels."""
    cdef Py_ssize_t low = 1 << 30, high = 0, first, c, k
    cdef const int32_t[:, ::1] digits
    cdef int64_t[:, ::1] rows
    for first, digits in pairs:
        if digits.shape[1]:
            low, high = min(low, first), max(high, first + digits.shape[1])
    low = min(low, high)
    # Two digits for what is carried.
    rows = np.zeros((pairs[0][1].shape[0], high - low + 2), np.int64)
    for first, digits in pairs:
        for c in range(digits.shape[0]):
            for k in range(digits.shape[1]):
                rows[c, first - low + k] += digits[c, k]
    first, result = packed(rows, 0, rows.shape[1])
    return (first + low if result.shape[1] else 0), result


def round_sum(Py_ssize_t first, const int32_t[:, ::1] digits):
    """The sums, rounded once: float64, shape (C,)."""
    result = np.zeros(digits.shape[0])
    cdef double[::1] sums = result
    cdef vector[int64_t] work
    cdef Py_ssize_t c, k
    work.resize(digits.shape[1] + 1)
    for c in range(digits.shape[0]):
        for k in range(digits.shape[1]):
            work[k] = digits[c, k]
        sums[c] = nearest(work.data(), digits.shape[1], <int> (32 * first) - POINT)
    return result


def round_statistics(Py_ssize_t first, const int32_t[:, ::1] digits, Py_ssize_t first_of_squares,
                     const int32_t[:, ::1] squares, int64_t count):
    """Mean and m2 of `count` elements from their sum and that of their squares: float64, shape (C,), rounded once."""
    mean, m2 = np.empty(digits.shape[0]), np.empty(digits.shape[0])
    cdef double[::1] means = mean, m2s = m2
    cdef vector[int64_t] work
    cdef const int32_t* a = NULL
    cdef const int32_t* b = NULL
    cdef Py_ssize_t c
    for c in range(digits.shape[0]):
        a = &digits[c, 0] if digits.shape[1] else NULL
        b = &squares[c, 0] if squares.shape[1] else NULL
        round_statistics_of(a, digits.shape[1], first, b, squares.shape[1], first_of_squares, count, work, means[c],
                            m2s[c])
    return mean, m2


def special(int flags):
    """What stands for the sum of a channel with these flags, the three lowest ones."""
    return special_number(flags)
