# The table: what the rest of the package calls.

cdef bnbp_status run_typed(const bnbp_arguments* a, Operator operator, void* output) noexcept nogil:
    if not (output or a.addend_delta or a.batch_mean or a.batch_variance or a.gamma_delta or a.beta_delta
            or a.statistics_mean or a.statistics_m2 or a.reduced_delta or a.reduced_product or a.exact):
        return BNBP_OK
    if a.type == BNBP_F32:
        return run(a, operator, <const float*> a.input, <float*> output)
    if a.type == BNBP_F64:
        return run(a, operator, <const double*> a.input, <double*> output)
    if a.type == BNBP_F16:
        return run(a, operator, <const float16*> a.input, <float16*> output)
    return run(a, operator, <const bfloat16*> a.input, <bfloat16*> output)


cdef bnbp_status training(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, TRAINING, a.normalized)


cdef bnbp_status training_backprop(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, BACKPROP, a.input_delta)


cdef bnbp_status inference(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, INFERENCE, a.normalized)


cdef bnbp_status inference_backprop(const bnbp_arguments* a) noexcept nogil:
    return run_typed(a, INFERENCE_BACKPROP, a.input_delta)


cdef int default_team() noexcept nogil:
    cdef int limit = openmp_threads()
    # LLVM's OpenMP makes a negative number of an OMP_NUM_THREADS that is none.
    return limit if 0 < limit < min(kernels_.openmp_num_threads, kernels_.default_num_threads) else (
        kernels_.default_num_threads)


cdef bnbp_kernels kernels_
kernels_.abi = BNBP_KERNELS_ABI
kernels_.isa = BNBP_ISA
kernels_.openmp = BNBP_OPENMP
kernels_.l2_size = 1 << 20
kernels_.default_num_threads = 1
kernels_.openmp_num_threads = 1
kernels_.serial = 0
kernels_.default_team = default_team
kernels_.interrupted = NULL
kernels_.training = training
kernels_.training_backprop = training_backprop
kernels_.inference = inference
kernels_.inference_backprop = inference_backprop

kernels = PyCapsule_New(&kernels_, BNBP_KERNELS_CAPSULE, NULL)
