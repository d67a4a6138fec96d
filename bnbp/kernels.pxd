"""The C function table for Cython callers: plain structures, as bnbp/kernels.h declares them."""

cdef extern from "bnbp/kernels.h" nogil:
    const int BNBP_KERNELS_ABI
    const char *BNBP_KERNELS_CAPSULE

    ctypedef enum bnbp_type:
        BNBP_F32
        BNBP_F64

    ctypedef enum bnbp_status:
        BNBP_OK
        BNBP_NO_MEMORY

    ctypedef struct bnbp_arguments:
        bnbp_type type
        Py_ssize_t n
        Py_ssize_t c
        Py_ssize_t s
        double epsilon
        int num_threads
        const void *input
        const void *gamma
        const void *beta
        const void *mean
        const void *variance
        const void *normalized_delta
        void *normalized
        void *batch_mean
        void *batch_variance
        void *input_delta
        void *gamma_delta
        void *beta_delta

    ctypedef bnbp_status (*bnbp_kernel)(const bnbp_arguments *arguments) noexcept nogil

    ctypedef struct bnbp_kernels:
        int abi
        const char *isa
        Py_ssize_t l2_size
        int openmp
        int default_num_threads
        int region_entered
        int serial
        bnbp_kernel training
        bnbp_kernel training_backprop
        bnbp_kernel inference
        bnbp_kernel inference_backprop
