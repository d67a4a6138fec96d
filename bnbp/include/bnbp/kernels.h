/**
 * \file
 * \brief The C function table of bnbp's compiled kernels.
 *
 * Code that is not Python reaches the kernels through this table. `bnbp.engine.boundary` exports it as a capsule, and
 * the operator classes in batch_norm.hpp call through it. Nothing is checked at this level. The classes do all checks.
 */
#ifndef BNBP_KERNELS_H
#define BNBP_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Version of the structures below. A table of another version is refused at import. */
#define BNBP_KERNELS_ABI 5

/** Name of the capsule that holds a `bnbp_kernels *`. */
#define BNBP_KERNELS_CAPSULE "bnbp.engine.boundary.kernels"

/** The element types the kernels know. */
typedef enum bnbp_type {
    BNBP_F32 = 0, /**< IEEE 754 binary32. */
    BNBP_F64 = 1, /**< IEEE 754 binary64. */
    BNBP_F16 = 2, /**< IEEE 754 binary16. */
    BNBP_BF16 = 3 /**< bfloat16: the first half of a binary32. */
} bnbp_type;

/** The activation that is applied to the output of the forward operator. */
typedef enum bnbp_activation {
    BNBP_IDENTITY = 0, /**< Nothing. */
    BNBP_RELU = 1,     /**< max(y, 0). */
    BNBP_RELU6 = 2     /**< min(max(y, 0), 6). */
} bnbp_activation;

/** What a kernel returns. */
typedef enum bnbp_status {
    BNBP_OK = 0,         /**< Every output that was asked for is written. */
    BNBP_NO_MEMORY = 1,  /**< The workspace could not be allocated; no output was written. */
    BNBP_INTERRUPTED = 2 /**< The table's `interrupted` ended the call; the outputs are partly written. */
} bnbp_status;

/**
 * The operands of one call, under the operator's names.
 *
 * A tensor has the shape (n, c, s): every axis before the channel axis is folded into `n`, and every axis after it into
 * `s`. If `lengths` is null, all tensors are dense and aligned in that order. Otherwise `lengths` has the axes that `n`
 * is the product of, outermost first, and then the axes of `s`, and each tensor has its strides. Strides may have any
 * sign or be 0, and need not be multiples of the element's size. Parameters and statistics are vectors of length `c`.
 *
 * The kernel ignores operands that it does not use. A null `gamma` stands for ones, and a null `beta` for zeros. A null
 * output is not computed. An output of shape (n, c, s) may have exactly the memory of an input of that shape, with the
 * same strides.
 */
typedef struct bnbp_arguments {
    bnbp_type type;                            /**< Element type of the tensors. */
    bnbp_type parameter_type;                  /**< Element type of parameters and statistics. */
    ptrdiff_t n;                               /**< Product of the axes before the channel axis. */
    ptrdiff_t c;                               /**< Number of channels. */
    ptrdiff_t s;                               /**< Product of the axes after the channel axis. */
    int before;                                /**< Number of axes that `n` is the product of. */
    int after;                                 /**< Number of axes that `s` is the product of. */
    const ptrdiff_t* lengths;                  /**< (before + after + 1), the last one `c`; or null */
    const ptrdiff_t* input_strides;            /**< Bytes: (before + after) of the axes, then that of the channels. */
    const ptrdiff_t* normalized_delta_strides; /**< Likewise. */
    const ptrdiff_t* third_strides;            /**< Likewise, of `addend` or `forward_output`. */
    const ptrdiff_t* output_strides;           /**< Likewise, of `normalized` or `input_delta`. */
    const ptrdiff_t* addend_delta_strides;     /**< Likewise. */
    bnbp_activation activation;                /**< What the forward operator applies, and the gradient comes from. */
    double epsilon;                            /**< Added to the variance; finite and >= 0. */
    double count;         /**< Elements of a channel: n * s, or those of the whole batch that this is a part of. */
    int num_threads;      /**< Upper limit of the team's size; 0 stands for the table's `default_team`. */
    const void* input;    /**< (n, c, s) */
    const void* gamma;    /**< (c), or null */
    const void* beta;     /**< (c), or null */
    const void* mean;     /**< (c) */
    const void* variance; /**< (c) */
    const void* normalized_delta; /**< (n, c, s) */
    const void* addend;           /**< (n, c, s), or null: added before the activation, by the forward operators */
    const void* forward_output;   /**< (n, c, s), or null: `normalized`, which shows the gradients where the
                                       activation is flat; null: they compute it from `input` */
    const void* delta_sum; /**< (c), binary64: the whole batch's sum of `normalized_delta`; null: to be computed */
    const void* delta_centered_sum; /**< (c), binary64: that of `normalized_delta * (input - mean)` */
    void* normalized;               /**< (n, c, s), or null */
    void* batch_mean;               /**< (c), or null */
    void* batch_variance;           /**< (c), or null */
    void* input_delta;              /**< (n, c, s), or null */
    void* addend_delta;             /**< (n, c, s), or null: `normalized_delta`, 0 where the activation is flat */
    void* gamma_delta;              /**< (c), or null */
    void* beta_delta;               /**< (c), or null */
    void* statistics_mean;          /**< (c), binary64, or null */
    void* statistics_m2;            /**< (c), binary64, or null: sum of the squared deviations from the mean */
    void* reduced_delta;            /**< (c), binary64, or null: `delta_sum` of this batch */
    void* reduced_product;          /**< (c), binary64, or null: its `delta_centered_sum` */
    ptrdiff_t samples;              /**< Whole samples that `n` is made of, outermost; for `exact` */
    int64_t* exact;                 /**< Digits of exact sums, which are added to, or null: of BatchNormTraining's
                                         statistics, or of its gradient's sums */
} bnbp_arguments;

/** An operator's kernel. It needs no GIL and may be called from many threads at once. */
typedef bnbp_status (*bnbp_kernel)(const bnbp_arguments* arguments);

/** The table: which build of the kernels this is, and one kernel for each operator. */
typedef struct bnbp_kernels {
    int abi;                        /**< #BNBP_KERNELS_ABI of the build. */
    const char* isa;                /**< Instruction set that the kernels were compiled for. */
    ptrdiff_t l2_size;              /**< Bytes of one core's L2 cache; set when bnbp is imported. */
    int openmp;                     /**< The compiler's `_OPENMP` (a year and month), 0 for a serial build. */
    int default_num_threads;        /**< Used where a caller asks for 0 threads; set when bnbp is imported. */
    int openmp_num_threads;         /**< OpenMP's own default number of threads; set when bnbp is imported. */
    int serial;                     /**< 1 in a forked child, where a team might wait for threads that are gone. */
    int (*default_team)(void);      /**< Threads of a call that asks for 0: the default, or fewer if
                                         `omp_set_num_threads` has lowered OpenMP's own number. */
    int (*interrupted)(void);       /**< Whether to end a long call; or null. The calling thread asks this from time to
                                         time. */
    bnbp_kernel training;           /**< BatchNormTraining, and its statistics */
    bnbp_kernel training_backprop;  /**< BatchNormTrainingBackprop, and its two halves */
    bnbp_kernel inference;          /**< BatchNormInference */
    bnbp_kernel inference_backprop; /**< The gradient of BatchNormInference. */
} bnbp_kernels;

#ifdef __cplusplus
}
#endif

#endif /* BNBP_KERNELS_H */
