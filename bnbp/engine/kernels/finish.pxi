# Finish: from sums to outputs and coefficients.

cdef inline void set_coefficients(Channel* ch, double a, double b, double c, double d) noexcept nogil:
    ch.a, ch.b, ch.c, ch.d = a, b, c, d
    ch.in_range = in_range(a) and in_range(b) and in_range(c) and in_range(d)


cdef inline void normalize_with(Channel* ch, Twofold mean, double scale, double beta, real tag) noexcept nogil:
    """The mean is subtracted in two steps, so that a float32 difference keeps what the mean has beyond float32."""
    cdef double hi = mean.hi if real is double else <float> mean.hi
    set_coefficients(ch, hi, (mean.hi - hi) + mean.lo, scale, beta)


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


cdef double number(const void* vector, Py_ssize_t c, bnbp_type type, double absent) noexcept nogil:
    """Element `c` of a vector that may be left out."""
    if vector is NULL:
        return absent
    if type == BNBP_F32:
        return (<const float*> vector)[c]
    if type == BNBP_F64:
        return (<const double*> vector)[c]
    if type == BNBP_F16:
        return (<const float16*> vector)[c]
    return (<const bfloat16*> vector)[c]


cdef void put(void* vector, Py_ssize_t c, bnbp_type type, double value) noexcept nogil:
    """Sets element `c` of a vector that may be left out, rounding once."""
    if vector is NULL:
        return
    if type == BNBP_F32:
        (<float*> vector)[c] = <float> value
    elif type == BNBP_F64:
        (<double*> vector)[c] = value
    elif type == BNBP_F16:
        (<float16*> vector)[c] = <float16> value
    else:
        (<bfloat16*> vector)[c] = <bfloat16> value


cdef void combine(
    const Plan* p,
    const double[:, :, ::1]& partial,   # IN  (chunks, C, 4)
    Py_ssize_t c0, Py_ssize_t c1,
    Sums* sums,                         # OUT (c1 - c0)
) noexcept nogil:
    """The sums of a few channels, from those of their chunks in their order; of statistics, mean and m2."""
    cdef const Sums* chunk
    cdef Sums* total
    cdef Twofold step
    cdef double count = 0, more, between, share
    cdef Py_ssize_t k, c
    memset(sums, 0, (c1 - c0) * sizeof(Sums))
    for k in range(p.chunks):
        more = count_of(p, k)
        share = more / (count + more)
        for c in range(c0, c1):
            chunk, total = <const Sums*> &partial[k, c, 0], &sums[c - c0]
            if p.operator != TRAINING:
                add_sums(total, chunk.delta, chunk.delta_lo, chunk.product, chunk.product_lo, <double> 0)
                continue
            # Chan, Golub and LeVeque: means move towards each other, and the squares grow by what lay between them.
            if k == 0:
                total.delta, total.delta_lo = chunk.delta, chunk.delta_lo
            step = two_sum(chunk.delta, -total.delta)
            between = step.hi + (step.lo + (chunk.delta_lo - total.delta_lo))
            add_sums(total, between * share, 0.0, chunk.product, chunk.product_lo, <double> 0)
            add(&total.product, &total.product_lo, between * between * share * count, 0.0)
        count += more


cdef void finish(const bnbp_arguments* a, const Plan* p, Sums sums, Channel* ch, Py_ssize_t c, bint writes, real tag
                 ) noexcept nogil:
    """One channel: prepare `apply`, and write its outputs."""
    cdef Twofold mean, delta, product, inv_std
    cdef bnbp_type type = a.parameter_type
    cdef double m = a.count, scale, m2
    cdef double gamma = number(a.gamma, c, type, 1.0), beta = number(a.beta, c, type, 0.0)
    if p.operator == TRAINING:
        mean = whole(sums.delta, sums.delta_lo)
        m2 = max(sums.product + sums.product_lo, 0.0)
        product = whole(m2 / m, 0.0)
        if m == 0:
            mean.hi = product.hi = NAN  # the mean of nothing
        if writes:
            put(a.batch_mean, c, type, mean.hi)
            put(a.batch_variance, c, type, product.hi)
            put(a.statistics_mean, c, BNBP_F64, mean.hi)
            put(a.statistics_m2, c, BNBP_F64, m2)
        scale = scale_of(gamma, inverse_std(product.hi, a.epsilon, tag), tag)
        normalize_with(ch, mean, scale, beta, tag)
        return

    delta, product = whole(sums.delta, sums.delta_lo), whole(sums.product, sums.product_lo)
    if real is float16:
        if ch.mean - ch.mean == 0:  # sum dy (x - mean) = sum dy (x - center) + (center - mean) sum dy
            product.hi += (center(ch.mean, <real> 0) - ch.mean) * delta.hi
    if a.delta_sum is not NULL:
        delta = whole(number(a.delta_sum, c, BNBP_F64, 0.0), 0.0)
        product = whole(number(a.delta_centered_sum, c, BNBP_F64, 0.0), 0.0)
    if writes:
        put(a.reduced_delta, c, BNBP_F64, delta.hi)
        put(a.reduced_product, c, BNBP_F64, product.hi)
    inv_std = inverse_std(number(a.variance, c, type, 1.0), a.epsilon, tag)
    scale = scale_of(gamma, inv_std, tag)
    if m or product.hi:  # the sum of nothing is 0, even where inv_std is infinite
        product = times(product, inv_std)
    if writes:
        put(a.gamma_delta, c, type, product.hi)
        put(a.beta_delta, c, type, delta.hi)

    mean.hi, mean.lo = ch.mean, 0.0
    if p.operator == BACKPROP:
        set_coefficients(ch, over(delta, m).hi, ch.mean, over(times(product, inv_std), m).hi, scale)
    elif p.operator == INFERENCE:
        normalize_with(ch, mean, scale, beta, tag)
    else:  # dx = (dy - 0) scale + -0: adding -0 changes no number, not even the sign of a zero
        set_coefficients(ch, 0.0, 0.0, scale, -0.0)
