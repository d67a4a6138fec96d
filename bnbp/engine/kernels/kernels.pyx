"""The kernels: `reduce` and `apply` over (N, C, S) memoryviews, and the operators made of them.

This file is the map: what the others share, and then the others in reading order. Each opens with its idea.

a. The view. A dense tensor whose channels are on axis k of its memory *is* an array of shape (N, C, S): N the product
   of the axes before k, S of those after it. NCHW has S = H*W; channels-last has S = 1. A channel's m = N*S elements
   are N contiguous runs of S. All kernels work on `const real[:, :, ::1]`. Tensors of any other layout are gathered a
   tile at a time, see tiles.pxi.

b. Two passes. `reduce` reads the tensors and leaves sums for each channel; `apply` reads them again and writes the
   result, knowing the sums. Between them stands `finish`: a few operations for each channel.

       reduce   delta_sum          = sum dy_i                     beta_delta
                delta_centered_sum = sum dy_i (x_i - mean)        gamma_delta / inv_std
       apply    dx_i = gamma inv_std (dy_i - delta_sum/m - (x_i - mean) inv_std^2 delta_centered_sum/m)

   The forward operator is made of the same two: it reduces x - shift in the place of dy, and applies
   y_i = (x_i - mean) gamma inv_std + beta. Whoever has the tensors in parts takes the sums out after `reduce`, and
   gives those of the whole to `apply`.

   With an activation, dy is 0 in both passes where the forward output is flat: where a third tensor, that output, or x
   itself is beyond one of two bounds, see edges.pxi.

c. Chunks. A channel is cut into chunks, whose sums are written to their own places and combined in the order of the
   chunks. The cut depends on N, C, S and the type alone, so the bits of the result do not depend on the number of
   threads. Within a chunk, the number of accumulators and the order of their sum belong to the algorithm, not to the
   instruction set; what a register holds is a matter of lanes.h. A sum that is put down in memory and taken up again is
   the same sum, so the bits do not depend on how the work is cut up further: into blocks, units or rows.

d. Borrowed views. The kernels are called through a C table with plain pointers and without the GIL, so the views have
   no Python object behind them: `VIEW` fills in address, shape and strides of a view that is None. With
   `initializedcheck` off nothing ever looks at the object.
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY, NAN, sqrt
from libc.stdlib cimport free, malloc
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memchr, memcpy, memset

from bnbp.kernels cimport (
    BNBP_F16,
    BNBP_F32,
    BNBP_F64,
    BNBP_IDENTITY,
    BNBP_INTERRUPTED,
    BNBP_KERNELS_ABI,
    BNBP_KERNELS_CAPSULE,
    BNBP_NO_MEMORY,
    BNBP_OK,
    BNBP_RELU6,
    bnbp_arguments,
    bnbp_kernels,
    bnbp_status,
    bnbp_type,
)

cdef extern from "numbers.h" nogil:
    ctypedef short float16
    ctypedef unsigned short bfloat16

ctypedef fused real:   # the type of the tensors
    float16
    bfloat16
    float
    double

cdef extern from "machine.h" nogil:
    void VIEW(const float16[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const bfloat16[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const float[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void VIEW(const double[:, :, ::1] view, const void* memory, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, size_t size)
    void barrier()
    int team_size()
    int thread_number()
    int openmp_threads()
    bint flag_is_up(const int* flag)
    void raise_flag(int* flag)
    void prefetch(const void* address, size_t size)
    void stream_line(void* to, const void* source)
    void put_line(void* to, const void* source)
    void stream_fence()
    double product_error(double a, double b, double p)
    double one()
    double plus(double a, double b, double one)
    double minus(double a, double b, double one)
    const int BNBP_OPENMP
    const char* BNBP_ISA

cdef extern from "numbers.h" nogil:
    void all_in_range(char* to, const double* a, const double* b, const double* c, const double* d, Py_ssize_t count)
    void load_few(double* to, const float16* source, Py_ssize_t count)
    void load_few(double* to, const bfloat16* source, Py_ssize_t count)
    void load_few(double* to, const float* source, Py_ssize_t count)
    void load_few(double* to, const double* source, Py_ssize_t count)
    void store_few(float16* to, const double* source, Py_ssize_t count)
    void store_few(bfloat16* to, const double* source, Py_ssize_t count)
    void store_few(float* to, const double* source, Py_ssize_t count)
    void store_few(double* to, const double* source, Py_ssize_t count)
    void widen_line(float* to, const float16* source)
    void widen_line(float* to, const bfloat16* source)
    void narrow_line(float16* to, const float* source)
    void narrow_line(bfloat16* to, const float* source)

cdef extern from "lanes.h" nogil:
    cppclass lanes[R]:     # LANES numbers of float64, in registers, for data of type R
        lanes[R] operator+(lanes[R])
        lanes[R] operator-(lanes[R])
        lanes[R] operator*(lanes[R])
        lanes[R] operator-()

    cppclass eight:        # half of them, for float64
        eight operator+(eight)
        eight operator-(eight)
        eight operator*(eight)

    cppclass quarter:      # and a quarter, for other types
        quarter operator+(quarter)
        quarter operator-(quarter)
        quarter operator*(quarter)

    cppclass float_lanes:  # the same of float32
        float_lanes operator+(float_lanes)
        float_lanes operator-(float_lanes)
        float_lanes operator*(float_lanes)

    cppclass LaneSums[R]:
        lanes[R] delta
        lanes[R] delta_lo
        lanes[R] product
        lanes[R] product_lo

    cppclass Tensors[R]:   # of the second pass
        const R* x
        const R* dy
        const R* v         # what the mask is made from, or the addend
        R* to
        R* also            # the gradient of the addend

ctypedef fused number:     # what sums are made of
    double
    eight
    quarter

ctypedef fused arith:      # what `apply` computes in
    float_lanes
    lanes[double]

cdef extern from "lanes.h" nogil:
    void fill(float_lanes& to, float value)
    void load(float_lanes& to, const float* source)
    void store(float* to, const float_lanes& source)
    void join(lanes[double]& to, double left, double right, Py_ssize_t border)
    void join(float_lanes& to, float left, float right, Py_ssize_t border)
    float_lanes first_of(const float_lanes& source, Py_ssize_t count)
    eight first_of(const eight& source, Py_ssize_t count)
    quarter first_of(const quarter& source, Py_ssize_t count)
    eight plus(const eight& a, const eight& b, double one)
    eight minus(const eight& a, const eight& b, double one)
    eight product_error(const eight& a, const eight& b, const eight& p)
    quarter plus(const quarter& a, const quarter& b, double one)
    quarter minus(const quarter& a, const quarter& b, double one)
    quarter product_error(const quarter& a, const quarter& b, const quarter& p)
    eight& eight_of(lanes[double]& source, int k)
    quarter& quarter_of[R](lanes[R]& source, int k)
    void load_eight(eight& to, const double* source, Py_ssize_t count)
    void load_quarter(quarter& to, const float16* source, Py_ssize_t count)
    void load_quarter(quarter& to, const bfloat16* source, Py_ssize_t count)
    void load_quarter(quarter& to, const float* source, Py_ssize_t count)
    void half_sum[R](double* to, const lanes[R]& source)
    void sum_of_four(double* to, const double* source, Py_ssize_t apart)
    void load_lanes(lanes[double]& to, const float16* source, Py_ssize_t count)
    void load_lanes(lanes[double]& to, const bfloat16* source, Py_ssize_t count)
    void load_lanes(lanes[double]& to, const float* source, Py_ssize_t count)
    void load_lanes(lanes[double]& to, const double* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const float16* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const bfloat16* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const float* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const double* source, Py_ssize_t count)
    void store_lanes(float16* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_lanes(bfloat16* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_lanes(float* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_lanes(double* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_lanes(float16* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(bfloat16* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(float* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(double* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_beside(float16* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_beside(bfloat16* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_beside(float* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_beside(double* to, const lanes[double]& source, Py_ssize_t count, bint streams)
    void store_beside(float16* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_beside(bfloat16* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_beside(float* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_beside(double* to, const float_lanes& source, Py_ssize_t count, bint streams)
    # Cython names the type of the data when it calls these.
    void advance[R](Tensors[R]& at, Py_ssize_t elements)
    void fill "fill_for" [R](lanes[R]& to, double value)
    void load "load_for" [R](lanes[R]& to, const double* source)
    void store "store_for" [R](double* to, const lanes[R]& source)
    lanes[R] plus "plus_for" [R](const lanes[R]& a, const lanes[R]& b, double one)
    void load_lanes "load_lanes_for" [R](lanes[R]& to, const R* source)
    void add_floats[R](lanes[R]& to, const float_lanes& more)

cdef extern from "bounds.h" nogil:
    cppclass Bounds[R]:    # of the numbers whose gradient is taken, for LANES of them
        pass

    float_lanes clamped(const float_lanes& y, const float_lanes& low, const float_lanes& high)
    lanes[double] clamped(const lanes[double]& y, const lanes[double]& low, const lanes[double]& high)
    float_lanes between(const float_lanes& p, const float_lanes& v, const float_lanes& low, const float_lanes& high)
    lanes[double] between(const lanes[double]& p, const lanes[double]& v, const lanes[double]& low,
                          const lanes[double]& high)
    void load_between[R](R* to, const R* source, const R* v, Py_ssize_t count, const Bounds[R]& bounds)
    const bint MASKED_CONVERSION "BNBP_MASKED_CONVERSION"
    void widen_between[R](lanes[R]& to, const R* source, const R* v, const Bounds[R]& bounds)
    void quarter_between[R](quarter& to, const R* source, const R* v, Py_ssize_t count, int k, const Bounds[R]& bounds)
    void fill_bounds[R](Bounds[R]& bounds, double low, double high)
    void load_bounds[R](Bounds[R]& bounds, const void* low, const void* high, Py_ssize_t i)
    void set_own[R](void* to, Py_ssize_t i, double value, R tag)

# The reasons are times measured on two cores, x86-64-v4, float32: of an Intel Xeon (Sapphire Rapids or later, L2 2 MiB)
# where a line ends in (I), of an AMD EPYC (Zen 4, L2 1 MiB, L3 32 MiB) where it ends in (A).
cdef enum:
    # Accumulators side by side. 4 registers of 512 bits or 8 of 256 for both sums; twice as many AVX2 does not have.
    LANES = 16
    # Elements from which a run is summed in lanes, and those of two cache lines at most.
    RUN = 16
    # Terms that an accumulator takes before its sum is put aside, and the elements of a run that are so many.
    TERMS = 128
    PIECE = TERMS * 16
    # Terms of 16-bit numbers that are summed in float32: nine roundings are less than 2^-20 together.
    TOGETHER = 8
    # Elements of a channel that are a chunk: 5 % faster than 4096, and 16384 leave too few for a team. (I)
    CHUNK = 8192
    # Rows in a chunk of short runs: about so many, so many chunks, and no more rows than that: with what was put aside,
    # an accumulator then has 192 terms.
    ROWS = 256
    CHUNKS = 64
    MOST = 8192
    # Positions of a row below which rows are taken together, and about how many they then have.
    COLUMNS = 64
    SPAN = 512
    # Positions of a task, at most: their accumulators are 48 KiB.
    POSITIONS = 2048
    # Rows whose sums stay in registers before they go back to the accumulators. In L2, 4 and 16 are 5 to 10 % slower
    # (I); 16 are as good with 64 channels, and 5 % slower with 256 (A).
    GROUP = 8
    # Channels that are finished at a time: a register of 512 bits.
    FEW = 8
    # Bytes that a unit is read from where the caches hold everything: it is still in L1 when it is applied to.
    UNIT = 32768
    # How many times the L2 cache everything may be to be called cached: about what the last-level cache gives. 9.6 MB
    # of 32 x 512 x 7 x 7 take 0.37 ms so, and 0.44 as what comes from memory. (A)
    CACHED = 24
    # How many times the L2 cache a result must be to be written past the caches. Below 2 MB that costs up to 40 %. (I)
    STREAMED = 2
    # Channels of a unit, at most.
    WIDTH = 32
    # Elements of a unit's row, at least, where L2 allows it: less would be read in bits and pieces.
    SEGMENT = 512
    # Elements that are applied to, or reduced, at a time. 64 are slower, 512 read and write less at the same time:
    # 256 x 56 x 56 takes 9.0 ms instead of 8.6. (I)
    BLOCK = 128
    # Bytes asked for ahead, line by line, into L1, of what comes from memory: without, 256 x 28 x 28 takes 2.4 ms
    # instead of 1.8 (A). 2048 and 8192 are as good (I). In the caches it costs 10 to 30 % (A).
    AHEAD = 4096
    # Bytes from the first of the rows that are read together to the last, from memory. (A)
    NEARBY = 1024
    # Bytes of a page of memory, beyond which the CPU does not look ahead.
    PAGE = 4096
    # Elements below which a team is not worth starting: 50176 take 16 us on one core and 11 on two. (A)
    REGION = 32768
    # More threads than this were asked for by mistake. Where the system refuses one, GNU OpenMP ends the process.
    MAX_TEAM = 256
    # Elements that the calling thread goes through before it asks whether to end the call: 20 to 100 ms. To ask takes
    # the GIL, for which it may wait 5 ms.
    PATIENCE = 1 << 26

include "twofold.pxi"
include "element.pxi"
include "plan.pxi"
include "channels.pxi"
include "sums.pxi"
include "halves.pxi"
include "reduce_runs.pxi"
include "reduce_rows.pxi"
include "edges.pxi"
include "exact.pxi"
include "finish.pxi"
include "apply_runs.pxi"
include "apply_rows.pxi"
include "sweep.pxi"
include "tiles.pxi"
include "schedule.pxi"
include "table.pxi"
