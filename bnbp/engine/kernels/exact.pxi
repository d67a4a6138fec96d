# Exact sums: the sums of the chunks, collected without rounding; see exact.h.
#
# A chunk then has elements of one sample only, so its sums do not depend on what else is in the batch. Nor does the exact
# sum depend on the order in which it is collected, or on which process has which samples.

cdef extern from "exact.h" namespace "bnbp::exact" nogil:
    const Py_ssize_t SUM, GRADIENT_ROW, STATISTICS_ROW
    const int SECOND
    void add_exactly "bnbp::exact::add" (int64_t* sum, int64_t* flags, int second, double number)
    void add_statistics(int64_t* row, double mean, double rest, double m2, unsigned long long count)


cdef void collect_exactly(const bnbp_arguments* a, const Plan* p, const double[:, :, ::1]& partial, Py_ssize_t first,
                          Py_ssize_t last, bint is_double) noexcept nogil:
    """Adds the sums of all chunks of the channels [first, last), a few channels at a time: their digits fit L1."""
    cdef int64_t* row
    cdef int64_t* flags
    cdef Py_ssize_t c0, c, chunk
    for c0 in range(first, last, FEW):
        for chunk in range(p.chunks):
            for c in range(c0, min(c0 + FEW, last)):
                if p.operator == TRAINING:
                    # Beside the 24 bits of a float32 element, what its mean rounds off in float64 is nothing.
                    add_statistics(a.exact + c * STATISTICS_ROW, partial[chunk, 0, c],
                                   partial[chunk, 2, c] if is_double else 0.0,
                                   partial[chunk, 1, c] + partial[chunk, 3, c], count_of(p, chunk))
                    continue
                row = a.exact + c * GRADIENT_ROW
                flags = row + GRADIENT_ROW - 1
                add_exactly(row, flags, 0, partial[chunk, 0, c])
                add_exactly(row + SUM, flags, SECOND, partial[chunk, 1, c])
                if is_double:
                    add_exactly(row, flags, 0, partial[chunk, 2, c])
                    add_exactly(row + SUM, flags, SECOND, partial[chunk, 3, c])
