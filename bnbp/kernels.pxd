"""The C function table for Cython callers: plain structures, as bnbp/kernels.h declares them."""

from libc.stdint cimport int64_t

cdef extern from "bnbp/kernels.h" nogil:
    const int BNBP_KERNELS_ABI
    const char *BNBP_KERNELS_CAPSULE

    ctypedef enum bnbp_type:
        BNBP_F32
        BNBP_F64
        BNBP_F16
        BNBP_BF16

    ctypedef enum bnbp_activation:
        BNBP_IDENTITY
        BNBP_RELU
        BNBP_RELU6

    ctypedef enum bnbp_status:
        BNBP_OK
        BNBP_NO_MEMORY
        BNBP_INTERRUPTED

    ctypedef struct bnbp_arguments:
        bnbp_type type
        bnbp_type parameter_type
        Py_ssize_t n
        Py_ssize_t c
        Py_ssize_t s
        int before
        int after
        const Py_ssize_t *lengths
        const Py_ssize_t *input_strides
        const Py_ssize_t *normalized_delta_strides
        const Py_ssize_t *third_strides
        const Py_ssize_t *output_strides
        const Py_ssize_t *addend_delta_strides
        bnbp_activation activation
        double epsilon
        double count
        int num_threads
        const void *input
        const void *gamma
        const void *beta
        const void *mean
        const void *variance
        const void *normalized_delta
        const void *addend
        const void *forward_output
        const void *delta_sum
        const void *delta_centered_sum
        void *normalized
        void *batch_mean
        void *batch_variance
        void *input_delta
        void *addend_delta
        void *gamma_delta
        void *beta_delta
        void *statistics_mean
        void *statistics_m2
        void *reduced_delta
        void *reduced_product
        Py_ssize_t samples
        int64_t *exact

    ctypedef bnbp_status (*bnbp_kernel)(const bnbp_arguments *arguments) noexcept nogil

    ctypedef struct bnbp_kernels:
        int abi
        const char *isa
        Py_ssize_t l2_size
        int openmp
        int default_num_threads
        int openmp_num_threads
        int serial
        int (*default_team)() noexcept nogil
        int (*interrupted)() noexcept nogil
        bnbp_kernel training
        bnbp_kernel training_backprop
        bnbp_kernel inference
        bnbp_kernel inference_backprop
