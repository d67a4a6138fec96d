"""The floor: loops that read and write the bytes that an operator must, and do next to nothing with them.

`copy2` reads two arrays and writes one, as the gradient operators do, `copy1` reads one and writes one, as the forward
operators do; `read2` and `read1` only read, as a pass that computes sums does. `bnbp bench` times them on the arrays of
the operator, with its number of threads, and gives the operator's time as a multiple of theirs.

Each thread takes a contiguous share. The sums are formed in lanes, so that the compiler makes vector code of them
without leave to reorder them, and the time is that of the memory. Like the kernels this is compiled once for each level
of the instruction set: with the 16-byte vectors of plain x86-64, `copy2` takes up to twice as long in the L3 cache.
"""

from cython.parallel cimport prange
from libc.stdint cimport uintptr_t

cdef extern from "machine.h" nogil:
    void prefetch(const void* address, size_t size)
    void stream(void* to, const void* source, size_t size)
    void stream_fence()

ctypedef fused real:
    float
    double

cdef enum:
    BLOCK = 256   # elements computed before they are streamed: enough for vector code, and they stay in the first cache
    LINE = 64     # bytes of a cache line, of which a streaming store takes whole ones
    AHEAD = 4096  # bytes from what is read to what is prefetched


cdef void copy2_share(const real* a, const real* b, real* out, Py_ssize_t n, bint streaming) noexcept nogil:
    cdef real[256] block
    cdef Py_ssize_t i = 0, k
    if streaming:
        while i < n and <uintptr_t> (out + i) % LINE:
            out[i] = a[i] + b[i]
            i += 1
        while i + BLOCK <= n:
            prefetch(<const char*> (a + i) + AHEAD, BLOCK * sizeof(real))
            prefetch(<const char*> (b + i) + AHEAD, BLOCK * sizeof(real))
            for k in range(256):
                block[k] = a[i + k] + b[i + k]
            stream(out + i, block, BLOCK * sizeof(real))
            i += BLOCK
        stream_fence()
    for k in range(i, n):
        out[k] = a[k] + b[k]


cdef void copy1_share(const real* a, real* out, Py_ssize_t n, bint streaming) noexcept nogil:
    cdef Py_ssize_t i = 0, k
    if streaming:
        while i < n and <uintptr_t> (out + i) % LINE:
            out[i] = a[i]
            i += 1
        while i + BLOCK <= n:
            prefetch(<const char*> (a + i) + AHEAD, BLOCK * sizeof(real))
            stream(out + i, a + i, BLOCK * sizeof(real))
            i += BLOCK
        stream_fence()
    for k in range(i, n):
        out[k] = a[k]


cdef double read2_share(const real* a, const real* b, Py_ssize_t n) noexcept nogil:
    cdef real[32] lanes
    cdef Py_ssize_t i = 0, _j, k
    cdef double total = 0
    for k in range(32):
        lanes[k] = 0
    while i + BLOCK <= n:
        prefetch(<const char*> (a + i) + AHEAD, BLOCK * sizeof(real))
        prefetch(<const char*> (b + i) + AHEAD, BLOCK * sizeof(real))
        for _j in range(8):
            for k in range(32):
                lanes[k] += a[i + k] + b[i + k]
            i += 32
    for k in range(i, n):
        total += a[k] + b[k]
    for k in range(32):
        total += lanes[k]
    return total


cdef double read1_share(const real* a, Py_ssize_t n) noexcept nogil:
    cdef real[32] lanes
    cdef Py_ssize_t i = 0, _j, k
    cdef double total = 0
    for k in range(32):
        lanes[k] = 0
    while i + BLOCK <= n:
        prefetch(<const char*> (a + i) + AHEAD, BLOCK * sizeof(real))
        for _j in range(8):
            for k in range(32):
                lanes[k] += a[i + k]
            i += 32
    for k in range(i, n):
        total += a[k]
    for k in range(32):
        total += lanes[k]
    return total


cdef inline Py_ssize_t first_of(int thread, int num_threads, Py_ssize_t n) noexcept nogil:
    """Where a thread's share begins: a whole number of blocks from the start."""
    cdef Py_ssize_t blocks = (n + BLOCK - 1) // BLOCK
    return min(n, blocks * thread // num_threads * BLOCK)


cdef void copy2_all(
    const real[::1] a, const real[::1] b, real[::1] out, int num_threads, bint streaming,
) noexcept nogil:
    cdef Py_ssize_t n = a.shape[0], start, stop
    cdef const real* pa = &a[0]
    cdef const real* pb = &b[0]
    cdef real* to = &out[0]
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        copy2_share(pa + start, pb + start, to + start, stop - start, streaming)


cdef void copy1_all(const real[::1] a, real[::1] out, int num_threads, bint streaming) noexcept nogil:
    cdef Py_ssize_t n = a.shape[0], start, stop
    cdef const real* pa = &a[0]
    cdef real* to = &out[0]
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        copy1_share(pa + start, to + start, stop - start, streaming)


cdef double read2_all(const real[::1] a, const real[::1] b, int num_threads) noexcept nogil:
    cdef Py_ssize_t n = a.shape[0], start, stop
    cdef const real* pa = &a[0]
    cdef const real* pb = &b[0]
    cdef double total = 0
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        total += read2_share(pa + start, pb + start, stop - start)
    return total


cdef double read1_all(const real[::1] a, int num_threads) noexcept nogil:
    cdef Py_ssize_t n = a.shape[0], start, stop
    cdef const real* pa = &a[0]
    cdef double total = 0
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        total += read1_share(pa + start, stop - start)
    return total


def copy2(a, b, out, int num_threads, bint streaming=True):
    """Write a + b to `out`: three arrays of one axis, of the same type and length."""
    _check(num_threads, a, b, out)
    cdef const float[::1] a32, b32
    cdef const double[::1] a64, b64
    cdef float[::1] out32
    cdef double[::1] out64
    if a.itemsize == sizeof(float):
        a32, b32, out32 = a, b, out
        with nogil:
            copy2_all(a32, b32, out32, num_threads, streaming)
    else:
        a64, b64, out64 = a, b, out
        with nogil:
            copy2_all(a64, b64, out64, num_threads, streaming)


def copy1(a, out, int num_threads, bint streaming=True):
    """Write a to `out`: two arrays of one axis, of the same type and length."""
    _check(num_threads, a, out)
    cdef const float[::1] a32
    cdef const double[::1] a64
    cdef float[::1] out32
    cdef double[::1] out64
    if a.itemsize == sizeof(float):
        a32, out32 = a, out
        with nogil:
            copy1_all(a32, out32, num_threads, streaming)
    else:
        a64, out64 = a, out
        with nogil:
            copy1_all(a64, out64, num_threads, streaming)


def read2(a, b, int num_threads):
    """The sum of two arrays, in the lanes of their type: returned so that no compiler can leave the reading out."""
    _check(num_threads, a, b)
    cdef const float[::1] a32, b32
    cdef const double[::1] a64, b64
    cdef double total
    if a.itemsize == sizeof(float):
        a32, b32 = a, b
        with nogil:
            total = read2_all(a32, b32, num_threads)
    else:
        a64, b64 = a, b
        with nogil:
            total = read2_all(a64, b64, num_threads)
    return total


def read1(a, int num_threads):
    """The sum of an array, as `read2`."""
    _check(num_threads, a)
    cdef const float[::1] a32
    cdef const double[::1] a64
    cdef double total
    if a.itemsize == sizeof(float):
        a32 = a
        with nogil:
            total = read1_all(a32, num_threads)
    else:
        a64 = a
        with nogil:
            total = read1_all(a64, num_threads)
    return total


cdef _check(int num_threads, a, b=None, c=None):
    """What the loops take for granted; the views check types and axes."""
    if num_threads < 1:
        raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
    for other in (b, c):
        if other is not None and len(other) != len(a):
            raise ValueError(f"expected arrays of one length, got {len(a)} and {len(other)}")
