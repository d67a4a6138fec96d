"""The kernels: `reduce` and `apply` over (N, C, S) memoryviews, and the operators made of them.

a. The view. A dense tensor whose channels are on axis k of its memory *is* an array of shape (N, C, S): N the product
   of the axes before k, S of those after it. NCHW has S = H*W; channels-last has S = 1. A channel's m = N*S elements
   are N contiguous runs of S. All kernels work on `const real[:, :, ::1]`. Tensors of any other layout are gathered a
   *tile* at a time, a chunk of some channels that fits L2, which is then a small batch of its own; see i.

b. Two passes. `reduce` reads the tensors and leaves sums for each channel; `apply` reads them again and writes the
   result, knowing the sums. Between them stands `finish`: a few operations for each channel.

       reduce   delta_sum          = sum dy_i                     beta_delta
                delta_centered_sum = sum dy_i (x_i - mean)        gamma_delta / inv_std
       apply    dx_i = gamma inv_std (dy_i - delta_sum/m - (x_i - mean) inv_std^2 delta_centered_sum/m)

   The forward operator is made of the same two: it reduces x - shift in the place of dy, and applies
   y_i = (x_i - mean) gamma inv_std + beta. Whoever has the tensors in parts takes the sums out after `reduce`, and
   gives those of the whole to `apply`.

c. Chunks. A channel is cut into chunks, whose sums are written to their own places and combined in the order of the
   chunks. The cut depends on N, C and S alone, so the bits of the result do not depend on the number of threads.

d. Runs and rows. A run (S >= RUN) is summed in LANES accumulators, one for each place modulo LANES. Shorter runs would
   end before that has begun: there the elements of a row, that is of neighbouring channels for one n, or of some whole
   rows of few channels, each have an accumulator of their own, which goes down the rows of the chunk. In both the order
   of the sum is part of the algorithm, not of the instruction set. GCC makes vector code of the inner loops, at any
   width, and keeps in registers the small arrays that start and end in a function.

e. Arithmetic. Sums are in float64, whatever `real` is. For float32 that is 29 bits more than the data has: the product
   of two is exact. Eight numbers at a time are added up for themselves, and these sums, no more than MOST / 8 of them,
   to the accumulator; so a chunk's sum is off by at most 256 times 2^-53 of the sum of the magnitudes, which is half a
   unit in the last place of float32 at a condition number of 2^20. For float64 there is nothing to spare, and the sums
   carry what each operation has rounded off (Ogita, Rump and Oishi, "Accurate sum and dot product", 2005): of the
   difference x_i - mean, of the product, and of the sum. The numbers of a channel are computed once, so they afford
   that too. `apply` is in the type of the data, and the mean is subtracted first: a*dy + b*x + c with precomputed a, b,
   c would be cheaper and lose everything to cancellation when the mean is far from 0. Only a channel whose coefficients
   are out of float32's range is computed in float64.

   16-bit numbers are float32 in `apply`, and the result is rounded once. Their sums are those of float32. Of float16,
   the products are exact even with a difference: `center` takes the place of the mean, a multiple of 2^-24 as x_i is,
   so that x_i - center has 42 bits, and dy_i 11. Then one instruction that multiplies and adds gives the bits of two.
   The rest, (center - mean) sum dy_i, is added in `finish`; it cancels nothing, because x_i - center is 0 or at least
   twice as large as center - mean.

f. Statistics. The sums of d = x - shift and of d^2 about the chunk's first element as the shift give the chunk's mean
   and its sum of squared deviations, m2 = sum d^2 - (sum d)^2 / n, in one read. That cancels no more than a factor of n
   + 1, because the shift is one of the n elements and so within sqrt(n) standard deviations of their mean; chunks of
   2^16 elements at most have that to spare, in float64 sums for float32, in twofold sums for float64. A constant chunk
   has d = 0. The chunks are merged as in Chan, Golub and LeVeque (1983).

g. The schedule. What the second pass reads, the first should have left in L2. So the work goes by *units*, a few
   neighbouring channels, and a `sweep` applies to one unit while it reduces the next, block by block: the memory then
   reads and writes at the same time, as the floor does. Where L2 holds them, each thread has units of its own and waits
   for nobody; a larger unit is worked on by all threads together, each on its own chunks, with a barrier between the
   sweeps. A unit too large for all L2 caches together is reduced first and then applied to, the last chunk first. Short
   runs have no sweep: they are reduced and then applied to, unit by unit, and where a row holds all channels
   (channels-last) there is one unit, everything.

   Results that do not fit L2 are streamed past the caches. That wants whole cache lines. A line that was written in two
   parts would be read from memory, and every write after it would wait: at 28 x 28, where NumPy's arrays begin in the
   middle of a line, that cost a quarter of the time. So a line that two channels share is computed with the
   coefficients of both, and one that two units or tasks share is left to the second.

h. Borrowed views. The kernels are called through a C table with plain pointers and without the GIL, so the views have
   no Python object behind them: `VIEW` fills in address, shape and strides of a view that is None. With
   `initializedcheck` off nothing ever looks at the object.

i. Tiles. Where a tensor is not dense in the order of the input's memory, a task gathers its chunk of all of them,
   runs the same kernels on the copies, and scatters the result. Chunks and their order are those of dense tensors, and
   so are the bits. Nothing is streamed, and both passes gather; nothing is ever copied as a whole.
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport NAN, fabs, sqrt
from libc.stdlib cimport free, malloc
from libc.stdint cimport uintptr_t
from libc.string cimport memchr, memcpy, memset

from bnbp.kernels cimport (
    BNBP_F16,
    BNBP_F32,
    BNBP_F64,
    BNBP_INTERRUPTED,
    BNBP_KERNELS_ABI,
    BNBP_KERNELS_CAPSULE,
    BNBP_NO_MEMORY,
    BNBP_OK,
    bnbp_arguments,
    bnbp_kernels,
    bnbp_status,
    bnbp_type,
)

cdef extern from "machine.h" nogil:
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
    void stream_line(void* to, const void* source)
    void stream_fence()
    double product_error(double a, double b, double p)
    double one()
    double plus(double a, double b, double one)
    double minus(double a, double b, double one)
    const int BNBP_OPENMP
    const char* BNBP_ISA

cdef extern from "lanes.h" nogil:
    cppclass lanes:        # LANES numbers of float64, in registers
        lanes operator+(lanes)
        lanes operator-(lanes)
        lanes operator*(lanes)
        lanes operator-()

    cppclass quarter:      # and of a quarter of them
        quarter operator+(quarter)
        quarter operator-(quarter)
        quarter operator*(quarter)

    cppclass float_lanes:  # the same of float32
        float_lanes operator+(float_lanes)
        float_lanes operator-(float_lanes)
        float_lanes operator*(float_lanes)

    ctypedef struct LaneSums:
        lanes delta
        lanes delta_lo
        lanes product
        lanes product_lo

ctypedef fused number:     # what sums are made of
    double
    lanes
    quarter

ctypedef fused arith:      # what `apply` computes in
    float_lanes
    lanes

cdef extern from "lanes.h" nogil:
    void fill(lanes& to, double value)
    void fill(float_lanes& to, float value)
    float_lanes first_of(const float_lanes& source, Py_ssize_t count)
    lanes widened(const float_lanes& source)
    float_lanes narrowed(const lanes& source)
    void store(float* to, const float_lanes& source)
    void load(lanes& to, const double* source)
    void load(float_lanes& to, const float* source)
    void store(double* to, const lanes& source)
    lanes plus(const lanes& a, const lanes& b, double one)
    lanes minus(const lanes& a, const lanes& b, double one)
    lanes product_error(const lanes& a, const lanes& b, const lanes& p)
    quarter plus(const quarter& a, const quarter& b, double one)
    quarter minus(const quarter& a, const quarter& b, double one)
    quarter product_error(const quarter& a, const quarter& b, const quarter& p)
    quarter& quarter_of(lanes& source, int k)
    quarter first_of(const quarter& source, Py_ssize_t count)
    void load_quarter(quarter& to, const float16* source, Py_ssize_t count)
    void load_quarter(quarter& to, const bfloat16* source, Py_ssize_t count)
    void load_quarter(quarter& to, const float* source, Py_ssize_t count)
    void load_quarter(quarter& to, const double* source, Py_ssize_t count)
    void half_sum(double* to, const lanes& source)
    lanes first_of(const lanes& source, Py_ssize_t count)
    lanes join(double left, double right, Py_ssize_t border)
    float_lanes join(float left, float right, Py_ssize_t border)
    void sum_of_four(double* to, const double* source, Py_ssize_t apart)
    void load_lanes(lanes& to, const float16* source, Py_ssize_t count)
    void load_lanes(lanes& to, const bfloat16* source, Py_ssize_t count)
    void load_lanes(lanes& to, const float* source, Py_ssize_t count)
    void load_lanes(lanes& to, const double* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const float16* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const bfloat16* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const float* source, Py_ssize_t count)
    void load_lanes(float_lanes& to, const double* source, Py_ssize_t count)
    void store_lanes(float16* to, const lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(bfloat16* to, const lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(float* to, const lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(double* to, const lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(float16* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(bfloat16* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(float* to, const float_lanes& source, Py_ssize_t count, bint streams)
    void store_lanes(double* to, const float_lanes& source, Py_ssize_t count, bint streams)

# The reasons are times measured on two cores of an Intel Xeon (Sapphire Rapids or later, L2 2 MiB), x86-64-v4, float32.
cdef enum:
    # Elements from which a run is summed in lanes: those of one register.
    RUN = 16
    # Elements of a channel that are summed together: 5 % faster than 4096, and 16384 leave too few for a team.
    CHUNK = 8192
    # Accumulators of a run: 4 registers of 512 bits or 8 of 256 for both sums; twice as many AVX2 does not have.
    LANES = 16
    # Terms that an accumulator takes before its sum is put aside.
    TERMS = 128
    PIECE = TERMS * 16
    # Positions of a row whose coefficients are in registers together.
    COLUMNS = 64
    # Terms of 16-bit numbers that are summed in float32: nine roundings are less than 2^-20 together.
    TOGETHER = 8
    # Channels that are finished at a time: a register of 512 bits.
    FEW = 8
    # Bytes that a unit is read from where everything fits L2: it is still in L1 when it is applied to.
    UNIT = 32768
    # Channels of a unit; the lanes of these are 16 KiB.
    WIDTH = 32
    # Elements of a unit's row, at least, where L2 allows it: less would be read in bits and pieces.
    SEGMENT = 512
    # Elements that are applied to, or reduced, at a time. 64 are slower, 512 read and write less at the same time:
    # 256 x 56 x 56 takes 9.0 ms instead of 8.6.
    BLOCK = 128
    # Positions of a row that are taken together: the accumulators are in L1, with room for the data. 1024 are 10 %
    # slower.
    SPAN = 512
    # Positions of a row that has all channels, at most: 2048 channels in four parts take 1.53 ms, in one 1.41.
    POSITIONS = 2048
    # Rows whose sums stay in registers before they go back to the accumulators. 4 and 16 are 5 to 10 % slower.
    GROUP = 8
    # Rows in a chunk of short runs, at least: 64 cost 10 % for their sums.
    ROWS = 256
    # Chunks of short runs, about, where there are more rows than that: those of 128 rows took as long to combine as to
    # read, for 25088 rows of 512 channels.
    CHUNKS = 64
    # Rows in a chunk of short runs, at most.
    MOST = 8192
    # Bytes asked for ahead, line by line, into L1: 64 x 112 x 112 reduce in 5.2 ms instead of 7.6 for it, and into L2
    # only, 256 x 56 x 56 take 9.6 ms instead of 9.0. 2048 and 8192 are as good. Asking only where a page begins, or for
    # every other line, and leaving the rest to the hardware, costs 10 and 30 %.
    AHEAD = 4096
    # Elements below which a team is not worth starting. 16384 take 9 us on one core and 11 on two, 32768 15 and 15,
    # 65536 29 and 20.
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
include "finish.pxi"
include "apply_runs.pxi"
include "apply_rows.pxi"
include "sweep.pxi"
include "tiles.pxi"
include "schedule.pxi"
include "table.pxi"
