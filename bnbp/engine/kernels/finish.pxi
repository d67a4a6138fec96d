# Finish: from the sums of the chunks to outputs and coefficients, FEW channels at a time.
#
# What the numbers of a channel round off is carried for float64; for the other types float64 alone is more than
# enough.

cdef struct Totals:        # of FEW channels
    double[8] delta, delta_lo, product, product_lo


cdef inline void get(double* to, const void* vector, Py_ssize_t c, Py_ssize_t count, bnbp_type type, double absent
                     ) noexcept nogil:
    """Elements of a vector of the caller's from `c` on, then zeros; `absent` if there is no vector."""
    cdef Py_ssize_t k
    if vector is NULL:
        for k in range(8):
            to[k] = absent
    elif type == BNBP_F32:
        load_few(to, <const float*> vector + c, count)
    elif type == BNBP_F64:
        load_few(to, <const double*> vector + c, count)
    elif type == BNBP_F16:
        load_few(to, <const float16*> vector + c, count)
    else:
        load_few(to, <const bfloat16*> vector + c, count)


cdef inline void put(void* vector, Py_ssize_t c, Py_ssize_t count, bnbp_type type, const double* numbers
                     ) noexcept nogil:
    """Sets elements of a vector that may be left out, rounding once."""
    if vector is NULL:
        return
    if type == BNBP_F32:
        store_few(<float*> vector + c, numbers, count)
    elif type == BNBP_F64:
        store_few(<double*> vector + c, numbers, count)
    elif type == BNBP_F16:
        store_few(<float16*> vector + c, numbers, count)
    else:
        store_few(<bfloat16*> vector + c, numbers, count)


cdef inline Twofold inverse_std(double variance, double epsilon, real tag) noexcept nogil:
    """1 / sqrt(variance + epsilon); for float64 with what it has rounded off."""
    cdef Twofold r
    if real is double:
        r = inverse_square_root(two_sum(variance, epsilon))
    else:
        r.hi, r.lo = 1.0 / sqrt(variance + epsilon), 0.0
    return r


cdef inline double scale_of(double gamma, Twofold inv_std, real tag) noexcept nogil:
    """gamma * inv_std, rounded once."""
    if real is double:
        return times(inv_std, whole(gamma, 0.0)).hi
    else:
        return gamma * inv_std.hi


cdef inline void add_chunks(Totals* t, const double[:, :, ::1]& partial, Py_ssize_t chunks, Py_ssize_t c,
                            Py_ssize_t count) noexcept nogil:
    """Adds the sums of the chunks in their order."""
    cdef double[8] delta, delta_lo, product, product_lo
    cdef Py_ssize_t k, chunk
    for chunk in range(chunks):
        load_few(delta, &partial[chunk, 0, c], count)
        load_few(product, &partial[chunk, 1, c], count)
        load_few(delta_lo, &partial[chunk, 2, c], count)
        load_few(product_lo, &partial[chunk, 3, c], count)
        if chunk == 0:
            for k in range(8):
                t.delta[k], t.product[k], t.delta_lo[k], t.product_lo[k] = (
                    delta[k], product[k], delta_lo[k], product_lo[k])
        else:
            for k in range(8):
                add(&t.delta[k], &t.delta_lo[k], delta[k], delta_lo[k], 1.0)
                add(&t.product[k], &t.product_lo[k], product[k], product_lo[k], 1.0)


cdef inline void merge_chunks(Totals* t, const double[:, :, ::1]& partial, const Plan* p, Py_ssize_t c,
                              Py_ssize_t count) noexcept nogil:
    """Merges the statistics of the chunks, mean and m2, in their order.

    Chan, Golub and LeVeque: means move towards each other, and the squares grow by what lay between them.
    """
    cdef double[8] mean, mean_lo, m2, m2_lo
    cdef Py_ssize_t k, chunk
    cdef double elements = 0, more, between, share
    cdef Twofold step
    for chunk in range(p.chunks):
        more = count_of(p, chunk)
        share = more / (elements + more)
        load_few(mean, &partial[chunk, 0, c], count)
        load_few(m2, &partial[chunk, 1, c], count)
        load_few(mean_lo, &partial[chunk, 2, c], count)
        load_few(m2_lo, &partial[chunk, 3, c], count)
        if chunk == 0:
            for k in range(8):
                t.delta[k], t.product[k], t.delta_lo[k], t.product_lo[k] = mean[k], 0.0, mean_lo[k], 0.0
        for k in range(8):
            step = two_sum(mean[k], -t.delta[k])
            between = step.hi + (step.lo + (mean_lo[k] - t.delta_lo[k]))
            add(&t.delta[k], &t.delta_lo[k], between * share, 0.0, 1.0)
            add(&t.product[k], &t.product_lo[k], m2[k], m2_lo[k], 1.0)
            add(&t.product[k], &t.product_lo[k], between * between * share * elements, 0.0, 1.0)
        elements += more


cdef inline void set_coefficients(const Channels* ch, Py_ssize_t c, Py_ssize_t count, const double* a, const double* b,
                                  const double* d0, const double* d1, real tag) noexcept nogil:
    """Sets a, b, c and d of some channels."""
    store_few(ch.wide[0] + c, a, count)
    store_few(ch.wide[1] + c, b, count)
    store_few(ch.wide[2] + c, d0, count)
    store_few(ch.wide[3] + c, d1, count)
    if real is not double:
        store_few(ch.narrow[0] + c, a, count)
        store_few(ch.narrow[1] + c, b, count)
        store_few(ch.narrow[2] + c, d0, count)
        store_few(ch.narrow[3] + c, d1, count)
        all_in_range(ch.in_range + c, a, b, d0, d1, count)


cdef inline void normalize_with(const bnbp_arguments* a, const Channels* ch, Py_ssize_t c, Py_ssize_t count,
                                const double* mean, const double* mean_lo, const double* scale, real tag
                                ) noexcept nogil:
    """The mean is subtracted in two steps, so that a float32 difference keeps what the mean has beyond float32."""
    cdef double[8] hi, lo, beta
    cdef Py_ssize_t k
    get(beta, a.beta, c, count, a.parameter_type, 0.0)
    for k in range(8):
        hi[k] = mean[k] if real is double else <float> mean[k]
        lo[k] = (mean[k] - hi[k]) + mean_lo[k] if hi[k] - hi[k] == 0 else 0.0
    set_coefficients(ch, c, count, hi, lo, scale, beta, tag)


cdef inline void rounded(double* numbers, bnbp_type type) noexcept nogil:
    """Rounds FEW numbers to a type, as an output of it would be."""
    cdef double[8] memory
    put(memory, 0, 8, type, numbers)
    get(numbers, memory, 0, 8, type, 0.0)


cdef void prepare(const bnbp_arguments* a, const Plan* p, const Channels* ch, real tag) noexcept nogil:
    """Sets what `reduce` subtracts from the elements of the channels, and the bounds of the activation."""
    cdef double[8] mean, gamma, variance, scale, zero
    cdef Py_ssize_t c, k, count
    for k in range(8):
        zero[k] = 0.0
    for c in range(0, p.c, 8):
        count = min(p.c - c, FEW)
        get(mean, a.mean, c, count, a.parameter_type, 0.0)
        store_few(ch.mean + c, mean, count)
        if p.masked and a.forward_output is NULL:
            get(gamma, a.gamma, c, count, a.parameter_type, 1.0)
            get(variance, a.variance, c, count, a.parameter_type, 1.0)
            for k in range(8):
                scale[k] = scale_of(gamma[k], inverse_std(variance[k], a.epsilon, tag), tag)
            normalize_with(a, ch, c, count, mean, zero, scale, tag)
            set_edges(a, ch, c, count, tag)
        elif p.masked:
            set_bounds(ch, c, count, 0.0, 6.0 if a.activation == BNBP_RELU6 else NAN, tag)
        elif p.extras & CLAMPS:
            set_bounds(ch, c, count, 0.0, 6.0 if a.activation == BNBP_RELU6 else INFINITY, tag)


cdef inline void finish_training(const bnbp_arguments* a, const Plan* p, const Channels* ch,
                                 const double[:, :, ::1]& partial, Py_ssize_t c, Py_ssize_t count, bint writes,
                                 real tag) noexcept nogil:
    """A few channels of the forward operator: mean, variance, and what `apply` normalises with."""
    cdef Totals t
    cdef double[8] mean, mean_lo, variance, m2, gamma, scale
    cdef Twofold total
    cdef double m = a.count
    cdef Py_ssize_t k
    if p.reduces:
        merge_chunks(&t, partial, p, c, count)
    if not p.reduces or m == 0:  # the mean of nothing
        for k in range(8):
            t.delta[k] = t.product[k] = t.product_lo[k] = t.delta_lo[k] = 0.0
    get(gamma, a.gamma, c, count, a.parameter_type, 1.0)
    for k in range(8):
        total = whole(t.delta[k], t.delta_lo[k])
        mean[k], mean_lo[k] = total.hi if m else NAN, total.lo
        m2[k] = max(t.product[k] + t.product_lo[k], 0.0)
        variance[k] = m2[k] / m
    if a.activation != BNBP_IDENTITY:  # the gradient knows the output from the statistics as they are returned
        rounded(mean, a.parameter_type)
        rounded(variance, a.parameter_type)
        for k in range(8):
            mean_lo[k] = 0.0
    for k in range(8):
        scale[k] = scale_of(gamma[k], inverse_std(variance[k], a.epsilon, tag), tag)
    if writes:
        put(a.batch_mean, c, count, a.parameter_type, mean)
        put(a.batch_variance, c, count, a.parameter_type, variance)
        put(a.statistics_mean, c, count, BNBP_F64, mean)
        put(a.statistics_m2, c, count, BNBP_F64, m2)
    normalize_with(a, ch, c, count, mean, mean_lo, scale, tag)


cdef inline void finish_gradient(const bnbp_arguments* a, const Plan* p, const Channels* ch,
                                 const double[:, :, ::1]& partial, Py_ssize_t c, Py_ssize_t count, bint writes,
                                 real tag) noexcept nogil:
    """A few channels of a gradient, or of the operator that normalises with given statistics."""
    cdef Totals t
    cdef double[8] mean, gamma, variance, zero, delta, product, gamma_delta, slope, scale, share
    cdef Twofold delta_sum, product_sum, inv_std
    cdef double m = a.count, per_element = 1.0 / m
    cdef Py_ssize_t k
    for k in range(8):
        zero[k] = t.delta[k] = t.delta_lo[k] = t.product[k] = t.product_lo[k] = 0.0
    if p.reduces:
        add_chunks(&t, partial, p.chunks, c, count)
    get(mean, a.mean, c, count, a.parameter_type, 0.0)
    get(gamma, a.gamma, c, count, a.parameter_type, 1.0)
    get(variance, a.variance, c, count, a.parameter_type, 1.0)
    if a.delta_sum is not NULL:
        get(t.delta, a.delta_sum, c, count, BNBP_F64, 0.0)
        get(t.product, a.delta_centered_sum, c, count, BNBP_F64, 0.0)
    for k in range(8):
        delta_sum, product_sum = whole(t.delta[k], t.delta_lo[k]), whole(t.product[k], t.product_lo[k])
        delta[k], product[k] = delta_sum.hi, product_sum.hi
        t.delta_lo[k], t.product_lo[k] = delta_sum.lo, product_sum.lo
    if writes:
        put(a.reduced_delta, c, count, BNBP_F64, delta)
        put(a.reduced_product, c, count, BNBP_F64, product)
    for k in range(8):
        inv_std = inverse_std(variance[k], a.epsilon, tag)
        scale[k] = scale_of(gamma[k], inv_std, tag)
        product_sum.hi, product_sum.lo = product[k], t.product_lo[k]
        delta_sum.hi, delta_sum.lo = delta[k], t.delta_lo[k]
        if real is double:
            product_sum = times(product_sum, inv_std)
            slope[k] = over(times(product_sum, inv_std), m).hi
            share[k] = over(delta_sum, m).hi
        else:
            product_sum.hi = product_sum.hi * inv_std.hi
            slope[k] = product_sum.hi * inv_std.hi * per_element
            share[k] = delta_sum.hi * per_element
        gamma_delta[k] = product_sum.hi
    if m == 0:  # the sum of nothing is 0, even where inv_std is infinite
        for k in range(8):
            gamma_delta[k] = gamma_delta[k] if product[k] else 0.0
    if writes:
        put(a.gamma_delta, c, count, a.parameter_type, gamma_delta)
        put(a.beta_delta, c, count, a.parameter_type, delta)
    if p.operator == BACKPROP:
        set_coefficients(ch, c, count, share, mean, slope, scale, tag)
    elif p.operator == INFERENCE:
        normalize_with(a, ch, c, count, mean, zero, scale, tag)
    else:  # dx = (dy - 0) scale + -0: adding -0 changes no number, not even the sign of a zero
        for k in range(8):
            share[k] = -0.0
        set_coefficients(ch, c, count, zero, zero, scale, share, tag)


cdef void finish(const bnbp_arguments* a, const Plan* p, const Channels* ch, const double[:, :, ::1]& partial,
                 Py_ssize_t first, Py_ssize_t last, bint writes, real tag) noexcept nogil:
    """The channels [first, last): prepare `apply`, and write their outputs."""
    cdef Py_ssize_t c
    for c in range(first, last, 8):
        if p.operator == TRAINING:
            finish_training(a, p, ch, partial, c, min(last - c, FEW), writes, tag)
        else:
            finish_gradient(a, p, ch, partial, c, min(last - c, FEW), writes, tag)
